"""How much of a text is repetition: parts that occur twice, and n-grams of its words.

N-grams are told apart by 64-bit hashes, sorted in numpy; those whose hashes are equal are compared as strings, so that
the counts are exact. (Loops compiled by numba count three times as fast, but numba takes 127 MB of each worker.)
"""

import functools
from collections import Counter
from collections.abc import Sequence

import numpy as np

# Base of the polynomial hashes: the golden ratio as an odd number of 64 bits; products wrap.
_BASE = np.uint64(0x9E3779B97F4A7C15)
_INVERSE = np.uint64(pow(int(_BASE), -1, 1 << 64))
_SEPARATOR = ord("\n")
_LINE, _SPACE = np.uint64(_SEPARATOR), np.uint64(ord(" "))
_NOTHING = np.empty(0, np.uint64)
# Powers of the base that are kept, for texts of so many characters.
_KEPT = 1 << 16


def duplicates(parts: Sequence[str]) -> tuple[int, int]:
    """(number, characters) of the parts that occurred before."""
    distinct = set(parts)
    if len(distinct) == len(parts):
        return 0, 0
    return len(parts) - len(distinct), sum(map(len, parts)) - sum(map(len, distinct))


class Ngrams:
    """The n-grams of a text's words, counted as datatrove 0.10 counts them.

    Args:
      joined: the words, joined by "\\n".
    """

    def __init__(self, joined: str):
        text = joined + "\n" if joined else ""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        ends = np.flatnonzero(codes == _SEPARATOR)
        bounds = np.append(0, ends + 1)
        numbers = np.arange(len(bounds))
        powers = _powers(_BASE, len(codes) + 1)
        # Of each word sum(c_i * BASE^i), i being places in the text; then with a space behind it, and without.
        words = np.add.reduceat(codes * powers[:-1], bounds[:-1]) if joined else _NOTHING
        words -= _LINE * powers[ends]
        spaced = words + _SPACE * powers[ends]
        words *= _powers(_INVERSE, len(bounds))[:-1]
        self._spaced = _Rows(text, " ", bounds, spaced, powers[len(codes) - bounds])
        self._close = _Rows(text, "", bounds, words, powers[len(codes) - bounds + numbers])

    def top_characters(self, n: int) -> int:
        """Characters, with the spaces between words, of all occurrences of the most frequent n-gram.

        Of equally frequent ones the first in the text counts; 0 of fewer than n words.
        """
        order, starts = self._spaced.grouped(n)
        if not len(order):
            return 0
        counts = np.diff(starts, append=len(order))
        top = counts.max()
        groups = np.flatnonzero(counts == top)
        group = groups[np.argmin(order[starts[groups]])]
        places = order[starts[group] : starts[group] + top]
        gram = self._spaced.gram(places[0], n)
        if not self._spaced.same(places, n):
            grams = Counter(self._spaced.gram(at, n) for at in range(len(order)))
            ((gram, top),) = grams.most_common(1)
        return int(top) * len(gram)

    def duplicate_characters(self, n: int) -> int:
        """Characters, without spaces, of n-grams that occurred before, scanned so that none overlap.

        After a repeated n-gram the scan goes on behind it, and what it skips is not remembered. N-grams are the same
        if they are written the same without spaces: ("ab", "c") and ("a", "bc").
        """
        order, starts = self._close.grouped(n)
        sizes = np.diff(starts, append=len(order))
        groups = np.repeat(np.arange(len(starts)), sizes)
        repeated = np.flatnonzero(sizes[groups] > 1)
        repeated = repeated[np.argsort(order[repeated])]
        seen: dict[int, int] = {}
        characters = following = 0
        for at, group in zip(order[repeated].tolist(), groups[repeated].tolist()):
            if at < following:
                continue
            first = seen.setdefault(group, at)
            if first == at:
                continue
            gram = self._close.gram(at, n)
            if gram != self._close.gram(first, n):
                return self._slow_duplicate_characters(n)
            characters += len(gram)
            following = at + n
        return characters

    def most_duplicate_characters(self, n: int) -> int:
        """No less than `duplicate_characters`, in a fraction of the time: of all n-grams that occurred before, once each."""
        order, starts = self._close.grouped(n)
        if len(starts) == len(order):
            return 0
        occurred = np.ones(len(order), bool)
        occurred[order[starts]] = False
        again = np.flatnonzero(occurred)
        begins, ends = self._close.places[again], self._close.places[again + n]
        begins[1:] = np.maximum(begins[1:], ends[:-1])
        return int((ends - begins).sum())

    def _slow_duplicate_characters(self, n: int) -> int:
        """The same where different n-grams have one hash."""
        seen: set[str] = set()
        characters = at = 0
        while at + n < len(self._close.places):
            gram = self._close.gram(at, n)
            if gram in seen:
                characters += len(gram)
                at += n
            else:
                seen.add(gram)
                at += 1
        return characters


