"""Filters on text whose statistics are known in closed form, each with a control just on the other side."""

import sys
import unicodedata

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoljax.curation import filters, repetition

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "and",
    "that",
    "lazy",
    "dog",
    "have",
    "to",
    "be",
    "with",
    "of",
    "a",
    "small",
    "house",
    "on",
    "hill",
]


def batch(*texts: str) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({"text": list(texts), "row": list(range(len(texts)))})


def reason(stage, text: str, **arguments) -> str | None:
    kept, removed = stage(batch(text), **arguments)
    assert kept.num_rows + removed.num_rows == 1
    return removed.column("reason")[0].as_py() if removed.num_rows else None


def distinct_words(count: int) -> list[str]:
    return [f"word{i:05d}" for i in range(count)]


def test_contract_keeps_order_columns_and_adds_the_reason_last():
    texts = ["short", "x" * 30, "tiny", "y" * 30]
    kept, removed = filters.length(batch(*texts), min_characters=10, max_characters=100)
    assert kept.schema == batch("").schema
    assert removed.schema.names == ["text", "row", "reason"]
    assert kept.column("row").to_pylist() == [1, 3]
    assert removed.column("row").to_pylist() == [0, 2]
    assert removed.column("reason").to_pylist() == ["length:too_short"] * 2


@pytest.mark.parametrize(
    ("size", "expected"), [(9, "too_short"), (10, None), (20, None), (21, "too_long")]
)
def test_length_edges(size, expected):
    found = reason(filters.length, "x" * size, min_characters=10, max_characters=20)
    assert found == (expected and f"length:{expected}")


@pytest.mark.parametrize(("copies", "expected"), [(3, None), (4, "duplicate_lines")])
def test_duplicate_lines_are_a_fraction_of_all_lines(copies, expected):
    # 10 lines, `copies` of them equal to an earlier one: 3/10 is not above 0.30, 4/10 is.
    lines = [" ".join(distinct_words(400)[i * 20 : i * 20 + 20]) for i in range(10 - copies)]
    text = "\n".join([*lines, *lines[:copies]])
    found = reason(
        filters.gopher_repetition,
        text,
        max_duplicate_line_characters=1.0,
        max_top_ngrams=(),
        max_duplicate_ngrams=(),
    )
    assert found == (expected and f"gopher_repetition:{expected}")


def ngrams(words: list[str]) -> repetition.Ngrams:
    return repetition.Ngrams("\n".join(words))


def test_top_ngram_characters_of_a_known_text():
    # "a b" five times in "a b c0 a b c1 ...": 5 * len("a b") characters.
    words = [w for i in range(5) for w in ("a", "b", f"c{i}")]
    assert ngrams(words).top_characters(2) == 15
    # Where none is repeated, the first is the most frequent one.
    assert ngrams(["one", "two", "three"]).top_characters(2) == len("one two")
    assert ngrams(["one"]).top_characters(2) == 0


def test_top_ngram_ties_go_to_the_first():
    words = ["aa", "bb", "x", "aa", "bb", "y", "ccc", "ddd", "z", "ccc", "ddd"]
    assert ngrams(words).top_characters(2) == 2 * len("aa bb")


def test_duplicate_ngrams_jump_over_what_they_found():
    # Ten equal words: 2-grams start at 0..8. 0 is new, 1 is a hit (jump to 3), then 3, 5 and 7: 4 hits of 2 chars.
    assert ngrams(["w"] * 10).duplicate_characters(2) == 8
    assert ngrams(distinct_words(10)).duplicate_characters(2) == 0


def test_duplicate_ngrams_are_equal_when_written_without_spaces_and_top_ngrams_are_not():
    words = ["ab", "c", "x", "a", "bc"]
    assert ngrams(words).duplicate_characters(2) == 3
    assert ngrams(words).top_characters(2) == len("ab c")


def test_texts_whose_polynomial_hashes_collide_are_told_apart():
    # Thue-Morse words of 2^11 letters: their hashes are equal for every odd base modulo 2^64, the words are not.
    word, other = "a", "b"
    for _ in range(11):
        word, other = word + other, other + word
    assert ngrams([word, other]).duplicate_characters(1) == 0
    assert ngrams([word, word]).duplicate_characters(1) == len(word)
    assert ngrams([word, other, "x", other]).duplicate_characters(1) == len(word)
    assert ngrams(["x", "x", word, other]).top_characters(1) == 2
    assert ngrams([word, other, other]).top_characters(1) == 2 * len(word)


def slow_duplicate_ngrams(words: list[str], n: int) -> int:
    """The definition, word by word."""
    seen, characters, at = set(), 0, 0
    while at < len(words) - n + 1:
        gram = "".join(words[at : at + n])
        if gram in seen:
            characters += len(gram)
            at += n
        else:
            seen.add(gram)
            at += 1
    return characters


def slow_top_ngram(words: list[str], n: int) -> int:
    counts: dict[str, int] = {}
    for at in range(len(words) - n + 1):
        gram = " ".join(words[at : at + n])
        counts[gram] = counts.get(gram, 0) + 1
    if not counts:
        return 0
    gram = max(counts, key=counts.get)  # The first of equals: dicts keep the order of arrival.
    return len(gram) * counts[gram]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["a", "bb", "ab", "b", "c", "EE. UU.", "EE.", "UU."]), max_size=60))
def test_ngram_counts_equal_the_definition(words):
    counted = ngrams(words)
    for n in range(1, 11):
        assert counted.top_characters(n) == slow_top_ngram(words, n)
        assert counted.duplicate_characters(n) == slow_duplicate_ngrams(words, n)
        assert counted.most_duplicate_characters(n) >= slow_duplicate_ngrams(words, n)


