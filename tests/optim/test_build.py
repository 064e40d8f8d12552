import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smoljax.errors import SmoljaxError
from smoljax.optim import (
    Multipliers,
    OptimizerConfig,
    Rule,
    build,
    evaluation_params,
    learning_rate_schedule,
    measure_updates,
    metrics,
    multipliers,
    scale_by_muon,
    treatments,
)
from smoljax.optim.config import MATRIX_OPTIMIZERS, NAMES, ON_THE_SPHERE, update_rule
from smoljax.optim.partition import by_path

CONFIG = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, decay_fraction=0.5)


def run(transform, random_tree, steps=6):
    """All parameters, updates and states of a few jitted steps with donated buffers."""

    def step(params, state, gradients):
        updates, state = transform.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, updates

    step = jax.jit(step, donate_argnums=(0, 1))
    params = random_tree(100)
    state = jax.jit(transform.init)(params)
    history = []
    for i in range(steps):
        params, state, updates = step(params, state, random_tree(i))
        history.append(jax.tree.map(np.asarray, (params, updates, state)))
    return history


def test_adamw_is_optax_adamw_bitwise(random_tree, axes):
    decayed = jax.tree.map(lambda _: True, random_tree(0)) | {"embedding": False}
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            learning_rate_schedule(CONFIG, 6), b1=0.9, b2=0.95, weight_decay=0.1, mask=decayed
        ),
    )
    ours = build(CONFIG, random_tree(0), logical_axes=axes, num_steps=6)
    for got, want in zip(run(ours, random_tree), run(theirs, random_tree)):
        jax.tree.map(np.testing.assert_array_equal, got[:2], want[:2])
    everything = build(
        dataclasses.replace(CONFIG, no_decay_roles=()),
        random_tree(0),
        logical_axes=axes,
        num_steps=6,
    )
    params = run(everything, random_tree)[-1][0]
    assert (params["embedding"] != got[0]["embedding"]).any()
    np.testing.assert_array_equal(params["final_norm"], got[0]["final_norm"])


def test_muon_moves_hidden_matrices_and_adamw_the_rest(random_tree, axes):
    config = dataclasses.replace(CONFIG, name="muon", adamw_learning_rate=3e-3, clip_norm=None)
    params = random_tree(0)
    got = run(build(config, params, logical_axes=axes, num_steps=6), random_tree)
    peaks = {"hidden": 1e-2, "embedding": 3e-3}
    # Step 2 is the first at the peak; before it the rate is 0 and half the peak.
    rms = {
        path: np.sqrt(np.mean(leaf**2))
        for path, leaf in by_path(
            jax.tree.map(lambda a, b: a - b, got[2][1], _decay(got[1][0], config))
        ).items()
    }
    assert rms["layers/mlp/gate"] == pytest.approx(0.2 * peaks["hidden"], rel=0.08)
    for name in ("query", "key", "value", "output"):
        assert rms[f"layers/attention/{name}"] == pytest.approx(0.2 * peaks["hidden"], rel=0.08)

    adamw = optax.adamw(learning_rate_schedule(config, 6), b1=0.9, b2=0.95, weight_decay=0.0)
    want = run(adamw, random_tree)
    for name in ("embedding",):  # the one role without decay
        for ours, theirs in zip(got, want):
            np.testing.assert_allclose(
                ours[1][name] / peaks["embedding"], theirs[1][name] / peaks["hidden"], rtol=1e-5
            )


def _decay(params, config):
    """The weight-decay part of the update at the peak rate."""
    table = treatments(config)
    roles = {"embedding": "embedding", "head": "head", "final_norm": "norm"}

    def part(path, leaf):
        role = roles.get(path[0].key, "hidden")
        return -table[role].learning_rate * table[role].weight_decay * leaf

    return jax.tree_util.tree_map_with_path(part, params)


def test_muon_by_role_is_scale_by_muon_on_the_leaf(random_tree, axes):
    config = OptimizerConfig(
        name="muon",
        schedule="constant",
        learning_rate=0.5,
        weight_decay=0,
        clip_norm=None,
        scale="spectral",
    )
    transform = build(config, random_tree(0), logical_axes=axes, num_steps=6)
    gradient = random_tree(1)
    updates, _ = jax.jit(transform.update)(gradient, jax.jit(transform.init)(gradient), gradient)
    alone = {"w": gradient["layers"]["mlp"]["down"]}
    muon = scale_by_muon(scale="spectral")
    want, _ = jax.jit(muon.update)(alone, muon.init(alone))
    np.testing.assert_allclose(updates["layers"]["mlp"]["down"], -0.5 * want["w"], atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_alone_are_enough(random_tree, axes, name):
    shapes = jax.eval_shape(lambda: random_tree(0))
    transform = build(
        dataclasses.replace(CONFIG, name=name), shapes, logical_axes=axes, num_steps=6
    )
    state = jax.eval_shape(transform.init, shapes)
    real = transform.init(random_tree(0))
    assert jax.tree.structure(state) == jax.tree.structure(real)
    after = jax.eval_shape(transform.update, shapes, state, shapes)[1]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )


