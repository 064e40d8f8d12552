"""One matrix in int8 or int4, and what a model does with it: look rows up, slice layers, multiply.

Symmetric quantisation by qwix: w is close to qvalue * scale, with scale = largest |w| / (2**(bits - 1) - 0.5) over the
weights that share it, so that no weight is off by more than half a scale.

L layers, V vocabulary, D model width, N query heads, K key-value heads, H head width, F feed-forward width
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from smoljax.errors import SmoljaxError, require

qwix = require("qwix", extra="export")

# The axes that a matmul sums over, of each matrix as `smoljax.model.init` stacks it; the embedding's are those of the
# tied head, so that a row of the table has scales of its own.
CONTRACTED = {
    "query": (1,),  # [L, D, N, H]
    "key": (1,),  # [L, D, K, H]
    "value": (1,),  # [L, D, K, H]
    "output": (1, 2),  # [L, N, H, D]
    "gate": (1,),  # [L, D, F]
    "up": (1,),  # [L, D, F]
    "down": (1,),  # [L, F, D]
    "embedding": (1,),  # [V, D]
    "head": (0,),  # [D, V]
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedMatrix:
    """Takes the place of a parameter: JAX computes qvalue * scale where it is used.

    Attributes:
      qvalue: int8 or int4, of the matrix's shape.
      scale: f32 or bfloat16, as many axes; each divides that of qvalue.
      dtype: what it is read as.
      activations: "int8" when the other operand of a matmul is to be quantised too, else None.
    """

    qvalue: jax.Array
    scale: jax.Array
    dtype: str = dataclasses.field(default="float32", metadata={"static": True})
    activations: str | None = dataclasses.field(default=None, metadata={"static": True})

    shape = property(lambda self: self.qvalue.shape)
    ndim = property(lambda self: self.qvalue.ndim)

    @property
    def T(self) -> "QuantizedMatrix":
        """The transpose, still quantised."""
        return dataclasses.replace(self, qvalue=self.qvalue.T, scale=self.scale.T)

    def astype(self, dtype) -> "QuantizedMatrix":
        """The same, to be read as another floating-point dtype; scales stay as they are."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype).name)

    def dequantize(self) -> jax.Array:
        """The matrix in `dtype`."""
        scale = self.scale.astype(jnp.float32)
        return qwix.dequantize(qwix.QArray(self.qvalue, scale)).astype(self.dtype)

    def __getitem__(self, rows) -> jax.Array:
        """Rows of a table in `dtype`: only those are dequantised."""
        looked_up = dataclasses.replace(self, qvalue=self.qvalue[rows], scale=self.scale[rows])
        return looked_up.dequantize()

    def __jax_array__(self) -> jax.Array:
        if self.activations is not None:
            raise SmoljaxError(
                "these weights are meant for integer matmuls (w8a8): run the model by smoljax.interop.quantize.forward "
                "or .generate, or wrap your own function in quantize.integer_matmuls"
            )
        return self.dequantize()


def quantize_matrix(
    w: jax.Array, *, bits: int, contracted: tuple[int, ...], group_size: int | None
) -> tuple[jax.Array, jax.Array]:
    """Rounds to nearest. Pure, jit-able.

    Args:
      w: f32.
      bits: 8 or 4.
      contracted: the axes that a matmul sums over.
      group_size: weights in a row along the last contracted axis that share a scale; None is one scale per output channel.

    Returns:
      qvalue, int8 or int4; scale, f32 per channel or bfloat16 per group (where scales would take a third of the space).
    """
    qtype = {8: jnp.int8, 4: jnp.int4}[bits]
    shared = contracted if group_size is None else contracted[-1:]
    channels = tuple(axis for axis in range(w.ndim) if axis not in shared)
    tiled = {} if group_size is None else {contracted[-1]: group_size}
    exact = qwix.quantize(w, qtype, channelwise_axes=channels, tiled_axes=tiled)
    if group_size is None:
        return exact.qvalue, exact.scale
    # Rounded up, so that the largest weight of a group stays in reach, and rounded before the weights are.
    scale = (exact.scale * (1 + 2**-7)).astype(jnp.bfloat16)
    spread = jnp.repeat(scale.astype(w.dtype), group_size, axis=contracted[-1])
    return jnp.round(w / spread).astype(qtype), scale


def straight_through(exact: jax.Array, rounded: jax.Array) -> jax.Array:
    """`rounded`, with the gradient of `exact` (Bengio et al. 2013, arXiv 1308.3432)."""
    return jax.lax.stop_gradient(rounded) + (exact - jax.lax.stop_gradient(exact))


def int8_activations(spec: str, x: jax.Array):
    """x as a qwix.QArray in int8 with a scale for each token: for every axis that `spec` does not sum over."""
    operands, result = spec.replace(" ", "").split("->")
    names = operands.split(",")[0]
    channels = tuple(axis for axis, name in enumerate(names) if name in result)
    return qwix.quantize(x.astype(jnp.float32), jnp.int8, channelwise_axes=channels)


def integer_einsum(spec: str, x: jax.Array, w: QuantizedMatrix) -> jax.Array:
    """x and w multiplied in integers (int32 sums), then by both scales; in x's dtype."""
    product = qwix.einsum(spec, int8_activations(spec, x), qwix.QArray(w.qvalue, w.scale))
    return product.astype(x.dtype)


def legal_group_sizes(lengths: list[int]) -> list[int]:
    """The sizes from 2 up that divide all of these lengths."""
    common = math.gcd(*lengths)
    return [size for size in range(2, common + 1) if common % size == 0]
