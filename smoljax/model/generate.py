"""Text generation: prefill, then one compiled loop over new tokens.

B batch, P prompt slots, M new tokens, V vocabulary
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from smoljax.errors import SmoljaxError
from smoljax.model.cache import Cache, decode, prefill, prepare
from smoljax.model.config import ModelConfig

# Programs are compiled per batch size, prompt slots and room for new tokens; both lengths are rounded up to these.
_PROMPT_BUCKET = 32
_NEW_TOKENS_BUCKET = 64


def generate(
    config: ModelConfig,
    params: dict,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    stop_ids: Sequence[int] = (),
) -> list[list[int]]:
    """Continues each prompt.

    Args:
      config: the model.
      params: as `init` makes them.
      prompts: token ids; lengths may differ, and no prompt influences another.
      max_new_tokens: the most new ids per prompt.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: sample among the k most likely tokens only; 0 is no limit.
      top_p: then sample among the fewest tokens that hold this probability mass; 1 is no limit.
      key: JAX random key; needed when temperature is above 0. Row b draws from fold_in(key, b).
      stop_ids: a row ends with the first of these that it produces (which is returned).

    Returns:
      The new ids of each prompt.

    Raises:
      SmoljaxError: no prompts, an empty prompt, an id outside the vocabulary, more tokens than max_seq_len, or a
        sampling option out of its range.
    """
    chunks = stream(
        config,
        params,
        prompts,
        max_new_tokens=max_new_tokens,
        tokens_per_chunk=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        key=key,
        stop_ids=stop_ids,
    )
    return [[token for part in parts for token in part] for parts in zip(*chunks)]


def stream(
    config: ModelConfig,
    params: dict,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    tokens_per_chunk: int = 1,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    stop_ids: Sequence[int] = (),
) -> Iterator[list[list[int]]]:
    """Like `generate`, but yields the new ids of each prompt every `tokens_per_chunk` tokens, as they come.

    A row that has ended yields empty lists. Joined, the chunks are what `generate` returns. Arguments are checked
    when the first chunk is asked for.
    """
    _check(config, prompts, max_new_tokens, tokens_per_chunk, temperature, top_k, top_p, key)
    tokens_BP, first_B = _pad_left(prompts)
    sampling = Sampling(
        temperature=jnp.float32(temperature or 1.0),
        top_k=jnp.int32(top_k or config.vocab_size),
        top_p=jnp.float32(top_p),
        stop_ids=jnp.asarray(stop_ids, jnp.int32),
    )
    kind = "greedy" if temperature == 0 else "plain" if top_k == 0 and top_p == 1 else "filtered"
    key = jax.random.key(0) if key is None else key
    keys_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(len(prompts)))
    room = _round_up(max_new_tokens, _NEW_TOKENS_BUCKET)
    prepared = _prepare(config, params)
    state = _start(config, kind, room, params, tokens_BP, first_B, keys_B, sampling)
    handed_out, ended_B = 0, np.zeros(len(prompts), bool)
    while handed_out < max_new_tokens and not ended_B.all():
        limit = min(handed_out + tokens_per_chunk, max_new_tokens)
        state = _continue(config, kind, prepared, state, first_B, keys_B, sampling, limit)
        chunk_BM = np.asarray(state.new_BM)[:, handed_out : int(state.count)]
        handed_out += chunk_BM.shape[1]
        yield [_until_stop(row, ended_B, b, stop_ids) for b, row in enumerate(chunk_BM)]


class Sampling(NamedTuple):
    """Scalars that shape the distribution, and the ids that end a row; traced, so no value compiles anew."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    stop_ids: jax.Array


class State(NamedTuple):
    """Where generation stands: `new_BM` holds `count` tokens per row, the last of which is not read yet."""

    cache: Cache
    new_BM: jax.Array
    count: jax.Array
    slot: jax.Array
    done_B: jax.Array


