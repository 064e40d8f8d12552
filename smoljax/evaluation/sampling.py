"""Text in, text out: prompts are tokenized, continued and decoded."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax

from smoljax.errors import SmoljaxError
from smoljax.model import ModelConfig, generate, stream
from smoljax.model.cache import CACHE_DTYPES
from smoljax.tokens.tokenizer import Tokenizer

# Tokens between two pieces of streamed text: few enough to read along, many enough that the device does not wait.
TOKENS_PER_PIECE = 4
# Tokens between two looks for a stop string when nobody reads along.
TOKENS_PER_LOOK = 16


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """The `generation` section of a config. The defaults of temperature and top_p are SmolLM3's.

    Attributes:
      prompts: what `generate --samples=yes` continues.
      max_new_tokens: the most new tokens per prompt; cut where the model's max_seq_len ends.
      temperature: 0 takes the most likely token.
      top_k: sample among the k most likely tokens only; 0 is no limit.
      top_p: then among the fewest tokens that hold this probability mass; 1 is no limit.
      min_p: then among tokens at least this probable, relative to the most likely one; 0 is no limit.
      repetition_penalty: above 1, tokens of the prompt and of the new text become less likely, below 1 more; 1 is
        no penalty. As in transformers, it comes first, and is taken when temperature is 0 too.
      stop: texts that end the continuation; the first that comes is cut off, with all behind it.
      cache_dtype: how keys and values are kept: "float32", "bfloat16" or "int8"; None is the model's compute_dtype.
      seed: of the draws.
    """

    prompts: tuple[str, ...] = ()
    max_new_tokens: int = 128
    temperature: float = 0.6
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    cache_dtype: str | None = None
    seed: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise SmoljaxError(
                f"config.generation.max_new_tokens is {self.max_new_tokens}: set it to at least 1"
            )
        if isinstance(self.stop, str) or not all(
            isinstance(text, str) and text for text in self.stop
        ):
            raise SmoljaxError(
                f'config.generation.stop is {self.stop!r}: set it to a tuple of texts, such as ("\\n\\n",)'
            )
        if self.cache_dtype not in (None, *CACHE_DTYPES):
            raise SmoljaxError(
                f"config.generation.cache_dtype is {self.cache_dtype!r}: set it to one of "
                f"{', '.join(CACHE_DTYPES)}, or to None"
            )


class Sampler:
    """Continues texts with one model.

    Inside `smoljax.parallel.active(mesh)` it runs on that mesh.

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
        """The continuation of each prompt, up to the end of the document, a stop text or max_new_tokens.

        Raises:
          SmoljaxError: there are no prompts, or one is too long.
        """
        if not prompts:
            raise SmoljaxError("config.generation.prompts is empty: name at least one prompt")
        ids = [self._encode(prompt) for prompt in prompts]
        if not self._settings.stop:
            rows = generate(self._model, self._params, ids, **self._options(ids))
            return [self._decode(row) for row in rows]
        texts = [Continuation(self._decode, self._settings.stop) for _ in prompts]
        for chunks in self._chunks(ids, TOKENS_PER_LOOK):
            for text, chunk in zip(texts, chunks):
                text.add(chunk)
            # What the model itself ends, `stream` ends; a row that was stopped here would only go on beside others.
            if all(text.stopped or not chunk for text, chunk in zip(texts, chunks)):
                break
        return [text.whole() for text in texts]

    def stream(self, prompt: str) -> Iterator[str]:
        """The continuation in pieces, as it is generated; each piece ends on a whole character.

        Text that may yet turn out to be the beginning of a stop text waits until that is known.
        """
        text = Continuation(self._decode, self._settings.stop)
        written = ""
        for (chunk,) in self._chunks([self._encode(prompt)], TOKENS_PER_PIECE):
            text.add(chunk)
            if text.stopped:
                break
            certain = text.certain()
            if certain.startswith(written) and certain != written:
                yield certain[len(written) :]
                written = certain
        rest = text.whole()[len(written) :]
        if rest:
            yield rest

    def _chunks(self, ids: list[list[int]], size: int) -> Iterator[list[list[int]]]:
        options = self._options(ids)
        return stream(self._model, self._params, ids, tokens_per_chunk=size, **options)

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
            "min_p": self._settings.min_p,
            "repetition_penalty": self._settings.repetition_penalty,
            "cache_dtype": self._settings.cache_dtype,
            "key": jax.random.key(self._settings.seed),
            "stop_ids": (self._tokenizer.eos_id,),
        }


class Continuation:
    """One row's text as its tokens come.

    Args:
      decode: from ids to text.
      stops: texts that end it.

    Attributes:
      stopped: whether one of them has come.
    """

    def __init__(self, decode, stops: Sequence[str]):
        self._decode, self._stops = decode, stops
        self._ids: list[int] = []
        self._text = ""
        self.stopped = False

    def add(self, ids: Sequence[int]) -> None:
        """Takes the next tokens; after a stop text they are left out."""
        if self.stopped or not ids:
            return
        self._ids += ids
        self._text = self._decode(self._ids)
        self.stopped = before_stop(self._text, self._stops) != self._text

    def certain(self) -> str:
        """The text without what further tokens may still change or take away."""
        # A character whose bytes are not all there decodes to one U+FFFD per byte, three at most; they wait.
        text = self._text[: max(len(self._text.rstrip("\ufffd")), len(self._text) - 3)]
        return text[: len(text) - held_back(text, self._stops)]

    def whole(self) -> str:
        """The text up to the first stop text."""
        return before_stop(self._text, self._stops)


def before_stop(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first place where one of `stops` begins (as lm-eval cuts at `until`)."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` may begin one of `stops`."""
    lengths = (
        length
        for stop in stops
        for length in range(1, min(len(stop), len(text) + 1))
        if text.endswith(stop[:length])
    )
    return max(lengths, default=0)
