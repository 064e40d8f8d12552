"""From a program and a machine to seconds: step time with its range, MFU in three conventions, days, chip-hours, cost."""

import dataclasses
import math
from collections.abc import Callable, Sequence

from smoljax.model import ModelConfig
from smoljax.planning.hlo import Collective, Program
from smoljax.planning.topologies import Chip, Topology

# None of these is fitted to a published run (benchmarks/plan_calibration.py states the error that is left).
# Share of the peak that attention kernels reach: likely, and the ends of the range. FlashAttention-2 reaches 50 to 73% on an
# A100 (arXiv 2307.08691, section 4.1), FlashAttention-3 up to 75% on an H100 (arXiv 2407.08608); TPU kernels are not published.
KERNEL_SHARE = (0.5, 0.7, 0.3)
# Products and all else of a compiled program against their estimate, at the ends of the range: its cycles count no stalls, and published
# runs of the same shapes were up to a fifth faster (benchmarks/results/plan_calibration_2026-11-25.md).
CYCLES_RANGE = (0.75, 1.15)
# Least time of one step of a collective to the next chip (jax-ml.github.io/scaling-book/sharding, "A note on ICI latency").
HOP_SECONDS = 1e-6
BACKWARD_KERNEL = 2.5  # Five products against two (arXiv 2307.08691, section 2.3); 3.5 when dq and dk, dv are two kernels.
CONVENTIONS = {"6N": "none", "causal attention": "causal", "full attention": "full"}


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Collectives over one set of mesh axes, by kind: runs, bytes that a chip sends, seconds on the links, and seconds not hidden."""

    axes: str
    kind: str
    runs: int
    bytes_sent: float
    seconds: float
    exposed: float

    @property
    def hidden(self) -> float:
        """Seconds behind computation."""
        return self.seconds - self.exposed


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one step on one chip.

    Attributes:
      products: matrix products.
      other: everything else that the program computes.
      kernels: attention kernels, priced by their FLOPs.
      exposed: collectives that nothing hides.
      hidden: collectives behind computation.
      can_hide: of the exposed ones, what could be behind computation.
      span: products and the rest against their estimate, at the ends of the range.
    """

    products: float
    other: float
    kernels: float
    exposed: float
    hidden: float
    can_hide: float = 0.0
    span: tuple[float, float] = CYCLES_RANGE

    @property
    def step(self) -> float:
        """Predicted seconds of a step."""
        return self.products + self.other + self.kernels + self.exposed

    @property
    def fastest(self) -> float:
        """The lower end: kernels at their best, all exchange hidden that can be."""
        kernels = self.kernels * KERNEL_SHARE[0] / KERNEL_SHARE[1]
        computed = (self.products + self.other) * self.span[0]
        return computed + kernels + self.exposed - self.can_hide

    @property
    def slowest(self) -> float:
        """The upper end: slow kernels, stalls, nothing hidden."""
        kernels = self.kernels * KERNEL_SHARE[0] / KERNEL_SHARE[2]
        computed = (self.products + self.other) * self.span[1]
        return computed + kernels + self.exposed + self.hidden

    @property
    def bound(self) -> str:
        """The largest part, in words."""
        parts = {
            "matrix products": self.products,
            "element-wise work and memory traffic": self.other,
            "attention kernels": self.kernels,
            "the interconnect": self.exposed,
        }
        return max(parts, key=parts.get)


def times_of_program(
    program: Program,
    exchanges: tuple[Exchange, ...],
    chip: Chip,
    *,
    attention_flops: float,
    num_layer_passes: int,
    head_dim: int,
) -> Times:
    """Seconds of a compiled step.

    Args:
      program: its text, read.
      exchanges: its collectives, priced.
      chip: what it runs on.
      attention_flops: forward FLOPs of causal attention of one layer and micro-batch on one chip.
      num_layer_passes: layers times micro-batches.
      head_dim: width of a head.
    """
    kernel_flops = attention_flops * num_layer_passes * _kernel_passes(program)
    exposed = sum(exchange.exposed for exchange in exchanges)
    return Times(
        products=program.matmul_cycles / chip.clock,
        other=(program.total_cycles - program.matmul_cycles) / chip.clock,
        kernels=kernel_flops / kernel_rate(chip, head_dim),
        exposed=exposed,
        hidden=sum(exchange.seconds for exchange in exchanges) - exposed,
    )


def _kernel_passes(program: Program) -> float:
    """What the attention kernels of a program do, in forward passes: the first one, those computed again, and the backward pass. Runs
    are counted against the first's, as a ring over the context axis takes many for one pass."""
    first = sum(each.trips for each in program.kernels if not (each.backward or each.again))
    if not first:
        return 0.0
    again = sum(each.trips for each in program.kernels if each.again) / first
    backward = sum(each.trips for each in program.kernels if each.backward)
    return 1 + again + (BACKWARD_KERNEL + (backward > first) if backward else 0)


def kernel_rate(chip: Chip, head_dim: int) -> float:
    """FLOP/s of attention kernels: a share of the peak, less what a matrix unit wider than a head does for nothing."""
    width = chip.mxu_width or head_dim
    filled = head_dim / (math.ceil(head_dim / width) * width)
    return chip.peak_flops * KERNEL_SHARE[0] * filled


