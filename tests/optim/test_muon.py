import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from smoljax.errors import SmoljaxError
from smoljax.optim import COEFFICIENTS, MatrixSpec, muon, scale_by_muon
from smoljax.optim.newton_schulz import coefficient_rows

MATRICES = {"square": (48, 48), "wide": (48, 120), "tall": (120, 48), "twin": (120, 48)}


def gradients(step, shapes=MATRICES):
    rng = np.random.default_rng(step)
    return {name: jnp.float32(rng.standard_normal(shape)) for name, shape in shapes.items()}


PLAIN = scale_by_muon()


@functools.partial(jax.jit, static_argnums=0)
def first_update(transform, gradient):
    """The update of the first step."""
    return transform.update(gradient, transform.init(gradient))[0]


def run(transform, steps=4, start=100):
    """Parameters after some steps on fixed gradients, and the last updates."""
    params = gradients(start)
    state = transform.init(params)
    for step in range(steps):
        updates, state = jax.jit(transform.update)(gradients(step), state, params)
        params = optax.apply_updates(params, updates)
    return params, updates


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("scale", "consistent_rms"), [("keller", None), ("rms", 0.2)])
def test_agrees_with_optax_on_plain_matrices(nesterov, scale, consistent_rms):
    shared = dict(weight_decay=0.1, nesterov=nesterov, eps=1e-8)
    theirs = optax.contrib.muon(0.3, beta=0.9, consistent_rms=consistent_rms, **shared)
    options = dict(coefficients="keller", scale=scale, beta=0.9, **shared)
    want = run(theirs)
    got = run(muon(0.3, bias_correction=True, **options))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
    if (
        nesterov
    ):  # without the correction the first steps differ: this is no accident of the tolerance
        plain = run(muon(0.3, **options))
        assert (
            max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(want)))
            > 1e-2
        )


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("coefficients", sorted(COEFFICIENTS))
def test_equals_the_equations_in_float64_heavy_ball_included(
    numpy_newton_schulz, coefficients, nesterov
):
    """Moonlight's form: m <- beta m + g, u = g + beta m, W <- W - lr (0.2 sqrt(max) O + wd W)."""
    rows = coefficient_rows(coefficients, 5)
    factor = 1.02 if coefficients == "polar_express" else 1.0
    params = {name: np.float64(leaf) for name, leaf in gradients(100).items()}
    momentum = dict.fromkeys(params, 0.0)
    for step in range(4):
        for name, g in gradients(step).items():
            g = np.float64(g)
            momentum[name] = 0.95 * momentum[name] + g
            u = g + 0.95 * momentum[name] if nesterov else momentum[name]
            o = numpy_newton_schulz(u, rows, factor)
            params[name] -= 0.1 * (0.2 * np.sqrt(max(g.shape)) * o + 0.1 * params[name])
    got, _ = run(muon(0.1, weight_decay=0.1, coefficients=coefficients, nesterov=nesterov))
    for name, want in params.items():
        np.testing.assert_allclose(got[name], want, atol=1e-4)


@pytest.mark.parametrize(
    ("coefficients", "small", "large"),
    # Keller's rows leave the large singular values of small random matrices at 0.87, so it is tested at 512.
    [("polar_express", 128, 256), ("dion", 128, 256), ("keller", 512, 1536)],
)
@pytest.mark.parametrize(
    ("scale", "rule"),
    [
        ("rms", lambda d_in, d_out: 0.2),
        ("spectral", lambda d_in, d_out: np.sqrt(d_out / d_in / max(d_in, d_out))),
        ("keller", lambda d_in, d_out: np.sqrt(max(1, d_out / d_in) / max(d_in, d_out))),
    ],
)
def test_update_rms_is_the_rule_within_8_percent(scale, rule, coefficients, small, large):
    shapes = {"square": (small, small), "wide": (small, large), "tall": (large, small)}
    transform = scale_by_muon(scale=scale, coefficients=coefficients)
    gradient = gradients(0, shapes)
    updates = first_update(transform, gradient)
    for name, shape in shapes.items():
        assert np.sqrt(np.mean(updates[name] ** 2)) == pytest.approx(rule(*shape), rel=0.08)


