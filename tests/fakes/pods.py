"""Pods from a line."""

from __future__ import annotations

from nodeagent.demo.pods import ContainerSpec, PodSpec

PRINTER = {"opencdi.io/printer": 1}


def pod(
    name: str, *, limits: dict[str, int] = PRINTER, init: dict[str, int] | None = None, static: bool = False
) -> PodSpec:
    """A pod with one app container `desktop`, and before it an init container `prepare` where `init` has its limits."""
    containers = [ContainerSpec(name="desktop", limits=limits)]
    if init is not None:
        containers.insert(0, ContainerSpec(name="prepare", limits=init, init=True))
    return PodSpec(name=name, uid=f"uid-{name}", containers=tuple(containers), static=static)
