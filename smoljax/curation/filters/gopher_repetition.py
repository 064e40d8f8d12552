"""Repetitive text (Rae et al. 2021, table A1)."""

import re

from smoljax.curation import repetition
from smoljax.curation.filters.check import Checks, Filter, above


@Filter
def gopher_repetition(
    text: str,
    *,
    max_duplicate_paragraphs: float = 0.30,
    max_duplicate_paragraph_characters: float = 0.20,
    max_duplicate_lines: float = 0.30,
    max_duplicate_line_characters: float = 0.20,
    max_top_ngrams: tuple[tuple[int, float], ...] = ((2, 0.20), (3, 0.18), (4, 0.16)),
    max_duplicate_ngrams: tuple[tuple[int, float], ...] = (
        (5, 0.15),
        (6, 0.14),
        (7, 0.13),
        (8, 0.12),
        (9, 0.11),
        (10, 0.10),
    ),
) -> Checks:
    """Removes repetitive text.

    Each value is a greatest fraction: of paragraphs and lines that occurred before, of the characters in them,
    of the characters in the most frequent n-gram, and of the characters in n-grams that occurred before.
    Pairs are (n, fraction). Reasons: duplicate_paragraphs, duplicate_paragraph_characters, duplicate_lines,
    duplicate_line_characters, top_N_gram, duplicate_N_gram.
    """
    size = max(1, len(text))
    paragraphs = re.split(r"\n{2,}", text.strip())
    count, characters = repetition.duplicates(paragraphs)
    yield above("duplicate_paragraphs", count / len(paragraphs), max_duplicate_paragraphs)
    yield above(
        "duplicate_paragraph_characters", characters / size, max_duplicate_paragraph_characters
    )
    lines = re.split(r"\n+", text)
    count, characters = repetition.duplicates(lines)
    yield above("duplicate_lines", count / len(lines), max_duplicate_lines)
    yield above("duplicate_line_characters", characters / size, max_duplicate_line_characters)
    words = repetition.Words(text.split())
    for n, fraction in max_top_ngrams:
        yield above(f"top_{n}_gram", words.top_ngram_characters(n) / size, fraction)
    for n, fraction in max_duplicate_ngrams:
        yield above(f"duplicate_{n}_gram", words.duplicate_ngram_characters(n) / size, fraction)
