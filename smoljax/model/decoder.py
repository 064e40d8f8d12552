"""The decoder: pre-norm layers of grouped-query attention and SwiGLU, scanned over stacked parameters.

Matches transformers' SmolLM3, Llama and Qwen3 in float32 (tests/interop/test_parity.py).

B batch, S sequence, D model width, N query heads, K key-value heads, H head width, R half a head width,
F feed-forward width, V vocabulary, L layers
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from smoljax.kernels import attention, cpu_layers, cpu_matmul
from smoljax.kernels.platform import one_cpu, platform
from smoljax.model.config import ModelConfig
from smoljax.model.rope import rope_tables, rotate
from smoljax.parallel.embedding import look_up
from smoljax.parallel.rules import residual

_SAVE_ATTENTION = jax.checkpoint_policies.save_only_these_names(
    "attention_output", "attention_logsum"
)
_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    # A kernel's products are none that JAX sees.
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _SAVE_ATTENTION
    ),
    "save_attention": _SAVE_ATTENTION,
    "save_projections": jax.checkpoint_policies.save_only_these_names(
        "query", "key", "value", "attention_output", "attention_logsum"
    ),
}


# (q_BSNH, k_BSKH, v_BSKH, windowed) -> (output_BSNH, anything that the layer shall hand out, or None)
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], tuple[jax.Array, object]]


class Decoder(nn.Module):
    """Tokens to hidden states.

    Attributes:
      config: sizes, dtype, execution.
      attend: the attention itself, between the projections; the same function for every layer.
    """

    config: ModelConfig
    attend: Attend

    @nn.compact
    def __call__(self, tokens_BS: jax.Array, positions_BS: jax.Array) -> tuple[jax.Array, object]:
        """Returns hidden states [B, S, D] after the final norm, and what `attend` handed out, stacked by layer."""
        config = self.config
        dtype = jnp.dtype(config.compute_dtype)
        matrix = nn.initializers.normal(config.init_std)
        embedding_VD = self.param(
            "embedding",
            nn.with_logical_partitioning(matrix, ("vocab", "embed")),
            (config.vocab_size, config.hidden_size),
        )
        if not config.tie_embeddings:
            self.param(
                "head",
                nn.with_logical_partitioning(matrix, ("embed", "vocab")),
                (config.hidden_size, config.vocab_size),
            )
        x_BSD = _parted(look_up(embedding_VD, tokens_BS, dtype))
        cos, sin = rope_tables(
            positions_BS,
            head_dim=config.head_dim,
            theta=config.rope_theta,
            scaling=config.rope_scaling,
            dtype=dtype,
        )
        layers = nn.scan(
            _rematerialised(Layer, config),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=config.num_layers,
            unroll=1 if _scans(config) else config.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        kind = LayerKind(
            jnp.array([config.uses_rope(layer) for layer in range(config.num_layers)]),
            jnp.array([layer in config.windowed_layers for layer in range(config.num_layers)])
            if config.windowed_layers
            else None,
        )
        x_BSD, handed_out = layers(config, self.attend, name="layers")(x_BSD, kind, cos, sin)
        gain_D = scaled(
            _gain(self, "final_norm", config.hidden_size), config.forward_multipliers.readout
        )
        return _parted(rms_norm(x_BSD, gain_D, eps=config.norm_eps)), handed_out


class LayerKind(NamedTuple):
    """In what one layer differs from others.

    Attributes:
      uses_rope: bool scalar, whether its queries and keys are turned.
      windowed: bool scalar, whether the sliding window holds; None when no layer has one.
    """

    uses_rope: jax.Array
    windowed: jax.Array | None


class Layer(nn.Module):
    """x + r * attention(norm(x)), then x + r * mlp(norm(x)), with the residual multiplier r (1 but in "completep")."""

    config: ModelConfig
    attend: Attend

    @nn.compact
    def __call__(
        self, x_BSD: jax.Array, kind: LayerKind, cos: jax.Array, sin: jax.Array
    ) -> tuple[jax.Array, object]:
        config = self.config
        gain_D = _gain(self, "attention_norm", config.hidden_size)
        update_BSD, handed_out = Attention(config, self.attend, name="attention")(
            _whole(rms_norm(x_BSD, gain_D, eps=config.norm_eps)), kind, cos, sin
        )
        factor = config.forward_multipliers.residual
        x_BSD = x_BSD + scaled(_parted(update_BSD), factor)
        gain_D = _gain(self, "mlp_norm", config.hidden_size)
        update_BSD = FeedForward(config, name="mlp")(
            _whole(rms_norm(x_BSD, gain_D, eps=config.norm_eps))
        )
        return x_BSD + scaled(_parted(update_BSD), factor), handed_out


class Attention(nn.Module):
    """Projections to heads, rotary embedding, attention, projection back. No biases."""

    config: ModelConfig
    attend: Attend

    @nn.compact
    def __call__(
        self, x_BSD: jax.Array, kind: LayerKind, cos: jax.Array, sin: jax.Array
    ) -> tuple[jax.Array, object]:
        config = self.config
        D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        query_DNH = _matrix(self, "query", (D, N, H), ("embed", "heads", "head_dim"))
        key_DKH = _matrix(self, "key", (D, K, H), ("embed", "kv_heads", "head_dim"))
        value_DKH = _matrix(self, "value", (D, K, H), ("embed", "kv_heads", "head_dim"))
        output_NHD = _matrix(self, "output", (N, H, D), ("heads", "head_dim", "embed"))

        # Without RoPE the angle is 0, and turning by (1, 0) is the exact identity.
        cos = jnp.where(kind.uses_rope, cos, 1)
        sin = jnp.where(kind.uses_rope, sin, 0)
        q_BSNH = project("bsd,dnh->bsnh", x_BSD, query_DNH)
        k_BSKH = project("bsd,dkh->bskh", x_BSD, key_DKH)
        if config.qk_norm:
            q_BSNH = rms_norm(q_BSNH, _gain(self, "query_norm", H, "head_dim"), eps=config.norm_eps)
            k_BSKH = rms_norm(k_BSKH, _gain(self, "key_norm", H, "head_dim"), eps=config.norm_eps)
        q_BSNH, k_BSKH = rotate(q_BSNH, cos, sin), rotate(k_BSKH, cos, sin)
        v_BSKH = project("bsd,dkh->bskh", x_BSD, value_DKH)
        q_BSNH = checkpoint_name(_constrain(q_BSNH, "sequence", "heads", None), "query")
        k_BSKH = checkpoint_name(_constrain(k_BSKH, "sequence", "kv_heads", None), "key")
        v_BSKH = checkpoint_name(_constrain(v_BSKH, "sequence", "kv_heads", None), "value")
        output_BSNH, handed_out = self.attend(q_BSNH, k_BSKH, v_BSKH, kind.windowed)
        # A remat policy saves the output by the name that `attention` gives it.
        output_BSNH = _constrain(output_BSNH, "sequence", "heads", None)
        # Letters in the order of memory: einsum sums over them by the alphabet, and with "nh" a CPU turned the matrix around
        # for every token that is decoded.
        return project("bsgh,ghd->bsd", output_BSNH, output_NHD), handed_out


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate x) * up x). No biases."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        D, F = self.config.hidden_size, self.config.intermediate_size
        gate_DF = _matrix(self, "gate", (D, F), ("embed", "mlp"))
        up_DF = _matrix(self, "up", (D, F), ("embed", "mlp"))
        down_FD = _matrix(self, "down", (F, D), ("mlp", "embed"))
        if one_cpu() and isinstance(gate_DF, jax.Array | cpu_matmul.Turned):
            rows = x_BSD.reshape(-1, D)
            return cpu_layers.swiglu(rows, gate_DF, up_DF, down_FD).reshape(x_BSD.shape)
        h_BSF = jax.nn.silu(project("bsd,df->bsf", x_BSD, gate_DF))
        h_BSF *= project("bsd,df->bsf", x_BSD, up_DF)
        return project("bsf,fd->bsd", _constrain(h_BSF, "sequence", "mlp"), down_FD)


def project(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """jnp.einsum(spec, x, w), which contracts the last axes of x with the first of w.

    On a single CPU device it is a product of two matrices, and the gradient of w is x^T g. For an einsum XLA copies one of the two
    transposed there, the wide gradient of the feed-forward layer too, and that takes longer than what the product gains. In
    bfloat16 all three products are summed in float32 (smoljax.kernels.cpu_matmul).
    """
    if not one_cpu():
        return jnp.einsum(spec, x, w)
    contracted = len(set.intersection(*map(set, spec.partition("->")[0].split(","))))
    rows = x.reshape(-1, math.prod(w.shape[:contracted]))
    turned = isinstance(w, cpu_matmul.Turned)
    matrix = w if turned else jnp.asarray(w).reshape(rows.shape[1], -1)
    return _matmul(rows, matrix).reshape(*x.shape[:-contracted], *w.shape[contracted:])


@jax.custom_vjp
def _matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    return cpu_matmul.matmul(x, w).astype(x.dtype)


def _matmul_forward(x, w):
    # Not by a call of _matmul, in which a remat policy would not see the product.
    return cpu_matmul.matmul(x, w).astype(x.dtype), (x, w)


def _matmul_backward(operands, g):
    x, w = operands
    dx = cpu_matmul.matmul_transposed(g, w).astype(x.dtype)
    return dx, cpu_matmul.transposed_matmul(x, g).astype(w.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward)


def rms_norm(x: jax.Array, gain_D: jax.Array, *, eps: float) -> jax.Array:
    """x / rms(x) * gain over the last axis: the mean square in f32, cast back to x's dtype, then the gain (as transformers does)."""
    if one_cpu():
        rows = x.reshape(-1, x.shape[-1])
        return cpu_layers.rms_norm(rows, jnp.asarray(gain_D), eps).reshape(x.shape)
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    gain = jnp.expand_dims(gain_D.astype(x.dtype), range(x.ndim - 1))
    return (x32 * scale).astype(x.dtype) * gain


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """x times a factor that x's dtype need not hold; x itself when it is 1."""
    return x if factor == 1 else (x.astype(jnp.float32) * factor).astype(x.dtype)


