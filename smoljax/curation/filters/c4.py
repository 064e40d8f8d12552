"""Lines and pages that are no prose (C4: Raffel et al. 2020, section 2.2)."""

import re

from smoljax.curation import sentences
from smoljax.curation.filters.check import Checks, Filter, above, below

_CITATIONS = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_TERMINALS = (".", "?", "!", '"', "'")
_POLICIES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)


@Filter
def c4(
    text: str,
    *,
    language: str = "en",
    terminal_lines: bool = True,
    min_words_per_line: int = 3,
    max_word_length: int = 1000,
    min_sentences: int = 5,
) -> Checks:
    """Takes lines out of a text, and removes what is then too short, as datatrove 0.10's C4QualityFilter does.

    A line goes that has a word of more than `max_word_length` characters, fewer than `min_words_per_line` words
    between whitespace, "javascript", or a phrase about cookies and terms of use. The marks of citations ("[1]", "[edit]",
    "[citation needed]") go out of the others, which are stripped. Reasons: lorem_ipsum and curly_bracket (in a line
    that is long enough; the first in the text is the reason), few_sentences (in the lines that stay).

    Args:
      terminal_lines: only lines stay that end in one of . ? ! " ' but not in an ellipsis.
    """
    kept: list[str] = []
    found: dict[str, int] = {}
    for line in map(str.strip, text.splitlines()):
        words = line.split()
        if len(line) > max_word_length and max(map(len, words)) > max_word_length:
            continue
        line = _CITATIONS.sub("", line)
        if terminal_lines and (not line.endswith(_TERMINALS) or line.endswith("...")):
            continue
        if len(words) < min_words_per_line:
            continue
        lower = line.lower()
        if "lorem ipsum" in lower:
            found["lorem_ipsum"] = found.get("lorem_ipsum", 0) + 1
        if "javascript" in lower:
            continue
        if "{" in line:
            found["curly_bracket"] = found.get("curly_bracket", 0) + 1
        if not any(phrase in lower for phrase in _POLICIES):
            kept.append(line)
    for reason in dict.fromkeys((*found, "lorem_ipsum", "curly_bracket")):
        yield above(reason, found.get(reason, 0), 0)
    yield below(
        "few_sentences",
        lambda: sum(sentences.count(line, language) for line in kept),
        min_sentences,
        at_least=len(kept),  # Each line has one.
    )
    return "\n".join(kept).strip()
