"""A plan as text for people, and as plain data for programs."""

import dataclasses

from smoljax.planning.estimate import KERNEL_SHARE
from smoljax.planning.plan import Plan
from smoljax.planning.topologies import GIB


def table(plan: Plan) -> str:
    """The whole plan, in lines that a person can decide from."""
    topology = plan.topology
    slices = f", {topology.slices} slices" if topology.slices > 1 else ""
    lines = [
        f"{plan.name} on {topology.name}: {topology.num_chips} chips{slices}, mesh {plan.mesh}",
        f"  {plan.num_params:,} parameters, {plan.batch_size:,} x {plan.seq_len:,} tokens a step "
        f"({plan.batch_size / topology.num_chips:g} sequences per chip), remat {plan.remat}, "
        f"{plan.micro_batches} micro-batches, loss chunks of {plan.loss_chunk:,} tokens per chip, attention {plan.attention}",
        "",
        *_memory(plan),
        "",
    ]
    if plan.estimate:
        lines += [*_step(plan), "", *_budget(plan), ""]
    if plan.changes:
        lines.append("Cheapest changes (estimates; plan again to confirm)")
        for change in plan.changes:
            effect = [f"{-change.seconds:+.2f} s"] if change.seconds else []
            effect += [f"{-change.bytes / GIB:+.1f} GiB"] if abs(change.bytes) > 0.05 * GIB else []
            lines.append(f"  {change.flags:44} {', '.join(effect):20} {change.why}")
    return "\n".join(lines).rstrip()


def _memory(plan: Plan) -> list[str]:
    compiled, limit = plan.compiled, plan.topology.chip.hbm_bytes
    rows = [
        ("parameters", compiled.params),
        ("optimizer state", compiled.optimizer),
        ("batch", compiled.batch),
        ("activations and temporaries", compiled.temporaries),
        ("peak", plan.needs),
        ("memory of a chip", limit),
    ]
    lines = [f"Memory per chip (from the {compiled.memory_from} compiler)      GiB"]
    lines += [f"  {name:36} {size / GIB:9.3f}" for name, size in rows if size is not None]
    if plan.fits:
        lines.append(f"  fits: {(limit - plan.needs) / GIB:.2f} GiB are free")
    else:
        lines.append(f"  DOES NOT FIT: {(plan.needs - limit) / GIB:.2f} GiB too much")
    if compiled.rematerialisations:
        lines.append(
            f"  the compiler gathers {compiled.rematerialisations} arrays whole because it cannot reshard them"
        )
    return lines


def _step(plan: Plan) -> list[str]:
    costs, times = plan.estimate, plan.estimate.times
    if plan.program:
        source = f"cycles of {plan.program.num_noted} instructions, times their trips"
        kernels = f"{plan.program.kernel_runs} runs at {100 * KERNEL_SHARE[0]:.0f}% of peak"
    else:
        source = kernels = "closed form"
    rows = [
        ("matrix products", times.products, source),
        ("everything else computed", times.other, source),
        ("attention kernels", times.kernels, kernels),
        ("exchange, exposed", times.exposed, f"{times.hidden:.3f} s more are hidden"),
        ("step", times.step, f"between {times.fastest:.2f} and {times.slowest:.2f} s"),
    ]
    lines = ["Time of a step                                s"]
    lines += [f"  {name:36} {seconds:9.3f}  {note}" for name, seconds, note in rows]
    lines.append(f"  bound by {times.bound}")
    if plan.program is None:
        lines.append(
            "  closed forms: twelve published runs took 0.8 to 1.6 times what these predict (benchmarks/plan_calibration.py)"
        )
    if plan.exchanges:
        lines += [
            "",
            "Exchange, sent per chip and step      runs        GB        s  exposed s",
        ]
        for row in plan.exchanges:
            lines.append(
                f"  {row.axes:15} {row.kind:18} {row.runs:6} {row.bytes_sent / 1e9:9.2f} "
                f"{row.seconds:8.3f} {row.exposed:10.3f}"
            )
    lines += ["", "FLOPs convention            FLOPs per step      MFU"]
    lines += [
        f"  {name:25} {flops:14.3e}   {100 * costs.mfu[name]:5.1f}%"
        for name, flops in costs.flops.items()
    ]
    return lines


def _budget(plan: Plan) -> list[str]:
    costs = plan.estimate
    rate = costs.tokens_per_second
    lines = [f"{rate:,.0f} tokens/s, {rate / plan.topology.num_chips:,.0f} per chip"]
    if costs.days is not None:
        slow, fast = costs.times.slowest / costs.times.step, costs.times.fastest / costs.times.step
        lines.append(
            f"{costs.days:,.1f} days ({costs.days * fast:,.1f} to {costs.days * slow:,.1f}), "
            f"{costs.chip_hours:,.0f} chip-hours"
        )
    if costs.cost is not None:
        lines.append(f"cost {costs.cost:,.0f} in the unit of --price")
    return lines


def as_json(plan: Plan) -> dict:
    """The plan as plain data: bytes, seconds, counts."""
    compiled, costs = plan.compiled, plan.estimate
    result = {
        "config": plan.name,
        "topology": plan.topology.name,
        "chips": plan.topology.num_chips,
        "mesh": plan.mesh,
        "parameters": plan.num_params,
        "batch_size": plan.batch_size,
        "seq_len": plan.seq_len,
        "remat": plan.remat,
        "micro_batches": plan.micro_batches,
        "loss_chunk": plan.loss_chunk,
        "attention": plan.attention,
        "fits": plan.fits,
        "memory": {
            "from": compiled.memory_from,
            "parameters": compiled.params,
            "optimizer": compiled.optimizer,
            "batch": compiled.batch,
            "temporaries": compiled.temporaries,
            "peak": plan.needs,
            "limit": plan.topology.chip.hbm_bytes,
            "rematerialisations": compiled.rematerialisations,
        },
        "compile_seconds": compiled.seconds,
        "exchanges": [dataclasses.asdict(row) for row in plan.exchanges],
        "kernel_runs": plan.program.kernel_runs if plan.program else None,
        "changes": [dataclasses.asdict(change) for change in plan.changes],
    }
    if costs:
        times = costs.times
        result["step"] = dataclasses.asdict(times) | {
            "seconds": times.step,
            "fastest": times.fastest,
            "slowest": times.slowest,
            "bound": times.bound,
        }
        result |= {
            "flops": costs.flops,
            "mfu": costs.mfu,
            "tokens_per_second": costs.tokens_per_second,
            "days": costs.days,
            "chip_hours": costs.chip_hours,
            "cost": costs.cost,
        }
    return result
