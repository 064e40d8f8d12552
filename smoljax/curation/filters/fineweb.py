"""Lists, menus and repeated lines (FineWeb's own filters; Penedo et al. 2024, section 3.6)."""

from smoljax.curation.filters.check import Checks, Filter, above, below
from smoljax.curation.punctuation import TERMINALS
from smoljax.curation.words import document_words


@Filter
def fineweb(
    text: str,
    *,
    language: str = "en",
    min_terminal_lines: float | None = 0.12,
    keep_without_terminals: bool = False,
    max_short_lines: float | None = 0.67,
    short_line_characters: int = 30,
    max_duplicate_line_characters: float | None = 0.01,
    max_newlines_per_word: float | None = 0.3,
) -> Checks:
    """Removes lists, menus and repeated lines, as datatrove 0.10's FineWebQualityFilter does.

    Lines are the non-blank ones. The defaults are what FineWeb's code runs; its paper says 0.1 where the code has
    0.01, and FineWeb2 runs 0.1. None turns a rule off. Reasons: no_lines, few_terminal_lines (fraction that ends in
    a mark that ends a sentence), short_lines (fraction of at most `short_line_characters`),
    duplicate_line_characters (fraction of all characters but line breaks), list_like (line breaks per word).

    Args:
      keep_without_terminals: spares a text of which no line ends in such a mark, as in scripts that have none.
    """
    lines = [line for line in text.split("\n") if line and not line.isspace()]
    yield below("no_lines", len(lines), 1)
    count = max(1, len(lines))
    if min_terminal_lines is not None:
        terminal = sum(line[-1] in TERMINALS for line in lines)
        spared = keep_without_terminals and not terminal
        yield below("few_terminal_lines", terminal / count, 0.0 if spared else min_terminal_lines)
    lengths = list(map(len, lines))
    if max_short_lines is not None:
        short = sum(length <= short_line_characters for length in lengths)
        yield above("short_lines", short / count, max_short_lines)
    newlines = text.count("\n")
    if max_duplicate_line_characters is not None:
        repeated = sum(lengths) - sum(map(len, set(lines)))
        characters = max(1, len(text) - newlines)
        yield above(
            "duplicate_line_characters", repeated / characters, max_duplicate_line_characters
        )
    if max_newlines_per_word is not None:
        words = document_words(text, language).count("\n") + 1
        yield above("list_like", newlines / words, max_newlines_per_word)
