import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smoljax.errors import SmoljaxError
from smoljax.optim import COEFFICIENTS, MatrixSpec
from smoljax.optim.adamuon import adamuon, scale_by_adamuon

SHAPES = {"square": (24, 24), "wide": (24, 60), "tall": (60, 24)}


def gradients(step, shapes=SHAPES):
    rng = np.random.default_rng(step)
    return {name: jnp.float32(rng.standard_normal(shape)) for name, shape in shapes.items()}


def run(transform, steps=4, shapes=SHAPES):
    params = gradients(100, shapes)
    state = transform.init(params)
    update = jax.jit(transform.update)
    for step in range(steps):
        updates, state = update(gradients(step, shapes), state, params)
        params = optax.apply_updates(params, updates)
    return params, updates


@pytest.mark.parametrize("nesterov", [False, True])
def test_equals_the_paper_in_float64(numpy_newton_schulz, nesterov):
    """Algorithm 1: O of sign(M), its second moment with the same beta, and 0.2 sqrt(mn) over the norm."""
    params = {name: np.float64(leaf) for name, leaf in gradients(100).items()}
    momentum, second = dict.fromkeys(params, 0.0), dict.fromkeys(params, 0.0)
    for step in range(4):
        for name, g in gradients(step).items():
            g = np.float64(g)
            momentum[name] = 0.9 * momentum[name] + g
            u = np.sign(g + 0.9 * momentum[name] if nesterov else momentum[name])
            o = numpy_newton_schulz(u, COEFFICIENTS["polar_express"], 1.02)
            second[name] = 0.9 * second[name] + 0.1 * o**2
            adapted = o / (np.sqrt(second[name]) + 1e-8)
            adapted *= 0.2 * np.sqrt(o.size) / np.linalg.norm(adapted)
            params[name] -= 0.1 * (adapted + 0.1 * params[name])
    got, _ = run(adamuon(0.1, beta=0.9, weight_decay=0.1, nesterov=nesterov))
    for name, want in params.items():
        np.testing.assert_allclose(got[name], want, atol=1e-4)


def test_update_rms_is_that_of_adamw():
    _, updates = run(adamuon(1.0))
    for update in updates.values():
        assert np.sqrt(np.mean(update**2)) == pytest.approx(0.2, rel=1e-4)


def test_heads_are_matrices_of_their_own():
    spec = MatrixSpec(inputs=(-3,), outputs=(-2, -1), heads=(-2, 1))
    shapes = {"w": (12, 3, 5)}
    params, _ = run(adamuon(0.1, specs={"w": spec}), shapes=shapes)
    transform = adamuon(0.1)
    leaves = [gradients(seed, shapes)["w"] for seed in (100, 0, 1, 2, 3)]
    heads = [{"w": leaf.transpose(1, 0, 2)} for leaf in leaves]
    want, state = heads[0], transform.init(heads[0])
    for gradient in heads[1:]:
        updates, state = jax.jit(transform.update)(gradient, state, want)
        want = optax.apply_updates(want, updates)
    np.testing.assert_allclose(params["w"].transpose(1, 0, 2), want["w"], atol=1e-5)


def test_zero_nan_and_dtypes():
    x = jnp.zeros((3, 8, 8), jnp.bfloat16).at[1, 2, 3].set(jnp.nan)
    x = x.at[2].set(jnp.asarray(gradients(0)["square"][:8, :8], jnp.bfloat16))
    transform = scale_by_adamuon(momentum_dtype=jnp.bfloat16)
    updates, state = jax.jit(transform.update)({"w": x}, transform.init({"w": x}))
    assert updates["w"].dtype == state.momentum["w"].dtype == jnp.bfloat16
    assert state.second_moment["w"].dtype == jnp.float32
    np.testing.assert_array_equal(updates["w"][0], 0)
    assert np.isnan(updates["w"][1]).all()
    assert np.isfinite(updates["w"][2].astype(jnp.float32)).all()


def test_composes_with_optax():
    params = {"w": gradients(0)["wide"], "b": jnp.ones(3)}
    both = optax.partition({"a": adamuon(0.1), "b": optax.adamw(0.1)}, {"w": "a", "b": "b"})
    updates, _ = jax.jit(both.update)(params, both.init(params), params)
    injected = optax.inject_hyperparams(adamuon)(learning_rate=optax.constant_schedule(0.1))
    matrix = {"w": params["w"]}
    got, _ = jax.jit(injected.update)(matrix, injected.init(matrix), matrix)
    np.testing.assert_allclose(got["w"], updates["w"], rtol=1e-4, atol=1e-6)


def test_wrong_leaves_are_refused_at_init():
    with pytest.raises(SmoljaxError, match="holds no matrix"):
        scale_by_adamuon().init({"w": jnp.ones(3)})
    with pytest.raises(SmoljaxError, match="int32"):
        scale_by_adamuon().init({"w": jnp.ones((3, 3), jnp.int32)})
