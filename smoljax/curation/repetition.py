"""How much of a text is repetition: parts that occur twice, and n-grams of its words.

N-grams are told apart by 64-bit hashes, sorted in numpy; those whose hashes are equal are compared as strings, so that
the counts are exact. (Loops compiled by numba count three times as fast, but numba takes 127 MB of each worker.)
"""

import functools
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

# Base of the polynomial hashes: the golden ratio as an odd number of 64 bits; products wrap.
_BASE = np.uint64(0x9E3779B97F4A7C15)
_SEPARATOR, _SPACE = ord("\n"), np.uint64(ord(" "))


def duplicates(parts: Sequence[str]) -> tuple[int, int]:
    """(number, characters) of the parts that occurred before."""
    distinct = set(parts)
    return len(parts) - len(distinct), sum(map(len, parts)) - sum(map(len, distinct))


class Ngrams:
    """The n-grams of a text's words, counted as datatrove 0.10 counts them.

    Args:
      joined: the words, joined by "\\n".
    """

    def __init__(self, joined: str):
        codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
        separators = np.flatnonzero(codes == _SEPARATOR)
        count = len(separators) + 1 if joined else 0
        # Where each word begins, and the end of the last: with a space behind each word, and without.
        bounds = np.zeros(count + 1, np.int64)
        bounds[1:-1] = separators + 1
        bounds[-1] = len(codes) + 1
        self._spaced = _Rows(joined.replace("\n", " ") + " ", bounds)
        self._close = _Rows(joined.replace("\n", ""), bounds - np.arange(count + 1))
        if count:
            lengths = np.diff(self._close.bounds)
            powers = _powers(int(lengths.max()).bit_length())
            letters = codes[codes != _SEPARATOR]
            places = np.arange(len(letters)) - np.repeat(self._close.bounds[:-1], lengths)
            words = np.add.reduceat(letters * powers[places], self._close.bounds[:-1])
            self._close.start(words, powers[lengths])
            self._spaced.start(words + _SPACE * powers[lengths], powers[lengths + 1])

    def top_characters(self, n: int) -> int:
        """Characters, with the spaces between words, of all occurrences of the most frequent n-gram.

        Of equally frequent ones the first in the text counts; 0 of fewer than n words.
        """
        hashes = self._spaced.hashes(n)
        if not len(hashes):
            return 0
        order, starts = _grouped(hashes)
        counts = np.diff(starts, append=len(hashes))
        top = counts.max()
        groups = np.flatnonzero(counts == top)
        group = groups[np.argmin(order[starts[groups]])]
        places = order[starts[group] : starts[group] + top].tolist()
        gram = self._spaced.gram(places[0], n)
        if not all(map(gram.__eq__, self._spaced.grams(places, n))):
            grams = Counter(self._spaced.gram(at, n) for at in range(len(hashes)))
            ((gram, top),) = grams.most_common(1)
        return int(top) * (len(gram) - 1)

    def duplicate_characters(self, n: int) -> int:
        """Characters, without spaces, of n-grams that occurred before, scanned so that none overlap.

        After a repeated n-gram the scan goes on behind it, and what it skips is not remembered. N-grams are the same
        if they are written the same without spaces: ("ab", "c") and ("a", "bc").
        """
        hashes = self._close.hashes(n)
        order, starts = _grouped(hashes)
        if len(starts) >= len(order):
            return 0
        sizes = np.diff(starts, append=len(order))
        places = np.sort(order[np.repeat(sizes > 1, sizes)])
        seen: dict[int, int] = {}
        characters = following = 0
        for at, value in zip(places.tolist(), hashes[places].tolist()):
            if at < following:
                continue
            first = seen.setdefault(value, at)
            if first == at:
                continue
            gram = self._close.gram(at, n)
            if gram != self._close.gram(first, n):
                return self._slow_duplicate_characters(n)
            characters += len(gram)
            following = at + n
        return characters

    def _slow_duplicate_characters(self, n: int) -> int:
        """The same where different n-grams have one hash."""
        seen: set[str] = set()
        characters = at = 0
        while at < len(self._close.hashes(n)):
            gram = self._close.gram(at, n)
            if gram in seen:
                characters += len(gram)
                at += n
            else:
                seen.add(gram)
                at += 1
        return characters


class _Rows:
    """Words written one behind the other, and the hashes of their n-grams.

    The hash of characters c_0, c_1, ... is the sum of c_i * BASE^i modulo 2^64, so that of two strings written together
    is the first's, and the second's times BASE^length of the first.
    """

    def __init__(self, text: str, bounds: np.ndarray):
        self.bounds = bounds
        self._text = text
        self._hashes = [np.empty(0, np.uint64)]

    def start(self, words: np.ndarray, shifts: np.ndarray) -> None:
        """Takes the hash of each word (uint64), and BASE^length of it."""
        self._words, self._shifts = words, shifts
        self._hashes = [words]

    def hashes(self, n: int) -> np.ndarray:
        """uint64 [n-grams]"""
        while len(self._hashes) < n and len(self._hashes[-1]):
            shorter = self._hashes[-1][1:]
            size = len(shorter)
            self._hashes.append(self._words[:size] + self._shifts[:size] * shorter)
        return self._hashes[min(n, len(self._hashes)) - 1]

    def gram(self, first: int, n: int) -> str:
        """The n words from `first` on, as they are written."""
        return self._text[self.bounds[first] : self.bounds[first + n]]

    def grams(self, firsts: list[int], n: int) -> Iterator[str]:
        """`gram` of each."""
        starts, ends = self.bounds[firsts], self.bounds[np.add(firsts, n)]
        return map(self._text.__getitem__, map(slice, starts.tolist(), ends.tolist()))


def _grouped(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(places in the order of their hashes and then of the text, where in it each hash begins).

    A place is sorted in the low bits of its hash: that takes a fifth of the time of an argsort. So hashes whose high bits
    are equal are one here.
    """
    bits = np.uint64(len(hashes).bit_length())
    packed = hashes * _BASE >> bits << bits  # The first characters stand in the low bits alone.
    packed |= np.arange(len(hashes), dtype=np.uint64)
    packed.sort()
    high = packed >> bits
    starts = np.flatnonzero(np.append(True, high[1:] != high[:-1]))
    packed &= (np.uint64(1) << bits) - np.uint64(1)
    return packed.view(np.int64), starts


@functools.cache
def _powers(bits: int) -> np.ndarray:
    """uint64 [2^bits + 1]: powers of BASE."""
    factors = np.full((1 << bits) + 1, _BASE)
    factors[0] = 1
    return np.multiply.accumulate(factors)
