"""Output head and cross-entropy in one, over tiles of the vocabulary: for a batch that is split over devices.

A chunk of tokens needs the whole head, and its gradient of the head is a sum over devices: on a mesh both are exchanged
for every chunk. A tile of the vocabulary needs its own columns alone and gives their whole gradient at once, so that a
column is gathered once for each of two passes, and its gradient summed over devices once. The price is that logits are
computed twice: the first pass finds the log-normaliser (online, arXiv:1805.02867, section 3), the second the gradients.

B batch, S sequence, D model width, V vocabulary, T tiles, W words of a tile, E targets of a position
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def sums(
    num_tiles, z_loss, hidden_BSD, unembedding_DV, targets_BS, mask_BS, probabilities_BSE=None
):
    """Sum in nats with z-loss, and the z-loss in it: f32 scalars.

    Only the first has a gradient, by hidden_BSD and unembedding_DV; that of the z-loss is taken to be 0, since it is a
    metric.

    Args:
      num_tiles: pieces of the vocabulary; the logits of all tokens to one piece exist at once.
      z_loss: weight of the squared log-normaliser.
      hidden_BSD: final hidden states; their dtype is that of the products. Logits and sums are f32.
      unembedding_DV: output matrix; its gradient is summed in f32.
      targets_BS: int32 token ids; [B, S, E] with probabilities_BSE.
      mask_BS: bool; False leaves a position out.
      probabilities_BSE: f32, of each of E targets, or None: 1 for the one target.
    """
    return _sums_forward(
        num_tiles, z_loss, hidden_BSD, unembedding_DV, targets_BS, mask_BS, probabilities_BSE
    )[0]


def at_targets(values, targets_BS, probabilities_BSE, word_11W) -> jax.Array:
    """Values [B, S, W or 1] times the probability of each word as a target, 0 where it is none (values may be infinite there).

    Compares every word with each of E targets, a few at most: one fused pass, without an array of [B, S, E, W].
    """
    if probabilities_BSE is None:
        return jnp.where(targets_BS[..., None] == word_11W, values, 0)
    share_BSW = sum(
        jnp.where(targets_BS[..., e, None] == word_11W, probabilities_BSE[..., e, None], 0)
        for e in range(probabilities_BSE.shape[2])
    )
    return jnp.where(share_BSW > 0, share_BSW * values, 0)


def _sums_forward(
    num_tiles, z_loss, hidden_BSD, unembedding_DV, targets_BS, mask_BS, probabilities_BSE=None
):
    V = unembedding_DV.shape[1]
    tiles = _split(unembedding_DV.astype(hidden_BSD.dtype), num_tiles)

    def add(so_far, tile):
        max_BS, sum_BS, target_BS = so_far
        tile = _gathered(tile)
        logits_BSW, word_11W = _logits(hidden_BSD, tile, V)
        new_max_BS = jnp.maximum(max_BS, jnp.max(logits_BSW, axis=-1))
        exp_BSW = jnp.exp(logits_BSW - new_max_BS[..., None])
        sum_BS = sum_BS * jnp.exp(max_BS - new_max_BS) + jnp.sum(exp_BSW, axis=-1)
        named_BSW = at_targets(logits_BSW, targets_BS, probabilities_BSE, word_11W)
        target_BS += jnp.sum(named_BSW, axis=-1)
        return (new_max_BS, sum_BS, target_BS), None

    zero_BS = jnp.zeros(mask_BS.shape, jnp.float32)
    (max_BS, sum_BS, target_BS), _ = jax.lax.scan(add, (zero_BS - jnp.inf, zero_BS, zero_BS), tiles)
    log_normaliser_BS = jnp.log(sum_BS) + max_BS
    weight_BS = mask_BS.astype(jnp.float32)
    z = jnp.sum(weight_BS * z_loss * jnp.square(log_normaliser_BS))
    nats = jnp.sum(weight_BS * (mass(probabilities_BSE) * log_normaliser_BS - target_BS)) + z
    saved = (hidden_BSD, unembedding_DV, targets_BS, mask_BS, probabilities_BSE, log_normaliser_BS)
    return (nats, z), saved


def _sums_backward(num_tiles, z_loss, saved, cotangents):
    hidden_BSD, unembedding_DV, targets_BS, mask_BS, probabilities_BSE, log_normaliser_BS = saved
    D, V = unembedding_DV.shape
    tiles = _split(unembedding_DV.astype(hidden_BSD.dtype), num_tiles)
    weight_BS = mask_BS.astype(jnp.float32) * cotangents[0]
    factor_BS = weight_BS * (mass(probabilities_BSE) + 2 * z_loss * log_normaliser_BS)

    def add(dhidden_BSD, tile):
        tile = _gathered(tile)
        logits_BSW, word_11W = _logits(hidden_BSD, tile, V)
        dlogits_BSW = jnp.exp(logits_BSW - log_normaliser_BS[..., None]) * factor_BS[..., None]
        dlogits_BSW -= at_targets(weight_BS[..., None], targets_BS, probabilities_BSE, word_11W)
        dlogits_BSW = dlogits_BSW.astype(hidden_BSD.dtype)
        dhidden_BSD += _product("bsw,dw->bsd", dlogits_BSW, tile[0])
        return dhidden_BSD, _product("bsd,bsw->dw", hidden_BSD, dlogits_BSW)

    zero_BSD = jnp.zeros(hidden_BSD.shape, jnp.float32)
    dhidden_BSD, dhead_TDW = jax.lax.scan(add, zero_BSD, tiles)
    dhead_DV = jnp.moveaxis(dhead_TDW, 0, 2).reshape(D, -1)[:, :V]
    dhidden_BSD = dhidden_BSD.astype(hidden_BSD.dtype)
    return dhidden_BSD, dhead_DV.astype(unembedding_DV.dtype), None, None, None


sums.defvjp(_sums_forward, _sums_backward)


def _split(head_DV, num_tiles: int):
    """[D, V] to [T, D, W], and the words of each tile [T, W], V and more in a tail of zeros.

    Tile t takes every T-th word, so that every tile uses every device of a mesh that splits the vocabulary.
    """
    D, V = head_DV.shape
    width = -(-V // num_tiles)
    padded = jnp.pad(head_DV, ((0, 0), (0, width * num_tiles - V)))
    head_TDW = jnp.moveaxis(padded.reshape(D, width, num_tiles), 2, 0)
    return head_TDW, jnp.arange(width * num_tiles).reshape(width, num_tiles).T


def _gathered(tile):
    """A tile for all products with it. A mesh axis that splits the vocabulary splits tokens too: columns go to the tokens."""
    head_DW, word_W = tile
    if jax.sharding.get_abstract_mesh().shape.get("tensor", 1) > 1:
        head_DW = jax.lax.with_sharding_constraint(head_DW, PartitionSpec(None, None))
    return head_DW, word_W


def mass(probabilities_BSE):
    """What all targets of a position have together."""
    return 1 if probabilities_BSE is None else jnp.sum(probabilities_BSE, axis=-1)


def _logits(hidden_BSD, tile, V: int):
    """Logits of a tile, f32, minus infinity in the filled tail; and its words."""
    head_DW, word_W = tile
    logits_BSW = _product("bsd,dw->bsw", hidden_BSD, head_DW)
    word_11W = word_W[None, None]
    return jnp.where(word_11W < V, logits_BSW, -jnp.inf), word_11W


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
