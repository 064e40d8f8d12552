"""A plan as text for people, and as plain data for programs."""

import dataclasses

from smoljax.planning.plan import Plan
from smoljax.planning.topologies import GIB

_FROM = {
    "tpu": "by libtpu, which compiled the step for these chips",
    "cpu": "by the compiler for this computer's processor, in the place of the GPUs'",
}


def table(plan: Plan) -> str:
    """The whole plan, in lines that a person can decide from: the answer first."""
    topology = plan.topology
    chip = topology.chip
    slices = f" in {topology.slices} {_NETWORKED[chip.platform]}" if topology.slices > 1 else ""
    tokens = plan.batch_size * plan.seq_len
    lines = [
        f"{plan.name} on {topology.name}: {_answer(plan)}",
        "",
        f"  model    {plan.num_params:,} parameters, remat {plan.remat}, attention {plan.attention}",
        f"  machine  {topology.num_chips:,} {chip.name}{slices}: each {chip.peak_flops / 1e12:,.0f} TFLOP/s in bf16 "
        f"and {chip.hbm_bytes / GIB:.2f} GiB; mesh {plan.mesh}",
        f"  step     {tokens:,} tokens: {plan.batch_size:,} sequences of {plan.seq_len:,}, "
        f"{plan.batch_size / topology.num_chips:g} per chip, in {_count(plan.micro_batches, 'micro-batch')}; "
        f"loss in chunks of {plan.loss_chunk:,} tokens per chip",
        "",
        *_memory(plan),
        "",
    ]
    if plan.estimate:
        lines += [*_step(plan), "", *_exchange(plan), *_flops(plan), "", *_budget(plan), ""]
    lines.append("Cheapest changes (by estimate; plan again to confirm)")
    for change in plan.changes:
        effect = [f"{-change.seconds:+.3f} s"] if change.seconds else []
        effect += [f"{-change.bytes / GIB:+.1f} GiB"] if abs(change.bytes) > 0.05 * GIB else []
        lines.append(f"  {change.flags:44} {', '.join(effect):20} {change.why}")
    if not plan.changes:
        lines.append("  none of those known here would help and fit")
    return "\n".join(lines)


_NETWORKED = {"tpu": "slices", "gpu": "nodes"}


def _count(number: int, unit: str) -> str:
    return f"{number:,} {unit}{'' if number == 1 else 'es'}"


def _answer(plan: Plan) -> str:
    if not plan.fits:
        return (
            f"DOES NOT FIT, by {(plan.needs - plan.topology.chip.hbm_bytes) / GIB:.2f} GiB a chip"
        )
    costs = plan.estimate
    answer = f"fits; {_seconds(costs.times.step)} s a step, {costs.tokens_per_second:,.0f} tokens/s"
    if costs.days is not None:
        answer += f", {costs.days:,.1f} days"
    if costs.cost is not None:
        answer += f", {costs.cost:,.0f} at {plan.price:g} a chip-hour"
    return answer


def _seconds(value: float) -> str:
    """Four digits, whatever the size of the model."""
    return f"{value:.4f}" if value < 1 else f"{value:.3f}"


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
    lines = [f"{'Memory per chip':36} {'GiB':>9}    ({_FROM[compiled.memory_from]})"]
    lines += [
        f"  {name:34} {size / GIB:9.3f} {100 * size / limit:6.1f}%"
        for name, size in rows
        if size is not None
    ]
    if plan.fits:
        lines.append(f"  fits: {(limit - plan.needs) / GIB:.2f} GiB are free")
    else:
        lines.append(f"  DOES NOT FIT: {(plan.needs - limit) / GIB:.2f} GiB too much")
    if compiled.memory_from == "cpu":
        lines += [
            "  an estimate: parameters, optimizer state and batch are exact, but activations are those of the step compiled for",
            "  this computer's processor, which holds bf16 as f32 and has no attention kernel; a GPU needs less, its allocator more",
        ]
    if compiled.rematerialisations:
        lines.append(
            f"  the compiler gathers {compiled.rematerialisations} arrays whole because it cannot reshard them"
        )
    return lines


