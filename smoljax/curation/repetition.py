"""How much of a text is repetition: parts that occur twice, and n-grams of its words.

N-grams are compared by a hash, and character by character where hashes are equal, so that the counts are exact. The
loops are compiled once per machine and kept on its disk.
"""

from collections.abc import Sequence

import numba
import numpy as np

# Base of the polynomial hashes of words, and the golden ratio that spreads them over a table; products wrap at 2^64.
_BASE = np.uint64(0x9E3779B97F4A7C15 ^ 0x5BD1E996)
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_ONE = np.uint64(1)
_SEPARATOR = ord("\n")


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
        self._spaced = np.append(codes, np.uint32(_SEPARATOR))
        self._spaced[bounds[1:] - 1] = ord(" ")
        self._spaced_bounds = bounds
        self._close = codes[codes != _SEPARATOR]
        self._close_bounds = bounds - np.arange(count + 1)
        self._spaced_words = _word_hashes(self._spaced, self._spaced_bounds)
        self._close_words = _word_hashes(self._close, self._close_bounds)

    def top_characters(self, n: int) -> int:
        """Characters, with the spaces between words, of all occurrences of the most frequent n-gram.

        Of equally frequent ones the first in the text counts; 0 of fewer than n words.
        """
        return _top(self._spaced, self._spaced_bounds, self._spaced_words, n)

    def duplicate_characters(self, n: int) -> int:
        """Characters, without spaces, of n-grams that occurred before, scanned so that none overlap.

        After a repeated n-gram the scan goes on behind it, and what it skips is not remembered. N-grams are the same
        if they are written the same without spaces: ("ab", "c") and ("a", "bc").
        """
        return _duplicate(self._close, self._close_bounds, self._close_words, n)


@numba.njit(cache=True)
def _word_hashes(codes, bounds):
    """uint64 [words, 2]: the hash of each word's characters, and what the hash before it is multiplied with."""
    words = np.empty((len(bounds) - 1, 2), np.uint64)
    for word in range(len(words)):
        value, shift = np.uint64(0), np.uint64(1)
        for at in range(bounds[word], bounds[word + 1]):
            value = value * _BASE + np.uint64(codes[at])
            shift *= _BASE
        words[word, 0], words[word, 1] = value, shift
    return words


@numba.njit(cache=True)
def _hashes(words, n):
    """uint64 [n-grams]: the hash of each n-gram's characters."""
    hashes = np.zeros(max(0, len(words) - n + 1), np.uint64)
    for first in range(len(hashes)):
        value = words[first, 0]
        for word in range(first + 1, first + n):
            value = value * words[word, 1] + words[word, 0]
        hashes[first] = value
    return hashes


@numba.njit(cache=True)
def _first_equals(codes, bounds, words, n):
    """int32 [n-grams]: for each n-gram the first that is written the same, found in a hash table."""
    hashes = _hashes(words, n)
    firsts = np.empty(len(hashes), np.int32)
    bits = 1
    while (1 << bits) < 2 * len(hashes):
        bits += 1
    table = np.full(1 << bits, -1, np.int32)
    mask, shift = np.uint64(len(table) - 1), np.uint64(64 - bits)
    for place in range(len(hashes)):
        value, start = hashes[place], bounds[place]
        size = bounds[place + n] - start
        slot = value * _SPREAD >> shift
        while table[slot] >= 0:
            other = table[slot]
            if hashes[other] == value:
                there = bounds[other]
                if bounds[other + n] - there == size:
                    at = 0
                    while at < size and codes[there + at] == codes[start + at]:
                        at += 1
                    if at == size:
                        break
            slot = (slot + _ONE) & mask
        if table[slot] < 0:
            table[slot] = place
        firsts[place] = table[slot]
    return firsts


@numba.njit(cache=True)
def _top(codes, bounds, words, n):
    firsts = _first_equals(codes, bounds, words, n)
    if len(firsts) == 0:
        return 0
    counts = np.zeros(len(firsts), np.int32)
    for first in firsts:
        counts[first] += 1
    top = np.argmax(counts)  # The first of equal ones.
    return counts[top] * (bounds[top + n] - bounds[top] - 1)


@numba.njit(cache=True)
def _duplicate(codes, bounds, words, n):
    firsts = _first_equals(codes, bounds, words, n)
    seen = np.zeros(len(firsts), np.bool_)
    characters = place = 0
    while place < len(firsts):
        if seen[firsts[place]]:
            characters += bounds[place + n] - bounds[place]
            place += n
        else:
            seen[firsts[place]] = True
            place += 1
    return characters
