"""Averages of the weights against closed forms, and the swap to them from any optimizer state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smoljax.errors import SmoljaxError
from smoljax.optim import ema_weights, evaluation_params, place_state, skip_spikes, tail_average

PARAMS = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3)}


def run(link, steps, params=PARAMS):
    """Weights after every step of a walk with a new gradient each time, and the last state."""
    transform = optax.chain(optax.sgd(0.1), link)

    @jax.jit
    def step(params, state, gradient):
        updates, state = transform.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state, walk = transform.init(params), []
    for number in range(steps):
        gradient = walk_gradient(number, params)
        params, state = step(params, state, gradient)
        walk.append(jax.tree.map(np.asarray, params))
    return walk, state


def walk_gradient(number, params):
    """The gradient of one step of the walk."""
    rng = np.random.default_rng(number)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params)


@pytest.mark.parametrize("start", [0, 1, 4])
def test_the_tail_average_is_the_mean_of_the_weights_after_its_start(start):
    walk, state = run(tail_average(start), 9)
    want = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *walk[start:])
    got = evaluation_params(state, walk[-1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)
    wrong = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *walk[start + 1 :])
    assert np.abs(got["w"] - wrong["w"]).max() > 1e-3


@pytest.mark.parametrize("start", [0, 3])
def test_the_moving_average_begins_as_the_weights(start):
    walk, state = run(ema_weights(0.8, start_step=start), 7)
    want = np.asarray(PARAMS["w"]) if start == 0 else walk[start - 1]["w"]
    for weights in walk[start:]:
        want = 0.8 * want + 0.2 * weights["w"]
    np.testing.assert_allclose(evaluation_params(state, walk[-1])["w"], want, rtol=1e-5)


def test_of_a_constant_drift_the_averages_lag_by_what_is_known():
    """Weights 1, 2, 3, ...: an average with decay d lags by d / (1 - d), a mean of n by (n - 1) / 2."""
    drift = optax.stateless(lambda updates, params: jax.tree.map(jnp.ones_like, updates))
    for link, lag in ((ema_weights(0.5), 1.0), (tail_average(20), 9.5)):
        transform = optax.chain(drift, link)
        params = {"w": jnp.zeros(2)}
        state = transform.init(params)
        for _ in range(40):
            updates, state = transform.update(params, state, params)
            params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(evaluation_params(state, params)["w"], 40 - lag, rtol=1e-5)


def test_before_the_start_the_weights_themselves_are_evaluated():
    for link in (tail_average(5), ema_weights(0.9, start_step=5)):
        walk, state = run(link, 5)
        jax.tree.map(np.testing.assert_array_equal, evaluation_params(state, walk[-1]), walk[-1])


def test_updates_pass_unchanged_and_the_state_outlives_a_checkpoint():
    plain, _ = run(optax.identity(), 4)
    walk, state = run(ema_weights(0.9), 4)
    jax.tree.map(np.testing.assert_array_equal, walk, plain)
    leaves, structure = jax.tree.flatten(state)
    again = jax.tree.unflatten(structure, [np.asarray(leaf) for leaf in leaves])
    jax.tree.map(
        np.testing.assert_array_equal,
        evaluation_params(again, walk[-1]),
        evaluation_params(state, walk[-1]),
    )


def test_the_average_is_found_wherever_it_is():
    params = PARAMS
    inner = optax.named_chain(("sgd", optax.sgd(0.1)), ("average", tail_average(0)))
    for transform in (
        inner,
        skip_spikes(inner),
        optax.chain(optax.chain(inner)),
        optax.inject_hyperparams(lambda rate: optax.chain(optax.sgd(rate), tail_average(0)))(0.1),
    ):
        updates, state = transform.update(params, transform.init(params), params)
        after = optax.apply_updates(params, updates)
        np.testing.assert_allclose(evaluation_params(state, after)["w"], after["w"])
    assert evaluation_params(optax.adam(1.0).init(params), params) is params
    twice = optax.chain(ema_weights(0.9), tail_average(0)).init(params)
    with pytest.raises(SmoljaxError, match="holds 2 averages"):
        evaluation_params(twice, params)


def test_schedule_free_is_evaluated_at_its_average():
    transform = optax.contrib.schedule_free_adamw(0.1)
    params, state = PARAMS, transform.init(PARAMS)
    for _ in range(5):
        updates, state = transform.update(params, state, params)
        params = optax.apply_updates(params, updates)
    want = optax.contrib.schedule_free_eval_params(state, params)
    got = jax.jit(evaluation_params)((state,), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)
    assert np.abs(got["w"] - params["w"]).max() > 1e-3


@pytest.mark.parametrize("kind", ["masked", "partition", "schedule_free"])
def test_an_average_of_a_part_leaves_the_other_parameters(kind):
    averaging = optax.chain(optax.sgd(0.1), tail_average(0))
    if kind == "masked":
        part = {"w": True, "b": False}
        transform = optax.chain(optax.sgd(0.1), optax.masked(tail_average(0), part))
    elif kind == "partition":
        transform = optax.partition({"x": averaging, "y": optax.sgd(0.1)}, {"w": "x", "b": "y"})
    else:
        inner = optax.contrib.schedule_free_sgd(0.1)
        transform = optax.partition({"x": inner, "y": optax.sgd(0.1)}, {"w": "x", "b": "y"})
    params, state, walk = PARAMS, transform.init(PARAMS), []
    for number in range(4):
        updates, state = transform.update(walk_gradient(number, params), state, params)
        params = optax.apply_updates(params, updates)
        walk.append(params)
    got = jax.jit(evaluation_params)(state, params)
    np.testing.assert_array_equal(got["b"], params["b"])
    if kind == "schedule_free":
        z = state.inner_states["x"].inner_state.z["w"]
        want = (params["w"] - 0.1 * z) / 0.9
    else:
        want = np.mean([weights["w"] for weights in walk], axis=0)
    np.testing.assert_allclose(got["w"], want, rtol=1e-5)
    assert np.abs(got["w"] - params["w"]).max() > 1e-3


def test_an_average_inside_schedule_free_is_a_second_one():
    transform = optax.contrib.schedule_free(optax.chain(optax.sgd(0.1), tail_average(0)), 0.1)
    with pytest.raises(SmoljaxError, match="holds 2 averages"):
        evaluation_params(transform.init(PARAMS), PARAMS)


def test_leaves_that_have_no_average_are_named():
    with pytest.raises(SmoljaxError, match="table is int32"):
        tail_average(0).init({"table": jnp.ones(3, jnp.int32)})
    with pytest.raises(SmoljaxError, match="holds w, which"):
        evaluation_params(tail_average(0).init(PARAMS), {"b": PARAMS["b"]})


def test_a_dtype_of_its_own_and_the_parameters_place():
    params = {"w": jnp.ones((2, 3), jnp.bfloat16)}
    link = ema_weights(0.9, dtype=jnp.float32)
    state = link.init(params)
    assert state.average["w"].dtype == jnp.float32
    assert evaluation_params(state, params)["w"].dtype == jnp.bfloat16
    placed = place_state(state, params, {"w": "rows"}, otherwise="everywhere")
    assert (placed.average["w"], placed.count) == ("rows", "everywhere")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ema_weights(1.0), "decay is 1.0"),
        (lambda: ema_weights(0.9, start_step=-1), "start_step is -1"),
        (lambda: tail_average(2.5), "start_step is 2.5"),
    ],
)
def test_wrong_numbers_are_named(make, words):
    with pytest.raises(SmoljaxError, match=words):
        make()


def test_it_needs_the_parameters():
    link = tail_average(0)
    with pytest.raises(SmoljaxError, match=r"update\(updates, state, params\)"):
        link.update(PARAMS, link.init(PARAMS))
