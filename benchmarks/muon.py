"""Times Muon's update and apply beside optax.contrib.muon: both in one run, alternating, the fastest of several rounds.

Command:   python benchmarks/muon.py [--rounds=7] [--large] [--write=benchmarks/results/muon_DATE.md]
           python benchmarks/muon.py --topology=v5p:4x4x4   (compiles for TPUs, on a CPU; needs the extra "tpu")
Settings:  equal on both sides: Keller's coefficients, 5 steps, Nesterov, scale sqrt(max(1, d_out / d_in)), float32.
           For TPUs: the 3B model of configs/smollm3_3b.py on its mesh (fsdp over all chips), float32 parameters, AdamW for
           embedding and norms; ours in bfloat16, its default there, and in float32 (optax's products of float32 are
           bfloat16 on a TPU, ours are not).

B stacked matrices, M rows, N columns
"""

import argparse
import datetime
import os
import platform
import re
import runpy
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from smoljax import optim
from smoljax.model import ModelConfig, init, logical_axes
from smoljax.parallel import MeshConfig, make_mesh, param_shardings

COLLECTIVE = re.compile(r"(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)")
COEFFICIENTS = optim.COEFFICIENTS["keller"][0]


def shapes_of_decoder(
    *, num_layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int
) -> dict[str, tuple[int, ...]]:
    """The hidden matrices of a SmolLM3-style decoder, layers stacked, heads flat."""
    width = hidden // heads
    return {
        "query": (num_layers, hidden, heads * width),
        "key": (num_layers, hidden, kv_heads * width),
        "value": (num_layers, hidden, kv_heads * width),
        "output": (num_layers, heads * width, hidden),
        "gate": (num_layers, hidden, intermediate),
        "up": (num_layers, hidden, intermediate),
        "down": (num_layers, intermediate, hidden),
    }


QUICKSTART = dict(num_layers=4, hidden=256, heads=4, kv_heads=2, intermediate=688)
CASES = {
    "12 x 512x512 separate": {f"w{i:02}": (512, 512) for i in range(12)},
    "12 x 512x512 stacked": {"w": (12, 512, 512)},
    "12 x 512x2048 separate": {f"w{i:02}": (512, 2048) for i in range(12)},
    "12 x 512x2048 stacked": {"w": (12, 512, 2048)},
    "quickstart, layers stacked": shapes_of_decoder(**QUICKSTART),
}
LARGE = {
    "SmolLM2-135M, layers stacked": shapes_of_decoder(
        num_layers=30, hidden=576, heads=9, kv_heads=3, intermediate=1536
    )
}


def ours(**options) -> optax.GradientTransformation:
    """smoljax's Muon at the shared settings."""
    return optim.muon(
        0.02, coefficients=COEFFICIENTS, scale="keller", bias_correction=True, **options
    )


def theirs() -> optax.GradientTransformation:
    """optax's Muon at the shared settings."""
    numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return optax.contrib.muon(
        0.02, muon_weight_dimension_numbers=lambda params: jax.tree.map(lambda _: numbers, params)
    )


