import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smoljax.errors import SmoljaxError
from smoljax.optim import COEFFICIENTS, MatrixSpec
from smoljax.optim.muon import muon, scale_by_muon
from smoljax.optim.normuon import normalize_neurons, normuon

SHAPES = {"square": (24, 24), "wide": (24, 60), "tall": (60, 24)}
TO_HEADS = MatrixSpec(inputs=(-3,), outputs=(-2, -1))
FROM_HEADS = MatrixSpec(inputs=(-3, -2), outputs=(-1,))


def gradients(step, shapes=SHAPES):
    """Some neurons get gradients a hundred times larger than others."""
    rng = np.random.default_rng(step)
    return {
        name: jnp.float32(rng.standard_normal(shape) * np.logspace(-1, 1, shape[-1]))
        for name, shape in shapes.items()
    }


def run(transform, steps=4, shapes=SHAPES, start=100):
    params = gradients(start, shapes)
    state = transform.init(params)
    update = jax.jit(transform.update)
    for step in range(steps):
        updates, state = update(gradients(step, shapes), state, params)
        params = optax.apply_updates(params, updates)
    return params, updates


@pytest.mark.parametrize("nesterov", [True, False])
def test_equals_the_paper_in_float64(numpy_newton_schulz, nesterov):
    """Algorithm 1: O; v <- b2 v + (1 - b2) mean over a neuron's inputs of O^2; O / sqrt(v); the old norm; 0.2 sqrt(max)."""
    params = {name: np.float64(leaf) for name, leaf in gradients(100).items()}
    momentum, second = dict.fromkeys(params, 0.0), dict.fromkeys(params, 0.0)
    for step in range(4):
        for name, g in gradients(step).items():
            g = np.float64(g)
            momentum[name] = 0.95 * momentum[name] + 0.05 * g
            u = 0.95 * momentum[name] + 0.05 * g if nesterov else momentum[name]
            o = numpy_newton_schulz(u, COEFFICIENTS["polar_express"], 1.02)
            second[name] = 0.9 * second[name] + 0.1 * np.mean(o**2, axis=0)
            normal = o / (np.sqrt(second[name]) + 1e-8)
            normal *= np.linalg.norm(o) / np.linalg.norm(normal)
            params[name] -= 0.1 * (0.2 * np.sqrt(max(g.shape)) * normal + 0.1 * params[name])
    got, _ = run(normuon(0.1, weight_decay=0.1, b2=0.9, nesterov=nesterov))
    for name, want in params.items():
        np.testing.assert_allclose(got[name], want, atol=1e-4)


def test_neurons_get_updates_of_like_size_and_matrices_keep_their_norm():
    _, plain = run(muon(1.0), steps=1)
    _, normal = run(normuon(1.0), steps=1)
    for name in SHAPES:
        sizes = np.sqrt(np.mean(np.square(normal[name]), axis=0))
        np.testing.assert_allclose(sizes, sizes[0], rtol=1e-4)
        assert np.linalg.norm(normal[name]) == pytest.approx(np.linalg.norm(plain[name]), rel=1e-5)
        assert np.sqrt(np.mean(np.square(normal[name]))) == pytest.approx(0.2, rel=0.08)
    uneven = np.sqrt(np.mean(np.square(plain["wide"]), axis=0))
    assert uneven.max() > 1.5 * uneven.min()  # Muon alone leaves them unlike


def test_the_factor_by_shape_may_stand_on_either_side():
    _, rms = run(normuon(1.0))
    _, spectral = run(normuon(1.0, scale="spectral"))
    for name, (d_in, d_out) in SHAPES.items():
        factor = np.sqrt(d_out / d_in) / (0.2 * np.sqrt(max(d_in, d_out)))
        np.testing.assert_allclose(spectral[name], rms[name] * factor, rtol=1e-4, atol=1e-6)


def test_heads_splits_and_layers_are_matrices_of_their_own():
    shapes = {"fused": (2, 12, 8, 5), "output": (2, 4, 5, 12)}
    specs = {
        "fused": dataclasses.replace(TO_HEADS, split=(4, 2, 2), heads=(-2, 2)),
        "output": dataclasses.replace(FROM_HEADS, heads=(-3, 1)),
    }
    transform = normuon(1.0, specs=specs)
    params = gradients(0, shapes)
    second = transform.init(params)[1].second_moment
    assert second["fused"].shape == (2, 1, 8, 5)
    assert second["output"].shape == (2, 4, 1, 12)
    _, updates = run(transform, shapes=shapes)
    pairs = {
        f"{layer} {pair}": lambda x, layer=layer, pair=pair: x["fused"][
            layer, :, 2 * pair : 2 * pair + 2
        ].reshape(12, 10)
        for layer in range(2)
        for pair in range(4)
    } | {
        f"out {layer} {head}": lambda x, layer=layer, head=head: x["output"][layer, head]
        for layer in range(2)
        for head in range(4)
    }
    alone = normuon(1.0)

    def take(x):
        return {name: part(x) for name, part in pairs.items()}

    state = alone.init(take(params))
    for step in range(4):
        want, state = jax.jit(alone.update)(take(gradients(step, shapes)), state, take(params))
    got = take(updates)
    for name in pairs:
        np.testing.assert_allclose(got[name], want[name], atol=1e-5)


def test_zero_stays_zero_nan_stays_in_its_matrix_and_dtypes_hold():
    x = jnp.zeros((3, 8, 8), jnp.bfloat16).at[1].set(jnp.nan)
    x = x.at[2].set(jnp.asarray(gradients(0)["square"][:8, :8], jnp.bfloat16))
    transform = optax.chain(scale_by_muon(), normalize_neurons())
    state = transform.init({"w": x})
    updates, state = jax.jit(transform.update)({"w": x}, state)
    assert updates["w"].dtype == jnp.bfloat16
    assert state[1].second_moment["w"].dtype == jnp.float32
    np.testing.assert_array_equal(updates["w"][0], 0)
    assert np.isnan(updates["w"][1]).all()
    assert np.isfinite(updates["w"][2].astype(jnp.float32)).all()


def test_composes_with_optax():
    params = {"w": gradients(0)["wide"], "b": jnp.ones(3)}
    both = optax.partition(
        {"normuon": normuon(optax.constant_schedule(0.1)), "adamw": optax.adamw(0.1)},
        {"w": "normuon", "b": "adamw"},
    )
    updates, _ = jax.jit(both.update)(params, both.init(params), params)
    assert np.sqrt(np.mean(updates["w"] ** 2)) == pytest.approx(0.02, rel=0.08)
    injected = optax.inject_hyperparams(normuon)(learning_rate=0.1)
    matrix = {"w": params["w"]}
    want, _ = jax.jit(injected.update)(matrix, injected.init(matrix), matrix)
    np.testing.assert_allclose(want["w"], updates["w"], rtol=1e-4, atol=1e-6)


def test_wrong_leaves_are_refused_at_init():
    for leaf, words in [
        (jnp.ones(3), "holds no matrix"),
        (jnp.ones((3, 3), jnp.complex64), "complex64"),
        (jnp.ones((3, 3), jnp.int32), "int32"),
    ]:
        with pytest.raises(SmoljaxError, match=words):
            normalize_neurons().init({"w": leaf})
