"""How many words of a text are words, in the two senses of Gopher's rules."""

import functools
import sys
from typing import NamedTuple

import numba
import numpy as np

from smoljax.curation.punctuation import SYMBOLS

_SEPARATOR = ord("\n")
# Properties of characters, as bits.
_ALPHABETIC, _NO_SYMBOL = 1, 2


class WordCounts(NamedTuple):
    """Counts over the words of a text.

    Attributes:
      words: all.
      alphabetic: those with a letter.
      no_symbols: those with a character that is no punctuation (smoljax.curation.punctuation).
      no_symbol_characters: the characters of the latter.
    """

    words: int
    alphabetic: int
    no_symbols: int
    no_symbol_characters: int


def count(joined: str) -> WordCounts:
    """Counts words that are joined by "\\n"."""
    if not joined:
        return WordCounts(0, 0, 0, 0)
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
    return WordCounts(*_count(codes, _properties()))


@numba.njit(cache=True)
def _count(codes, properties):
    words = alphabetic = no_symbols = characters = 0
    size = found = 0
    for at in range(len(codes) + 1):
        if at < len(codes) and codes[at] != _SEPARATOR:
            size += 1
            found |= properties[codes[at]]
        else:
            words += 1
            alphabetic += found & _ALPHABETIC
            if found & _NO_SYMBOL:
                no_symbols += 1
                characters += size
            size = found = 0
    return words, alphabetic, no_symbols, characters


@functools.cache
def _properties() -> np.ndarray:
    """uint8 [code points]."""
    count = sys.maxunicode + 1
    alphabetic = np.fromiter(map(str.isalpha, map(chr, range(count))), np.uint8, count)
    symbols = np.fromiter(map(SYMBOLS.__contains__, map(chr, range(count))), np.uint8, count)
    return alphabetic * _ALPHABETIC + (1 - symbols) * _NO_SYMBOL
