"""Text that does not look like prose (Rae et al. 2021, appendix A.1.1)."""

from smoljax.curation import word_counts
from smoljax.curation.filters.check import Checks, Filter, above, below
from smoljax.curation.words import document_words

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")

_ELLIPSES = ("...", "…")
_BULLETS = ("•", "-")


@Filter
def gopher_quality(
    text: str,
    *,
    language: str = "en",
    min_words: int = 50,
    max_words: int = 100_000,
    min_mean_word_length: float = 3.0,
    max_mean_word_length: float = 10.0,
    max_hash_ratio: float = 0.1,
    max_ellipsis_ratio: float = 0.1,
    max_bullet_lines: float = 0.9,
    max_ellipsis_lines: float = 0.3,
    min_alphabetic_words: float = 0.8,
    min_stop_words: int = 2,
    stop_words: tuple[str, ...] = STOP_WORDS,
) -> Checks:
    """Removes text that does not look like prose, as datatrove 0.10's GopherQualityFilter does.

    The number of words and their mean length are of those with a character that is no punctuation; ratios are per
    word of all, or fractions of lines. Reasons: few_words, many_words, short_words, long_words, hashes, ellipses,
    bullet_lines, ellipsis_lines, few_alphabetic_words (with a letter), few_stop_words (distinct ones, case counts).
    """
    joined = document_words(text, language)
    counts = word_counts.count(joined)
    yield below("few_words", counts.no_symbols, min_words)
    yield above("many_words", counts.no_symbols, max_words)
    if not counts.words:
        return
    if counts.no_symbols:
        mean = counts.no_symbol_characters / counts.no_symbols
        yield below("short_words", mean, min_mean_word_length)
        yield above("long_words", mean, max_mean_word_length)
    yield above("hashes", text.count("#") / counts.words, max_hash_ratio)
    ellipses = sum(map(text.count, _ELLIPSES))
    yield above("ellipses", ellipses / counts.words, max_ellipsis_ratio)
    lines = text.splitlines()
    yield above(
        "bullet_lines",
        lambda: sum(line.lstrip().startswith(_BULLETS) for line in lines) / len(lines),
        max_bullet_lines,
        at_most=sum(map(text.count, _BULLETS)) / len(lines),
    )
    yield above(
        "ellipsis_lines",
        lambda: sum(line.rstrip().endswith(_ELLIPSES) for line in lines) / len(lines),
        max_ellipsis_lines,
        at_most=ellipses / len(lines),
    )
    yield below("few_alphabetic_words", counts.alphabetic / counts.words, min_alphabetic_words)
    among = f"\n{joined}\n"
    found = sum(f"\n{word}\n" in among for word in set(stop_words))
    yield below("few_stop_words", found, min_stop_words)
