"""WARC files: the HTML and PDF payloads of response and resource records, and the texts of conversion records (WET).

HTML is found by the rules of datatrove 0.10's WarcReader: the type that the crawler identified, or, where it says
nothing, what the content looks like. Wider than there, on purpose: PDFs, resource records (files that were
archived without a server), and pages without a tag at their beginning whose server calls them HTML.
`Files(..., media_type="text/html")` leaves the PDFs out.

A gzip member holds one record, so a compressed file can be entered anywhere: search the next member whose
content begins with "WARC/". That is also how reading goes on behind a damaged record.
"""

import io
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from fastwarc.warc import ArchiveIterator, WarcRecord, WarcRecordType

from smoljax.curation import media

_TYPES = WarcRecordType.response | WarcRecordType.resource | WarcRecordType.conversion
_MEMBER = b"\x1f\x8b\x08"
_MEDIA_TYPES = {
    "text/html": "text/html",
    "application/xhtml+xml": "text/html",
    "application/pdf": "application/pdf",
    "text/plain": "text/plain",
}
# How a page begins (WHATWG, MIME Sniffing, 7.1).
_HTML = re.compile(
    rb"(\xef\xbb\xbf)?[\t\n\f\r ]*<"
    rb"(!--|(!doctype html|html|head|script|iframe|h1|div|font|table|a|style|title|b|body|br|p)[ >])",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Record:
    """One payload; `offset` is the record's place in the stored file."""

    offset: int
    uri: str
    media_type: str
    content: bytes
    damage: str | None


def records(
    file: BinaryIO, *, start: int, stop: int | None, compressed: bool, max_bytes: int
) -> Iterator[Record]:
    """Yields the payloads of the records that begin in [start, stop).

    Payloads of other media types (images, scripts) are no documents and are passed over. A record that cannot
    be read to its end is yielded with damage "truncated_record"; behind it a compressed file is read on from
    the next gzip member, while an uncompressed one has no safe place to go on.
    """
    position = next_member(file, start) if compressed and start > 0 else start
    while position is not None and (stop is None or position < stop):
        file.seek(position)
        last = position
        try:
            for record in ArchiveIterator(file, parse_http=False):
                last = record.stream_pos
                if stop is not None and last >= stop:
                    return
                if record.record_type & _TYPES:
                    payload = _payload(record, max_bytes)
                    if payload is not None:
                        yield payload
            if last != position or not compressed or record_at(file, position):
                return
        except OSError:
            yield Record(last, "", media.UNKNOWN, b"", "truncated_record")
        if not compressed:
            return
        position = next_member(file, last + 1)


def record_at(file: BinaryIO, position: int) -> bool:
    """Whether a gzip member that begins a WARC record starts at `position`."""
    file.seek(position)
    try:
        return zlib.decompressobj(31).decompress(file.read(512), 5) == b"WARC/"
    except zlib.error:
        return False


def next_member(file: BinaryIO, start: int) -> int | None:
    """Offset of the first gzip member at or after `start` that begins a WARC record, or None."""
    block_bytes = 1 << 20
    base = start
    while True:
        file.seek(base)
        block = file.read(block_bytes)
        at = block.find(_MEMBER)
        while at >= 0:
            if record_at(file, base + at):
                return base + at
            at = block.find(_MEMBER, at + 1)
        if len(block) < block_bytes:
            return None
        base += block_bytes - len(_MEMBER) + 1


def _payload(record: WarcRecord, max_bytes: int) -> Record | None:
    offset, uri = record.stream_pos, record.headers.get("WARC-Target-URI") or ""
    length = record.content_length
    if length > max_bytes:
        return Record(offset, uri, media.UNKNOWN, b"", "too_big")
    block = record.reader.read()
    if len(block) < length:
        return Record(offset, uri, media.UNKNOWN, b"", "truncated_record")
    declared = record.headers.get("Content-Type") or ""
    if declared.startswith("application/http"):
        try:
            declared, block = _unpacked(block)
        except (OSError, ValueError):
            return Record(offset, uri, media.UNKNOWN, b"", "damaged_payload")
    media_type = _media_type(record, declared, block)
    if media_type is None:
        return None
    return Record(offset, uri, media_type, block, None if block else "empty")


def _unpacked(block: bytes) -> tuple[str, bytes]:
    """(Content-Type, payload) of an HTTP response, decompressed and put together.

    A crawler may have done so and left the headers as they were: what does not unpack and begins like a page is one.
    """
    # As an archive of its own: an error in a record ends the reading of the file that it lies in.
    head = b"WARC/1.0\r\nWARC-Type: response\r\nContent-Type: application/http\r\nContent-Length: %d\r\n\r\n"
    archive = ArchiveIterator(io.BytesIO(head % len(block) + block), parse_http=False)
    response = next(archive)
    try:
        response.parse_http(auto_decode="all")
        return response.http_content_type or "", response.reader.read()
    except (OSError, ValueError):
        packed = block.partition(b"\r\n\r\n")[2]
        if _HTML.match(packed):
            return "text/html", packed
        raise


def _media_type(record: WarcRecord, declared: str, content: bytes) -> str | None:
    """Media type of a payload; None for those that are no documents."""
    named = record.headers.get("WARC-Identified-Payload-Type")
    if named is None:
        named = declared
        if record.record_type != WarcRecordType.conversion:
            if _HTML.match(content):
                return "text/html"
            if content.startswith(b"%PDF-"):
                return "application/pdf"
    found = _MEDIA_TYPES.get(named.partition(";")[0].strip().lower())
    if found == "text/plain" and record.record_type == WarcRecordType.response:
        return None
    return found