EVERYTHING = dict(
    clip="adagc",
    centralize_gradients=True,
    normalize_gradients=True,
    skip_spikes=True,
    average="ema",
    metrics=True,
)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("adamw", {}),
        ("muon", EVERYTHING),
        ("normuon", dict(average="tail", clip="zclip")),
        ("soap", {}),
        ("muonh", {}),
        ("schedule_free", {}),
    ],
)
def test_orbax_keeps_the_state(random_tree, axes, name, fields, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    config = dataclasses.replace(CONFIG, name=name, **fields)
    transform = build(config, random_tree(0), logical_axes=axes, num_steps=6)
    state = run(transform, random_tree, steps=2)[-1][2]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        empty = jax.eval_shape(transform.init, random_tree(0))
        restored = checkpointer.restore(tmp_path / "state", empty)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_the_names_in_the_state_are_stable(random_tree, axes):
    transform = build(OptimizerConfig(name="muon"), random_tree(0), logical_axes=axes, num_steps=6)
    paths = list(by_path(transform.init(random_tree(0))))
    assert paths[:2] == ["clip/norm", "clip/clipped"]
    assert "moments/inner_states/muon/inner_state/momentum/layers/mlp/gate" in paths
    assert "moments/inner_states/adamw/inner_state/nu/embedding" in paths
    assert "moments/inner_states/adamw/inner_state/nu/layers/mlp/gate" not in paths
    assert paths[-1] == "learning_rate/count"


def test_metrics_are_those_of_the_last_update(random_tree, axes):
    transform = build(CONFIG, random_tree(0), logical_axes=axes, num_steps=6)
    gradient = jax.tree.map(jnp.ones_like, random_tree(0))
    _, state = jax.jit(transform.update)(gradient, jax.jit(transform.init)(gradient), gradient)
    count = sum(leaf.size for leaf in jax.tree.leaves(gradient))
    got = metrics(state)
    assert float(got.gradient_norm) == pytest.approx(count**0.5, rel=1e-6)
    assert float(got.clipped) == 1
    assert float(got.gradient_cosine) == 1
    assert set(got.scalars()) == {"gradient_norm", "clipped", "gradient_cosine"}


@pytest.mark.parametrize(
    ("field", "metric"),
    [
        ("centralize_gradients", "centralized_cosine"),
        ("normalize_gradients", "normalized_cosine"),
    ],
)
def test_what_is_done_to_gradients_is_measured(random_tree, axes, field, metric):
    """The cosine to the gradient as it came, of the hidden matrices for the mean and of everything for unit blocks."""
    config = OptimizerConfig(clip_norm=1e9, **{field: True})
    transform = build(config, random_tree(0), logical_axes=axes, num_steps=6)
    raw = {
        path: (leaf + 0.5) * (1 + i)
        for i, (path, leaf) in enumerate(by_path(random_tree(1)).items())
    }
    gradient = jax.tree.unflatten(jax.tree.structure(random_tree(1)), list(raw.values()))
    _, state = jax.jit(transform.update)(gradient, transform.init(gradient), gradient)
    given, used = [], []
    for path, leaf in raw.items():
        leaf = np.float64(leaf)
        stacked = path.startswith("layers/")
        if field == "normalize_gradients":
            within = tuple(range(int(stacked), leaf.ndim))
            result = leaf / np.sqrt(np.mean(leaf**2, axis=within, keepdims=True))
        elif "/mlp/" in path or "/attention/" in path:
            inputs = (1, 2) if path.endswith("output") else (1,)
            result = leaf - leaf.mean(axis=inputs, keepdims=True)
        else:
            continue
        given.append(leaf.ravel())
        used.append(result.ravel())
    given, used = np.concatenate(given), np.concatenate(used)
    cosine = given @ used / np.linalg.norm(given) / np.linalg.norm(used)
    scalars = metrics(state).scalars()
    assert set(scalars) == {"gradient_norm", "clipped", "gradient_cosine", metric}
    assert float(scalars[metric]) == pytest.approx(cosine, abs=1e-5)
    assert cosine < 0.99


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_lowers_a_loss_and_keeps_to_its_roles(random_tree, axes, name):
    """Least squares towards another tree; a matrix optimizer leaves embedding and norms to AdamW."""
    rate = 0.05 if name in ON_THE_SPHERE else 0.02
    config = OptimizerConfig(
        name=name, learning_rate=rate, adamw_learning_rate=0.02, weight_decay=0, schedule="constant"
    )
    target, params = random_tree(1), random_tree(0)
    transform = build(config, params, logical_axes=axes, num_steps=20)

    def loss(params):
        return sum(
            jnp.mean(jnp.square(a - b))
            for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(target))
        )

    @jax.jit
    def step(params, state):
        updates, state = transform.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    trained, state = params, jax.jit(transform.init)(params)
    for _ in range(20):
        trained, state = step(trained, state)
    assert loss(evaluation_params(state, trained)) < 0.95 * loss(params)
    if name in MATRIX_OPTIMIZERS:
        adamw = build(
            dataclasses.replace(config, name="adamw", learning_rate=0.02),
            params,
            logical_axes=axes,
            num_steps=20,
        )
        want = run_on(adamw, jax.grad(loss)(params), params)
        got = run_on(transform, jax.grad(loss)(params), params)
        for role in ("embedding", "head", "final_norm"):
            np.testing.assert_array_equal(got[role], want[role])
        assert (got["layers"]["mlp"]["up"] != want["layers"]["mlp"]["up"]).any()
    if name in ON_THE_SPHERE:
        before, after = (tree["layers"]["mlp"]["up"] for tree in (params, trained))
        np.testing.assert_allclose(
            jnp.linalg.norm(after, axis=(-2, -1)), jnp.linalg.norm(before, axis=(-2, -1)), rtol=1e-5
        )


