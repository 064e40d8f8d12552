"""QK-clip inside the train step: the same maxima in pieces and on meshes, and logits that stop growing."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smoljax import optim, parallel
from smoljax.errors import SmoljaxError
from smoljax.model import hidden_and_max_logits, init, logical_axes
from smoljax.optim import OptimizerConfig
from smoljax.training import make_state, make_train_step, state_shapes, state_shardings
from tests.training.tiny import MODEL, packed_batch

TWO_LAYERS = dataclasses.replace(MODEL, num_layers=2, nope_layers=(1,))
LARGE_RATE = OptimizerConfig(
    name="muon", learning_rate=0.2, adamw_learning_rate=1e-2, schedule="constant", weight_decay=0.0
)
TAU = 2.0


def run_steps(
    qk_clip_tau, *, optimizer=LARGE_RATE, mesh=None, micro_batches=1, num_steps=2, model=TWO_LAYERS
):
    """Metrics of each step, on one batch again and again, and the last state."""
    mesh = parallel.make_mesh(parallel.MeshConfig(**(mesh or {})))
    shapes = jax.eval_shape(lambda: init(model, jax.random.key(0)))
    if isinstance(optimizer, OptimizerConfig):
        optimizer = optim.build(
            optimizer, shapes, logical_axes=logical_axes(model), num_steps=num_steps
        )
    shapes = state_shapes(model, optimizer)
    shardings = state_shardings(mesh, model, shapes)
    step = make_train_step(
        model,
        optimizer,
        mesh=mesh,
        shardings=shardings,
        micro_batches=micro_batches,
        loss_chunk=64,
        z_loss=1e-2,
        qk_clip_tau=qk_clip_tau,
    )
    state = make_state(model, optimizer, seed=0, shardings=shardings)
    rows = parallel.local_rows(mesh, 8)
    batch = {key: value[rows] for key, value in packed_batch(0).items()}
    seen = []
    for _ in range(num_steps):
        on_mesh = parallel.put_batch(batch, mesh, rows=rows, batch_size=8)
        state, metrics = step(state, on_mesh)
        seen.append({name: float(value) for name, value in metrics.items()})
    return seen, state


def series(seen, name):
    return np.array([metrics[name] for metrics in seen])


@pytest.fixture(scope="module")
def clipped():
    return run_steps(TAU, num_steps=6)


def test_a_large_rate_grows_past_tau_and_with_clipping_stays():
    tau = 10.0
    # At a rate where the last bit of a processor's sums does not decide how far a step goes.
    rate = dataclasses.replace(LARGE_RATE, learning_rate=0.12)
    never, _ = run_steps(1e9, optimizer=rate, num_steps=52)  # Measures, and never fires.
    seen, _ = run_steps(tau, optimizer=rate, num_steps=52)
    assert (series(never, "qk_clipped") == 0).all()
    assert series(never, "max_logit")[-5:].min() > 4 * tau
    # Beyond tau there is only what one step adds: to a head that ended the last one at tau, and to what its layer reads.
    assert series(seen, "max_logit").max() < 1.6 * tau
    fired = series(seen, "qk_clipped")
    np.testing.assert_array_equal(fired > 0, series(seen, "max_logit") > tau)
    assert fired[-10:].min() > 0
    assert seen[-1]["loss"] < 1.1 * never[-1]["loss"]


def test_metrics_are_those_of_the_forward_pass(clipped):
    batch = packed_batch(0)
    params = init(TWO_LAYERS, jax.random.key(0))
    max_LN = hidden_and_max_logits(TWO_LAYERS, params, batch["tokens"], batch["segment_ids"])[1]
    assert clipped[0][0]["max_logit"] == pytest.approx(float(max_LN.max()), rel=1e-5)


def test_the_clip_is_the_one_of_the_parameters_after_the_update():
    """One step with a rate of 0: what comes out is the clipped start."""
    still = optax.sgd(0.0)
    params = init(TWO_LAYERS, jax.random.key(0))
    batch = packed_batch(0)
    max_LN = hidden_and_max_logits(TWO_LAYERS, params, batch["tokens"], batch["segment_ids"])[1]
    tau = float(jnp.median(max_LN))
    seen, state = run_steps(tau, optimizer=still, num_steps=1)
    assert seen[0]["qk_clipped"] == pytest.approx(float((max_LN > tau).mean())) != 0
    gamma_LN = np.minimum(1, tau / np.asarray(max_LN))
    attention, start = state.params["layers"]["attention"], params["layers"]["attention"]
    np.testing.assert_allclose(
        attention["query"], start["query"] * gamma_LN[:, None, :, None], rtol=2e-5
    )
    for name in ("key", "value", "output"):
        np.testing.assert_array_equal(attention[name], start[name])


def test_micro_batches_take_the_maximum_and_not_the_sum(clipped):
    pieces, _ = run_steps(TAU, micro_batches=4, num_steps=6)
    np.testing.assert_allclose(
        series(pieces, "max_logit")[:4], series(clipped[0], "max_logit")[:4], rtol=1e-3
    )
    assert series(pieces, "qk_clipped").max() > 0
    assert pieces[0]["max_logit"] == pytest.approx(clipped[0][0]["max_logit"], rel=1e-5)


def test_every_mesh_gives_the_maxima_of_one_device(clipped):
    """On 8 forced devices, in a process of its own."""
    meshes = [{"data": 8}, {"data": 1, "fsdp": 2, "tensor": 2, "context": 2}]
    program = (
        "import json, sys\n"
        "from tests.training.test_qk_clip_step import TAU, run_steps\n"
        "print(json.dumps([run_steps(TAU, mesh=mesh, num_steps=6)[0] for mesh in json.loads(sys.argv[1])]))\n"
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
    for mesh, seen in zip(meshes, json.loads(output.stdout.splitlines()[-1])):
        for name in ("max_logit", "qk_clipped", "loss"):
            np.testing.assert_allclose(
                series(seen, name),
                series(clipped[0], name),
                rtol=1e-3,
                err_msg=str((mesh, name)),
            )
        assert seen[0]["max_logit"] == pytest.approx(clipped[0][0]["max_logit"], rel=1e-5)


def test_the_optimizer_gets_the_mean_loss_and_without_tau_nothing_is_measured():
    def update(updates, state, params=None, *, value):
        del state, params
        return updates, {"value": value}

    keeps_value = optax.GradientTransformationExtraArgs(
        lambda params: {"value": jnp.zeros(())}, update
    )
    for micro_batches in (1, 2):
        seen, state = run_steps(
            None, optimizer=keeps_value, micro_batches=micro_batches, num_steps=1
        )
        assert not {"max_logit", "qk_clipped"} & set(seen[0])
        value, loss = float(state.opt_state["value"]), seen[0]["loss"]
        # The z-loss is 0.01 times the squared log-normaliser, about log(128) at the start.
        assert value == pytest.approx(loss + 1e-2 * np.log(128) ** 2, rel=2e-3)


def test_what_cannot_be_is_refused_before_the_first_step():
    with pytest.raises(SmoljaxError, match=r"qk_clip_tau is 100.0 and config.model.qk_norm True"):
        run_steps(100.0, model=dataclasses.replace(TWO_LAYERS, qk_norm=True))
    with pytest.raises(SmoljaxError, match=r"tau=-1\.0: give a number above 0"):
        run_steps(-1.0)
