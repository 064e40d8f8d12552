import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smoljax.errors import SmoljaxError
from smoljax.optim import global_norm, skip_spikes

PARAMS = {"w": jnp.float32([1.0, -2.0]), "b": jnp.zeros((2, 2), jnp.bfloat16)}


def gradient_of_norm(norm):
    return {"w": jnp.float32([norm, 0.0]), "b": jnp.zeros((2, 2), jnp.bfloat16)}


def spikes(series, past, at_least, factor):
    """Whether OLMo-core's rule, upwards only, skips the last value of a series; float64."""
    past = series[:-1][-past:]
    return len(past) >= at_least and series[-1] > np.mean(past) + factor * np.std(past)


def test_skips_what_the_rule_says_and_a_skipped_value_enters_the_window():
    rng = np.random.default_rng(0)
    losses, norms = rng.normal(3, 0.1, 60), rng.normal(1, 0.05, 60)
    losses[5], losses[25], norms[33], norms[34] = 30, 9, 4, 4
    optimizer = skip_spikes(optax.sgd(0.1), window=16, at_least=8, factor=3.0)
    update = jax.jit(optimizer.update)
    state = optimizer.init(PARAMS)
    total = 0
    for step, (loss, norm) in enumerate(zip(losses, norms)):
        updates, state = update(gradient_of_norm(norm), state, PARAMS, value=jnp.float32(loss))
        want = spikes(losses[: step + 1], 16, 8, 3) or spikes(norms[: step + 1], 16, 8, 3)
        total += want
        assert bool(state.report.skipped) == want, step
        assert float(state.report.skipped_total) == total
        np.testing.assert_allclose(updates["w"][0], 0 if want else -0.1 * norm, rtol=1e-6)
        if step >= 8:
            past = losses[:step][-16:]
            threshold = np.mean(past) + 3 * np.std(past)
            np.testing.assert_allclose(state.report.loss_threshold, threshold, rtol=1e-5)
            past = norms[:step][-16:]
            threshold = np.mean(past) + 3 * np.std(past)
            np.testing.assert_allclose(state.report.norm_threshold, threshold, rtol=1e-5)
        else:
            assert np.isinf(state.report.loss_threshold)
    assert total >= 3  # not step 5: there were too few entries
    assert 0 <= int(state.losses.count) < 32


def test_a_skipped_update_is_zero_and_holds_the_inner_state():
    optimizer = skip_spikes(optax.adamw(0.1), window=4, at_least=2)
    state = optimizer.init(PARAMS)
    for loss in (1.0, 1.1, 0.9):
        _, state = optimizer.update(gradient_of_norm(1.0), state, PARAMS, value=loss)
    updates, after = optimizer.update(gradient_of_norm(1.0), state, PARAMS, value=50.0)
    assert float(after.report.skipped) == 1
    jax.tree.map(np.testing.assert_array_equal, after.inner, state.inner)
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0 * leaf), updates)
    jax.tree.map(
        np.testing.assert_array_equal, optax.apply_updates(PARAMS, updates), PARAMS
    )  # weight decay too is skipped
    assert 50.0 in after.losses.values
    _, kept = optimizer.update(gradient_of_norm(1.0), state, PARAMS, value=1.0)
    assert int(kept.inner[0].count) == int(state.inner[0].count) + 1


@pytest.mark.parametrize(
    ("norm", "loss"), [(np.nan, 1.0), (np.inf, 1.0), (1.0, np.nan), (1.0, np.inf), (np.nan, None)]
)
def test_what_is_not_finite_is_always_skipped_and_enters_no_window(norm, loss):
    optimizer = skip_spikes(optax.adam(0.1), window=4, at_least=2)
    state = optimizer.init(PARAMS)
    for _ in range(2):
        updates, after = jax.jit(optimizer.update)(
            gradient_of_norm(norm), state, PARAMS, value=loss
        )
        assert float(after.report.skipped) == 1
        assert float(updates["w"][0]) == 0
        jax.tree.map(np.testing.assert_array_equal, after.inner, state.inner)
        jax.tree.map(
            np.testing.assert_array_equal, (after.losses, after.norms), (state.losses, state.norms)
        )
        state = after
    _, state = optimizer.update(gradient_of_norm(1.0), state, PARAMS, value=loss and 1.0)
    assert float(state.report.skipped) == 0
    assert float(state.report.skipped_total) == 2


