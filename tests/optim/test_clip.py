import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smoljax.errors import SmoljaxError
from smoljax.optim import adagc, clip_by_global_norm, global_norm, zclip

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
    with pytest.raises(SmoljaxError, match=r"clip_norm is .* above 0"):
        clip_by_global_norm(max_norm)


def gradients(seed, steps, spikes=()):
    """A stream of gradients {"stack": [2, 3, 4], "vector": [5]} whose spikes are a hundred times as large."""
    rng = np.random.default_rng(seed)
    for step in range(steps):
        size = 100.0 if step in spikes else 1.0
        yield {
            "stack": size * rng.uniform(0.5, 1.5) * rng.standard_normal((2, 3, 4)),
            "vector": rng.standard_normal(5),
        }


def float32(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


AXES = {"stack": 1, "vector": 0}


def paper_adagc(stream, *, relative, beta, max_norm, warmup_steps):
    """AdaGC as the paper states it, float64, for the blocks stack[0], stack[1] and vector."""
    averages = [np.inf] * 3
    for step, gradient in enumerate(stream):
        blocks = [gradient["stack"][0], gradient["stack"][1], gradient["vector"]]
        total = np.sqrt(sum(np.sum(block**2) for block in blocks))
        clipped = []
        for index, block in enumerate(blocks):
            norm = np.linalg.norm(block)
            if step < warmup_steps:
                factor = min(1, max_norm / total)
                averages[index] = min(averages[index], factor * norm)
            else:
                factor = min(1, relative * averages[index] / norm)
                averages[index] = beta * averages[index] + (1 - beta) * factor * norm
            clipped.append(factor * block)
        yield {"stack": np.stack(clipped[:2]), "vector": clipped[2]}


@pytest.mark.parametrize("batch_axes", [AXES, lambda tree: {"stack": 1, "vector": 0}])
def test_adagc_is_the_papers_rule_for_each_layer_alone(batch_axes):
    options = dict(relative=1.05, beta=0.98, max_norm=1.0, warmup_steps=5)
    clip = adagc(**options, batch_axes=batch_axes)
    update = jax.jit(clip.update)
    state = clip.init(float32(next(gradients(0, 1))))
    raw = list(gradients(0, 30, spikes=(12, 20)))
    for gradient, want in zip(raw, paper_adagc(iter(raw), **options)):
        got, state = update(float32(gradient), state)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), got, want)
        flat, raw_flat = (
            np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
            for tree in (want, gradient)
        )
        cosine = flat @ raw_flat / np.linalg.norm(flat) / np.linalg.norm(raw_flat)
        np.testing.assert_allclose(state.report.cosine, cosine, rtol=1e-4)
        np.testing.assert_allclose(state.report.norm, np.linalg.norm(raw_flat), rtol=1e-5)
        shrunk = [
            not np.allclose(got["stack"][0], gradient["stack"][0], rtol=1e-5),
            not np.allclose(got["stack"][1], gradient["stack"][1], rtol=1e-5),
            not np.allclose(got["vector"], gradient["vector"], rtol=1e-5),
        ]
        np.testing.assert_allclose(state.report.clipped, np.mean(shrunk), rtol=1e-6)


def test_adagc_leaves_other_tensors_alone_where_a_global_norm_shrinks_them():
    clip = adagc(warmup_steps=3, batch_axes=AXES)
    calm = {"stack": jnp.full((2, 3, 4), 0.1), "vector": jnp.full((5,), 0.1)}
    state = clip.init(calm)
    for _ in range(4):
        _, state = clip.update(calm, state)
    bad = {"stack": calm["stack"].at[1].mul(100), "vector": calm["vector"]}
    got, state = clip.update(bad, state)
    np.testing.assert_array_equal(got["vector"], calm["vector"])
    np.testing.assert_array_equal(got["stack"][0], calm["stack"][0])
    np.testing.assert_allclose(got["stack"][1], 1.04 * calm["stack"][1], rtol=1e-5)
    assert float(state.report.clipped) == pytest.approx(1 / 3)
    assert float(state.report.cosine) < 0.9
    # As one leaf, the good layer shrinks with the bad one; so it does under a global norm.
    whole = adagc(warmup_steps=3)
    state = whole.init(calm)
    for _ in range(4):
        _, state = whole.update(calm, state)
    got, _ = whole.update(bad, state)
    assert float(jnp.max(got["stack"][0])) < 0.01


def test_adagc_keeps_its_averages_over_nan_and_zero():
    clip = adagc(warmup_steps=2, max_norm=None)
    good = {"w": jnp.float32([3.0, 4.0])}
    state = clip.init(good)
    # A zero first gradient must not make the average 0, which would clip to 0 for ever.
    got, state = clip.update({"w": jnp.zeros(2)}, state)
    assert np.isinf(state.averages["w"])
    for _ in range(3):
        got, state = clip.update(good, state)
    before = float(state.averages["w"])
    assert before == pytest.approx(5)
    for bad in (jnp.nan, jnp.inf):
        got, state = clip.update({"w": jnp.float32([bad, 1.0])}, state)
        assert not np.isfinite(got["w"]).all()
        assert float(state.averages["w"]) == before
    got, state = clip.update(good, state)
    np.testing.assert_allclose(got["w"], good["w"])
    assert np.isfinite(state.report.cosine)


