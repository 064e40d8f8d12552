"""The model as pure functions of (config, params, tokens).

B batch, S sequence, D model width, N query heads, K key-value heads, H head width, V vocabulary,
L layers
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from smoljax.errors import SmoljaxError
from smoljax.kernels.attention.api import takes_zigzag
from smoljax.kernels.attention.ring_order import to_sequence, to_zigzag
from smoljax.model.config import ModelConfig
from smoljax.model.decoder import Decoder, attend_to_sequence


def init(config: ModelConfig, key: jax.Array) -> dict:
    """Fresh float32 parameters: matrices normal(0, init_std), gains 1 (SmolLM3: no scaling by depth).

    In other parametrizations than "standard", hidden matrices have a factor on init_std (ModelConfig.multipliers).

    Kernels of all layers are stacked on the first axis. The values depend on `config`'s sizes and on `key`, not on
    how layers are executed nor, under jit, on where the outputs live.
    """
    return nn.unbox(_boxed(config, key))


def param_shapes(config: ModelConfig) -> dict:
    """The tree of `init` as ShapeDtypeStructs."""
    return nn.unbox(_boxed_shapes(config))


def logical_axes(config: ModelConfig) -> dict:
    """The tree of `init` with, for each parameter, the tuple of its axes' logical names."""
    return jax.tree.map(
        lambda box: tuple(box.names),
        _boxed_shapes(config),
        is_leaf=lambda node: isinstance(node, nn.Partitioned),
    )


def forward(
    config: ModelConfig,
    params: dict,
    tokens_BS: jax.Array,
    segment_ids_BS: jax.Array | None = None,
    positions_BS: jax.Array | None = None,
) -> jax.Array:
    """Logits, f32 [B, S, V]. Pure; arguments as for `hidden`."""
    hidden_BSD = hidden(config, params, tokens_BS, segment_ids_BS, positions_BS)
    return jnp.einsum(
        "bsd,dv->bsv",
        hidden_BSD,
        unembedding(config, params).astype(hidden_BSD.dtype),
        preferred_element_type=jnp.float32,
    )


def hidden(
    config: ModelConfig,
    params: dict,
    tokens_BS: jax.Array,
    segment_ids_BS: jax.Array | None = None,
    positions_BS: jax.Array | None = None,
) -> jax.Array:
    """Hidden states after the final norm, [B, S, D] in the compute dtype.

    Args:
      config: the model.
      params: as `init` makes them.
      tokens_BS: int32 token ids below vocab_size (higher ids are not checked under jit).
      segment_ids_BS: int32; a token sees its own segment only. None is one segment. 0 is padding.
      positions_BS: int32 positions for RoPE; None counts from 0 in each row.

    Raises:
      SmoljaxError: the shapes of the arguments do not agree.
    """
    run = _run(config, params, tokens_BS, segment_ids_BS, positions_BS, return_max_logits=False)
    return run[0]


def hidden_and_max_logits(
    config: ModelConfig,
    params: dict,
    tokens_BS: jax.Array,
    segment_ids_BS: jax.Array | None = None,
    positions_BS: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """What `hidden` returns, and the largest attention logit of each head of each layer, f32 [L, N].

    The maxima are over all allowed pairs of the batch (the whole batch, on a mesh), padding left out, of the scores
    that the softmax sees: scaled, after RoPE. smoljax.optim.qk_clip takes them. No gradient flows through them.
    """
    return _run(config, params, tokens_BS, segment_ids_BS, positions_BS, return_max_logits=True)


def unembedding(config: ModelConfig, params: dict) -> jax.Array:
    """The output matrix, f32 [D, V]: the transposed embedding when tied."""
    return params["embedding"].T if config.tie_embeddings else params["head"]


def _run(config, params, tokens_BS, segment_ids_BS, positions_BS, *, return_max_logits):
    """Hidden states, and the maxima or None.

    On a mesh that splits the sequence, the decoder runs in the zig-zag order of columns that ring attention balances its work by;
    all of it but attention treats columns alike. The order is taken here and given back here, so that nobody outside
    (losses over shifted tokens, evaluation, callers of `forward`) can meet it. That costs one exchange of the hidden states for a
    whole pass: a device sends its own, 32 MiB of a sequence of 64k tokens over 8 devices at width 2048 in bfloat16, and gets as many.
    """
    for name, array in (("segment_ids", segment_ids_BS), ("positions", positions_BS)):
        if array is not None and array.shape != tokens_BS.shape:
            raise SmoljaxError(
                f"{name} has shape {array.shape}: expected that of tokens, {tokens_BS.shape}"
            )
    if positions_BS is None:
        positions_BS = jnp.arange(tokens_BS.shape[1])[None]
    zigzag = takes_zigzag(config.attention, seq_len=tokens_BS.shape[1])
    if zigzag:
        tokens_BS, segment_ids_BS, positions_BS = jax.tree.map(
            to_zigzag, (tokens_BS, segment_ids_BS, positions_BS)
        )

    def attend(q_BSNH, k_BSKH, v_BSKH, windowed):
        attended = attend_to_sequence(
            config,
            q_BSNH,
            k_BSKH,
            v_BSKH,
            windowed,
            segment_ids_BS=segment_ids_BS,
            zigzag=zigzag,
            return_max_logits=return_max_logits,
        )
        return attended if return_max_logits else (attended, None)

    hidden_BSD, handed_out = Decoder(config, attend).apply(
        {"params": params}, tokens_BS, positions_BS
    )
    return to_sequence(hidden_BSD) if zigzag else hidden_BSD, handed_out


@functools.cache
def _boxed_shapes(config: ModelConfig) -> dict:
    """`_boxed` with ShapeDtypeStructs; a start of training asks for it four times."""
    return jax.eval_shape(lambda: _boxed(config, jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=0)
def _boxed(config: ModelConfig, key: jax.Array) -> dict:
    """Parameters with their logical axes, traced once for their shapes and for themselves.

    Linen makes them by a forward pass, so give it one token, no attention and no repeated layer.
    """
    config = dataclasses.replace(config, scan_layers=True)
    decoder = Decoder(config, lambda q_BSNH, k_BSKH, v_BSKH, windowed: (q_BSNH, None))
    token_BS = jnp.zeros((1, 1), jnp.int32)
    return decoder.init(key, token_BS, token_BS)["params"]
