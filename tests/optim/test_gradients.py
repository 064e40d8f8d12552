import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smoljax.errors import SmoljaxError
from smoljax.optim import MatrixSpec, centralize, normalize_blocks
from smoljax.optim.blocks import axes_by_path, block_norms, scaling_report, stacked_axes


def tree_of(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    sizes = {"layers": {"kernel": (3, 4, 5), "norm": (3, 4)}, "head": (4, 6)}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), dtype),
        sizes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


AXES = {"layers": {"kernel": 1, "norm": 1}, "head": 0}


def flat(tree):
    return np.concatenate([np.ravel(np.float64(leaf)) for leaf in jax.tree.leaves(tree)])


def cosine(a, b):
    return flat(a) @ flat(b) / np.linalg.norm(flat(a)) / np.linalg.norm(flat(b))


def test_every_block_gets_the_same_rms_and_keeps_its_direction():
    raw = tree_of(0)
    raw["layers"]["kernel"] = raw["layers"]["kernel"].at[1].mul(100).at[2].set(0)
    link = normalize_blocks(batch_axes=AXES, rms=0.5)
    got, state = jax.jit(link.update)(raw, link.init(raw))
    for layer in (0, 1):
        for name in ("kernel", "norm"):
            block, before = got["layers"][name][layer], raw["layers"][name][layer]
            assert float(jnp.sqrt(jnp.mean(jnp.square(block)))) == pytest.approx(0.5, rel=1e-5)
            assert cosine(block, before) == pytest.approx(1, abs=1e-6)
    np.testing.assert_array_equal(got["layers"]["kernel"][2], 0)
    np.testing.assert_allclose(state.report.cosine, cosine(got, raw), rtol=1e-5)
    np.testing.assert_allclose(state.report.norm, np.linalg.norm(flat(raw)), rtol=1e-5)
    # Without batch axes the loud layer sets the size of all three.
    whole, _ = normalize_blocks(rms=0.5).update(raw, None)
    quiet = float(jnp.sqrt(jnp.mean(jnp.square(whole["layers"]["kernel"][0]))))
    assert quiet < 0.05


def test_nan_stays_in_its_block():
    raw = tree_of(1)
    raw["layers"]["kernel"] = raw["layers"]["kernel"].at[1, 0, 0].set(jnp.nan)
    got, state = normalize_blocks(batch_axes=AXES).update(raw, None)
    assert np.isnan(got["layers"]["kernel"][1]).all()
    assert np.isfinite(got["layers"]["kernel"][0]).all()
    assert np.isfinite(got["head"]).all()
    assert np.isnan(state.report.cosine)


def test_centralize_takes_the_mean_over_the_inputs():
    raw = {"up": tree_of(2)["layers"]["kernel"], "output": tree_of(3)["layers"]["kernel"] + 3}
    specs = {"up": MatrixSpec(), "output": MatrixSpec(inputs=(-3, -2), outputs=(-1,))}
    link = centralize(specs)
    got, state = jax.jit(link.update)(raw, link.init(raw))
    want = jax.tree.map(np.float64, raw)
    want["up"] = want["up"] - want["up"].mean(axis=-2, keepdims=True)
    want["output"] = want["output"] - want["output"].mean(axis=(0, 1), keepdims=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
    np.testing.assert_allclose(state.report.cosine, cosine(want, raw), rtol=1e-5)
    assert float(state.report.cosine) < 0.9
    # A second time there is nothing to take away.
    again, state = link.update(got, state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), again, got)
    assert float(state.report.cosine) == pytest.approx(1, abs=1e-6)


def test_centralize_refuses_a_leaf_without_a_matrix():
    with pytest.raises(SmoljaxError, match="bias"):
        centralize().init({"bias": jnp.ones(3)})


@pytest.mark.parametrize("make", [lambda: normalize_blocks(), lambda: centralize()])
def test_links_keep_the_dtype_and_work_masked_in_a_chain(make):
    params = {"w": jnp.ones((2, 3), jnp.bfloat16) * 2, "b": jnp.ones(3)}
    optimizer = optax.chain(optax.masked(make(), {"w": True, "b": False}), optax.sgd(0.1))
    state = optimizer.init(params)
    updates, state = jax.jit(optimizer.update, donate_argnums=1)(params, state, params)
    assert updates["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(updates["b"], -0.1 * params["b"])


def test_a_gradient_of_zeros_stays_zero_and_has_cosine_one():
    zeros = {"w": jnp.zeros((2, 3))}
    for link in (normalize_blocks(), centralize()):
        got, state = link.update(zeros, None)
        np.testing.assert_array_equal(got["w"], 0)
        assert float(state.report.cosine) == 1


def test_stacked_axes_are_told_by_the_logical_names(axes):
    tree = stacked_axes(axes)
    assert tree["layers"]["mlp"]["gate"] == 1
    assert tree["layers"]["mlp_norm"] == 1
    assert tree["embedding"] == tree["final_norm"] == 0
    assert stacked_axes({"expert": ("layers", "experts", "embed", "mlp")})["expert"] == 2


def test_the_cosine_is_exact_where_squares_would_overflow():
    norms = {"a": jnp.float32([3e25, 4e25]), "b": jnp.float32(1e-3)}
    factors = {"a": jnp.float32([1.0, 0.5]), "b": jnp.float32(1.0)}
    want = (9 + 8) / np.sqrt((9 + 4) * 25)
    assert float(scaling_report(norms, factors).cosine) == pytest.approx(want, rel=1e-6)
    assert float(scaling_report(norms, factors).clipped) == pytest.approx(1 / 3)


def test_norms_of_blocks_are_accumulated_in_float32():
    tree = {"w": jnp.full((2, 1000, 100), 0.01, jnp.bfloat16)}
    norms = block_norms(tree, {"w": 1})["w"]
    assert norms.dtype == jnp.float32
    np.testing.assert_allclose(norms, np.sqrt(1e5) * float(tree["w"][0, 0, 0]), rtol=1e-5)


@pytest.mark.parametrize("axes_of_w", [3, -1, None, 1.0])
def test_batch_axes_that_do_not_fit_are_refused(axes_of_w):
    with pytest.raises(SmoljaxError, match=r"parameter w, which has shape \[2, 3\]"):
        axes_by_path({"w": axes_of_w}, {"w": jnp.ones((2, 3))})


def test_an_rms_that_is_not_positive_is_refused():
    with pytest.raises(SmoljaxError, match="rms is 0"):
        normalize_blocks(rms=0)
