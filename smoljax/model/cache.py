"""Decoding one token at a time from a key-value cache.

Rows of different lengths are padded on the left, so that all write their next token into the same cache slot.

B batch, P prompt slots, T cache slots, N query heads, K key-value heads, G query heads per key-value head,
H head width, D model width, V vocabulary
"""

import jax
import jax.numpy as jnp

from smoljax.model.config import ModelConfig
from smoljax.model.decoder import Decoder, Layer, LayerKind, attend_to_sequence, rms_norm
from smoljax.model.functions import unembedding
from smoljax.model.rope import rope_tables

Cache = tuple[tuple[jax.Array, jax.Array], ...]  # Of each layer: keys and values, [B, K, T, H].


def prepare(config: ModelConfig, params: dict) -> dict:
    """Parameters as decoding reads them, once per parameter and token: layers apart, the head as rows of D, all in
    the compute dtype. (A tied head used as `embedding.T` would be transposed anew for every token.)"""
    params = jax.tree.map(lambda leaf: leaf.astype(config.compute_dtype), params)
    return {
        "embedding": params["embedding"],
        "layers": tuple(
            jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
            for i in range(config.num_layers)
        ),
        "final_norm": params["final_norm"],
        "head": unembedding(config, params),
    }


def prefill(
    config: ModelConfig, params: dict, tokens_BP: jax.Array, first_B: jax.Array, *, slots: int
) -> tuple[jax.Array, Cache]:
    """Reads the prompts.

    Args:
      config: the model.
      params: as `init` makes them.
      tokens_BP: int32 prompts, padded on the left.
      first_B: int32, the slot of each row's first real token.
      slots: T, at least P.

    Returns:
      Logits after the last token, f32 [B, V], and the cache with slots 0 to P - 1 filled.
    """
    slot_1P = jnp.arange(tokens_BP.shape[1])[None]
    positions_BP = jnp.maximum(slot_1P - first_B[:, None], 0)
    segment_ids_BP = (slot_1P >= first_B[:, None]).astype(jnp.int32)

    def attend(q_BPNH, k_BPKH, v_BPKH, windowed):
        output_BPNH = attend_to_sequence(
            config, q_BPNH, k_BPKH, v_BPKH, windowed, segment_ids_BS=segment_ids_BP
        )
        return output_BPNH, (_to_slots(k_BPKH, slots), _to_slots(v_BPKH, slots))

    decoder = Decoder(config, attend)
    hidden_BPD, (keys, values) = decoder.apply({"params": params}, tokens_BP, positions_BP)
    head_DV = unembedding(config, params).astype(hidden_BPD.dtype)
    logits_BV = jnp.matmul(hidden_BPD[:, -1], head_DV, preferred_element_type=jnp.float32)
    return logits_BV, tuple((keys[i], values[i]) for i in range(config.num_layers))


def decode(
    config: ModelConfig,
    prepared: dict,
    cache: Cache,
    token_B: jax.Array,
    slot: jax.Array,
    first_B: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Reads one more token of each row.

    Args:
      config: the model.
      prepared: of `prepare`.
      cache: filled below `slot`.
      token_B: int32.
      slot: int32 scalar, the cache slot that the tokens take.
      first_B: int32, the slot of each row's first real token.

    Returns:
      Logits after the token, f32 [B, V], and the cache with `slot` filled.
    """
    cos, sin = rope_tables(
        (slot - first_B)[:, None],
        head_dim=config.head_dim,
        theta=config.rope_theta,
        scaling=config.rope_scaling,
        dtype=jnp.dtype(config.compute_dtype),
    )
    slot_1T = jnp.arange(cache[0][0].shape[2])[None]
    visible_BT = (slot_1T >= first_B[:, None]) & (slot_1T <= slot)
    if config.sliding_window is not None:
        near_BT = visible_BT & (slot_1T > slot - config.sliding_window)
    x_B1D = prepared["embedding"][token_B][:, None]
    filled = []
    for i, (params, (keys_BKTH, values_BKTH)) in enumerate(zip(prepared["layers"], cache)):
        reach_BT = visible_BT if config.window(i) is None else near_BT

        def attend(
            q_B1NH,
            k_B1KH,
            v_B1KH,
            windowed,
            keys_BKTH=keys_BKTH,
            values_BKTH=values_BKTH,
            reach_BT=reach_BT,
        ):
            del windowed  # The layer is known here.
            at = (0, 0, slot, 0)
            keys_BKTH = jax.lax.dynamic_update_slice(keys_BKTH, jnp.swapaxes(k_B1KH, 1, 2), at)
            values_BKTH = jax.lax.dynamic_update_slice(values_BKTH, jnp.swapaxes(v_B1KH, 1, 2), at)
            output_B1NH = _attend_to_cache(q_B1NH, keys_BKTH, values_BKTH, reach_BT)
            return output_B1NH, (keys_BKTH, values_BKTH)

        layer = Layer(config, attend)
        kind = LayerKind(config.uses_rope(i), None)
        x_B1D, kept = layer.apply({"params": params}, x_B1D, kind, cos, sin)
        filled.append(kept)
    x_B1D = rms_norm(x_B1D, prepared["final_norm"], eps=config.norm_eps)
    logits_BV = jnp.matmul(x_B1D[:, 0], prepared["head"], preferred_element_type=jnp.float32)
    return logits_BV, tuple(filled)


def _attend_to_cache(q_B1NH, keys_BKTH, values_BKTH, visible_BT):
    B, _, N, H = q_B1NH.shape
    K = keys_BKTH.shape[1]
    q_BKGH = (q_B1NH * H**-0.5).reshape(B, K, N // K, H)
    scores_BKGT = jnp.einsum(
        "bkgh,bkth->bkgt", q_BKGH, keys_BKTH, preferred_element_type=jnp.float32
    )
    scores_BKGT = jnp.where(visible_BT[:, None, None], scores_BKGT, -jnp.inf)
    weights_BKGT = jax.nn.softmax(scores_BKGT, axis=-1).astype(values_BKTH.dtype)
    return jnp.einsum("bkgt,bkth->bkgh", weights_BKGT, values_BKTH).reshape(B, 1, N, H)


def _to_slots(x_BPKH: jax.Array, slots: int) -> jax.Array:
    """[B, P, K, H] to [B, K, T, H], where a query reads one head's keys in one piece."""
    x_BKPH = jnp.swapaxes(x_BPKH, 1, 2)
    return jnp.pad(x_BKPH, ((0, 0), (0, 0), (0, slots - x_BKPH.shape[2]), (0, 0)))
