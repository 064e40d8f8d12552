import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smoljax.errors import SmoljaxError
from smoljax.optim import clip_by_global_norm, global_norm

GRADIENT = {"a": jnp.float32([3.0, 0.0]), "b": jnp.float32([[4.0]])}  # norm 5


@pytest.mark.parametrize(
    ("max_norm", "factor", "clipped"), [(1.0, 0.2, 1), (5.5, 1, 0), (None, 1, 0)]
)
def test_scales_to_the_norm_and_says_so(max_norm, factor, clipped):
    clip = clip_by_global_norm(max_norm)
    updates, state = jax.jit(clip.update)(GRADIENT, clip.init(GRADIENT))
    np.testing.assert_allclose(updates["a"], [3 * factor, 0], rtol=1e-6)
    np.testing.assert_allclose(updates["b"], [[4 * factor]], rtol=1e-6)
    assert float(state.norm) == 5
    assert float(state.clipped) == clipped


def test_equals_optax_bitwise(random_tree):
    gradient = random_tree(0)
    for max_norm in (0.1, 1e6):
        ours, theirs = clip_by_global_norm(max_norm), optax.clip_by_global_norm(max_norm)
        got, _ = jax.jit(ours.update)(gradient, ours.init(gradient))
        want, _ = jax.jit(theirs.update)(gradient, theirs.init(gradient))
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_bfloat16_gradients_have_a_float32_norm():
    gradient = {"w": jnp.full((1000, 1000), 0.01, jnp.bfloat16)}
    assert float(global_norm(gradient)) == pytest.approx(10, rel=2e-3)
    updates, _ = clip_by_global_norm(1.0).update(gradient, None)
    assert updates["w"].dtype == jnp.bfloat16


def test_nan_passes_on():
    clip = clip_by_global_norm(1.0)
    updates, state = clip.update({"a": jnp.float32([jnp.nan, 1])}, None)
    assert np.isnan(updates["a"]).all()
    assert np.isnan(state.norm)


@pytest.mark.parametrize("max_norm", [0, -1.0, float("nan")])
def test_a_norm_that_is_not_positive_is_refused(max_norm):
    with pytest.raises(SmoljaxError, match="positive"):
        clip_by_global_norm(max_norm)
