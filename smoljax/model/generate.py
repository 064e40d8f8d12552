"""Text generation: prefill, then one compiled loop over new tokens.

Inside `smoljax.parallel.active(mesh)` it runs on the mesh: rows over data and fsdp, key-value heads over tensor.
(Devices along context repeat the work of one.)

B batch, P prompt slots, M new tokens, V vocabulary
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from smoljax.errors import SmoljaxError
from smoljax.model import sampling as draws
from smoljax.model.cache import CACHE_DTYPES, Cache, Prepared, decode, prefill, prepare
from smoljax.model.config import ModelConfig
from smoljax.model.sampling import Sampling

# Programs are compiled per batch size, prompt slots and room for new tokens; both lengths are rounded up to these.
_PROMPT_BUCKET = 32
_NEW_TOKENS_BUCKET = 64


def generate(
    config: ModelConfig,
    params: dict | Prepared,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    **options,
) -> list[list[int]]:
    """Continues each prompt: all that `stream` yields, joined, the new ids of each prompt. Takes its arguments."""
    chunks = stream(
        config,
        params,
        prompts,
        max_new_tokens=max_new_tokens,
        tokens_per_chunk=max_new_tokens,
        **options,
    )
    return [[token for part in parts for token in part] for parts in zip(*chunks)]


def stream(
    config: ModelConfig,
    params: dict | Prepared,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    tokens_per_chunk: int = 1,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    key: jax.Array | None = None,
    stop_ids: Sequence[int] = (),
    cache_dtype: str | None = None,
) -> Iterator[list[list[int]]]:
    """Continues each prompt, and yields its new ids every `tokens_per_chunk` tokens, as they come.

    A row that has ended yields empty lists. Arguments are checked when the first chunk is asked for.

    Args:
      config: the model.
      params: as `init` makes them, or the outcome of `smoljax.model.cache.prepare`, which spares doing that anew.
      prompts: token ids; lengths may differ, and no prompt influences another.
      max_new_tokens: the most new ids per prompt.
      tokens_per_chunk: how many ids come at once.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: sample among the k most likely tokens only; 0 is no limit.
      top_p: then among the fewest tokens that hold this probability mass; 1 is no limit.
      min_p: then among tokens at least this probable, relative to the most likely one; 0 is no limit.
      repetition_penalty: before all that (and when greedy), the positive logits of tokens that the prompt or the
        new text holds are divided by this, negative ones multiplied; 1 is no penalty.
      key: JAX random key; needed when temperature is above 0. Row b draws from fold_in(key, b).
      stop_ids: a row ends with the first of these that it produces (which is returned).
      cache_dtype: how keys and values are kept: "float32", "bfloat16", "int8" (a scale for each token and head);
        None is the compute dtype.

    Raises:
      SmoljaxError: no prompts, an empty prompt, an id outside the vocabulary, more tokens than max_seq_len, or an
        option out of its range.
    """
    _check(config, prompts, max_new_tokens, tokens_per_chunk, cache_dtype)
    kind, sampling = draws.options(
        vocab_size=config.vocab_size,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop_ids=stop_ids,
    )
    if temperature > 0 and key is None:
        raise SmoljaxError(
            f"temperature is {temperature} but key is None: give a key, as jax.random.key(seed)"
        )
    B = len(prompts)
    tokens_BP, first_B = _pad(prompts)
    key = jax.random.key(0) if key is None else key
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(first_B)))
    seen_BV = None if repetition_penalty == 1 else _seen(config.vocab_size, prompts, len(first_B))
    layout = Layout(kind, _round_up(max_new_tokens, _NEW_TOKENS_BUCKET), cache_dtype)
    with _without_context():
        prepared = params if isinstance(params, Prepared) else _prepare(config, params)
        done_B = np.arange(len(first_B)) >= B
        state = _start(
            config, layout, prepared, tokens_BP, first_B, keys_B, sampling, seen_BV, done_B
        )
    handed_out, ended_B = 0, np.zeros(B, bool)
    while handed_out < max_new_tokens and not ended_B.all():
        limit = min(handed_out + tokens_per_chunk, max_new_tokens)
        with _without_context():
            state = _continue(config, kind, prepared, state, first_B, keys_B, sampling, limit)
        chunk_BM = np.asarray(state.new_BM)[:B, handed_out : int(state.count)]
        handed_out += chunk_BM.shape[1]
        yield [_until_stop(row, ended_B, b, stop_ids) for b, row in enumerate(chunk_BM)]


class Layout(NamedTuple):
    """What is compiled: the kind of drawing, the room for new tokens, how the cache is kept."""

    kind: str
    room: int
    cache_dtype: str | None


class State(NamedTuple):
    """Where generation stands: `new_BM` holds `count` tokens per row, the last of which is not read yet."""

    cache: Cache
    new_BM: jax.Array
    count: jax.Array
    slot: jax.Array
    done_B: jax.Array
    seen_BV: jax.Array | None


_prepare = jax.jit(prepare, static_argnums=0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(
    config, layout, prepared, tokens_BP, first_B, keys_B, sampling, seen_BV, done_B
) -> State:
    """Reads the prompts and draws the first token."""
    B, P = tokens_BP.shape
    logits_BV, cache = prefill(
        config,
        prepared,
        tokens_BP,
        first_B,
        slots=P + layout.room,
        cache_dtype=layout.cache_dtype,
    )
    new_BM = jnp.zeros((B, layout.room), jnp.int32)
    state = State(cache, new_BM, jnp.int32(0), jnp.int32(P - 1), done_B, seen_BV)
    return _append(layout.kind, state, logits_BV, keys_B, sampling)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _continue(config, kind, prepared, state, first_B, keys_B, sampling, limit) -> State:
    """Goes on until every row has ended or holds `limit` tokens."""

    def unfinished(state):
        return (state.count < limit) & ~jnp.all(state.done_B)

    def step(state):
        token_B = jax.lax.dynamic_index_in_dim(state.new_BM, state.count - 1, 1, keepdims=False)
        logits_BV, cache = decode(config, prepared, state.cache, token_B, state.slot, first_B)
        return _append(kind, state._replace(cache=cache), logits_BV, keys_B, sampling)

    return jax.lax.while_loop(unfinished, step, state)


def _append(kind, state: State, logits_BV, keys_B, sampling: Sampling) -> State:
    """Draws the next token of each row."""
    scores_BV = draws.scores(kind, logits_BV, state.seen_BV, sampling)
    token_B = draws.draw(kind, scores_BV, keys_B, state.count)
    new_BM = jax.lax.dynamic_update_index_in_dim(state.new_BM, token_B, state.count, 1)
    seen_BV = state.seen_BV
    if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
    return State(
        state.cache,
        # Every host reads all rows.
        nn.with_logical_constraint(new_BM, (None, None)),
        state.count + 1,
        state.slot + 1,
        state.done_B | jnp.isin(token_B, sampling.stop_ids),
        seen_BV,
    )


def _until_stop(row, ended_B: np.ndarray, b: int, stop_ids: Sequence[int]) -> list[int]:
    tokens = []
    for token in row.tolist():
        if ended_B[b]:
            break
        tokens.append(token)
        ended_B[b] = token in stop_ids
    return tokens


def _pad(prompts) -> tuple[np.ndarray, np.ndarray]:
    """Prompts padded on the left, and where each begins; on a mesh, with further rows until they divide over it."""
    slots = _round_up(max(len(prompt) for prompt in prompts), _PROMPT_BUCKET)
    rows = _round_up(len(prompts), _batch_parts())
    tokens_BP = np.zeros((rows, slots), np.int32)
    first_B = np.full(rows, slots - 1, np.int32)
    for b, prompt in enumerate(prompts):
        first_B[b] = slots - len(prompt)
        tokens_BP[b, first_B[b] :] = prompt
    return tokens_BP, first_B


def _seen(vocab_size: int, prompts, rows: int) -> np.ndarray:
    seen_BV = np.zeros((rows, vocab_size), bool)
    for b, prompt in enumerate(prompts):
        seen_BV[b, list(prompt)] = True
    return seen_BV


def _batch_parts() -> int:
    """Over how many devices the active mesh splits the batch; 1 without one."""
    (axes,) = nn.logical_to_mesh_axes(("activation_batch",))
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))


def _without_context() -> contextlib.AbstractContextManager:
    """One token cannot be split along the sequence."""
    return nn.logical_axis_rules([("activation_sequence", None), *nn.get_logical_axis_rules()])


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _check(config, prompts, max_new_tokens, tokens_per_chunk, cache_dtype) -> None:
    if not len(prompts):
        raise SmoljaxError("generate got no prompts: give at least one list of token ids")
    if max_new_tokens < 1 or tokens_per_chunk < 1:
        raise SmoljaxError(
            f"max_new_tokens is {max_new_tokens} and tokens_per_chunk {tokens_per_chunk}: both must be at least 1"
        )
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
    if cache_dtype is not None and cache_dtype not in CACHE_DTYPES:
        raise SmoljaxError(
            f"cache_dtype is {cache_dtype!r}: set it to one of {', '.join(CACHE_DTYPES)}, or to None"
        )
