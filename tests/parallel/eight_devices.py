"""Run by test_meshes.py on 8 forced host devices: one training step on every mesh beside one device, as JSON."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax

from smoljax import optim, parallel
from smoljax.model import ModelConfig, init, logical_axes
from smoljax.planning import hlo
from smoljax.training import make_state, make_train_step, state_shapes, state_shardings
from tests.training.tiny import packed_batch

MODEL = ModelConfig(
    vocab_size=128,
    num_layers=3,
    hidden_size=64,
    intermediate_size=96,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    max_seq_len=32,
    scan_layers=True,  # One compiled layer, and its exchange times three.
)
ONE = {"data": 1}
MESHES = {
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "tensor": {"data": 2, "tensor": 4},
    "three axes": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp and tensor": {"data": 1, "fsdp": 2, "tensor": 4},
    "context": {"data": 2, "context": 4},
    "two slices": {"data": 2, "fsdp": 4},
}
# Both take the loss in two tiles of the vocabulary on 8 devices. AdamW's eps is that of a gradient that matters here: with 1e-8 the
# rounding of gradients that should be 0 would decide the sign of their update.
SETTINGS = {
    "adamw, tied": dict(
        model=MODEL,
        optimizer=optim.OptimizerConfig(name="adamw", schedule="constant", eps=1e-3),
        micro_batches=1,
    ),
    "muon, untied, two micro-batches": dict(
        model=dataclasses.replace(MODEL, tie_embeddings=False),
        optimizer=optim.OptimizerConfig(
            name="muon", schedule="constant", eps=1e-3, newton_schulz_steps=2
        ),
        micro_batches=2,
    ),
    "adamw, a width that fsdp does not divide": dict(
        model=dataclasses.replace(MODEL, hidden_size=63),
        optimizer=optim.OptimizerConfig(name="adamw", schedule="constant", eps=1e-3),
        micro_batches=1,
    ),
}
ADAMW, MUON, ODD_WIDTH = SETTINGS
CASES = [
    *((ADAMW, mesh) for mesh in MESHES),
    *((MUON, mesh) for mesh in MESHES if mesh not in ("two slices", "context")),
    *((ODD_WIDTH, mesh) for mesh in ("fsdp", "three axes")),
]
RATE = optim.OptimizerConfig().learning_rate
BATCH_SIZE, SEQ_LEN, LOSS_CHUNK = 16, 32, 32


def devices_of(name: str) -> list:
    """As many as the mesh has; of two slices the even ones come first, so that neighbours are in different slices."""
    devices = jax.devices()
    if name == "one":
        return devices[:1]
    return devices[::2] + devices[1::2] if name == "two slices" else devices


def record_gradient() -> optax.GradientTransformation:
    """Passes gradients on and keeps them as its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda updates, *_: (updates, updates)
    )


def first_steps(
    name: str, axes: dict, *, model, optimizer, micro_batches: int, seeds=(0,)
) -> list[dict]:
    """For each batch: initial parameters, loss, gradients and parameters after the first step, on the host; and what it exchanges."""
    mesh = parallel.make_mesh(parallel.MeshConfig(**axes), devices_of(name))
    shapes_of_params = jax.eval_shape(lambda: init(model, jax.random.key(0)))
    transform = optax.chain(
        record_gradient(),
        optim.build(
            optimizer,
            shapes_of_params,
            logical_axes=logical_axes(model),
            num_steps=2,
            mesh=mesh,
            mesh_axis=("fsdp", "tensor", "data", "context"),
        ),
    )
    shapes = state_shapes(model, transform)
    shardings = state_shardings(mesh, model, shapes)
    start = make_state(model, transform, seed=0, shardings=shardings)
    step = make_train_step(
        model,
        transform,
        mesh=mesh,
        shardings=shardings,
        micro_batches=micro_batches,
        loss_chunk=LOSS_CHUNK,
        z_loss=1e-4,
    )
    batches = [packed_batch(seed, batch_size=BATCH_SIZE) for seed in seeds]
    rows = parallel.local_rows(mesh, BATCH_SIZE)
    placed = [
        parallel.put_batch(batch, mesh, rows=rows, batch_size=BATCH_SIZE) for batch in batches
    ]
    with parallel.active(mesh):
        compiled = step.lower(start, placed[0]).compile()
    results = []
    for batch in placed:
        state, metrics = compiled(jax.tree.map(jnp.copy, start), batch)
        results.append(
            {
                "initial": jax.device_get(start.params),
                "loss": float(metrics["loss"]),
                "gradients": jax.device_get(state.opt_state[0]),
                "params": jax.device_get(state.params),
                "exchanged": exchanged(compiled.as_text(), mesh),
            }
        )
    return results


def exchanged(text: str, mesh: jax.sharding.Mesh) -> dict[str, list[float]]:
    """Runs of the collectives of a program and the bytes that a device sends, by mesh axes and kind; single numbers left out."""
    found: dict[str, list[float]] = {}
    for one in hlo.read(text).collectives:
        places = np.argwhere(np.isin(np.arange(mesh.size).reshape(mesh.devices.shape), one.group))
        axes = [axis for axis, at in zip(mesh.axis_names, places.T) if len(set(at.tolist())) > 1]
        if axes and one.bytes_sent > 120:  # Others hold single numbers.
            row = found.setdefault(f"{'+'.join(axes)} {one.kind}", [0, 0.0])
            row[0] += one.trips
            row[1] += one.trips * one.bytes_sent
    return found


def largest(tree: dict, other: dict) -> float:
    """The largest difference between two trees."""
    differences = jax.tree.map(lambda x, y: np.abs(x - y).max(), tree, other)
    return float(max(jax.tree.leaves(differences)))


def compared(one: dict, many: dict) -> dict:
    """How far a step on a mesh is from the one on one device, in units in which float32 rounds at about 1e-7."""
    relative = jax.tree.map(
        lambda x, y: np.abs(x - y).max() / np.abs(x).max(), one["gradients"], many["gradients"]
    )
    same = jax.tree.map(np.array_equal, one["initial"], many["initial"])
    return {
        "same initial parameters": all(jax.tree.leaves(same)),
        "loss": abs(many["loss"] / one["loss"] - 1),
        "gradients": float(max(jax.tree.leaves(relative))),
        "parameters": largest(one["params"], many["params"]) / RATE,
        "exchanged": many["exchanged"],
    }


def main() -> None:
    report = {}
    for setting, pieces in SETTINGS.items():
        one, other = first_steps("one", ONE, **pieces, seeds=(0, 1))
        found = {"another batch": compared(one, other)}  # Control.
        for name in (mesh for case, mesh in CASES if case == setting):
            found[name] = compared(one, *first_steps(name, MESHES[name], **pieces))
        report[setting] = found
    print(json.dumps(report))


if __name__ == "__main__":
    main()