def test_without_a_loss_the_norm_alone_decides():
    optimizer = skip_spikes(optax.sgd(0.1), window=8, at_least=4)
    state = optimizer.init(PARAMS)
    for norm in (1.0, 1.1, 0.9, 1.0, 5.0, 1.0):
        _, state = optimizer.update(gradient_of_norm(norm), state, PARAMS)
        assert float(state.report.skipped) == (norm == 5.0)
    assert int(state.losses.count) == 0
    assert np.isinf(state.report.loss_threshold)


def test_rounding_in_a_constant_series_is_no_spike():
    optimizer = skip_spikes(optax.sgd(0.1), window=128, at_least=64)
    update, state = jax.jit(optimizer.update), optimizer.init(PARAMS)
    for step in range(150):
        value = np.nextafter(np.float32(0.1), np.float32(1)) if step % 7 else np.float32(0.1)
        _, state = update(gradient_of_norm(0.1), state, PARAMS, value=value)
    assert float(state.report.skipped_total) == 0


def test_the_loss_and_other_arguments_reach_the_inner_transformation():
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    optimizer = skip_spikes(inner)
    optimizer.update(gradient_of_norm(1.0), optimizer.init(PARAMS), PARAMS, value=2.0, other=3)
    assert seen == {"value": 2.0, "other": 3}
    plateau = skip_spikes(optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()))
    state = plateau.init(PARAMS)
    _, state = jax.jit(plateau.update)(gradient_of_norm(1.0), state, PARAMS, value=2.0)
    assert float(state.inner[1].best_value) == 2


def test_goes_on_from_a_checkpoint_and_survives_donation():
    optimizer = optax.chain(skip_spikes(optax.adam(0.1), window=4, at_least=2), optax.scale(1.0))
    update = jax.jit(optimizer.update, donate_argnums=1)
    values = [1.0, 1.1, 0.9, 30.0, 1.0, np.nan, 1.0, 1.2]

    def run(reload):
        state, history = optimizer.init(PARAMS), []
        for value in values:
            updates, state = update(gradient_of_norm(1.0), state, PARAMS, value=np.float32(value))
            history.append(float(updates["w"][0]))
            if reload:
                leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, state))
                state = jax.tree.map(jnp.array, jax.tree.unflatten(structure, leaves))
        return history, float(state[0].report.skipped_total)

    assert run(False) == run(True)
    assert run(False)[1] == 2


def regression_loss(optimizer, bad_steps=()):
    """Final loss of a linear regression with Adam; at bad_steps the targets are garbage, ten thousand times as large."""
    rng = np.random.default_rng(0)
    truth = rng.standard_normal(8)
    x_held = rng.standard_normal((256, 8)).astype(np.float32)

    def loss_of(w, x, y):
        return jnp.mean(jnp.square(x @ w - y))

    @jax.jit
    def step(w, state, x, y):
        loss, gradient = jax.value_and_grad(loss_of)(w, x, y)
        updates, state = optimizer.update(gradient, state, w, value=loss)
        return optax.apply_updates(w, updates), state

    w = jnp.zeros(8)
    state = optimizer.init(w)
    for number in range(300):
        x = rng.standard_normal((32, 8))
        y = x @ truth + 0.1 * rng.standard_normal(32)
        if number in bad_steps:
            y = 1e4 * rng.standard_normal(32)
            if number == bad_steps[-1]:
                y[0] = np.nan
        w, state = step(w, state, jnp.float32(x), jnp.float32(y))
    return float(loss_of(w, x_held, x_held @ jnp.float32(truth)))