def _step(plan: Plan) -> list[str]:
    times = plan.estimate.times
    if plan.program:
        noted = f"cycles of {plan.program.num_noted} instructions x trips"
        products = f"{noted}, at {100 * plan.product_share:.0f}% of peak"
        backward = sum(kernel.trips for kernel in plan.program.kernels if kernel.backward)
        kernels = f"{plan.program.kernel_runs - backward} runs forward, {backward} backward, at {100 * plan.kernel_share:.0f}% of peak"
    else:
        noted = "closed form"
        products = f"closed form, at {100 * plan.product_share:.0f}% of peak"
        kernels = f"closed form, at {100 * plan.kernel_share:.0f}% of peak"
    rows = [
        ("matrix products", times.products, products),
        ("everything else computed", times.other, noted),
        ("attention kernels", times.kernels, kernels),
        ("exchange, exposed", times.exposed, f"{_seconds(times.hidden)} s more are hidden"),
        ("step", times.step, f"between {_seconds(times.fastest)} and {_seconds(times.slowest)} s"),
    ]
    lines = [f"{'Time of a step':36} {'s':>9}"]
    lines += [
        f"  {name:34} {_seconds(seconds):>9} {100 * seconds / times.step:6.1f}%  {note}"
        for name, seconds, note in rows
    ]
    lines.append(f"  bound by {times.bound}")
    if plan.program is None:
        lines.append(
            "  published GPU runs reached 14 to 21% more or less than these closed forms (benchmarks/plan_calibration.py)"
        )
    return lines


def _exchange(plan: Plan) -> list[str]:
    if not plan.exchanges:
        return []
    lines = [
        f"{'Exchange of a chip, a step':36} {'runs':>9} {'GB sent':>9} {'GB/s':>7} {'s':>9} {'exposed':>9} {'hidden':>9}"
    ]
    for row in plan.exchanges:
        rate = row.bytes_sent / row.seconds / 1e9 if row.seconds else 0.0
        lines.append(
            f"  {row.axes:15} {row.kind:18} {row.runs:9,} {row.bytes_sent / 1e9:9.3f} {rate:7.1f} "
            f"{_seconds(row.seconds):>9} {_seconds(row.exposed):>9} {_seconds(row.hidden):>9}"
        )
    return [*lines, ""]


def _flops(plan: Plan) -> list[str]:
    costs = plan.estimate
    lines = [f"{'FLOPs of a step, by convention':36} {'FLOPs':>9} {'MFU':>7}"]
    return lines + [
        f"  {name:34} {flops:9.3e} {100 * costs.mfu[name]:6.1f}%"
        for name, flops in costs.flops.items()
    ]


def _budget(plan: Plan) -> list[str]:
    costs = plan.estimate
    rate = costs.tokens_per_second
    lines = [f"{rate:,.0f} tokens/s, {rate / plan.topology.num_chips:,.0f} per chip"]
    slow, fast = costs.times.slowest / costs.times.step, costs.times.fastest / costs.times.step
    if costs.days is not None:
        lines.append(
            f"{plan.tokens:.4g} tokens: {costs.days:,.1f} days ({costs.days * fast:,.1f} to {costs.days * slow:,.1f}), "
            f"{costs.chip_hours:,.0f} chip-hours, without evaluation, checkpoints and restarts"
        )
    if costs.cost is not None:
        lines.append(
            f"cost {costs.cost:,.0f} ({costs.cost * fast:,.0f} to {costs.cost * slow:,.0f}) at {plan.price:g} a chip-hour"
        )
    return lines


def as_json(plan: Plan) -> dict:
    """The plan as plain data: bytes, seconds, counts."""
    compiled, costs, topology = plan.compiled, plan.estimate, plan.topology
    result = {
        "config": plan.name,
        "topology": topology.name,
        "chips": topology.num_chips,
        "slices": topology.slices,
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
            "limit": topology.chip.hbm_bytes,
            "rematerialisations": compiled.rematerialisations,
        },
        "compile_seconds": compiled.seconds,
        "exchanges": [dataclasses.asdict(row) | {"hidden": row.hidden} for row in plan.exchanges],
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
            "tokens": plan.tokens,
            "price": plan.price,
        }
    return result
