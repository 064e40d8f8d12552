"""Program text: data and generated files are taken out."""

import re

from smoljax.curation.filters.check import Checks, Filter, above, below

_GENERATED = re.compile(r"auto-?generated|automatically generated|do not edit", re.IGNORECASE)


@Filter
def code_quality(
    text: str,
    *,
    max_mean_line_length: float = 100.0,
    max_line_length: int = 1000,
    min_alphanumeric: float = 0.25,
) -> Checks:
    """Removes data and generated files among program text (Chen et al. 2021, section 3.1; Kocetkov et al. 2022).

    Reasons: generated (a word of it in the first five lines), long_lines (the mean), long_line (any),
    few_alphanumeric (fraction of characters).
    """
    lines = text.splitlines() or [""]
    yield above("generated", sum(map(bool, map(_GENERATED.search, lines[:5]))), 0)
    yield above("long_lines", sum(map(len, lines)) / len(lines), max_mean_line_length)
    yield above("long_line", max(map(len, lines)), max_line_length)
    yield below(
        "few_alphanumeric", sum(map(str.isalnum, text)) / max(1, len(text)), min_alphanumeric
    )