def test_attention_kernels_are_matrices_of_their_spec():
    shapes = {"query": (3, 32, 4, 8), "output": (3, 4, 8, 32), "gate": (3, 32, 96)}
    specs = {
        "query": MatrixSpec(inputs=(-3,), outputs=(-2, -1)),
        "output": MatrixSpec(inputs=(1, 2), outputs=(3,)),
        "gate": MatrixSpec(),
    }
    flat_shapes = {"query": (3, 32, 32), "output": (3, 32, 32), "gate": (3, 32, 96)}
    gradient = gradients(0, shapes)
    flat = {name: leaf.reshape(flat_shapes[name]) for name, leaf in gradient.items()}
    updates = first_update(scale_by_muon(specs), gradient)
    for name in shapes:
        for layer in range(3):
            alone = {"w": flat[name][layer]}
            want = first_update(PLAIN, alone)
            got = updates[name][layer].reshape(want["w"].shape)
            np.testing.assert_allclose(got, want["w"], atol=1e-5)
    # Per head, the same kernel gives another update: the spec matters.
    per_head = {**specs, "query": MatrixSpec(inputs=(-3,), outputs=(-1,))}
    other = first_update(scale_by_muon(per_head), gradient)
    assert np.abs(other["query"] - updates["query"]).max() > 0.05


def test_the_matrix_axes_may_stand_in_any_order():
    x = gradients(0, {"w": (3, 8, 20)})["w"]
    want = first_update(PLAIN, {"w": x})
    moved = {"w": x.transpose(2, 0, 1)}
    transform = scale_by_muon({"w": MatrixSpec(inputs=(2,), outputs=(0,))})
    got = first_update(transform, moved)
    np.testing.assert_allclose(got["w"].transpose(1, 2, 0), want["w"], atol=1e-5)


def test_matrices_of_one_shape_share_one_iteration():
    shapes = {
        "gate": (3, 16, 40),
        "up": (3, 16, 40),
        "down": (3, 40, 16),
        "q": (3, 16, 16),
        "o": (3, 16, 16),
    }
    gradient = gradients(0, shapes)
    transform = scale_by_muon()
    state = transform.init(gradient)
    updates, _ = jax.jit(transform.update)(gradient, state)
    for name in shapes:
        alone = first_update(transform, {name: gradient[name]})
        np.testing.assert_allclose(updates[name], alone[name], atol=1e-5)
    jaxpr = str(jax.make_jaxpr(transform.update)(gradient, state))
    assert (
        jaxpr.count("dot_general") == 18 + 15
    )  # 16x40 in the Gram form, 16x16 in the standard form


def test_layers_do_not_share_a_scale():
    """A layer with gradients 100 times smaller gets an update of the same size (optax's adaptive form fails this)."""
    x = gradients(0, {"w": (3, 24, 48)})["w"] * jnp.float32([1, 0.01, 1]).reshape(3, 1, 1)
    updates = first_update(PLAIN, {"w": x})
    sizes = np.sqrt(np.mean(updates["w"] ** 2, axis=(1, 2)))
    np.testing.assert_allclose(sizes, sizes[0], rtol=0.03)


def test_zero_gradients_give_zero_and_nan_stays_in_its_matrix():
    x = jnp.zeros((3, 8, 8)).at[1].set(jnp.nan)
    x = x.at[2].set(gradients(0, {"w": (8, 8)})["w"])
    updates = first_update(PLAIN, {"w": x})
    np.testing.assert_array_equal(updates["w"][0], 0)
    assert np.isnan(updates["w"][1]).all()
    assert np.isfinite(updates["w"][2]).all()


def test_fused_kernels_equal_separate_ones_to_the_bit():
    """Heads of query, key and value in one kernel [D, N + 2 K, H], whole or in pairs, against three kernels."""
    shapes = {"query": (2, 24, 4, 6), "key": (2, 24, 2, 6), "value": (2, 24, 2, 6)}
    to_heads = MatrixSpec(inputs=(-3,), outputs=(-2, -1))
    separate = gradients(0, shapes)
    fused = {"qkv": jnp.concatenate(list(separate.values()), axis=2)}
    for heads in (None, (-2, 2)):
        spec = dataclasses.replace(to_heads, heads=heads)
        want = first_update(
            scale_by_muon(lambda tree, spec=spec: dict.fromkeys(tree, spec)), separate
        )
        split = dataclasses.replace(spec, split=(4, 2, 2))
        got = first_update(scale_by_muon({"qkv": split}), fused)
        together = np.concatenate([want[name] for name in shapes], axis=2)
        np.testing.assert_array_equal(got["qkv"], together)
    whole = first_update(scale_by_muon({"qkv": to_heads}), fused)
    assert np.abs(whole["qkv"] - got["qkv"]).max() > 0.05  # without the split it is another matrix