def main() -> None:
    """Prints one line for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--large", action="store_true", help="also SmolLM2-135M, which takes long")
    parser.add_argument("--topology", help="compile the 3B model's update for these TPUs instead")
    parser.add_argument("--write", type=Path, help="file that the printed lines are added to")
    arguments = parser.parse_args()
    lines = compiled_for(arguments.topology) if arguments.topology else timed(arguments)
    printed = []
    for line in lines:
        print(line, flush=True)
        printed.append(line)
    if arguments.write:
        before = "# Muon beside optax.contrib.muon\n"
        if arguments.write.exists():
            before = arguments.write.read_text()
        arguments.write.write_text("\n".join([before, "```", *printed, "```", ""]))


def timed(arguments: argparse.Namespace) -> Iterator[str]:
    """The table of times, line by line."""
    yield (
        f"{datetime.date.today()}  jax {jax.__version__}, optax {optax.__version__}, {jax.devices()[0].device_kind}, "
        f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}; fastest of {arguments.rounds}"
    )
    yield (
        f"{'case':30} {'optax ms':>9} {'ours ms':>9} {'speed':>6} {'optax MiB':>10} {'ours MiB':>9} {'15 products ms':>16}"
    )
    for name, shapes in (CASES | (LARGE if arguments.large else {})).items():
        key = jax.random.key(0)
        params = {
            leaf: jax.random.normal(jax.random.fold_in(key, i), shape) * 0.02
            for i, (leaf, shape) in enumerate(shapes.items())
        }
        sides = [Side(theirs(), params), Side(ours(), params), Products(shapes)]
        for _ in range(arguments.rounds):
            for side in sides:
                side.round()
        optax_side, our_side, products = sides
        difference = max(
            float(jnp.max(jnp.abs(optax_side.first[leaf] - our_side.first[leaf])))
            for leaf in params
        )
        assert difference < 1e-5, f"the two sides disagree by {difference}"
        yield (
            f"{name:30} {optax_side.best * 1e3:9.1f} {our_side.best * 1e3:9.1f} {optax_side.best / our_side.best:5.2f}x"
            f" {optax_side.temporary_mib:10.0f} {our_side.temporary_mib:9.0f} {products.best * 1e3:16.1f}"
        )


def compiled_for(topology: str) -> Iterator[str]:
    """Temporary memory per chip, and the collectives that stand between two products, of the update of the 3B model."""
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    config = runpy.run_path("configs/smollm3_3b.py")["get_config"]()
    mesh = make_mesh(MeshConfig(**config.mesh), devices)
    model = ModelConfig(**config.model)
    axes = logical_axes(model)
    params = jax.eval_shape(lambda: init(model, jax.random.key(0)))
    placements = param_shardings(mesh, axes, params)
    assignments = optim.assign(params, logical_axes=axes)
    yield (
        f"{datetime.date.today()}  jax {jax.__version__}, optax {optax.__version__}, compiled for {topology}, mesh "
        f"{dict(mesh.shape)}, {model.num_params:,} parameters"
    )
    yield f"{'update':20} {'temporary MiB per chip':>24}   collectives; those between two products"

    def of_leaves(value):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: value(
                assignments[jax.tree_util.keystr(path, simple=True, separator="/")]
            ),
            params,
        )

    labels = of_leaves(lambda leaf: "muon" if leaf.role == "hidden" else "adamw")
    specs = of_leaves(lambda leaf: leaf.spec)
    for name, transform in {
        "optax": optax.contrib.muon(
            0.02, muon_weight_dimension_numbers=of_leaves(dimension_numbers)
        ),
        "ours, bfloat16": partitioned(labels, ours(specs=specs, mesh=mesh, mesh_axis="fsdp")),
        "ours, float32": partitioned(
            labels, ours(specs=specs, mesh=mesh, mesh_axis="fsdp", dtype=jnp.float32)
        ),
    }.items():
        state = jax.eval_shape(transform.init, params)
        whole = NamedSharding(mesh, PartitionSpec())
        places = optim.place_state(state, params, placements, otherwise=whole)
        compiled = (
            jax.jit(
                step_of(transform),
                in_shardings=(placements, places, placements),
                out_shardings=(placements, places),
                donate_argnums=(0, 1),
            )
            .lower(params, state, params)
            .compile()
        )
        memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
        kinds, between = collectives(compiled.as_text())
        yield f"{name:20} {memory:24.0f}   {dict(kinds)}; {dict(between) or 'none'}"


def dimension_numbers(leaf: optim.Assignment) -> optax.contrib.MuonDimensionNumbers | None:
    """What optax wants to know of a leaf with stacked layers; None sends it to Adam."""
    if leaf.role != "hidden":
        return None
    return optax.contrib.MuonDimensionNumbers(leaf.spec.inputs, leaf.spec.outputs)


def partitioned(labels: object, muon: optax.GradientTransformation) -> optax.GradientTransformation:
    """Muon for the hidden matrices, AdamW for the rest."""
    return optax.partition({"muon": muon, "adamw": optax.adamw(0.02)}, labels)


def collectives(hlo: str) -> tuple[Counter, Counter]:
    """How many collectives of each kind an HLO module has, and how many lie on a path from one product to another."""
    feeds, kinds, products, computation = {}, {}, set(), ""
    bodies: dict[str, list[str]] = {}
    for line in hlo.splitlines():
        head = re.match(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$", line)
        found = re.match(r"^\s+(?:ROOT )?%?([\w.-]+) = .*? ([a-z][\w-]*)\((.*)$", line)
        if head:
            computation = head.group(1)
        elif found:
            name, opcode, rest = found.groups()
            feeds[name] = re.findall(r"%([\w.-]+)", rest)
            bodies.setdefault(computation, []).append(name)
            kind = COLLECTIVE.match(opcode)
            if kind and not opcode.endswith("-done"):
                kinds[name] = kind.group(1)
            if opcode in ("dot", "convolution"):
                products.add(name)
    for _ in range(5):  # Computations call computations.
        holding = {body for body, names in bodies.items() if products & set(names)}
        products |= {name for name, operands in feeds.items() if holding & set(operands)}
    after, before = set(products), set()
    for name, operands in feeds.items():  # An instruction stands behind its operands.
        if after & set(operands):
            after.add(name)
    todo = list(products)
    while todo:
        fresh = [name for name in feeds[todo.pop()] if name in feeds and name not in before]
        before.update(fresh)
        todo.extend(fresh)
    return Counter(kinds.values()), Counter(kinds[name] for name in kinds if name in after & before)


def step_of(transform: optax.GradientTransformation) -> Callable:
    """Update and apply."""

    def step(params, state, gradients):
        updates, state = transform.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


class Side:
    """One compiled update-and-apply, with its fastest time and temporary memory."""

    def __init__(self, transform: optax.GradientTransformation, params: dict[str, jax.Array]):
        step = step_of(transform)
        self.gradients = jax.tree.map(lambda leaf: leaf[..., ::-1] * 3.0, params)
        state = jax.jit(transform.init)(params)
        self.compiled = (
            jax.jit(step, donate_argnums=(0, 1)).lower(params, state, self.gradients).compile()
        )
        self.temporary_mib = self.compiled.memory_analysis().temp_size_in_bytes / 2**20
        self.first, _ = self.compiled(jax.tree.map(jnp.copy, params), state, self.gradients)
        self.carry = (jax.tree.map(jnp.copy, params), jax.jit(transform.init)(params))
        self.best = float("inf")

    def round(self) -> None:
        """Runs and times one step."""
        start = time.perf_counter()
        self.carry = jax.block_until_ready(self.compiled(*self.carry, self.gradients))
        self.best = min(self.best, time.perf_counter() - start)


class Products:
    """The three products of each of five standard steps and nothing else, all matrices of one shape in one batch.

    Not a bound on the Gram form, which needs fewer flops on wide matrices.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        counts: dict[tuple[int, int], int] = {}
        for *batch, rows, columns in shapes.values():
            key = (min(rows, columns), max(rows, columns))
            counts[key] = counts.get(key, 0) + (batch[0] if batch else 1)
        self.stacks = [jnp.ones((count, *shape)) / 1000 for shape, count in counts.items()]

        def products(x_BMN):
            for _ in range(5):
                a_BMM = jnp.einsum("bmn,bkn->bmk", x_BMN, x_BMN)
                a_BMM = jnp.einsum("bmk,bkl->bml", a_BMM, a_BMM)
                x_BMN = jnp.einsum("bmk,bkn->bmn", a_BMM, x_BMN)
            return x_BMN

        self.compiled: list[Callable] = [
            jax.jit(products).lower(stack).compile() for stack in self.stacks
        ]
        self.best = float("inf")

    def round(self) -> None:
        """Runs and times all products once."""
        start = time.perf_counter()
        jax.block_until_ready(
            [compiled(stack) for compiled, stack in zip(self.compiled, self.stacks)]
        )
        self.best = min(self.best, time.perf_counter() - start)


if __name__ == "__main__":
    main()
