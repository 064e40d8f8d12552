"""The report on a curation: what each threshold takes, and which documents stand on both sides of it.

`write` makes a page (`page`) and the same numbers as JSON (`numbers`) from a finished curation: from the counts of
all its documents, and from a sample of them on which every check of every filter is run to its end (`rules`).
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from smoljax import files
from smoljax.curation import items
from smoljax.curation.report import inputs, numbers, page

if TYPE_CHECKING:
    from smoljax.tokens.tokenizer import Tokenizer

PAGE = "curation_report.html"
NUMBERS = "curation_report.json"
# Raised when the same documents give another report than before.
VERSION = 1


def write(
    workdir: Path | str, *, directory: str = "", tokenizer: "Tokenizer | None" = None
) -> Path:
    """Writes WORKDIR/curation_report.html and curation_report.json, unless they are up to date.

    The page is one file without scripts or requests. Texts of documents are untrusted, and escaped. The same documents
    give the same bytes.

    Args:
      workdir: of a finished curation.
      directory: of its work items, where it is not WORKDIR/curation.
      tokenizer: counts tokens; without one, words between spaces are counted.

    Returns:
      the page.

    Raises:
      SmoljaxError: there are no documents, or a work item is missing or damaged.
    """
    workdir = Path(workdir)
    manifest = inputs.read_manifest(workdir)
    made_from = items.hash_of(
        VERSION,
        manifest["config_hash"],
        manifest["inputs_hash"],
        tokenizer and tokenizer.fingerprint,
    )
    if (workdir / PAGE).is_file() and _made_from(workdir) == made_from:
        return workdir / PAGE
    try:
        presets = inputs.read_presets(workdir, directory or str(workdir / "curation"), manifest)
    finally:
        items.forget_fetched()
    found = {"made_from": made_from, **numbers.collect(manifest, presets, tokenizer)}
    title = f"Curation: {workdir.resolve().name}"
    files.atomic_write_text(workdir / PAGE, page.render(found, title))
    files.atomic_write_json(workdir / NUMBERS, found)  # Last: it says what the page was made from.
    return workdir / PAGE


def _made_from(workdir: Path) -> str | None:
    try:
        return json.loads((workdir / NUMBERS).read_text(encoding="utf-8")).get("made_from")
    except (OSError, ValueError):
        return None
