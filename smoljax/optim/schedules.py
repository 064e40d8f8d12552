"""Learning-rate schedules: functions from the step (from 0, int) to a float32 scalar, for use inside jit."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from smoljax.errors import SmoljaxError

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]

# Each maps the share of the decay that is left to do (1 to 0) to the share of the peak (1 to 0). They are written in what
# is left, not in what is done, because the last rates are small and 1 - done would round them away.
TAILS = {
    "linear": lambda left: left,
    "cosine": lambda left: jnp.square(jnp.sin(0.5 * jnp.pi * left)),  # = (1 + cos(pi * done)) / 2
    "1-sqrt": lambda left: left / (1.0 + jnp.sqrt(1.0 - left)),  # = 1 - sqrt(done)
}


def wsd(
    peak: float,
    *,
    warmup_steps: int,
    decay_start: int,
    decay_steps: int,
    tail: str = "linear",
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
      tail: "linear", "cosine" or "1-sqrt" (arXiv 2405.18392).
      final_fraction: the end, as a share of the peak.

    Raises:
      SmoljaxError: an unknown tail, a negative length, or a decay that starts inside the warmup.
    """
    if tail not in TAILS:
        raise SmoljaxError(f"tail is {tail!r}: choose one of {', '.join(TAILS)}")
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
        decayed = final_fraction + (1.0 - final_fraction) * TAILS[tail](left)
        return jnp.float32(peak) * jnp.where(step < warmup_steps, warm, decayed)

    return schedule


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
