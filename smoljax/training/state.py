"""What training carries from step to step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from smoljax import optim, parallel
from smoljax.model import ModelConfig, init, logical_axes, param_shapes


class TrainState(NamedTuple):
    """Step (int32 scalar: updates done), parameters (f32) and optimizer state."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState


def state_shapes(config: ModelConfig, optimizer: optax.GradientTransformation) -> TrainState:
    """The state as ShapeDtypeStructs: nothing is allocated."""
    params = param_shapes(config)
    return TrainState(
        jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(optimizer.init, params)
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
    make = jax.jit(
        lambda key: _initial_state(config, optimizer, key),
        out_shardings=shardings,
        compiler_options=compiler_options(shardings.step.mesh),
    )
    return make(jax.random.key(seed))


def compiler_options(mesh: Mesh) -> dict[str, int] | None:
    """XLA's options for the programs of training.

    On a CPU LLVM's first level compiles them in less time than its third (benchmarks/first_step.py), and they run as fast: their time
    goes into matrix products, which a library does, and into memory.

    On TPUs no product is cut into a loop of small ones, beside each the exchange of the next part ("windowed einsum"). libtpu 0.0.42 does
    that to large matrices, and by its own cycles the parts lose more than they hide: SmolLM3-3B on v5p-128 with tensor 4 took 3.91 s of
    estimated step with 15,444 collective-permutes, and takes 1.88 s without; an 8B model on v6e-16 took 9.61 s, and takes 4.24 s.
    """
    return {
        "cpu": {"xla_backend_optimization_level": 1},
        "tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000},
    }.get(mesh.devices.flat[0].platform)


def _initial_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    params = init(config, key)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
