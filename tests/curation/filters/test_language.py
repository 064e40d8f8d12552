"""Language identification on sentences whose language is beyond doubt."""

import pyarrow as pa
import pytest

from smoljax.curation import schema
from smoljax.curation.filters import language

SENTENCES = {
    "en": "The keeper of the lighthouse walked along the harbour and looked for the ship.",
    "de": "Der Wärter des Leuchtturms ging am Hafen entlang und suchte nach dem Schiff.",
    "fr": "Le gardien du phare marchait le long du port et cherchait le navire des yeux.",
    "es": "El guardián del faro caminaba por el puerto y buscaba el barco con la mirada.",
    "ja": "灯台守は港に沿って歩き、船を探していました。",
}


def documents(texts: list[str]) -> pa.RecordBatch:
    rows = [
        {"id": str(i), "source": "s", "path": "p", "media_type": "text/plain", "text": text}
        for i, text in enumerate(texts)
    ]
    return pa.RecordBatch.from_pylist(rows, schema=schema.DOCUMENT)


def test_each_language_is_found_and_only_the_wanted_stay():
    batch = documents(list(SENTENCES.values()))
    kept, removed = language(batch, languages=("en", "fr"), min_score=0.5)
    assert kept.column("language").to_pylist() == ["en", "fr"]
    assert removed.column("language").to_pylist() == ["de", "es", "ja"]
    assert set(removed.column("reason").to_pylist()) == {"language:other"}
    everything, _ = language(batch, languages=(), min_score=0.5)
    assert everything.column("language").to_pylist() == list(SENTENCES)


def test_the_score_must_be_above_the_threshold():
    (score,) = (
        language(documents([SENTENCES["en"]]), languages=("en",), min_score=0.0)[0]
        .column("language_score")
        .to_pylist()
    )
    assert 0.5 < score <= 1.0
    kept, removed = language(documents([SENTENCES["en"]]), languages=("en",), min_score=1.0)
    assert kept.num_rows == 0
    assert removed.column("reason").to_pylist() == ["language:low_score"]


@pytest.mark.parametrize("text", ["", " ", "\n\n", "\0", "12 34", "x" * 1_000_000, "\u2028\u2029"])
def test_any_text_gets_a_verdict(text):
    kept, removed = language(documents([text]), languages=("en",), min_score=0.65)
    assert kept.num_rows + removed.num_rows == 1


def test_line_breaks_are_spaces_to_the_model():
    broken = SENTENCES["en"].replace(" ", "\n")
    scores = [
        language(documents([text]), languages=(), min_score=0.0)[0].column("language_score")[0]
        for text in (broken, SENTENCES["en"])
    ]
    assert scores[0] == scores[1]
