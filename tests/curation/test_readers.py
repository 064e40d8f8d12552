"""Readers on real small files, whole, cut into pieces, and damaged."""

import dataclasses
import gzip
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import threading
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoljax.curation import readers, sources, storage
from smoljax.errors import SmoljaxError
from tests.curation import material

MAX = 10 << 20


def read(source: sources.Files, *, shard_bytes: int = 1 << 30, max_document_bytes: int = MAX):
    """([(path, media type, content)], [(path, reason)]) over all shards of a source."""
    good, damaged = [], []
    for shard in sources.shards([source], shard_bytes):
        for raw, removed in readers.read(shard, max_document_bytes=max_document_bytes):
            good += [(r["path"], r["media_type"], r["content"]) for r in raw.to_pylist()]
            damaged += [(r["path"], r["reason"]) for r in removed.to_pylist()]
    return good, damaged


def urls(source: sources.Files) -> list[str | None]:
    """The addresses of all good documents."""
    found = []
    for shard in sources.shards([source], 1 << 30):
        for raw, _ in readers.read(shard, max_document_bytes=MAX):
            found += raw.column("url").to_pylist()
    return found


def files(folder, pattern="**/*", **arguments):
    return sources.Files("s", f"{folder}/{pattern}", "fast", **arguments)


def test_files_by_ending_sorted_by_name(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.html").write_text("<p>hi")
    (tmp_path / "a.py").write_text("x = 1")
    (tmp_path / "c.PDF").write_bytes(b"%PDF")
    good, damaged = read(files(tmp_path))
    assert good == [
        ("a.py", "text/x-python", b"x = 1"),
        ("b/x.html", "text/html", b"<p>hi"),
        ("c.PDF", "application/pdf", b"%PDF"),
    ]
    assert damaged == []


def test_a_folder_is_read_whole_and_exclude_leaves_out(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.txt").write_text("x")
    (tmp_path / "y.txt").write_text("y")
    assert [path for path, *_ in read(sources.Files("s", str(tmp_path), "fast"))[0]] == [
        "b/x.txt",
        "y.txt",
    ]
    source = sources.Files("s", str(tmp_path), "fast", exclude=("b/*",))
    assert [path for path, *_ in read(source)[0]] == ["y.txt"]


def test_damage_in_files_is_named_and_the_rest_is_read(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "picture.xyz").write_bytes(b"?")
    (tmp_path / "big.txt").write_bytes(b"x" * 101)
    (tmp_path / "good.txt").write_bytes(b"x" * 100)
    good, damaged = read(files(tmp_path), max_document_bytes=100)
    assert [path for path, *_ in good] == ["good.txt"]
    assert damaged == [
        ("big.txt", "read:too_big"),
        ("empty.txt", "read:empty"),
        ("picture.xyz", "read:unknown_media_type"),
    ]


def test_missing_path_and_missing_protocol_are_one_clear_error(tmp_path):
    with pytest.raises(SmoljaxError, match=r"no file matches .*nothing/\*\.html"):
        read(files(tmp_path / "nothing", "*.html"))
    with pytest.raises(SmoljaxError, match="cannot open 'nosuch://bucket/x'"):
        read(sources.Files("s", "nosuch://bucket/x", "fast"))


def test_fsspec_urls_read_like_local_files():
    import fsspec

    with fsspec.open("memory://bucket/in/a.txt", "wb") as file:
        file.write(b"hello")
    for pattern in ("memory://bucket/in/*.txt", "memory://bucket/in", "memory://bucket/in/a.txt"):
        good, _ = read(sources.Files("s", pattern, "fast"))
        assert good == [("a.txt", "text/plain", b"hello")]


def test_warc_html_payloads_with_their_addresses(tmp_path):
    (tmp_path / "a.warc").write_bytes(b"".join(material.warc_records(["<p>one", "<p>two"])))
    good, damaged = read(files(tmp_path))
    assert [(path.split(" ")[1], kind, content) for path, kind, content in good] == [
        ("https://example.org/0", "text/html", b"<p>one"),
        ("https://example.org/1", "text/html", b"<p>two"),
    ]
    assert damaged == []


def test_warc_payloads_that_are_no_documents_are_passed_over(tmp_path):
    (tmp_path / "a.warc").write_bytes(
        b"".join(material.warc_records(["GIF89a"], content_type="image/gif"))
    )
    assert read(files(tmp_path)) == ([], [])


@pytest.mark.parametrize("shard_bytes", [100, 333, 1000, 5000, 1 << 30])
def test_warc_gz_cut_anywhere_gives_every_record_once(tmp_path, shard_bytes):
    pages = [material.page(i) for i in range(12)]
    data = material.warc_gz(pages)
    (tmp_path / "a.warc.gz").write_bytes(data)
    good, damaged = read(files(tmp_path), shard_bytes=shard_bytes)
    assert damaged == []
    assert [content.decode() for *_, content in good] == pages
    offsets = [int(path.partition("#")[2].split(" ")[0]) for path, *_ in good]
    assert offsets == material.members(data)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("lost", [1, 50, 300])
def test_truncated_warc_keeps_the_whole_records_and_names_the_cut_one(tmp_path, compressed, lost):
    pages = [material.page(i) for i in range(3)]
    data = material.warc_gz(pages) if compressed else b"".join(material.warc_records(pages))
    data = data.rstrip(b"\r\n") if not compressed else data  # The end of a record is not content.
    name = "a.warc.gz" if compressed else "a.warc"
    (tmp_path / name).write_bytes(data[:-lost])
    good, damaged = read(files(tmp_path))
    assert [content.decode() for *_, content in good][:2] == pages[:2]
    if (
        len(good) == 3
    ):  # Only the checksum behind the last record is missing: nothing of it is lost.
        assert compressed
        assert lost < 50
        assert good[2][2].decode() == pages[2]
    else:
        assert [reason for _, reason in damaged] == ["read:truncated_record"]
        assert damaged[0][0].startswith(f"{name}#")


def test_reading_goes_on_behind_a_damaged_gzip_member(tmp_path):
    pages = [material.page(i) for i in range(5)]
    data = bytearray(material.warc_gz(pages))
    start, end = material.members(bytes(data))[2:4]
    data[start + 40 : end - 20] = b"\xff" * (end - 20 - start - 40)
    (tmp_path / "a.warc.gz").write_bytes(data)
    good, damaged = read(files(tmp_path))
    assert [content.decode() for *_, content in good] == [*pages[:2], *pages[3:]]
    assert "read:truncated_record" in [reason for _, reason in damaged]


JSON_ROWS = [{"text": f"text {i} é"} for i in range(50)]


@pytest.mark.parametrize("shard_bytes", [7, 60, 1 << 30])
def test_jsonl_cut_anywhere_gives_every_line_once(tmp_path, shard_bytes):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in JSON_ROWS)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    good, damaged = read(files(tmp_path), shard_bytes=shard_bytes)
    assert [content.decode() for *_, content in good] == [row["text"] for row in JSON_ROWS]
    assert damaged == []
    assert len({path for path, *_ in good}) == len(good)


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_compressed_jsonl(tmp_path, ending):
    lines = "".join(json.dumps(row) + "\n" for row in JSON_ROWS).encode()
    path = tmp_path / f"a.jsonl.{ending}"
    if ending == "gz":
        path.write_bytes(gzip.compress(lines))
    else:
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(lines)
    good, damaged = read(files(tmp_path))
    assert [content.decode() for *_, content in good] == [row["text"] for row in JSON_ROWS]
    assert damaged == []
    path.write_bytes(path.read_bytes()[:-20])
    good, damaged = read(files(tmp_path))
    assert damaged == [(path.name, "read:truncated_stream")]


def test_bad_json_lines_are_named_one_by_one(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "good"}\n{"text": \n{"other": 1}\n[1]\n{"text": "\\ud800"}\n{"text": "\xff"}\n\n'
    )
    good, damaged = read(files(tmp_path))
    assert [content for *_, content in good] == [b"good"]
    assert [reason for _, reason in damaged] == [
        "read:invalid_json",
        "read:no_text_field",
        "read:no_text_field",
        "read:invalid_unicode",
        "read:invalid_utf8",
    ]


@pytest.mark.parametrize("shard_bytes", [1, 1 << 30])
def test_parquet_by_row_groups(tmp_path, shard_bytes):
    table = pa.table({"body": [f"row {i}" for i in range(30)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    source = files(tmp_path, text_field="body")
    assert len(sources.shards([source], shard_bytes)) == (5 if shard_bytes == 1 else 1)
    good, _ = read(source, shard_bytes=shard_bytes)
    assert [content.decode() for *_, content in good] == table["body"].to_pylist()
    assert len({path for path, *_ in good}) == 30


def test_parquet_without_the_column_and_damaged_parquet(tmp_path):
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(SmoljaxError, match="no column 'text': it has body"):
        read(files(tmp_path))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 this is none")
    assert read(files(tmp_path)) == ([], [("a.parquet", "read:unreadable_parquet")])


def test_archives_give_their_members(tmp_path):
    (tmp_path / "x.txt").write_text("in the archive")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "x.txt", "d/x.txt")
        archive.writestr("y.bin", b"?")
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "x.txt", "d/x.txt")
    (tmp_path / "x.txt").unlink()
    good, damaged = read(files(tmp_path))
    assert good == [
        ("a.zip/d/x.txt", "text/plain", b"in the archive"),
        ("b.tar.gz/d/x.txt", "text/plain", b"in the archive"),
    ]
    assert damaged == [("a.zip/y.bin", "read:unknown_media_type")]


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
def test_unreadable_archives(tmp_path, name):
    (tmp_path / name).write_bytes(b"this is no archive at all" * 50)
    assert read(files(tmp_path)) == ([], [(name, "read:unreadable_archive")])


def test_ids_depend_on_source_and_path_alone(tmp_path):
    assert readers.document_id("s", "a") == readers.document_id("s", "a")
    ids = {readers.document_id(*pair) for pair in (("s", "a"), ("s", "b"), ("t", "a"), ("sa", ""))}
    assert len(ids) == 4


def test_two_sources_of_one_name_are_refused(tmp_path):
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(SmoljaxError, match="two sources are named 's'"):
        sources.shards([files(tmp_path), files(tmp_path)], 100)


def test_shards_hold_bounded_bytes(tmp_path):
    for i in range(20):
        (tmp_path / f"{i:02d}.txt").write_bytes(b"x" * 100)
    shards = sources.shards([files(tmp_path)], 250)
    assert [sum(piece.size for piece in shard.pieces) for shard in shards] == [200] * 10


def test_rows_keep_the_address_that_they_have(tmp_path):
    rows = [{"text": "a", "url": "http://a.org"}, {"text": "b"}, {"text": "c", "url": 3}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert urls(files(tmp_path, "a.jsonl")) == ["http://a.org", None, None]
    table = pa.table({"link": ["http://b.org", None], "text": ["a", "b"]})
    pq.write_table(table, tmp_path / "b.parquet")
    assert urls(files(tmp_path, "b.parquet", url_field="link")) == ["http://b.org", None]
    assert urls(files(tmp_path, "b.parquet")) == [None, None]


def jsonl(folder, rows: list[str]):
    (folder / "a.jsonl").write_bytes("".join(rows).encode())


def warc(folder, rows: list[str]):
    (folder / "a.warc.gz").write_bytes(material.warc_gz([f"<p>{row}" for row in rows]))


def parquet(folder, rows: list[str]):
    pq.write_table(pa.table({"text": rows}), folder / "a.parquet", row_group_size=3)


LINES = st.sampled_from(
    ['{"text": "é"}\n', '{"text": "x y"}\r\n', "\n", '{"text": ""}\n', "{bad\n"]
)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([jsonl, warc, parquet]),
    st.lists(LINES, max_size=12),
    st.booleans(),
    st.integers(1, 700),
)
def test_every_cut_gives_the_documents_of_the_whole_in_order(write, rows, ends, shard_bytes):
    rows = rows if ends or not rows else [*rows[:-1], rows[-1].rstrip("\n")]
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), rows or ["\n"])
        whole = read(sources.Files("s", folder, "fast"))
        cut = read(sources.Files("s", folder, "fast"), shard_bytes=shard_bytes)
        assert cut == whole
        if write is not jsonl:
            assert len(whole[0]) + len(whole[1]) == len(rows or ["\n"])


