"""Learning-rate schedules: functions from the step (from 0, int) to a float32 scalar, for use inside jit."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from smoljax.errors import SmoljaxError
from smoljax.optim.hyperparameters import check_number, check_whole

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]

POWER = 1.2  # A cooldown that ends a little flatter than the line.

# Each maps the share of the decay that is left to do (1 to 0) to the share of the peak (1 to 0). They are written in what
# is left, not in what is done, because the last rates are small and 1 - done would round them away.
TAILS = {
    "linear": lambda left: left,
    "cosine": lambda left: jnp.square(jnp.sin(0.5 * jnp.pi * left)),  # = (1 + cos(pi * done)) / 2
    "1-sqrt": lambda left: left / (1.0 + jnp.sqrt(1.0 - left)),  # = 1 - sqrt(done)
    "power": lambda left, power=POWER: left**power,
}


def wsd(
    peak: float,
    *,
    warmup_steps: int,
    decay_start: int,
    decay_steps: int,
    tail: str = "linear",
    power: float = POWER,
    final_fraction: float = 0.0,
) -> Schedule:
    """Warmup, stable, decay: linear from 0 to the peak, constant, then down over the tail.

    The value is peak * step / warmup_steps up to step warmup_steps, the peak up to decay_start, and
    peak * (decay_steps - (step - decay_start)) / decay_steps after it for the linear tail. That is SmolLM3's formula
    (nanotron, helpers.py), where the peak is 2e-4, warmup_steps 2000, decay_start 4198001, decay_steps 522000.

    Args:
      peak: the highest value.
      warmup_steps: steps of the warmup; 0 starts at the peak.
      decay_start: the last step at the peak.
      decay_steps: steps from the peak to the end; the end is held afterwards.
      tail: "linear", "cosine", "1-sqrt" (arXiv 2405.18392) or "power".
      power: exponent of the tail "power": the share of the peak is that of the decay which is left, to this power.
      final_fraction: the end, as a share of the peak.

    Raises:
      SmoljaxError: an unknown tail, a number out of range, or a decay that starts inside the warmup.
    """
    shape = _tail(tail, power)
    check_number("peak", peak, at_least=0)
    check_number("final_fraction", final_fraction, at_least=0, at_most=1)
    if warmup_steps < 0 or decay_steps < 0:
        raise SmoljaxError(
            f"warmup_steps is {warmup_steps} and decay_steps {decay_steps}: neither can be below 0"
        )
    if decay_start < warmup_steps:
        raise SmoljaxError(
            f"the decay starts at step {decay_start}, inside the warmup of {warmup_steps} steps: "
            "shorten warmup_steps or decay_steps"
        )

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        # Steps are subtracted as integers, so that the ratios below are exact to one rounding at any step.
        step = jnp.asarray(step)
        warm = step.astype(jnp.float32) / max(warmup_steps, 1)
        past = jnp.clip(step - decay_start, 0, decay_steps)
        left = (
            (decay_steps - past).astype(jnp.float32) / decay_steps
            if decay_steps
            else jnp.float32(1)
        )
        decayed = final_fraction + (1.0 - final_fraction) * shape(left)
        return jnp.float32(peak) * jnp.where(step < warmup_steps, warm, decayed)

    return schedule


def cyclic_wsd(
    peak: float,
    *,
    cycle_steps: int,
    warmup_steps: int,
    decay_steps: int,
    tail: str = "linear",
    power: float = POWER,
    final_fraction: float = 0.0,
) -> Schedule:
    """`wsd` again and again: every cycle warms up to the peak from where the one before ended, holds it, and decays.

    The end of each cycle is a finished model (WSD-S, arXiv 2410.05192); after the last step of a cycle the next begins.

    Args:
      peak: the highest value.
      cycle_steps: steps of a cycle.
      warmup_steps: steps of each warmup; the first is from 0, later ones from final_fraction * peak.
      decay_steps: steps from the peak to the end of each cycle.
      tail: as in wsd.
      power: as in wsd.
      final_fraction: the end of each cycle, as a share of the peak.

    Raises:
      SmoljaxError: as wsd, or a cycle too short for its warmup and decay.
    """
    if cycle_steps < 1 or warmup_steps + decay_steps > cycle_steps:
        raise SmoljaxError(
            f"a cycle has {cycle_steps} steps, its warmup {warmup_steps} and its decay {decay_steps}: "
            "make the cycle as long as both together"
        )
    cycle = wsd(
        peak,
        warmup_steps=warmup_steps,
        decay_start=cycle_steps - decay_steps,
        decay_steps=decay_steps,
        tail=tail,
        power=power,
        final_fraction=final_fraction,
    )

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step)
        # The last step of a cycle belongs to it: the end is reached, and then left.
        number = jnp.maximum(step - 1, 0) // cycle_steps
        within = step - number * cycle_steps
        start = jnp.where(number > 0, jnp.float32(final_fraction * peak), 0.0)
        warm = start * (1 - within.astype(jnp.float32) / max(warmup_steps, 1))
        return cycle(within) + jnp.where(within < warmup_steps, warm, 0.0)

    return schedule


def inverse_sqrt(peak: float, *, warmup_steps: int, timescale: int | None = None) -> Schedule:
    """Linear warmup, then peak * sqrt(timescale / (timescale + step - warmup_steps)).

    With timescale = warmup_steps that is peak * sqrt(warmup_steps / step) (Vaswani et al., arXiv 1706.03762, equation 3);
    with a time scale of its own it is transformers' get_inverse_sqrt_schedule, from big_vision.

    Args:
      peak: the highest value, at the end of the warmup.
      warmup_steps: steps of the warmup; 0 starts at the peak.
      timescale: steps after the warmup until the rate is peak / sqrt(2); None: warmup_steps.

    Raises:
      SmoljaxError: a negative peak or warmup, or no time scale.
    """
    check_number("peak", peak, at_least=0)
    scale = warmup_steps if timescale is None else timescale
    if warmup_steps < 0 or scale < 1:
        raise SmoljaxError(
            f"warmup_steps is {warmup_steps} and timescale {timescale}: inverse_sqrt decays on the scale of one of them, "
            "give at least 1 step"
        )

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step)
        warm = step.astype(jnp.float32) / max(warmup_steps, 1)
        past = jnp.maximum(step - warmup_steps, 0).astype(jnp.float32)
        decayed = jnp.sqrt(scale / (scale + past))
        return jnp.float32(peak) * jnp.where(step < warmup_steps, warm, decayed)

    return schedule


def batch_size_ramp(
    start: int, final: int, *, num_steps: int, num_stages: int, multiple_of: int = 1
) -> tuple[tuple[int, int], ...]:
    """A batch that grows from `start` to `final` in equal spans of steps: pairs (step, batch size before that step).

    It is what smoljax's config.data.batch_ramp takes, before a config.data.batch_size of `final`. The sizes lie on a line,
    rounded down to a multiple.

    Args:
      start: the first size.
      final: the size from step num_steps on.
      num_steps: length of the ramp.
      num_stages: sizes before the final one.
      multiple_of: what every size is a multiple of (devices times micro-batches).

    Raises:
      SmoljaxError: a number below 1, or sizes that do not rise from stage to stage or are no multiples.
    """
    for name, value in (
        ("start", start),
        ("final", final),
        ("num_steps", num_steps),
        ("num_stages", num_stages),
        ("multiple_of", multiple_of),
    ):
        check_whole(name, value, at_least=1)
    sizes = [
        (start + (final - start) * stage // num_stages) // multiple_of * multiple_of
        for stage in range(num_stages)
    ]
    steps = [num_steps * (stage + 1) // num_stages for stage in range(num_stages)]
    rises = all(a < b for a, b in zip([0, *sizes], [*sizes, final]))
    rises = rises and all(a < b for a, b in zip([0, *steps], steps))
    if not rises or start % multiple_of or final % multiple_of:
        raise SmoljaxError(
            f"a batch from {start} to {final} in {num_stages} stages of {num_steps} steps, in multiples of {multiple_of}, has "
            f"sizes {[*sizes, final]}: give multiples, and so few stages that each is larger than the one before"
        )
    return tuple(zip(steps, sizes))


def cosine(
    peak: float, *, warmup_steps: int, num_steps: int, final_fraction: float = 0.0
) -> Schedule:
    """Linear warmup, then half a cosine that reaches final_fraction * peak at num_steps."""
    return _decay_at_once(peak, warmup_steps, num_steps, "cosine", final_fraction)


def linear(
    peak: float, *, warmup_steps: int, num_steps: int, final_fraction: float = 0.0
) -> Schedule:
    """Linear warmup, then a line that reaches final_fraction * peak at num_steps."""
    return _decay_at_once(peak, warmup_steps, num_steps, "linear", final_fraction)


def constant(peak: float, *, warmup_steps: int = 0) -> Schedule:
    """Linear warmup, then the peak for ever."""
    return wsd(peak, warmup_steps=warmup_steps, decay_start=warmup_steps, decay_steps=0)


def _tail(name: str, power: float) -> Callable[[jax.Array], jax.Array]:
    """The share of the peak by the share of the decay that is left."""
    if name not in TAILS:
        raise SmoljaxError(f"tail is {name!r}: choose one of {', '.join(TAILS)}")
    if not power > 0:
        raise SmoljaxError(f"power is {power}: give an exponent above 0")
    return functools.partial(TAILS[name], power=power) if name == "power" else TAILS[name]


def _decay_at_once(
    peak: float, warmup_steps: int, num_steps: int, tail: str, final_fraction: float
) -> Schedule:
    if num_steps <= warmup_steps:
        raise SmoljaxError(
            f"warmup_steps is {warmup_steps} of {num_steps} steps in all: leave steps after the warmup"
        )
    return wsd(
        peak,
        warmup_steps=warmup_steps,
        decay_start=warmup_steps,
        decay_steps=num_steps - warmup_steps,
        tail=tail,
        final_fraction=final_fraction,
    )
