"""Text to token ids and back: trains SentencePiece, loads SentencePiece models and `tokenizer.json` files.

Two promises that the libraries alone do not keep:

* A tokenizer trained here gives every text back exactly. SentencePiece writes a space as U+2581, so a U+2581 in
  the text would come back as a space; such characters are encoded as their three UTF-8 byte pieces instead.
* Ids of special tokens never come out of text. Where a library would match "<s>" in a document, the text is
  cut inside the match and its halves are encoded apart.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from smoljax.errors import SmoljaxError, require
from smoljax.files import atomic_directory, atomic_write_json
from smoljax.tokens.tokenizer_models import HuggingFaceModel, SentencePieceModel

MODEL_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"
MANIFEST_FILE = "manifest.json"

# Longest run without a space that the BPE trainer gets: it stores positions inside a word in 16 bits, and a
# minified script or base64 block would otherwise abort the whole interpreter.
_LONGEST_WORD = 4096
# Each text shows one way in which tokenizers lose information.
_PROBES = (
    "plain text, 12 words.\n",
    " leading and trailing ",
    "two  and   three spaces\t\ttabs",
    "\r\nlines\n\n\n\rends\n",
    "ﬁ ligature, Ⅷ, ①, Å ångström, ｆｕｌｌ ｗｉｄｔｈ",
    "e\u0301 combining, \u0301 alone, \u00e9 composed",
    "UPPER lower ÀÉ ß",
    "\ufeffbyte order mark, \u00a0 no-break, \u200b zero width, \u2028 line separator, \u3000 ideographic",
    "\x00 nul, \x07 bell, \x7f delete, \x85 next line",
    "\u2581 the mark itself\u2581\u2581 \u2581",
    "你好，世界 こんにちは 안녕 नमस्ते עברית",
    "😀👩‍👩‍👧‍👦 \U0010fffd \ue000 \ufffd \u2585 \u2047",
    "x don't , i ' m . n't ?",
)


def train(
    texts: Iterable[str],
    path: Path | str,
    *,
    vocab_size: int,
    max_bytes: int = 256 * 2**20,
    special_tokens: Sequence[str] = (),
) -> "Tokenizer":
    """Trains a SentencePiece BPE tokenizer and writes it, with a manifest, as the folder `path`.

    Byte fallback, digits split one by one, no normalisation of any kind; ids 0 to 3 are <unk>, <s>, </s>, <pad>, and
    `special_tokens` follow.
    The same texts give the same bytes.

    Args:
      texts: training texts in a fixed order; mix the sources, since only the first `max_bytes` of UTF-8 are used.
      path: the folder to write ("runs/quickstart/tokenizer"); replaced whole, or not at all.
      vocab_size: number of ids, with the 256 bytes and the 4 special tokens.
      max_bytes: how much text is held in memory for training.
      special_tokens: names of more special tokens, for instance of chats ("<|im_start|>"); part of `vocab_size`.

    Returns:
      the tokenizer, loaded from what was written.

    Raises:
      SmoljaxError: no text, or a vocabulary larger than the text supports.
    """
    spm = require("sentencepiece", extra="train")
    reader = _TrainingTexts(texts, max_bytes)
    path = Path(path)
    model = _ModelBytes()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=reader.sentences(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.9995,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=2**30,
            num_threads=1,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            minloglevel=2,
            control_symbols=list(special_tokens),
        )
    except (RuntimeError, OSError) as error:
        raise _training_error(error, reader, vocab_size) from error
    with atomic_directory(path) as folder:
        (folder / MODEL_FILE).write_bytes(model.data)
        tokenizer = load(folder)
        manifest = {
            "kind": "sentencepiece-bpe",
            "file": MODEL_FILE,
            "vocab_size": tokenizer.vocab_size,
            "fingerprint": tokenizer.fingerprint,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "pad_id": tokenizer.pad_id,
            "training_texts": reader.texts,
            "training_bytes": reader.bytes,
        }
        atomic_write_json(folder / MANIFEST_FILE, manifest)
    return load(path)


def load(
    path: Path | str,
    *,
    bos: str | None = None,
    eos: str | None = None,
    pad: str | None = None,
) -> "Tokenizer":
    """Loads a tokenizer: a folder written by `train`, a SentencePiece `.model`, or a `tokenizer.json`.

    Args:
      path: the file, or a folder that holds `tokenizer.model` or `tokenizer.json`.
      bos, eos, pad: names of the tokens that begin and end a document and fill a batch, where the file does not
        say (a `tokenizer.json` may have a `tokenizer_config.json` beside it, which is read). A missing pad is
        replaced by eos: padding is masked by its segment id, never by its token.

    Raises:
      SmoljaxError: no such file, not a tokenizer, or no token that begins or ends a document.
    """
    file = _tokenizer_file(Path(path))
    data = file.read_bytes()
    names = {"bos": bos, "eos": eos, "pad": pad}
    if file.suffix == ".json" or data[:1] == b"{":
        return Tokenizer(HuggingFaceModel(file, data, names))
    return Tokenizer(SentencePieceModel(file, data, names))


class Tokenizer:
    """Encodes and decodes text.

    Attributes:
      vocab_size: number of ids; every id is below it.
      bos_id, eos_id, pad_id: ids that begin and end a document and fill a batch.
      fingerprint: hex digest of everything that determines ids; token shards carry it.
      lossy: why `decode(encode(text))` may differ from `text`, as a sentence; None when texts come back exactly.
    """

    def __init__(self, model: SentencePieceModel | HuggingFaceModel):
        self._model = model
        self.vocab_size = model.vocab_size
        self.bos_id, self.eos_id, self.pad_id = model.bos_id, model.eos_id, model.pad_id
        self.fingerprint = model.fingerprint
        special_ids = {self.bos_id, self.eos_id, self.pad_id, *model.special_ids}
        self._is_special = np.zeros(self.vocab_size, bool)
        self._is_special[list(special_ids)] = True
        self._special_id_of = {name: i for i in special_ids if (name := model.name(i))}
        names = sorted(self._special_id_of, key=len)
        self._special_names = re.compile("|".join(re.escape(name) for name in reversed(names)))
        self.lossy = self._find_loss()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos and eos; never an id of a special token."""
        return self.encode_batch([text], num_threads=1)[0].tolist()

    def encode_batch(
        self, texts: Sequence[str], *, num_threads: int | None = None
    ) -> list[np.ndarray]:
        """Ids of each text as an int32 array, encoded by `num_threads` threads (all cores by default).

        Raises:
          SmoljaxError: a text holds lone surrogates, so that it has no UTF-8 form.
        """
        try:
            batch = self._model.encode_batch(list(texts), num_threads or os.cpu_count() or 1)
        except (UnicodeEncodeError, TypeError) as error:
            raise _unencodable(texts, error) from error
        arrays = [np.asarray(ids, np.int32) for ids in batch]
        for i, ids in enumerate(arrays):
            if self._is_special[ids].any():
                arrays[i] = self._encode_around_specials(texts[i])
        return arrays

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens leave nothing, and bytes that are not UTF-8 become U+FFFD.

        Raises:
          SmoljaxError: an id is outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise SmoljaxError(
                    f"token id {i} is outside the vocabulary of {self.vocab_size} ids: "
                    "these ids were made by another tokenizer"
                )
        return self._model.decode([i for i in ids if not self._is_special[i]])

    def special_id(self, name: str) -> int | None:
        """Id of the special token written `name`, such as "</s>"; None where no special token is written so."""
        return self._special_id_of.get(name)

    def _encode_around_specials(self, text: str) -> np.ndarray:
        pieces, start = [], 0
        for match in self._special_names.finditer(text):
            pieces.append(text[start : match.start() + 1])
            start = match.start() + 1
        pieces.append(text[start:])
        encoded = self._model.encode_batch(pieces, 1)
        ids = np.concatenate([np.asarray(piece, np.int32) for piece in encoded])
        # What is left is the unknown token: the model has no piece for these characters, and that is honest.
        if np.any(self._is_special[ids] & (ids != self._model.unk_id)):
            raise SmoljaxError(
                f"{self._model.file} turns plain text into a special token and cannot be told not to "
                f"(in {text[:60]!r}...): use another tokenizer"
            )
        return ids

    def _find_loss(self) -> str | None:
        for text in _PROBES:
            back = self.decode(self.encode(text))
            if back != text:
                return (
                    f"{self._model.file} does not give every text back: {text!r} becomes {back!r}. "
                    "Bits per byte and samples then speak of the changed text"
                )
        return None