@pytest.mark.parametrize("write", [jsonl, warc, parquet])
def test_each_single_cut_of_a_file(write, tmp_path):
    write(tmp_path, ['{"text": "one"}\n', "\n", '{"text": "two é"}\n', '{"text": "three"}\n'])
    (file,) = tmp_path.iterdir()
    source = sources.Files("s", str(tmp_path), "fast")
    whole = read(source)
    assert len(whole[0]) >= 3
    for shard_bytes in range(1, min(400, file.stat().st_size) + 1):
        assert read(source, shard_bytes=shard_bytes) == whole


def test_a_reader_that_enters_blindly_would_be_found_out(tmp_path):
    """The negative control: without the rule whose line it is, a cut gives other documents."""
    jsonl(tmp_path, ['{"text": "one"}\n', '{"text": "two"}\n'])
    (shard,) = sources.shards([sources.Files("s", str(tmp_path), "fast")], 1 << 30)
    (piece,) = shard.pieces
    halves = [dataclasses.replace(piece, start=a, stop=b) for a, b in ((0, 20), (20, None))]
    found = [list(readers.READERS["jsonl"](half, MAX)) for half in halves]
    assert [len(half) for half in found] == [2, 0]
    blind = (tmp_path / "a.jsonl").read_bytes()[20:].splitlines()
    assert len(blind) == 1


