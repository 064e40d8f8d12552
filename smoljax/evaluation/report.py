"""The report of a run: one HTML file with everything in it, from the raw documents to the model's own words."""

from collections.abc import Sequence
from pathlib import Path

from smoljax import files
from smoljax import report_page as html
from smoljax.evaluation import report_sections as sections
from smoljax.evaluation.report_inputs import read_inputs

REPORT = "report.html"
_NAVIGATION = (
    ("documents", "What went in"),
    ("tokenizer", "Tokenizer and shards"),
    ("training", "Training"),
    ("heldout", "Held-out text"),
    ("samples", "Samples"),
    ("model", "Model"),
    ("repeat", "Repeat it"),
)


def write_report(workdir: Path | str, *, steps: Sequence[dict]) -> Path:
    """Writes WORKDIR/report.html: self-contained, without scripts, legible in light and dark.

    Texts of documents and samples are untrusted: they are escaped, and the page's policy forbids scripts and requests.

    Args:
      workdir: folder of a run whose every step is done.
      steps: {"name", "command", "seconds"} of each step in order; the command repeats the step.

    Returns:
      the file.

    Raises:
      SmoljaxError: an output is missing or damaged (the message names it and the step that makes it), or the extras
        "report" and "data" are not installed.
    """
    workdir = Path(workdir)
    inputs = read_inputs(workdir)
    title = f"smoljax: {workdir.resolve().name}"
    links = (html.Html(f'<a href="#{anchor}">{name}</a>') for anchor, name in _NAVIGATION)
    body = html.join(
        [
            html.tag("h1", title),
            html.paragraph("What went in, what came out, and how to repeat it.", css="faint"),
            html.tag("nav", *links),
            sections.headline(inputs, steps),
            sections.documents(inputs),
            sections.tokenizer(inputs),
            sections.training(inputs),
            sections.heldout(inputs),
            sections.samples(inputs),
            sections.model(inputs),
            sections.repeat(inputs, steps),
        ]
    )
    path = workdir / REPORT
    files.atomic_write_text(path, html.page(title, body))
    return path
