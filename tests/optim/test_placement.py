import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

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


MESH = AbstractMesh((4, 2), ("fsdp", "tensor"))


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((3, 1, 64), (None, None, ("fsdp", "tensor"))),  # a number for each neuron
        ((3, 1, 6), (None, None, "tensor")),
        ((4, 1, 64), ("fsdp", None, "tensor")),
        ((3, 32, 32), (None, "fsdp", "tensor")),  # SOAP's
        ((3, 64, 64), (None, "fsdp", "tensor")),
        ((3, 1, 1), (None, None, None)),
    ],
)
def test_a_statistic_is_split_over_the_mesh_axes_of_its_parameter(shape, spec):
    place = NamedSharding(MESH, PartitionSpec(None, "fsdp", "tensor"))
    state = {"left": {"w": (jnp.ones(shape),)}}
    got = place_state(state, {"w": jnp.ones((3, 32, 64))}, {"w": place}, otherwise="everywhere")
    assert got["left"]["w"][0] == NamedSharding(MESH, PartitionSpec(*spec))