def attend_to_sequence(
    config: ModelConfig,
    q_BSNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    windowed: jax.Array | None,
    *,
    segment_ids_BS: jax.Array | None,
    zigzag: bool = False,
    return_max_logits: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Causal attention of a sequence to itself, [B, S, N, H], and as asked its maxima, f32 [N] (smoljax.kernels.attention).

    Where layers differ in their window, both kinds are compiled.
    """

    def within(window):
        return lambda q_BSNH, k_BSKH, v_BSKH: attention(
            q_BSNH,
            k_BSKH,
            v_BSKH,
            segment_ids=segment_ids_BS,
            window=window,
            scale=config.attention_scale,
            implementation=config.attention,
            return_max_logits=return_max_logits,
            zigzag=zigzag,
        )

    if windowed is None:
        return within(None)(q_BSNH, k_BSKH, v_BSKH)
    return jax.lax.cond(
        windowed, within(config.sliding_window), within(None), q_BSNH, k_BSKH, v_BSKH
    )


def _scans(config: ModelConfig) -> bool:
    """Whether the layers run in a loop: as the config says, and by itself everywhere but on a CPU."""
    return platform() != "cpu" if config.scan_layers is None else config.scan_layers


def _rematerialised(layer: type[nn.Module], config: ModelConfig) -> type[nn.Module]:
    if config.remat == "none":
        return layer
    # In a loop nothing can be shared between forward and backward, so the guard against it would only slow down.
    return nn.remat(layer, policy=_POLICIES[config.remat], prevent_cse=not _scans(config))


def _matrix(module: nn.Module, name: str, shape: tuple, axes: tuple[str, ...]) -> jax.Array:
    config = module.config
    if isinstance(given := module.get_variable("params", name), cpu_matmul.Turned):
        return given  # Of smoljax.model.cache.prepare, in the compute dtype.
    # Initial values are the same for every rule of update.
    relative_std = config.multipliers("adamw")["hidden"].init_std
    initializer = nn.initializers.normal(config.init_std * relative_std)
    matrix = module.param(name, nn.with_logical_partitioning(initializer, axes), shape)
    return matrix.astype(config.compute_dtype)


def _gain(module: nn.Module, name: str, width: int, axis: str = "embed") -> jax.Array:
    ones = nn.with_logical_partitioning(nn.initializers.ones, (axis,))
    return module.param(name, ones, (width,))


def _whole(x_BSD: jax.Array) -> jax.Array:
    """The residual stream on its way into a block: gathered along the sequence over tensor. Its gradient is summed and parted again."""
    return _constrain(_parted(x_BSD), "sequence", "embed")


def _parted(x_BSD: jax.Array) -> jax.Array:
    """What a block adds to the residual stream: summed over tensor, each device keeping a part of the sequence."""
    return _constrain(x_BSD, residual(x_BSD.shape[1]), "embed")


def _constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins an activation [B, S, ...] to where `parallel` puts these logical axes; nothing outside a mesh."""
    axes = tuple(None if name is None else f"activation_{name}" for name in ("batch", *names))
    return nn.with_logical_constraint(x, axes)
