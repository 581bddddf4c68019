"""Fixtures of the whole house: nothing left behind, nothing blocks the loop, short paths, root only where marked."""

from __future__ import annotations

import asyncio
import inspect
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from nodeagent.metrics import Metrics
from tests import blocking, leftovers

SHORT = f"/tmp/na{os.getpid()}-"


def pytest_sessionstart() -> None:
    leftovers.announce()
    leftovers.watch_children()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`@pytest.mark.root` tests need uid 0 for namespaces, cgroups and mounts; they are skipped, with the reason, elsewhere."""
    if os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(
                pytest.mark.skip(reason="needs root (namespaces, cgroups, uids): run as root to include it")
            )


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fails a test that leaves a thread, child process, descriptor, mount or cgroup. See tests/leftovers.py."""
    own = (str(tmp_path_factory.getbasetemp()), SHORT)
    before = leftovers.Snapshot.take()
    yield
    leftovers.fail_on(leftovers.leftovers(before, own))


@pytest.fixture(autouse=True)
def _no_task_left(request: pytest.FixtureRequest, nothing_left_behind: None) -> None:
    """Set up after `nothing_left_behind` so that the loop is closed before descriptors are counted, and before the
    test's own fixtures so that theirs have ended before tasks are."""
    function = getattr(request, "function", None)
    function = getattr(getattr(function, "hypothesis", None), "inner_test", function)
    if inspect.iscoroutinefunction(function):
        request.getfixturevalue("_tasks_of_the_loop")


@pytest.fixture
async def _tasks_of_the_loop() -> AsyncIterator[None]:
    before = blocking.running_tasks()
    yield
    deadline = asyncio.get_running_loop().time() + leftovers.GRACE_S
    while (left := blocking.running_tasks() - before) and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(leftovers.POLL_S)
    leftovers.fail_on([f"task {task.get_name()}: {task.get_coro()}" for task in left])


@pytest.fixture(scope="session")
def _detector() -> Iterator[blocking.Detector]:
    with blocking.detecting() as detector:
        yield detector


@pytest.fixture(autouse=True)
def nothing_blocks_the_loop(_detector: blocking.Detector) -> Iterator[None]:
    """Fails a test in which our code made a blocking call inside a running loop. See tests/blocking.py."""
    _detector.drain()
    yield
    if seen := _detector.drain():
        pytest.fail("blocked the event loop:\n  " + "\n  ".join(sorted(set(seen))), pytrace=False)


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A directory with a path short enough for Unix sockets (sun_path holds 108 bytes; pytest's tmp_path may not fit)."""
    path = Path(tempfile.mkdtemp(prefix=SHORT))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()
