"""datatrove's filters beside ours: the same arguments, reasons by one table, and what both make of a text."""

import functools

import pytest

pytest.importorskip("datatrove", reason="the oracle of the tests is not installed")

import pyarrow as pa
from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.utils.text import split_into_words

from smoljax.curation import chain
from smoljax.curation.words import words

ORACLES = {
    "gopher_repetition": GopherRepetitionFilter,
    "gopher_quality": GopherQualityFilter,
    "c4": C4QualityFilter,
    "fineweb": FineWebQualityFilter,
}

# Our reason -> datatrove's.
REASONS = {
    "gopher_repetition": {
        "empty": "empty",
        "duplicate_paragraphs": "dup_para_frac",
        "duplicate_paragraph_characters": "dup_para_char_frac",
        "duplicate_lines": "dup_line_frac",
        "duplicate_line_characters": "dup_line_char_frac",
        **{f"top_{n}_gram": f"top_{n}_gram" for n in (2, 3, 4)},
        **{f"duplicate_{n}_gram": f"duplicated_{n}_n_grams" for n in range(5, 11)},
    },
    "gopher_quality": {
        "few_words": "gopher_short_doc",
        "many_words": "gopher_long_doc",
        "short_words": "gopher_below_avg_threshold",
        "long_words": "gopher_above_avg_threshold",
        "hashes": "gopher_too_many_hashes",
        "ellipses": "gopher_too_many_ellipsis",
        "bullet_lines": "gopher_too_many_bullets",
        "ellipsis_lines": "gopher_too_many_end_ellipsis",
        "few_alphabetic_words": "gopher_below_alpha_threshold",
        "few_stop_words": "gopher_enough_stop_words",
    },
    "c4": {
        "lorem_ipsum": "lorem_ipsum",
        "curly_bracket": "curly_bracket",
        "few_sentences": "too_few_sentences",
    },
    "fineweb": {
        "no_lines": "empty",
        "few_terminal_lines": "line_punct_ratio",
        "short_lines": "short_line_ratio",
        "duplicate_line_characters": "char_dup_ratio",
        "list_like": "list_ratio",
    },
}

# Our argument -> datatrove's; what is None with us is 0 there.
ARGUMENTS = {
    "gopher_repetition": {
        "max_duplicate_paragraphs": "dup_para_frac",
        "max_duplicate_paragraph_characters": "dup_para_char_frac",
        "max_duplicate_lines": "dup_line_frac",
        "max_duplicate_line_characters": "dup_line_char_frac",
        "max_top_ngrams": "top_n_grams",
        "max_duplicate_ngrams": "dup_n_grams",
    },
    "gopher_quality": {
        "min_words": "min_doc_words",
        "max_words": "max_doc_words",
        "min_mean_word_length": "min_avg_word_length",
        "max_mean_word_length": "max_avg_word_length",
        "max_hash_ratio": "max_symbol_word_ratio",
        "max_ellipsis_ratio": "max_symbol_word_ratio",
        "max_bullet_lines": "max_bullet_lines_ratio",
        "max_ellipsis_lines": "max_ellipsis_lines_ratio",
        "min_alphabetic_words": "max_non_alpha_words_ratio",
        "min_stop_words": "min_stop_words",
        "stop_words": "stop_words",
    },
    "c4": {
        "terminal_lines": "filter_no_terminal_punct",
        "min_words_per_line": "min_words_per_line",
        "max_word_length": "max_word_length",
        "min_sentences": "min_num_sentences",
    },
    "fineweb": {
        "min_terminal_lines": "line_punct_thr",
        "keep_without_terminals": "line_punct_exclude_zero",
        "max_short_lines": "short_line_thr",
        "short_line_characters": "short_line_length",
        "max_duplicate_line_characters": "char_duplicates_ratio",
        "max_newlines_per_word": "new_line_ratio",
    },
}

# What FineWeb runs: C4 without its rule about the ends of lines.
FINEWEB = {"c4": {"terminal_lines": False}}

CHAIN = ("gopher_repetition", "gopher_quality", "c4", "fineweb")

# (reason, text): ("filter:rule", None) of a removed document, (None, text as the filter leaves it) of a kept one.
Decision = tuple[str | None, str | None]


def assert_same(texts: list[str], language: str, preset: dict | None = None) -> set[str]:
    """Asserts that each filter, and the chain of all, decides like datatrove's on each text, and leaves the same text.

    So do the words. Gives the reasons that occurred.
    """
    preset = preset or {}
    expected = [_theirs(text, language, preset) for text in texts]
    for name in CHAIN:
        _assert_equal(texts, _ours((name,), preset, texts, language), [e[name] for e in expected])
    _assert_equal(texts, _ours(CHAIN, preset, texts, language), [e["chain"] for e in expected])
    return {reason for decisions in expected for reason, _ in decisions.values() if reason}


def _assert_equal(texts: list[str], found: list[Decision], expected: list[Decision]) -> None:
    for text, here, there in zip(texts, found, expected, strict=True):
        assert (here, text) == (there, text)


def _ours(names: tuple[str, ...], preset: dict, texts: list[str], language: str) -> list[Decision]:
    columns = {"text": texts, "language": [language] * len(texts), "number": range(len(texts))}
    rest = pa.RecordBatch.from_pydict(columns)
    decisions: list[Decision] = [(None, None)] * len(texts)
    for step in chain.build({**preset, "order": ("extract", *names)}).before_dedup:
        rest, removed = step.run(rest)
        for row, reason in zip(removed["number"].to_pylist(), removed["reason"].to_pylist()):
            decisions[row] = (reason, None)
    for row, text in zip(rest["number"].to_pylist(), rest["text"].to_pylist()):
        decisions[row] = (None, text)
    return decisions


def _theirs(text: str, language: str, preset: dict) -> dict[str, Decision]:
    """What each filter decides alone, and the chain. In the order in which they share their memory of words."""
    tokens = split_into_words(text, language)
    found = {
        name: _decision(name, preset.get(name, {}), text, language)
        for name in ("gopher_repetition", "gopher_quality", "fineweb", "c4")
    }
    assert words(text, language) == tokens, text
    for name in ("gopher_repetition", "gopher_quality", "c4"):
        found["chain"] = found[name]
        if found[name][0] is not None:
            return found
    edited = found["c4"][1]
    found["chain"] = _decision("fineweb", preset.get("fineweb", {}), edited, language)
    return found


def _decision(name: str, arguments: dict, text: str, language: str) -> Decision:
    document = Document(text, "0")
    result = _oracle(name, tuple(arguments.items()), language).filter(document)
    if result is True:
        return None, document.text
    (rule,) = [our for our, their in REASONS[name].items() if their == result[1]]
    return f"{name}:{rule}", None


@functools.cache
def _oracle(name: str, arguments: tuple, language: str):
    # FineWeb's filter has no way to turn a rule off but a threshold that nothing reaches.
    off = 999 if name == "fineweb" else 0
    translated = {
        ARGUMENTS[name][key]: off * (not key.startswith("min")) if value is None else value
        for key, value in arguments
    }
    return ORACLES[name](language=language, **translated)
