"""How many words of a text are words, in the two senses of Gopher's rules."""

import functools
import sys
from typing import NamedTuple

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
    if joined.isascii():
        text = joined.encode()
        codes = np.frombuffer(text, np.uint8)
        properties = np.frombuffer(text.translate(_ascii_properties()), np.uint8)
    else:
        codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
        properties = _properties()[codes]
    starts = np.concatenate([[0], np.flatnonzero(codes == _SEPARATOR) + 1])
    lengths = np.diff(starts, append=len(codes) + 1) - 1
    found = np.bitwise_or.reduceat(properties, starts)
    solid = found & _NO_SYMBOL > 0
    return WordCounts(
        len(starts),
        int(np.count_nonzero(found & _ALPHABETIC)),
        int(np.count_nonzero(solid)),
        int(lengths[solid].sum()),
    )


@functools.cache
def _properties() -> np.ndarray:
    """uint8 [code points]; none of the character between words."""
    count = sys.maxunicode + 1
    alphabetic = np.fromiter(map(str.isalpha, map(chr, range(count))), np.uint8, count)
    symbols = np.fromiter(map(SYMBOLS.__contains__, map(chr, range(count))), np.uint8, count)
    properties = alphabetic * _ALPHABETIC + (1 - symbols) * _NO_SYMBOL
    properties[_SEPARATOR] = 0
    return properties


@functools.cache
def _ascii_properties() -> bytes:
    """`_properties` of the bytes of ASCII, as a table for bytes.translate."""
    return _properties()[:256].tobytes()
