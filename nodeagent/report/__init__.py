"""What the agent reports to the cluster: Kubernetes Events, which wait on disk while the API server is away.

`events` takes them, `outbox` keeps them, `kube` sends them, `endpoint` knows where to.
"""
