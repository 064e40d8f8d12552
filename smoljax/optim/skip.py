"""Skipping the steps whose loss or gradient norm is far above what the last steps had.

W entries of a window
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from smoljax.errors import SmoljaxError
from smoljax.optim.clip import global_norm
from smoljax.optim.hyperparameters import check_number, check_whole
from smoljax.optim.partition import check_floats


class Window(NamedTuple):
    """The last values of a series.

    Attributes:
      values: float32 [W]; those from `count` on are empty until it has been filled once.
      count: int32 scalar below 2 W, so that it never overflows: values so far, less a multiple of W. The next goes to
        place count % W.
    """

    values: jax.Array
    count: jax.Array


class SkipReport(NamedTuple):
    """What skip_spikes did in its last update. All are float32 scalars.

    Attributes:
      skipped: 1 if it skipped the update, else 0.
      skipped_total: updates that it has skipped so far.
      norm: the global L2 norm of the gradient.
      norm_threshold: the norm above which it skips; inf while fewer than at_least norms are known.
      loss_threshold: likewise for the loss; inf also where no loss is given.
    """

    skipped: jax.Array
    skipped_total: jax.Array
    norm: jax.Array
    norm_threshold: jax.Array
    loss_threshold: jax.Array


class SkipState(NamedTuple):
    """State of skip_spikes.

    Attributes:
      inner: the state of the transformation inside.
      losses: the last losses.
      norms: the last gradient norms.
      report: what the last update did.
    """

    inner: object
    losses: Window
    norms: Window
    report: SkipReport


def skip_spikes(
    inner: optax.GradientTransformation,
    *,
    window: int = 128,
    at_least: int = 64,
    factor: float = 6.0,
) -> optax.GradientTransformationExtraArgs:
    """Skips an update whose loss or gradient norm is above mean + factor * deviation of the last `window` ones.

    A skipped update is all zeros and the inner state stays as it was, with its momentum and its step count: schedules
    inside pause. Call it as `update(updates, state, params, value=loss)`; without `value` the norm alone decides. `value` and
    other keyword arguments also reach the inner transformation. Put into an optax.chain it sees the gradient that the links
    before it return: clip inside, not before, or a spike is no longer one.

    The rule is OLMo-core's (optim/skip_step_optimizer.py) as levanter has it for JAX (optim/skipstep.py): 128 entries,
    at least half of them, 6 deviations, upwards only, with the population's deviation. As in both, the loss and norm of a skipped
    update enter the window. A higher level that stays is therefore accepted in the end, and of a burst of equal
    spikes far above the noise the first four in a window are skipped. Two things differ:
    - An update whose loss or norm is not finite is always skipped, also while the window fills, and enters no
      window. There, one NaN makes every comparison false until it has left the window.
    - The deviation counts as at least 1e-6 of the mean (levanter: 1e-6), so that rounding is no spike in a constant series.

    On a CPU the inner update stands in a loop of 0 or 1 turns (see _unless), which has no derivative in reverse mode.

    Args:
      inner: the transformation whose updates are skipped, usually the whole optimizer.
      window: entries that mean and deviation are taken of.
      at_least: entries before anything but a non-finite update is skipped.
      factor: deviations above the mean that still pass.

    Raises:
      SmoljaxError: at once for a number out of range; in init for a leaf that is no real float; in update for a loss that is
        not a scalar.
    """
    check_whole("window", window, at_least=2)
    check_whole("at_least", at_least, at_least=2)
    check_number("factor", factor, above=0)
    if at_least > window:
        raise SmoljaxError(
            f"at_least is {at_least} and window {window}: the window never holds that many; lower at_least"
        )
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> SkipState:
        check_floats(params)

        def number(value: float) -> jax.Array:
            return jnp.full([], value, jnp.float32)

        return SkipState(
            inner=inner.init(params),
            losses=_empty(window),
            norms=_empty(window),
            report=SkipReport(
                skipped=number(0),
                skipped_total=number(0),
                norm=number(0),
                norm_threshold=number(jnp.inf),
                loss_threshold=number(jnp.inf),
            ),
        )

    def update(
        updates: optax.Updates,
        state: SkipState,
        params: optax.Params | None = None,
        *,
        value: jax.typing.ArrayLike | None = None,
        **extra_args,
    ) -> tuple[optax.Updates, SkipState]:
        norm = global_norm(updates)
        norm_threshold = _threshold(state.norms, at_least, factor)
        loss_threshold = jnp.full([], jnp.inf, jnp.float32)
        finite, spike = jnp.isfinite(norm), norm > norm_threshold
        losses = state.losses
        if value is not None:
            loss = _scalar(value)
            extra_args["value"] = value
            loss_threshold = _threshold(state.losses, at_least, factor)
            finite, spike = finite & jnp.isfinite(loss), spike | (loss > loss_threshold)
            losses = _with(state.losses, loss, where=finite)
        skip = spike | ~finite

        def inner_update(gradient: optax.Updates, held: object) -> tuple[optax.Updates, object]:
            return inner.update(gradient, held, params, **extra_args)

        updates, inner_state = _unless(skip, inner_update, updates, state.inner)
        skipped = skip.astype(jnp.float32)
        return updates, SkipState(
            inner=inner_state,
            losses=losses,
            norms=_with(state.norms, norm, where=finite),
            report=SkipReport(
                skipped=skipped,
                skipped_total=state.report.skipped_total + skipped,
                norm=norm,
                norm_threshold=norm_threshold,
                loss_threshold=loss_threshold,
            ),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _unless(
    skip: jax.Array, update: Callable, gradient: optax.Updates, state: object
) -> tuple[optax.Updates, object]:
    """update(gradient, state), or zeros and the state where `skip` is true."""

    def by_select(skip, gradient, state):
        updates, moved = update(gradient, state)
        return updates, jax.tree.map(lambda old, new: jnp.where(skip, old, new), state, moved)

    def by_loop(skip, gradient, state):
        """Of 0 or 1 turns. The gradient's place is the updates', the old state's the new one's."""
        if _types(jax.eval_shape(update, gradient, state)) != _types((gradient, state)):
            return by_select(skip, gradient, state)
        *result, _ = jax.lax.while_loop(
            lambda carry: ~carry[2],
            lambda carry: (*update(*carry[:2]), True),
            (gradient, state, skip),
        )
        return tuple(result)

    # TPU compilers put a select into the fusion that writes the new state, at no cost. XLA's for CPUs writes it in one fusion,
    # reads the old state in another, and copies that first: AdamW of eight 1024x1024 float32 matrices with donated buffers
    # took 60 ms and 60 MiB under a select, 64 and 96 under a cond, 38 and 32 in the loop, 32 and 32 with no choice at all.
    updates, state = jax.lax.platform_dependent(
        skip, gradient, state, cpu=by_loop, default=by_select
    )
    return jax.tree.map(lambda leaf: jnp.where(skip, jnp.zeros_like(leaf), leaf), updates), state


def _types(tree: object) -> object:
    return jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), tree)


def _empty(size: int) -> Window:
    return Window(values=jnp.zeros([size], jnp.float32), count=jnp.zeros([], jnp.int32))


def _with(window: Window, value: jax.Array, *, where: jax.Array) -> Window:
    """The window after one more value, where there is one."""
    size = window.values.size
    place = window.count % size
    values = window.values.at[place].set(jnp.where(where, value, window.values[place]))
    count = window.count + where.astype(jnp.int32)
    return Window(values=values, count=jnp.where(count == 2 * size, size, count))


def _threshold(window: Window, at_least: int, factor: float) -> jax.Array:
    """mean + factor * deviation of the values in a window; inf while there are fewer than at_least."""
    size = window.values.size
    filled_W = (jnp.arange(size) < window.count).astype(jnp.float32)
    known = jnp.maximum(jnp.sum(filled_W), 1.0)
    mean = jnp.sum(filled_W * window.values) / known
    deviation = jnp.sqrt(jnp.sum(filled_W * jnp.square(window.values - mean)) / known)
    deviation = jnp.maximum(deviation, 1e-6 * jnp.abs(mean))
    return jnp.where(window.count >= at_least, mean + factor * deviation, jnp.inf)


def _scalar(value: jax.typing.ArrayLike) -> jax.Array:
    value = jnp.asarray(value, jnp.float32)
    if value.ndim:
        raise SmoljaxError(
            f"value has shape {list(value.shape)}: give the loss of the step as a scalar"
        )
    return value
