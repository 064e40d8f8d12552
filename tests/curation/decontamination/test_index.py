"""Which documents the index finds: datatrove's decisions on real text with planted items, and the words decide."""

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smoljax.curation import decontamination, items
from smoljax.curation.decontamination import index as index_module
from smoljax.curation.decontamination.evaluation_sets import Item
from tests.curation import corpora
from tests.curation.decontamination import oracle

WORDS = [f"word{chr(97 + i)}{chr(97 + j)}" for i in range(26) for j in range(4)]


def build(found: list[Item], folder: Path, *, ngram: int) -> decontamination.Index:
    """The index of items, in a finished work item's folder."""

    def work(argument, target):
        return decontamination.build(argument, target, ngram=ngram)

    items.run_item(items.WorkItem("all", "key", work, found, 0, "items"), str(folder))
    return decontamination.Index(str(folder / "all"))


def decision(index: decontamination.Index, text: str) -> str | None:
    """The n-gram for which a text is removed, or None."""
    first = next(index.matches(text), None)
    assert index.first(text) == (first and index.item(first.items[0])[0])
    return first and first.ngram


def sets(index: decontamination.Index, text: str) -> set[str]:
    """The sets that have the n-gram for which a text is removed."""
    first = next(index.matches(text), None)
    return {index.item(number)[0] for number in first.items} if first else set()


def joined(words: list[str]) -> str:
    return " ".join(words)


def questions(texts: list[str]) -> list[Item]:
    """Items out of real documents: a passage as the context, and what follows it."""
    found = []
    for number, text in enumerate(texts):
        words = text.split()
        if len(words) >= 120:
            start = len(words) // 3
            cut = start + 40
            name = ("quiz", "exam")[number % 2]
            own = joined(words[cut : cut + 5 + number % 30])
            found.append(Item(name, f"{name}.jsonl#{number}", joined(words[start:cut]), own))
    return found


def plant(text: str, item: Item, how: int) -> str:
    """A document with an item in it, in one of eight ways; the last four have too little of it."""
    context, own = item.context.split(), item.text.split()
    planted = {
        0: joined(context + own),
        1: joined(context + own).upper().replace(" ", ",\n", 3),
        2: "Q: " + joined(context[-7:] + own[:5]) + " -- so much for that",
        3: joined(own * 3),
        4: joined(context),
        5: joined(context[-11:]) + " zebra " + joined(own[:11]),
        6: joined(own[:4]),
        7: joined(reversed(context + own)),
    }[how]
    words = text.split(" ")
    half = len(words) // 2
    return " ".join([*words[:half], planted, *words[half:]])


def test_decisions_are_datatroves_on_real_documents(tmp_path):
    # Long ones would only take datatrove's time.
    texts = [text for text in corpora.texts("en", 3_000) if len(text) < 4_000]
    found = questions(texts[1_000:1_400])
    draw = random.Random(0)
    documents = [
        plant(text, draw.choice(found), number // 2 % 8) if number % 2 else text
        for number, text in enumerate(texts[:1_000])
    ]
    peer = oracle.filter_of(found, tmp_path / "peer", ngram=12)
    theirs = [oracle.decision(peer, document) for document in documents]
    index = build(found, tmp_path / "ours", ngram=12)
    ours = [decision(index, document) for document in documents]
    assert ours == [decided and decided[1] for decided in theirs]
    # Where both sets have the n-gram, it is chance which of them datatrove names.
    named = [sets(index, document) for document in documents]
    assert all(
        not here if there is None else there[0] in here for there, here in zip(theirs, named)
    )
    removed = sum(decided is not None for decided in theirs)
    assert 250 <= removed < 800, removed
    longer = build(found, tmp_path / "thirteen", ngram=13)
    fewer = [decision(longer, document) is not None for document in documents]
    # Negative control: 12 words that are shared do not fire at 13.
    assert 0 < sum(fewer) < removed
    assert all(there for there, here in zip(theirs, fewer) if here)


PIECES = st.sampled_from(
    ["one", "two", "three", "Two,", "cannot", "don't", "3.14", "3,141", "é", "e\u0301", "\u2019", "\u200b", "EE.",
     "UU.", "\u2028", "\x1c", "\xa0", "...", "中文", "_", "\x00", "İ"]
)  # fmt: skip
TEXTS = st.lists(PIECES, max_size=14).map(" ".join) | st.lists(PIECES, max_size=14).map("".join)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4), st.lists(TEXTS, max_size=6))
def test_decisions_are_datatroves_on_odd_strings(tmp_path_factory, rows, documents):
    folder = tmp_path_factory.mktemp("odd")
    found = [Item("set", str(number), *row) for number, row in enumerate(rows)]
    peer = oracle.filter_of(found, folder / "peer", ngram=3)
    index = build(found, folder / "ours", ngram=3)
    for document in [*documents, *(text for row in rows for text in row), "".join(rows[0])]:
        decided = oracle.decision(peer, document)
        assert decision(index, document) == (decided and decided[1])


