"""Lion, Adafactor and schedule-free AdamW are optax's: the links that `build` takes of them, against their papers' equations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

STEPS = 6


@pytest.fixture
def gradients():
    rng = np.random.default_rng(0)
    return [
        {
            "w": rng.standard_normal((130, 140)).astype("f4"),
            "b": rng.standard_normal(5).astype("f4"),
        }
        for _ in range(STEPS)
    ]


@pytest.fixture
def params():
    rng = np.random.default_rng(1)
    return {
        "w": jnp.asarray(rng.standard_normal((130, 140)), jnp.float32),
        "b": jnp.asarray(rng.standard_normal(5), jnp.float32),
    }


def run(transform, params, gradients):
    """The parameters after each update, and the last state."""
    update, state, seen = jax.jit(transform.update), transform.init(params), []
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return seen, state


def assert_same(got, expected, rtol=1e-6):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


# Lion


def lion_links(**options):
    return optax.chain(
        optax.scale_by_lion(b1=0.9, b2=0.99, **options),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(1e-2),
    )


def test_lion_is_the_sign_of_the_interpolation(params, gradients):
    w, m = np.float64(params["w"]), 0.0
    for seen, gradient in zip(run(lion_links(), params, gradients)[0], gradients):
        g = np.float64(gradient["w"])
        w = w - 1e-2 * (np.sign(0.9 * m + 0.1 * g) + 0.1 * w)
        m = 0.99 * m + 0.01 * g
        np.testing.assert_allclose(seen["w"], w, rtol=1e-4, atol=1e-5)


def test_lions_links_are_optax_lion(params, gradients):
    expected = run(optax.lion(1e-2, b1=0.9, b2=0.99, weight_decay=0.1), params, gradients)[0]
    assert_same(run(lion_links(), params, gradients)[0], expected)


def test_lions_momentum_dtype(params, gradients):
    state = run(lion_links(mu_dtype=jnp.bfloat16), params, gradients)[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(state[0].mu)} == {jnp.dtype(jnp.bfloat16)}


# Adafactor


def adafactor_direction(momentum=None, dtype=jnp.float32):
    links = [
        optax.scale_by_factored_rms(decay_rate=0.8, min_dim_size_to_factor=128, epsilon=1e-30),
        optax.clip_by_block_rms(1.0),
    ]
    if momentum is not None:
        links.append(optax.ema(momentum, debias=False, accumulator_dtype=dtype))
    return optax.chain(*links)


def test_adafactor_is_the_papers_factored_rms(params, gradients):
    """Algorithm 4 of arXiv 1804.04235 with beta2 = 1 - t^-0.8 and clipping at RMS 1, no relative step."""
    row = column = 0.0
    w = np.float64(params["w"])
    transform = optax.chain(adafactor_direction(), optax.scale_by_learning_rate(1e-2))
    for t, (seen, gradient) in enumerate(zip(run(transform, params, gradients)[0], gradients), 1):
        g = np.float64(gradient["w"])
        beta = 1 - t**-0.8
        row = beta * row + (1 - beta) * (g**2).sum(1)
        column = beta * column + (1 - beta) * (g**2).sum(0)
        u = g / np.sqrt(np.outer(row, column) / row.sum())
        w = w - 1e-2 * u / max(1.0, np.sqrt(np.mean(u**2)))
        np.testing.assert_allclose(seen["w"], w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_adafactors_links_are_optax_adafactor_at_a_constant_rate(params, gradients, momentum):
    links = optax.chain(adafactor_direction(momentum), optax.scale_by_learning_rate(1e-2))
    whole = optax.adafactor(1e-2, multiply_by_parameter_scale=False, momentum=momentum)
    assert_same(run(links, params, gradients)[0], run(whole, params, gradients)[0])


def test_optax_adafactor_decays_by_the_rate_alone(params, gradients):
    """Its own weight decay is not multiplied by the learning rate, so `build` must add the decay as a link."""
    whole = optax.adafactor(1e-2, multiply_by_parameter_scale=False, weight_decay_rate=0.1)
    links = optax.chain(
        adafactor_direction(), optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(1e-2)
    )
    first_whole, first_links = (run(t, params, gradients[:1])[0][0]["w"] for t in (whole, links))
    np.testing.assert_allclose(first_links - first_whole, (0.1 - 1e-3) * params["w"], rtol=1e-3)


def test_adafactors_momentum_dtype_and_factored_state(params, gradients):
    state = run(adafactor_direction(0.9, jnp.bfloat16), params, gradients)[1]
    assert state[0].v_row["w"].shape == (130,)
    assert state[0].v_col["w"].shape == (140,)
    assert state[0].v["b"].shape == (5,)
    assert state[2].ema["w"].dtype == jnp.bfloat16


def test_adafactor_takes_zero_gradients(params):
    seen, _ = run(adafactor_direction(), params, [jax.tree.map(jnp.zeros_like, params)] * 2)
    assert_same(seen[-1], params)


# Schedule-free AdamW

WARMUP = optax.warmup_constant_schedule(0.0, 1e-2, 3)


def schedule_free_links(moments, b1=0.9):
    base = optax.named_chain(
        ("moments", moments),
        ("decay", optax.add_decayed_weights(0.1)),
        ("learning_rate", optax.scale_by_learning_rate(WARMUP)),
    )
    return optax.contrib.schedule_free(base, learning_rate=WARMUP, b1=b1)


def rms():
    """Adam's second moment alone: what is left of scale_by_adam at b1=0, without the array of zeros."""
    return optax.scale_by_rms(decay=0.95, eps=1e-8, eps_in_sqrt=False, bias_correction=True)


