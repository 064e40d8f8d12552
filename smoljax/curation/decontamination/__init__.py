"""Documents that share a run of words with an evaluation set are removed, since they would be scored from memory.

A run of 13 words, in lower case and without punctuation, as GPT-3 looked for them (Brown et al. 2020, appendix C);
one hit removes the document, as in datatrove, and not only the 200 characters on both sides of it. With 12 words and
the question as context the decisions are those of datatrove 0.10's NGramsDecontFilter at its defaults.
"""

import pyarrow as pa

from smoljax.curation import schema
from smoljax.curation.decontamination.evaluation_sets import (
    EvaluationSet,
    evaluation_sets,
    fingerprint,
)
from smoljax.curation.decontamination.index import Index, build

__all__ = ["Decontamination", "EvaluationSet", "Index", "build", "evaluation_sets", "fingerprint"]


class Decontamination:
    """A stage that removes documents which share an n-gram with an evaluation item: decontamination:SET.

    SET is of the first such n-gram in the text; where several sets have it, of the first of them in the config.

    Args:
      index: folder of the index of the sets' n-grams.
    """

    def __init__(self, *, index: str):
        self._index = Index(index)

    def __call__(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, pa.RecordBatch]:
        found = map(self._index.first, batch.column("text").to_pylist())
        return schema.part(batch, [name and f"decontamination:{name}" for name in found])