def price_collectives(
    program: Program,
    *,
    chip: Chip,
    axes_of: Callable[[Collective], str],
    seconds_of: Callable[[Collective], float],
) -> tuple[Exchange, ...]:
    """Collectives by mesh axes and kind, with their time on the links.

    In each loop asynchronous ones hide behind the loop's own cycles as far as these reach; others are exposed.

    Args:
      program: a program.
      chip: whose clock its cycles count.
      axes_of: collective -> names of the mesh axes along which its chips differ.
      seconds_of: collective -> seconds of one run.
    """
    seconds = {
        collective: seconds_of(collective) * collective.trips
        for collective in set(program.collectives)
    }
    waiting: dict[str, float] = {}
    for collective in program.collectives:
        if collective.asynchronous:
            waiting[collective.loop] = waiting.get(collective.loop, 0) + seconds[collective]
    rows: dict[tuple[str, str], list[float]] = {}
    for collective in program.collectives:
        taken = seconds[collective]
        exposed = taken
        if collective.asynchronous and taken:
            hides = program.cycles.get(collective.loop, 0) / chip.clock
            exposed = taken * max(0.0, 1 - hides / waiting[collective.loop])
        row = rows.setdefault((axes_of(collective), collective.kind), [0, 0.0, 0.0, 0.0])
        for i, value in enumerate(
            (collective.trips, collective.bytes_sent * collective.trips, taken, exposed)
        ):
            row[i] += value
    return tuple(
        Exchange(axes, kind, int(runs), sent, taken, exposed)
        for (axes, kind), (runs, sent, taken, exposed) in sorted(rows.items())
    )


def collective_seconds(
    collective: Collective, places: Sequence[tuple[int, ...]], *, topology: Topology
) -> float:
    """Seconds of one run of a collective: its bytes over the links that it can use, and its steps from chip to chip.

    Args:
      collective: what is exchanged.
      places: coordinates in the torus of one group of its chips (TPU).
      topology: the machine.
    """
    chip = topology.chip
    if not collective.group:
        return collective.bytes_sent / chip.network_bandwidth
    if chip.platform == "gpu":
        return collective.bytes_sent / chip.link_bandwidth
    hops = [_hops(places, axis, topology=topology) for axis in range(len(topology.shape))]
    if collective.kind == "collective-permute":
        # One way to a neighbour; where it is further, each link carries the data of all chips on the way.
        return collective.bytes_sent * max(1, sum(hops)) / chip.link_bandwidth + HOP_SECONDS
    rate = sum(
        chip.link_bandwidth * (2 if _is_ring(places, axis, topology=topology) else 1)
        for axis in range(len(topology.shape))
        if hops[axis]
    )
    turns = 2 if collective.kind == "all-reduce" else 1
    return collective.bytes_sent / (rate or chip.link_bandwidth) + turns * sum(hops) * HOP_SECONDS


def _is_ring(places: Sequence[tuple[int, ...]], axis: int, *, topology: Topology) -> bool:
    """Whether these chips fill a side of the torus that is closed: one of 16 on v5e and v6e, any of whole cubes of 4 x 4 x 4 on v4 and
    v5p (jax-ml.github.io/scaling-book/tpus). Without the link around the edge one direction is left."""
    side = topology.shape[axis]
    closed = (
        side == 16 if len(topology.shape) == 2 else all(each % 4 == 0 for each in topology.shape)
    )
    return closed and len({place[axis] for place in places}) == side


def _hops(places: Sequence[tuple[int, ...]], axis: int, *, topology: Topology) -> int:
    """Steps from chip to chip that a collective of these takes along an axis."""
    here = [place[axis] for place in places]
    apart = max(here) - min(here)
    if _is_ring(places, axis, topology=topology):
        return topology.shape[axis] // 2
    return apart


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a run costs.

    Attributes:
      times: seconds of a step.
      tokens_per_step: of the whole machine.
      flops: of a step on the whole machine, by convention.
      mfu: share of the machine's peak, by convention.
      days: of the token budget; None without one.
      chip_hours: of the token budget; None without one.
      cost: chip_hours at the price; None without both.
    """

    times: Times
    tokens_per_step: int
    flops: dict[str, float]
    mfu: dict[str, float]
    days: float | None
    chip_hours: float | None
    cost: float | None

    @property
    def tokens_per_second(self) -> float:
        """Of the whole machine."""
        return self.tokens_per_step / self.times.step


def estimate(
    times: Times,
    model: ModelConfig,
    topology: Topology,
    *,
    seq_len: int,
    batch_size: int,
    tokens: float | None,
    price: float | None,
) -> Estimate:
    """Seconds of a step to MFU, days and cost.

    Args:
      times: of a step.
      model: the model.
      topology: the machine.
      seq_len: tokens of a sequence.
      batch_size: sequences of a step.
      tokens: the budget, or None.
      price: of one chip for one hour, or None.
    """
    per_step = batch_size * seq_len
    flops = {
        name: model.flops_per_token(seq_len, attention=kind) * per_step
        for name, kind in CONVENTIONS.items()
    }
    peak = topology.chip.peak_flops * topology.num_chips
    seconds = None if tokens is None else math.ceil(tokens / per_step) * times.step
    chip_hours = None if seconds is None else seconds / 3600 * topology.num_chips
    return Estimate(
        times=times,
        tokens_per_step=per_step,
        flops=flops,
        mfu={name: value / times.step / peak for name, value in flops.items()},
        days=None if seconds is None else seconds / 86_400,
        chip_hours=chip_hours,
        cost=None if chip_hours is None or price is None else chip_hours * price,
    )
