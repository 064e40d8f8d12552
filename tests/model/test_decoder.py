"""The matrix products of a layer, which on a CPU are not those of einsum."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoljax.model.decoder import project


@pytest.mark.parametrize(
    ("spec", "x_shape", "w_shape"),
    [
        ("bsd,df->bsf", (2, 5, 16), (16, 24)),
        ("bsf,fd->bsd", (2, 5, 24), (24, 16)),
        ("bsd,dnh->bsnh", (2, 5, 16), (16, 4, 8)),
        ("bsgh,ghd->bsd", (2, 5, 4, 8), (4, 8, 16)),
    ],
)
def test_a_projection_and_its_gradients_are_einsums(spec, x_shape, w_shape):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=x_shape), rng.normal(size=w_shape)
    inputs, output = spec.split("->")
    of_x, of_w = inputs.split(",")
    y = np.einsum(spec, x, w)
    g = rng.normal(size=y.shape)
    expected = (
        y,
        np.einsum(f"{output},{of_w}->{of_x}", g, w),
        np.einsum(f"{of_x},{output}->{of_w}", x, g),
    )
    value, gradients = jax.vjp(lambda x, w: project(spec, x, w), jnp.float32(x), jnp.float32(w))
    for got, want in zip((value, *gradients(jnp.float32(g))), expected, strict=True):
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_on_a_cpu_nothing_is_copied_transposed_for_the_gradient_of_a_matrix():
    x_BSD, w_DF, g_BSF = jnp.ones((8, 256, 256)), jnp.ones((256, 688)), jnp.ones((8, 256, 688))

    def program(product):
        def gradients(x_BSD, w_DF, g_BSF):
            return jax.vjp(lambda x, w: product("bsd,df->bsf", x, w), x_BSD, w_DF)[1](g_BSF)

        return jax.jit(gradients).lower(x_BSD, w_DF, g_BSF).compile().as_text()

    def copies(text):
        return re.findall(r"= f32\[(?:256|688),2048\]", text)

    assert not copies(program(project))
    assert copies(program(jnp.einsum))


def test_on_a_cpu_products_of_bfloat16_are_multiplied_as_bfloat16():
    """Forward and both gradients; XLA would convert the operands to float32, and take three times as long on a processor with AMX."""
    x_BSD, w_DF, g_BSF = (
        jnp.ones(shape, jnp.bfloat16) for shape in ((2, 32, 64), (64, 96), (2, 32, 96))
    )

    def converted(product):
        def products(x_BSD, w_DF, g_BSF):
            y_BSF, gradients = jax.vjp(lambda x, w: product("bsd,df->bsf", x, w), x_BSD, w_DF)
            return y_BSF, gradients(g_BSF)

        text = jax.jit(products).lower(x_BSD, w_DF, g_BSF).compile().as_text()
        return re.findall(r"= (f32\[\S+) convert\(", text)

    assert not converted(project)
    assert converted(jnp.einsum)


@pytest.mark.parametrize("rows", [1, 2, 40])
@pytest.mark.parametrize(("wide", "narrow"), [(96, 1), (96, 4), (64, 96)])
def test_a_projection_in_bfloat16_is_summed_in_float32(rows, wide, narrow):
    """Whatever the shape: XLA may refuse at run time a product that it took when it compiled."""
    rng = np.random.default_rng(0)
    x, w, g = (
        rng.normal(size=shape).astype(jnp.bfloat16)
        for shape in ((1, rows, wide), (wide, narrow), (1, rows, narrow))
    )

    @jax.jit
    def products(x, w, g):
        y, gradients = jax.vjp(lambda x, w_ND: project("bsd,df->bsf", x, w_ND.T), x, w.T)
        return y, *gradients(g)

    x64, w64, g64 = (array.astype(np.float64) for array in (x, w, g))
    expected = x64 @ w64, g64 @ w64.T, np.einsum("bsd,bsf->fd", x64, g64)
    for got, want in zip(products(x, w, g), expected, strict=True):
        assert got.dtype == jnp.bfloat16
        # Rounded once, at the end: by half a unit of the last of 8 bits.
        np.testing.assert_allclose(np.float64(got), want, rtol=2**-8, atol=1e-4)
