"""One step: what accumulation and meshes must not change, and what masking must."""

import dataclasses
import functools
import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from smoljax import optim, parallel
from smoljax.errors import SmoljaxError
from smoljax.interop import quantize
from smoljax.model import forward, init, logical_axes
from smoljax.training import (
    loss_sum,
    make_eval_step,
    make_state,
    make_train_step,
    state_shapes,
    state_shardings,
)
from tests.training.tiny import ADAMW, MODEL, MUON, packed_batch

ONE_LAYER = dataclasses.replace(MODEL, num_layers=1)


def run_steps(config, mesh_config, *, micro_batches=1, num_steps=3, model=MODEL, quantization=""):
    """Losses and gradient norms of the first steps."""
    mesh = parallel.make_mesh(mesh_config)
    shapes_of_params = jax.eval_shape(lambda: init(model, jax.random.key(0)))
    optimizer = optim.build(
        config, shapes_of_params, logical_axes=logical_axes(model), num_steps=num_steps
    )
    shapes = state_shapes(model, optimizer)
    shardings = state_shardings(mesh, model, shapes)
    state = make_state(model, optimizer, seed=0, shardings=shardings)
    step = make_train_step(
        model,
        optimizer,
        mesh=mesh,
        shardings=shardings,
        micro_batches=micro_batches,
        loss_chunk=16,  # On one device chunks of tokens, on eight two tiles of the vocabulary.
        z_loss=1e-4,
        quantization=quantization,
    )
    rows = parallel.local_rows(mesh, 8)
    seen = []
    for number in range(num_steps):
        batch = {key: value[rows] for key, value in packed_batch(number).items()}
        on_mesh = parallel.put_batch(batch, mesh, rows=rows, batch_size=8)
        state, metrics = step(state, on_mesh)
        seen.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return np.array(seen), state


@pytest.mark.parametrize("config", [ADAMW, MUON], ids=["adamw", "muon"])
def test_micro_batches_give_the_gradient_of_the_whole_batch(config):
    whole, _ = run_steps(config, parallel.MeshConfig())
    pieces, _ = run_steps(config, parallel.MeshConfig(), micro_batches=4)
    np.testing.assert_allclose(pieces, whole, rtol=2e-5)


def test_the_loss_is_the_mean_over_unmasked_targets():
    batch = packed_batch(0)
    params = init(MODEL, jax.random.key(0))
    logits = np.asarray(
        forward(MODEL, params, batch["tokens"], batch["segment_ids"], batch["positions"]),
        np.float64,
    )
    log_normalizer = np.log(np.exp(logits).sum(-1))
    nats = log_normalizer - np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    expected = nats[batch["loss_mask"]].sum()
    total, sums = loss_sum(MODEL, params, batch, loss_chunk=64, z_loss=0.0)
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert int(sums["num_targets"]) == batch["loss_mask"].sum() < batch["loss_mask"].size
    assert float(total) != pytest.approx(
        nats.sum(), rel=1e-3
    )  # Without the mask it is another sum.


def test_evaluation_scores_the_same_sum():
    mesh = parallel.make_mesh(parallel.MeshConfig())
    params = init(MODEL, jax.random.key(0))
    shapes = jax.eval_shape(lambda: params)
    shardings = parallel.param_shardings(mesh, logical_axes(MODEL), shapes)
    evaluate = make_eval_step(MODEL, mesh=mesh, shardings=shardings, loss_chunk=64)
    batch = packed_batch(0)
    sums = evaluate(params, parallel.put_batch(batch, mesh, rows=slice(0, 8), batch_size=8))
    total, _ = loss_sum(MODEL, params, batch, loss_chunk=64, z_loss=0.0)
    assert float(sums["cross_entropy"]) == pytest.approx(float(total), rel=1e-6)


@pytest.mark.parametrize("scheme", ["int4", "w8a8"])
def test_a_model_trained_for_quantisation_takes_the_steps_and_is_scored_as_quantised(scheme):
    rounded, _ = run_steps(ADAMW, parallel.MeshConfig(), quantization=scheme, micro_batches=2)
    plain, _ = run_steps(ADAMW, parallel.MeshConfig())
    assert (rounded != plain).all()  # Losses and gradient norms of each step ...
    np.testing.assert_allclose(rounded, plain, rtol=0.05)  # ... but not by much.

    mesh = parallel.make_mesh(parallel.MeshConfig())
    params = init(MODEL, jax.random.key(0))
    shardings = parallel.param_shardings(mesh, logical_axes(MODEL), jax.eval_shape(lambda: params))
    evaluate = make_eval_step(
        MODEL, mesh=mesh, shardings=shardings, loss_chunk=64, quantization=scheme
    )
    batch = packed_batch(0)
    sums = evaluate(params, parallel.put_batch(batch, mesh, rows=slice(0, 8), batch_size=8))
    score = quantize.integer_matmuls(functools.partial(loss_sum, loss_chunk=64, z_loss=0.0))
    total, _ = score(MODEL, quantize.quantize(MODEL, params, scheme), batch)
    assert float(sums["cross_entropy"]) == pytest.approx(float(total), rel=1e-4)


def test_an_unknown_quantisation_is_named():
    with pytest.raises(SmoljaxError, match=r"config.training.quantization is 'int3'"):
        run_steps(ADAMW, parallel.MeshConfig(), quantization="int3")


def test_every_mesh_gives_the_losses_of_one_device():
    """On 8 forced devices, in a process of its own: the number of devices is fixed when JAX starts."""
    meshes = [
        {"data": 1, "fsdp": 8},
        {"data": 1, "fsdp": 2, "tensor": 2, "context": 2},
        {"data": 1, "context": 8},
    ]
    program = (
        "import json, sys\n"
        "from smoljax import parallel\n"
        "from tests.training.test_step import run_steps, MUON\n"
        "print(json.dumps([run_steps(MUON, parallel.MeshConfig(**mesh))[0].tolist() for mesh in json.loads(sys.argv[1])]))\n"
    )
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    output = subprocess.run(
        [sys.executable, "-c", program, json.dumps(meshes)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert output.returncode == 0, output.stderr[-2000:]
    one_device, _ = run_steps(MUON, parallel.MeshConfig())
    for mesh, losses in zip(meshes, json.loads(output.stdout.splitlines()[-1])):
        np.testing.assert_allclose(losses, one_device, rtol=1e-4, err_msg=str(mesh))


def test_four_hosts_give_the_losses_of_one():
    """Processes that meet on loopback, each with one device and a quarter of the batch; parameters are split over pairs of them."""
    program = (
        "import json\n"
        "from smoljax import parallel\n"
        "from smoljax.parallel.start import start\n"
        "start()\n"
        "from tests.training.test_step import ONE_LAYER, run_steps, MUON\n"
        "mesh = parallel.MeshConfig(data=2, fsdp=2)\n"
        "print(json.dumps(run_steps(MUON, mesh, model=ONE_LAYER, num_steps=2)[0].tolist()))\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=os.environ
            | {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": "4",
                "JAX_PROCESS_ID": str(host),
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # Each of the four compiles.
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in range(4)
    ]
    outputs = [host.communicate(timeout=300) for host in hosts]
    assert [host.returncode for host in hosts] == [0] * 4, outputs
    one_device, _ = run_steps(MUON, parallel.MeshConfig(), model=ONE_LAYER, num_steps=2)
    for output, _ in outputs:
        np.testing.assert_allclose(json.loads(output.splitlines()[-1]), one_device, rtol=1e-4)
