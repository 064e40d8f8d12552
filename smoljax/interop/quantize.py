"""Quantised weights: after training (int8, int4, w8a8), and training that expects them (QAT).

    quantized = quantize.quantize(config, params, "int4")
    logits_BSV = quantize.forward(config, quantized, tokens_BS)
    new_ids = quantize.generate(config, quantized, prompts, max_new_tokens=64)
    quantize.save("model-int4", config, quantized);  config, quantized = quantize.load("model-int4")

What rounds and multiplies is qwix. It quantises a Linen model by patching jnp.einsum while the model is traced, which
finds a weight when it is a parameter used as it is: in this decoder it misses the embedding look-up, the tied head, and
(silently, in qwix 0.1.8) `gate` and `up`, which pass through a custom_vjp. So weights are quantised as parameters instead, all of them,
and qwix's patching serves for activations only.

B batch, S sequence, V vocabulary
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from smoljax import model
from smoljax.errors import SmoljaxError
from smoljax.interop.quantized_files import load, save
from smoljax.interop.quantized_matrix import (
    CONTRACTED,
    QuantizedMatrix,
    int8_activations,
    integer_einsum,
    legal_group_sizes,
    quantize_matrix,
    qwix,
    straight_through,
)
from smoljax.model import ModelConfig

__all__ = [
    "SCHEMES",
    "QuantizedMatrix",
    "dequantize",
    "fake_quantized",
    "forward",
    "generate",
    "integer_matmuls",
    "load",
    "quantize",
    "save",
]

_GROUP_SIZES = (32, 16, 8)  # What "int4" tries in this order when no size is asked for.


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a model is quantised.

    Attributes:
      bits: of a weight.
      grouped: scales are shared by `group_size` weights in a row, else by an output channel.
      activations: "int8" when the layers multiply integers, else None.
    """

    bits: int
    grouped: bool = False
    activations: str | None = None


SCHEMES = {
    "int8": Scheme(bits=8),
    "int4": Scheme(bits=4, grouped=True),
    "w8a8": Scheme(bits=8, activations="int8"),
}


def quantize(
    config: ModelConfig, params: dict, scheme: str, *, group_size: int | None = None
) -> dict:
    """Post-training quantisation, round to nearest.

    Args:
      config: the model.
      params: float32 parameters, as `smoljax.model.init` makes them.
      scheme: a key of SCHEMES. "int8": one scale per output channel. "int4": one per group of weights. "w8a8":
        as "int8", and every token's activations in int8 before a layer's matmul (embedding and head: weights only).
      group_size: of "int4", weights per scale; None takes the first of 32, 16 and 8 that the model's sizes allow.

    Returns:
      The tree of `params` with QuantizedMatrix in the place of every matrix; gains stay as they are. The functions of
      smoljax.model read it as it is (w8a8 only through this module).

    Raises:
      SmoljaxError: an unknown scheme, a group size that does not divide, a parameter that is not finite, or one that is
        quantised already.
    """
    rules = _scheme(scheme)
    group_size = _group_size(config, rules, group_size)
    _require_finite(params)

    def leaf(path, w):
        name = path[-1].key
        if name not in CONTRACTED:
            return w
        qvalue, scale = _quantize_matrix(
            w, bits=rules.bits, contracted=CONTRACTED[name], group_size=group_size
        )
        activations = None if name in ("embedding", "head") else rules.activations
        return QuantizedMatrix(qvalue, scale, activations=activations)

    return jax.tree_util.tree_map_with_path(leaf, params)


def dequantize(quantized: dict) -> dict:
    """Plain float32 parameters with the rounded values."""
    return jax.tree.map(
        lambda node: node.dequantize() if isinstance(node, QuantizedMatrix) else node,
        quantized,
        is_leaf=lambda node: isinstance(node, QuantizedMatrix),
    )


def fake_quantized(
    config: ModelConfig, params: dict, scheme: str, *, group_size: int | None = None
) -> dict:
    """Quantisation-aware training: parameters that compute as if quantised, and pass gradients to `params` unrounded.

    Put it in front of the model inside the loss, `hidden(config, fake_quantized(config, params, "int4"), tokens)`, and
    quantise the trained parameters with the same scheme: they compute the same. For "w8a8", activations are rounded
    too, inside `integer_matmuls`. Pure, jit-able; arguments and errors as for `quantize` (values are not checked).
    """
    rules = _scheme(scheme)
    group_size = _group_size(config, rules, group_size)

    def leaf(path, w):
        name = path[-1].key
        if name not in CONTRACTED:
            return w
        qvalue, scale = quantize_matrix(
            jax.lax.stop_gradient(w),
            bits=rules.bits,
            contracted=CONTRACTED[name],
            group_size=group_size,
        )
        rounded = straight_through(w, QuantizedMatrix(qvalue, scale).dequantize())
        plain = rules.activations is None or name in ("embedding", "head")
        return rounded if plain else FakeQuantizedMatrix(rounded)

    return jax.tree_util.tree_map_with_path(leaf, params)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FakeQuantizedMatrix:
    """A matrix with rounded values whose matmuls round their activations too, both straight-through."""

    rounded: jax.Array

    shape = property(lambda self: self.rounded.shape)
    ndim = property(lambda self: self.rounded.ndim)

    def astype(self, dtype) -> "FakeQuantizedMatrix":
        """The same in another dtype."""
        return FakeQuantizedMatrix(self.rounded.astype(dtype))

    def __jax_array__(self) -> jax.Array:
        raise SmoljaxError(
            "these weights round activations too (w8a8): wrap the loss in smoljax.interop.quantize.integer_matmuls"
        )

    def einsum(self, spec: str, x: jax.Array) -> jax.Array:
        """x, rounded as int8, times the matrix."""
        rounded = qwix.dequantize(int8_activations(spec, jax.lax.stop_gradient(x)))
        return jnp.einsum(spec, straight_through(x, rounded.astype(x.dtype)), self.rounded)


