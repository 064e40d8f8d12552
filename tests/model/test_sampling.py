"""What may be drawn, and how often, against the rules of transformers' logits processors.

B batch, V vocabulary
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoljax.model.sampling import draw, options, scores

NOTHING = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}


def softmax(scores_BV):
    mass_BV = np.exp(scores_BV - scores_BV.max(axis=-1, keepdims=True))
    return mass_BV / mass_BV.sum(axis=-1, keepdims=True)


def by_the_rules(logits_BV, seen_BV, *, temperature, top_k, top_p, min_p, repetition_penalty):
    """In f64: RepetitionPenaltyLogitsProcessor, then Temperature-, TopK-, TopP- and MinPLogitsWarper (transformers 5.23)."""
    scores_BV = logits_BV.astype(np.float64)
    lowered_BV = np.where(
        scores_BV < 0, scores_BV * repetition_penalty, scores_BV / repetition_penalty
    )
    scores_BV = np.where(seen_BV, lowered_BV, scores_BV)
    if temperature == 0:
        return scores_BV
    scores_BV = scores_BV / temperature
    if top_k:
        least_B1 = np.sort(scores_BV, axis=-1)[:, -min(top_k, scores_BV.shape[1])][:, None]
        scores_BV = np.where(scores_BV < least_B1, -np.inf, scores_BV)
    if top_p < 1:
        order_BV = np.argsort(scores_BV, axis=-1)
        mass_BV = np.cumsum(softmax(np.take_along_axis(scores_BV, order_BV, -1)), axis=-1)
        removed_BV = mass_BV <= 1 - top_p
        removed_BV[:, -1] = False
        back_BV = np.zeros_like(removed_BV)
        np.put_along_axis(back_BV, order_BV, removed_BV, -1)
        scores_BV = np.where(back_BV, -np.inf, scores_BV)
    mass_BV = softmax(scores_BV)
    kept_BV = mass_BV >= min_p * mass_BV.max(axis=-1, keepdims=True)
    return np.where(kept_BV, scores_BV, -np.inf)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 0.6},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7},
        {"top_k": 1},
        {"top_k": 50},
        {"top_k": 5000},  # More than there are.
        {"top_p": 0.9},
        {"top_p": 1e-6},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"top_k": 50, "top_p": 0.5},
        {"temperature": 1.5, "top_k": 200, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_what_may_be_drawn_is_what_transformers_lets_through(given):
    random = np.random.default_rng(0)
    logits_BV = random.normal(0, 3, (4, 1000)).astype(np.float32)
    seen_BV = random.random((4, 1000)) < 0.1
    given = NOTHING | given
    kind, sampling = options(vocab_size=1000, stop_ids=(), **given)
    expected = by_the_rules(logits_BV, seen_BV, **given)
    penalised = given["repetition_penalty"] != 1
    found = scores(kind, jnp.asarray(logits_BV), seen_BV if penalised else None, sampling)
    np.testing.assert_array_equal(np.isinf(found), np.isinf(expected))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_order_matters():
    """Were top-p taken before top-k, of 0.4 + 0.3 + 0.2 three would be left, not two."""
    kind, sampling = options(vocab_size=4, stop_ids=(), **NOTHING | {"top_k": 3, "top_p": 0.75})
    logits_BV = jnp.log(jnp.asarray([[0.1, 0.4, 0.2, 0.3]]))
    found = scores(kind, logits_BV, None, sampling)
    np.testing.assert_array_equal(np.isinf(found), [[True, False, True, False]])


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_k": 2}, [0.4, 0.3]),
        ({"top_p": 0.65}, [0.4, 0.3]),  # 0.4 is less than 0.65, so the token that crosses it stays.
        ({"top_p": 0.35}, [0.4]),
        ({"top_k": 3, "top_p": 0.75}, [0.4, 0.3]),  # Of the 0.9 that top-k left, 0.7 is 0.78.
        ({"min_p": 0.45}, [0.4, 0.3, 0.2]),
    ],
)
def test_draws_follow_the_distribution(given, kept):
    num_draws = 20_000
    kind, sampling = options(vocab_size=4, stop_ids=(), **NOTHING | {"temperature": 0.5} | given)
    logits_BV = jnp.tile(jnp.log(jnp.asarray([[0.1, 0.4, 0.2, 0.3]])), (num_draws, 1)) * 0.5
    keys_B = jax.random.split(jax.random.key(0), num_draws)
    drawn = draw(kind, scores(kind, logits_BV, None, sampling), keys_B, 0)
    counts = np.bincount(drawn, minlength=4)
    expected = np.array([0.1, 0.4, 0.2, 0.3]) * np.isin([0.1, 0.4, 0.2, 0.3], kept)
    np.testing.assert_allclose(counts / num_draws, expected / expected.sum(), atol=0.015)
    assert (counts[expected == 0] == 0).all()