def test_twelve_shared_words_do_not_fire_at_thirteen(tmp_path):
    index = build([Item("quiz", "q#0", "", joined(WORDS[:20]))], tmp_path, ngram=13)
    around = WORDS[40:60]
    assert index.first(joined(around + WORDS[3:15] + around)) is None
    assert index.first(joined(around + WORDS[3:16] + around)) == "quiz"


def test_case_numbers_and_punctuation_do_not_hide_an_item(tmp_path):
    item = "In 1912 the ship, which was new, left Queenstown with 2,208 people aboard for a café."
    index = build([Item("quiz", "q#0", "", item)], tmp_path, ngram=13)
    text = "IN 1913 THE SHIP (which was new) left\nQueenstown -- with 7 people aboard; for a cafe!"
    assert index.first(text) == "quiz"


def test_the_context_counts_only_where_it_runs_into_the_answer(tmp_path):
    index = build(
        [Item("quiz", "q#0", joined(WORDS[:30]), joined(WORDS[30:35]))], tmp_path, ngram=13
    )
    assert index.first(joined(WORDS[:30])) is None
    assert index.first(joined(WORDS[:31])) == "quiz"
    assert index.first(joined(WORDS[22:35])) == "quiz"
    assert index.first(joined(WORDS[23:35])) is None


def test_every_item_that_has_an_ngram_is_named(tmp_path):
    stem = WORDS[:15]
    found = [
        Item("a", "a#0", "", joined(WORDS[50:70])),
        Item("b", "b#0", "", joined([*stem, "yes"])),
    ]
    found += [Item("c", "c#0", "", joined([*stem, "no"])), Item("c", "c#1", "", "too short")]
    index = build(found, tmp_path, ngram=13)
    matches = list(index.matches(joined(stem)))
    assert [match.items for match in matches] == [[1, 2]] * 3
    assert matches[0].ngram == joined(stem[:13])
    assert index.first(joined(stem)) == "b"
    assert index.item(2) == ("c", "c#0")


def test_the_counts_say_which_items_are_too_short(tmp_path):
    found = [
        Item("a", "a#0", "", joined(WORDS[:20])),
        Item("a", "a#1", "", "Yes."),
        Item("b", "b#0", "", ""),
    ]
    counts = decontamination.build(found, tmp_path, ngram=13)
    assert counts == {
        "a": {"items": 2, "short": 1, "ngrams": 8},
        "b": {"items": 1, "short": 1, "ngrams": 0},
    }
    assert np.load(tmp_path / "keys.npy").shape == (8,)


@pytest.mark.parametrize("found", [[], [Item("a", "a#0", "", "Yes.")]])
def test_an_index_without_ngrams_finds_nothing(tmp_path, found):
    assert build(found, tmp_path, ngram=13).first(joined(WORDS)) is None


def test_hashes_that_collide_do_not_fire(tmp_path, monkeypatch):
    """With a hash that tells words apart by their length alone, every n-gram of the document is a candidate."""
    monkeypatch.setattr(index_module, "_word_hash", len)
    found = [Item("a", "a#0", "", joined(WORDS[:14])), Item("b", "b#0", "", joined(WORDS[30:44]))]
    index = build(found, tmp_path, ngram=13)
    assert index.first(joined(WORDS[60:90])) is None
    assert index.first(joined(WORDS[30:44])) == "b"  # Behind the candidates of the other item.
    assert index.first(joined([*WORDS[:12], WORDS[12][:-1] + "z"])) is None


def test_a_word_that_goes_on_is_another_word(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "_word_hash", lambda word: 1)
    index = build([Item("a", "a#0", "", joined([*WORDS[:12], "words"]))], tmp_path, ngram=13)
    assert index.first(joined([*WORDS[:12], "word"])) is None
    assert index.first(joined([*WORDS[:12], "words"])) == "a"


def test_a_changed_file_of_the_index_is_named(tmp_path):
    build([Item("a", "a#0", "", joined(WORDS[:14]))], tmp_path, ngram=13)
    path = tmp_path / "all/words.txt"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"words\.txt is damaged"):
        decontamination.Index(str(tmp_path / "all")).first("text")
