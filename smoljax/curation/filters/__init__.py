"""Quality filters: each maps a RecordBatch with a `text` column to (kept, removed with column "reason").

Thresholds default to the values of the source that each filter names. All comparisons are strict; the first rule
that fails, in the order of the docstring, gives the reason.
"""

from smoljax.curation.filters.c4 import c4
from smoljax.curation.filters.code_quality import code_quality
from smoljax.curation.filters.fineweb import fineweb
from smoljax.curation.filters.gopher_quality import gopher_quality
from smoljax.curation.filters.gopher_repetition import gopher_repetition
from smoljax.curation.filters.language import language
from smoljax.curation.filters.length import length
from smoljax.curation.filters.url import url

__all__ = [
    "c4",
    "code_quality",
    "fineweb",
    "gopher_quality",
    "gopher_repetition",
    "language",
    "length",
    "url",
]