DAMAGED = {
    "a.html": (b"\xff\xfe\0", None),
    "a.jsonl.gz": (gzip.compress(b'{"text": "x"}\n')[:-12], "read:truncated_stream"),
    "b.jsonl.gz": (b"this is no gzip", "read:truncated_stream"),
    "b.jsonl.zst": (b"this is no zstd", "read:truncated_stream"),
    "b.parquet": (b"PAR1" + bytes(100) + b"PAR1", "read:unreadable_parquet"),
    "b.tar": (b"no tar" * 200, "read:unreadable_archive"),
    "b.warc": (material.warc_records(["<p>x"])[0][:-20], "read:truncated_record"),
    "b.warc.gz": (material.warc_gz(["<p>x" * 99])[:-40], "read:truncated_record"),
    "b.zip": (b"PK" + bytes(90), "read:unreadable_archive"),
}


def test_damage_in_every_format_is_named_and_ends_nothing_else(tmp_path):
    for name, (content, _) in DAMAGED.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "z.txt").write_text("good")
    for shard_bytes in (50, 1 << 30):
        good, damaged = read(files(tmp_path), shard_bytes=shard_bytes)
        assert [path for path, *_ in good] == ["a.html", "z.txt"]
        found = [(path.partition("#")[0], reason) for path, reason in damaged]
        assert sorted(set(found)) == sorted((n, r) for n, (_, r) in DAMAGED.items() if r)


