"""Raw bytes to text, by media type: HTML main content, PDF pages, and UTF-8 text and code as they are."""

import itertools
import re
from collections.abc import Iterable

import pyarrow as pa
from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import bytes_to_str, detect_encoding
from resiliparse.parse.html import HTMLParserException, HTMLTree

from smoljax.curation import pdf, schema

# What themes put into the page beside its content and main-content extraction leaves in.
_SKIPPED = [
    "script, style, noscript, template, svg, iframe, form, button, select",
    "nav, [role=navigation], [role=search], [aria-hidden=true]",
    "a.headerlink, .toctree-wrapper, .sphinxsidebar, .viewcode-back",
]
# Where a page itself says what its main content is.
_LANDMARKS = "main, [role=main], article"
# Below this share of the landmark's text, the heuristics have thrown the content away with the frame.
_LEAST_SHARE = 0.25
_BLANK_LINES = re.compile(r"\n{3,}")
_CODE = frozenset({"text/javascript", "application/sql"})


class Damaged(ValueError):
    """A document that gives no text; the message is the rule under which it is removed."""


def extract(raw: pa.RecordBatch) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    """RAW batch to (DOCUMENT batch, REMOVED batch).

    Reasons: extract:invalid_utf8, extract:unreadable_html, extract:unreadable_pdf, extract:encrypted_pdf,
    extract:no_text. Text of a removed document is what could be decoded, with U+FFFD for the rest.
    """
    texts, reasons = [], []
    for content, media_type in zip(
        raw.column("content").to_pylist(), raw.column("media_type").to_pylist()
    ):
        reason = None
        try:
            text = _text(content, media_type)
            if not text.strip():
                reason = "extract:no_text"
        except (Damaged, pdf.DamagedPdf) as error:
            reason = f"extract:{error}"
            text = "" if media_type == "application/pdf" else content.decode("utf-8", "replace")
        texts.append(text)
        reasons.append(reason)
    return schema.part(schema.documents(raw, texts), reasons)


def is_code(media_type: str) -> bool:
    """Whether documents of this media type are program text, which has no human language."""
    return (media_type.startswith("text/x-") and media_type != "text/x-rst") or media_type in _CODE


def html_text(content: bytes) -> str:
    """Main content of an HTML page, with paragraphs, lists and code blocks on their own lines.

    Raises:
      Damaged: "unreadable_html", when no parser can make sense of the bytes.
    """
    try:
        page = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        encoding = detect_encoding(content, html5_compatible=True, from_html_meta=True) or "utf-8"
        page = bytes_to_str(content, encoding)
    try:
        tree = HTMLTree.parse(page)
        text = _plain(tree, main_content=True)
        landmark = tree.body and tree.body.query_selector(_LANDMARKS)
        if landmark and len(text) < _LEAST_SHARE * len(landmark.text):
            declared = _plain(HTMLTree.parse(landmark.html), main_content=False)
            if len(text) < _LEAST_SHARE * len(declared):
                text = declared
    except HTMLParserException as error:
        raise Damaged("unreadable_html") from error
    lines = (line.rstrip() for line in text.replace("¶", "").split("\n"))
    text = _BLANK_LINES.sub("\n\n", _without_repeats(lines)).strip("\n")
    return text and text + "\n"


def _without_repeats(page: Iterable[str]) -> str:
    """The lines as text; of a line that stands three times running or more (captions of a slide show), leaves one."""
    lines = []
    for line, run in itertools.groupby(page):
        count = len(list(run))
        lines += [line] * (1 if line and count >= 3 else count)
    return "\n".join(lines)


def _plain(html: HTMLTree, *, main_content: bool) -> str:
    return extract_plain_text(
        html,
        main_content=main_content,
        preserve_formatting=True,
        alt_texts=False,
        skip_elements=_SKIPPED,
    )


def _text(content: bytes, media_type: str) -> str:
    if media_type == "text/html":
        return html_text(content)
    if media_type == "application/pdf":
        return pdf.text(content)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Damaged("invalid_utf8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
