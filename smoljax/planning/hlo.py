"""What an optimised TPU program says of its own cost: estimated cycles, kernel runs and collectives, each times the loops around it.

The compiler's own totals count a loop's body once, whatever its trips, and leave kernels and links out. Here the text of
the program is read: cycles that it notes on instructions are summed by computation and multiplied through the loops.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator

import numpy as np

from smoljax.errors import SmoljaxError

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|\s)([a-z][a-z0-9\-]*)\(")
_SHAPE = re.compile(r"\b(pred|[subf]\d+|bf16|f8\w+|c64)\[([\d,]*)\]")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CALLED = re.compile(r"\b(calls|body|condition|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|\b(?:true|false)_computation=(%?[\w.\-]+)")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}"
)
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_PAIRS = re.compile(r"source_target_pairs=\{\{(\d+),(\d+)\}")
_BETWEEN_SLICES = re.compile(
    r'_xla_megascale_target="\{([\d,]+)\}[^"]*",_xla_megascale_transfer_type="(\w+)"'
)
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)
# Bytes that a chip sends to other slices for each byte that it hands its host, of n slices, by ring algorithms.
_NETWORK_SHARE = {
    "ALL_REDUCE": lambda n: 2 * (n - 1) / n,
    "ALL_GATHER": lambda n: n - 1,
    "REDUCE_SCATTER": lambda n: (n - 1) / n,
    "ALL_TO_ALL": lambda n: (n - 1) / n,
    "ONE_TO_ONE": lambda n: 1,
}
# Computations of these run inside their instruction, whose note of cycles covers them.
_COVERED = ("fusion", "reduce", "sort", "scatter", "select-and-scatter", "map", "reduce-window")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of COLLECTIVES.
      bytes_sent: bytes that a chip sends in one run, by the ring algorithm.
      group: partition numbers of one group; () where it goes between slices, through their hosts.
      trips: runs in a step.
      asynchronous: whether other work may go on meanwhile.
      loop: the computation that holds it.
    """

    kind: str
    bytes_sent: float
    group: tuple[int, ...]
    trips: int
    asynchronous: bool
    loop: str


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One Pallas call of a program: where it comes from, runs in a step, whether it belongs to the backward pass, and whether it
    computes part of the forward pass again."""

    name: str
    trips: int
    backward: bool
    again: bool = False


@dataclasses.dataclass(frozen=True)
class Program:
    """What the text of a program says.

    Attributes:
      cycles: by computation, cycles that it notes itself, times its trips.
      matmul_cycles: the part of all cycles in instructions that hold a matrix product.
      kernels: Pallas calls.
      collectives: what is exchanged.
      num_noted: instructions with a note of cycles.
    """

    cycles: dict[str, float]
    matmul_cycles: float
    kernels: tuple[Kernel, ...]
    collectives: tuple[Collective, ...]
    num_noted: int

    @property
    def total_cycles(self) -> float:
        """All cycles of a step."""
        return sum(self.cycles.values())

    @property
    def kernel_runs(self) -> int:
        """Runs of Pallas calls in a step."""
        return sum(kernel.trips for kernel in self.kernels)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    opcode: str
    shape: str
    text: str


def read(text: str) -> Program:
    """Reads the text of a compiled program (`compiled.as_text()`).

    Raises:
      SmoljaxError: there is no entry computation in it.
    """
    computations, entry = _computations(text)
    trips: dict[str, int] = {}
    for name, times in _walk(computations, entry, 1):
        trips[name] = trips.get(name, 0) + times
    cycles, matmul, noted = {}, 0.0, 0
    kernels, collectives = [], []
    for name, times in trips.items():
        own = 0.0
        seen: set[str] = set()
        for instruction in computations[name]:
            if (taken := _cycles(instruction)) is not None:
                own += taken
                noted += 1
                if _holds_product(instruction, computations):
                    matmul += taken * times
            if _is_kernel(instruction):
                kernels.append(_kernel(instruction, times))
            collectives += _collectives(instruction, computations, name, times, seen)
        if own:
            cycles[name] = own * times
    return Program(cycles, matmul, tuple(kernels), tuple(collectives), noted)


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Instructions by computation, and the name of the entry. A computation ends on a bare brace: metadata of a kernel
    spans lines, and some of those begin with braces."""
    computations: dict[str, list[_Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        if current is None:
            if header := _HEADER.match(line):
                current = computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
        elif line.rstrip() == "}":
            current = None
        elif found := _INSTRUCTION.match(line):
            opcode = _OPCODE.search(found[2])
            shape = found[2][: opcode.start()] if opcode else found[2]
            current.append(_Instruction(found[1], opcode[1] if opcode else "", shape, found[2]))
        elif current:  # The rest of a kernel's metadata.
            last = current[-1]
            current[-1] = dataclasses.replace(last, text=f"{last.text}\n{line}")
    if entry is None:
        raise SmoljaxError("the program's text has no ENTRY computation: it is not optimised HLO")
    return computations, entry


def _walk(computations: dict, name: str, times: int) -> Iterator[tuple[str, int]]:
    """Every computation that runs on its own, with the number of its runs."""
    yield name, times
    for instruction in computations[name]:
        if instruction.opcode in _COVERED:
            continue
        called = dict(_CALLED.findall(instruction.text))
        if instruction.opcode == "while":
            inside = times * trip_count(computations[called["condition"]], computations)
            yield from _walk(computations, called["body"], inside)
            continue
        if instruction.opcode == "conditional":
            yield from _walk(computations, _costliest_branch(instruction, computations), times)
            continue
        for key, each in called.items():
            if each in computations and (key != "to_apply" or instruction.opcode == "call"):
                yield from _walk(computations, each, times)


def _costliest_branch(instruction: _Instruction, computations: dict) -> str:
    """The branch with most kernel runs, then most cycles: one runs, and which is not known. Those of ring attention
    (smoljax.kernels.attention.ring) cost the same."""
    named = " ".join(filter(None, itertools.chain(*_BRANCHES.findall(instruction.text))))
    return max(
        re.findall(r"[\w.\-]+", named),
        key=lambda branch: (_kernel_runs(computations, branch), _noted(computations, branch)),
    )


def _kernel_runs(computations: dict, name: str) -> int:
    return sum(
        times * sum(_is_kernel(instruction) for instruction in computations[each])
        for each, times in _walk(computations, name, 1)
    )


def _noted(computations: dict, name: str) -> int:
    return sum(
        times * sum(_cycles(instruction) or 0 for instruction in computations[each])
        for each, times in _walk(computations, name, 1)
    )


def _is_kernel(instruction: _Instruction) -> bool:
    return 'custom_call_target="tpu_custom_call"' in instruction.text


def _cycles(instruction: _Instruction) -> int | None:
    note = _CYCLES.search(instruction.text)
    return int(note[1]) if note else None


def trip_count(condition: list, computations: dict) -> int:
    """The constant that a loop's condition compares its counter with (loops count up from 0); 1 where there is none."""
    constants = []
    for instruction in condition:
        found = re.match(r"[su]\d+\[\]\S* constant\((\d+)\)", instruction.text)
        if found:
            constants.append(int(found[1]))
        for _, name in _CALLED.findall(instruction.text):
            if name in computations:
                constants.append(trip_count(computations[name], computations))
    return max(constants, default=1)


def _holds_product(instruction: _Instruction, computations: dict) -> bool:
    if instruction.opcode in ("convolution", "dot"):
        return True
    called = dict(_CALLED.findall(instruction.text)).get("calls")
    return any(_holds_product(inner, computations) for inner in computations.get(called, ()))


def _kernel(instruction: _Instruction, trips: int) -> Kernel:
    found = re.search(r'op_name="([^"]*)"', instruction.text)
    path = found[1] if found else instruction.name
    _, transposed, rest = path.rpartition("transpose(")
    again = bool(transposed) and "rematted_computation" in rest
    backward = bool(transposed) and not again
    return Kernel(re.sub(r"(\.\d+)+$", "", instruction.name), trips, backward, again)


def _collectives(
    instruction: _Instruction, computations: dict, loop: str, trips: int, seen: set[str]
) -> Iterator[Collective]:
    """Collectives of an instruction: itself one, or a fusion around one. A fused one is repeated at full size in each of its
    steps, so each counts once for a computation, known by channel, shape and origin: JAX gives all that it writes itself channel 1."""
    base = instruction.opcode.removesuffix("-start")
    if base in COLLECTIVES:
        yield _collective(instruction, base, instruction.opcode != base, loop, trips)
    elif instruction.opcode == "send" and "_xla_megascale" in instruction.text:
        yield _between_slices(instruction, loop, trips)
    elif instruction.opcode in ("fusion", "async-start"):
        # A sum of which each chip keeps its part: written as a whole sum and a slice of it, run as one that scatters.
        scatters = "calls=%all-reduce-scatter" in instruction.text
        for inner in _inside(instruction, computations):
            inner_base = inner.opcode.removesuffix("-start")
            if inner_base == "all-reduce" and scatters:
                for found in _once(inner, inner_base, False, loop, trips, seen):
                    half = found.bytes_sent / 2
                    yield dataclasses.replace(found, kind="reduce-scatter", bytes_sent=half)
            elif inner_base in COLLECTIVES:
                yield from _once(inner, inner_base, True, loop, trips, seen)


def _between_slices(instruction: _Instruction, loop: str, trips: int) -> Collective:
    """What a chip hands to its host, which exchanges it with the hosts of other slices while the chip goes on."""
    found = _BETWEEN_SLICES.search(instruction.text)
    if not found or found[2] not in _NETWORK_SHARE:
        raise SmoljaxError(
            f"the program sends to other slices in a form that is not known: {instruction.text[:300]}; "
            "teach smoljax.planning.hlo to read it"
        )
    payload = max(shape_bytes(*shape) for shape in _SHAPE.findall(instruction.shape))
    sent = payload * _NETWORK_SHARE[found[2]](len(found[1].split(",")))
    kind = found[2].lower().replace("_", "-")
    return Collective(kind, sent, (), trips, True, loop)


def _inside(instruction: _Instruction, computations: dict) -> Iterator[_Instruction]:
    """Instructions of the computation that a fusion calls, and of fusions in it."""
    called = dict(_CALLED.findall(instruction.text)).get("calls")
    for inner in computations.get(called, ()):
        yield inner
        yield from _inside(inner, computations)


def _once(instruction, kind, asynchronous, loop, trips, seen) -> Iterator[Collective]:
    names = re.findall(r'channel_id=\d+|op_name="[^"]*"', instruction.text) or [instruction.name]
    key = " ".join([kind, instruction.shape, *names])
    if key not in seen:
        seen.add(key)
        yield _collective(instruction, kind, asynchronous, loop, trips)


def _collective(instruction, kind, asynchronous, loop, trips) -> Collective:
    group = group_of(instruction.text)
    sent = _bytes_sent(instruction, kind, len(group))
    return Collective(kind, sent, group, trips, asynchronous, loop)


def group_of(text: str) -> tuple[int, ...]:
    """Partition numbers of the first replica group of a collective (a pair of a permutation that moves something)."""
    if found := _IOTA.search(text):
        order = _iota(found[3], found[4])
        return tuple(order.reshape(int(found[1]), int(found[2]))[0].tolist())
    if found := _NAMED.search(text):
        sides = {name: int(side) for name, side in re.findall(r"'(\w+)'=(\d+)", found[1])}
        inside = re.findall(r"'(\w+)'", found[4])
        order = _iota(found[2] or str(math.prod(sides.values())), found[3])
        first = tuple(slice(None) if name in inside else 0 for name in sides)
        return tuple(order.reshape(list(sides.values()))[first].reshape(-1).tolist())
    if found := _LISTED.search(text):
        return tuple(int(n) for n in found[1].split(","))
    if found := _PAIRS.search(text):
        return int(found[1]), int(found[2])
    if "replica_groups=" in text and "replica_groups={}" not in text:
        start = text.index("replica_groups=")
        raise SmoljaxError(
            f"a collective of the program has groups of a form that is not known: {text[start : start + 100]}; "
            "teach smoljax.planning.hlo.group_of to read it"
        )
    return (0,)


def _iota(shape: str, axes: str | None) -> np.ndarray:
    """0, 1, 2, ... in this shape ("2,8"), its axes in another order ("1,0"), as HLO writes it."""
    sides = [int(n) for n in shape.split(",")]
    order = np.arange(math.prod(sides)).reshape(sides)
    return order.transpose([int(n) for n in axes.split(",")]) if axes else order


def _bytes_sent(instruction: _Instruction, kind: str, size: int) -> float:
    """Bytes that one chip sends. An asynchronous start has its operand beside its result in the shape: the larger is taken."""
    sizes = [shape_bytes(*found) for found in _SHAPE.findall(instruction.shape)]
    if not sizes or size < 2:
        return 0.0
    whole = max(sizes) if instruction.opcode.endswith("-start") else sum(sizes)
    share = (size - 1) / size
    if kind == "all-reduce":
        return 2 * whole * share
    if kind == "reduce-scatter":  # The shape is that of one part.
        return (whole if instruction.opcode.endswith("-start") else whole * size) * share
    return whole if kind == "collective-permute" else whole * share


def shape_bytes(dtype: str, dimensions: str) -> int:
    """Bytes of an array shape of HLO ("bf16", "8,128")."""
    count = math.prod(int(n) for n in dimensions.split(",") if n)
    bits = 8 if dtype == "pred" or dtype.startswith("f8") else int(re.sub(r"\D", "", dtype))
    return max(1, count * bits // 8)
