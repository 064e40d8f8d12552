import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smoljax.errors import SmoljaxError
from smoljax.optim import (
    OptimizerConfig,
    Rule,
    build,
    learning_rate_schedule,
    metrics,
    scale_by_muon,
    treatments,
)
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
        return -config.learning_rate * table[role].multiplier * config.weight_decay * leaf

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


@pytest.mark.parametrize("name", ["adamw", "muon"])
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


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_orbax_keeps_the_state(random_tree, axes, name, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    transform = build(
        dataclasses.replace(CONFIG, name=name), random_tree(0), logical_axes=axes, num_steps=6
    )
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
    assert float(got["gradient_norm"]) == pytest.approx(count**0.5, rel=1e-6)
    assert float(got["clipped"]) == 1


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


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "adam"}, "config.optimizer.name is 'adam'.*'adamw', 'muon'"),
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
