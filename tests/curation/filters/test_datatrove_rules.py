"""Decisions, reasons and texts are datatrove's in five more languages, for each rule, and on strings of the rules' parts.

About 45 s of one core, nearly all of it for datatrove.
"""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from smoljax.curation import presets
from tests.curation import corpora, material
from tests.curation.filters import oracle

SIZE = 2000

PROSE = "\n".join(
    f"{line} That is number {i}." for i, line in enumerate(material.prose(1).splitlines())
)
SENTENCE = "The keeper of the lighthouse and the captain have a plan to be with the crew of the other ship today."
SHORT = [f"{a}{b} to {c}" for a in "bcdfg" for b in "aeiou" for c in ("be", "go")]

# Texts that one rule or another removes, and some at the very threshold.
PLANTED = [
    "",
    " ",
    "\n\n",
    PROSE,
    *("\n\n".join([f"Paragraph {i} of it." for i in range(7)] + ["Again."] * n) for n in (3, 4, 5)),
    "\n\n".join([f"{i}" for i in range(9)] + [SENTENCE] * 2),
    *("\n".join([f"Line {i} of the text." for i in range(7)] + ["Again."] * n) for n in (3, 4, 5)),
    "\n".join([f"{i}" for i in range(9)] + [SENTENCE] * 2),
    *(" ".join(f"{gram} w{i}" for i in range(20)) for gram in ("ab cd", "ab cd ef", "ab cd ef gh")),
    *(
        f"{PROSE} " + " ".join(" ".join(f"word{i}" for i in range(n)) + f" x{i}" for i in range(9))
        for n in range(5, 13)
    ),
    *(" ".join(["the and of words that have"] * n) for n in (8, 9)),
    " ".join(SHORT),
    " ".join(f"extraordinary{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(90)) + " the and",
    f"{PROSE} " + "# " * 40,
    f"{PROSE} " + "... " * 40,
    "\n".join(f"- {SENTENCE} {i}." for i in range(12)),
    "\n".join([f"{SENTENCE} {i}..." for i in range(4)] + [f"{SENTENCE} {i}." for i in range(9)]),
    f"{PROSE} " + " ".join(map(str, range(90))),
    " ".join(f"Word{chr(97 + i % 26)}{chr(97 + i // 26)} here" for i in range(60)),
    f"{PROSE}\nLorem ipsum dolor sit amet.\nand {{ so on",
    f"{PROSE}\nand {{ so on\nLorem Ipsum dolor sit amet.",
    f"{PROSE}\nlorem ipsum\n{{\nPlease enable JavaScript to see it.\nWe use cookies on this page.",
    f"{PROSE}\n" + "x" * 1001 + " is too long a word.\n" + "x" * 1000 + " is not too long.",
    f"{PROSE} [1] [12][edit]\n[1] [2] [3]\nThat is so [citation needed].\n[] is [a] b.",
    "\n".join(f"{SENTENCE}" for _ in range(4)),
    "One is here. Two are here! Three? Four are in it: five.",
    "\n".join(f"{SENTENCE} and {i}" + "." * (i < 2) for i in range(16)),
    "\n".join([f"{SENTENCE} {i}." for i in range(3)] + [f"A line {i}." for i in range(7)]),
    "\n".join([f"{SENTENCE} {i}." for i in range(200)] + [f"{SENTENCE} 0."] * 3),
    "\n".join(f"onelongwordinthislinewithoutany{i} spaces." for i in range(30)),
]

# Rules in another order, so that those are seen which others hide, and narrow bounds.
NARROW = [
    {
        "gopher_repetition": {
            "max_duplicate_paragraphs": None,
            "max_duplicate_lines": None,
            "max_top_ngrams": ((4, 0.16), (3, 0.18)),
            "max_duplicate_ngrams": tuple((n, 0.02) for n in range(10, 4, -1)),
        },
        "gopher_quality": {
            "max_words": 150,
            "min_mean_word_length": 4.2,
            "max_mean_word_length": 4.8,
        },
        "c4": {"terminal_lines": True, "min_sentences": 3, "min_words_per_line": 6},
        "fineweb": {
            "min_terminal_lines": 0.5,
            "keep_without_terminals": True,
            "max_short_lines": None,
        },
    },
    {
        "gopher_repetition": {
            "max_duplicate_paragraph_characters": None,
            "max_duplicate_line_characters": None,
            "max_duplicate_lines": 0.05,
            "max_top_ngrams": ((3, 0.05),),
            "max_duplicate_ngrams": ((7, 0.01), (6, 0.02)),
        },
        "gopher_quality": {
            "min_words": 10,
            "max_hash_ratio": 0.002,
            "max_ellipsis_ratio": 0.002,
            "max_bullet_lines": 0.05,
            "max_ellipsis_lines": 0.01,
            "min_alphabetic_words": 0.5,
            "min_stop_words": 5,
        },
        "c4": {"terminal_lines": False, "max_word_length": 12, "min_sentences": 20},
        "fineweb": {
            "min_terminal_lines": None,
            "max_short_lines": 0.4,
            "short_line_characters": 60,
            "max_duplicate_line_characters": 0.1,
            "max_newlines_per_word": 0.05,
        },
    },
]


def test_every_rule_decides_somewhere():
    reasons = oracle.assert_same(PLANTED, "en", oracle.FINEWEB)
    for preset in NARROW:
        reasons |= oracle.assert_same(PLANTED, "en", preset)
    every = {f"{name}:{rule}" for name, rules in oracle.REASONS.items() for rule in rules}
    assert every - reasons == set()


@pytest.mark.network
@pytest.mark.parametrize("preset", NARROW, ids=("late", "narrow"))
def test_documents_at_other_bounds(preset):
    texts = [text[:SIZE] for text in corpora.texts("en", 6000)[5000:5300]]
    assert len(oracle.assert_same(texts, "en", preset)) >= 10


@pytest.mark.network
@pytest.mark.parametrize("language", ["fr", "es", "de", "it", "pt"])
def test_five_hundred_documents(language):
    texts = [text[:SIZE] for text in corpora.texts(language, 500)]
    preset = presets.defaults()["fineweb2"]
    own = {
        name: preset.get(name, {}) for name in ("gopher_repetition", "gopher_quality", "fineweb")
    }
    for name, arguments in preset["by_language"][language].items():
        own[name] = {**own[name], **arguments}
    assert len(oracle.assert_same(texts, language, own)) >= 8


PIECES = (
    *(
        "the",
        "and",
        "EE. UU.",
        "EE.",
        "UU.",
        "ab",
        "c",
        "a",
        "bc",
        "don't",
        "l'eau",
        "d'",
        "z.B.",
        "etc.",
        "est-il",
    ),
    *(
        "...",
        "…",
        "#",
        "•",
        "- ",
        "{",
        "[1]",
        "[edit]",
        "lorem ipsum",
        "Javascript",
        "use cookies",
        "\u200b",
        "\ufeff",
    ),
    *(
        ".",
        "!",
        "?",
        ")",
        '"',
        "):",
        ":)",
        "))",
        ":-",
        "(8)",
        "5km",
        "x.y",
        "a/b",
        "www.a.de",
        "é",
        "e\u0301",
        "。",
        "¿",
    ),
    *(
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "\xa0",
        "\u2028",
        "\u2029",
        "\x85",
        "\x1c",
        "\u3000",
        "\x0b",
        "\r\n",
    ),
)
strings = st.lists(st.sampled_from(PIECES), max_size=60).map("".join) | st.text(max_size=80)
LOW = {
    "gopher_quality": {"min_words": 1, "min_stop_words": 1, "min_alphabetic_words": 0.3},
    "c4": {"terminal_lines": False, "min_sentences": 2},
    "fineweb": {"min_terminal_lines": None, "max_short_lines": None},
}


@pytest.mark.parametrize("language", ["en", "fr", "es", "de", "it", "pt"])
@settings(max_examples=100, deadline=None)
@given(texts=st.lists(strings, max_size=3))
@example(texts=["ab c ab c a bc a bc", "a bc ab c"] * 2)
@example(texts=["EE. UU.\nEE.\nUU. EE. UU."])
@example(texts=["main(): ))) x", "Hi.  ) x. y", "NOUN ORTH a."])
def test_strings_of_what_the_rules_look_for(language, texts):
    for preset in (oracle.FINEWEB, LOW):
        oracle.assert_same(texts, language, preset)


@pytest.mark.parametrize("text", ["x" * 1_000_000, "word. " * 20_000, "a\n" * 20_000], ids=len)
def test_large_texts(text):
    oracle.assert_same([text], "en", oracle.FINEWEB)