def test_schedule_free_links_are_optax_schedule_free_adamw(params, gradients):
    whole = optax.contrib.schedule_free_adamw(
        1e-2, warmup_steps=3, b1=0.9, b2=0.95, weight_decay=0.1
    )
    expected = run(whole, params, gradients)[0]
    assert_same(run(schedule_free_links(rms()), params, gradients)[0], expected)


def test_schedule_free_is_the_papers_iteration(params, gradients):
    """Algorithm 1 of arXiv 2405.15682; optax weighs step t with the rate of step t + 1 of the warmup."""
    seen, state = run(schedule_free_links(rms()), params, gradients)
    y = z = x = np.float64(params["w"])
    v, total = 0.0, 0.0
    for t, gradient in enumerate(gradients, 1):
        g = np.float64(gradient["w"])
        v = 0.95 * v + 0.05 * g**2
        rate = float(WARMUP(t - 1))
        z = z - rate * (g / (np.sqrt(v / (1 - 0.95**t)) + 1e-8) + 0.1 * y)
        weight = float(WARMUP(t)) ** 2
        total += weight
        x = x + weight / total * (z - x)
        y = 0.9 * x + 0.1 * z
        np.testing.assert_allclose(seen[t - 1]["w"], y, rtol=1e-4, atol=1e-5)
    evaluated = optax.contrib.schedule_free_eval_params(state, seen[-1])
    np.testing.assert_allclose(evaluated["w"], x, rtol=1e-4, atol=1e-5)
    assert np.abs(seen[-1]["w"] - x).max() > 1e-3  # y, which is trained, is another point


def test_a_base_with_momentum_is_another_optimizer(params, gradients):
    without = run(schedule_free_links(optax.scale_by_adam(b1=0.0, b2=0.95)), params, gradients)[0]
    assert_same(without, run(schedule_free_links(rms()), params, gradients)[0])
    momentum = run(schedule_free_links(optax.scale_by_adam(b1=0.9, b2=0.95)), params, gradients)[0]
    assert np.abs(momentum[-1]["w"] - without[-1]["w"]).max() > 1e-3


def test_scaling_trained_parameters_and_z_scales_what_is_evaluated(params, gradients):
    """What a post-update step such as qk_clip must do under schedule_free: y and z by one factor."""
    seen, state = run(schedule_free_links(rms()), params, gradients)
    evaluated = optax.contrib.schedule_free_eval_params
    both = evaluated(
        state._replace(z=jax.tree.map(lambda z: 0.5 * z, state.z)),
        jax.tree.map(lambda y: 0.5 * y, seen[-1]),
    )
    assert_same(both, jax.tree.map(lambda x: 0.5 * x, evaluated(state, seen[-1])), rtol=1e-5)
