"""What every backward pass of attention needs of its output.

B batch, S sequence, N query heads, H head width
"""

import jax
import jax.numpy as jnp


def drop(output_BSNH: jax.Array, dout_BSNH: jax.Array) -> jax.Array:
    """The sum over keys of weight times its gradient, from the output alone, f32 [B, N, S] (arXiv 2205.14135, appendix
    B.2, equation 4)."""
    products_BSNH = dout_BSNH.astype(jnp.float32) * output_BSNH.astype(jnp.float32)
    return jnp.swapaxes(jnp.sum(products_BSNH, axis=-1), 1, 2)
