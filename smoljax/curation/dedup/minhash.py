"""MinHash signatures of texts, bit-equal to those of datatrove 0.10.

A text is simplified, cut into words, and each run of `ngram` words hashed to 64 bits: its shingles. A signature
holds, for each of `buckets * hashes_per_bucket` permutations of the hashes, the least value. Two texts whose sets
of shingles have Jaccard similarity s agree in all hashes of some bucket with probability
1 - (1 - s**hashes_per_bucket)**buckets (Leskovec et al., Mining of Massive Datasets, section 3.4.2).

Text is read once: whitespace-separated chunks repeat, so what becomes of a chunk (simplified and cut into words) is
looked up. Memory per document is bounded by its text, not by shingles times permutations.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import xxhash

from smoljax.curation.dedup.simplify import simplify_chunks
from smoljax.curation.words import words

# The hashes are taken modulo this prime, 2^61 - 1.
_PRIME = np.uint64((1 << 61) - 1)
# Shingles per block of the permutations: a block of 112 hashes then stays in a core's cache.
_BLOCK = 256
# Shingles that are hashed at once.
_STRETCH = 1 << 14


@dataclass(frozen=True)
class MinHashConfig:
    """How texts are compared.

    Attributes:
      buckets: two documents are near-duplicates if they agree in one of them.
      hashes_per_bucket: hashes that have to agree.
      ngram: words in a shingle.
      hash: of a shingle's UTF-8 bytes: "sha1" (its first 8 bytes, little-endian) or "xxh64".
      seed: of the permutations.
      max_characters: what lies behind them is not looked at; None reads all.
    """

    buckets: int = 14
    hashes_per_bucket: int = 8
    ngram: int = 5
    hash: str = "xxh64"
    seed: int = 1
    max_characters: int | None = None


# FineWeb's published script; FineWeb2's (datatrove's default); FinePDFs'.
FINEWEB = MinHashConfig(hash="sha1")
FINEWEB2 = MinHashConfig(hash="xxh64")
FINEPDFS = MinHashConfig(buckets=32, hashes_per_bucket=10, hash="xxh64", max_characters=1_000_000)


def signatures(
    texts: Sequence[str], config: MinHashConfig, language: str = "en"
) -> tuple[np.ndarray, np.ndarray]:
    """Signatures of texts.

    Args:
      texts: any strings.
      config: how.
      language: ISO 639-1 code, for the words.

    Returns:
      uint64 [rows, buckets * hashes_per_bucket], bucket by bucket, and bool [rows]: False where the text has fewer
      than `ngram` words, so that it has no signature (its row holds 2^61 - 1) and is nobody's duplicate.
    """
    a, b = _permutations(config)
    found = np.full((len(texts), a.size), _PRIME)
    valid = np.zeros(len(texts), bool)
    chunks = Chunks.of(language)
    for row, text in enumerate(texts):
        joined = chunks.joined_words(text[: config.max_characters])
        for shingles in _shingles(joined, config):
            _lower(found[row], shingles, a, b)
            valid[row] = True
    return found, valid


class Chunks:
    """What whitespace-separated chunks of text become: their words, simplified, joined by spaces, in UTF-8.

    spaCy cuts each chunk for itself in the languages whose words are separated by spaces, and `simplify` does not
    look across whitespace, so a text's words are those of its chunks.
    """

    # Chunks that are remembered, and as many from the time before: 100 to 200 bytes each. Longer ones than this rarely
    # come again.
    _CAPACITY = 1 << 14
    _LONGEST = 48

    def __init__(self, language: str):
        self._language = language
        self._known: dict[str, bytes] = {}
        self._before: dict[str, bytes] = {}

    @staticmethod
    @lru_cache(maxsize=8)
    def of(language: str) -> "Chunks":
        """The chunks of a language that this process has seen."""
        return Chunks(language)

    def joined_words(self, text: str) -> bytes:
        """The words of the simplified text, joined by spaces."""
        chunks = text.split()
        found = list(map(self._known.get, chunks))
        if None in found:
            new = self._learn(list(dict.fromkeys(c for c, f in zip(chunks, found) if f is None)))
            found = [new[c] if f is None else f for c, f in zip(chunks, found)]
        return b" ".join(filter(None, found))

    def _learn(self, chunks: list[str]) -> dict[str, bytes]:
        new = {chunk: self._before[chunk] for chunk in chunks if chunk in self._before}
        unknown = [chunk for chunk in chunks if chunk not in new]
        pieces = simplify_chunks(unknown)
        cut = self._cut([piece for chunk in pieces for piece in chunk])
        for chunk, parts in zip(unknown, pieces):
            new[chunk] = " ".join(next(cut) for _ in parts).encode()
        if len(self._known) + len(new) > self._CAPACITY:
            self._known, self._before = {}, self._known
        self._known.update((c, joined) for c, joined in new.items() if len(c) <= self._LONGEST)
        return new

    def _cut(self, pieces: list[str]) -> Iterator[str]:
        """Each piece, a string without whitespace, as its words joined by spaces."""
        tokens = iter(words(" ".join(pieces), self._language))
        for piece in pieces:
            token = next(tokens)
            parts, left = [token], len(piece) - len(token)
            while left:
                token = next(tokens)
                parts.append(token)
                left -= len(token)
            yield " ".join(parts)


def _shingles(joined: bytes, config: MinHashConfig) -> Iterator[np.ndarray]:
    """Hashes (uint64) of the n-grams of words joined by spaces, in stretches of bounded length."""
    if not joined:
        return
    spaces = np.flatnonzero(np.frombuffer(joined, np.uint8) == ord(" "))
    starts = np.concatenate([[0], spaces + 1])
    ends = np.concatenate([spaces, [len(joined)]])
    count = len(starts) - config.ngram + 1
    for first in range(0, count, _STRETCH):
        last = min(first + _STRETCH, count)
        shift = config.ngram - 1
        spans = zip(starts[first:last].tolist(), ends[first + shift : last + shift].tolist())
        yield HASHES[config.hash](joined, spans)


def _sha1(joined: bytes, spans: Iterable[tuple[int, int]]) -> np.ndarray:
    sha1 = hashlib.sha1
    digests = b"".join([sha1(joined[start:end]).digest() for start, end in spans])
    return np.frombuffer(digests, np.dtype([("head", "<u8"), ("rest", "V12")]))["head"]


def _xxh64(joined: bytes, spans: Iterable[tuple[int, int]]) -> np.ndarray:
    xxh64 = xxhash.xxh64_intdigest
    return np.array([xxh64(joined[start:end]) for start, end in spans], np.uint64)


HASHES: dict[str, Callable[[bytes, Iterable[tuple[int, int]]], np.ndarray]] = {
    "sha1": _sha1,
    "xxh64": _xxh64,
}


@lru_cache(maxsize=8)
def _permutations(config: MinHashConfig) -> tuple[np.ndarray, np.ndarray]:
    """uint64 [hashes] each: the a and b of (a * x + b) mod 2^61 - 1, drawn as datatrove draws them."""
    draw = np.random.RandomState(config.seed).randint
    size = (1, config.buckets * config.hashes_per_bucket)
    a = draw(1, _PRIME, dtype=np.uint64, size=size)
    b = draw(0, _PRIME, dtype=np.uint64, size=size)
    return a[0], b[0]


def _lower(least: np.ndarray, shingles: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Takes the permuted hashes of shingles into `least` [hashes], in place.

    The product wraps at 2^64 (as numpy's does in datatrove). 2^61 = 1 modulo the prime, so the bits above the 61st
    are added to those below: at most 7 more than the prime, which it is then taken off once.
    """
    x = np.empty((min(_BLOCK, len(shingles)), a.size), np.uint64)
    y = np.empty_like(x)
    for start in range(0, len(shingles), _BLOCK):
        block = shingles[start : start + _BLOCK, None]
        value, other = x[: len(block)], y[: len(block)]
        np.multiply(block, a, out=value)
        np.add(value, b, out=value)
        np.right_shift(value, 61, out=other)
        np.bitwise_and(value, _PRIME, out=value)
        np.add(value, other, out=value)
        np.subtract(value, _PRIME, out=other)  # Wraps to a great number unless value >= the prime.
        np.minimum(value, other, out=value)
        np.minimum(least, value.min(axis=0), out=least)