class _ModelBytes:
    """A writer that the SentencePiece trainer fills."""

    data = b""

    def write(self, data: bytes) -> None:
        self.data += data


class _TrainingTexts:
    """Cuts texts into sentences for the trainer, and counts what it read."""

    def __init__(self, texts: Iterable[str], max_bytes: int):
        self._texts, self._max_bytes = texts, max_bytes
        self.texts = self.bytes = 0
        self._long_word = re.compile(f"[^ ]{{{_LONGEST_WORD}}}")

    def sentences(self) -> Iterator[str]:
        for text in self._texts:
            if self.bytes >= self._max_bytes:
                return
            self.texts += 1
            self.bytes += len(text.encode("utf-8", "replace"))
            # The trainer skips any sentence with NUL, and drops U+2581 as a space: both are spelt by bytes anyway.
            for part in re.split("[\x00\u2581\ud800-\udfff]+", text):
                if self._long_word.search(part):
                    part = self._long_word.sub(lambda match: match[0] + " ", part)
                if part:
                    yield part


def _training_error(error: Exception, reader: _TrainingTexts, vocab_size: int) -> SmoljaxError:
    if reader.bytes == 0:
        return SmoljaxError(
            "there is no text to train a tokenizer on (0 bytes): curate documents first, and see "
            "whether the filters removed them all"
        )
    if limit := re.search(r"set it to a value <= (\d+)", str(error)):
        return SmoljaxError(
            f"tokenizer vocab_size is {vocab_size}, but {reader.bytes:,} bytes of text support at most "
            f"{limit[1]} ids: lower vocab_size, or train on more text"
        )
    if vocab_size < 512:
        return SmoljaxError(
            f"tokenizer vocab_size is {vocab_size}, too small for 256 bytes, 4 special tokens and the characters "
            "of the text: use at least 512"
        )
    return SmoljaxError(f"the tokenizer could not be trained (vocab_size {vocab_size}): {error}")


def _tokenizer_file(path: Path) -> Path:
    if path.is_dir():
        for name in (MODEL_FILE, JSON_FILE):
            if (path / name).is_file():
                return path / name
        raise SmoljaxError(
            f"{path} holds neither {MODEL_FILE} nor {JSON_FILE}: name the tokenizer file itself, or train one first"
        )
    if not path.is_file():
        raise SmoljaxError(
            f"tokenizer file {path} does not exist: name a SentencePiece .model or a tokenizer.json, "
            "or train one first"
        )
    return path


def _unencodable(texts: Sequence[str], error: Exception) -> SmoljaxError:
    for i, text in enumerate(texts):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as problem:
            return SmoljaxError(
                f"text {i} of the batch has no UTF-8 form: lone surrogate U+{ord(text[problem.start]):04X} at "
                f"character {problem.start}; decode its bytes with errors='replace'"
            )
        except AttributeError:
            return SmoljaxError(f"text {i} of the batch is {type(text).__name__}, expected str")
    return SmoljaxError(f"the batch could not be encoded: {error}")
