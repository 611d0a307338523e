"""Read compiled kernels: memory accesses and their arguments, matrix instructions."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

MIN_WIDTH = 16  # bytes of a weight load
UNKNOWN = "?"  # the argument of an access of unknown origin


class Access(NamedTuple):
    """`count` instructions that access global memory through `argument`, `width` bytes per thread."""

    argument: str
    instruction: str  # "ld", "cp.async", "tma" (moves boxes of at least 16 bytes per row) or "st"
    width: int
    count: int


def read_accesses(ptx: str, arguments: list[str]) -> tuple[Access, ...]:
    """Return the global memory accesses of a kernel's PTX.

    Every register computed from a pointer parameter is marked with that parameter, until nothing changes; an access
    belongs to the parameters that its address register is marked with. Values loaded from memory have no mark.

    Args:
        ptx: the text of the kernel.
        arguments: names of its pointer and descriptor arguments, in order.
    """
    parameters = re.findall(r"\.param\s+(?:\.\w+\s+\d+\s+)?(?:\.u64\s+\.ptr\b[^\n]*?|\.b8\s+)(\w+_param_\d+)\b", ptx)
    origin = {parameter: frozenset([name]) for parameter, name in zip(parameters, arguments, strict=False)}
    flows: list[tuple[list[str], list[str]]] = []
    found: list[tuple[str, int, list[str]]] = []
    for line in ptx.splitlines():
        statement = re.match(r"\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+([^;]*);", line)
        if statement is None:
            continue
        opcode, operands = statement.groups()
        access = _read_access(opcode, operands)
        if access is not None:
            found.append(access)
        elif not (opcode.startswith("ld.") and "param" not in opcode.split(".")):
            flows.append(_split_operands(operands))
    _spread(origin, flows)
    counts: Counter[tuple[str, str, int]] = Counter()
    for instruction, width, address in found:
        for argument in _marks(origin, address) or {UNKNOWN}:
            counts[argument, instruction, width] += 1
    return tuple(Access(*key, count) for key, count in sorted(counts.items()))


def _read_access(opcode: str, operands: str) -> tuple[str, int, list[str]] | None:
    """Return the kind, the width and the address registers of an access to global memory; None for anything else."""
    kind = opcode.split(".")
    addresses = re.findall(r"\[([^\]]*)\]", operands)
    if opcode.startswith("cp.async.bulk.tensor"):
        is_load = re.search(r"shared::\w+\.global", opcode) is not None
        return "tma" if is_load else "st", MIN_WIDTH, _names(addresses[1 if is_load else 0])
    if re.match(r"cp\.async\.c[ag]\.", opcode):
        width = re.search(r"\]\s*,\s*(0x[0-9a-f]+|\d+)", operands[operands.rindex("[") :])
        if width is None:
            raise ValueError(f"cp.async without a size: {operands}")
        return "cp.async", int(width[1], 0), _names(addresses[1])
    if kind[0] in ("ld", "st", "atom", "red") and "global" in kind:
        return "ld" if kind[0] == "ld" else "st", _width(kind), _names(addresses[0])
    return None


def _spread(origin: dict[str, frozenset[str]], flows: list[tuple[list[str], list[str]]]) -> None:
    """Mark every register with the marks of the registers it is computed from, until nothing changes."""
    changed = True
    while changed:
        changed = False
        for destinations, sources in flows:
            marks = _marks(origin, sources)
            for destination in destinations:
                if not marks <= origin.get(destination, frozenset()):
                    origin[destination] = origin.get(destination, frozenset()) | marks
                    changed = True


def _marks(origin: dict[str, frozenset[str]], names: list[str]) -> frozenset[str]:
    return frozenset[str]().union(*(origin.get(name, frozenset()) for name in names))


def _names(text: str) -> list[str]:
    """Return registers and parameters in an operand; predicates hold no address."""
    return [name for name in re.findall(r"%[a-z]+\d+|\w+_param_\d+", text) if not re.match(r"%p\d", name)]


def _split_operands(operands: str) -> tuple[list[str], list[str]]:
    destination = "".join(re.findall(r"^\s*(?:\{[^}]*\}|[^,]*)", operands))
    return _names(destination), _names(operands[len(destination) :])


def _width(opcode: list[str]) -> int:
    bits = next(int(part[1:]) for part in reversed(opcode) if re.fullmatch(r"[bfsu]\d+", part))
    vector = next((int(part[1:]) for part in opcode if re.fullmatch(r"v\d", part)), 1)
    return bits * vector // 8


def read_matrix_instructions(sass: str) -> dict[str, int]:
    """Return how often each kind of matrix instruction occurs in a disassembly."""
    found = Counter(re.findall(r"\b(HGMMA|HMMA|UTC\w*MMA)\b", sass))
    blackwell = sum(count for name, count in found.items() if name.startswith("UTC"))
    kept = {name: count for name, count in found.items() if not name.startswith("UTC")}
    return {**kept, "UTCMMA": blackwell} if blackwell else kept


def has_matrix_dot(ttir: str) -> bool:
    """Return whether a `tt.dot` of Triton's intermediate form can use matrix instructions: all but exact float32."""
    dots = re.findall(r"\btt\.dot\b(.*?) : tensor<[\dx]*x(\w+)>", ttir)
    return any(operand != "f32" or "tf32" in attributes for attributes, operand in dots)


def read_wgmma_a_in_registers(ptx: str) -> int:
    """Count wgmma with A in registers.

    wgmma lists its accumulators in braces, then A: a descriptor in one register, or registers in braces.
    """
    return len(re.findall(r"\bwgmma\.mma_async\S*\s+\{[^}]*\}\s*,\s*\{", ptx))
