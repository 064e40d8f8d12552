"""The whole plan of one config on one machine: compile, read, price, and what would help."""

import dataclasses
import math

from smoljax.planning.changes import Change, cheapest
from smoljax.planning.closed_form import product_flops, roofline
from smoljax.planning.compiling import Compiled, PlannedRun, compile_step, mesh_text, planned_run
from smoljax.planning.estimate import (
    Estimate,
    Exchange,
    Times,
    collective_seconds,
    estimate,
    kernel_rate,
    price_collectives,
    times_of_program,
)
from smoljax.planning.hlo import Collective, Program, read
from smoljax.planning.topologies import Topology


@dataclasses.dataclass(frozen=True)
class Plan:
    """One config on one machine.

    Attributes:
      name: of the config.
      topology: the machine.
      mesh: its axes in words.
      num_params: of the model.
      batch_size: sequences of a step.
      seq_len: tokens of a sequence.
      remat: the model's remat policy.
      micro_batches: pieces of a batch.
      loss_chunk: tokens per chip whose logits fill the memory that logits may take.
      batch_parts: chips over which the batch is split.
      attention: the implementation that the config names.
      compiled: what the compiler says.
      program: what its program says; None when it does not fit, or for GPUs.
      exchanges: collectives, priced.
      estimate: seconds and cost; None when it does not fit.
      changes: what would help, cheapest first.
      tokens: the budget, or None.
      price: of one chip for one hour, or None.
      product_share: of the peak, in matrix products; None when it does not fit.
      kernel_share: of the peak, in attention kernels.
    """

    name: str
    topology: Topology
    mesh: str
    num_params: int
    batch_size: int
    seq_len: int
    remat: str
    micro_batches: int
    loss_chunk: int
    batch_parts: int
    attention: str
    compiled: Compiled
    program: Program | None
    exchanges: tuple[Exchange, ...]
    estimate: Estimate | None
    changes: tuple[Change, ...]
    tokens: float | None
    price: float | None
    product_share: float | None
    kernel_share: float

    @property
    def needs(self) -> float:
        """Bytes of a chip's memory that the step takes at its peak."""
        overflow = self.compiled.overflow
        return overflow.used if overflow else self.compiled.peak

    @property
    def fits(self) -> bool:
        """Whether it runs on this machine."""
        return self.compiled.overflow is None and self.needs <= self.topology.chip.hbm_bytes


def make_plan(
    config: dict, topology: Topology, *, tokens: float | None = None, price: float | None = None
) -> Plan:
    """Plans a run.

    Args:
      config: a whole config, as plain nested dicts.
      topology: the machine.
      tokens: the budget of days and cost, or None.
      price: of one chip for one hour, or None.

    Raises:
      SmoljaxError: a size does not divide, libtpu is missing, or the compiler refuses.
    """
    run = planned_run(config, topology)
    model, training, mesh = run.model, run.training, run.mesh
    compiled = compile_step(run, topology)
    program, exchanges, costs = None, (), None
    if compiled.overflow is None:
        if topology.chip.platform == "tpu":
            program = read(compiled.hlo)
            exchanges = _exchanges(program, mesh, topology)
        costs = estimate(
            _times(run, topology, program, exchanges),
            model,
            topology,
            seq_len=run.data.seq_len,
            batch_size=run.data.batch_size,
            tokens=tokens,
            price=price,
        )
    plan = Plan(
        name=config.get("name", "config"),
        topology=topology,
        mesh=mesh_text(mesh),
        num_params=model.num_params,
        batch_size=run.data.batch_size,
        seq_len=run.data.seq_len,
        remat=model.remat,
        micro_batches=training.micro_batches,
        loss_chunk=training.loss_chunk,
        batch_parts=mesh.shape["data"] * mesh.shape["fsdp"],
        attention=model.attention or "of the platform",
        compiled=compiled,
        program=program,
        exchanges=exchanges,
        estimate=costs,
        changes=(),
        tokens=tokens,
        price=price,
        product_share=_product_share(run, topology, costs) if costs else None,
        kernel_share=kernel_rate(topology.chip, model.head_dim) / topology.chip.peak_flops,
    )
    found = cheapest(
        model,
        times=costs.times if costs else None,
        exchanges=exchanges,
        kernel_runs=program.kernel_runs if program else None,
        free_bytes=topology.chip.hbm_bytes - plan.needs,
        seq_len=run.data.seq_len,
        batch_size=run.data.batch_size,
        micro_batches=training.micro_batches,
        loss_chunk=training.loss_chunk,
        batch_parts=plan.batch_parts,
        sequence_parts=mesh.shape["context"],
    )
    return dataclasses.replace(plan, changes=found)


def _times(
    run: PlannedRun, topology: Topology, program: Program | None, exchanges: tuple[Exchange, ...]
) -> Times:
    """Seconds of a step: from the compiled program, or in closed form where there is none."""
    model, seq_len = run.model, run.data.seq_len
    tokens = run.data.batch_size * seq_len
    if program is None:
        return roofline(
            model,
            topology,
            seq_len=seq_len,
            tokens=tokens,
            fsdp=run.mesh.shape["fsdp"],
            tensor=run.mesh.shape["tensor"],
            loss_chunk=run.training.loss_chunk,
        )
    passes = model.num_layers * run.training.micro_batches
    per_token = model.flops_per_token(seq_len, attention="causal")
    per_token -= model.flops_per_token(seq_len, attention="none")
    return times_of_program(
        program,
        exchanges,
        topology.chip,
        attention_flops=per_token / 3 * tokens / topology.num_chips / passes,
        num_layer_passes=passes,
        head_dim=model.head_dim,
    )


def _product_share(run: PlannedRun, topology: Topology, costs: Estimate) -> float:
    """FLOPs of the step's matrix products over what the chips could do in that time."""
    flops = product_flops(run.model)
    rows = run.data.batch_size // run.training.micro_batches
    parts = math.prod(run.mesh.shape[axis] for axis in ("data", "fsdp", "context"))
    if run.training.loss_chunk < rows * run.data.seq_len / parts:
        flops += 2 * run.model.vocab_size * run.model.hidden_size  # Logits are computed twice.
    seconds = costs.times.products * topology.num_chips
    return flops * costs.tokens_per_step / seconds / topology.chip.peak_flops


def _exchanges(program: Program, mesh, topology: Topology) -> tuple[Exchange, ...]:
    devices = list(mesh.devices.flat)
    sides = list(mesh.shape.items())

    def place(partition: int) -> dict[str, int]:
        indices, rest = {}, partition
        for axis, side in reversed(sides):
            rest, indices[axis] = divmod(rest, side)
        return indices

    def axes_of(collective: Collective) -> str:
        if not collective.group:
            return "data, network"
        places = [place(partition) for partition in collective.group]
        differ = [axis for axis, _ in sides if len({p[axis] for p in places}) > 1]
        return "+".join(differ) or "none"

    def seconds_of(collective: Collective) -> float:
        members = [devices[partition] for partition in collective.group]
        places = [tuple(device.coords)[: len(topology.shape)] for device in members]
        return collective_seconds(collective, places, topology=topology)

    return price_collectives(program, chip=topology.chip, axes_of=axes_of, seconds_of=seconds_of)
