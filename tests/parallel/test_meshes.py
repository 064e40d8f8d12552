"""Every mesh gives the step of one device, and exchanges what one table says: 8 forced host devices in a process of their own."""

import collections
import importlib.util
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from smoljax.model import init
from tests.parallel import eight_chips
from tests.parallel.eight_devices import BATCH_SIZE, CASES, MESHES, MODEL, SEQ_LEN


@pytest.fixture(scope="module")
def report():
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.eight_devices"],
        env=os.environ
        | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # It compiles 34 programs.
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("setting", "mesh"), CASES)
def test_loss_gradients_and_update_are_those_of_one_device(report, setting, mesh):
    found, control = report[setting][mesh], report[setting]["another batch"]
    for name, tolerance in (("loss", 1e-6), ("gradients", 5e-6), ("parameters", 1e-3)):
        assert found[name] < tolerance, name
        assert control[name] > 10 * tolerance, name


@pytest.mark.parametrize(("setting", "mesh"), CASES)
def test_initial_parameters_are_the_same_to_the_bit(report, setting, mesh):
    assert report[setting][mesh]["same initial parameters"]


def allowed(
    data: int = 1, fsdp: int = 1, tensor: int = 1, context: int = 1
) -> list[tuple[str, str, float, float]]:
    """The table: kind, mesh axis, times per step, bytes of the whole, of every exchange that a step may have.

    "reduce" is a reduce-scatter on TPUs and an all-reduce here: the compiler for CPUs has no other. With a tied head and AdamW.
    """
    shapes = jax.eval_shape(lambda: init(MODEL, jax.random.key(0)))
    leaves = [4 * leaf.size for leaf in jax.tree.leaves(shapes["layers"]) if leaf.ndim > 2]
    gains = [4 * leaf.size for leaf in jax.tree.leaves(shapes) if leaf.ndim < 3]
    table = 4 * shapes["embedding"].size
    gains, layers = sum(gains) - table, sum(leaves)
    tokens = BATCH_SIZE * SEQ_LEN / data / fsdp / context
    stream = 4 * tokens * MODEL.hidden_size
    keys = 4 * tokens * MODEL.num_kv_heads * MODEL.head_dim
    L, sizes = MODEL.num_layers, {"data": data, "fsdp": fsdp, "context": context}

    def split(*axes):
        return "+".join(axis for axis in axes if sizes[axis] > 1)

    return [
        # Weights are gathered for the forward and the backward pass, whatever the number of tokens.
        ("all-gather", "fsdp", 2, layers / tensor + gains),
        # The table to look tokens up in; the head for each of the two passes over its tiles, whole for a device's own tokens.
        ("all-gather", "fsdp", 1, table / tensor),
        ("all-gather", "fsdp", 2, table),
        ("all-gather", "tensor", 2, table / fsdp),
        # Gradients: of matrices in parts, of which data sums what a device keeps. (Looking up and head are two gradients.)
        ("reduce", "fsdp", 1, layers / tensor + table),
        ("reduce-scatter" if data * tensor > 1 else "reduce", "fsdp", 1, table / tensor),
        ("reduce", "tensor", 1, table),
        ("all-reduce", "data", 1, (layers + table) / tensor / fsdp),
        ("all-reduce", "context", 1, (layers + table) / tensor / fsdp),
        ("all-reduce", split("data", "context"), 1, table / tensor / fsdp),
        # Gradients of gains: sums over tokens, which tensor splits between the blocks.
        ("all-reduce", split("data", "fsdp"), 1, gains),
        ("all-reduce", "context", 1, gains),
        ("all-reduce", "tensor", 1, gains),
        # The residual stream: gathered before a block, reduced behind it, in both directions. Backward, what each product adds to it is
        # reduced alone here (query, key and value; gate and up): on TPUs their sum is, so that there are 4 L as well.
        ("all-gather", "tensor", 4 * L, stream),
        ("reduce", "tensor", (2 + 3 + 2) * L, stream),
        # Of the tokens that are looked up, and their gradient.
        ("reduce-scatter", "tensor", 1, stream),
        ("all-gather", "tensor", 1, stream),
        # Keys and values go round forward and backward, their gradients once and home; two halves of the stream change to zig-zag order
        # and two back, and with them the identifiers of documents, 4 bytes a token.
        ("collective-permute", "context", L, (4 * (context - 1) + 2 * context) * keys),
        ("collective-permute", "context", 1, 2 * stream + 16 * L * tokens),
    ]


@pytest.mark.parametrize("mesh", MESHES)
def test_a_step_exchanges_what_the_table_says(report, mesh):
    axes = MESHES[mesh]
    wanted = collections.Counter()
    for kind, over, times, size in allowed(**axes):
        devices = np.prod([axes.get(axis, 1) for axis in over.split("+")])
        kind = "all-reduce" if kind == "reduce" else kind
        sent = (2 if kind == "all-reduce" else 1) * (devices - 1) / devices
        if kind == "collective-permute":
            sent = float(devices > 1)
        if sent:
            wanted[f"{over} {kind}"] += times * sent * size
    got = {name: sent for name, (_, sent) in report["adamw, tied"][mesh]["exchanged"].items()}
    assert got.keys() == wanted.keys()
    permuted = "context collective-permute"
    assert got.pop(permuted, 0) <= wanted.pop(permuted, 0)
    for name, sent in got.items():
        # Beside losses and norms, a few single numbers.
        assert sent == pytest.approx(wanted[name], abs=300), name


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='libtpu is not installed: pip install "smoljax[plan]"',
)
def test_on_tpus_tensor_scatters_and_gathers_the_residual_stream_and_sums_nothing_whole():
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.eight_chips"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    model, data, tensor = eight_chips.BIG, eight_chips.DATA, eight_chips.TENSOR
    share = (tensor - 1) / tensor
    size = eight_chips.BATCH_SIZE * eight_chips.SEQ_LEN * model.hidden_size / data
    stream, table = 2 * size * share, 4 * model.vocab_size * model.hidden_size * share
    # Behind two blocks, forward and backward; of tokens that are looked up; and the gradient of the head, in f32.
    assert found["tensor reduce-scatter"][1] == (4 * model.num_layers + 1) * stream + table
    # Before two blocks, and what the compiler gathers again rather than keep it; the head's two gathers are in bfloat16.
    gathered = (found["tensor all-gather"][1] - table - stream) / stream / model.num_layers
    assert gathered in (4, 5, 6)
    assert "tensor all-reduce" not in found


PLACES = """
from jax.experimental import topologies
from smoljax import parallel
from smoljax.planning.environment import compile_here
from smoljax.planning.topologies import topology

place = topology("v6e-256")
compile_here(place)
devices = topologies.get_topology_desc(place.compiler_name, platform="tpu").devices
for axes in (dict(data=1, fsdp=64, tensor=4), dict(data=1, fsdp=16, tensor=16)):
    mesh = parallel.make_mesh(parallel.MeshConfig(**axes), devices)
    print([device.coords[:2] for device in mesh.devices[0, 0, :, 0]])
"""


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='libtpu is not installed: pip install "smoljax[plan]"',
)
def test_an_axis_of_a_mesh_may_be_a_part_of_a_side_of_the_torus():
    """Of 16 x 16 chips: four in a row, or a whole side."""
    done = subprocess.run(
        [sys.executable, "-c", PLACES], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    four, sixteen = map(json.loads, done.stdout.splitlines()[-2:])
    for row in (four, sixteen):
        columns, rows = (sorted(set(along)) for along in zip(*row))
        assert sorted([columns, rows], key=len) == [[0], list(range(len(row)))]
