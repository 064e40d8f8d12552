"""Text without what near-duplicates differ in: case, numbers, punctuation, whitespace, diacritics.

The rules are those of datatrove's MinHash, character by character, since they decide which shingles are equal.
"""

import re
import unicodedata

# What counts as punctuation: all of ASCII but letters, digits and whitespace, all control characters, and these.
# (A list of theirs, not a Unicode class: U+2018 and U+2022 stay, U+2019 goes.)
_PUNCTUATION = "«´»–—’“”„…∶━►、。〈〉《》「」【】！％（），．１：；？～"
_CONTROL = [*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0)]
_ASCII = [c for c in range(0x21, 0x7F) if not chr(c).isalnum()]
_BLANK = dict.fromkeys([*_CONTROL, *_ASCII, *map(ord, _PUNCTUATION)], " ")

# Decimal digits of scripts that are newer than the Unicode tables of Python 3.11.
_NEW_DIGITS = (
    "\U00010d40-\U00010d49\U000116d0-\U000116e3\U00011bf0-\U00011bf9\U00011de0-\U00011de9\U00011f50-\U00011f59"
    "\U00016130-\U00016139\U00016d70-\U00016d79\U0001ccf0-\U0001ccf9\U0001e4f0-\U0001e4f9\U0001e5f1-\U0001e5fa"
)
_DIGITS = rf"[\d{_NEW_DIGITS}]+"
_NUMBER = re.compile(f"{_DIGITS}(?:[.,،٫⎖⎗⎘]{_DIGITS})?")


def simplify(text: str) -> str:
    """The text in lower case, numbers as "0", punctuation as spaces, runs of whitespace as one space, no diacritics.

    In this order, so that "1|2" becomes "0 0". Equal to datatrove 0.10's `simplify_text` with its default rules.
    """
    return _without_diacritics(" ".join(_without_punctuation(text).split())).strip()


def simplify_chunks(chunks: list[str]) -> list[list[str]]:
    """Of each of some strings without whitespace, what `simplify` leaves of it, parted at spaces."""
    lines = _without_diacritics(_without_punctuation("\n".join(chunks))).split("\n")
    return [line.split() for line in lines]


def _without_punctuation(text: str) -> str:
    """Keeps "\\n", and never looks across it."""
    return _NUMBER.sub("0", text.lower()).translate(_BLANK)


def _without_diacritics(text: str) -> str:
    if text.isascii():
        return text
    text = unicodedata.normalize("NFD", text)
    marks = [ord(c) for c in set(text) if unicodedata.category(c) == "Mn"]
    return text.translate(dict.fromkeys(marks)) if marks else text
