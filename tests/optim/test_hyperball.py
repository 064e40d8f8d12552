import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smoljax.errors import SmoljaxError
from smoljax.optim import COEFFICIENTS, MatrixSpec
from smoljax.optim.hyperball import adamh, hyperball, muonh

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
    return params


def sphere_step(w, u, radius, rate):
    """W' = R normalize(W - rate R u / |u|)."""
    target = w - rate * radius * u / np.linalg.norm(u)
    return radius * target / np.linalg.norm(target)


def test_muonh_equals_the_paper_in_float64(numpy_newton_schulz):
    params = {name: np.float64(leaf) for name, leaf in gradients(100).items()}
    radius = {name: np.linalg.norm(leaf) for name, leaf in params.items()}
    momentum = dict.fromkeys(params, 0.0)
    for step in range(4):
        for name, g in gradients(step).items():
            g = np.float64(g)
            momentum[name] = 0.95 * momentum[name] + g
            u = numpy_newton_schulz(g + 0.95 * momentum[name], COEFFICIENTS["polar_express"], 1.02)
            params[name] = sphere_step(params[name], u, radius[name], 0.1)
    for name, got in run(muonh(0.1)).items():
        np.testing.assert_allclose(got, params[name], atol=1e-4)


def test_adamh_equals_the_paper_in_float64():
    params = {name: np.float64(leaf) for name, leaf in gradients(100).items()}
    radius = {name: np.linalg.norm(leaf) for name, leaf in params.items()}
    first, second = dict.fromkeys(params, 0.0), dict.fromkeys(params, 0.0)
    rates = [0.1, 0.05, 0.025, 0.0125]
    for step in range(4):
        for name, g in gradients(step).items():
            g = np.float64(g)
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g**2
            mean, square = (
                first[name] / (1 - 0.9 ** (step + 1)),
                second[name] / (1 - 0.95 ** (step + 1)),
            )
            u = mean / (np.sqrt(square) + 1e-8)
            params[name] = sphere_step(params[name], u, radius[name], rates[step])
    got = run(adamh(lambda count: 0.1 * 0.5**count))
    for name in params:
        np.testing.assert_allclose(got[name], params[name], atol=1e-4)


def test_the_norm_of_every_matrix_stays_and_the_rate_is_the_angle():
    shapes = {"w": (3, 16, 40)}
    before = gradients(100, shapes)["w"] * jnp.float32([1, 10, 0.1]).reshape(3, 1, 1)
    direction = gradients(0, shapes)["w"]
    along = jnp.sum(direction * before, (1, 2)) / jnp.sum(before**2, (1, 2))
    direction -= along.reshape(3, 1, 1) * before  # at right angles to W
    transform = hyperball(0.2)
    updates, _ = transform.update({"w": direction}, transform.init({"w": before}), {"w": before})
    after = before + updates["w"]
    norms = np.linalg.norm(before, axis=(1, 2))
    np.testing.assert_allclose(np.linalg.norm(after, axis=(1, 2)), norms, rtol=1e-6)
    cosines = np.sum(after * before, axis=(1, 2)) / norms**2
    np.testing.assert_allclose(np.tan(np.arccos(cosines)), 0.2, rtol=1e-4)
    # Scaling by the norms of the whole leaf, not of each layer, would break the sphere of the small layers.
    whole = dataclasses.replace(MatrixSpec(), inputs=(0, 1))
    transform = hyperball(0.2, {"w": whole})
    updates, _ = transform.update({"w": direction}, transform.init({"w": before}), {"w": before})
    assert np.abs(np.linalg.norm(before + updates["w"], axis=(1, 2)) / norms - 1).max() > 0.1


