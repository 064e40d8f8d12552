"""The stage "dedup" in the whole of curation: who is compared with whom, what is kept, and what is run again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from smoljax.configuration import build
from smoljax.curation import CurationConfig, curate, read_documents
from smoljax.errors import SmoljaxError
from tests.curation import material
from tests.curation.test_run import tree

NEAR = {"minhash": "fineweb2"}


def near(number: int, copy: int) -> str:
    """`material.prose(number)` with a few words more that say which copy it is."""
    return material.prose(number, sentences=30) + f"The copy is {'again ' * copy}the same.\n"


def write_source(folder: Path, name: str, *files: list[str]) -> str:
    """A source of JSONL files, each its own shard; returns how a recipe names it."""
    (folder / name).mkdir(parents=True)
    for number, texts in enumerate(files):
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / name / f"{number}.jsonl").write_text("".join(lines))
    return f"Files('{name}', '{folder / name}/*', '{{}}')"


def config(recipe: str, presets: dict, **changes) -> CurationConfig:
    values = {"recipe": recipe, "presets": presets, "heldout_fraction": 0.0, "shard_bytes": 8000}
    return build(CurationConfig, values | changes, "curation")


def preset(dedup: dict, *behind: str) -> dict:
    return {"order": ("extract", "dedup", *behind), "dedup": dedup}


def documents(run: Path, source: str, part: str = "train") -> list[dict]:
    return [row for batch in read_documents(run, source, part=part) for row in batch.to_pylist()]


def sizes(run: Path, source: str) -> dict[str, int | None]:
    return {row["text"]: row["cluster_size"] for row in documents(run, source)}


def reasons(run: Path, source: str) -> dict[str, str]:
    return {row["id"]: row["reason"] for row in documents(run, source, "removed")}


@pytest.fixture
def corpus(tmp_path) -> str:
    """Two sources; in all, document 0 five times (two of them equal), document 1 three times, all equal."""
    a = write_source(
        tmp_path / "in",
        "a",
        [near(0, 0), near(1, 0), near(2, 0)],
        [near(0, 1), near(3, 0), near(1, 0), "Two words.", "Two words."],
    )
    b = write_source(tmp_path / "in", "b", [near(0, 2), near(0, 1), near(1, 0), near(0, 3)])
    return material.write_recipe(tmp_path, a.format("web"), b.format("web"))


def test_the_first_stays_and_stands_for_all_its_copies(corpus, tmp_path):
    manifest = curate(config(corpus, {"web": preset(NEAR)}), tmp_path / "run", workers=1)
    assert sizes(tmp_path / "run", "a") == {
        near(0, 0): 5,
        near(1, 0): 3,
        near(2, 0): 1,
        near(3, 0): 1,
        "Two words.": 2,  # Too short for a signature.
    }
    assert sizes(tmp_path / "run", "b") == {}
    by_stage = {stage["name"]: stage for stage in manifest["stages"]}
    assert by_stage["dedup"]["removed_by_reason"] == {"dedup:exact": 4, "dedup:minhash": 3}
    assert list(reasons(tmp_path / "run", "b").values()) == [
        "dedup:minhash",
        "dedup:exact",
        "dedup:exact",
        "dedup:minhash",
    ]
    assert all(row["cluster_size"] is None for row in documents(tmp_path / "run", "b", "removed"))


def test_without_an_exact_stage_clusters_are_the_same(corpus, tmp_path):
    """But for a text that has no signature."""
    dedup = {"exact": False, "minhash": "fineweb2"}
    curate(config(corpus, {"web": preset(dedup)}), tmp_path / "run", workers=1)
    found = sizes(tmp_path / "run", "a")
    assert found.pop("Two words.") == 1
    assert list(found.values()) == [5, 3, 1, 1]
    assert set(reasons(tmp_path / "run", "a").values()) == {"dedup:minhash"}


@pytest.mark.parametrize(
    ("dedup", "kept"),
    [
        ({}, [[1, 3, 1, 2, 1, 2], [1, 1]]),
        ({"minhash": {"buckets": 1, "hashes_per_bucket": 1, "ngram": 1}}, None),
        ({"minhash": "fineweb", "scope": "source"}, [[2, 2, 1, 1, 2], [3, 1]]),
        ({"scope": "source"}, [[1, 2, 1, 1, 1, 2], [1, 1, 1, 1]]),
        ({"minhash": "finepdfs"}, [[5, 3, 1, 1, 2], []]),
    ],
)
def test_scope_and_presets(corpus, tmp_path, dedup, kept):
    curate(config(corpus, {"web": preset(dedup)}), tmp_path / "run", workers=1)
    found = [[row["cluster_size"] for row in documents(tmp_path / "run", s)] for s in ("a", "b")]
    if kept is None:  # Of one hash each of the same few words: everything is a near-duplicate.
        assert sum(map(len, found)) < 5
    else:
        assert found == kept
    everything = sum(map(sum, found))
    assert everything == 12


def test_documents_of_presets_with_other_arguments_are_not_compared(tmp_path):
    a = write_source(tmp_path / "in", "a", [near(0, 0), near(0, 0)])
    b = write_source(tmp_path / "in", "b", [near(0, 0), near(0, 1)])
    c = write_source(tmp_path / "in", "c", [near(0, 0), near(0, 0)])
    recipe = material.write_recipe(tmp_path, a.format("x"), b.format("y"), c.format("z"))
    presets = {"x": preset({}), "y": preset(NEAR), "z": {"order": ("extract",)}}
    curate(config(recipe, presets), tmp_path / "run", workers=1)
    assert sizes(tmp_path / "run", "a") == {near(0, 0): 2}
    assert sizes(tmp_path / "run", "b") == {near(0, 0): 2}
    # Whose preset does not name "dedup" is in no group: both stay, and nobody counted.
    assert [row["cluster_size"] for row in documents(tmp_path / "run", "c")] == [None, None]
    together = presets | {"y": preset({})}
    curate(config(recipe, together), tmp_path / "run", workers=1)
    assert sizes(tmp_path / "run", "a") == {near(0, 0): 3}
    assert sizes(tmp_path / "run", "b") == {near(0, 1): 1}


GERMAN = "Der Wärter des Leuchtturms ging am Hafen entlang und suchte lange nach dem Schiff. " * 3


def test_languages_are_compared_apart_on_demand(tmp_path):
    """The same words under two languages: what the language model says of them decides."""
    from smoljax.curation import dedup, schema

    rows = [("en", GERMAN), ("de", GERMAN), ("de", GERMAN), (None, GERMAN), ("en", "Two words.")]
    blank = dict.fromkeys(schema.DOCUMENT.names, "")
    batch = [
        blank | {"text": t, "language": c, "language_score": 1.0, "cluster_size": 1}
        for c, t in rows
    ]
    import pyarrow as pa

    batch = pa.RecordBatch.from_pylist(batch, schema=schema.DOCUMENT)
    together = dedup.config.build("dedup", {"minhash": "fineweb2"})
    apart = dedup.config.build("dedup", {"minhash": "fineweb2", "by_language": True})
    assert dedup.copies(dedup.hashes(batch, together)).tolist() == [4, 0, 0, 0, 1]
    assert dedup.copies(dedup.hashes(batch, apart)).tolist() == [1, 2, 0, 1, 1]
    signed, valid = dedup.signatures(batch, together)
    assert valid.tolist() == [True] * 4 + [False]
    assert (signed[0] == signed[1:4]).all()
    signed, _ = dedup.signatures(batch, apart)
    assert (signed[1] == signed[2]).all()
    for other in (1, 3):
        assert not (signed[0] == signed[other]).any()
    assert not (signed[1] == signed[3]).any()


def test_whitespace_can_be_ignored(tmp_path):
    texts = ["One two\n\nthree.", "One two three.", "Onetwothree.", "One two three!"]
    source = write_source(tmp_path / "in", "a", texts).format("web")
    recipe = material.write_recipe(tmp_path, source)
    presets = {"web": preset({"ignore_whitespace": True})}
    curate(config(recipe, presets), tmp_path / "run", workers=1)
    assert sizes(tmp_path / "run", "a") == {texts[0]: 3, texts[3]: 1}


def test_dedup_before_a_filter_counts_what_the_filter_removes(tmp_path):
    """FineWeb2's order: the first of a cluster is filtered, and none of its copies comes back."""
    short, long = "Three words here now and again.", near(0, 0)
    recipe = material.write_recipe(
        tmp_path, write_source(tmp_path / "in", "a", [short, short, long, near(0, 1)]).format("web")
    )
    presets = {
        "web": preset(NEAR, "length") | {"length": {"min_characters": 200, "max_characters": 10**6}}
    }
    manifest = curate(config(recipe, presets), tmp_path / "run", workers=1)
    assert sizes(tmp_path / "run", "a") == {long: 2}
    assert [(stage["name"], stage["removed_by_reason"]) for stage in manifest["stages"][-2:]] == [
        ("dedup", {"dedup:exact": 1, "dedup:minhash": 1}),
        ("length", {"length:too_short": 1}),
    ]


