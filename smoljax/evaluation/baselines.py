"""What a model has to beat: a unigram model over the same tokens, gzip -9 and xz -9 on the same held-out text.

All figures are bits per UTF-8 byte of the held-out text, as smoljax.evaluation.perplexity counts them. Reads token
shards in a stream; needs no accelerator library.
"""

import lzma
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from smoljax.errors import SmoljaxError
from smoljax.progress import Progress
from smoljax.tokens.reader import ShardReader
from smoljax.tokens.shards import shard_directory
from smoljax.tokens.tokenizer import Tokenizer

# A unigram estimate has long settled by then; of a larger train split only so much is counted.
TRAIN_TOKENS = 2**30


def baselines(
    shards_directory: Path | str, sources: Sequence[str], tokenizer: Tokenizer
) -> dict[str, dict[str, float]]:
    """Bits per byte of three models of the held-out text that know nothing of language.

    unigram: every token but bos (each document's first, which no model is asked for), by its frequency among those of
      the train split of the same source with add-one smoothing, p(t) = (count(t) + 1) / (sum of counts + vocabulary).
    gzip, xz: size after `gzip -9` and `xz -9` of the documents, one after another with a line end between them.
    "all" is the same for all sources as one text: one unigram model of all train tokens, one compressed stream.

    Args:
      shards_directory: holds `<source>/<version>/` as smoljax.tokens.shards writes it.
      sources: names of the sources, in the order in which they are joined.
      tokenizer: the one that made the shards; it decodes the held-out text.

    Returns:
      {source: {"unigram", "gzip", "xz"}, ..., "all": {...}}.

    Raises:
      SmoljaxError: a source has no held-out text, or its shards are missing, damaged or of another tokenizer.
    """
    everything = _Text()
    train, heldout = np.zeros((2, tokenizer.vocab_size), np.int64)
    results = {}
    for source in sources:
        folder = shard_directory(shards_directory, source)
        readers = {
            split: ShardReader(folder, split, expected_fingerprint=tokenizer.fingerprint)
            for split in ("train", "heldout")
        }
        text = _Text()
        progress = Progress(
            f"compress {source}", readers["heldout"].num_documents, unit="documents"
        )
        for number, document in enumerate(documents(readers["heldout"], tokenizer), start=1):
            text.add(document)
            everything.add(document)
            progress.update(number)
        progress.close()
        if not text.num_bytes:
            raise SmoljaxError(
                f"source {source!r} has no held-out text in {folder}: raise config.curation.heldout_fraction, "
                "or leave the source out of the evaluation"
            )
        source_train = target_counts(readers["train"], tokenizer, most_tokens=TRAIN_TOKENS)
        source_heldout = target_counts(readers["heldout"], tokenizer)
        train += source_train
        heldout += source_heldout
        results[source] = _figures(source_train, source_heldout, text)
    return results | {"all": _figures(train, heldout, everything)}


def unigram_bits(train_counts_V: np.ndarray, heldout_counts_V: np.ndarray) -> float:
    """Bits that an add-one smoothed unigram model needs for tokens that occur `heldout_counts_V` times each.

    Args:
      train_counts_V: integer counts by token id, in the text that the model is fitted on.
      heldout_counts_V: the same for the text that it is scored on.
    """
    smoothed_V = train_counts_V.astype(np.float64) + 1
    return float(heldout_counts_V @ (np.log2(smoothed_V.sum()) - np.log2(smoothed_V)))


def target_counts(
    reader: ShardReader, tokenizer: Tokenizer, *, most_tokens: int | None = None
) -> np.ndarray:
    """How often each token is a target in a split, as int64 [vocabulary]: all tokens but each document's bos.

    Args:
      reader: the split.
      tokenizer: the one that made it.
      most_tokens: of a larger split, blocks at even distances are counted, about so many tokens.
    """
    counted = reader.num_blocks
    if most_tokens is not None:
        counted = min(counted, max(1, most_tokens // reader.block_tokens))
    counts_V = np.zeros(tokenizer.vocab_size, np.int64)
    for place in range(counted):
        block = reader.block(place * reader.num_blocks // counted)
        counts_V += np.bincount(block.tokens[: block.num_tokens], minlength=tokenizer.vocab_size)
        # By place and not by id: some tokenizers use one token for bos and eos.
        counts_V[tokenizer.bos_id] -= np.sum(block.document_starts < block.num_tokens)
    return counts_V


def documents(reader: ShardReader, tokenizer: Tokenizer) -> Iterator[str]:
    """Texts of the documents of a split, decoded, in the order in which they are stored."""
    pending: list[np.ndarray] = []
    for number in range(reader.num_blocks):
        block = reader.block(number)
        begin = 0
        for start in (int(s) for s in block.document_starts if s < block.num_tokens):
            pending.append(block.tokens[begin:start])
            if number or start:
                yield tokenizer.decode(np.concatenate(pending))
            pending, begin = [], start
        pending.append(block.tokens[begin : block.num_tokens])
    if pending:
        yield tokenizer.decode(np.concatenate(pending))


class _Text:
    """Sizes of a growing text: as it is, after gzip -9, and after xz -9. The text itself is not kept."""

    def __init__(self):
        # Window bits 31 ask for the gzip container; memory level 9 is what the gzip program has.
        self._gzip = zlib.compressobj(9, zlib.DEFLATED, 31, 9)
        self._xz = lzma.LZMACompressor(lzma.FORMAT_XZ, preset=9)
        self._gzip_bytes = self._xz_bytes = 0
        self._empty = True
        self.num_bytes = 0

    def add(self, document: str) -> None:
        data = document.encode("utf-8")
        self.num_bytes += len(data)
        if not self._empty:
            data = b"\n" + data
        self._empty = False
        self._gzip_bytes += len(self._gzip.compress(data))
        self._xz_bytes += len(self._xz.compress(data))

    def finish(self) -> tuple[int, int]:
        """Bytes after gzip and after xz, containers included."""
        self._gzip_bytes += len(self._gzip.flush())
        self._xz_bytes += len(self._xz.flush())
        return self._gzip_bytes, self._xz_bytes


def _figures(train_counts_V: np.ndarray, heldout_counts_V: np.ndarray, text: _Text) -> dict:
    gzip_bytes, xz_bytes = text.finish()
    return {
        "unigram": unigram_bits(train_counts_V, heldout_counts_V) / text.num_bytes,
        "gzip": 8 * gzip_bytes / text.num_bytes,
        "xz": 8 * xz_bytes / text.num_bytes,
    }
