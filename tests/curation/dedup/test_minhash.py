"""MinHash: signatures bit for bit datatrove's, the clusters of its four stages, similarities as the theory has them."""

import random
import sys
import unicodedata

import numpy as np
import pytest
import spacy
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("datatrove", reason="the oracle of the tests is not installed")

from smoljax.curation import dedup
from smoljax.curation.dedup import minhash
from tests.curation import corpora
from tests.curation.dedup import oracle

WHITESPACE = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if c.isspace())


def check(texts: list[str], config: minhash.MinHashConfig, language: str) -> None:
    found, valid = minhash.signatures(texts, config, language)
    expected, expected_valid = oracle.signatures(texts, config, language)
    assert (valid == expected_valid).all()
    assert (found == expected).all(), np.flatnonzero((found != expected).any(axis=1))


def test_signatures_of_five_thousand_documents():
    """Of most the first 3,000 characters, which saves the oracle's time; three long ones whole."""
    texts = corpora.texts("en", 5000)
    longest = sorted(texts, key=len)[-40:-37]
    assert min(map(len, longest)) > 100_000
    check([*(text[:3000] for text in texts), *longest], minhash.FINEWEB2, "en")


@pytest.mark.parametrize("preset", ["FINEWEB", "FINEPDFS"])
def test_signatures_of_the_other_presets(preset):
    texts = [text[:4000] for text in corpora.texts("en", 200)]
    check(texts, getattr(minhash, preset), "en")


@pytest.mark.parametrize("language", ["fr", "es", "de", "it", "pt"])
def test_signatures_in_other_languages(language):
    check([text[:4000] for text in corpora.texts(language, 200)], minhash.FINEWEB2, language)


def test_what_lies_behind_the_last_character_is_not_looked_at():
    config = minhash.MinHashConfig(buckets=32, hashes_per_bucket=10, max_characters=1000)
    text = corpora.texts("en", 30)[-1] * 3
    assert len(text) > 2000
    check([text], config, "en")
    signed = [minhash.signatures([t], config)[0] for t in (text, text[:1000], text[:900])]
    assert (signed[0] == signed[1]).all()
    assert not (signed[0] == signed[2]).all()


ODD = [
    "EE. UU.",
    "Ee. Uu.",
    "c'est",
    "don’t",
    "l’été",
    "‘s",
    "z.B.",
    "(ab-cd)",
    "3,5.7",
    "1|2|3",
    "٣٫٥",
    "x²",
    "İstanbul",
    "Straße",
    "ﬁ",
    "e\u0301\u0302",
    "\u0301",
    "#tag",
    "http://a.b/c?d=e",
    "a@b.org",
    "$5",
    "5€",
    "10km",
    "…",
    "—",
    "•",
    "‹›",
    "日本語。",
    "🏳️‍🌈",
    "\u200b",
    "\u200d",
    "\ufeff",
    "\u00ad",
    "\x00",
    "\x1c",
    "\x85",
    "\U00011f50",
    "\ud7ff",
    "Ⅷ",
    "",
]
pieces = st.one_of(
    st.sampled_from(ODD),
    st.sampled_from(WHITESPACE),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
    st.text("abcABC'’.,-:;()!?\"123 \n\u0301", max_size=8),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(pieces, max_size=40).map("".join), st.sampled_from(corpora.LANGUAGES))
@example("", "en")
@example("one two three four", "en")
@example("one two three four five", "en")
@example(" ".join(ODD), "es")
@example(WHITESPACE.join(["a b", "c d", "e f"]), "de")
@example("EE. UU. y la EE. UU. de EE. UU.", "es")
def test_signatures_of_odd_strings(text, language):
    check([text], minhash.FINEWEB2, language)


@pytest.mark.parametrize("language", ["en", "fr", "es", "de", "it", "pt", "ru", "pl"])
def test_signatures_of_special_cases(language):
    """The strings that spaCy's rules name, with a space inside some, alone and with something behind them."""
    cases = list(spacy.blank(language).tokenizer.rules)
    draw = random.Random(0)
    texts = [
        " ".join(draw.choice(cases) + draw.choice(["", ".", "-a", " b"]) for _ in range(30))
        for _ in range(40)
    ]
    check(texts, minhash.FINEWEB2, language)


def test_signatures_of_characters_beside_each_other():
    """Every assigned character between letters, digits and at the end of words, 60 of them in a text."""
    characters = [
        c
        for c in map(chr, range(sys.maxunicode + 1))
        if unicodedata.category(c) not in ("Cn", "Co", "Cs")
    ]
    characters = [c for c in characters if not "\u3400" <= c <= "\u9fff" and c < "\U00020000"]
    random.Random(0).shuffle(characters)
    texts = [
        " ".join(f"a{c}b {c}c d{c} 1{c}2 {c}" for c in characters[start : start + 60])
        for start in range(0, len(characters), 60)
    ]
    check(texts[::4], minhash.FINEWEB2, "en")