@pytest.mark.parametrize(
    ("scale", "of_query", "of_output"),
    [
        # A pair of query heads has 24 inputs and 16 outputs, and one of the output kernel 16 and 24.
        ("rms", 0.2 * np.sqrt(24), 0.2 * np.sqrt(24)),
        ("spectral", np.sqrt(16 / 24), np.sqrt(24 / 16)),
        ("keller", 1.0, np.sqrt(24 / 16)),
    ],
)
def test_pairs_of_heads_are_matrices_with_the_scale_of_a_pair(
    numpy_newton_schulz, scale, of_query, of_output
):
    """The first direction is the gradient, whatever the momentum's factor; orthogonalised in float64."""
    gradient = gradients(0, {"query": (24, 6, 8), "output": (6, 8, 24)})
    specs = {
        "query": MatrixSpec(inputs=(-3,), outputs=(-2, -1), heads=(-2, 2)),
        "output": MatrixSpec(inputs=(-3, -2), outputs=(-1,), heads=(-3, 2)),
    }
    got = first_update(scale_by_muon(specs, scale=scale), gradient)
    rows = COEFFICIENTS["polar_express"]
    for pair in range(3):
        heads = slice(2 * pair, 2 * pair + 2)
        o = numpy_newton_schulz(gradient["query"][:, heads].reshape(24, 16), rows, 1.02)
        np.testing.assert_allclose(got["query"][:, heads].reshape(24, 16), of_query * o, atol=1e-4)
        o = numpy_newton_schulz(gradient["output"][heads].reshape(16, 24), rows, 1.02)
        np.testing.assert_allclose(got["output"][heads].reshape(16, 24), of_output * o, atol=1e-4)


