import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smoljax.errors import SmoljaxError
from smoljax.optim.decay import add_decayed_weights
from smoljax.optim.muon import muon

PARAMS = {"w": jnp.float32([[2.0, -2.0, 2.0, -2.0, 0.0, 3.0]])}
DIRECTION = {"w": jnp.float32([[1.0, -1.0, -1.0, 1.0, 1.0, 0.0]])}


def random_tree(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.float32(rng.standard_normal((5, 7))) for name in ("a", "b")}


@pytest.mark.parametrize("strength", [0.0, 0.1, optax.linear_schedule(0.3, 0.1, 2)])
@pytest.mark.parametrize("mask", [None, {"a": True, "b": False}])
def test_plain_decay_is_that_of_optax_to_the_bit(strength, mask):
    ours, theirs = add_decayed_weights(strength, mask), optax.add_decayed_weights(strength, mask)
    params = random_tree(0)
    our_state, their_state = ours.init(params), theirs.init(params)
    for step in range(3):
        direction = random_tree(1 + step)
        got, our_state = ours.update(direction, our_state, params)
        want, their_state = theirs.update(direction, their_state, params)
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_cautious_decay_acts_where_step_and_decay_go_the_same_way():
    """W <- W - lr (u + wd W 1[u W >= 0]): an entry that the step moves away from 0 keeps its decay off."""
    chain = optax.chain(add_decayed_weights(0.5, cautious=True), optax.scale_by_learning_rate(0.1))
    updates, _ = jax.jit(chain.update)(DIRECTION, chain.init(PARAMS), PARAMS)
    step = -0.1 * DIRECTION["w"]
    decay = -0.1 * 0.5 * PARAMS["w"] * jnp.float32([[1, 1, 0, 0, 1, 1]])
    np.testing.assert_allclose(updates["w"], step + decay, rtol=1e-6)
    shrinks = np.abs(PARAMS["w"] + step) < np.abs(PARAMS["w"])
    np.testing.assert_array_equal(shrinks, [[True, True, False, False, False, False]])
    np.testing.assert_array_equal((decay != 0) & (step != 0), shrinks)


def test_cautious_decay_compares_signs_not_rounded_products():
    tiny = {"w": jnp.float32([[1e-30, 1e-30]])}
    direction = {"w": jnp.float32([[-1e-30, 1e-30]])}
    transform = add_decayed_weights(1.0, cautious=True)
    updates, _ = transform.update(direction, transform.init(tiny), tiny)
    np.testing.assert_allclose(updates["w"], [[-1e-30, 2e-30]], rtol=1e-6)


def test_cautious_decay_takes_schedules_and_masks():
    transform = add_decayed_weights(
        optax.linear_schedule(1.0, 0.0, 2), {"a": True, "b": False}, cautious=True
    )
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    state = transform.init(params)
    for strength in (1.0, 0.5, 0.0):
        updates, state = jax.jit(transform.update)(params, state, params)
        np.testing.assert_allclose(updates["a"], 1 + strength)
        np.testing.assert_allclose(updates["b"], 1)


def test_muon_decays_cautiously_and_by_a_schedule():
    rng = np.random.default_rng(0)
    params, gradient = ({"w": jnp.float32(rng.standard_normal((8, 12)))} for _ in range(2))

    def update(**options):
        transform = muon(0.1, **options)
        return jax.jit(transform.update)(gradient, transform.init(params), params)[0]["w"]

    bare = update()
    step = np.asarray(bare)
    same_way = step * params["w"] <= 0
    np.testing.assert_allclose(
        update(weight_decay=lambda _: 0.5, cautious=True),
        step - 0.1 * 0.5 * params["w"] * same_way,
        rtol=1e-5,
        atol=1e-7,
    )
    np.testing.assert_allclose(
        update(weight_decay=lambda _: 0.5), step - 0.05 * params["w"], rtol=1e-5, atol=1e-7
    )
    assert 0.2 < np.mean(same_way) < 0.8


def test_wrong_use_is_refused():
    with pytest.raises(SmoljaxError, match=r"weight_decay is -0\.1"):
        add_decayed_weights(-0.1)
    transform = add_decayed_weights(0.1, cautious=True)
    with pytest.raises(SmoljaxError, match="needs the parameters"):
        transform.update(DIRECTION, transform.init(PARAMS))
