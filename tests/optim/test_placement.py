import jax
import jax.numpy as jnp

from smoljax.optim import OptimizerConfig, build, place_state
from smoljax.optim.partition import by_path


def test_moments_go_where_their_parameter_is(random_tree, axes):
    params = jax.eval_shape(lambda: random_tree(0))
    for name in ("adamw", "muon"):
        transform = build(OptimizerConfig(name=name), params, logical_axes=axes, num_steps=10)
        state = jax.eval_shape(transform.init, params)
        places = jax.tree.unflatten(jax.tree.structure(params), list(by_path(params)))
        got = place_state(state, params, places, otherwise="everywhere")
        assert jax.tree.structure(got) == jax.tree.structure(state)
        for (path, place), leaf in zip(by_path(got).items(), jax.tree.leaves(state)):
            assert path.endswith("/" + place) if leaf.ndim else place == "everywhere", path


def test_an_array_of_another_shape_is_not_placed_like_the_parameter():
    params = {"w": jnp.ones((4, 3))}
    state = {"w": jnp.ones((4, 3)), "rows": {"w": jnp.ones(4)}, "mean": jnp.ones((4, 3))}
    got = place_state(state, params, {"w": "split"}, otherwise="everywhere")
    assert got == {"w": "split", "rows": {"w": "everywhere"}, "mean": "everywhere"}