class _Rows:
    """The n-grams of words with a separator between them, in the order of their hashes.

    The hash of characters c_0, c_1, ... is the sum of c_i * BASE^i modulo 2^64. Here it comes from the difference of two
    sums from the beginning of the text on, and all hashes are multiplied by one power of the base.

    Args:
      text: the words, with a line break behind each.
      separator: what stands between words instead.
      bounds: where each word begins in the text, and its end.
      words: uint64, of each word the sum of c_i * BASE^i, i being places among the words with their separators.
      shifts: uint64, BASE^(length - i) for the first i of each word.
    """

    def __init__(
        self, text: str, separator: str, bounds: np.ndarray, words: np.ndarray, shifts: np.ndarray
    ):
        self._text, self._separator, self._bounds = text, separator, bounds
        self.places = bounds if separator else bounds - np.arange(len(bounds))
        self._sums = np.append(np.uint64(0), np.cumsum(words))
        self._shifts = shifts
        self._grouped: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def grouped(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(places of the n-grams in the order of their hashes and then of the text, where in it each hash begins).

        A place is sorted in the low bits of its hash: that takes a fifth of the time of an argsort. So hashes whose
        high bits are equal are one here.
        """
        if n not in self._grouped:
            count = max(0, len(self._bounds) - n)
            packed = (self._sums[n:] - self._sums[:count]) * self._shifts[:count]
            bits = np.uint64(count.bit_length())
            packed >>= bits  # The first characters stand in the low bits alone.
            packed <<= bits
            packed |= np.arange(count, dtype=np.uint64)
            packed.sort()
            high = packed >> bits
            starts = np.flatnonzero(np.append(count > 0, high[1:] != high[:-1]))
            packed &= (np.uint64(1) << bits) - np.uint64(1)
            self._grouped = {n: (packed.view(np.int64), starts)}
        return self._grouped[n]

    def gram(self, first: int, n: int) -> str:
        """The n words from `first` on, as they are written."""
        written = self._text[self._bounds[first] : self._bounds[first + n] - 1]
        return written.replace("\n", self._separator)

    def same(self, firsts: np.ndarray, n: int) -> bool:
        """Whether the n words from each of some places on are written alike."""
        starts, ends = self._bounds[firsts].tolist(), (self._bounds[firsts + n] - 1).tolist()
        found = set(map(self._text.__getitem__, map(slice, starts, ends)))
        return len(found) == 1 or len({g.replace("\n", self._separator) for g in found}) == 1


@functools.cache
def _few_powers(base: np.uint64) -> np.ndarray:
    return _new_powers(base, _KEPT)


def _powers(base: np.uint64, count: int) -> np.ndarray:
    """uint64 [count]: powers of an odd number."""
    return _few_powers(base)[:count] if count <= _KEPT else _new_powers(base, count)


def _new_powers(base: np.uint64, count: int) -> np.ndarray:
    factors = np.full(count, base)
    factors[0] = 1
    return np.multiply.accumulate(factors)
