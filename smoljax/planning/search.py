"""Tries mesh shapes, remat policies, micro-batches and loss chunks, and ranks what fits."""

import itertools
import sys
import time

from smoljax.errors import SmoljaxError
from smoljax.planning.plan import Plan, make_plan
from smoljax.planning.topologies import GIB, Topology
from smoljax.progress import Progress

_REMAT = ("full", "save_attention", "dots")
_TENSOR = (1, 2, 4)
_MICRO_BATCHES = (1, 2)
_LOSS_TOKENS_PER_CHIP = (2048, 8192)


def search(
    config: dict,
    topology: Topology,
    *,
    limit: int,
    minutes: float,
    tokens: float | None = None,
    price: float | None = None,
) -> list[Plan]:
    """Plans up to `limit` variants of a config; those that fit come first, fastest first.

    Variants are ordered by how many settings leave the simplest (pure FSDP, full remat, one micro-batch, small loss chunks), so
    a small limit tries each setting alone. What does not divide the model or the batch is skipped.

    Args:
      config: a whole config.
      topology: the machine.
      limit: how many are compiled.
      minutes: none is begun after this time.
      tokens: as in make_plan.
      price: as in make_plan.
    """
    candidates = variants(config, topology)[:limit]
    progress = Progress("search", len(candidates), unit="settings")
    start = time.monotonic()
    plans = []
    for done, variant in enumerate(candidates, 1):
        if time.monotonic() - start > 60 * minutes:
            print(
                f"search: stopped after {minutes:g} minutes; --search_minutes=... allows more",
                file=sys.stderr,
            )
            break
        try:
            plans.append(make_plan(variant, topology, tokens=tokens, price=price))
        except SmoljaxError as error:
            print(f"search: skipped: {error}", file=sys.stderr)
        progress.update(done, plans[-1].mesh if plans else "")
    progress.close()
    return sorted(plans, key=_rank)


def variants(config: dict, topology: Topology) -> list[dict]:
    """Configs to try, the simplest first."""
    axes = [_TENSOR, _REMAT, _MICRO_BATCHES, _LOSS_TOKENS_PER_CHIP]
    places = sorted(
        itertools.product(*(range(len(values)) for values in axes)),
        key=lambda place: (sum(index > 0 for index in place), place),
    )
    found = []
    for place in places:
        tensor, remat, micro_batches, loss_tokens = (
            values[index] for values, index in zip(axes, place)
        )
        parts = topology.num_chips // tensor
        batch = config["data"]["batch_size"]
        heads = config["model"]["num_kv_heads"]
        if topology.num_chips % tensor or heads % tensor or batch % (parts * micro_batches):
            continue
        data = topology.slices
        changed = {
            "mesh": {"data": data, "fsdp": parts // data, "tensor": tensor, "context": 1},
            "model": config["model"] | {"remat": remat},
            "training": config["training"]
            | {"micro_batches": micro_batches, "loss_chunk": loss_tokens},
        }
        found.append(config | changed)
    return found


def ranking(plans: list[Plan]) -> str:
    """The plans as one table."""
    lines = [
        f"{'mesh':24} {'remat':16} {'micro':>5} {'chunk/chip':>10} {'peak GiB':>9} {'step s':>8} {'MFU':>6} {'tokens/s':>12}"
    ]
    for plan in plans:
        row = f"{plan.mesh:24} {plan.remat:16} {plan.micro_batches:5} {plan.loss_chunk:10} {plan.needs / GIB:9.2f}"
        if plan.fits:
            costs = plan.estimate
            row += f" {costs.times.step:8.3f} {100 * costs.mfu['causal attention']:5.1f}% {costs.tokens_per_second:12,.0f}"
        else:
            row += "  does not fit"
        lines.append(row)
    if not plans:
        lines.append("nothing divides over this machine: change config.data.batch_size")
    return "\n".join(lines)


def _rank(plan: Plan) -> tuple:
    return (not plan.fits, plan.estimate.times.step if plan.fits else plan.needs)
