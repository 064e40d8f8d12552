"""Run by test_meshes.py: what a step exchanges that libtpu compiles for eight chips, as JSON."""

import dataclasses
import json

import jax
from jax.experimental import topologies

from smoljax import optim, parallel
from smoljax.model import init, logical_axes
from smoljax.planning.environment import compile_here
from smoljax.planning.topologies import topology
from smoljax.training import make_train_step, state_shapes, state_shardings
from tests.parallel.eight_devices import MODEL, exchanged

BIG = dataclasses.replace(
    MODEL,
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=768,
    head_dim=64,
    compute_dtype="bfloat16",
)
BATCH_SIZE, SEQ_LEN = 16, 384
DATA, TENSOR = 2, 4
DTYPES = {"tokens": "int32", "targets": "int32", "segment_ids": "int32", "loss_mask": "bool"}


def main() -> None:
    place = topology("v5e-8")
    compile_here(place)
    devices = topologies.get_topology_desc(place.compiler_name, platform="tpu").devices
    mesh = parallel.make_mesh(parallel.MeshConfig(data=DATA, tensor=TENSOR), devices)
    shapes = jax.eval_shape(lambda: init(BIG, jax.random.key(0)))
    optimizer = optim.build(
        optim.OptimizerConfig(schedule="constant"),
        shapes,
        logical_axes=logical_axes(BIG),
        num_steps=2,
    )
    state = state_shapes(BIG, optimizer)
    shardings = state_shardings(mesh, BIG, state)
    step = make_train_step(
        BIG,
        optimizer,
        mesh=mesh,
        shardings=shardings,
        micro_batches=1,
        loss_chunk=SEQ_LEN,
        z_loss=0.0,
    )
    batch = {
        name: jax.ShapeDtypeStruct(
            (BATCH_SIZE, SEQ_LEN), dtype, sharding=parallel.batch_sharding(mesh)
        )
        for name, dtype in DTYPES.items()
    }
    with parallel.active(mesh):
        compiled = step.lower(state, batch).compile()
    print(json.dumps(exchanged(compiled.as_text(), mesh)))


if __name__ == "__main__":
    main()
