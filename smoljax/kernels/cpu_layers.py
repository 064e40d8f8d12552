"""A decoder's norm and feed-forward layer on a single CPU device, with gradients that go over memory few times.

Their time is that of memory, not of arithmetic. By itself XLA keeps the sigmoid and the normed values of the forward pass for the
backward pass, rounds each product to bfloat16 in a pass of its own, and sums the gradient of a bfloat16 gain by a slow kernel. A
barrier here keeps it from sharing a value between two passes: to compute it again takes less time than to store and to read it.
Reverse mode and vmap work, forward mode (jax.jvp) does not.

T tokens, D width, F feed-forward width
"""

import functools

import jax
import jax.numpy as jnp

from smoljax.kernels.cpu_matmul import matmul, matmul_transposed, transposed_matmul

_barrier = jax.lax.optimization_barrier


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x_TD: jax.Array, gain_D: jax.Array, eps: float) -> jax.Array:
    """x / rms(x), rounded to x's dtype, times the gain; the gradients are computed in f32 and rounded once."""
    return _rms_norm_forward(x_TD, gain_D, eps)[0]


def _rms_norm_forward(x_TD, gain_D, eps):
    x32_TD = x_TD.astype(jnp.float32)
    scale_T1 = jax.lax.rsqrt(jnp.mean(jnp.square(x32_TD), axis=-1, keepdims=True) + eps)
    scale_T1 = _barrier(scale_T1)  # XLA would store it as wide as x.
    y_TD = (x32_TD * scale_T1).astype(x_TD.dtype) * gain_D.astype(x_TD.dtype)[None]
    return y_TD, (x_TD, gain_D, scale_T1)


def _rms_norm_backward(eps, saved, dy_TD):
    del eps
    x_TD, gain_D, scale_T1 = saved
    x_TD, scale_T1, dy_TD = _barrier((x_TD, scale_T1, dy_TD))
    normal_TD, dy32_TD = x_TD.astype(jnp.float32) * scale_T1, dy_TD.astype(jnp.float32)
    # Stored, as it is summed both ways, and XLA sums fast what is stored.
    product_TD = _barrier(dy32_TD * normal_TD)
    mean_T1 = jnp.dot(product_TD, gain_D[:, None] / gain_D.size)
    dx_TD = scale_T1 * (dy32_TD * gain_D[None] - normal_TD * mean_T1)
    return dx_TD.astype(x_TD.dtype), jnp.sum(product_TD, axis=0).astype(gain_D.dtype)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


@jax.custom_vjp
def swiglu(x_TD: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, down_FD: jax.Array) -> jax.Array:
    """down(silu(gate x) * up x), all of one dtype; in bfloat16 only what enters a product, and the output, is rounded to it."""
    return _swiglu_forward(x_TD, gate_DF, up_DF, down_FD)[0]


def _swiglu_forward(x_TD, gate_DF, up_DF, down_FD):
    gate_TF, up_TF = matmul(x_TD, gate_DF), matmul(x_TD, up_DF)
    h_TF = (jax.nn.silu(gate_TF) * up_TF).astype(x_TD.dtype)
    y_TD = matmul(h_TF, down_FD).astype(x_TD.dtype)
    return y_TD, (x_TD, gate_DF, up_DF, down_FD, gate_TF, up_TF, h_TF)


def _swiglu_backward(saved, dy_TD):
    x_TD, gate_DF, up_DF, down_FD, gate_TF, up_TF, h_TF = saved
    dtype = x_TD.dtype
    # The gate twice: each of the two gradients below takes its own exponentials.
    dh_TF, gate_TF, same_gate_TF = _barrier((matmul_transposed(dy_TD, down_FD), gate_TF, gate_TF))
    dup_TF = (dh_TF * jax.nn.silu(same_gate_TF)).astype(dtype)
    sigmoid_TF = jax.nn.sigmoid(gate_TF)
    dsilu_TF = sigmoid_TF * (1 + gate_TF * (1 - sigmoid_TF))
    dgate_TF = (dh_TF * up_TF * dsilu_TF).astype(dtype)
    dx_TD = matmul_transposed(dgate_TF, gate_DF) + matmul_transposed(dup_TF, up_DF)
    return (
        dx_TD.astype(dtype),
        transposed_matmul(x_TD, dgate_TF).astype(dtype),
        transposed_matmul(x_TD, dup_TF).astype(dtype),
        transposed_matmul(h_TF, dy_TD).astype(dtype),
    )


swiglu.defvjp(_swiglu_forward, _swiglu_backward)
