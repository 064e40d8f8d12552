"""The chunked cross-entropy against the plain formula.

B batch, S sequence, D model width, V vocabulary, E tokens that a teacher names
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoljax.errors import SmoljaxError
from smoljax.losses import cross_entropy, vocabulary_tiles

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


def teacher(E: int):
    """Ids of E tokens at each position, none twice, and probabilities that leave a rest."""
    keys = jax.random.split(jax.random.key(1), 3)
    order_BSV = jnp.argsort(jax.random.uniform(keys[0], (B, S, V)), axis=-1)
    probabilities_BSE = jax.nn.softmax(jax.random.normal(keys[1], (B, S, E + 1)))[..., :E]
    return order_BSV[..., :E].astype(jnp.int32), probabilities_BSE


@pytest.mark.parametrize("way", [7, 1000, "tiles"])
@pytest.mark.parametrize("E", [1, 6])
def test_a_teachers_probabilities_give_the_cross_entropy_of_distributions(inputs, way, E):
    ids_BSE, probabilities_BSE = teacher(E)
    mask_BS, z_loss = inputs[3], 1e-2
    full_BSV = jnp.zeros((B, S, V))
    full_BSV = jnp.put_along_axis(full_BSV, ids_BSE, probabilities_BSE, axis=-1, inplace=False)

    def student(hidden_BSD, unembedding_DV):
        rest = (ids_BSE, mask_BS)
        if way == "tiles":
            return vocabulary_tiles.sums(
                4, z_loss, hidden_BSD, unembedding_DV, *rest, probabilities_BSE
            )[0]
        return cross_entropy(
            hidden_BSD,
            unembedding_DV,
            *rest,
            chunk_size=way,
            z_loss=z_loss,
            probabilities_BSE=probabilities_BSE,
        )[0]

    def expected(hidden_BSD, unembedding_DV):
        logits_BSV = hidden_BSD @ unembedding_DV
        log_normaliser_BS = jax.nn.logsumexp(logits_BSV, axis=-1)
        nats_BS = -jnp.sum(full_BSV * jax.nn.log_softmax(logits_BSV), axis=-1)
        nats_BS += z_loss * jnp.square(log_normaliser_BS)
        return jnp.sum(jnp.where(mask_BS, nats_BS, 0))

    value, gradients = jax.value_and_grad(student, (0, 1))(*inputs[:2])
    expected_value, expected_gradients = jax.value_and_grad(expected, (0, 1))(*inputs[:2])
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    for got, want in zip(gradients, expected_gradients):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_certainty_of_a_teacher_is_the_hard_target(inputs):
    hidden_BSD, unembedding_DV, targets_BS, mask_BS = inputs
    hard = cross_entropy(*inputs, chunk_size=16)[0]
    arrays = (hidden_BSD, unembedding_DV, targets_BS[..., None], mask_BS)
    for share in (1.0, 0.5):
        soft = cross_entropy(*arrays, chunk_size=16, probabilities_BSE=jnp.full((B, S, 1), share))[
            0
        ]
        np.testing.assert_allclose(soft, share * hard, rtol=1e-6)


def test_heads_that_predict_further_tokens_share_the_unembedding(inputs):
    hidden_BSD, unembedding_DV, targets_BS, mask_BS = inputs
    further_BS, both_BS = jnp.roll(targets_BS, -1, axis=1), mask_BS & (jnp.arange(S) < S - 1)[None]

    def two(loss, hidden_BSD, unembedding_DV):
        near = loss(hidden_BSD, unembedding_DV, targets_BS, mask_BS)
        return near + 0.3 * loss(jnp.tanh(hidden_BSD), unembedding_DV, further_BS, both_BS)

    def chunked(*arrays):
        return cross_entropy(*arrays, chunk_size=16)[0]

    def whole(*arrays):
        return plain(*arrays, z_loss=0.0)

    got, want = (
        jax.value_and_grad(lambda *x, loss=loss: two(loss, *x), (0, 1))(hidden_BSD, unembedding_DV)
        for loss in (chunked, whole)
    )
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


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

    def taught(hidden_BSD, unembedding_DV, targets_BS, mask_BS):
        ids_BSE = targets_BS[..., None] + jnp.arange(8)[None, None]
        shares = jnp.full(ids_BSE.shape, 1 / 8)
        return cross_entropy(
            hidden_BSD, unembedding_DV, ids_BSE, mask_BS, chunk_size=chunk, probabilities_BSE=shares
        )[0]

    assert temporaries(taught) < chunked + one_chunk  # No array of [chunk, E, V].
    # Control: the plain formula holds them all.
    assert temporaries(lambda *args: plain(*args, z_loss=0.0)) >= all_logits


def test_errors_name_the_shapes(inputs):
    hidden_BSD, unembedding_DV, targets_BS, mask_BS = inputs
    with pytest.raises(SmoljaxError, match=r"unembedding \(50, 16\)"):
        cross_entropy(hidden_BSD, unembedding_DV.T, targets_BS, mask_BS, chunk_size=4)
    with pytest.raises(SmoljaxError, match=r"targets \(3, 19\)"):
        cross_entropy(hidden_BSD, unembedding_DV, targets_BS[:, 1:], mask_BS, chunk_size=4)
    with pytest.raises(SmoljaxError, match=r"probabilities \(3, 20, 2\).* \[B, S, E\] for targets"):
        cross_entropy(*inputs, chunk_size=4, probabilities_BSE=jnp.ones((B, S, 2)))
    with pytest.raises(SmoljaxError, match="chunk_size=0"):
        cross_entropy(hidden_BSD, unembedding_DV, targets_BS, mask_BS, chunk_size=0)


@pytest.mark.parametrize("chunk_size", [64, 1024])
def test_on_a_cpu_a_tied_head_in_bfloat16_has_its_gradients_in_one_chunk_and_in_several(chunk_size):
    """One chunk ended in "Unsupported element type for DotThunk", as XLA folded the head's transpose into a product it had approved."""
    B, S, D, V = 2, 64, 32, 256
    key = jax.random.key(0)
    hidden_BSD = jax.random.normal(key, (B, S, D), jnp.bfloat16)
    embedding_VD = jax.random.normal(key, (V, D))
    targets_BS = jnp.broadcast_to(jnp.arange(S), (B, S))
    mask_BS = jnp.ones((B, S), bool)

    def gradients(hidden_BSD):
        def loss(hidden_BSD, embedding_VD):
            return cross_entropy(
                hidden_BSD, embedding_VD.T, targets_BS, mask_BS, chunk_size=chunk_size
            )[0]

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(hidden_BSD, embedding_VD)

    rounded = gradients(hidden_BSD)
    whole = gradients(hidden_BSD.astype(jnp.float32))
    for got, want in zip(rounded, whole, strict=True):
        error = np.linalg.norm(np.float64(got) - want) / np.linalg.norm(want)
        assert error < 0.02, error
