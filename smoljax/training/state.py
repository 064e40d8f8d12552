"""What training carries from step to step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from smoljax import optim, parallel
from smoljax.model import ModelConfig, init, logical_axes


class TrainState(NamedTuple):
    """Step (int32 scalar: updates done), parameters (f32) and optimizer state."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState


def state_shapes(config: ModelConfig, optimizer: optax.GradientTransformation) -> TrainState:
    """The state as ShapeDtypeStructs: nothing is allocated."""
    return jax.eval_shape(
        lambda: _initial_state(config, optimizer, jax.random.key(0)),
    )


def state_shardings(mesh: Mesh, config: ModelConfig, shapes: TrainState) -> TrainState:
    """Where each leaf of the state lives."""
    params = parallel.param_shardings(mesh, logical_axes(config), shapes.params)
    replicated = NamedSharding(mesh, PartitionSpec())
    return TrainState(
        step=replicated,
        params=params,
        opt_state=optim.place_state(shapes.opt_state, shapes.params, params, otherwise=replicated),
    )


def make_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    shardings: TrainState,
) -> TrainState:
    """Initialises the state where it lives; its values do not depend on the sharding."""
    # A program that runs once: LLVM's first level compiles it in two thirds of the time, to the same values.
    on_cpu = shardings.step.mesh.devices.flat[0].platform == "cpu"
    make = jax.jit(
        lambda key: _initial_state(config, optimizer, key),
        out_shardings=shardings,
        compiler_options={"xla_backend_optimization_level": 1} if on_cpu else None,
    )
    return make(jax.random.key(seed))


def _initial_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    params = init(config, key)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
