"""The head against its own definition: normal equations, errors of fits that leave a text out, Adam.

N texts, D width
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smoljax.errors import SmoljaxError
from smoljax.quality import head as heads

N, D = 120, 12


@pytest.fixture(scope="module")
def data():
    """Vectors of unequal spread, and scores that are a linear function of them with noise."""
    rng = np.random.default_rng(0)
    vectors_ND = (rng.standard_normal((N, D)) * np.geomspace(0.01, 3, D) + 0.5).astype(np.float32)
    weight_D = rng.standard_normal(D) / np.geomspace(0.01, 3, D)
    noise_N = 2 * rng.standard_normal(N)
    return vectors_ND, (vectors_ND @ weight_D + noise_N + 2.5).astype(np.float32)


def ridge(vectors_ND, scores_N, penalty):
    """Weight and bias in f64 by the normal equations, on dimensions of mean 0 and variance 1."""
    mean_D, spread_D = vectors_ND.mean(0, dtype=float), vectors_ND.std(0, dtype=float)
    x_ND = (vectors_ND - mean_D) / spread_D
    normal_DD = x_ND.T @ x_ND / len(x_ND) + penalty * np.eye(x_ND.shape[1])
    weight_D = np.linalg.solve(normal_DD, x_ND.T @ (scores_N - scores_N.mean()) / len(x_ND))
    return weight_D / spread_D, scores_N.mean() - mean_D @ (weight_D / spread_D)


def test_the_fit_solves_the_normal_equations(data):
    weight_D, bias, about = heads.fit(*data)
    expected_D, expected = ridge(*data, about["penalty"])
    np.testing.assert_allclose(weight_D, expected_D, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(bias, expected, rtol=1e-3)
    other_D, _ = ridge(*data, 10 * about["penalty"] + 0.1)
    assert np.abs(other_D - expected_D).max() > 0.1


def test_the_penalty_has_the_least_error_of_texts_left_out(data):
    """Leaving out by hand keeps the means and spreads of all, as the closed form does, hence the tolerance of 2%."""
    vectors_ND, scores_N = data
    found = heads.fit(*data)[2]

    def left_out(penalty):
        errors = []
        for i in range(N):
            rest = np.arange(N) != i
            weight_D, bias = ridge(vectors_ND[rest], scores_N[rest], penalty)
            errors.append((vectors_ND[i] @ weight_D + bias - scores_N[i]) ** 2)
        return np.mean(errors)

    assert left_out(found["penalty"]) == pytest.approx(found["leave_one_out_mse"], rel=0.02)
    assert left_out(found["penalty"]) <= 1.001 * min(left_out(p) for p in (1e-4, 1e-2, 1, 30))


def test_noise_is_foretold_by_its_mean():
    rng = np.random.default_rng(0)
    vectors_ND = rng.standard_normal((N, D)).astype(np.float32)
    scores_N = rng.integers(0, 6, N).astype(np.float32)
    weight_D, bias, about = heads.fit(vectors_ND, scores_N)
    assert about["penalty"] > 1
    assert np.abs(vectors_ND @ weight_D + bias - scores_N.mean()).max() < 1


def test_adam_comes_to_the_same_with_weight_decay_in_the_loss(data):
    vectors_ND, scores_N = data
    weight_D, bias, about = heads.fit(*data)
    spread_D, mean_D = vectors_ND.std(0), vectors_ND.mean(0)
    x_ND = (vectors_ND - mean_D) / spread_D

    def loss(params):
        error_N = jnp.einsum("nd,d->n", x_ND, params["w"]) + params["b"] - scores_N
        return jnp.square(error_N).mean() + about["penalty"] * jnp.square(params["w"]).sum()

    optimizer = optax.adam(optax.cosine_decay_schedule(0.3, 3000))
    params = {"w": jnp.zeros(D), "b": jnp.zeros(())}

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=3000)
    trained_N = x_ND @ np.asarray(params["w"]) + float(params["b"])
    np.testing.assert_allclose(trained_N, vectors_ND @ weight_D + bias, atol=0.01)


def test_a_dimension_that_never_changes_is_left_out(data):
    vectors_ND, scores_N = data
    wider = np.concatenate([vectors_ND, np.full((N, 1), 7, np.float32)], axis=1)
    weight_D, bias, _ = heads.fit(wider, scores_N)
    expected_D, expected, _ = heads.fit(*data)
    assert np.isfinite(weight_D).all()
    np.testing.assert_allclose(
        wider @ weight_D + bias, vectors_ND @ expected_D + expected, atol=0.01
    )


def test_a_score_is_the_mean_over_chunks():
    head = heads.Head(np.array([1, 2], np.float32), np.float32(0.5), "e", "start_end", {})
    vectors_RD = np.array([[1, 0], [0, 1], [3, 1]], np.float32)
    owners_R = np.array([0, 1, 0])
    scores = head.scores(vectors_RD, owners_R)
    np.testing.assert_array_equal(scores, np.array([3.5, 2.5], np.float32))
    means_ND = heads.mean_vectors(vectors_RD, owners_R)
    np.testing.assert_array_equal(head.scores(means_ND, np.arange(2)), scores)


def test_a_saved_head_is_the_same_to_the_last_bit(data, tmp_path):
    weight_D, bias, about = heads.fit(*data)
    head = heads.Head(weight_D, bias, "e" * 64, "start", about)
    heads.save(tmp_path / "head.json", head)
    again = heads.load(tmp_path / "head.json")
    np.testing.assert_array_equal(again.weight_D, weight_D)
    assert (again.bias, again.fingerprint, again.about) == (bias, head.fingerprint, about)
    heads.save(tmp_path / "again.json", again)
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "head.json").read_bytes()
    shifted = heads.Head(weight_D, np.float32(bias + 1), "e" * 64, "start", about)
    assert shifted.fingerprint != head.fingerprint


def test_another_embedder_is_refused(tmp_path):
    head = heads.Head(np.ones(2, np.float32), np.float32(0), "a" * 64, "start", {"embedder": "X"})
    path = tmp_path / "head.json"
    heads.check(head, path, embedder="a" * 64, chunks="start")
    with pytest.raises(SmoljaxError, match=r"fitted to embedder aaaaaaaaaaaaaaaa \(X\)"):
        heads.check(head, path, embedder="b" * 64, chunks="start")
    with pytest.raises(SmoljaxError, match="fitted with chunks='start'"):
        heads.check(head, path, embedder="a" * 64, chunks="start_end")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"weight": [1.0, float("nan")]}, "not a list of finite numbers"),
        ({"weight": [[1.0]]}, "not a list of finite numbers"),
        ({"format": "another"}, "its format is 'another'"),
        ({"bias": None}, "is not a head"),
    ],
)
def test_a_damaged_head_is_refused(tmp_path, edit, message):
    path = tmp_path / "head.json"
    heads.save(path, heads.Head(np.ones(2, np.float32), np.float32(0), "a", "start", {}))
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    with pytest.raises(SmoljaxError, match=message):
        heads.load(path)
    path.write_text("{")
    with pytest.raises(SmoljaxError, match="is not a head"):
        heads.load(path)
    with pytest.raises(SmoljaxError, match=r"cannot be read.*config\.quality\.head"):
        heads.load(tmp_path / "nowhere.json")