def integer_matmuls(function: Callable) -> Callable:
    """`function` with int8 activations wherever a weight asks for them (scheme "w8a8"); others run as ever.

    For functions that run a smoljax model, jitted inside or not. Where they jit, do so inside of this wrapper or around
    it; either way the weights' tree tells the programs apart.
    """

    @functools.wraps(function)
    def call(*args, **kwargs):
        run = qwix.quantize_model(_Call(functools.partial(function, *args, **kwargs)), _PROVIDER)
        return run.apply({})

    return call


def forward(
    config: ModelConfig,
    quantized: dict,
    tokens_BS: jax.Array,
    segment_ids_BS: jax.Array | None = None,
    positions_BS: jax.Array | None = None,
) -> jax.Array:
    """Logits, f32 [B, S, V]: smoljax.model.forward for any scheme."""
    run = integer_matmuls(model.forward)
    return run(config, quantized, tokens_BS, segment_ids_BS, positions_BS)


def generate(config: ModelConfig, quantized: dict, prompts, **options) -> list[list[int]]:
    """smoljax.model.generate for any scheme.

    The program converts weights where they are multiplied. XLA's CPU compiler moves that out of the loop over tokens, so
    there a copy in the compute dtype exists while a call lasts, and decoding int8 and int4 is no faster than plain weights.
    """
    return integer_matmuls(model.generate)(config, quantized, prompts, **options)


class _Call(nn.Module):
    """qwix patches a Linen module's call: this one calls a function."""

    function: Callable

    @nn.compact
    def __call__(self):
        return self.function()


class _Activations(qwix.QuantizationProvider):
    """Where a matmul's weight asks for it, takes the activations in int8."""

    def get_intercept_map(self):
        return super().get_intercept_map() | {
            "jax.numpy.einsum": self.einsum,
            "smoljax.model.decoder.project": self.einsum,
        }

    def einsum(self, spec, *operands, **options):
        """jnp.einsum, or its integer form."""
        w = operands[-1]
        if isinstance(w, FakeQuantizedMatrix):
            return w.einsum(spec, operands[0])
        if isinstance(w, QuantizedMatrix) and w.activations is not None:
            return integer_einsum(spec, operands[0], w)
        return jnp.einsum(spec, *operands, **options)


_PROVIDER = _Activations([])
_quantize_matrix = jax.jit(quantize_matrix, static_argnames=("bits", "contracted", "group_size"))


def _scheme(name: str) -> Scheme:
    if name not in SCHEMES:
        raise SmoljaxError(
            f"quantisation scheme {name!r} is unknown: choose one of {', '.join(SCHEMES)}"
        )
    return SCHEMES[name]


def _group_size(config: ModelConfig, rules: Scheme, group_size: int | None) -> int | None:
    if not rules.grouped:
        if group_size is not None:
            raise SmoljaxError(
                f"group_size is {group_size}, but this scheme has one scale per output channel: leave it None, or use "
                'scheme "int4"'
            )
        return None
    lengths = {
        "hidden_size": config.hidden_size,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
    }
    legal = legal_group_sizes(list(lengths.values()))
    sizes = ", ".join(f"{name}={length}" for name, length in lengths.items())
    if group_size is None:
        fitting = [size for size in _GROUP_SIZES if size in legal]
        if not fitting:
            raise SmoljaxError(
                f"int4 needs groups of 32, 16 or 8 weights, and none divides all of {sizes}: use int8, or give one of "
                f"{legal} as group_size"
            )
        return fitting[0]
    if group_size not in legal:
        raise SmoljaxError(
            f"group_size is {group_size}, which does not divide all of {sizes}: set it to one of {legal}"
        )
    return group_size


def _require_finite(params: dict) -> None:
    for path, w in _leaves(params):
        if isinstance(w, QuantizedMatrix):
            raise SmoljaxError(
                f"parameter {path} is quantised already: give the float32 parameters"
            )
        if not np.all(np.isfinite(np.asarray(w))):
            raise SmoljaxError(
                f"parameter {path} holds NaN or infinity, expected finite numbers: take an earlier checkpoint"
            )


def _leaves(params: dict) -> Iterator[tuple[str, object]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda node: isinstance(node, QuantizedMatrix)
    )
    for path, leaf in flat:
        yield "/".join(key.key for key in path), leaf