@pytest.mark.parametrize(
    "files", [[[]], [["One document of a few words only."]], [[], ["a b"], []]]
)
def test_empty_shards_and_single_documents(tmp_path, files):
    source = write_source(tmp_path / "in", "a", *files).format("web")
    keep = write_source(tmp_path / "in", "keep", ["Something is always there."]).format("keep")
    recipe = material.write_recipe(tmp_path, source, keep)
    presets = {"web": preset(NEAR), "keep": {"order": ("extract",)}}
    curate(config(recipe, presets, shard_bytes=64 << 20), tmp_path / "run", workers=1)
    shutil.rmtree(tmp_path / "run/documents")
    curate(config(recipe, presets), tmp_path / "run", workers=1)
    found = sizes(tmp_path / "run", "a") if any(files) else {}
    assert found == {text: 1 for file in files for text in file}


def test_workers_and_beam_write_the_same_bytes(corpus, tmp_path):
    presets = {"web": preset(NEAR)}
    curate(config(corpus, presets), tmp_path / "one", workers=1)
    curate(config(corpus, presets), tmp_path / "two", workers=2)
    one = tree(tmp_path / "one")
    assert one == tree(tmp_path / "two")
    pytest.importorskip("apache_beam", reason='the extra "beam" is not installed')
    curate(config(corpus, presets, beam_options=()), tmp_path / "beam")
    assert one == tree(tmp_path / "beam")
    store = "memory://dedup/curation"
    curate(config(corpus, presets, directory=store, beam_options=()), tmp_path / "remote")
    remote = tree(tmp_path / "remote/documents")
    assert remote == tree(tmp_path / "one/documents")
    import fsspec

    fsspec.filesystem("memory").rm("/dedup", recursive=True)


