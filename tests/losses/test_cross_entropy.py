"""The chunked cross-entropy against the plain formula.

B batch, S sequence, D model width, V vocabulary
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoljax.errors import SmoljaxError
from smoljax.losses import cross_entropy

B, S, D, V = 3, 20, 16, 50


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    return (
        jax.random.normal(keys[0], (B, S, D)),
        jax.random.normal(keys[1], (D, V)),
        jax.random.randint(keys[2], (B, S), 0, V),
        jax.random.bernoulli(keys[3], 0.7, (B, S)),
    )


def plain(hidden_BSD, unembedding_DV, targets_BS, mask_BS, *, z_loss):
    """-log softmax(logits)[target] + z log(sum exp)^2, over all logits at once."""
    logits_BSV = hidden_BSD @ unembedding_DV
    log_normaliser_BS = jax.nn.logsumexp(logits_BSV, axis=-1)
    target_BS = jnp.take_along_axis(logits_BSV, targets_BS[..., None], axis=-1)[..., 0]
    nats_BS = log_normaliser_BS - target_BS + z_loss * jnp.square(log_normaliser_BS)
    return jnp.sum(jnp.where(mask_BS, nats_BS, 0))


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 60, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_equals_the_plain_formula_with_gradients(inputs, chunk_size, z_loss):
    def chunked(hidden_BSD, unembedding_DV):
        total, _, _ = cross_entropy(
            hidden_BSD, unembedding_DV, *inputs[2:], chunk_size=chunk_size, z_loss=z_loss
        )
        return 3.0 * total  # A cotangent other than 1.

    def expected(hidden_BSD, unembedding_DV):
        return 3.0 * plain(hidden_BSD, unembedding_DV, *inputs[2:], z_loss=z_loss)

    value, gradients = jax.value_and_grad(chunked, (0, 1))(*inputs[:2])
    expected_value, expected_gradients = jax.value_and_grad(expected, (0, 1))(*inputs[:2])
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    np.testing.assert_allclose(chunked(*inputs[:2]), expected_value, rtol=1e-6)  # Undifferentiated.
    for got, want in zip(gradients, expected_gradients):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_counts_targets_and_splits_the_sum_into_its_parts(inputs):
    total, num_targets, metrics = cross_entropy(*inputs, chunk_size=16, z_loss=1e-2)
    assert num_targets == int(inputs[3].sum())
    np.testing.assert_allclose(metrics["cross_entropy"], plain(*inputs, z_loss=0.0), rtol=1e-6)
    np.testing.assert_allclose(metrics["cross_entropy"] + metrics["z_loss"], total, rtol=1e-6)


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary(inputs):
    _, unembedding_DV, targets_BS, mask_BS = inputs
    total, num_targets, _ = cross_entropy(
        jnp.zeros((B, S, D)), unembedding_DV, targets_BS, mask_BS, chunk_size=8
    )
    np.testing.assert_allclose(total / num_targets, np.log(V), rtol=1e-6)


def test_masked_positions_have_no_influence(inputs):
    hidden_BSD, unembedding_DV, targets_BS, mask_BS = inputs
    other_BS = jnp.where(mask_BS, targets_BS, (targets_BS + 1) % V)
    before = cross_entropy(hidden_BSD, unembedding_DV, targets_BS, mask_BS, chunk_size=16)[0]
    assert cross_entropy(hidden_BSD, unembedding_DV, other_BS, mask_BS, chunk_size=16)[0] == before
    # Control: the same change at counted positions is seen.
    other_BS = jnp.where(mask_BS, (targets_BS + 1) % V, targets_BS)
    assert cross_entropy(hidden_BSD, unembedding_DV, other_BS, mask_BS, chunk_size=16)[0] != before


def test_no_targets_at_all_is_zero_and_finite(inputs):
    def total(hidden_BSD):
        nothing_BS = jnp.zeros((B, S), bool)
        return cross_entropy(hidden_BSD, inputs[1], inputs[2], nothing_BS, chunk_size=16)[0]

    value, gradient = jax.value_and_grad(total)(inputs[0])
    assert value == 0
    assert not gradient.any()


def test_bfloat16_hidden_states_keep_float32_sums(inputs):
    hidden_BSD, unembedding_DV, targets_BS, mask_BS = inputs
    hidden_BSD = hidden_BSD.astype(jnp.bfloat16)

    def total(hidden_BSD, unembedding_DV):
        return cross_entropy(hidden_BSD, unembedding_DV, targets_BS, mask_BS, chunk_size=16)[0]

    value, (dhidden_BSD, dunembedding_DV) = jax.value_and_grad(total, (0, 1))(
        hidden_BSD, unembedding_DV
    )
    rounded = unembedding_DV.astype(jnp.bfloat16).astype(jnp.float32)
    expected = plain(hidden_BSD.astype(jnp.float32), rounded, targets_BS, mask_BS, z_loss=0.0)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert (value.dtype, dhidden_BSD.dtype) == (jnp.float32, jnp.bfloat16)
    assert dunembedding_DV.dtype == jnp.float32


def test_memory_is_one_chunk_of_logits():
    tokens, width, vocabulary, chunk = 2048, 32, 4096, 128

    def temporaries(loss):
        def total(hidden_BSD, unembedding_DV, targets_BS, mask_BS):
            return loss(hidden_BSD, unembedding_DV, targets_BS, mask_BS)

        shapes = (
            jax.ShapeDtypeStruct((4, tokens // 4, width), jnp.float32),
            jax.ShapeDtypeStruct((width, vocabulary), jnp.float32),
            jax.ShapeDtypeStruct((4, tokens // 4), jnp.int32),
            jax.ShapeDtypeStruct((4, tokens // 4), jnp.bool_),
        )
        gradient = jax.jit(jax.grad(total, (0, 1)))
        return gradient.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    all_logits = 4 * tokens * vocabulary
    one_chunk = 4 * chunk * vocabulary
    chunked = temporaries(lambda *args: cross_entropy(*args, chunk_size=chunk)[0])
    assert chunked < 3 * one_chunk + 4 * (3 * width * vocabulary + 4 * tokens * width)
    assert chunked < all_logits / 3
    # Control: the plain formula holds them all.
    assert temporaries(lambda *args: plain(*args, z_loss=0.0)) >= all_logits


def test_errors_name_the_shapes(inputs):
    hidden_BSD, unembedding_DV, targets_BS, mask_BS = inputs
    with pytest.raises(SmoljaxError, match=r"unembedding \(50, 16\)"):
        cross_entropy(hidden_BSD, unembedding_DV.T, targets_BS, mask_BS, chunk_size=4)
    with pytest.raises(SmoljaxError, match=r"targets \(3, 19\)"):
        cross_entropy(hidden_BSD, unembedding_DV, targets_BS[:, 1:], mask_BS, chunk_size=4)
    with pytest.raises(SmoljaxError, match="chunk_size=0"):
        cross_entropy(hidden_BSD, unembedding_DV, targets_BS, mask_BS, chunk_size=0)
