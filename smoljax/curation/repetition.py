"""How much of a text is repetition: duplicate lines, and n-grams counted on integer ids in numpy."""

from collections.abc import Sequence

import numpy as np

# Odd 64-bit constant (golden ratio): n-gram keys are polynomials of word ids in wrapping arithmetic.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def duplicates(parts: Sequence[str]) -> tuple[int, int]:
    """(number, characters) of the parts that occurred before."""
    seen: set[str] = set()
    count = characters = 0
    for part in parts:
        if part in seen:
            count += 1
            characters += len(part)
        else:
            seen.add(part)
    return count, characters


class Words:
    """The words of one text, as ids, with the n-gram counts that Gopher's rules ask for."""

    def __init__(self, words: list[str]):
        numbers: dict[str, int] = {}
        ids = np.fromiter(
            (numbers.setdefault(word, len(numbers)) for word in words), np.uint64, len(words)
        )
        # Ids are spread over 64 bits first, so that small ids do not cancel in the polynomial.
        self._keys = (ids + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
        self._keys ^= self._keys >> np.uint64(29)
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        self._repeated: dict[int, bool] = {}

    def top_ngram_characters(self, n: int) -> int:
        """Characters (spaces between words included) of all occurrences of the most frequent n-gram.

        0 when no n-gram occurs twice; of equally frequent ones the first in the text counts.
        """
        keys = self._ngrams(n)
        if len(keys) == 0:
            return 0
        _, first, counts = np.unique(keys, return_index=True, return_counts=True)
        top = counts.max()
        if top < 2:
            return 0
        at = first[counts == top].min()
        return int(top * (self._starts[at + n] - self._starts[at] + n - 1))

    def duplicate_ngram_characters(self, n: int) -> int:
        """Characters (spaces not counted) of n-grams that occurred before, scanned so that none overlap.

        After a repeated n-gram the scan goes on behind it, and what it skips is not remembered.
        """
        if any(not repeated for shorter, repeated in self._repeated.items() if shorter <= n):
            return 0  # A repeated n-gram contains repeated shorter ones.
        keys = self._ngrams(n)
        _, group, counts = np.unique(keys, return_inverse=True, return_counts=True)
        candidates = np.flatnonzero(counts[group] > 1) if len(keys) else []
        self._repeated[n] = len(candidates) > 0
        seen: set[int] = set()
        characters = following = 0
        for at in map(int, candidates):
            if at < following:
                continue
            key = int(group[at])
            if key in seen:
                characters += int(self._starts[at + n] - self._starts[at])
                following = at + n
            else:
                seen.add(key)
        return characters

    def _ngrams(self, n: int) -> np.ndarray:
        count = len(self._keys) - n + 1
        if count <= 0:
            return np.empty(0, np.uint64)
        keys = np.zeros(count, np.uint64)
        for offset in range(n):
            keys *= _MULTIPLIER
            keys += self._keys[offset : offset + count]
        return keys