def times(run: Path, *steps: str) -> dict:
    return {
        path: path.stat().st_mtime_ns
        for step in steps
        for path in (run / "curation" / step).rglob("manifest.json")
    }


def test_changed_arguments_run_only_what_depends_on_them(corpus, tmp_path):
    run = tmp_path / "run"
    curate(config(corpus, {"web": preset(NEAR, "pii")}), run, workers=1)
    before = times(run, "extract", "filter")
    changed = {"minhash": {"buckets": 2}}
    curate(config(corpus, {"web": preset(changed, "pii")}), run, workers=1)
    assert times(run, "extract", "filter") == before
    assert len(list((run / "curation/bands").iterdir())) == 2
    before = times(run, "extract", "filter", "signatures", "exact", "bands", "clusters")
    behind = preset(changed, "pii", "encoding")
    curate(config(corpus, {"web": behind}), run, workers=1)
    steps = ("extract", "filter", "signatures", "exact", "bands", "clusters")
    assert times(run, *steps) == before


@pytest.mark.parametrize(
    ("name", "behind"),
    [
        ("signatures/00001/signatures.bin", ("bands", "clusters", "finish")),
        ("signatures/00001/hashes.npy", ("exact", "bands", "clusters", "finish")),
        ("exact/000/copies.npy", ("clusters", "finish")),
        ("bands/000-03/edges.bin", ("clusters", "finish")),
        ("clusters/000/00001.npy", ("finish",)),
    ],
)
def test_damaged_intermediate_files_are_named(corpus, tmp_path, name, behind):
    run = tmp_path / "run"
    curate(config(corpus, {"web": preset(NEAR)}), run, workers=1)
    path = run / "curation" / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 0xFF
    path.write_bytes(data)
    for step in (*behind, "../documents"):
        shutil.rmtree(run / "curation" / step)
    with pytest.raises(SmoljaxError, match=rf"{name} is damaged"):
        curate(config(corpus, {"web": preset(NEAR)}), run, workers=1)


