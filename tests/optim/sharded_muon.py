"""Run by test_sharding.py on 8 forced host devices: prints what the compiled update communicates, as JSON.

Arguments: the mesh, as in data=2,fsdp=2,tensor=2, and the mesh axes that the matrices are split over, as in fsdp,tensor.
"""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from smoljax.optim import OptimizerConfig, build, newton_schulz, place_state

SIZES = dict(layers=3, embed=32, heads=4, head_dim=8, kv_heads=2, mlp=96, vocab=128)
AXES = {
    "embedding": ("vocab", "embed"),
    "attention": {
        "query": ("layers", "embed", "heads", "head_dim"),
        "key": ("layers", "embed", "kv_heads", "head_dim"),
        "output": ("layers", "heads", "head_dim", "embed"),
    },
    "mlp": {"gate": ("layers", "embed", "mlp"), "down": ("layers", "mlp", "embed")},
    "norm": ("layers", "embed"),
}
COLLECTIVE = re.compile(r"\b(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)\b")


def is_names(node):
    return isinstance(node, tuple)


def instructions(hlo):
    """(computation, name, opcode, operands and called computations) of every line of an HLO module."""
    computation = ""
    for line in hlo.splitlines():
        head = re.match(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if head:
            computation = head.group(1)
        found = re.match(r"^\s+(?:ROOT )?%?([\w.-]+) = .*? ([\w-]+)\((.*)$", line)
        if found:
            name, opcode, rest = found.groups()
            yield computation, name, opcode, re.findall(r"%([\w.-]+)", rest)


def between_products(hlo):
    """Collectives that depend on a matrix product and that a matrix product depends on, and all collectives by kind."""
    lines = list(instructions(hlo))
    holds_dot = {computation for computation, _, opcode, _ in lines if opcode == "dot"}
    for _ in range(5):  # computations call computations
        holds_dot |= {c for c, _, _, names in lines if holds_dot & set(names)}
    after, feeds = set(), {}
    collectives = {}
    for _, name, opcode, names in lines:
        feeds[name] = names
        if opcode == "dot" or holds_dot & set(names) or after & set(names):
            after.add(name)
        kind = COLLECTIVE.match(opcode)
        if kind:
            collectives[name] = kind.group(1)
    before, todo = set(), [n for _, n, o, names in lines if o == "dot" or holds_dot & set(names)]
    while todo:
        for name in feeds.get(todo.pop(), ()):
            if name in feeds and name not in before:
                before.add(name)
                todo.append(name)
    kinds = {kind: list(collectives.values()).count(kind) for kind in set(collectives.values())}
    in_loops = [n for c, n, o, _ in lines if c in holds_dot and n in collectives and "body" in c]
    return sorted((after & before & set(collectives)) | set(in_loops)), kinds


def wrong_ways(mesh, mesh_axis):
    """Collectives inside an iteration on matrices that are cut; and the stack split over all axes at once."""
    print("the wrong way", file=sys.stderr, flush=True)
    shape = jax.ShapeDtypeStruct((8, 32, 96), jnp.float32)
    # The matrices stay cut along their columns, and every iteration sums over devices.
    cut = NamedSharding(mesh, PartitionSpec(None, None, "fsdp"))
    wrong = jax.jit(newton_schulz, in_shardings=(cut,), out_shardings=cut)
    between, _ = between_products(wrong.lower(shape).compile().as_text())
    if len(mesh.axis_names) > 1:
        leaf = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
        whole = NamedSharding(mesh, PartitionSpec(mesh_axis, None, None))
        jax.jit(lambda x: x + 1, in_shardings=(leaf,), out_shardings=whole).lower(shape).compile()
    return between


def main():
    sizes = dict(pair.split("=") for pair in sys.argv[1].split(","))
    mesh = Mesh(np.array(jax.devices()).reshape([int(n) for n in sizes.values()]), tuple(sizes))
    split = {"embed": "fsdp"}
    if "tensor" in sizes:
        split |= dict.fromkeys(("heads", "kv_heads", "mlp", "vocab"), "tensor")
    params = jax.tree.map(
        lambda names: jnp.asarray(
            np.random.default_rng(len(names)).standard_normal([SIZES[n] for n in names]),
            jnp.float32,
        ),
        AXES,
        is_leaf=is_names,
    )
    places = jax.tree.map(
        lambda names: NamedSharding(mesh, PartitionSpec(*(split.get(n) for n in names))),
        AXES,
        is_leaf=is_names,
    )
    shapes = jax.eval_shape(lambda: params)
    config = OptimizerConfig(name="muon", schedule="constant", clip_norm=None)
    report = {}
    results = {}
    for name, options in {
        "split": dict(mesh=mesh, mesh_axis=tuple(sys.argv[2].split(","))),
        "alone": {},
    }.items():
        transform = build(config, shapes, logical_axes=AXES, num_steps=10, **options)
        state_places = place_state(
            jax.eval_shape(transform.init, shapes),
            shapes,
            places,
            otherwise=NamedSharding(mesh, PartitionSpec()),
        )
        arguments, out = (places, state_places, places), (places, state_places)
        if name == "alone":
            results[name] = jax.jit(transform.update)(params, transform.init(params), params)[0]
            continue
        update = jax.jit(
            transform.update, in_shardings=arguments, out_shardings=out, donate_argnums=(1,)
        )
        state = jax.jit(transform.init, out_shardings=state_places)(params)
        placed = jax.device_put(params, places)
        compiled = update.lower(placed, state, placed).compile()
        report["between"], report["kinds"] = between_products(compiled.as_text())
        results[name], state = compiled(placed, state, placed)
        momentum = state["moments"].inner_states["muon"].inner_state.momentum["mlp"]["gate"]
        report["momentum"] = str(momentum.sharding.spec)
    report["difference"] = max(
        float(np.abs(np.asarray(a) - np.asarray(b)).max())
        for a, b in zip(jax.tree.leaves(results["split"]), jax.tree.leaves(results["alone"]))
    )
    report["wrong"] = wrong_ways(mesh, tuple(sys.argv[2].split(",")))
    json.dump(report, sys.stdout)


main()