@pytest.mark.parametrize(
    "text", ["x" * 1_000_000, "ab1." * 250_000, "é" * 300_000, "\u200b" * 100_000]
)
def test_signatures_of_texts_without_spaces(text):
    check([text], minhash.FINEWEB2, "en")


def test_which_hash_and_which_seed_matter():
    """Negative control: a signature of another preset is another one in every hash."""
    text = corpora.texts("en", 1)[0]
    expected = oracle.signatures([text], minhash.FINEWEB2, "en")[0]
    for wrong in (minhash.FINEWEB, minhash.MinHashConfig(seed=2), minhash.MinHashConfig(ngram=4)):
        assert not (minhash.signatures([text], wrong)[0] == expected).any()


def word(draw: random.Random) -> str:
    return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=10))


def changed(text: str, share: float, draw: random.Random) -> str:
    return " ".join(w if draw.random() > share else word(draw) for w in text.split(" "))


def near_duplicates(count: int) -> list[list[str]]:
    """Of `count` real texts and some changed copies of them, in four shards."""
    draw = random.Random(0)
    texts = []
    for text in corpora.texts("en", count):
        texts.append(text[:1500])
        for _ in range(draw.choice([0, 0, 1, 3])):
            texts.append(changed(texts[-1], draw.choice([0, 0.01, 0.03, 0.06]), draw))
    draw.shuffle(texts)
    return [texts[i::4] for i in range(4)]


def our_edges(shards: list[list[str]], config: minhash.MinHashConfig, folder) -> list[np.ndarray]:
    paths = []
    for number, texts in enumerate(shards):
        path = folder / f"{number}.bin"
        with dedup.SignatureWriter(path, config) as writer:
            writer.add(*minhash.signatures(texts, config))
        paths.append(str(path))
    found = []
    for bucket in range(config.buckets):
        output = folder / f"{bucket}.edges"
        dedup.write_edges(paths, config, bucket=bucket, output=output, memory_bytes=20_000)
        found += list(dedup.read_edges([output]))
    return found


def partition(sizes: np.ndarray, edges: list[np.ndarray], rows: list[int]) -> set[frozenset]:
    """Clusters of more than one document out of the edges, by plain union of sets."""
    cluster_of: dict[int, set[int]] = {}
    for a, b in np.concatenate(edges).tolist():
        joined = cluster_of.get(a, {a}) | cluster_of.get(b, {b})
        cluster_of |= dict.fromkeys(joined, joined)
    found = {frozenset((d >> 32, d & 0xFFFFFFFF) for d in c) for c in cluster_of.values()}
    starts = np.concatenate([[0], np.cumsum(rows)])
    for cluster in found:  # What `cluster_sizes` says of them.
        at = [int(starts[shard]) + row for shard, row in sorted(cluster)]
        assert sizes[at[0]] == len(cluster)
        assert not sizes[at[1:]].any()
    assert (sizes > 1).sum() == len(found)
    return found


@pytest.mark.parametrize("preset", ["FINEWEB", "FINEWEB2"])
def test_clusters_are_those_of_the_four_stages(tmp_path, preset):
    config = getattr(minhash, preset)
    shards = near_duplicates(450 if preset == "FINEWEB2" else 100)
    rows = [len(shard) for shard in shards]
    expected, removed = oracle.clusters(shards, config, tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    edges = our_edges(shards, config, tmp_path / "ours")
    sizes = dedup.cluster_sizes(edges, rows)
    assert partition(sizes, edges, rows) == expected
    assert (sizes == 0).sum() == removed
    assert len(expected) > 30
    assert max(map(len, expected)) >= 4
    # In another order, and in one block, the same.
    random.Random(1).shuffle(edges)
    assert (dedup.cluster_sizes(edges, rows) == sizes).all()
    assert (dedup.cluster_sizes([np.concatenate(edges)[::-1]], rows) == sizes).all()


def test_texts_agree_in_a_bucket_as_often_as_their_similarity_says():
    """Of pairs with Jaccard similarity s, the share of equal hashes is s, and 1 - (1 - s^8)^14 meet in a bucket."""
    draw = random.Random(0)
    config = minhash.FINEWEB2
    texts = [" ".join(word(draw) for _ in range(100)) for _ in range(400)]
    copies = [" ".join([*text.split()[:88], *(word(draw) for _ in range(12))]) for text in texts]

    def shingles(text: str) -> set[tuple]:
        words = text.split()
        return set(zip(*(words[i:] for i in range(5))))

    similarity = np.mean(
        [
            len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))
            for a, b in zip(texts, copies)
        ]
    )
    ours, theirs = (minhash.signatures(t, config)[0].reshape(-1, 14, 8) for t in (texts, copies))
    equal = (ours == theirs).mean()
    # 400 x 112 draws; those of a pair are not independent, hence five standard errors of 400 alone.
    assert abs(equal - similarity) < 5 * np.sqrt(similarity * (1 - similarity) / 400 / 10)
    met = (ours == theirs).all(axis=2).any(axis=1).mean()
    expected = 1 - (1 - similarity**8) ** 14
    assert abs(met - expected) < 5 * np.sqrt(expected * (1 - expected) / 400)
