"""The number of sentences, as spaCy's sentencizer counts them over the words of smoljax.curation.words."""

import functools
import re
import unicodedata
from collections.abc import Iterable

from smoljax.curation import spacy_tables
from smoljax.curation.words import BREAK, joined_words

# Behind Unicode's first two planes there is no punctuation.
_PLANES = 0x20000


def count(text: str, language: str) -> int:
    """Sentences of a text, 1 of an empty one.

    A sentence begins with the text, and with the first word behind a mark that ends sentences which is no punctuation.
    Whitespace is a word here, unless it is a single space.
    """
    rows = [joined_words(run, language) for run in BREAK.split(text)]
    return 1 + len(_ends().findall("\n\n".join(rows)))


@functools.cache
def _ends() -> re.Pattern:
    """Matches, in words joined by line breaks, the words from the end of one sentence to the beginning of the next."""
    marks = spacy_tables.tables("en")["marks"]  # Of any language.
    punctuation = [c for c in map(chr, range(_PLANES)) if unicodedata.category(c)[0] == "P"]
    either = f"[{_class(punctuation)}]+|[{_class(marks)}]"
    return re.compile(rf"^[{_class(marks)}](?:\n(?:{either})$)*+(?=\n)", re.MULTILINE)


def _class(characters: Iterable[str]) -> str:
    return "".join(map(re.escape, characters))
