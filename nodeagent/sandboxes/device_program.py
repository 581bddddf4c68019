"""The BPF program that guards the devices of a container under cgroup v2, with a few rules of ours in front of it. Pure.

Several programs on one cgroup must all allow an access, so permission cannot be added beside the runtime's program: it must
go into it. What the kernel shows of a loaded program are the instructions after verification ("xlated"). For this program type
they can be loaded again: its accesses to the context are not rewritten (cg_dev_verifier_ops has no convert_ctx_access), so they
differ from what the runtime loaded by removed dead code at most. Constants that the JIT has blinded (net.core.bpf_jit_harden=2)
are put back first. It does not hold for calls and maps, whose operands are shown as numbers of this kernel: refused.

Our part comes first, reads registers that the program behind it sets before it reads them, and keeps the context in r1:

    r2 = MARK; r3 = number of rules                      so that the next change finds it, and replaces it
    r2 = access_type; r3 = major; r4 = minor; r5 = r2 & 0xffff
    per rule, by numbers:  if r5 != type or r3 != major or r4 != minor: to the next rule
                           allow: if anything but read and write is asked for: to the next rule
                           return 1 or 0

A rule that the program behind would decide the same way is left out, so a device that goes and comes a thousand times with
other numbers leaves at most the refusal of those that the runtime itself had allowed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Final, Literal

import msgspec

from nodeagent.errors import AgentError, Reason

MAX_RULES = 64
MARK: Final = 0x4E41_6465
MAX_STEPS = 1 << 16
MKNOD, READ, WRITE = 1, 2, 4
"""BPF_DEVCG_ACC_* (linux/bpf.h)."""
KINDS: Final = {"b": 1, "c": 2}
"""BPF_DEVCG_DEV_*."""
NOT_READ_WRITE: Final = -0x7_0000
"""As a signed immediate: every bit of access_type but (READ | WRITE) << 16 and the 16 bits of the type."""
START_ANEW = "start the pod anew: a new container is given the device as it is now"

Kind = Literal["b", "c"]


class Instruction(msgspec.Struct, frozen=True):
    """One instruction (Documentation/bpf/standardization/instruction-set.rst): opcode, registers, offset, immediate."""

    code: int
    dst: int = 0
    src: int = 0
    offset: int = 0
    immediate: int = 0


class DeviceNumbers(msgspec.Struct, frozen=True, order=True):
    """A device as a device cgroup knows it."""

    kind: Kind
    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.kind} {self.major}:{self.minor}"


class Rule(msgspec.Struct, frozen=True, order=True):
    """Whether a device may be read and written. Where a refusal is written into a program it covers making nodes as well."""

    numbers: DeviceNumbers
    allowed: bool


Program = tuple[Instruction, ...]
LDX_W, MOV_IMM, MOV_REG, AND_IMM = 0x61, 0xB7, 0xBF, 0x57
JNE_IMM, JSET_IMM, CALL, EXIT, LD_IMM64 = 0x55, 0x45, 0x85, 0x95, 0x18
BLINDING_REGISTER = 11
"""BPF_REG_AX: only the kernel itself may use it."""

CODEC = struct.Struct("<BBhi")


def take_program(data: bytes) -> Program:
    """The instructions of a program as the kernel shows it, with its own constants. Raises AgentError(MALFORMED)."""
    if not data or len(data) % CODEC.size:
        raise AgentError(Reason.MALFORMED, f"a device program of {len(data)} bytes")
    return _unblinded(
        tuple(Instruction(c, r & 15, r >> 4, offset, value) for c, r, offset, value in CODEC.iter_unpack(data))
    )


def put_program(program: Program) -> bytes:
    """The program as bpf(2) takes it, little endian."""
    return b"".join(CODEC.pack(i.code, i.dst | i.src << 4, i.offset, i.immediate) for i in program)


def amended(program: Program, changes: Iterable[Rule]) -> Program:
    """The program with our rules changed by `changes`; equal to `program` when there is nothing to change.

    Raises AgentError: NOT_SUPPORTED for a program that cannot be loaded again, TOO_MANY beyond MAX_RULES.
    """
    current, runtimes = parts(program)
    wanted = {rule.numbers: rule for rule in current} | {rule.numbers: rule for rule in changes}
    rules = sorted(rule for rule in wanted.values() if not _decided(runtimes, rule))
    if len(rules) > MAX_RULES:
        raise AgentError(Reason.TOO_MANY, f"{len(rules)} rules for one container, at most {MAX_RULES}", hint=START_ANEW)
    result = (*_front(rules), *runtimes)
    if result != program:
        _refuse_what_cannot_be_loaded_again(runtimes)
    return result


def parts(program: Program) -> tuple[tuple[Rule, ...], Program]:
    """Our rules and the runtime's program behind them.

    Raises AgentError(NOT_SUPPORTED) for a front that has our mark and is not as we write it.
    """
    if len(program) < 2 or program[0] != Instruction(MOV_IMM, dst=2, immediate=MARK):
        return (), program
    count, at, rules = program[1].immediate, len(_front_head(0)), []
    for _ in range(min(count, MAX_RULES)):
        block = program[at : at + 6]
        if len(block) < 6:
            break
        allowed = block[3].code == JSET_IMM
        kind: Kind = "b" if block[0].immediate == KINDS["b"] else "c"
        rules.append(Rule(DeviceNumbers(kind, block[1].immediate, block[2].immediate), allowed))
        at += len(_block(rules[-1]))
    if program[:at] != _front(rules):
        raise AgentError(
            Reason.NOT_SUPPORTED, "the device program of the container has been changed by somebody", hint=START_ANEW
        )
    return tuple(rules), program[at:]


def decision(program: Program, numbers: DeviceNumbers, access: int) -> bool | None:
    """What a program says about an access (MKNOD, READ, WRITE or a sum); None when it does what is not understood here."""
    context = struct.pack("<III", access << 16 | KINDS[numbers.kind], numbers.major, numbers.minor)
    registers: list[int | None] = [None, _CONTEXT, *[None] * 10]
    at = 0
    for _ in range(MAX_STEPS):
        if not 0 <= at < len(program):
            return None
        step = program[at]
        if step.code == EXIT:
            answer = registers[0]
            return None if answer is None or answer < 0 else answer & 0xFFFF_FFFF == 1
        if max(step.dst, step.src) >= len(registers):
            return None
        if step.code & 7 in (_JMP, _JMP32):
            distance = _jump(step, registers)
            if distance is None:
                return None
            at += 1 + distance
            continue
        if not _compute(step, registers, context):
            return None
        at += 1
    return None


def _unblinded(program: Program) -> Program:
    """Undo bpf_jit_blind_insn (kernel/bpf/core.c): `op dst, K` has become `r11 = K ^ n; r11 ^= n; op dst, r11`, and
    `mov dst, 0` has become `dst ^= dst`. Nobody jumps into the middle of the three."""
    kept: list[tuple[int, Instruction]] = []
    places: dict[int, int] = {}
    at = 0
    while at < len(program):
        places[at] = len(kept)
        one, two, three = (*program[at : at + 3], Instruction(0), Instruction(0))[:3]
        if (
            one.code in _MOVES
            and one.dst == two.dst == three.src == BLINDING_REGISTER
            and two.code == one.code & 15 | 0xA0
        ):
            value = (one.immediate ^ two.immediate) & 0xFFFF_FFFF
            signed = value - ((value & 1 << 31) << 1)
            at += 2
            kept.append((at, msgspec.structs.replace(three, code=three.code & ~8, src=0, immediate=signed)))
        elif one.code == _XOR_REG and one.dst == one.src:
            kept.append((at, Instruction(MOV_IMM, dst=one.dst)))
        else:
            kept.append((at, one))
        at += 1
    result = []
    for place, (was, step) in enumerate(kept):
        jumps = step.code & 7 in (_JMP, _JMP32) and step.code not in (CALL, EXIT)
        target = places.get(was + 1 + step.offset) if jumps else None
        result.append(step if target is None else msgspec.structs.replace(step, offset=target - place - 1))
    return tuple(result)


def _front_head(count: int) -> Program:
    return (
        Instruction(MOV_IMM, dst=2, immediate=MARK),
        Instruction(MOV_IMM, dst=3, immediate=count),
        Instruction(LDX_W, dst=2, src=1, offset=0),
        Instruction(LDX_W, dst=3, src=1, offset=4),
        Instruction(LDX_W, dst=4, src=1, offset=8),
        Instruction(MOV_REG, dst=5, src=2),
        Instruction(AND_IMM, dst=5, immediate=0xFFFF),
    )


def _front(rules: Sequence[Rule]) -> Program:
    if not rules:
        return ()
    return (*_front_head(len(rules)), *(step for rule in rules for step in _block(rule)))


def _block(rule: Rule) -> Program:
    """Jumps lead behind the block: to the next rule, or into the runtime's program."""
    asked = (Instruction(JSET_IMM, dst=2, offset=2, immediate=NOT_READ_WRITE),) if rule.allowed else ()
    last = 2 + len(asked)
    return (
        Instruction(JNE_IMM, dst=5, offset=last + 2, immediate=KINDS[rule.numbers.kind]),
        Instruction(JNE_IMM, dst=3, offset=last + 1, immediate=rule.numbers.major),
        Instruction(JNE_IMM, dst=4, offset=last, immediate=rule.numbers.minor),
        *asked,
        Instruction(MOV_IMM, dst=0, immediate=int(rule.allowed)),
        Instruction(EXIT),
    )


