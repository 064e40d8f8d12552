"""Text in, text out: prompts are tokenized, continued and decoded."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax

from smoljax.errors import SmoljaxError
from smoljax.model import ModelConfig, generate, stream
from smoljax.tokens.tokenizer import Tokenizer

# Tokens between two pieces of streamed text: few enough to read along, many enough that the device does not wait.
TOKENS_PER_PIECE = 4


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """The `generation` section of a config. The defaults of temperature and top_p are SmolLM3's.

    Attributes:
      prompts: what `generate --samples=yes` continues.
      max_new_tokens: the most new tokens per prompt; cut where the model's max_seq_len ends.
      temperature: 0 takes the most likely token.
      top_k: sample among the k most likely tokens only; 0 is no limit.
      top_p: then among the fewest tokens that hold this probability mass; 1 is no limit.
      seed: of the draws.
    """

    prompts: tuple[str, ...] = ()
    max_new_tokens: int = 128
    temperature: float = 0.6
    top_k: int = 0
    top_p: float = 0.95
    seed: int = 0


class Sampler:
    """Continues texts with one model.

    Args:
      model: its configuration.
      params: its parameters.
      tokenizer: the one that made its training data.
      settings: how to draw.
    """

    def __init__(
        self, model: ModelConfig, params: dict, tokenizer: Tokenizer, settings: GenerationConfig
    ):
        self._model, self._params, self._tokenizer = model, params, tokenizer
        self._settings = settings

    def continue_all(self, prompts: Sequence[str]) -> list[str]:
        """The continuation of each prompt, up to the end of the document or max_new_tokens.

        Raises:
          SmoljaxError: there are no prompts, or one is too long.
        """
        if not prompts:
            raise SmoljaxError("config.generation.prompts is empty: name at least one prompt")
        ids = [self._encode(prompt) for prompt in prompts]
        rows = generate(self._model, self._params, ids, **self._options(ids))
        return [self._decode(row) for row in rows]

    def stream(self, prompt: str) -> Iterator[str]:
        """The continuation in pieces, as it is generated; each piece ends on a whole character."""
        ids = [self._encode(prompt)]
        new, written = [], ""
        for (chunk,) in stream(
            self._model,
            self._params,
            ids,
            tokens_per_chunk=TOKENS_PER_PIECE,
            **self._options(ids),
        ):
            new += chunk
            # A character whose bytes are not all there decodes to one U+FFFD per byte, three at most; they wait.
            text = self._decode(new)
            text = text[: max(len(text.rstrip("\ufffd")), len(text) - 3)]
            if text.startswith(written) and text != written:
                yield text[len(written) :]
                written = text
        rest = self._decode(new)[len(written) :]
        if rest:
            yield rest

    def _encode(self, prompt: str) -> list[int]:
        return [self._tokenizer.bos_id, *self._tokenizer.encode(prompt)]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([id for id in ids if id != self._tokenizer.eos_id])

    def _options(self, prompts: Sequence[Sequence[int]]) -> dict:
        longest = max(len(prompt) for prompt in prompts)
        room = self._model.max_seq_len - longest
        if room < 1:
            raise SmoljaxError(
                f"the longest prompt has {longest} tokens, but config.model.max_seq_len is "
                f"{self._model.max_seq_len}: shorten the prompt"
            )
        return {
            "max_new_tokens": min(self._settings.max_new_tokens, room),
            "temperature": self._settings.temperature,
            "top_k": self._settings.top_k,
            "top_p": self._settings.top_p,
            "key": jax.random.key(self._settings.seed),
            "stop_ids": (self._tokenizer.eos_id,),
        }
