"""From a program and a machine to seconds: step time with its range, MFU in three conventions, days, chip-hours, cost."""

import dataclasses
import math
from collections.abc import Callable

from smoljax.model import ModelConfig
from smoljax.planning.hlo import Program
from smoljax.planning.topologies import Chip, Topology

# None of these is fitted to a published run (benchmarks/plan_calibration.py states the error that is left).
# Share of the peak that attention kernels reach: likely, and the ends of the range. FlashAttention-2 reaches 50 to 73% on an
# A100 (arXiv 2307.08691, section 4.1), FlashAttention-3 up to 75% on an H100 (arXiv 2407.08608); TPU kernels are not published.
KERNEL_SHARE = (0.5, 0.7, 0.3)
# Compiler's cycles to real time: an estimate without stalls, checked by nobody on hardware.
CYCLES_FACTOR = (1.0, 1.0, 1.15)
# Closed forms only (GPUs, and models that are not compiled): share of the peak in matrix products, and what is not a product,
# as a share of their time. TPU programs compile to 82 to 89% of peak in products and 13 to 22% of that for the rest; for GPUs it is what
# cuBLAS reaches on large bf16 products of an H100 at its power limit (600 to 750 of 989 TFLOP/s).
PRODUCT_SHARE = {"tpu": 0.85, "gpu": 0.68}
OTHER_SHARE = 0.2
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


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one step on one chip.

    Attributes:
      products: matrix products.
      other: everything else that the program computes.
      kernels: attention kernels, priced by their FLOPs.
      exposed: collectives that nothing hides.
      hidden: collectives behind computation.
    """

    products: float
    other: float
    kernels: float
    exposed: float
    hidden: float

    @property
    def step(self) -> float:
        """Predicted seconds of a step."""
        return self.products + self.other + self.kernels + self.exposed

    @property
    def fastest(self) -> float:
        """The lower end: kernels at their best, all asynchronous exchange hidden."""
        kernels = self.kernels * KERNEL_SHARE[0] / KERNEL_SHARE[1]
        return (self.products + self.other) * CYCLES_FACTOR[1] + kernels + self.exposed

    @property
    def slowest(self) -> float:
        """The upper end: slow kernels, stalls, nothing hidden."""
        kernels = self.kernels * KERNEL_SHARE[0] / KERNEL_SHARE[2]
        return (
            (self.products + self.other) * CYCLES_FACTOR[2] + kernels + self.exposed + self.hidden
        )

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
) -> Times:
    """Seconds of a compiled step.

    Args:
      program: its text, read.
      exchanges: its collectives, priced.
      chip: what it runs on.
      attention_flops: forward FLOPs of causal attention of one layer and micro-batch on one chip.
      num_layer_passes: layers times micro-batches.
    """
    backward_runs = sum(kernel.trips for kernel in program.kernels if kernel.backward)
    forward_runs = program.kernel_runs - backward_runs
    backward = 0.0
    if backward_runs:
        factor = BACKWARD_KERNEL + (backward_runs > num_layer_passes)
        backward = factor * num_layer_passes
    kernel_flops = attention_flops * (forward_runs + backward)
    exposed = sum(exchange.exposed for exchange in exchanges)
    return Times(
        products=program.matmul_cycles / chip.clock,
        other=(program.total_cycles - program.matmul_cycles) / chip.clock,
        kernels=kernel_flops / chip.peak_flops / KERNEL_SHARE[0],
        exposed=exposed,
        hidden=sum(exchange.seconds for exchange in exchanges) - exposed,
    )


def price_collectives(
    program: Program,
    *,
    chip: Chip,
    axes_of: Callable[[tuple[int, ...]], str],
    bandwidth_of: Callable[[tuple[int, ...]], float],
) -> tuple[Exchange, ...]:
    """Collectives by mesh axes and kind, with their time on the links.

    In each loop asynchronous ones hide behind the loop's own cycles as far as these reach; others are exposed.

    Args:
      program: a program.
      chip: whose clock its cycles count.
      axes_of: partition numbers of a group -> names of the mesh axes along which they differ.
      bandwidth_of: partition numbers of a group -> bytes/s that one chip sends among them.
    """
    seconds = {
        collective: collective.bytes_sent * collective.trips / bandwidth_of(collective.group)
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
        row = rows.setdefault((axes_of(collective.group), collective.kind), [0, 0.0, 0.0, 0.0])
        for i, value in enumerate(
            (collective.trips, collective.bytes_sent * collective.trips, taken, exposed)
        ):
            row[i] += value
    return tuple(
        Exchange(axes, kind, int(runs), sent, taken, exposed)
        for (axes, kind), (runs, sent, taken, exposed) in sorted(rows.items())
    )


def bandwidth(group: list[tuple[int, ...]], slices: list[int], topology: Topology) -> float:
    """Bytes/s that one chip sends in a collective of these chips.

    Args:
      group: coordinates of the chips in the torus.
      slices: their slice numbers.
      topology: the machine.
    """
    chip = topology.chip
    if len(set(slices)) > 1:
        return chip.network_bandwidth
    if chip.platform == "gpu":
        return chip.link_bandwidth
    total = 0.0
    for axis, side in enumerate(topology.shape):
        if len({place[axis] for place in group}) > 1:
            # A ring needs the link around the edge, which only long enough sides have; without it one direction is left.
            ring = side >= (16 if len(topology.shape) == 2 else 4)
            total += chip.link_bandwidth * (1 if ring else 0.5)
    return total or chip.link_bandwidth


def roofline(
    model: ModelConfig, topology: Topology, *, seq_len: int, tokens: float, params_split: int
) -> Times:
    """Seconds of a step in closed form: nothing is compiled.

    Args:
      model: the model; its remat policy says what is computed twice.
      topology: the machine.
      seq_len: tokens of a sequence.
      tokens: tokens of a step on the whole machine.
      params_split: chips over which parameters are split; gathered twice and their gradient summed once a step, in bf16.
    """
    chip, chips = topology.chip, topology.num_chips
    products = model.flops_per_token(seq_len, attention="none") * tokens / chips
    head = 6 * model.vocab_size * model.hidden_size * tokens / chips
    attention = model.flops_per_token(seq_len, attention="causal") * tokens / chips - products
    if model.remat in ("full", "save_attention", "save_projections"):
        products += (products - head) / 3
        attention *= 4 / 3 if model.remat == "full" else 1
    seconds = products / chip.peak_flops / PRODUCT_SHARE[chip.platform]
    # Between slices parameters are copies: only what one chip holds of the gradient is summed there.
    inside = min(params_split, topology.chips_per_slice)
    sent = 3 * 2 * model.num_params * (1 - 1 / inside)
    rate = chip.link_bandwidth * max(1, len([side for side in topology.shape if side > 1]))
    links = sent / rate
    if topology.slices > 1:
        share = 2 * 4 * model.num_params / inside * (1 - 1 / topology.slices)
        links += share / chip.network_bandwidth
    other = OTHER_SHARE * seconds
    exposed = max(0.0, links - seconds - other)
    return Times(
        products=seconds,
        other=other,
        kernels=attention / chip.peak_flops / KERNEL_SHARE[0],
        exposed=exposed,
        hidden=links - exposed,
    )


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
