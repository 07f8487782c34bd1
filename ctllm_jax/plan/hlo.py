"""What a TPU compiler's scheduled HLO says of time and traffic.

Every operation carries the compiler's own `estimated_cycles`. They are added up along the schedule, a loop's body as
often as it runs. Two things are not in the sum: what is inside custom calls (Pallas kernels, counted here by name), and
time in which the chip waits for a collective. The sum is an estimate, good for ranking programs; it was never held
against a chip.
"""

import collections
import dataclasses
import math
import re

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_SHAPE = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line of a computation."""

    name: str
    opcode: str
    shape: str
    line: str

    @property
    def cycles(self) -> int:
        """The compiler's estimate; 0 where it states none."""
        found = re.search(r'"?estimated_cycles"?:"?(\d+)', self.line)
        return int(found[1]) if found else 0

    @property
    def bytes(self) -> int:
        """Size of the result on a device."""
        return sum(
            _BYTES[kind] * math.prod(int(size) for size in sizes.split(",") if size)
            for kind, sizes in _SHAPE.findall(self.shape)
        )


@dataclasses.dataclass
class Totals:
    """Sums over a program, loops multiplied out; of one device."""

    cycles: int = 0
    by_operation: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # cycles, by source line
    kernels: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # calls, by kernel name
    collectives: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # bytes of results
    collective_calls: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    unknown_loops: int = 0  # loops whose number of turns the text does not give; counted once

    def add(self, other: "Totals", times: int) -> None:
        """Adds another program's sums, run so many times."""
        self.cycles += times * other.cycles
        self.unknown_loops += other.unknown_loops
        for name in ("by_operation", "kernels", "collectives", "collective_calls"):
            for key, value in getattr(other, name).items():
                getattr(self, name)[key] += times * value


def totals(text: str) -> Totals:
    """The sums of a scheduled HLO module (`compiled.as_text()`)."""
    computations, entry = _computations(text)
    done: dict[str, Totals] = {}

    def visit(name: str) -> Totals:
        if name not in done:
            done[name] = found = Totals()
            for operation in computations[name]:
                _count(found, operation, computations, visit)
        return done[name]

    return visit(entry)


def _computations(text: str) -> tuple[dict[str, list[Operation]], str]:
    """(operations of every computation, name of the entry)."""
    computations: dict[str, list[Operation]] = {}
    entry = current = None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and (match := _OPERATION.match(line)):
            current.append(Operation(match[1], match[3], match[2], line))
    if entry is None:
        raise ValueError("no HLO module: it has no ENTRY")
    return computations, entry


def _count(found: Totals, operation: Operation, computations: dict, visit) -> None:
    kind = operation.opcode.removesuffix("-start")
    if operation.opcode == "while":
        parts = dict(re.findall(r"(body|condition)=%?([\w.\-]+)", operation.line))
        turns = _turns(operation, computations[parts["condition"]])
        found.unknown_loops += turns is None
        found.add(visit(parts["body"]), turns or 1)
    elif operation.opcode in ("call", "conditional", "async-start"):
        for called in _CALLED.findall(operation.line) + _branches(operation.line):
            found.add(visit(called), 1)
    else:
        found.cycles += operation.cycles
        found.by_operation[_source(operation)] += operation.cycles
        if operation.opcode == "custom-call" and "tpu_custom_call" in operation.line:
            found.kernels[re.sub(r"\.\d+$", "", operation.name)] += 1
        if kind in _COLLECTIVES:
            found.collectives[kind] += operation.bytes
            found.collective_calls[kind] += 1


def _branches(line: str) -> list[str]:
    found = re.search(r"branch_computations=\{([^}]*)\}", line)
    return [name.strip().lstrip("%") for name in found[1].split(",")] if found else []


def _turns(loop: Operation, condition: list[Operation]) -> int | None:
    """How often a loop runs: as the compiler states it, or the constant that its counter is compared with."""
    if stated := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.line):
        return int(stated[1])
    constants = [found[1] for op in condition if (found := re.search(r" constant\((\d+)\)", op.line))]
    counts_up = any("direction=LT" in op.line for op in condition)
    return int(constants[0]) if len(constants) == 1 and counts_up else None


def _source(operation: Operation) -> str:
    """What the operation computes, as the program names it."""
    found = re.search(r'op_name="([^"]*)"', operation.line)
    return found[1] if found else operation.opcode