_prepare = jax.jit(prepare, static_argnums=0)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _start(config, kind, room, params, tokens_BP, first_B, keys_B, sampling) -> State:
    """Reads the prompts and draws the first token."""
    B, P = tokens_BP.shape
    logits_BV, cache = prefill(config, params, tokens_BP, first_B, slots=P + room)
    token_B = sample(kind, logits_BV, keys_B, 0, sampling)
    new_BM = jnp.zeros((B, room), jnp.int32).at[:, 0].set(token_B)
    done_B = jnp.isin(token_B, sampling.stop_ids)
    return State(cache, new_BM, jnp.int32(1), jnp.int32(P), done_B)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _continue(config, kind, prepared, state, first_B, keys_B, sampling, limit) -> State:
    """Goes on until every row has ended or holds `limit` tokens."""

    def unfinished(state):
        return (state.count < limit) & ~jnp.all(state.done_B)

    def step(state):
        token_B = jax.lax.dynamic_index_in_dim(state.new_BM, state.count - 1, 1, keepdims=False)
        logits_BV, cache = decode(config, prepared, state.cache, token_B, state.slot, first_B)
        token_B = sample(kind, logits_BV, keys_B, state.count, sampling)
        new_BM = jax.lax.dynamic_update_index_in_dim(state.new_BM, token_B, state.count, 1)
        done_B = state.done_B | jnp.isin(token_B, sampling.stop_ids)
        return State(cache, new_BM, state.count + 1, state.slot + 1, done_B)

    return jax.lax.while_loop(unfinished, step, state)


def sample(
    kind: str,
    logits_BV: jax.Array,
    keys_B: jax.Array,
    count: jax.Array | int,
    sampling: Sampling,
) -> jax.Array:
    """Draws one token per row, int32 [B]: temperature, then top-k, then top-p (the order of transformers).

    Args:
      kind: "greedy", "plain" (temperature only) or "filtered".
      logits_BV: f32.
      keys_B: one random key per row.
      count: number of the token, folded into the keys.
      sampling: the options.
    """
    if kind == "greedy":
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if kind == "filtered":
        sorted_BV = -jnp.sort(-logits_BV, axis=-1)
        among_top_k = (jnp.arange(logits_BV.shape[1]) < sampling.top_k)[None]
        sorted_BV = jnp.where(among_top_k, sorted_BV, -jnp.inf)
        mass_BV = jax.nn.softmax(sorted_BV, axis=-1)
        mass_before_BV = jnp.cumsum(mass_BV, axis=-1) - mass_BV
        # The first token has no mass before it, so at least one is kept.
        kept_BV = among_top_k & (mass_before_BV < sampling.top_p)
        least_B1 = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, count)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def _until_stop(row, ended_B: np.ndarray, b: int, stop_ids: Sequence[int]) -> list[int]:
    tokens = []
    for token in row.tolist():
        if ended_B[b]:
            break
        tokens.append(token)
        ended_B[b] = token in stop_ids
    return tokens


def _pad_left(prompts) -> tuple[jax.Array, jax.Array]:
    slots = _round_up(max(len(prompt) for prompt in prompts), _PROMPT_BUCKET)
    tokens_BP = np.zeros((len(prompts), slots), np.int32)
    for row_P, prompt in zip(tokens_BP, prompts):
        row_P[slots - len(prompt) :] = prompt
    return jnp.asarray(tokens_BP), jnp.asarray([slots - len(prompt) for prompt in prompts])


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _check(
    config, prompts, max_new_tokens, tokens_per_chunk, temperature, top_k, top_p, key
) -> None:
    if not len(prompts):
        raise SmoljaxError("generate got no prompts: give at least one list of token ids")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise SmoljaxError(f"prompt {number} is empty: begin it with the tokenizer's BOS id")
        for token in prompt:
            if not 0 <= token < config.vocab_size:
                raise SmoljaxError(
                    f"prompt {number} holds token id {token}, outside the model's vocabulary of "
                    f"{config.vocab_size}: encode it with the tokenizer that the model was trained with"
                )
        if len(prompt) + max_new_tokens > config.max_seq_len:
            raise SmoljaxError(
                f"prompt {number} has {len(prompt)} tokens, and with {max_new_tokens} new ones exceeds the model's "
                f"max_seq_len={config.max_seq_len}: shorten it, or lower max_new_tokens"
            )
    if max_new_tokens < 1 or tokens_per_chunk < 1:
        raise SmoljaxError(
            f"max_new_tokens is {max_new_tokens} and tokens_per_chunk {tokens_per_chunk}: both must be at least 1"
        )
    if not temperature >= 0:
        raise SmoljaxError(f"temperature is {temperature}: set it to 0 (greedy) or above")
    if top_k < 0:
        raise SmoljaxError(f"top_k is {top_k}: set it to 0 (no limit) or above")
    if not 0 < top_p <= 1:
        raise SmoljaxError(f"top_p is {top_p}: set it above 0 and at most 1")
    if temperature > 0 and key is None:
        raise SmoljaxError(
            f"temperature is {temperature} but key is None: give a key, as jax.random.key(seed)"
        )