def test_injected_bad_batches_do_no_harm():
    bad = (200, 240, 280, 290)

    def inner():
        return optax.adam(0.05)

    clean = regression_loss(optax.with_extra_args_support(inner()))
    skipped = regression_loss(skip_spikes(inner()), bad)
    assert abs(skipped - clean) < 0.02
    # Without, neither the last NaN nor the three spikes before it are survived.
    harmed = regression_loss(optax.with_extra_args_support(inner()), bad)
    assert np.isnan(harmed)
    harmed = regression_loss(optax.with_extra_args_support(optax.apply_if_finite(inner(), 5)), bad)
    assert harmed - clean > 0.02


def compiled_step(optimizer, platform):
    """Update and apply with donated parameters and state: lowered for a platform, with eight leaves of 64 KiB."""
    params = {f"w{i}": jax.ShapeDtypeStruct((128, 128), jnp.float32) for i in range(8)}

    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(optimizer.init, params)
    traced = jax.jit(step, donate_argnums=(0, 1)).trace(params, state, params)
    return traced.lower(lowering_platforms=(platform,))


def test_on_a_cpu_no_moment_is_copied_and_on_a_tpu_there_is_no_loop():
    def measured():
        """Adam beside the norm alone: what needs no choice."""

        def update(updates, state, params=None):
            moved, state = optax.adam(0.1).update(updates, state[0], params)
            return moved, (state, global_norm(updates))

        return optax.GradientTransformation(
            lambda params: (optax.adam(0.1).init(params), jnp.zeros(())), update
        )

    with_skip, without = skip_spikes(optax.adam(0.1)), measured()
    memory = [
        compiled_step(each, "cpu").compile().memory_analysis().temp_size_in_bytes
        for each in (with_skip, without)
    ]
    leaf = 128 * 128 * 4
    # A select between the states before and after copies almost all sixteen moments, leaf by leaf.
    assert memory[0] < memory[1] + leaf
    assert "stablehlo.while" in compiled_step(with_skip, "cpu").as_text()
    assert "stablehlo.while" not in compiled_step(with_skip, "tpu").as_text()


def test_an_inner_state_may_change_its_dtypes():
    """As Adam's moments of bfloat16 leaves do when its hyper-parameters are arrays."""
    optimizer = skip_spikes(optax.inject_hyperparams(optax.adam)(0.1), window=4, at_least=2)
    state = optimizer.init(PARAMS)
    assert state.inner.inner_state[0].mu["b"].dtype == jnp.bfloat16
    for loss, skipped in ((1.0, 0), (1.1, 0), (50.0, 1)):
        updates, after = jax.jit(optimizer.update)(gradient_of_norm(1.0), state, PARAMS, value=loss)
        assert float(after.report.skipped) == skipped
        held, state = state, after
    assert state.inner.inner_state[0].mu["b"].dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, state.inner, held.inner)
    np.testing.assert_array_equal(updates["w"], 0)


def test_under_vmap_each_run_skips_for_itself():
    optimizer = skip_spikes(optax.adam(0.1), window=4, at_least=2)
    update = jax.jit(jax.vmap(lambda gradient, state: optimizer.update(gradient, state, PARAMS)))
    state = jax.vmap(lambda _: optimizer.init(PARAMS))(jnp.arange(2))
    for norms in ((1.0, 1.0), (1.1, 0.9), (1.0, 50.0)):
        gradient = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(gradient_of_norm, norms))
        before, (updates, state) = state, update(gradient, state)
    np.testing.assert_array_equal(state.report.skipped, [0, 1])
    np.testing.assert_array_equal(updates["w"][:, 0] == 0, [False, True])
    np.testing.assert_array_equal(state.inner[0].count, before.inner[0].count + np.array([1, 0]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(window=1), "window is 1"),
        (dict(window=8, at_least=9), "at_least is 9"),
        (dict(at_least=0), "at_least is 0"),
        (dict(factor=0), "factor is 0"),
        (dict(window=jnp.int32(8)), "static_args"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(SmoljaxError, match=words):
        skip_spikes(optax.sgd(0.1), **options)


def test_a_loss_that_is_no_scalar_is_refused():
    optimizer = skip_spikes(optax.sgd(0.1))
    with pytest.raises(SmoljaxError, match="scalar"):
        optimizer.update(gradient_of_norm(1.0), optimizer.init(PARAMS), PARAMS, value=jnp.ones(3))
