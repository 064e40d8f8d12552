"""Products on a CPU as they are handed to its fast library: against float64, and in the dtype that was meant."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoljax.kernels import cpu_matmul

K, SHAPE = 48, (48, 4, 8)


def arrays(rows, dtype):
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((rows, K), SHAPE))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 8, 40])
def test_a_turned_matrix_gives_the_product_of_float64(rows, dtype):
    """Its operands are exact, and all sums are of float32."""
    x_MK, w = arrays(rows, dtype)
    turned = cpu_matmul.turned(w, contracted=1)
    assert turned.shape == SHAPE
    got_MN = jax.jit(cpu_matmul.matmul)(x_MK, turned)
    want_MN = np.float64(x_MK) @ np.float64(w).reshape(K, -1)
    assert got_MN.dtype == jnp.float32
    np.testing.assert_allclose(got_MN, want_MN, atol=1e-5)


def test_two_axes_are_contracted_in_the_order_of_memory():
    _, w = arrays(1, "float32")
    turned = cpu_matmul.turned(w, contracted=2)
    np.testing.assert_array_equal(turned.w_NK, np.asarray(w).reshape(-1, SHAPE[2]).T)


@pytest.mark.parametrize("rows", [1, 8])
def test_a_few_rows_of_bfloat16_are_multiplied_as_bfloat16_with_the_matrix_on_the_left(rows):
    x_MK, w = arrays(rows, "bfloat16")
    turned = cpu_matmul.turned(w, contracted=1)
    text = jax.jit(cpu_matmul.matmul).lower(x_MK, turned).compile().as_text()
    types = dict(re.findall(r"%?([\w.\-]+) = (\w+\[[\d,]*\])", text))
    products = re.findall(r"= (f32\[[\d,]*\])\S* dot\(%?([\w.\-]+), %?([\w.\-]+)\)", text)
    several = max(rows, 2)
    assert [(out, types[left], types[right]) for out, left, right in products] == [
        (f"f32[32,{several}]", "bf16[32,48]", f"bf16[{several},48]")
    ]
