"""Matrix products on a CPU, in the form that XLA hands to its fast library.

XLA gives a product to YNNPACK, which multiplies bfloat16 with AMX or AVX-512 where the processor has it, when the left operand is
contracted over its last axis and, for bfloat16, the result is float32. Any other product of bfloat16 it converts to float32 before.
Whether it can be handed over is decided while operands still have the layout that their own operation gave them, and that of a
transpose is not the plain one: a transposed operand needs a copy. Found in jaxlib 0.10.2 (xla/backends/cpu/ynn_support.cc).

M rows, K contracted in the forward product, N columns
"""

import jax
import jax.numpy as jnp


def matmul(x_MK: jax.Array, w_KN: jax.Array) -> jax.Array:
    """x w, in float32."""
    return jnp.dot(x_MK, w_KN, preferred_element_type=jnp.float32)


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
