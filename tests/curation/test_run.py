"""The whole of curation on small real files: what is written, bad input, workers, what is kept for the next run."""

import errno
import json
import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from smoljax.configuration import build
from smoljax.curation import (
    CurationConfig,
    curate,
    pipeline,
    presets,
    read_documents,
    schema,
    stage_seconds,
    table,
)
from smoljax.errors import SmoljaxError
from tests.curation import material


@pytest.fixture
def corpus(tmp_path) -> str:
    """A recipe over HTML, PDF, WARC, JSONL and code, with damaged documents and duplicates among them."""
    folder = tmp_path / "in"
    for name in ("html", "pdf", "crawl", "rows", "code"):
        (folder / name).mkdir(parents=True)
    for i in range(30):
        (folder / "html" / f"{i:02d}.html").write_text(material.page(i))
    (folder / "html" / "copy.html").write_text(material.page(3))
    (folder / "html" / "empty.html").touch()
    (folder / "pdf" / "good.pdf").write_bytes(material.pdf([material.prose(90).splitlines()]))
    (folder / "pdf" / "bad.pdf").write_bytes(b"%PDF-1.4 and no more")
    (folder / "pdf" / "locked.pdf").write_bytes(material.encrypted_pdf())
    (folder / "crawl" / "a.warc.gz").write_bytes(
        material.warc_gz([material.page(i) for i in range(25, 45)])[:-60]
    )
    lines = [json.dumps({"text": material.prose(i)}) + "\n" for i in range(60, 80)]
    (folder / "rows" / "a.jsonl").write_text("".join(lines))
    (folder / "code" / "a.py").write_text(
        "def area(width, height):\n    return width * height\n" * 3
    )
    (folder / "code" / "latin.py").write_bytes(b"# caf\xe9\n" * 30)
    return material.write_recipe(
        tmp_path,
        f"Files('html', '{folder}/html/*', 'document')",
        f"Files('pdf', '{folder}/pdf/*', 'document')",
        f"Files('crawl', '{folder}/crawl/*', 'document')",
        f"Files('rows', '{folder}/rows/*', 'document')",
        f"Files('code', '{folder}/code/*', 'code')",
    )


def config(recipe: str, **changes) -> CurationConfig:
    values = {"recipe": recipe, "heldout_fraction": 0.2, "shard_bytes": 12_000} | changes
    return build(CurationConfig, values, "curation")


