"""Decoding one token at a time from a key-value cache.

Rows of different lengths are padded on the left, so that all write their next token into the same cache slot.

B batch, P prompt slots, T cache slots, N query heads, K key-value heads, G query heads per key-value head,
H head width, D model width, V vocabulary
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from smoljax.kernels import attention, cpu_matmul
from smoljax.kernels.platform import one_cpu
from smoljax.model.config import ModelConfig
from smoljax.model.decoder import Layer, LayerKind, rms_norm, scaled
from smoljax.model.rope import rope_tables

CACHE_DTYPES = ("float32", "bfloat16", "int8")
# Numbers of a matrix: between those of the quickstart's model and those of SmolLM2-135M.
_TURNED_FROM = 2**18


class Prepared(NamedTuple):
    """Parameters as decoding reads them, in the compute dtype.

    Attributes:
      embedding: [V, D].
      layers: one tree per layer; on one CPU device large matrices of bfloat16 are cpu_matmul.Turned.
      final_norm: [D].
      head: [V, D].
    """

    embedding: jax.Array
    layers: tuple[dict, ...]
    final_norm: jax.Array
    head: jax.Array


class Stored(NamedTuple):
    """Keys or values of one layer.

    Attributes:
      values: [B, K, T, H], keys also [B, K, H, T] (`_turned`); a single row without B; int8 counts steps of `scale`.
      scale: f32 [B, K, T], or [K, T], the step of each token and head of an int8 cache; None for other dtypes.
    """

    # A single row has no axis of its own: XLA would take the axis off for the matmul, and on a CPU it then keeps two
    # versions of the cache and copies both for every token.

    values: jax.Array
    scale: jax.Array | None


Cache = tuple[tuple[Stored, Stored], ...]  # Of each layer: keys and values.


def prepare(config: ModelConfig, params: dict) -> Prepared:
    """Layers apart, the head as rows of D, the readout's factor in the final gain: once, and not for every token."""
    gain_D = scaled(params["final_norm"], config.forward_multipliers.readout)
    # A parameter is whatever is not a dict: a quantised one (smoljax.interop.quantize) is cast as a whole.
    params = jax.tree.map(
        lambda leaf: leaf.astype(config.compute_dtype),
        {**params, "final_norm": gain_D},
        is_leaf=lambda node: not isinstance(node, dict),
    )
    layers = tuple(
        jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(config.num_layers)
    )
    if one_cpu():
        layers = jax.tree.map_with_path(
            _turn, layers, is_leaf=lambda node: not isinstance(node, dict | tuple)
        )
    head = params["embedding"] if config.tie_embeddings else params["head"].T
    return Prepared(params["embedding"], layers, params["final_norm"], head)


def _turn(path, w):
    """A layer's large matrix of bfloat16 as a product with few rows reads it: of a 135M model, 1.4 times as many tokens/s for one
    prompt. Smaller ones lie in the processor's cache, where turning them gains nothing, and quantised ones stay as they are."""
    if not isinstance(w, jax.Array) or w.dtype != jnp.bfloat16 or w.size < _TURNED_FROM:
        return w
    return cpu_matmul.turned(w, contracted=2 if path[-1].key == "output" else 1)


def prefill(
    config: ModelConfig,
    prepared: Prepared,
    tokens_BP: jax.Array,
    first_B: jax.Array,
    *,
    slots: int,
    cache_dtype: str | None = None,
) -> tuple[jax.Array, Cache]:
    """Reads the prompts.

    Args:
      config: the model.
      prepared: of `prepare`.
      tokens_BP: int32 prompts, padded on the left.
      first_B: int32, the slot of each row's first real token.
      slots: T, at least P.
      cache_dtype: one of CACHE_DTYPES; None is the compute dtype. The prompt itself is read unrounded.

    Returns:
      Logits after the last token, f32 [B, V], and the cache with slots 0 to P - 1 filled.
    """
    slot_1P = jnp.arange(tokens_BP.shape[1])[None]
    segment_ids_BP = (slot_1P >= first_B[:, None]).astype(jnp.int32)
    positions_BP = jnp.maximum(slot_1P - first_B[:, None], 0)

    def attend(i, q_BPNH, k_BPKH, v_BPKH):
        output_BPNH = attention(
            q_BPNH,
            k_BPKH,
            v_BPKH,
            segment_ids=segment_ids_BP,
            window=config.window(i),
            scale=config.attention_scale,
            implementation=config.attention,
        )
        dtype = cache_dtype or config.compute_dtype
        keys, values = (_to_slots(x, slots, dtype) for x in (k_BPKH, v_BPKH))
        return output_BPNH, (_turned(keys, q_BPNH.dtype), values)

    x_BPD, cache = _layers(config, prepared, tokens_BP, positions_BP, attend)
    return _logits(config, prepared, x_BPD[:, -1]), cache