def paper_zclip(norms, *, alpha=0.97, threshold=2.5, warmup_steps=25, eps=1e-6):
    """The norms after ZClip, float64, with a buffer for the warmup as in the authors' code."""
    mean, variance = np.mean(norms[:warmup_steps]), np.var(norms[:warmup_steps])
    after = list(norms[:warmup_steps])
    for norm in norms[warmup_steps:]:
        deviation = np.sqrt(variance)
        z = (norm - mean) / (deviation + eps)
        if z > threshold:
            norm = mean + threshold * deviation / (z / threshold)
        after.append(norm)
        mean = alpha * mean + (1 - alpha) * norm
        variance = alpha * variance + (1 - alpha) * (norm - mean) ** 2
    return after


def test_zclip_is_the_authors_rule():
    rng = np.random.default_rng(1)
    norms = rng.uniform(0.8, 1.2, 80)
    norms[[30, 31, 60]] = 20, 50, 5
    clip = zclip()
    update = jax.jit(clip.update)
    direction = np.float32([[0.6, 0.0], [0.0, 0.8]])
    state = clip.init({"w": direction})
    for step, (norm, want) in enumerate(zip(norms, paper_zclip(norms))):
        got, state = update({"w": jnp.float32(norm) * direction}, state)
        np.testing.assert_allclose(got["w"], want * direction, rtol=1e-4, err_msg=str(step))
        assert float(state.report.norm) == pytest.approx(norm, rel=1e-5)
        assert float(state.report.clipped) == (want < norm)
        assert float(state.report.cosine) == 1
    assert float(np.max(paper_zclip(norms))) < 2


def test_zclip_skips_nan_in_its_statistics_and_limits_all_norms():
    clip = zclip(warmup_steps=3, max_norm=2.0)
    state = clip.init({"w": jnp.zeros(1)})
    for value in (1.0, jnp.nan, 3.0, jnp.inf, 2.0):
        got, state = clip.update({"w": jnp.float32([value])}, state)
        expected = min(value, 2.0) if np.isfinite(value) else value
        np.testing.assert_array_equal(got["w"], jnp.float32([expected]))
    assert int(state.count) == 3
    np.testing.assert_allclose([state.mean, state.variance], [2, 2 / 3], rtol=1e-6)


@pytest.mark.parametrize("make", [adagc, zclip, lambda: clip_by_global_norm(1.0)])
def test_links_work_in_a_chain_donated_masked_and_with_bfloat16(make):
    params = {"w": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(3)}
    optimizer = optax.chain(make(), optax.masked(make(), {"w": True, "b": False}), optax.adam(0.1))
    state = optimizer.init(params)
    update = jax.jit(optimizer.update, donate_argnums=1)
    for _ in range(2):
        leaves, structure = jax.tree.flatten(state)
        state = jax.tree.unflatten(structure, leaves)
        updates, state = update(jax.tree.map(lambda leaf: leaf * 10, params), state, params)
    assert updates["w"].dtype == jnp.bfloat16
    assert np.isfinite(updates["b"]).all()


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (clip_by_global_norm, dict(max_norm=lambda count: 1.0 / (1 + count))),
        (adagc, dict(relative=1.5, max_norm=lambda count: 1.0 / (1 + count))),
        (zclip, dict(max_norm=lambda count: 1.0 / (1 + count))),
    ],
)
def test_hyperparameters_can_be_scheduled(make, options):
    optimizer = optax.inject_hyperparams(make)(**options)
    state = optimizer.init(GRADIENT)
    for step in range(3):
        updates, state = jax.jit(optimizer.update)(GRADIENT, state)
        assert float(global_norm(updates)) == pytest.approx(1 / (1 + step), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: adagc(relative=0), "relative is 0"),
        (lambda: adagc(beta=1.0), "beta is 1.0"),
        (lambda: adagc(warmup_steps=-1), "warmup_steps"),
        (lambda: zclip(threshold=-1), "threshold is -1"),
        (lambda: zclip(alpha=1.5), "alpha"),
        (lambda: zclip(max_norm="1"), "max_norm"),
        (lambda: adagc(batch_axes={"a": 2, "b": 0}).init(GRADIENT), "parameter a"),
        (lambda: adagc(batch_axes={"a": 0}).init(GRADIENT), "parameter b"),
    ],
)
def test_options_out_of_range_are_refused(make, words):
    with pytest.raises(SmoljaxError, match=words):
        make()
