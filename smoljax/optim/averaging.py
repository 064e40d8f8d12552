"""Averages of the weights along a run, and the swap to them for evaluation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from smoljax.errors import SmoljaxError
from smoljax.optim.hyperparameters import check_number, check_whole
from smoljax.optim.partition import by_path, check_floats


class AverageState(NamedTuple):
    """State of ema_weights and tail_average.

    Attributes:
      count: int32 scalar, updates so far.
      average: tree of the parameters' shapes; equal to the parameters until the average begins.
    """

    count: jax.Array
    average: optax.Params


def ema_weights(
    decay: float, *, start_step: int = 0, dtype: jax.typing.DTypeLike | None = None
) -> optax.GradientTransformation:
    """Keeps an exponential moving average of the weights: average <- decay * average + (1 - decay) * W.

    A last link: updates pass through it unchanged, and W is what optax.apply_updates makes of them. The average begins as a copy
    of the weights after `start_step` updates, so that it needs no correction for a start at zero.

    Args:
      decay: share of the average that stays, below 1.
      start_step: updates before it begins; 0 begins with the initial weights.
      dtype: of the average; None: that of the parameters. bfloat16 cannot hold a decay above about 0.99.

    Raises:
      SmoljaxError: at once for a number out of range; in init for a leaf that is no real float; in update, when it gets no
        parameters.
    """
    check_number("decay", decay, at_least=0, below=1)
    return _average(lambda count: decay, start_step, dtype)


def tail_average(
    start_step: int, *, dtype: jax.typing.DTypeLike | None = None
) -> optax.GradientTransformation:
    """Keeps the mean of the weights after each update from number `start_step` on (Polyak and Juditsky 1992, on a tail).

    A last link, like ema_weights. After n updates the average is the mean of the n - start_step weights after updates
    start_step + 1 to n.

    Args:
      start_step: updates before the tail.
      dtype: of the average; None: that of the parameters.

    Raises:
      SmoljaxError: as ema_weights.
    """

    def keep(count: jax.Array) -> jax.Array:
        """The share of the mean that stays, when the weights after update `count` come to it: none at first."""
        members = jnp.maximum(count - start_step, 1).astype(jnp.float32)
        return (members - 1) / members

    return _average(keep, start_step, dtype)


def evaluation_params(state: optax.OptState, params: optax.Params) -> optax.Params:
    """The weights to evaluate with: the average inside an optimizer state, or the parameters themselves.

    Finds the state of ema_weights, tail_average or optax.contrib.schedule_free, however deep other transformations wrap it.
    Under optax.masked or optax.partition it holds a part of the parameters: the others are evaluated as they are.

    Args:
      state: the optimizer state after an update.
      params: the parameters after the same update.

    Raises:
      SmoljaxError: there are two such states, or the one that there is belongs to other parameters.
    """
    found = _averages(state)
    if len(found) > 1:
        raise SmoljaxError(
            f"the optimizer state holds {len(found)} averages of the weights "
            f"({', '.join(type(node).__name__ for node in found)}): keep one"
        )
    if not found:
        return params
    (node,) = found
    # By path, because trees that optax has masked have another structure.
    leaves = by_path(params)
    averages = by_path(node.average if isinstance(node, AverageState) else node.z)
    if strangers := [path for path in averages if path not in leaves]:
        raise SmoljaxError(
            f"the average holds {', '.join(strangers)}, which the parameters do not: give those that this state updates"
        )
    if not isinstance(node, AverageState):
        averages = optax.contrib.schedule_free_eval_params(
            node._replace(z=averages), {path: leaves[path] for path in averages}
        )
    return jax.tree.unflatten(
        jax.tree.structure(params),
        [averages.get(path, leaf).astype(leaf.dtype) for path, leaf in leaves.items()],
    )


def _averages(state: optax.OptState) -> list[AverageState | optax.contrib.ScheduleFreeState]:
    """All states of averages in a state, those inside schedule-free's base optimizer too."""
    kinds = (AverageState, optax.contrib.ScheduleFreeState)
    found = []
    for node in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds)):
        if isinstance(node, kinds):
            found.append(node)
        if isinstance(node, optax.contrib.ScheduleFreeState):
            found += _averages(node.base_optimizer_state)
    return found


def _average(keep, start_step: int, dtype) -> optax.GradientTransformation:
    """average <- keep * average + (1 - keep) * W after update number start_step; W itself up to there."""
    check_whole("start_step", start_step, at_least=0)

    def init(params: optax.Params) -> AverageState:
        check_floats(params)
        return AverageState(
            count=jnp.zeros([], jnp.int32),
            average=jax.tree.map(
                lambda leaf: jnp.array(leaf, dtype or jnp.result_type(leaf)), params
            ),
        )

    def update(updates, state, params=None):
        if params is None:
            raise SmoljaxError(
                "averaging needs the parameters: call update(updates, state, params)"
            )
        count = optax.safe_increment(state.count)
        weight = keep(count)
        begun = count > start_step

        def mix(average: jax.Array, leaf: jax.Array) -> jax.Array:
            mixed = weight * average.astype(jnp.float32) + (1 - weight) * leaf.astype(jnp.float32)
            return jnp.where(begun, mixed, leaf).astype(average.dtype)

        average = jax.tree.map(mix, state.average, optax.apply_updates(params, updates))
        return updates, AverageState(count=count, average=average)

    return optax.GradientTransformation(init, update)
