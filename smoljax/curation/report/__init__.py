"""The report on a curation: what each threshold takes, and which documents stand on both sides of it.

`write` makes a page (`page`) and the same numbers as JSON (`numbers`) from a finished curation: from the counts of
all its documents, and from a sample of them on which every check of every filter is run to its end (`rules`).
"""

from collections.abc import Callable
from pathlib import Path

from smoljax import files
from smoljax.curation import items
from smoljax.curation.report import inputs, numbers, page

PAGE = "curation_report.html"
NUMBERS = "curation_report.json"


def write(
    workdir: Path | str,
    *,
    directory: str = "",
    count_tokens: Callable[[str], int] | None = None,
) -> Path:
    """Writes WORKDIR/curation_report.html and curation_report.json; the same documents give the same bytes.

    The page is one file without scripts or requests. Texts of documents are untrusted, and escaped.

    Args:
      workdir: of a finished curation.
      directory: of its work items, where it is not WORKDIR/curation.
      count_tokens: of a text; words between spaces are counted without it.

    Returns:
      the page.

    Raises:
      SmoljaxError: there are no documents, or a work item is missing or damaged.
    """
    workdir = Path(workdir)
    manifest = inputs.read_manifest(workdir)
    try:
        presets = inputs.read_presets(workdir, directory or str(workdir / "curation"), manifest)
    finally:
        items.forget_fetched()
    unit = "words" if count_tokens is None else "tokens of the run's tokenizer"
    found = numbers.collect(manifest, presets, count_tokens or _words, unit)
    files.atomic_write_json(workdir / NUMBERS, found)
    title = f"Curation: {workdir.resolve().name}"
    files.atomic_write_text(workdir / PAGE, page.render(found, title))
    return workdir / PAGE


def _words(text: str) -> int:
    return len(text.split())
