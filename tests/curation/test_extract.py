"""Extraction on bytes written here, whose text is known."""

import pyarrow as pa
import pytest

from smoljax.curation import extract, pdf, schema
from tests.curation import material


def raw(*documents: tuple[str, bytes]) -> pa.RecordBatch:
    rows = [
        {"id": str(i), "source": "s", "path": f"p{i}", "media_type": kind, "content": content}
        for i, (kind, content) in enumerate(documents)
    ]
    return pa.RecordBatch.from_pylist(rows, schema=schema.RAW)


def test_html_keeps_the_content_and_drops_the_frame():
    text = extract.html_text(material.page(7).encode())
    assert text.startswith("Report 7\n")
    for line in material.prose(7).splitlines():
        assert line.strip() in text
    for debris in ("Home menu", "Imprint", "<"):
        assert debris not in text


def test_html_code_blocks_keep_their_lines():
    page = b"<main><p>Before the code that follows here.</p><pre>if x:\n    return 1\n</pre></main>"
    assert "if x:\n    return 1" in extract.html_text(page)


def test_html_whose_class_names_look_like_debris_is_read_by_its_landmark():
    inside = "".join(f"<p>{material.prose(i)}</p>" for i in range(5))
    page = f"<body><div role=main class='related sidebar'>{inside}</div></body>"
    assert material.prose(3).split("\n")[0].strip() in extract.html_text(page.encode())


def test_html_repeated_captions_become_one():
    captions = "<div>Storm over the harbour</div>" * 14
    page = f"<main>{captions}<p>{material.prose(1)}</p></main>"
    assert extract.html_text(page.encode()).count("Storm over the harbour") == 1


def test_html_in_another_encoding():
    page = "<meta charset=iso-8859-1><main><p>Die Größe der Öfen überrascht.</p></main>"
    assert "Die Größe der Öfen überrascht." in extract.html_text(page.encode("iso-8859-1"))


@pytest.mark.parametrize("kind", ["text/plain", "text/x-python"])
def test_text_and_code_pass_unchanged_but_for_line_ends(kind):
    kept, removed = extract.extract(raw((kind, "\ufeffa\r\nb\rc\n  d é\n".encode())))
    assert kept.column("text").to_pylist() == ["a\nb\nc\n  d é\n"]
    assert kept.schema == schema.DOCUMENT
    assert removed.num_rows == 0


def test_damaged_documents_are_removed_with_what_is_known():
    broken = material.pdf([["hello"]])[:200]
    kept, removed = extract.extract(
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
