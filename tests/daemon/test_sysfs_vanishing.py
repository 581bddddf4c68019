"""Devices that vanish while they are read, at every moment. Half a minute: too long for `make check`."""

import builtins
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from tests import machines
from tests.unit.test_sysfs import read


@pytest.mark.parametrize("machine", ["yubikey", "hub-tree", "headset"])
def test_the_tree_may_vanish_at_any_moment(machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it is deleted at the n-th thing that the reader opens, for every n."""
    opened, scanned = builtins.open, os.scandir
    left = 0

    def counted(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                shutil.rmtree(tmp_path / "sys/devices")
            return real(*args, **kwargs)

        return call

    ports = {u.port for u in read(machines.machine(tmp_path, machine))}
    moment = 0
    while left <= 0:
        moment += 1
        host = machines.machine(tmp_path, machine)
        left = moment
        with monkeypatch.context() as patched:
            patched.setattr(builtins, "open", counted(opened))
            patched.setattr(os, "scandir", counted(scanned))
            found = read(host)
        assert {u.port for u in found} <= ports
    assert moment > 20


def test_the_tree_may_vanish_while_another_thread_deletes_it(tmp_path: Path) -> None:
    for _ in range(30):
        host = machines.machine(tmp_path, "hub-tree")
        deleting = threading.Thread(target=shutil.rmtree, args=(tmp_path / "sys/devices",))
        deleting.start()
        while deleting.is_alive():
            assert len(read(host)) <= 6
        deleting.join()
        assert read(host) == ()