def _decided(program: Program, rule: Rule) -> bool:
    """Whether `program` says the same about every way to open the device."""
    return all(decision(program, rule.numbers, access) is rule.allowed for access in (READ, WRITE, READ | WRITE))


def _refuse_what_cannot_be_loaded_again(program: Program) -> None:
    for step in program:
        if BLINDING_REGISTER in (step.dst, step.src):
            raise AgentError(
                Reason.NOT_SUPPORTED,
                "the kernel has blinded the container's device program in a way that is not known here",
                hint=f"set net.core.bpf_jit_harden to 1 or 0 for new containers, and {START_ANEW}",
            )
        if step.code == CALL or (step.code == LD_IMM64 and step.src):
            raise AgentError(
                Reason.NOT_SUPPORTED,
                "the container's device program uses calls or maps and cannot be loaded again",
                hint=START_ANEW,
            )


_LDX, _ALU32, _JMP, _JMP32, _ALU64 = 1, 4, 5, 6, 7
_MOVES, _XOR_REG = (0xB7, 0xB4), 0xAF
_CONTEXT = -1
"""What r1 holds at the start; no number has this value, they are unsigned."""
_WIDTHS = {0x61: 4, 0x69: 2, 0x71: 1}
_MASK = {_ALU32: 0xFFFF_FFFF, _JMP32: 0xFFFF_FFFF, _ALU64: (1 << 64) - 1, _JMP: (1 << 64) - 1}


