"""Tries mesh shapes, remat policies, micro-batches and loss chunks, and ranks what fits."""

import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator

from smoljax import configuration, parallel
from smoljax.errors import SmoljaxError
from smoljax.planning.plan import Plan
from smoljax.planning.topologies import GIB, Topology
from smoljax.progress import Progress

_REMAT = ("dots", "full", "save_projections", "save_attention", "none")
_TENSOR = (1, 2, 4)
_MICRO_BATCHES = (2, 1, 4)
_LOSS_TOKENS_PER_CHIP = (2048, 1024, 8192)


def search(
    first: Plan,
    others: Iterable[tuple[list[str], Callable[[], Plan]]],
    *,
    limit: int,
    minutes: float,
) -> list[Plan]:
    """Plans up to `limit` others beside the first; those that fit come first, fastest first.

    An interrupt (Ctrl-C) ends it after the one that is being compiled, and what was tried is ranked.

    Args:
      first: a plan that is there already, and is ranked too.
      others: flags that make each, and a function that plans it; a SmoljaxError of it is said, and it is skipped.
      limit: how many are compiled.
      minutes: none is begun after this time.
    """
    plans, start = [first], time.monotonic()
    progress = Progress("search", limit, unit="settings")
    for flags, plan in others:
        if len(plans) > limit:
            break
        if time.monotonic() - start > 60 * minutes:
            _say(f"stopped after {minutes:g} minutes; --search_minutes=... allows more")
            break
        try:
            plans.append(plan())
        except SmoljaxError as error:
            _say(f"skipped {' '.join(flags)}: {error}")
            continue
        except KeyboardInterrupt:
            _say("interrupted; what was tried until now is ranked")
            break
        progress.update(len(plans) - 1, _summary(plans[-1]))
    else:
        if len(plans) == 1:
            _say(
                f"nothing else divides over this machine: make config.data.batch_size ({first.batch_size}) "
                f"a multiple of {first.topology.num_chips}"
            )
    progress.close()
    return sorted(plans, key=_rank)


def _say(text: str) -> None:
    print(f"search: {text}", file=sys.stderr, flush=True)


def variants(config: dict, topology: Topology) -> Iterator[tuple[list[str], dict]]:
    """Configs to try, with the flags that make them of this one: first those that change one setting, the first other value of each, then the second, and so on; then two settings.

    What cannot divide the model's heads or the batch is left out.
    """
    training, model = config["training"], config["model"]
    fields = {
        "training.micro_batches": _others(training["micro_batches"], _MICRO_BATCHES),
        "model.remat": _others(model.get("remat", "none"), _REMAT),
        "mesh": _others(_own_mesh(config, topology), _meshes(config, topology)),
        "training.loss_chunk": _others(training["loss_chunk"], _LOSS_TOKENS_PER_CHIP),
    }
    places = sorted(
        itertools.product(*(range(len(values)) for values in fields.values())),
        key=lambda place: (sum(index > 0 for index in place), sum(place), [-i for i in place]),
    )
    for place in places[1:]:
        micro_batches, remat, mesh, loss_chunk = (
            values[index] for values, index in zip(fields.values(), place)
        )
        parts = dict(mesh)["data"] * dict(mesh)["fsdp"]
        if config["data"]["batch_size"] % (parts * micro_batches):
            continue
        flags = []
        for index, (field, values) in zip(place, fields.items()):
            if index:
                value = dict(values[index]) if field == "mesh" else {field: values[index]}
                prefix = "mesh." if field == "mesh" else ""
                flags += [f"--config.{prefix}{name}={each}" for name, each in value.items()]
        yield (
            flags,
            config
            | {
                "mesh": dict(mesh),
                "model": model | {"remat": remat},
                "training": training | {"micro_batches": micro_batches, "loss_chunk": loss_chunk},
            },
        )


def _others(own, values) -> list:
    return [own, *(value for value in values if value != own)]


def _own_mesh(config: dict, topology: Topology) -> tuple:
    mesh = configuration.build(parallel.MeshConfig, config["mesh"], "mesh")
    return tuple(zip(parallel.AXES, mesh.shape(topology.num_chips)))


def _meshes(config: dict, topology: Topology) -> list[tuple]:
    """Parameters over all chips of a slice, over those of one side of its torus, or with heads over some of them."""
    slices, chips = topology.slices, topology.chips_per_slice
    context = dict(_own_mesh(config, topology))["context"]
    side = max(topology.shape)
    found = []
    for tensor in _TENSOR:
        if chips % (tensor * context) or config["model"]["num_kv_heads"] % tensor:
            continue
        inside = chips // tensor // context
        for fsdp in (inside, side):
            if inside % fsdp == 0:
                data = slices * (inside // fsdp)
                found.append(tuple(zip(parallel.AXES, (data, fsdp, tensor, context))))
    return list(dict.fromkeys(found))


def ranking(plans: list[Plan], own: Plan) -> str:
    """The plans as one table; a star marks the config's own settings."""
    lines = [
        f"Search: {len(plans)} settings, those that fit first, fastest first (* the config's own). Columns are config.mesh, "
        "config.model.remat, config.training.micro_batches and loss_chunk",
        f"  {'mesh':24} {'remat':16} {'micro':>5} {'chunk':>6} {'peak GiB':>9} {'step s':>8} {'MFU':>6} {'tokens/s':>12} {'bound by'}",
    ]
    for plan in plans:
        mark = "*" if plan is own else " "
        lines.append(f"{mark} {_summary(plan)}")
    return "\n".join(lines)


def _summary(plan: Plan) -> str:
    row = f"{plan.mesh:24} {plan.remat:16} {plan.micro_batches:5} {plan.loss_chunk:6} {plan.needs / GIB:9.2f}"
    if not plan.fits:
        return f"{row}  does not fit: {(plan.needs - plan.topology.chip.hbm_bytes) / GIB:.2f} GiB too much"
    costs = plan.estimate
    mfu = 100 * costs.mfu["causal attention"]
    return f"{row} {costs.times.step:8.3f} {mfu:5.1f}% {costs.tokens_per_second:12,.0f} {costs.times.bound}"


def _rank(plan: Plan) -> tuple:
    return (not plan.fits, plan.estimate.times.step if plan.fits else plan.needs)