@pytest.mark.parametrize(
    ("dedup", "message"),
    [
        ({"minhash": "fineweb3"}, r"config\.curation\.presets\.web\.dedup\.minhash is 'fineweb3'"),
        ({"min_hash": "fineweb"}, r"dedup\.min_hash is not a field .*dedup\.minhash\?"),
        ({"scope": "dump"}, r"dedup\.scope is 'dump': it can be 'all', 'source'"),
        ({"by_language": "en"}, r"dedup\.by_language is 'en': it can be True, False"),
        ({"exact": False}, r"web\.dedup compares nothing"),
        (
            {"exact": False, "minhash": "fineweb", "ignore_whitespace": True},
            r"ignore_whitespace changes nothing without .*\.exact",
        ),
        ({"minhash": {"bucket": 3}}, r"dedup\.minhash\.bucket is not a field .*minhash\.buckets\?"),
        ({"minhash": {"buckets": 0}}, r"dedup\.minhash\.buckets is 0: it must be a whole number"),
        ({"minhash": {"seed": 1.5}}, r"dedup\.minhash\.seed is 1\.5"),
        ({"minhash": {"hash": "md5"}}, r"minhash\.hash is 'md5': it can be 'sha1', 'xxh64'"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(corpus, dedup, message):
    with pytest.raises(SmoljaxError, match=message):
        config(corpus, {"web": preset(dedup)})


SCRIPT = """
import sys
from smoljax.curation import CurationConfig, curate

if __name__ == "__main__":
    preset = {"order": ("extract", "dedup"), "dedup": {"minhash": "fineweb2"}}
    curate(
        CurationConfig(sys.argv[1], presets={"web": preset}, heldout_fraction=0.0, shard_bytes=8000),
        sys.argv[2],
        workers=2,
    )
"""


def test_killed_in_each_step_and_restarted_gives_the_same_bytes(corpus, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def start(run: Path) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, str(script), corpus, str(run)],
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        )

    assert start(tmp_path / "whole").wait() == 0
    run = tmp_path / "run"
    for step in ("signatures", "exact", "bands", "clusters", "finish"):
        process = start(run)
        deadline = time.monotonic() + 60
        while not (run / "curation" / step).is_dir() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert start(run).wait() == 0
    assert tree(run) == tree(tmp_path / "whole")


def test_a_wrong_keeper_would_be_seen(corpus, tmp_path):
    """Negative control: without the order of shards the last copy could stay; sizes and texts tell them apart."""
    curate(config(corpus, {"web": preset(NEAR)}), tmp_path / "run", workers=1)
    clusters = tmp_path / "run/curation/clusters/000"
    found = np.concatenate([np.load(path) for path in sorted(clusters.glob("*.npy"))])
    assert found.tolist() == [5, 3, 1, 0, 1, -1, 2, -1, 0, -1, -1, 0]