@pytest.fixture
def web(tmp_path):
    """A web server of this process that serves parts of files, as archives' servers do."""

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            if self.path == "/unsized":
                self.send_response(200)
                return self.end_headers()
            return super().do_HEAD()

        def do_GET(self):
            if self.path == "/unsized":
                return self.do_HEAD()
            path = Path(self.translate_path(self.path))
            if "Range" not in self.headers or not path.is_file():
                return super().do_GET()
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            content = path.read_bytes()
            part = content[int(first) : int(last) + 1]
            self.send_response(206)
            self.send_header("Content-Length", str(len(part)))
            place = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
            self.send_header("Content-Range", place)
            self.end_headers()
            self.wfile.write(part)

        def end_headers(self):
            self.send_header("Accept-Ranges", "bytes")
            super().end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_files_on_the_web(tmp_path, web):
    pytest.importorskip("aiohttp")
    pages = [material.page(i) for i in range(6)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.warc.gz").write_bytes(material.warc_gz(pages))
    (tmp_path / "in" / "b.html").write_text(pages[0])
    parquet(tmp_path / "in", pages)
    for name in ("a.warc.gz", "a.parquet"):
        source = sources.Files("s", f"{web}/in/{name}", "fast")
        local = sources.Files("s", str(tmp_path / "in" / name), "fast")
        for shard_bytes in (1000, 1 << 30):
            assert read(source, shard_bytes=shard_bytes) == read(local)
    for pattern in ("/in/", "/in/*"):
        good, damaged = read(sources.Files("s", web + pattern, "fast"))
        assert (good, damaged) == read(sources.Files("s", str(tmp_path / "in"), "fast"))
    assert read(sources.Files("s", f"{web}/in/b.html", "fast"))[0][0][2] == pages[0].encode()
    with pytest.raises(SmoljaxError, match="no file matches"):
        read(sources.Files("s", f"{web}/in/nothing.html", "fast"))
    with pytest.raises(SmoljaxError, match="unsized': the server does not say how large it is"):
        read(sources.Files("s", f"{web}/unsized", "fast"))


@pytest.mark.parametrize(
    ("protocol", "module", "package"),
    [("s3", "s3fs", "s3fs"), ("gs", "gcsfs", r'"smoljax\[gcs\]"'), ("https", "aiohttp", "aiohttp")],
)
def test_a_missing_package_of_a_store_is_named(protocol, module, package):
    script = (
        f"import sys\nsys.modules[{module!r}] = None\nfrom smoljax.curation import storage\n"
        f"storage.list_files('{protocol}://bucket/x')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert re.search(
        rf"cannot open '{protocol}://bucket/x' .*: run `pip install {package}`", done.stderr
    )


def test_a_changed_file_has_another_version():
    import fsspec

    seen = set()
    for content in (b"one", b"two"):
        with fsspec.open("memory://versions/a.txt", "wb") as file:
            file.write(content)
        (found,) = storage.list_files("memory://versions/a.txt")
        seen.add(found.version)
    assert len(seen) == 2
