"""Small real files that the curation tests write themselves: HTML, PDF, WARC, JSONL, Parquet."""

import gzip
import io
import random
import zlib
from pathlib import Path

from fastwarc.warc import WarcRecord, WarcRecordType

NOUNS = [
    "harbour",
    "keeper",
    "lighthouse",
    "ship",
    "committee",
    "plan",
    "morning",
    "storm",
    "village",
    "road",
    "bridge",
    "letter",
    "winter",
    "garden",
    "engine",
    "captain",
    "river",
    "market",
    "school",
    "doctor",
    "farmer",
    "window",
    "station",
    "teacher",
    "island",
    "forest",
    "valley",
    "machine",
]
VERBS = [
    "watched",
    "built",
    "found",
    "carried",
    "mended",
    "painted",
    "followed",
    "remembered",
    "crossed",
    "measured",
]
PLACES = ["near", "behind", "under", "beyond", "beside", "above", "across", "below"]


def prose(number: int, *, sentences: int = 12) -> str:
    """English that passes every filter, different for each number."""
    draw = random.Random(number).choice
    lines = [
        f"The {draw(NOUNS)} and the {draw(NOUNS)} {draw(VERBS)} that {draw(NOUNS)} {draw(PLACES)} "
        f"a {draw(NOUNS)} with the {draw(NOUNS)} of {draw(NOUNS)} number {number}."
        for _ in range(sentences)
    ]
    return "\n".join(lines) + "\n"


def page(number: int) -> str:
    """An HTML page with a menu and a footer around `prose(number)`."""
    paragraphs = "".join(f"<p>{line}</p>" for line in prose(number).splitlines())
    return (
        "<!doctype html><html><head><title>t</title></head><body><nav><ul><li><a href='/'>Home menu</a>"
        f"</li></ul></nav><main><h1>Report {number}</h1>{paragraphs}</main>"
        "<footer>Imprint and cookies</footer></body></html>"
    )


def pdf(pages: list[list[str]]) -> bytes:
    """A PDF with the given lines on each page, in Helvetica."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", ""]
    kids = []
    for lines in pages:
        drawn = " T* ".join(
            "({}) Tj".format(line.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)"))
            for line in lines
        )
        stream = f"BT /F1 12 Tf 14 TL 50 750 Td {drawn} ET"
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
        content = len(objects)
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {content} 0 R "
            "/Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica "
            "/Encoding /WinAnsiEncoding >> >> >> >>"
        )
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>"
    out = io.BytesIO(b"%PDF-1.4\n")
    out.seek(0, io.SEEK_END)
    offsets = []
    for number, body in enumerate(objects, 1):
        offsets.append(out.tell())
        out.write(f"{number} 0 obj\n{body}\nendobj\n".encode("cp1252"))
    start = out.tell()
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    out.write(
        f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer\n"
        f"<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{start}\n%%EOF\n".encode()
    )
    return out.getvalue()


def encrypted_pdf() -> bytes:
    """A PDF that demands a password: its standard-security keys match no empty one."""
    plain = pdf([["secret"]])
    entry = (
        b"<< /Filter /Standard /V 1 /R 2 /O <" + b"ab" * 32 + b"> /U <" + b"cd" * 32 + b"> /P -4 >>"
    )
    return plain.replace(
        b"/Root 1 0 R >>", b"/Root 1 0 R /ID [<00><00>] /Encrypt " + entry + b" >>"
    )


def warc_records(
    pages: list[str], *, content_type: str = "text/html; charset=utf-8"
) -> list[bytes]:
    """One uncompressed WARC response record per page."""
    records = []
    for number, html in enumerate(pages):
        body = html.encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
        record = WarcRecord()
        record.init_headers(WarcRecordType.response)
        record.headers["WARC-Record-ID"] = f"<urn:uuid:00000000-0000-0000-0000-{number:012d}>"
        record.headers["WARC-Date"] = "2026-01-01T00:00:00Z"
        record.headers["WARC-Target-URI"] = f"https://example.org/{number}"
        record.headers["Content-Type"] = "application/http; msgtype=response"
        record.set_bytes_content(head.encode() + body)
        buffer = io.BytesIO()
        record.write(buffer)
        records.append(buffer.getvalue())
    return records


def warc_gz(pages: list[str]) -> bytes:
    """A compressed WARC, one gzip member per record."""
    return b"".join(gzip.compress(record, mtime=0) for record in warc_records(pages))


def members(data: bytes) -> list[int]:
    """Offsets of the gzip members of `data`."""
    offsets, position = [], 0
    while position < len(data):
        offsets.append(position)
        decoder = zlib.decompressobj(31)
        decoder.decompress(data[position:])
        position = len(data) - len(decoder.unused_data)
    return offsets


def write_recipe(folder: Path, *sources: str) -> str:
    """Writes a recipe with the given `Files(...)` expressions and returns its path."""
    path = folder / "recipe.py"
    path.write_text(
        "from smoljax.curation.sources import Files\n\n"
        f"def sources(workdir):\n    return ({', '.join(sources)},)\n"
    )
    return str(path)
