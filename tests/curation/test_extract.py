"""Extraction on bytes written here, whose text is known."""

import contextlib
import signal
import subprocess
import sys

import pyarrow as pa
import pytest

from smoljax.curation import chain, extract, pdf, schema
from smoljax.errors import SmoljaxError
from tests.curation import material


def raw(*documents: tuple[str, bytes]) -> pa.RecordBatch:
    rows = [
        {"id": str(i), "source": "s", "path": f"p{i}", "media_type": kind, "content": content}
        for i, (kind, content) in enumerate(documents)
    ]
    return pa.RecordBatch.from_pylist(rows, schema=schema.RAW)


@pytest.mark.parametrize("kind", ["text/plain", "text/x-python"])
def test_text_and_code_pass_unchanged_but_for_line_ends(kind):
    kept, removed = extract.Extractor()(raw((kind, "\ufeffa\r\nb\rc\n  d é\n".encode())))
    assert kept.column("text").to_pylist() == ["a\nb\nc\n  d é\n"]
    assert kept.schema == schema.DOCUMENT
    assert removed.num_rows == 0


def test_damaged_documents_are_removed_with_what_is_known():
    broken = material.pdf([["hello"]])[:200]
    kept, removed = extract.Extractor()(
        raw(
            ("text/plain", b"valid"),
            ("text/plain", b"in\xffvalid"),
            ("application/pdf", b"no PDF at all"),
            ("application/pdf", broken),
            ("application/pdf", material.encrypted_pdf()),
            ("application/pdf", material.pdf([[]])),
            ("text/html", b"<html><body><script>x</script></body></html>"),
        )
    )
    assert kept.column("text").to_pylist() == ["valid"]
    assert removed.schema == schema.REMOVED
    assert removed.column("reason").to_pylist() == [
        "extract:invalid_utf8",
        "extract:unreadable_pdf",
        "extract:unreadable_pdf",
        "extract:encrypted_pdf",
        "extract:no_text",
        "extract:no_text",
    ]
    assert removed.column("path").to_pylist() == ["p1", "p2", "p3", "p4", "p5", "p6"]
    assert removed.column("text")[0].as_py() == "in\ufffdvalid"


def test_pdf_joins_wrapped_lines_and_keeps_paragraphs():
    text = pdf.text(
        material.pdf(
            [
                [
                    "The keeper of the lighthouse walked along the harbour and",
                    "looked for the ship that had been late since the morning.",
                    "A second paragraph begins here and goes on for a while, as",
                    "paragraphs do.",
                ]
            ]
        )
    )
    assert text == (
        "The keeper of the lighthouse walked along the harbour and looked for the ship that had been "
        "late since the morning.\n"
        "A second paragraph begins here and goes on for a while, as paragraphs do.\n"
    )


def test_pdf_makes_broken_words_whole_within_and_across_pages():
    text = pdf.text(
        material.pdf(
            [
                [
                    "The gunners thought the fire too danger-",
                    "ous for the men who stood in the har-",
                ],
                ["bour, and left it."],
            ]
        )
    )
    assert text == (
        "The gunners thought the fire too dangerous for the men who stood in the harbour, and left it.\n"
    )


def test_pdf_keeps_hyphens_before_capitals():
    text = pdf.text(
        material.pdf([["The hospital is named Barnes-", "Jewish after both of its founders."]])
    )
    assert "Barnes-Jewish" in text.replace("- ", "-")


def test_pdf_running_heads_and_page_numbers_go():
    pages = [
        ["Annual report", f"What happened in month {n} is told here.", f"Page {n}"]
        for n in range(1, 7)
    ]
    text = pdf.text(material.pdf(pages))
    assert "Annual report" not in text
    assert "Page" not in text
    for n in range(1, 7):
        assert f"What happened in month {n} is told here." in text


def test_pdf_two_pages_alike_are_no_running_head():
    text = pdf.text(material.pdf([["A title", "One body."], ["A title", "Two body."]]))
    assert text.count("A title") == 2


@pytest.mark.parametrize("html", ["resiliparse", "trafilatura", "fineweb"])
def test_each_extractor_keeps_the_content_and_drops_the_frame(html):
    kept, removed = extract.Extractor(html=html)(
        raw(("text/html", material.page(3).encode()), ("text/html", b"<body></body>"))
    )
    (text,) = kept.column("text").to_pylist()
    for line in material.prose(3).splitlines():
        assert line.strip() in text
    assert "Imprint" not in text
    assert removed.column("reason").to_pylist() == ["extract:no_text"]


def test_pages_beyond_a_bound_are_removed_by_its_name():
    page = material.page(3).encode()
    deep = b"<div>" * 600 + page
    fonts = "".join(f"<p><font size={i}>x" for i in range(2000)).encode()
    batch = raw(*(("text/html", content) for content in (page, page * 3, deep, fonts)))
    _, removed = extract.Extractor(max_tags=page.count(b"<"))(batch)
    assert removed.column("reason").to_pylist() == ["extract:too_many_tags"] * 3
    _, removed = extract.Extractor()(batch)
    assert removed.column("reason").to_pylist() == [
        "extract:too_deep",
        "extract:unclosed_formatting",
    ]
    _, removed = extract.Extractor(html="fineweb")(raw(("text/html", bytes(range(128, 256)))))
    assert removed.column("reason").to_pylist() == ["extract:unknown_encoding"]


def test_wrong_arguments_are_named():
    with pytest.raises(SmoljaxError, match=r"extract.html is 'lynx': there are resiliparse, traf"):
        chain.check("presets.web", {"order": ("extract",), "extract": {"html": "lynx"}})
    with pytest.raises(SmoljaxError, match=r"presets.web.extract has .*'engine'"):
        chain.check("presets.web", {"order": ("extract",), "extract": {"engine": "lynx"}})


def test_a_document_that_runs_away_ends_the_run_by_name(monkeypatch):
    def forever(content):
        while True:
            with contextlib.suppress(Exception):  # As libraries do it.
                sum(range(1000))

    monkeypatch.setattr(pdf, "text", forever)
    batch = raw(("text/plain", b"x"), ("application/pdf", b"y"))
    with pytest.raises(SmoljaxError, match=r"source 's': p1 was not extracted after 0\.2 seconds"):
        extract.Extractor(max_seconds=0.2)(batch)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_resiliparse_does_not_load_trafilatura():
    script = (
        "import sys\nfrom smoljax.curation import extract\n"
        "from tests.curation.test_extract import raw\n"
        "extract.Extractor()(raw(('text/html', b'<p>x')))\n"
        "print({'trafilatura', 'lxml'} & set(sys.modules))\n"
        "sys.modules['trafilatura'] = None\n"
        "extract.Extractor(html='trafilatura')(raw(('text/html', b'<p>x')))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
    assert "'trafilatura', which is not installed" in done.stderr
