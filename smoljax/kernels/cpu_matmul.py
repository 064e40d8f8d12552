"""Matrix products on a CPU, in the form that XLA hands to its fast library.

XLA gives a product to YNNPACK, which multiplies bfloat16 with AMX or AVX-512 where the processor has it, when the left operand is
contracted over its last axis and, for bfloat16, the result is float32. Any other product of bfloat16 it converts to float32 before.
Whether it can be handed over is decided while operands still have the layout that their own operation gave them, and that of a
transpose is not the plain one: a transposed operand needs a copy. Found in jaxlib 0.10.2 (xla/backends/cpu/ynn_support.cc).

M rows, K contracted in the forward product, N columns
"""

import dataclasses
import math

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Turned:
    """Takes the place of a parameter that is multiplied with few rows: its matrix as YNNPACK reads it fastest, on the left.

    YNNPACK packs a right operand anew for every product, and reads a left one as it is: 8 rows of bfloat16 take half the time.

    Attributes:
      w_NK: the transpose of the matrix.
      shape: of the parameter, the contracted axes first.
    """

    w_NK: jax.Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})


def turned(w: jax.Array, *, contracted: int) -> Turned:
    """A parameter whose first `contracted` axes a product sums over."""
    return Turned(w.reshape(math.prod(w.shape[:contracted]), -1).T, w.shape)


def matmul(x_MK: jax.Array, w_KN: jax.Array | Turned) -> jax.Array:
    """x w [M, N], in float32. No gradient flows through a Turned one."""
    if not isinstance(w_KN, Turned):
        return jnp.dot(x_MK, w_KN, preferred_element_type=jnp.float32)
    M = x_MK.shape[0]
    if M == 1 and x_MK.dtype == jnp.bfloat16:  # One row XLA multiplies itself, in float32.
        x_MK = jnp.repeat(x_MK, 2, axis=0)
    y_NM = jnp.einsum("nk,mk->nm", w_KN.w_NK, x_MK, preferred_element_type=jnp.float32)
    # Without the barrier XLA puts x on the left again.
    return jax.lax.optimization_barrier(y_NM).T[:M]


def matmul_transposed(g_MN: jax.Array, w_KN: jax.Array) -> jax.Array:
    """g w^T [M, K], in float32."""
    last = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(g_MN, w_KN, last, preferred_element_type=jnp.float32)


def transposed_matmul(x_MK: jax.Array, g_MN: jax.Array) -> jax.Array:
    """x^T g [K, N], in float32.

    Of float32, without a copy: Eigen, which takes the product as it is, is as fast as YNNPACK and the copy together.
    """
    if x_MK.dtype != jnp.bfloat16:
        return x_MK.T @ g_MN
    # A barrier keeps a transpose from being folded into the product: the copy of the operand, and one that follows the product,
    # which would change the operands' places.
    return jax.lax.optimization_barrier(matmul(transposed_copy(x_MK), g_MN))


def transposed_copy(x_MK: jax.Array) -> jax.Array:
    """x^T, of the last two axes, as an array of its own; the axis of length 1 gives it the plain layout."""
    return jax.lax.optimization_barrier(jnp.swapaxes(x_MK, -2, -1)[None])[0]