def tree(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, without the times that the work items took."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in (".lock", "seconds.json"):
            data = path.read_bytes()
            if path.name == "manifest.json":
                data = json.dumps(_without_times(json.loads(data))).encode()
            found[str(path.relative_to(folder))] = data
    return found


def _without_times(value):
    if isinstance(value, dict):
        times = ("seconds", "checksum")  # The second is of the first, among others.
        return {key: _without_times(item) for key, item in value.items() if key not in times}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def test_documents_and_manifest(corpus, tmp_path):
    manifest = curate(config(corpus), tmp_path / "run", workers=1)
    assert json.loads((tmp_path / "run/documents/manifest.json").read_text()) == manifest
    sources = manifest["sources"]
    counted = {
        name: (s["train"]["documents"] + s["heldout"]["documents"], s["removed"])
        for name, s in sources.items()
    }
    # 30 pages, a copy and an empty file; three PDFs; 20 WARC pages of which 5 are duplicates and 1 is cut off;
    # 20 rows; two code files, one of them not UTF-8.
    assert counted == {
        "html": (30, 2),
        "pdf": (1, 2),
        "crawl": (14, 6),
        "rows": (20, 0),
        "code": (1, 1),
    }
    assert sum(s["heldout"]["documents"] for s in sources.values()) > 0
    by_stage = {stage["name"]: stage for stage in manifest["stages"]}
    assert list(by_stage) == [
        "read",
        "extract",
        "length",
        "language",
        "gopher_repetition",
        "gopher_quality",
        "code_quality",
        "dedup",
    ]
    assert by_stage["read"]["removed_by_reason"] == {"read:empty": 1, "read:truncated_record": 1}
    assert by_stage["extract"]["removed_by_reason"] == {
        "extract:encrypted_pdf": 1,
        "extract:invalid_utf8": 1,
        "extract:unreadable_pdf": 1,
    }
    assert by_stage["dedup"]["removed_by_reason"] == {"dedup:exact": 6}
    for stage in manifest["stages"]:
        assert stage["removed"] == sum(stage["removed_by_reason"].values())
    for name, source in sources.items():
        for part, columns in (
            ("train", schema.DOCUMENT),
            ("heldout", schema.DOCUMENT),
            ("removed", schema.REMOVED),
        ):
            files = sorted((tmp_path / "run/documents" / name / part).glob("*.parquet"))
            assert [path.name for path in files] == [f"{i:05d}.parquet" for i in range(len(files))]
            assert pq.read_schema(files[0]).equals(columns)
            rows = [
                row
                for batch in read_documents(tmp_path / "run", name, part=part)
                for row in batch.to_pylist()
            ]
            if part == "removed":
                assert len(rows) == source["removed"]
            else:
                assert len(rows) == source[part]["documents"]
                assert sum(len(row["text"].encode()) for row in rows) == source[part]["bytes"]
                assert all((row["language"] is None) == (name == "code") for row in rows)
    text = table(manifest, stage_seconds(tmp_path / "run"))
    assert "encrypted_pdf 1" in text
    assert "crawl" in text


def test_ids_and_texts_are_unique(corpus, tmp_path):
    manifest = curate(config(corpus), tmp_path / "run", workers=1)
    rows = [
        row
        for name in manifest["sources"]
        for part in ("train", "heldout")
        for batch in read_documents(tmp_path / "run", name, part=part)
        for row in batch.to_pylist()
    ]
    assert len({row["id"] for row in rows}) == len({row["text"] for row in rows}) == len(rows)


def test_one_and_two_workers_write_the_same_bytes(corpus, tmp_path):
    curate(config(corpus), tmp_path / "one", workers=1)
    curate(config(corpus), tmp_path / "two", workers=2)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_shard_size_does_not_change_the_documents(corpus, tmp_path):
    texts = []
    for shard_bytes in (5000, 1 << 30):
        run = tmp_path / str(shard_bytes)
        manifest = curate(config(corpus, shard_bytes=shard_bytes), run, workers=1)
        texts.append(
            [
                batch.column(column).to_pylist()[row]
                for name in manifest["sources"]
                for part in ("train", "heldout")
                for batch in read_documents(run, name, part=part)
                for row in range(batch.num_rows)
                for column in ("id", "text")
            ]
        )
    assert texts[0] == texts[1]


def test_a_second_run_does_nothing_and_a_new_threshold_only_filters(corpus, tmp_path):
    run = tmp_path / "run"
    curate(config(corpus), run, workers=1)
    times = {path: path.stat().st_mtime_ns for path in run.rglob("*.parquet")}
    curate(config(corpus), run, workers=1)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.parquet")} == times
    changed = presets.defaults()
    changed["document"]["gopher_quality"]["min_words"] = 10_000
    manifest = curate(config(corpus, presets=changed), run, workers=1)
    assert manifest["sources"]["html"]["train"]["documents"] == 0
    for path in (run / "curation" / "extract").rglob("*.parquet"):
        assert path.stat().st_mtime_ns == times[path]


def test_deleting_documents_or_one_item_rebuilds_the_same(corpus, tmp_path):
    run = tmp_path / "run"
    curate(config(corpus), run, workers=1)
    before = tree(run)
    for gone in ("documents", "curation/filter/00001", "curation/finish/00002"):
        shutil.rmtree(run / gone)
        shutil.rmtree(run / "documents", ignore_errors=True)
        curate(config(corpus), run, workers=1)
        assert tree(run) == before


def test_a_changed_input_is_read_again(corpus, tmp_path):
    run = tmp_path / "run"
    curate(config(corpus), run, workers=1)
    (tmp_path / "in/html/00.html").write_text(material.page(999))
    manifest = curate(config(corpus), run, workers=1)
    texts = [
        t
        for part in ("train", "heldout")
        for b in read_documents(run, "html", part=part)
        for t in b.column("text").to_pylist()
    ]
    assert any(text.startswith("Report 999\n") for text in texts)
    assert manifest["sources"]["html"]["removed"] == 2


def test_empty_corpus(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("Too short.")
    (tmp_path / "in/b.txt").touch()
    recipe = material.write_recipe(tmp_path, f"Files('s', '{tmp_path}/in/*', 'document')")
    with pytest.raises(SmoljaxError) as caught:
        curate(config(recipe), tmp_path / "run", workers=1)
    message = str(caught.value)
    assert "the corpus is empty" in message
    assert "length:too_short 1" in message
    assert "read:empty 1" in message
    assert "\n" not in message
    assert not (tmp_path / "run/documents").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "nowhere.py"}, "config.curation.recipe is 'nowhere.py'"),
        ({"heldout_fraction": 1.5}, "heldout_fraction is 1.5"),
        (
            {"heldout_fractions": {"nosuch": 0.1}},
            "heldout_fractions names nosuch: the recipe has html",
        ),
        ({"shard_bytes": 0}, "shard_bytes is 0"),
        (
            {"presets": {"document": {"order": ("extract", "no_such_filter")}}},
            "presets.document.order names 'no_such_filter'",
        ),
        (
            {"presets": {"code": {"order": ("extract",)}}},
            "source 'html' asks for preset 'document'",
        ),
        (
            {"presets": {"document": {"order": ("extract", "length"), "length": {"min_words": 3}}}},
            "presets.document.length",
        ),
        (
            {"presets": {"document": {"order": ("extract",), "length": {"min_characters": 3}}}},
            "presets.document.length does not run",
        ),
        (
            {"presets": {"document": {"order": ("length", "extract")}}},
            "has 'length' before \"extract\"",
        ),
        ({"shards_bytes": 3}, "did you mean curation.shard_bytes"),
    ],
)
def test_wrong_configurations_are_refused_before_any_work(corpus, tmp_path, changes, message):
    with pytest.raises(SmoljaxError, match=message.replace(".", r"\.")):
        curate(config(**({"recipe": corpus} | changes)), tmp_path / "run", workers=1)
    assert not (tmp_path / "run/documents").exists()


