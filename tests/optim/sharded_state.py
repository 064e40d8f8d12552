"""Run by test_sharding.py on 8 forced host devices: where the state of each optimizer lies, and what it computes, as JSON.

Argument: the mesh, as in fsdp=4,tensor=2.
"""

import json
import re
import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from smoljax.optim import OptimizerConfig, build, place_state

# Square matrices: the eigenvectors of one gradient's preconditioners are unique but for their signs.
SIZES = dict(layers=3, embed=32, heads=4, head_dim=8, mlp=32)
AXES = {
    "query": ("layers", "embed", "heads", "head_dim"),
    "gate": ("layers", "embed", "mlp"),
    "norm": ("layers", "embed"),
}
SPLIT = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor"}
STEPS = 4


def tree(seed):
    rng = np.random.default_rng(seed)
    return {
        name: np.float32(rng.standard_normal([SIZES[axis] for axis in axes]))
        for name, axes in AXES.items()
    }


def run(transform, params, shardings=None):
    """The last update, the state, and the program, after STEPS updates by random gradients."""
    update = jax.jit(
        transform.update,
        out_shardings=shardings and (shardings[0], shardings[1]),
    )
    put = (lambda x, place: jax.device_put(x, place)) if shardings else (lambda x, _: x)
    placed = put(params, shardings and shardings[0])
    state = put(jax.jit(transform.init)(params), shardings and shardings[1])
    compiled = update.lower(placed, state, placed).compile()
    for seed in range(STEPS):
        updates, state = compiled(put(tree(seed + 1), shardings and shardings[0]), state, placed)
    return updates, state, compiled.as_text()


def main():
    sizes = dict(pair.split("=") for pair in sys.argv[1].split(","))
    mesh = Mesh(np.array(jax.devices()).reshape([int(n) for n in sizes.values()]), tuple(sizes))
    whole = NamedSharding(mesh, PartitionSpec())
    places = {
        name: NamedSharding(
            mesh, PartitionSpec(*(SPLIT.get(a) if SPLIT.get(a) in sizes else None for a in axes))
        )
        for name, axes in AXES.items()
    }
    params, report = tree(0), {}
    for name in ("normuon", "adamuon", "muonh", "soap"):
        config = OptimizerConfig(
            name=name, schedule="constant", clip_norm=None, precondition_every=2
        )
        options = dict(logical_axes=AXES, num_steps=10)
        alone = build(config, params, **options)
        split = build(config, params, **options, mesh=mesh, mesh_axis=tuple(sizes))
        shapes = jax.eval_shape(split.init, params)
        state_places = place_state(shapes, params, places, otherwise=whole)
        want, _, _ = run(alone, params)
        got, state, program = run(split, params, (places, state_places))
        on_first = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state)]
        report[name] = {
            "difference": max(
                float(np.abs(np.asarray(got[leaf]) - np.asarray(want[leaf])).max()) for leaf in got
            ),
            "largest": max(float(np.abs(np.asarray(leaf)).max()) for leaf in want.values()),
            "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
            "bytes on a device": sum(on_first),
            "decomposed": re.findall(r"f32\[(\d+),(\d+),\d+\]\S* custom-call\(.*orgqr", program)
            + re.findall(r"\(f32\[(\d+),(\d+),\d+\].*custom-call\(.*geqrf", program),
        }
    json.dump(report, sys.stdout)


main()