@pytest.mark.parametrize("nesterov", [True, False])
def test_heavy_ball_gives_the_updates_of_the_average_and_a_larger_momentum(nesterov):
    states, updates = {}, {}
    for momentum in ("ema", "heavy_ball"):
        transform = scale_by_muon(momentum=momentum, nesterov=nesterov, beta=0.9)
        state = transform.init(gradients(0))
        for step in range(3):
            updates[momentum], state = jax.jit(transform.update)(gradients(step), state)
        states[momentum] = state.momentum
    for name in MATRICES:
        average, ball = states["ema"][name], states["heavy_ball"][name]
        np.testing.assert_allclose(ball, 10 * average, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(updates["heavy_ball"][name], updates["ema"][name], atol=1e-5)


def test_metrics_are_those_of_the_singular_values_and_the_angle():
    shapes = {"layers": (3, 24, 40), "fused": (16, 24)}
    specs = {"layers": MatrixSpec(), "fused": MatrixSpec(split=(12, 12))}
    transform = scale_by_muon(specs, scale="spectral", metrics=True)
    state = transform.init(gradients(0, shapes))
    assert float(state.metrics["fused"].orthogonality_error) == 0
    momentum = {name: np.zeros(shape) for name, shape in shapes.items()}
    for step in range(2):
        gradient = gradients(step, shapes)
        updates, state = jax.jit(transform.update)(gradient, state)
        for name in shapes:
            momentum[name] = 0.95 * momentum[name] + 0.05 * np.float64(gradient[name])
    split = np.split(np.asarray(updates["fused"]), 2, axis=1)
    by_leaf = {
        "layers": updates["layers"] / np.sqrt(40 / 24),
        "fused": np.stack(split) / np.sqrt(12 / 16),
    }
    for name, matrices in by_leaf.items():
        values = np.linalg.svd(np.float64(matrices), compute_uv=False)
        got = state.metrics[name]
        want = np.sqrt(np.mean((values**2 - 1) ** 2))
        assert float(got.orthogonality_error) == pytest.approx(want, rel=1e-3)
        g, m = np.float64(gradient[name]), momentum[name]
        cosine = np.sum(g * m) / (np.linalg.norm(g) * np.linalg.norm(m))
        assert float(got.momentum_cosine) == pytest.approx(cosine, abs=1e-5)
        assert 0.5 < cosine < 0.9


def test_metrics_cost_nothing_when_off(monkeypatch):
    """Without metrics the HLO is that of a module that has none; with metrics it is another."""
    shapes = {"w": (2, 8, 12)}
    gradient = gradients(0, shapes)

    def program(**options):
        transform = scale_by_muon(**options)
        state = transform.init(gradient)
        return jax.jit(transform.update).lower(gradient, state).as_text(), state

    off, state = program(metrics=False)
    on, _ = program(metrics=True)
    assert state.metrics is None
    assert len(jax.tree.leaves(state)) == 2
    module = sys.modules["smoljax.optim.muon"]
    for name in ("_metrics", "_squared_error"):
        monkeypatch.delattr(module, name)
    assert program()[0] == off
    assert on.count("dot_general") == off.count("dot_general") + 1


def test_dtypes():
    params = {"w": jnp.ones((8, 16), jnp.bfloat16)}
    transform = scale_by_muon()
    updates, state = jax.jit(transform.update)(params, transform.init(params))
    assert updates["w"].dtype == jnp.bfloat16
    assert state.momentum["w"].dtype == jnp.float32
    assert (
        scale_by_muon(momentum_dtype=jnp.bfloat16).init(params).momentum["w"].dtype == jnp.bfloat16
    )


def test_weight_decay_is_multiplied_by_the_rate_alone():
    params = {"w": jnp.full((4, 64), 2.0)}
    for scale in ("rms", "spectral", "keller"):
        transform = muon(0.5, weight_decay=0.1, scale=scale)
        zero = jax.tree.map(jnp.zeros_like, params)
        updates, _ = jax.jit(transform.update)(zero, transform.init(params), params)
        np.testing.assert_allclose(updates["w"], -0.5 * 0.1 * 2.0, rtol=1e-6)


def test_composes_with_optax():
    params = {"w": gradients(0)["wide"], "b": jnp.ones(3)}
    schedule = optax.linear_schedule(0.0, 1.0, 10)
    both = optax.partition(
        {"muon": muon(schedule), "adamw": optax.adamw(schedule)}, {"w": "muon", "b": "adamw"}
    )
    state = both.init(params)
    for _ in range(2):
        updates, state = jax.jit(both.update)(params, state, params)
    assert np.sqrt(np.mean(updates["w"] ** 2)) == pytest.approx(0.2 * 0.1, rel=0.08)

    injected = optax.inject_hyperparams(muon)(learning_rate=0.1, weight_decay=0.0, scale="keller")
    matrix = {"w": params["w"]}
    state = injected.init(matrix)
    small, _ = jax.jit(injected.update)(matrix, state, matrix)
    state.hyperparams["learning_rate"] = jnp.float32(0.2)
    large, _ = jax.jit(injected.update)(matrix, state, matrix)
    np.testing.assert_allclose(large["w"], 2 * small["w"], rtol=1e-6)

    with pytest.raises(SmoljaxError, match="static_args"):
        optax.inject_hyperparams(muon)(learning_rate=0.1, steps=3).init(matrix)
    optax.inject_hyperparams(muon, static_args="steps")(learning_rate=0.1, steps=3).init(matrix)


@pytest.mark.parametrize(
    ("params", "specs", "words"),
    [
        ({"b": jnp.ones(3)}, None, r"b has shape \[3\], which holds no matrix"),
        ({"w": jnp.ones((3, 3), jnp.int32)}, None, "w is int32"),
        ({"w": jnp.ones((3, 3), jnp.complex64)}, None, "w is complex64"),
        ({"w": jnp.ones((3, 3))}, {"w": MatrixSpec(split=(2, 2))}, "w has shape .* sum to 3"),
        ({"w": jnp.ones((3, 3))}, {"w": MatrixSpec(heads=(-1, 2))}, "choose a divisor of 3"),
        ({"w": jnp.ones((3, 3))}, {"v": MatrixSpec()}, "no MatrixSpec for w"),
        ({"w": jnp.ones((3, 3))}, {"w": MatrixSpec((0,), (-2,))}, "holds no matrix"),
        ({"w": jnp.ones((3, 3))}, {"w": MatrixSpec((0,), ())}, "holds no matrix"),
    ],
)
def test_wrong_leaves_are_refused_at_init(params, specs, words):
    with pytest.raises(SmoljaxError, match=words):
        scale_by_muon(specs).init(params)


def test_wrong_options_are_refused_at_once():
    mesh = Mesh(
        np.array(jax.devices()[:1]), ("fsdp",)
    )  # automatic axes; jax.make_mesh makes explicit ones
    for options, words in [
        ({"scale": "unit"}, "spectral"),
        ({"momentum": "nesterov"}, "ema, heavy_ball"),
        ({"momentum": "heavy_ball", "bias_correction": True}, "bias_correction is for"),
        ({"coefficients": "muon"}, "keller"),
        ({"mesh": mesh, "mesh_axis": "stage"}, "'stage' is not an axis of the mesh: it has fsdp"),
        ({"mesh": mesh}, "together"),
        ({"mesh": jax.make_mesh((1,), ("fsdp",)), "mesh_axis": "fsdp"}, "AxisType.Auto"),
    ]:
        with pytest.raises(SmoljaxError, match=words):
            scale_by_muon(**options)
