import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smoljax.errors import SmoljaxError
from smoljax.optim import MatrixSpec, place_state
from smoljax.optim.partition import by_path
from smoljax.optim.soap import scale_by_soap, soap

B1, B2, SHAMPOO_BETA, EPS = 0.95, 0.9, 0.8, 1e-8


class NumpySoap:
    """Algorithm 3 of arXiv 2409.11321 with the authors' bias correction, one matrix, float64.

    Their momentum stands in the parameters' own basis here, which is the same thing as long as bases are orthogonal.
    """

    def __init__(self, every, sides=(True, True)):
        self.every, self.sides = every, sides
        self.m = self.v = 0.0
        self.count = -1

    def update(self, g, bases=None):
        """The direction; `bases` are those to begin with, where eigenvectors of an eigenvalue 0 are arbitrary."""
        g = np.float64(g)
        self.count += 1
        if self.count == 0:
            self.factors = [(1 - SHAMPOO_BETA) * f for f in (g @ g.T, g.T @ g)]
            found = [np.linalg.eigh(f)[1][:, ::-1] for f in self.factors]
            self.bases = [
                q if used else np.eye(len(q)) for q, used in zip(bases or found, self.sides)
            ]
            return np.zeros_like(g)
        left, right = self.bases
        self.m = B1 * self.m + (1 - B1) * g
        self.v = B2 * self.v + (1 - B2) * (left.T @ g @ right) ** 2
        u = left @ (left.T @ self.m @ right / (np.sqrt(self.v) + EPS)) @ right.T
        u = u * np.sqrt(1 - B2**self.count) / (1 - B1**self.count)
        self.factors = [
            SHAMPOO_BETA * old + (1 - SHAMPOO_BETA) * new
            for old, new in zip(self.factors, (g @ g.T, g.T @ g))
        ]
        if self.count % self.every == 0:
            for axis in np.flatnonzero(self.sides):
                factor, q = self.factors[axis], self.bases[axis]
                order = np.argsort(-np.diag(q.T @ factor @ q))
                self.v = np.take(self.v, order, axis=axis)
                self.bases[axis] = np.linalg.qr(factor @ q[:, order])[0]
        return u


def run(transform, gradients, params=None):
    """The updates, and the state after each."""
    params = jax.tree.map(jnp.zeros_like, gradients[0]) if params is None else params
    update, state, seen = jax.jit(transform.update), transform.init(params), []
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        seen.append((updates, state))
    return seen


