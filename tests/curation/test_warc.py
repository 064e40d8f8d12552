"""Payloads of WARC files: document by document those of datatrove's reader, and the ones that are ours alone."""

import gzip
import io
import zlib

import pytest
from fastwarc.warc import WarcRecord, WarcRecordType

from smoljax.curation import readers, sources
from smoljax.curation.html import characters
from smoljax.curation.html.bounds import DamagedPage
from tests.curation import material

PAGE = material.page(1)
HTML = PAGE.encode()
# Accents of which no byte is UTF-8.
GERMAN = PAGE.replace("winter", "Größe der Öfen, Wärme").replace("river", "Fluß über Brücken")
PDF = material.pdf([["A line of text."]])
TYPE = b"Content-Type: text/html"


def record(
    body: bytes,
    head: bytes = TYPE,
    *,
    kind: WarcRecordType = WarcRecordType.response,
    content_type: str = "application/http; msgtype=response",
    identified: str | None = "text/html",
    url: str = "https://example.org/a",
) -> bytes:
    made = WarcRecord()
    made.init_headers(kind)
    made.headers["WARC-Record-ID"] = "<urn:uuid:00000000-0000-0000-0000-000000000000>"
    made.headers["WARC-Date"] = "2026-01-01T00:00:00Z"
    made.headers["WARC-Target-URI"] = url
    made.headers["Content-Type"] = content_type
    if identified is not None:
        made.headers["WARC-Identified-Payload-Type"] = identified
    http = content_type.startswith("application/http")
    made.set_bytes_content(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n" + body if http else body)
    buffer = io.BytesIO()
    made.write(buffer)
    return buffer.getvalue()


def chunked(body: bytes) -> bytes:
    parts = [body[i : i + 100] for i in range(0, len(body), 100)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


ENCODING = TYPE + b"\r\nContent-Encoding: "
CHUNKED = TYPE + b"\r\nTransfer-Encoding: chunked"
WET = {"kind": WarcRecordType.conversion, "content_type": "text/plain", "identified": None}
SAME = {
    "page": record(HTML),
    "xhtml": record(HTML, b"Content-Type: application/xhtml+xml", identified="application/xhtml+xml"),
    "server says plain text": record(HTML, b"Content-Type: text/plain"),
    "server says nothing": record(HTML, b"X: y"),
    "server says another encoding": record(HTML, TYPE + b"; charset=iso-8859-1"),
    "identified as an image": record(HTML, identified="image/png"),
    "identified as plain text": record(b"Words.", identified="text/plain"),
    "not identified": record(HTML, identified=None),
    "not identified, server says nothing": record(HTML, b"X: y", identified=None),
    "not identified, spaces first": record(b" \n\n" + HTML, identified=None),
    "not identified, server says an image": record(HTML, b"Content-Type: image/gif", identified=None),
    "image": record(b"GIF89a\0\0\1", b"Content-Type: image/gif", identified=None),
    "text": record(b"Words in a row.", b"Content-Type: text/plain", identified=None),
    "latin-1": record(GERMAN.encode("latin-1"), TYPE + b"; charset=iso-8859-1"),
    "latin-1, called UTF-8": record(GERMAN.encode("latin-1"), TYPE + b"; charset=utf-8"),
    "windows-1251": record(("<p>" + "Смотритель маяка шёл вдоль гавани. " * 9).encode("cp1251")),
    "byte order mark": record(b"\xef\xbb\xbf" + HTML),
    "no encoding": record(b"<p>" + bytes(range(128, 256)) * 3),
    "gzip": record(gzip.compress(HTML), ENCODING + b"gzip"),
    "deflate": record(zlib.compress(HTML), ENCODING + b"deflate"),
    "gzip in chunks": record(chunked(gzip.compress(HTML)), CHUNKED + b"\r\nContent-Encoding: gzip"),
    "chunks": record(chunked(HTML), CHUNKED),
    "gzip, unpacked by the crawler": record(HTML, ENCODING + b"gzip"),
    "gzip, cut": record(gzip.compress(HTML)[:-50], ENCODING + b"gzip"),
    "chunks, unpacked by the crawler": record(HTML, CHUNKED),
    "unknown packing, unpacked by the crawler": record(HTML, ENCODING + b"x-foo"),
    "request": record(HTML, kind=WarcRecordType.request),
    "metadata": record(b"a: b", kind=WarcRecordType.metadata, content_type="application/warc-fields"),
    "text of a page": record("Größe, and more words.".encode(), **WET),
    "text of a page, identified": record(b"Words.", **(WET | {"identified": "text/plain"})),
}  # fmt: skip
OURS = {
    "PDF": (record(PDF, b"Content-Type: application/pdf", identified="application/pdf"), PDF),
    "PDF, not identified": (record(PDF, identified=None), PDF),
    "resource": (record(HTML, kind=WarcRecordType.resource, content_type="text/html"), HTML),
    "no tag, but the server says HTML": (record(b"Words in a row.", identified=None), b"Words in a row."),
}  # fmt: skip


def ours(records: bytes, folder, name="a.warc", **arguments):
    """([(url, media type, content)], [reason])."""
    (folder / name).write_bytes(records)
    good, damaged = [], []
    (shard,) = sources.shards(
        [sources.Files("s", str(folder / name), "fast", **arguments)], 1 << 30
    )
    for raw, removed in readers.read(shard, max_document_bytes=1 << 20):
        good += [(r["url"], r["media_type"], r["content"]) for r in raw.to_pylist()]
        damaged += removed.column("reason").to_pylist()
    return good, damaged


@pytest.mark.parametrize("name", [*SAME, *OURS])
def test_payloads_are_those_of_datatrove(name, tmp_path):
    pytest.importorskip("magic", reason="libmagic is not installed", exc_type=ImportError)
    from datatrove.pipeline.readers.warc import process_record
    from warcio.archiveiterator import ArchiveIterator

    data = SAME.get(name) or OURS[name][0]
    theirs = [process_record(found) for found in ArchiveIterator(io.BytesIO(data))]
    expected = [(found["url"], found["text"]) for found in theirs if found]
    good, damaged = ours(data, tmp_path)
    assert damaged == []
    if name in OURS:
        assert expected == []
        assert [content for *_, content in good] == [OURS[name][1]]
        return
    found = []
    for url, media_type, content in good:
        assert media_type in ("text/html", "text/plain")
        try:
            found.append((url, characters.guessed(content)))
        except DamagedPage:  # Which the stage "extract" removes.
            assert name == "no encoding"
    assert found == expected


def test_pdfs_are_left_out_where_the_source_is_of_html(tmp_path):
    data = record(HTML) + OURS["PDF"][0] + record(HTML)
    good, damaged = ours(data, tmp_path, media_type="text/html")
    assert [(kind, content) for _, kind, content in good] == [("text/html", HTML)] * 2
    assert damaged == []
    assert len(ours(data, tmp_path)[0]) == 3


@pytest.mark.parametrize(
    "packed",
    [
        record(b"\x1f\x8b\x08 no more of it", ENCODING + b"gzip"),
        record(b"\x8b\x03\x80", ENCODING + b"br"),
        record(chunked(HTML)[:120], CHUNKED),
    ],
    ids=["gzip", "brotli", "chunks"],
)
def test_payloads_that_do_not_unpack_are_named_and_the_next_is_read(packed, tmp_path):
    good, damaged = ours(packed + record(HTML), tmp_path)
    assert damaged == ["read:damaged_payload"]
    assert [content for *_, content in good] == [HTML]


def test_the_record_behind_headers_that_lie_is_read(tmp_path):
    good, damaged = ours(record(HTML, ENCODING + b"gzip") + record(b"<p>next"), tmp_path)
    assert ([content for *_, content in good], damaged) == ([HTML, b"<p>next"], [])


def test_brotli_and_zstandard_are_unpacked(tmp_path):
    brotli = pytest.importorskip("brotli")
    zstandard = pytest.importorskip("zstandard")
    packed = {b"br": brotli.compress(HTML), b"zstd": zstandard.compress(HTML)}
    data = b"".join(record(body, ENCODING + name) for name, body in packed.items())
    assert [content for *_, content in ours(data, tmp_path)[0]] == [HTML, HTML]


@pytest.mark.parametrize("name", ["a.warc.wet.gz", "a.warc.wet"])
def test_wet_files_hold_text(name, tmp_path):
    data = [record(f"Text {i}.".encode(), url=f"https://example.org/{i}", **WET) for i in range(3)]
    packed = b"".join(gzip.compress(d, mtime=0) if name.endswith("gz") else d for d in data)
    good, damaged = ours(packed, tmp_path, name)
    assert good == [
        (f"https://example.org/{i}", "text/plain", f"Text {i}.".encode()) for i in range(3)
    ]
    assert damaged == []


def test_a_page_that_looks_like_a_gzip_member_does_not_confuse_the_cut(tmp_path):
    inner = gzip.compress(
        record(HTML), mtime=0
    )  # A whole record, as it stands in a compressed file.
    pages = [HTML, b"<p>" + inner, HTML]
    data = b"".join(record(page) for page in pages)
    stored = b"".join(gzip.compress(d, 0, mtime=0) for d in (record(page) for page in pages))
    assert [c for *_, c in ours(data, tmp_path)[0]] == pages
    assert [c for *_, c in ours(stored, tmp_path, "b.warc.gz")[0]] == pages
