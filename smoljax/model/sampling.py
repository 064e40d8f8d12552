"""From logits to the next token, by the rules of transformers' generate().

B batch, V vocabulary
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from smoljax.errors import SmoljaxError


class Sampling(NamedTuple):
    """Scalars that shape the distribution, and the ids that end a row; traced, so no value compiles anew.

    Attributes:
      temperature: f32, divides the logits.
      top_k: int32, how many tokens stay; vocab_size is no limit.
      top_p: f32, the probability mass that stays.
      min_p: f32, the least probability relative to the most likely token's.
      repetition_penalty: f32.
      stop_ids: int32 [any].
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    stop_ids: jax.Array


def options(
    *,
    vocab_size: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    stop_ids,
) -> tuple[str, Sampling]:
    """What is to be compiled ("greedy", "plain" or "filtered"), and the values for it.

    Raises:
      SmoljaxError: a value is out of its range.
    """
    _check(temperature, top_k, top_p, min_p, repetition_penalty)
    for stop in stop_ids:
        if not 0 <= stop < vocab_size:
            raise SmoljaxError(
                f"stop_ids holds {stop}, outside the model's vocabulary of {vocab_size}: it would never come"
            )
    # Sorting the vocabulary takes longer than a small model, so only top-k and top-p pay for it.
    filtered = top_k != 0 or top_p != 1
    kind = "greedy" if temperature == 0 else "filtered" if filtered else "plain"
    return kind, Sampling(
        temperature=np.float32(temperature or 1.0),
        top_k=np.int32(min(top_k or vocab_size, vocab_size)),
        top_p=np.float32(top_p),
        min_p=np.float32(min_p),
        repetition_penalty=np.float32(repetition_penalty),
        stop_ids=np.asarray(stop_ids, np.int32),
    )


def scores(
    kind: str, logits_BV: jax.Array, seen_BV: jax.Array | None, sampling: Sampling
) -> jax.Array:
    """The logits that are drawn from, f32 [B, V], with -inf for what may not come.

    In this order: repetition penalty, temperature, top-k, top-p, min-p; greedy takes the first only. Tokens that tie
    with the last one that top-k or top-p keeps stay as well (in transformers, top-p keeps some of them).

    Args:
      kind: "greedy", "plain" (no top-k nor top-p) or "filtered".
      logits_BV: f32.
      seen_BV: bool, the tokens of the prompt and those produced; None is no repetition penalty.
      sampling: the options.
    """
    if seen_BV is not None:
        penalty = sampling.repetition_penalty
        lowered_BV = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
        logits_BV = jnp.where(seen_BV, lowered_BV, logits_BV)
    if kind == "greedy":
        return logits_BV
    logits_BV = logits_BV / sampling.temperature
    if kind == "filtered":
        logits_BV = _filter(logits_BV, sampling.top_k, sampling.top_p)
    # p < min_p * p_max, in logarithms. The most likely token always stays.
    most_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    return jnp.where(logits_BV >= most_B1 + jnp.log(sampling.min_p), logits_BV, -jnp.inf)


def draw(kind: str, scores_BV: jax.Array, keys_B: jax.Array, count: jax.Array | int) -> jax.Array:
    """One token per row, int32 [B].

    Args:
      kind: "greedy" takes the highest score, the others draw.
      scores_BV: of `scores`.
      keys_B: one random key per row.
      count: number of the token, folded into the keys.
    """
    if kind == "greedy":
        return _first_of_the_highest(scores_BV)
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, count)
    return jax.vmap(jax.random.categorical)(keys_B, scores_BV).astype(jnp.int32)


def _first_of_the_highest(scores_BV) -> jax.Array:
    """argmax; for which XLA's CPU compiler makes a loop over single numbers, five times as slow as these two passes."""
    V = scores_BV.shape[-1]
    highest_B1 = jnp.max(scores_BV, axis=-1, keepdims=True)
    return jnp.min(jnp.where(scores_BV < highest_B1, V, jnp.arange(V, dtype=jnp.int32)), axis=-1)


def _filter(logits_BV, top_k, top_p) -> jax.Array:
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    least_B1 = jax.lax.dynamic_slice_in_dim(sorted_BV, top_k - 1, 1, axis=1)
    sorted_BV = jnp.where(sorted_BV >= least_B1, sorted_BV, -jnp.inf)
    mass_BV = jax.nn.softmax(sorted_BV, axis=-1)
    mass_before_BV = jnp.cumsum(mass_BV, axis=-1) - mass_BV
    # The first token has no mass before it, so at least one is kept. (Rounded, the mass before may reach 1 too early.)
    kept_BV = ((mass_before_BV < top_p) | (top_p >= 1)) & (sorted_BV > -jnp.inf)
    least_B1 = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)


def _check(temperature, top_k, top_p, min_p, repetition_penalty) -> None:
    if not 0 <= temperature < math.inf:
        raise SmoljaxError(
            f"temperature is {temperature}: set it to 0 (greedy) or to a number above"
        )
    if not isinstance(top_k, int | np.integer) or isinstance(top_k, bool) or top_k < 0:
        raise SmoljaxError(f"top_k is {top_k!r}: set it to 0 (no limit) or to a whole number above")
    if not 0 < top_p <= 1:
        raise SmoljaxError(f"top_p is {top_p}: set it above 0 and at most 1")
    if not 0 <= min_p <= 1:
        raise SmoljaxError(f"min_p is {min_p}: set it to 0 (no limit) or above, at most 1")
    if not 0 < repetition_penalty < math.inf:
        raise SmoljaxError(
            f"repetition_penalty is {repetition_penalty}: set it to 1 (none), or above 1 to make repetition rarer"
        )