def random_gradients(shape, steps=13, seed=0):
    """Gradients with a common part, so that eigenvalues differ and some are large."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal(shape)
    return [np.float32(common + rng.standard_normal(shape)) for _ in range(steps)]


def options(**changes):
    return dict(b1=B1, b2=B2, shampoo_beta=SHAMPOO_BETA, eps=EPS, precondition_every=5) | changes


def assert_close(got, expected, rtol=1e-4):
    """Relative to the largest entry."""
    got, expected = np.float64(got), np.float64(expected)
    assert np.abs(got - expected).max() <= rtol * np.abs(expected).max()


HEADS = MatrixSpec(inputs=(-3,), outputs=(-2, -1))


@pytest.mark.parametrize(
    ("shape", "spec", "matrices"),
    [
        ((3, 6, 6), MatrixSpec(), list),
        ((2, 5, 8), MatrixSpec(), list),
        ((8, 5), MatrixSpec(), lambda w: [w]),
        ((2, 6, 2, 4), HEADS, lambda w: list(w.reshape(2, 6, 8))),
        (
            (6, 3, 4),
            dataclasses.replace(HEADS, heads=(-2, 1)),
            lambda w: list(w.transpose(1, 0, 2)),
        ),
        ((6, 9), MatrixSpec(split=(4, 5)), lambda w: np.split(w, [4], axis=1)),
    ],
)
def test_soap_is_the_papers_algorithm(shape, spec, matrices):
    """13 updates, with the bases refreshed after the 6th and the 11th."""
    gradients = random_gradients(shape)
    seen = run(scale_by_soap({"w": spec}, **options()), [{"w": g} for g in gradients])
    state = seen[0][1]
    bases = [
        [np.float64(q) for piece in side["w"] for q in piece]
        for side in (state.left_basis, state.right_basis)
    ]
    references = [(NumpySoap(every=5), pair) for pair in zip(*bases)]
    for gradient, (updates, _) in zip(gradients, seen):
        pieces = zip(
            references, matrices(gradient), matrices(np.asarray(updates["w"])), strict=True
        )
        for (reference, pair), g, u in pieces:
            assert_close(u, reference.update(g, bases=pair))


def test_first_bases_are_eigenvectors_and_the_first_update_is_zero():
    gradients = [{"w": g} for g in random_gradients((2, 5, 8), steps=1)]
    updates, state = run(scale_by_soap(**options()), gradients)[0]
    assert not updates["w"].any()
    assert not state.momentum["w"].any()
    assert not state.second_moment["w"].any()
    for (factor,), (basis,) in (
        (state.left["w"], state.left_basis["w"]),
        (state.right["w"], state.right_basis["w"]),
    ):
        rotated = np.einsum("bji,bjk,bkl->bil", *np.float64((basis, factor, basis)))
        eigenvalues = np.einsum("bii->bi", rotated)
        scale = eigenvalues.max()
        off_diagonal = rotated - np.einsum("bi,ij->bij", eigenvalues, np.eye(rotated.shape[-1]))
        assert np.abs(off_diagonal).max() < 1e-5 * scale
        assert np.diff(eigenvalues).max() < 1e-5 * scale


def test_a_square_matrix_needs_no_borrowed_basis():
    """The whole of it in float64, eigenvectors and their signs included."""
    gradients = random_gradients((6, 6))
    reference = NumpySoap(every=5)
    for g, (u, _) in zip(gradients, run(scale_by_soap(**options()), gradients)):
        assert_close(u, reference.update(g))


def test_never_refreshing_is_another_optimizer():
    gradients = random_gradients((6, 6))
    never = run(scale_by_soap(**options(precondition_every=1000)), gradients)
    always = run(scale_by_soap(**options()), gradients)
    np.testing.assert_array_equal(never[5][0], always[5][0])
    assert np.abs(never[6][0] - always[6][0]).max() > 1e-2
    assert (never[-1][1].left_basis[0] == never[0][1].left_basis[0]).all()
    kept, refreshed = always[4][1].left_basis[0], always[5][1].left_basis[0]
    assert (kept == always[0][1].left_basis[0]).all()
    assert (refreshed != kept).any()


def test_turning_the_gradients_turns_the_updates():
    """U G V^T gives U u V^T, which holds for no optimizer that sees the entries, as Adam does."""
    rng = np.random.default_rng(1)
    u, v = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (6, 6))
    gradients = random_gradients((6, 6))
    turned = [np.float32(u @ g @ v.T) for g in gradients]
    for transform, limits in (
        (scale_by_soap(**options()), (0, 1e-3)),
        (optax.scale_by_adam(), (0.1, np.inf)),
    ):
        plain, other = (run(transform, g)[-1][0] for g in (gradients, turned))
        assert limits[0] <= np.abs(u @ plain @ v.T - other).max() <= limits[1]


def test_long_sides_keep_the_identity():
    gradients = random_gradients((5, 8))
    seen = run(scale_by_soap(**options(max_size=7)), gradients)
    assert seen[0][1].right == seen[0][1].right_basis == (None,)
    reference = NumpySoap(every=5, sides=(True, False))
    for g, (u, _) in zip(gradients, seen):
        assert_close(u, reference.update(g))


def test_without_bases_it_is_adam_from_the_second_gradient_on():
    gradients = random_gradients((5, 8))
    seen = run(scale_by_soap(**options(max_size=4)), gradients)
    assert not seen[0][0].any()
    expected = run(optax.scale_by_adam(b1=B1, b2=B2, eps=EPS), gradients[1:])
    for (got, _), (wanted, _) in zip(seen[1:], expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_soap_beats_adam_on_a_turned_ill_conditioned_quadratic():
    """Each at the best of the same learning rates, decayed to 0 over 200 steps."""
    rng = np.random.default_rng(2)
    turns = [np.linalg.qr(rng.standard_normal((8, 8)))[0] for _ in range(2)]
    a, b = (jnp.asarray(q @ np.diag(np.logspace(-2, 0, 8)) @ q.T, jnp.float32) for q in turns)
    start = jnp.asarray(rng.standard_normal((8, 8)), jnp.float32)

    def loss(w):
        return 0.5 * jnp.sum(w * (a @ w @ b))

    def last_loss(direction, rate):
        transform = optax.chain(
            direction, optax.scale_by_schedule(lambda step: -rate * (1 - step / 200))
        )

        def step(carry, _):
            w, state = carry
            updates, state = transform.update(jax.grad(loss)(w), state, w)
            return (w + updates, state), None

        (w, _), _ = jax.lax.scan(step, (start, transform.init(start)), length=200)
        return loss(w)

    rates = jnp.logspace(-3, 0, 7)
    best = {
        name: min(
            float(loss_at) for loss_at in jax.jit(jax.vmap(lambda r, d=d: last_loss(d, r)))(rates)
        )
        for name, d in (
            ("soap", scale_by_soap(b1=0.9, b2=0.95)),
            ("adam", optax.scale_by_adam(b1=0.9, b2=0.95)),
        )
    }
    assert best["soap"] < 0.1 * best["adam"]


def primitives(jaxpr, inside=False):
    """(name, whether it stands in a branch) of every operation of a jaxpr."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        yield name, inside
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from primitives(inner, inside or name == "cond")


