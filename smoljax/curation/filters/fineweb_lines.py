"""Lists, menus and repeated lines (FineWeb's own filters)."""

from smoljax.curation import repetition
from smoljax.curation.filters.check import Checks, Filter, above, below

# Marks that end a sentence in the scripts of lid.176's languages, and what may stand behind them.
_TERMINALS = tuple(".!?…。！？｡؟۔।॥։။።፧၊។៕‼⁇⁈⁉‽\"'”’」』»›)")


@Filter
def fineweb_lines(
    text: str,
    *,
    min_terminal_lines: float = 0.12,
    max_short_lines: float = 0.67,
    short_line_characters: int = 30,
    max_duplicate_line_characters: float = 0.01,
    max_newlines_per_word: float = 0.3,
) -> Checks:
    """Removes lists, menus and repeated lines; the values are those that FineWeb's code runs.

    Lines are the non-blank ones. Reasons: few_terminal_lines (ending in a mark that ends a sentence),
    short_lines (at most `short_line_characters`), duplicate_line_characters, list_like.
    """
    lines = [line for line in text.split("\n") if line.strip()]
    count = max(1, len(lines))
    terminal = sum(line.rstrip().endswith(_TERMINALS) for line in lines)
    yield below("few_terminal_lines", terminal / count, min_terminal_lines)
    short = sum(len(line) <= short_line_characters for line in lines)
    yield above("short_lines", short / count, max_short_lines)
    newlines = text.count("\n")
    _, characters = repetition.duplicates(lines)
    yield above(
        "duplicate_line_characters",
        characters / max(1, len(text) - newlines),
        max_duplicate_line_characters,
    )
    yield above("list_like", newlines / max(1, len(text.split())), max_newlines_per_word)