def _operand(step: Instruction, registers: list[int | None]) -> int | None:
    """The second operand; None for what is no number."""
    value = registers[step.src] if step.code & 8 else step.immediate & _MASK[step.code & 7]
    return None if value is None or value < 0 else value & _MASK[step.code & 7]


def _compute(step: Instruction, registers: list[int | None], context: bytes) -> bool:
    """Loads from the context and arithmetic on numbers; False for anything else."""
    if step.code in _WIDTHS:
        end = step.offset + _WIDTHS[step.code]
        if registers[step.src] != _CONTEXT or not 0 <= step.offset < end <= len(context):
            return False
        registers[step.dst] = int.from_bytes(context[step.offset : end], "little")
        return True
    if step.code & 7 not in (_ALU32, _ALU64) or step.offset:
        return False
    if step.code == MOV_REG:
        registers[step.dst] = registers[step.src]  # also the context
        return True
    mask, operation = _MASK[step.code & 7], step.code & 0xF0
    b = _operand(step, registers)
    a = 0 if operation == 0xB0 else registers[step.dst]
    if a is None or a < 0 or b is None:
        return False
    shift = b & (63 if step.code & 7 == _ALU64 else 31)
    a &= mask
    results = {
        **{0x00: a + b, 0x10: a - b, 0x40: a | b, 0x50: a & b, 0xA0: a ^ b, 0xB0: b},
        **{0x60: a << shift, 0x70: a >> shift},
    }
    if operation not in results:
        return False
    registers[step.dst] = results[operation] & mask
    return True


def _jump(step: Instruction, registers: list[int | None]) -> int | None:
    """By how much a jump goes beyond the next instruction; None for what is not understood."""
    operation = step.code & 0xF0
    if operation == 0x00:
        return step.offset if step.code & 7 == _JMP else step.immediate
    a, b = registers[step.dst], _operand(step, registers)
    if a is None or a < 0 or b is None:
        return None
    a &= _MASK[step.code & 7]
    taken = {
        **{0x10: a == b, 0x20: a > b, 0x30: a >= b, 0x40: bool(a & b), 0x50: a != b, 0xA0: a < b, 0xB0: a <= b},
    }
    if operation not in taken:
        return None
    return step.offset if taken[operation] else 0