def run_on(transform, gradient, params):
    """The first update."""
    return jax.jit(transform.update)(gradient, jax.jit(transform.init)(params), params)[0]


def test_a_group_has_a_rate_a_decay_and_a_schedule_of_its_own(random_tree, axes):
    config = OptimizerConfig(
        learning_rate=1e-2,
        warmup_steps=2,
        groups={
            "embedding": {"learning_rate": 4e-2, "schedule": "constant", "warmup_steps": 0},
            "norm": {"weight_decay": 0.5},
        },
    )
    table = treatments(config)
    assert (table["embedding"].learning_rate, table["embedding"].schedule) == (4e-2, "constant")
    assert table["embedding"].weight_decay == 0  # still one of no_decay_roles
    assert (table["norm"].weight_decay, table["hidden"].weight_decay) == (0.5, 0.1)
    got = run(build(config, random_tree(0), logical_axes=axes, num_steps=6), random_tree, steps=1)
    assert np.abs(got[0][1]["embedding"]).mean() == pytest.approx(4e-2, rel=1e-3)
    assert np.abs(got[0][1]["layers"]["mlp"]["up"]).max() == 0  # the others' warmup is at rate 0
    with pytest.raises(SmoljaxError, match=r"'experts', which no parameter has.*embedding, head"):
        build(
            dataclasses.replace(config, groups={"experts": {}}),
            random_tree(0),
            logical_axes=axes,
            num_steps=6,
        )


@pytest.mark.parametrize("name", ["adamw", "muon", "muonh"])
def test_multipliers_scale_rate_decay_and_eps_by_role(random_tree, axes, name):
    config = OptimizerConfig(name=name, eps=1e-6, learning_rate=1e-2)
    factors = multipliers("mup", width=4.0, rule=update_rule(config))
    table, plain = treatments(config, factors), treatments(config)
    rates = {"adamw": 1 / 4, "muon": 1 / 2, "muonh": 1.0}  # muon's scale is "rms"
    assert table["hidden"].learning_rate == pytest.approx(1e-2 * rates[name])
    assert table["embedding"].learning_rate == 1e-2
    for role in ("hidden", "norm"):
        product = table[role].learning_rate * table[role].weight_decay
        assert product == pytest.approx(plain[role].learning_rate * plain[role].weight_decay)
    assert table["embedding"].eps == pytest.approx(1e-6 / 4)
    ones = dict.fromkeys(factors, Multipliers())
    shapes = jax.eval_shape(lambda: random_tree(0))
    build(config, shapes, logical_axes=axes, num_steps=6, multipliers=factors)
    assert treatments(config, ones) == plain


