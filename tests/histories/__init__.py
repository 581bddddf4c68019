"""Random histories of devices, pods, kubelets and crashes against a model.

    python -m tests.histories 0 150            these seeds; prints each that violates something as a script
    python -m tests.histories --shrink 17      one seed, made as short as it still fails
    python -m tests.histories --script FILE    a script (`# seed N` in its first line chooses the delays)

The real parts of the daemon run on virtual time (clockwork.py) between fakes (edges.py, kubelet.py); the world goes on
around them (world.py) and the model watches (model.py). Each life of the daemon is a process of its own, and a crash is its
end at a chosen point: between any two steps, statements or changes of the file system (life.py, run.py).
"""
