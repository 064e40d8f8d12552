"""Words and sentences are those of datatrove's tokenizers on strings of what their rules look for.

(Those of real documents are compared in tests/curation/filters/test_datatrove_*.py.)
"""

import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("datatrove", reason="the oracle of the tests is not installed")

import spacy
from datatrove.utils.text import split_into_sentences
from datatrove.utils.word_tokenizers import load_word_tokenizer

from smoljax.curation import sentences, word_counts
from smoljax.curation import words as module
from smoljax.curation.punctuation import SYMBOLS
from smoljax.curation.word_rules import LANGUAGES
from smoljax.curation.words import joined_words, words
from smoljax.errors import SmoljaxError
from tests.curation import material

WHITESPACE = [chr(code) for code in range(sys.maxunicode + 1) if chr(code).isspace()]
PARTS = (
    *"abzABZéÉßñ019",
    *".,:;!?()[]{}<>_#*&'\"`´‘’“”„«»¿¡§%=+-–—‐~…°/@|\\^$€£²",
    *(
        "..",
        "...",
        "--",
        "''",
        "’’",
        "``",
        "'s",
        "’S",
        "km",
        "m²",
        "US$",
        "R$",
        "°C.",
        "10",
        "8)",
        ")):",
        ":(",
        "www.",
    ),
    *(
        "://",
        ".com",
        "a.b",
        "e\u0301",
        "\u200b",
        "\u200d",
        "\ufeff",
        "\xad",
        "\0",
        "\U0001f600",
        "。",
        "、",
        "日本",
        "①",
    ),
    *("NOUN", "ORTH"),
)


def cases(language: str) -> st.SearchStrategy[str]:
    """The special cases of a language, whole and cut off."""
    rules = sorted(case for case in spacy.blank(language).tokenizer.rules if case.strip())
    whole = st.sampled_from(rules)
    return whole | whole.map(lambda case: case[1:]) | whole.map(lambda case: case[:-1])


def texts(language: str) -> st.SearchStrategy[str]:
    spaces = st.sampled_from([" "] * 8 + ["  ", "\n", *WHITESPACE])
    piece = st.sampled_from(PARTS) | cases(language)
    return st.lists(piece | spaces, max_size=40).map("".join) | st.text(max_size=60)


def theirs(text: str, language: str) -> list[str]:
    return load_word_tokenizer(language).word_tokenize(text)


def their_sentences(line: str, language: str) -> int:
    return len(split_into_sentences(line, language))


@pytest.mark.parametrize("language", LANGUAGES)
def test_strings_of_the_rules_parts(language):
    @settings(max_examples=500, deadline=None)
    @given(texts(language))
    @example("")
    @example("word")
    @example("main(): x(): )) y:) :)) (8) z:) ) :) )")
    @example("EE. UU. (EE. UU.) EE.  UU. EE.\nUU. EE. UU.EE. UU")
    @example("est-il n'est-il Adm ._. a._.b x''' '' y")
    @example("Hi.  ) x. y! ? ) Z ... a. \u3000b. ")
    def compare(text):
        assert words(text, language) == theirs(text, language)
        assert sentences.count(text, language) == their_sentences(text, language)

    compare()


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_special_case_between_others(language):
    rules = sorted(case for case in spacy.blank(language).tokenizer.rules if case.strip())
    for row in (" ".join(rules), " ".join(f"({case}," for case in rules), "x".join(rules)):
        assert words(row, language) == theirs(row, language)


def test_every_whitespace_parts_words_and_nothing_else_does():
    text = "".join(f"a.{space}b,{space}{space}" for space in WHITESPACE)
    assert words(text, "en") == ["a.", "b", ","] * len(WHITESPACE)
    assert words("a\u200bb\u200dc\ufeff", "en") == ["a\u200bb\u200dc\ufeff"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_letters_and_digits_of_every_script_pass_the_rules_that_are_left_out(language):
    # Alone, doubled, and at the end of a word: no rule of spaCy's cuts them.
    some = [chr(code) for code in range(0x20000) if chr(code).isalnum()][
        :: 1 if language == "en" else 16
    ]
    for row in (" ".join(some), " ".join(c + c for c in some), " ".join(f"a{c}" for c in some)):
        assert words(row, language) == theirs(row, language)


@pytest.mark.parametrize("text", ["x" * 1_000_000, "é" * 300_000 + ".", "ab-" * 100_000], ids=len)
def test_a_long_text_without_spaces(text):
    assert words(text, "en") == theirs(text, "en")


def test_nothing_depends_on_what_is_remembered(monkeypatch):
    text = f"{material.prose(1)} main(): )) “it's” (e.g.: 5km) "
    expected = words(text * 3, "en")
    monkeypatch.setattr(module, "_CAPACITY", 8)
    fresh = module._Chunks("en")
    for part in (text, text * 3):
        found = fresh.joined_words(part).split("\n")
        assert len(fresh._known) <= len(set(text.split()))
    assert found == expected


def test_memory_is_bounded():
    chunks = module._Chunks("en")
    size = 1 << 14
    for start in range(0, 20 * size, size):
        chunks.joined_words(" ".join(f"w{i}" for i in range(start, start + size)))
        assert len(chunks._known) <= module._CAPACITY
        assert len(chunks._known._before) <= module._CAPACITY
    assert 20 * size > 2 * module._CAPACITY


def test_documents_are_remembered_up_to_a_number_of_characters(monkeypatch):
    monkeypatch.setattr(module, "_DOCUMENTS", 1000)
    documents = module._Documents()
    texts = [f"{'word ' * 50}{number}" for number in range(20)]
    for text in [*texts, "x" * 2000, *texts]:
        assert documents.joined_words(text, "en") == joined_words(text, "en")
        assert sum(len(text) for text, _ in documents._known) == documents._characters <= 1000


def test_other_languages_are_cut_by_spacy_and_unknown_ones_are_refused():
    text = "Dat is m.a.w. z'n auto, van 's morgens."
    assert words(text, "nl") == theirs(text, "nl")
    with pytest.raises(SmoljaxError, match="no rules for the words of language 'qq'"):
        words(text, "qq")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.text(st.sampled_from([*"aé1.,—’日。\x7f!\u200b①"]), min_size=1, max_size=6), max_size=20
    )
)
def test_counts_equal_the_definition(tokens):
    solid = [token for token in tokens if any(c not in SYMBOLS for c in token)]
    assert word_counts.count("\n".join(tokens)) == (
        len(tokens),
        sum(any(map(str.isalpha, token)) for token in tokens),
        len(solid),
        sum(map(len, solid)),
    )


def test_words_joined_by_line_breaks():
    assert joined_words(" a b. ", "de") == "a\nb."
    assert joined_words(" \n", "en") == ""
