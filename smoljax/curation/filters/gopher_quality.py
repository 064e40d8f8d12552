"""Text that does not look like prose (Rae et al. 2021, appendix A.1.1)."""

from smoljax.curation.filters.check import Checks, Filter, above, below

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")

_ELLIPSES = ("...", "…")
_BULLETS = ("•", "-")


@Filter
def gopher_quality(
    text: str,
    *,
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
    """Removes text that does not look like prose.

    Words here have at least one letter or digit; ratios are per word, or fractions of lines. Reasons:
    few_words, many_words, short_words, long_words, hashes, ellipses, bullet_lines, ellipsis_lines,
    few_alphabetic_words, few_stop_words (distinct ones, case counts).
    """
    tokens = text.split()
    words = [token for token in tokens if any(map(str.isalnum, token))]
    yield below("few_words", len(words), min_words)
    yield above("many_words", len(words), max_words)
    if not words:
        return None
    mean = sum(map(len, words)) / len(words)
    yield below("short_words", mean, min_mean_word_length)
    yield above("long_words", mean, max_mean_word_length)
    yield above("hashes", text.count("#") / len(tokens), max_hash_ratio)
    yield above("ellipses", sum(map(text.count, _ELLIPSES)) / len(tokens), max_ellipsis_ratio)
    lines = text.splitlines() or [""]
    bullets = sum(line.lstrip().startswith(_BULLETS) for line in lines)
    yield above("bullet_lines", bullets / len(lines), max_bullet_lines)
    ellipses = sum(line.rstrip().endswith(_ELLIPSES) for line in lines)
    yield above("ellipsis_lines", ellipses / len(lines), max_ellipsis_lines)
    alphabetic = sum(any(map(str.isalpha, token)) for token in tokens)
    yield below("few_alphabetic_words", alphabetic / len(tokens), min_alphabetic_words)
    found = len(frozenset(stop_words).intersection(tokens))
    yield below("few_stop_words", found, min_stop_words)