def test_a_spike_is_left_out_and_counted(random_tree, axes):
    config = dataclasses.replace(CONFIG, name="muon", skip_spikes=True)
    transform = build(config, random_tree(0), logical_axes=axes, num_steps=6)
    update = jax.jit(transform.update)
    params = random_tree(0)
    _, state = update(random_tree(1), transform.init(params), params, value=jnp.float32(1.0))
    bad = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    updates, after = update(bad, state, params, value=jnp.float32(1.0))
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(updates))
    assert float(metrics(after).skipped) == 1
    updates, _ = update(random_tree(2), after, params, value=jnp.float32(jnp.inf))
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(updates))


def test_metrics_of_every_leaf_are_those_of_the_update(random_tree, axes):
    config = OptimizerConfig(name="muon", schedule="constant", metrics=True, learning_rate=0.01)
    transform = build(config, random_tree(0), logical_axes=axes, num_steps=6)
    params = random_tree(0)
    updates, state = jax.jit(transform.update)(
        random_tree(1), jax.jit(transform.init)(params), params
    )
    got = metrics(state)
    assert set(got.update_rms) == set(got.update_ratio) == set(by_path(params))
    for path, update in by_path(updates).items():
        rms = float(jnp.sqrt(jnp.mean(jnp.square(update))))
        weight = float(jnp.sqrt(jnp.mean(jnp.square(by_path(params)[path]))))
        assert float(got.update_rms[path]) == pytest.approx(rms, rel=1e-5)
        assert float(got.update_ratio[path]) == pytest.approx(rms / weight, rel=1e-5)
    assert set(got.orthogonality_error) == {
        path for path in by_path(params) if "/mlp/" in path or "/attention/" in path
    }
    assert all(0 < float(error) < 0.5 for error in got.orthogonality_error.values())
    # The first momentum is the gradient.
    assert all(float(cosine) == pytest.approx(1) for cosine in got.momentum_cosine.values())


def test_metrics_hold_the_largest_logit_and_the_share_of_clipped_heads():
    transform = optax.chain(optax.sgd(0.1), measure_updates())
    params = {"w": jnp.ones((2, 2))}
    state = transform.init(params)
    max_logits = {"layer_0": jnp.float32([90, 101, 130]), "layer_1": jnp.float32([7, 8, 250, 9])}
    got = metrics(state, max_logits=max_logits, tau=100.0)
    assert (float(got.max_logit), float(got.qk_clipped)) == (250, pytest.approx(3 / 7))
    of_stack = jax.jit(lambda logits: metrics(state, max_logits=logits, tau=50.0).scalars())
    scalars = of_stack(jnp.float32([[60, 1], [2, 3]]))
    assert (float(scalars["max_logit"]), float(scalars["qk_clipped"])) == (60, 0.25)
    assert not {"max_logit", "qk_clipped"} & set(metrics(state).scalars())
    with pytest.raises(SmoljaxError, match="measure_updates needs the parameters"):
        transform.update(params, state)


def test_decay_follows_the_rate_when_asked(random_tree, axes):
    """At half the peak rate the decay part is a quarter of that at the peak; with a constant decay a half."""
    zeros = jax.tree.map(jnp.zeros_like, random_tree(0))
    params = random_tree(0)

    def decays(kind):
        config = OptimizerConfig(
            warmup_steps=4, learning_rate=0.1, weight_decay_schedule=kind, b2=0.9
        )
        transform = build(config, params, logical_axes=axes, num_steps=100)
        state, parts = transform.init(params), []
        for _ in range(5):
            updates, state = jax.jit(transform.update)(zeros, state, params)
            parts.append(float(jnp.abs(updates["layers"]["mlp"]["up"]).mean()))
        return parts[2] / parts[4]

    assert decays("constant") == pytest.approx(1 / 2, rel=1e-5)
    assert decays("learning_rate") == pytest.approx(1 / 4, rel=1e-5)


def test_heads_per_matrix_orthogonalises_heads_apart(random_tree, axes):
    def direction(heads):
        config = OptimizerConfig(
            name="muon", schedule="constant", weight_decay=0, heads_per_matrix=heads, clip_norm=None
        )
        transform = build(config, random_tree(0), logical_axes=axes, num_steps=6)
        return run_on(transform, random_tree(1), random_tree(0))["layers"]["attention"]

    alone, whole = direction(1), direction(None)
    muon = scale_by_muon()  # [D, H] of each head, by hand
    by_head = {"q": random_tree(1)["layers"]["attention"]["query"].transpose(0, 2, 1, 3)}
    want = jax.jit(muon.update)(by_head, muon.init(by_head))[0]["q"].transpose(0, 2, 1, 3)
    np.testing.assert_allclose(alone["query"], -2e-4 * want, atol=1e-8)
    assert np.abs(alone["output"] - whole["output"]).max() > 1e-6
    with pytest.raises(SmoljaxError, match=r"heads per matrix.*choose a divisor"):
        direction(3)


