"""The front of a container's device program: literal instructions, what the whole then decides, and that it does not grow."""

from __future__ import annotations

import pytest

from nodeagent.errors import AgentError, Reason
from nodeagent.sandboxes.device_program import (
    MAX_RULES,
    MKNOD,
    READ,
    WRITE,
    DeviceNumbers,
    Instruction,
    Rule,
    amended,
    decision,
    parts,
    put_program,
    take_program,
)
from tests.unit.device_program_captures import BLINDED, BLINDED_GRANTED, RUNC

FUSE = DeviceNumbers("c", 10, 229)
STICK = DeviceNumbers("b", 8, 16)
ZERO = DeviceNumbers("c", 1, 5)
REFUSES_ALL = bytes.fromhex("b7000000000000009500000000000000")
HEAD = (
    "b70200006564414e"  # r2 = mark
    "b703000001000000"  # r3 = one rule
    "6112000000000000"  # r2 = access_type
    "6113040000000000"  # r3 = major
    "6114080000000000"  # r4 = minor
    "bf25000000000000"  # r5 = r2
    "57050000ffff0000"  # r5 &= 0xffff
)


def test_a_grant_is_written_in_front() -> None:
    front = HEAD + (
        "5505050002000000"  # if r5 != char goto +5
        "550304000a000000"  # if r3 != 10 goto +4
        "55040300e5000000"  # if r4 != 229 goto +3
        "450202000000f9ff"  # if r2 & ~(read | write | type) goto +2
        "b700000001000000"  # r0 = 1
        "9500000000000000"  # exit
    )
    granted = amended(take_program(REFUSES_ALL), [Rule(FUSE, allowed=True)])
    assert put_program(granted) == bytes.fromhex(front) + REFUSES_ALL


def test_a_refusal_is_written_in_front_of_what_the_runtime_allows() -> None:
    front = HEAD + (
        "5505040002000000"  # if r5 != char goto +4
        "5503030001000000"  # if r3 != 1 goto +3
        "5504020005000000"  # if r4 != 5 goto +2
        "b700000000000000"  # r0 = 0
        "9500000000000000"  # exit
    )
    revoked = amended(take_program(RUNC), [Rule(ZERO, allowed=False)])
    assert put_program(revoked) == bytes.fromhex(front) + RUNC
    assert amended(revoked, [Rule(ZERO, allowed=False)]) == revoked
    assert put_program(amended(revoked, [Rule(ZERO, allowed=True)])) == RUNC


@pytest.mark.parametrize(
    ("numbers", "access", "allowed"),
    [
        (ZERO, READ | WRITE, True),
        (ZERO, MKNOD, True),
        (FUSE, READ, False),
        (FUSE, MKNOD, True),
        (STICK, READ, False),
        (STICK, MKNOD, True),
        (DeviceNumbers("c", 136, 7), WRITE, True),
        (DeviceNumbers("c", 137, 7), WRITE, False),
        (DeviceNumbers("b", 1, 5), READ, False),
    ],
)
def test_what_runc_decides_is_understood(numbers: DeviceNumbers, access: int, allowed: bool) -> None:
    assert decision(take_program(RUNC), numbers, access) is allowed
    assert decision(take_program(BLINDED), numbers, access) is allowed


def test_rules_decide_before_the_runtime_and_only_for_their_device() -> None:
    program = amended(take_program(RUNC), [Rule(FUSE, True), Rule(STICK, True), Rule(ZERO, False)])
    for access in (READ, WRITE, READ | WRITE):
        assert decision(program, FUSE, access) is True
        assert decision(program, STICK, access) is True
        assert decision(program, ZERO, access) is False
        assert decision(program, DeviceNumbers("c", 10, 228), access) is False
        assert decision(program, DeviceNumbers("b", 10, 229), access) is False
        assert decision(program, DeviceNumbers("c", 8, 16), access) is False
        assert decision(program, DeviceNumbers("c", 1, 3), access) is True
    assert decision(program, FUSE, MKNOD) is True, "as the runtime has it"
    assert decision(amended(take_program(REFUSES_ALL), [Rule(FUSE, True)]), FUSE, MKNOD | READ) is False
    assert parts(program) == ((Rule(STICK, True), Rule(ZERO, False), Rule(FUSE, True)), take_program(RUNC))


