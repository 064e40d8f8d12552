"""Quality filters: each maps a RecordBatch with a `text` column to (kept, removed with column "reason").

Thresholds default to the values of the source that each filter names. Words are runs of characters between
Unicode whitespace (Gopher's papers do not say; the 2024 pipelines use a tokenizer that splits punctuation off).
All comparisons are strict; the first rule that fails, in the order of the docstring, gives the reason.
"""

import re
from collections.abc import Callable

import pyarrow as pa

from smoljax.curation import repetition, schema

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")

_ELLIPSES = ("...", "…")
_BULLETS = ("•", "-")
# Marks that end a sentence in the scripts of lid.176's languages, and what may stand behind them.
_TERMINALS = tuple(".!?…。！？｡؟۔।॥։።፧၊။។៕‼⁇⁈⁉‽\"'”’」』»›)")
_GENERATED = re.compile(r"auto-?generated|automatically generated|do not edit", re.IGNORECASE)


def length(
    batch: pa.RecordBatch, *, min_characters: int, max_characters: int
) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    """Removes documents of fewer or more characters: length:too_short, length:too_long."""

    def rule(text: str) -> str | None:
        if len(text) < min_characters:
            return "too_short"
        return "too_long" if len(text) > max_characters else None

    return _apply("length", batch, rule)


def gopher_repetition(
    batch: pa.RecordBatch,
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
) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    """Removes repetitive text (Rae et al. 2021, table A1).

    Each value is a greatest fraction: of paragraphs and lines that occurred before, of the characters in them,
    of the characters in the most frequent n-gram, and of the characters in n-grams that occurred before.
    Pairs are (n, fraction). Reasons: duplicate_paragraphs, duplicate_paragraph_characters, duplicate_lines,
    duplicate_line_characters, top_N_gram, duplicate_N_gram.
    """

    def rule(text: str) -> str | None:
        size = len(text)
        if size == 0:
            return None
        for unit, parts, max_count, max_characters in (
            (
                "paragraph",
                re.split(r"\n{2,}", text.strip()),
                max_duplicate_paragraphs,
                max_duplicate_paragraph_characters,
            ),
            (
                "line",
                re.split(r"\n+", text),
                max_duplicate_lines,
                max_duplicate_line_characters,
            ),
        ):
            count, characters = repetition.duplicates(parts)
            if count / len(parts) > max_count:
                return f"duplicate_{unit}s"
            if characters / size > max_characters:
                return f"duplicate_{unit}_characters"
        words = repetition.Words(text.split())
        for n, fraction in max_top_ngrams:
            if words.top_ngram_characters(n) / size > fraction:
                return f"top_{n}_gram"
        for n, fraction in max_duplicate_ngrams:
            if words.duplicate_ngram_characters(n) / size > fraction:
                return f"duplicate_{n}_gram"
        return None

    return _apply("gopher_repetition", batch, rule)


def gopher_quality(
    batch: pa.RecordBatch,
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
) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    """Removes text that does not look like prose (Rae et al. 2021, appendix A.1.1).

    Words here have at least one letter or digit; ratios are per word, or fractions of lines. Reasons:
    few_words, many_words, short_words, long_words, hashes, ellipses, bullet_lines, ellipsis_lines,
    few_alphabetic_words, few_stop_words (distinct ones, case counts).
    """
    wanted = frozenset(stop_words)

    def rule(text: str) -> str | None:
        tokens = text.split()
        words = [token for token in tokens if any(map(str.isalnum, token))]
        if len(words) < min_words:
            return "few_words"
        if len(words) > max_words:
            return "many_words"
        if words:
            mean = sum(map(len, words)) / len(words)
            if mean < min_mean_word_length:
                return "short_words"
            if mean > max_mean_word_length:
                return "long_words"
        if tokens and text.count("#") / len(tokens) > max_hash_ratio:
            return "hashes"
        if tokens and sum(map(text.count, _ELLIPSES)) / len(tokens) > max_ellipsis_ratio:
            return "ellipses"
        lines = text.splitlines() or [""]
        bullets = sum(line.lstrip().startswith(_BULLETS) for line in lines)
        if bullets / len(lines) > max_bullet_lines:
            return "bullet_lines"
        if (
            sum(line.rstrip().endswith(_ELLIPSES) for line in lines) / len(lines)
            > max_ellipsis_lines
        ):
            return "ellipsis_lines"
        alphabetic = sum(any(map(str.isalpha, token)) for token in tokens)
        if tokens and alphabetic / len(tokens) < min_alphabetic_words:
            return "few_alphabetic_words"
        return "few_stop_words" if len(wanted.intersection(tokens)) < min_stop_words else None

    return _apply("gopher_quality", batch, rule)


def fineweb_lines(
    batch: pa.RecordBatch,
    *,
    min_terminal_lines: float = 0.12,
    max_short_lines: float = 0.67,
    short_line_characters: int = 30,
    max_duplicate_line_characters: float = 0.01,
    max_newlines_per_word: float = 0.3,
) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    """Removes lists, menus and repeated lines (FineWeb's own filters; the values are those that its code runs).

    Lines are the non-blank ones. Reasons: few_terminal_lines (ending in a mark that ends a sentence),
    short_lines (at most `short_line_characters`), duplicate_line_characters, list_like.
    """

    def rule(text: str) -> str | None:
        lines = [line for line in text.split("\n") if line.strip()]
        if not lines:
            return "few_terminal_lines"
        terminal = sum(line.rstrip().endswith(_TERMINALS) for line in lines)
        if terminal / len(lines) < min_terminal_lines:
            return "few_terminal_lines"
        short = sum(len(line) <= short_line_characters for line in lines)
        if short / len(lines) > max_short_lines:
            return "short_lines"
        newlines = text.count("\n")
        _, characters = repetition.duplicates(lines)
        if characters / (len(text) - newlines) > max_duplicate_line_characters:
            return "duplicate_line_characters"
        return "list_like" if newlines / len(text.split()) > max_newlines_per_word else None

    return _apply("fineweb_lines", batch, rule)


def code_quality(
    batch: pa.RecordBatch,
    *,
    max_mean_line_length: float = 100.0,
    max_line_length: int = 1000,
    min_alphanumeric: float = 0.25,
) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    """Removes data and generated files among program text (Chen et al. 2021, section 3.1; Kocetkov et al. 2022).

    Reasons: generated (a word of it in the first five lines), long_lines (the mean), long_line (any),
    few_alphanumeric (fraction of characters).
    """

    def rule(text: str) -> str | None:
        lines = text.splitlines() or [""]
        if any(map(_GENERATED.search, lines[:5])):
            return "generated"
        if sum(map(len, lines)) / len(lines) > max_mean_line_length:
            return "long_lines"
        if max(map(len, lines)) > max_line_length:
            return "long_line"
        if sum(map(str.isalnum, text)) < min_alphanumeric * len(text):
            return "few_alphanumeric"
        return None

    return _apply("code_quality", batch, rule)


def _apply(
    stage: str, batch: pa.RecordBatch, rule: Callable[[str], str | None]
) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    found = map(rule, batch.column("text").to_pylist())
    return schema.part(batch, [reason and f"{stage}:{reason}" for reason in found])