def test_full_disk_is_explained_and_keeps_what_was_written(corpus, tmp_path, monkeypatch):
    run = tmp_path / "run"
    curate(config(corpus), run, workers=1)
    before = tree(run / "documents")
    written = pq.ParquetWriter.write_batch

    def full(self, batch, *rest):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_batch", full)
    (tmp_path / "in/html/00.html").write_text(material.page(999))
    with pytest.raises(SmoljaxError, match="the disk is full while writing"):
        curate(config(corpus), run, workers=1)
    assert tree(run / "documents") == before
    assert not [path for path in run.rglob(".*") if path.is_dir()]
    monkeypatch.setattr(pq.ParquetWriter, "write_batch", written)
    curate(config(corpus), run, workers=1)


def test_two_runs_in_one_workdir_are_refused(corpus, tmp_path):
    from smoljax.curation import runner

    with (
        runner.only_run_in(tmp_path / "run/curation", patience=0.1),
        pytest.raises(SmoljaxError, match="another curation is at work"),
        runner.only_run_in(tmp_path / "run/curation", patience=0.1),
    ):
        pass


def test_fingerprints_do_not_depend_on_where_the_folder_lies(tmp_path):
    from smoljax.curation import sources

    prints = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text("x")
        os.utime(tmp_path / name / "x.txt", (1, 1))
        (shard,) = sources.shards([sources.Files("s", f"{tmp_path / name}/*", "fast")], 100)
        prints.append(pipeline.fingerprint(shard))
    assert prints[0] == prints[1]
    os.utime(tmp_path / "b" / "x.txt", (1, 2))
    (shard,) = sources.shards([sources.Files("s", f"{tmp_path}/b/*", "fast")], 100)
    assert pipeline.fingerprint(shard) != prints[0]


def test_presets_survive_a_config_dict():
    from ml_collections import ConfigDict

    section = ConfigDict({"recipe": "r.py", "presets": presets.defaults(), "arguments": {"a": 1}})
    assert build(CurationConfig, section, "curation") == CurationConfig("r.py", arguments={"a": 1})
