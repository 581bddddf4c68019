"""Fixtures of the tests in a guest: one guest for each module, and what it has said where a test fails.

A module's guest outlives its tests, so `nothing_left_behind` of the house cannot see what it leaves: here the same look is
taken around the whole module.
"""

from __future__ import annotations

import asyncio
import glob
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any

import pytest
import pytest_asyncio

from tests import blocking, leftovers
from tests.vm import rootfs, wire
from tests.vm.gadgets import Bench, bench
from tests.vm.lab import PLACES, Lab, Vm
from tests.vm.node import Node, node

MEASURED: list[str] = []
SHOWN_CHARS = 20_000


@pytest.fixture(scope="module", autouse=True)
def nothing_left_by_the_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = leftovers.Snapshot.take()
    yield
    left = leftovers.leftovers(before, (str(tmp_path_factory.getbasetemp()), PLACES))
    leftovers.fail_on([*left, *(f"directory {path}" for path in glob.glob(f"{PLACES}*"))])


@pytest_asyncio.fixture(loop_scope="module")
async def _tasks_of_the_loop() -> AsyncIterator[None]:
    """As tests/conftest.py has it, in the loop that a module's tests share."""
    before = blocking.running_tasks()
    yield
    deadline = asyncio.get_running_loop().time() + leftovers.GRACE_S
    while (left := blocking.running_tasks() - before) and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(leftovers.POLL_S)
    leftovers.fail_on([f"task {task.get_name()}: {task.get_coro()}" for task in left])


@pytest.fixture(scope="module")
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Tell the person who waits for the root to be built."""
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")
    return lambda line: terminal.write_line(f"lab: {line}") if terminal else None


@pytest.fixture(scope="module")
def lab() -> Lab:
    if why := rootfs.impossible():
        pytest.skip(why)
    return Lab()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vm(lab: Lab, say: Callable[[str], None]) -> AsyncIterator[Vm]:
    async with Vm(lab, ports=[wire.PORT], logs=[wire.LOG], say=say) as made:
        MEASURED.append(f"boot to the agent's first word {made.boot_s:.1f} s, Linux {made.release}")
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gadgets(vm: Vm) -> AsyncIterator[Bench]:
    async with bench(vm) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guest_node(vm: Vm) -> AsyncIterator[Node]:
    async with node(vm) as made:
        yield made


@pytest.fixture
def measured() -> Callable[[str], None]:
    """A line for the end of the test run: figures that are worth reading also when nothing failed."""
    return MEASURED.append


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if MEASURED:
        terminalreporter.section("measured in the guest", sep="-")
        for line in MEASURED:
            terminalreporter.write_line(line)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Below the failure, the end of the guest's console and of the daemon's log."""
    report = yield
    guest = getattr(item, "funcargs", {}).get("vm")
    if report.failed and isinstance(guest, Vm):
        report.sections.append(("the guest's console", guest.log[-SHOWN_CHARS:]))
        report.sections.append(("the daemon's log", guest.log_of(wire.LOG)[-SHOWN_CHARS:]))
    return report