def test_a_thousand_replugs_leave_nothing() -> None:
    program = take_program(RUNC)
    for devnum in range(1, 1001):
        numbers = DeviceNumbers("c", 189, devnum)
        program = amended(program, [Rule(numbers, True)])
        assert len(parts(program)[0]) == 1
        program = amended(program, [Rule(numbers, False)])
    assert put_program(program) == RUNC


def test_blinded_constants_are_put_back() -> None:
    """The kernel writes `r0 = 0` as `r0 ^= r0`, whatever the width was (the second last instruction)."""
    *plain, last, leave = take_program(RUNC)
    assert last == Instruction(0xB4, immediate=0)
    assert take_program(BLINDED) == (*plain, Instruction(0xB7, immediate=0), leave)
    assert parts(take_program(BLINDED_GRANTED)) == ((Rule(FUSE, True),), take_program(BLINDED))


def test_too_many_rules_are_refused() -> None:
    rules = [Rule(DeviceNumbers("c", 189, n), True) for n in range(MAX_RULES + 1)]
    with pytest.raises(AgentError) as refusal:
        amended(take_program(RUNC), rules)
    assert refusal.value.reason is Reason.TOO_MANY
    assert len(parts(amended(take_program(RUNC), rules[1:]))[0]) == MAX_RULES


@pytest.mark.parametrize(
    "program",
    [
        pytest.param("8500000005000000b7000000000000009500000000000000", id="a call"),
        pytest.param("18210000070000000000000000000000b7000000000000009500000000000000", id="a map"),
        pytest.param("b70b000000000000bfb00000000000009500000000000000", id="the kernel's own register"),
    ],
)
def test_what_cannot_be_loaded_again_is_refused(program: str) -> None:
    with pytest.raises(AgentError) as refusal:
        amended(take_program(bytes.fromhex(program)), [Rule(FUSE, True)])
    assert refusal.value.reason is Reason.NOT_SUPPORTED
    assert "start the pod anew" in refusal.value.hint


@pytest.mark.parametrize("damage", [1, 7, 8, 9, 12])
def test_a_front_that_somebody_has_changed_is_not_touched(damage: int) -> None:
    program = list(amended(take_program(RUNC), [Rule(FUSE, True)]))
    program[damage] = Instruction(0xB7, dst=1, immediate=99)
    with pytest.raises(AgentError, match="changed by somebody"):
        parts(tuple(program))


@pytest.mark.parametrize("count", [-1, 0, 2, 1 << 30])
def test_a_count_that_lies_is_not_believed(count: int) -> None:
    program = list(amended(take_program(REFUSES_ALL), [Rule(FUSE, True)]))
    program[1] = Instruction(0xB7, dst=3, immediate=count)
    with pytest.raises(AgentError, match="changed by somebody"):
        parts(tuple(program))


@pytest.mark.parametrize(
    "program",
    [
        pytest.param("0500ffff00000000", id="a loop"),
        pytest.param("05007f0000000000", id="a jump out of it"),
        pytest.param("bf100000000000009500000000000000", id="a pointer returned"),
        pytest.param("79100000000000009500000000000000", id="8 bytes of the context"),
        pytest.param("61101000000000009500000000000000", id="behind the context"),
        pytest.param("9500000000000000", id="nothing returned"),
        pytest.param("85000000050000009500000000000000", id="a call"),
    ],
)
def test_what_is_not_understood_is_not_decided(program: str) -> None:
    assert decision(take_program(bytes.fromhex(program)), FUSE, READ) is None


@pytest.mark.parametrize("data", [b"", b"1234567", RUNC[:-1]])
def test_half_an_instruction_is_malformed(data: bytes) -> None:
    with pytest.raises(AgentError) as refusal:
        take_program(data)
    assert refusal.value.reason is Reason.MALFORMED