def test_decompositions_run_only_when_due_and_once_for_each_size():
    params = {"a": jnp.zeros((2, 6, 8)), "b": jnp.zeros((8, 6)), "c": jnp.zeros((6, 6))}
    transform = scale_by_soap()
    jaxpr = jax.make_jaxpr(transform.update)(params, transform.init(params))
    found = [pair for pair in primitives(jaxpr.jaxpr) if pair[0] in ("eigh", "qr")]
    assert sorted(found) == [("eigh", True)] * 2 + [("qr", True)] * 2


def test_zero_gradients_stay_finite():
    for _, state in (seen := run(scale_by_soap(), [{"w": jnp.zeros((4, 6))}] * 13)):
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert not seen[-1][0]["w"].any()


def test_nan_gradients_are_not_hidden():
    gradients = random_gradients((4, 6), steps=3)
    gradients[1][0, 0] = np.nan
    assert jnp.isnan(run(scale_by_soap(), gradients)[-1][0]).any()


def test_inside_partition_with_bfloat16_leaves_and_shapes_alone():
    params = {
        "layers": {"gate": jnp.ones((2, 6, 8), jnp.bfloat16)},
        "norm": jnp.ones(6),
        "head": jnp.ones((6, 4)),
    }
    labels = {"layers": {"gate": "soap"}, "norm": "adam", "head": "soap"}
    transform = optax.partition(
        {"soap": soap(1e-2, weight_decay=0.1), "adam": optax.adamw(1e-2)}, labels
    )
    shapes = jax.eval_shape(transform.init, params)
    gradients = [
        jax.tree.map(lambda leaf, k=k: jnp.full_like(leaf, k), params) for k in (1.0, -2.0, 0.5)
    ]
    updates, state = run(transform, gradients, params)[-1]
    assert jax.tree.map(lambda u: u.dtype, updates) == jax.tree.map(lambda p: p.dtype, params)
    described = [
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (shapes, state)
    ]
    assert described[0] == described[1]
    inner = state.inner_states["soap"].inner_state[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(inner[1:])} == {jnp.dtype("float32")}
    places = jax.tree.unflatten(jax.tree.structure(params), list(by_path(params)))
    placed = place_state(inner, params, places, otherwise="everywhere")
    assert (
        placed.momentum["layers"]["gate"] == placed.second_moment["layers"]["gate"] == "layers/gate"
    )
    assert placed.left["head"] == ("everywhere",)


def test_weight_decay_and_learning_rate_follow():
    gradients = random_gradients((5, 8), steps=3)
    w = jnp.ones((5, 8))
    directions = run(scale_by_soap(), gradients)
    for (got, _), (u, _) in zip(run(soap(1e-2, weight_decay=0.1), gradients, w), directions):
        np.testing.assert_allclose(got, -1e-2 * (u + 0.1 * w), rtol=1e-5, atol=1e-8)


def test_inject_hyperparams():
    gradients = random_gradients((5, 6), steps=3)
    injected = optax.inject_hyperparams(soap, static_args=("precondition_every", "max_size"))(1e-2)
    for (got, _), (expected, _) in zip(run(injected, gradients), run(soap(1e-2), gradients)):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-7)
    with pytest.raises(SmoljaxError, match="static_args"):
        optax.inject_hyperparams(soap)(1e-2).init(gradients[0])


def test_bad_input_is_named():
    with pytest.raises(SmoljaxError, match=r"norm has shape \[6\]"):
        scale_by_soap().init({"norm": jnp.ones(6)})
    for dtype in (jnp.int32, jnp.complex64):
        with pytest.raises(SmoljaxError, match="table is"):
            scale_by_soap().init({"table": jnp.ones((6, 6), dtype)})
    for name, value in (
        ("b1", 1.0),
        ("b2", -0.1),
        ("shampoo_beta", 1.5),
        ("eps", 0.0),
        ("precondition_every", 0),
        ("max_size", 2.5),
    ):
        with pytest.raises(SmoljaxError, match=name):
            scale_by_soap(**{name: value})
    with pytest.raises(SmoljaxError, match="MatrixSpec"):
        scale_by_soap({"other": MatrixSpec()}).init({"w": jnp.ones((6, 6))})