def good_words(count: int) -> list[str]:
    return [WORDS[i % len(WORDS)] for i in range(count)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" ".join(good_words(49)), "few_words"),
        (" ".join(good_words(50)), None),
        (" ".join([*good_words(48), "--", "!!"]), "few_words"),  # Signs are no words.
        (" ".join(["to", "be"] * 30), "short_words"),  # mean 2
        (" ".join(["the", "and"] * 30), None),  # mean 3 is not below 3
        (" ".join([*["extraordinary"] * 60, "the", "and"]), "long_words"),
        (" ".join(good_words(90) + ["#"] * 11), "hashes"),  # 11/101 > 0.1
        (" ".join(good_words(90) + ["#"] * 10), None),  # 10/100 is not
        (
            " ".join(good_words(90) + ["wait..."] * 13),
            "ellipses",
        ),  # "wait" and "..." are two words.
        (" ".join(good_words(90) + ["wait…"] * 13), "ellipses"),
        (" ".join(good_words(90) + ["wait..."] * 11 + ["on"]), None),  # 11/113
        ("\n".join(f"- {' '.join(good_words(9))}" for _ in range(10)), "bullet_lines"),
        ("\n".join(["x", *[f"- {' '.join(good_words(9))}"] * 9]), None),  # 9/10
        (
            "\n".join([f"{' '.join(good_words(12))}..."] * 4 + [" ".join(good_words(12))] * 6),
            "ellipsis_lines",
        ),
        (" ".join(good_words(79) + ["123"] * 21), "few_alphabetic_words"),
        (" ".join(good_words(80) + ["123"] * 20), None),
        (" ".join(["Some", "words", "without", "them"] * 20), "few_stop_words"),
        (
            " ".join(["Some", "words", "the", "the"] * 20),
            "few_stop_words",
        ),  # One distinct is not two.
        (" ".join(["Some", "words", "the", "and"] * 20), None),
    ],
)
def test_gopher_quality_rules_and_their_edges(text, expected):
    assert reason(filters.gopher_quality, text) == (expected and f"gopher_quality:{expected}")


LONG = "This line is longer than thirty characters"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([f"{LONG} {i}" for i in range(10)], "few_terminal_lines"),
        ([f"{LONG} {i}" + "." * (i < 2) for i in range(10)], None),  # 2/10 end in a full stop
        ([f"{LONG} {i}" + "।" * (i < 2) for i in range(10)], None),  # and in Hindi
        ([f"{LONG} {i}." for i in range(3)] + [f"short {i}." for i in range(7)], "short_lines"),
        ([f"{LONG} {i}." for i in range(4)] + [f"a {i} b c d e f g h." for i in range(6)], None),
        ([f"{LONG} {i}." for i in range(20)] + [f"{LONG} 0."], "duplicate_line_characters"),
        ([f"onelongwordinthislinewithoutanyspace{i}." for i in range(10)], "list_like"),
    ],
)
def test_fineweb_rules_and_their_edges(lines, expected):
    assert reason(filters.fineweb, "\n".join(lines)) == (expected and f"fineweb:{expected}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def f():\n    return 1\n", None),
        ("# This file is auto-generated, do not edit\nX = 1\n", "generated"),
        ("x = 1\n" * 10 + "# is auto-generated\n", None),  # Only the first five lines count.
        ("x = [" + "1, " * 40 + "]\n", "long_lines"),
        ("x = 1\n" * 100 + "y" * 1001, "long_line"),
        ("x = 1\n" * 100 + "y" * 1000, None),
        ("{[()]} = +-*/\n" * 3 + "a", "few_alphanumeric"),
    ],
)
def test_code_quality(text, expected):
    assert reason(filters.code_quality, text) == (expected and f"code_quality:{expected}")


ALL = (
    (filters.length, {"min_characters": 1, "max_characters": 10}),
    (filters.gopher_repetition, {}),
    (filters.gopher_quality, {}),
    (filters.gopher_quality, {"min_words": 0, "min_stop_words": 0}),
    (filters.fineweb, {}),
    (filters.code_quality, {}),
)
WHITESPACE = "".join(chr(i) for i in range(sys.maxunicode + 1) if chr(i).isspace())
ADVERSARIAL = [
    "",
    " ",
    "\n",
    "\n\n\n",
    "word",
    "x" * 1_000_000,
    "#" * 1000,
    "...",
    "• " * 500,
    WHITESPACE,
    WHITESPACE.join(WORDS),
    "EE. UU.",
    "a\u200bb\u200dc\ufeff",
    "\0\0\0",
    unicodedata.normalize("NFD", "é" * 500),
    "the\u2028and\u2029of\x85to\x1cbe",
]


@pytest.mark.parametrize("text", ADVERSARIAL, ids=lambda text: repr(text[:12]))
def test_every_filter_decides_on_adversarial_text(text):
    for stage, arguments in ALL:
        first = reason(stage, text, **arguments)
        assert first == reason(stage, text, **arguments)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=200), max_size=8))
def test_every_filter_is_a_function_of_each_row_alone(texts):
    for stage, arguments in ALL:
        kept, removed = stage(batch(*texts), **arguments)
        rows = dict(zip(removed.column("row").to_pylist(), removed.column("reason").to_pylist()))
        assert sorted([*kept.column("row").to_pylist(), *rows]) == list(range(len(texts)))
        for row, text in enumerate(texts):
            assert rows.get(row) == reason(stage, text, **arguments)