def decode(
    config: ModelConfig,
    prepared: Prepared,
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
    slot_1T = jnp.arange(cache[0][1].values.shape[-2])[None]
    visible_BT = (slot_1T >= first_B[:, None]) & (slot_1T <= slot)

    def attend(i, q_B1NH, k_B1KH, v_B1KH):
        old_keys, old_values = cache[i]
        new_keys = _turned(_new(k_B1KH, old_keys), q_B1NH.dtype)
        key_axis = -1 if _keeps_keys_turned(q_B1NH.dtype) else -2
        keys = _write(old_keys, new_keys, slot, axis=key_axis)
        values = _write(old_values, _new(v_B1KH, old_values), slot, axis=-2)
        window = config.window(i)
        reach_BT = visible_BT if window is None else visible_BT & (slot_1T > slot - window)
        output_B1NH = _attend_to_cache(q_B1NH * config.attention_scale, keys, values, reach_BT)
        return output_B1NH, (keys, values)

    positions_B1 = (slot - first_B)[:, None]
    x_B1D, cache = _layers(config, prepared, token_B[:, None], positions_B1, attend)
    return _logits(config, prepared, x_B1D[:, 0]), cache


def _layers(config, prepared, tokens_BS, positions_BS, attend) -> tuple[jax.Array, Cache]:
    """All layers, one after the other; `attend(i, q, k, v)` is the attention of layer i and hands out its cache."""
    cos, sin = rope_tables(
        positions_BS,
        head_dim=config.head_dim,
        theta=config.rope_theta,
        scaling=config.rope_scaling,
        dtype=jnp.dtype(config.compute_dtype),
    )
    x_BSD = prepared.embedding[tokens_BS]
    cache = []
    for i, params in enumerate(prepared.layers):
        layer = Layer(config, lambda q, k, v, windowed, i=i: attend(i, q, k, v))
        kind = LayerKind(config.uses_rope(i), None)
        x_BSD, filled = layer.apply({"params": params}, x_BSD, kind, cos, sin)
        cache.append(filled)
    return x_BSD, tuple(cache)


def _logits(config, prepared, x_BD) -> jax.Array:
    x_BD = rms_norm(x_BD, prepared.final_norm, eps=config.norm_eps)
    if one_cpu() and isinstance(prepared.head, jax.Array):
        return cpu_matmul.matmul(x_BD, cpu_matmul.Turned(prepared.head, prepared.head.shape[::-1]))
    return jnp.einsum("bd,vd->bv", x_BD, prepared.head, preferred_element_type=jnp.float32)


def _attend_to_cache(q_B1NH, keys: Stored, values: Stored, visible_BT) -> jax.Array:
    """The queries are scaled already; keys and values are as kept."""
    # Letters as for several rows; a single one has no B.
    B, _, N, H = q_B1NH.shape
    K = values.values.shape[-3]
    dtype = q_B1NH.dtype
    q_BKGH = _rows(q_B1NH.reshape(B, K, N // K, H))
    scores_BKGT = jnp.einsum(
        "...kgh,...kht->...kgt" if _keeps_keys_turned(dtype) else "...kgh,...kth->...kgt",
        q_BKGH,
        keys.values.astype(dtype),
        preferred_element_type=jnp.float32,
    )
    # The step of an int8 token is the same for all of H, so it leaves the sums.
    if keys.scale is not None:
        scores_BKGT = scores_BKGT * keys.scale[..., None, :]
    visible_B11T = _rows(visible_BT[:, None, None])
    scores_BKGT = jnp.where(visible_B11T, scores_BKGT, -jnp.inf)
    weights_BKGT = jax.nn.softmax(scores_BKGT, axis=-1)
    if values.scale is not None:
        weights_BKGT = weights_BKGT * values.scale[..., None, :]
    output_BKGH = jnp.einsum(
        "...kgt,...kth->...kgh", weights_BKGT.astype(dtype), values.values.astype(dtype)
    )
    return output_BKGH.reshape(B, 1, N, H)


def _rows(x: jax.Array) -> jax.Array:
    """Without the first axis when it is of length 1."""
    return x[0] if x.shape[0] == 1 else x


def _keeps_keys_turned(dtype) -> bool:
    """Whether keys are kept as [B, K, H, T]: for float32 on one CPU device.

    Its library multiplies q [G, H] by [H, T] as it is; of [T, H] it writes a transposed copy for every token. (bfloat16 it packs
    either way.)
    """
    return one_cpu() and jnp.dtype(dtype) == jnp.float32


def _turned(keys: Stored, dtype) -> Stored:
    """Keys [B, K, T, H] as the cache keeps them; `dtype` is the compute dtype."""
    if not _keeps_keys_turned(dtype):
        return keys
    return keys._replace(values=jnp.swapaxes(keys.values, -1, -2))


def _new(x_B1KH: jax.Array, old: Stored) -> Stored:
    return _store(jnp.swapaxes(x_B1KH, 1, 2), str(old.values.dtype))


def _write(old: Stored, new: Stored, slot: jax.Array, *, axis: int) -> Stored:
    """`axis` is that of the slots in `values`."""
    values = _put(old.values, new.values, slot, axis)
    return Stored(values, None if old.scale is None else _put(old.scale, new.scale, slot, -1))


def _put(old: jax.Array, new: jax.Array, slot: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis % old.ndim)


def _to_slots(x_BPKH: jax.Array, slots: int, dtype: str) -> Stored:
    """[B, P, K, H] to [B, K, T, H], where a query reads one head's keys in one piece."""
    stored = _store(jnp.swapaxes(x_BPKH, 1, 2), dtype)
    room, slot_axis = slots - x_BPKH.shape[1], stored.values.ndim - 2
    return jax.tree.map(
        lambda x: jnp.pad(x, [(0, room if axis == slot_axis else 0) for axis in range(x.ndim)]),
        stored,
    )


def _store(x_BKTH: jax.Array, dtype: str) -> Stored:
    """Rounds to `dtype`: int8 symmetrically, so that the largest value of a token and head becomes 127."""
    names = ("activation_batch", "activation_kv_heads", None, None)
    x_BKTH = nn.with_logical_constraint(x_BKTH, names)
    if dtype != "int8":
        return Stored(_rows(x_BKTH.astype(dtype)), None)
    x_BKTH = x_BKTH.astype(jnp.float32)
    scale_BKT = jnp.max(jnp.abs(x_BKTH), axis=-1) / 127
    step_BKT1 = jnp.where(scale_BKT > 0, scale_BKT, 1)[..., None]
    return Stored(_rows(jnp.round(x_BKTH / step_BKT1).astype(jnp.int8)), _rows(scale_BKT))