def test_schedules_of_the_config():
    def rates(steps, **fields):
        schedule = learning_rate_schedule(OptimizerConfig(learning_rate=1.0, **fields), 100)
        return [round(float(schedule(step)), 5) for step in steps]

    steps = (0, 5, 10, 80, 90, 100)
    warm = dict(warmup_steps=10)
    assert rates(steps, decay_fraction=0.2, **warm) == [0, 0.5, 1, 1, 0.5, 0]
    assert rates(steps, decay_steps=20, final_fraction=0.5, **warm) == [0, 0.5, 1, 1, 0.75, 0.5]
    assert rates(steps, decay_steps=20, decay_start=70, **warm) == [0, 0.5, 1, 0.5, 0, 0]
    assert rates((10, 55, 100), schedule="cosine", **warm) == [1, 0.5, 0]
    assert rates((10, 55, 100), schedule="linear", final_fraction=0.5, **warm) == [1, 0.75, 0.5]
    assert rates((0, 5, 10, 99), schedule="constant", **warm) == [0, 0.5, 1, 1]
    assert rates((5, 10, 40), schedule="inverse_sqrt", **warm) == [0.5, 1, 0.5]
    cycles = dict(schedule="cyclic_wsd", num_cycles=2, decay_fraction=0.4, warmup_steps=5)
    assert rates((0, 5, 30, 40, 50, 55, 80, 90, 100), **cycles) == [0, 1, 1, 0.5, 0, 1, 1, 0.5, 0]
    power = dict(decay_tail="power", decay_power=2.0, decay_fraction=0.2)
    assert rates((80, 90, 100), **power) == [1, 0.25, 0]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "adam"}, "config.optimizer.name is 'adam'.*'adamw', .*'muon'"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"adamw_learning_rate": -1.0}, "adamw_learning_rate"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"b2": 1.5}, "b2 is 1.5"),
        ({"weight_decay": float("nan")}, "weight_decay"),
        ({"scale": "moonlight"}, "'rms'"),
        ({"coefficients": "muon"}, "keller"),
        ({"newton_schulz_dtype": "float16"}, "bfloat16"),
        ({"decay_tail": "sqrt"}, "1-sqrt"),
        ({"no_decay_roles": ("embeddings",)}, "no_decay_roles.*'embeddings'"),
        ({"clip": "norm"}, "config.optimizer.clip is 'norm'.*'adagc'"),
        ({"groups": {"norm": {"rate": 1.0}}}, "groups.norm is 'rate'.*'learning_rate'"),
        ({"groups": {"norm": {"learning_rate": -1.0}}}, "learning_rate is -1.0"),
        ({"average": "swa"}, "average is 'swa'"),
        ({"name": "schedule_free", "average": "ema"}, "schedule_free cannot have"),
        ({"name": "muonh", "qk_clip_tau": 100.0}, "muonh cannot have"),
        ({"qk_clip_tau": 0.0}, "qk_clip_tau is 0.0"),
        ({"b1": 1.0}, "config.optimizer.b1 is 1.0: give a number at least 0 and below 1"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"average_decay": 1.0}, "average_decay is 1.0"),
        ({"heads_per_matrix": 1.5}, "heads_per_matrix is 1.5: give a whole number from 1$"),
        ({"precondition_every": 2.5}, "config.optimizer.precondition_every is 2.5"),
        ({"decay_steps": -1}, "config.optimizer.decay_steps is -1: give a whole number from 0$"),
        ({"decay_start": -1}, "config.optimizer.decay_start is -1"),
        ({"average_start": -1}, "config.optimizer.average_start is -1"),
        ({"groups": {"norm": {"warmup_steps": -1}}}, "warmup_steps is -1"),
    ],
)
def test_wrong_fields_are_refused_by_name(fields, words):
    with pytest.raises(SmoljaxError, match=words):
        OptimizerConfig(**fields)


def test_what_does_not_fit_the_run_is_refused(random_tree, axes):
    params = random_tree(0)
    with pytest.raises(SmoljaxError, match="inside the warmup"):
        build(OptimizerConfig(warmup_steps=95), params, logical_axes=axes, num_steps=100)
    with pytest.raises(SmoljaxError, match="no role rule matches 12"):
        build(OptimizerConfig(), params, num_steps=100)
    with pytest.raises(SmoljaxError, match="'router' has no treatment"):
        build(OptimizerConfig(), params, num_steps=100, rules=(Rule("router", path=""),))