def test_heads_and_split_pieces_have_norms_of_their_own():
    spec = MatrixSpec(inputs=(-3,), outputs=(-2, -1), split=(4, 2, 2), heads=(-2, 1))
    shapes = {"w": (2, 12, 8, 5)}
    sizes = jnp.arange(1.0, 9.0).reshape(1, 1, 8, 1)
    params = {"w": gradients(0, shapes)["w"] * sizes}
    transform = hyperball(0.3, {"w": spec})
    state = transform.init(params)
    assert state.radius["w"].shape == (2, 1, 8, 1)
    updates, _ = jax.jit(transform.update)(gradients(1, shapes), state, params)
    for leaf in (params["w"], params["w"] + updates["w"]):
        norms = np.linalg.norm(leaf.transpose(0, 2, 1, 3), axis=(2, 3))
        np.testing.assert_allclose(norms, state.radius["w"][:, 0, :, 0], rtol=1e-5)


def test_zero_direction_leaves_the_matrix_and_nan_stays_in_its_own():
    params = {"w": gradients(0, {"w": (3, 8, 8)})["w"]}
    direction = jnp.zeros((3, 8, 8)).at[1].set(jnp.nan).at[2].set(1.0)
    transform = hyperball(0.1)
    moved = {"w": params["w"] * 1.5}  # off the sphere: nothing pulls it back without a direction
    updates, _ = jax.jit(transform.update)({"w": direction}, transform.init(params), moved)
    np.testing.assert_array_equal(updates["w"][0], 0)
    assert np.isnan(updates["w"][1]).all()
    assert np.isfinite(updates["w"][2]).all()


def test_zero_matrices_are_refused_where_they_can_be_seen():
    params = {"layers": {"w": gradients(0, {"w": (3, 8, 8)})["w"].at[1].set(0)}}
    transform = hyperball(0.1)
    with pytest.raises(SmoljaxError, match="layers/w has 1 of 3 matrices that are zero"):
        transform.init(params)
    state = jax.jit(transform.init)(params)
    updates, _ = transform.update({"layers": {"w": jnp.ones((3, 8, 8))}}, state, params)
    finite = np.isfinite(updates["layers"]["w"]).all(axis=(1, 2))
    np.testing.assert_array_equal(finite, [True, False, True])
    shapes = jax.eval_shape(transform.init, params)
    assert shapes.radius["layers"]["w"].shape == (3, 1, 1)


def test_bfloat16_weights_stay_near_their_norm():
    params = {"w": jnp.asarray(gradients(0)["wide"], jnp.bfloat16)}
    transform = muonh(0.05)
    state = transform.init(params)
    update = jax.jit(transform.update)
    for step in range(20):
        updates, state = update({"w": jnp.bfloat16(gradients(step)["wide"])}, state, params)
        assert updates["w"].dtype == jnp.bfloat16
        params = optax.apply_updates(params, updates)
    norm = np.linalg.norm(params["w"].astype(jnp.float32))
    assert norm == pytest.approx(float(state[1].radius["w"][0, 0]), rel=1e-3)


def test_composes_with_optax():
    params = {"w": gradients(0)["wide"], "b": jnp.ones(3)}
    both = optax.multi_transform(
        {"muonh": muonh(0.1), "adamw": optax.adamw(0.1)}, {"w": "muonh", "b": "adamw"}
    )
    updates, _ = jax.jit(both.update)(params, both.init(params), params)
    for make in (muonh, adamh):
        injected = optax.inject_hyperparams(make)(learning_rate=0.1)
        matrix = {"w": params["w"]}
        state = injected.init(matrix)
        got, _ = jax.jit(injected.update)(matrix, state, matrix)
        if make is muonh:
            np.testing.assert_allclose(got["w"], updates["w"], rtol=1e-4, atol=1e-6)
        state.hyperparams["learning_rate"] = jnp.float32(0.0)
        still, _ = jax.jit(injected.update)(matrix, state, matrix)
        np.testing.assert_allclose(still["w"], 0, atol=1e-6)


def test_wrong_use_is_refused():
    transform = hyperball(0.1)
    for leaf, words in [(jnp.ones(3), "holds no matrix"), (jnp.ones((3, 3), jnp.int32), "int32")]:
        with pytest.raises(SmoljaxError, match=words):
            transform.init({"w": leaf})
    params = {"w": jnp.ones((3, 3))}
    with pytest.raises(SmoljaxError, match="needs the parameters"):
        transform.update(params, transform.init(params))
