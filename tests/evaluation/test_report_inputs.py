"""Reading a finished run: examples are drawn, not picked, and a missing piece names the step that makes it."""

import hashlib
import json
import shutil

import pyarrow.parquet as pq
import pytest

from smoljax.errors import SmoljaxError
from smoljax.evaluation.report_inputs import read_inputs


@pytest.fixture
def copied(finished_run, tmp_path):
    """A copy to damage, without the large part."""
    target = tmp_path / "copy"
    shutil.copytree(finished_run, target, ignore=shutil.ignore_patterns("checkpoints", "curation"))
    return target


def rows_of(finished_run, part):
    return [
        row
        for source in ("reference", "library")
        for path in sorted((finished_run / "documents" / source / part).glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]


def order(row):
    return hashlib.sha256(row["id"].encode()).hexdigest()


def test_examples_are_drawn_by_the_hash_of_their_id(finished_run):
    inputs = read_inputs(finished_run)
    kept = inputs.kept_examples(2)
    for source in ("reference", "library"):
        rows = [row for row in rows_of(finished_run, "train") if row["source"] == source]
        expected = [row["text"] for row in sorted(rows, key=order)[:2]]
        assert [document.text for document in kept[source]] == expected


def test_every_reason_of_the_manifest_has_its_examples(finished_run):
    inputs = read_inputs(finished_run)
    removed = inputs.removed_examples(1)
    expected = {}
    for stage in inputs.documents["stages"]:
        expected |= stage["removed_by_reason"]
    assert {reason: number for reason, (number, _) in removed.items()} == expected
    assert expected
    numbers = [number for number, _ in removed.values()]
    assert numbers == sorted(numbers, reverse=True)
    for reason, (_, examples) in removed.items():
        first = min(
            (r for r in rows_of(finished_run, "removed") if r["reason"] == reason), key=order
        )
        assert [document.path for document in examples] == [first["path"]]


def test_held_out_example_is_held_out(finished_run):
    example = read_inputs(finished_run).heldout_example()
    assert example.text in {row["text"] for row in rows_of(finished_run, "heldout")}
    assert example.text not in {row["text"] for row in rows_of(finished_run, "train")}


@pytest.mark.parametrize(
    ("name", "verb"),
    [
        ("documents/manifest.json", "smoljax.curate --only=documents"),
        ("shards/library/1.0.0/manifest.json", "smoljax.curate --only=shards"),
        ("train/config.json", "smoljax.train"),
        ("train/metrics.jsonl", "smoljax.train"),
        ("evaluation.json", "smoljax.evaluate"),
        ("samples.json", "smoljax.generate --samples=yes"),
    ],
)
def test_a_missing_file_names_the_step_that_makes_it(copied, name, verb):
    read_inputs(copied)  # The control: whole, it reads.
    (copied / name).unlink()
    with pytest.raises(SmoljaxError) as caught:
        read_inputs(copied)
    assert str(copied / name) in str(caught.value)
    assert f"python -m {verb}" in str(caught.value)


def test_a_missing_tokenizer_is_named(copied):
    shutil.rmtree(copied / "tokenizer")
    with pytest.raises(SmoljaxError, match=r"tokenizer.*missing.*curate --only=tokenizer"):
        read_inputs(copied)


def test_a_damaged_file_is_named(copied):
    path = copied / "evaluation.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(SmoljaxError, match=r"evaluation\.json is damaged.*smoljax\.evaluate"):
        read_inputs(copied)


def test_shards_and_tokenizer_may_lie_elsewhere(copied, tmp_path):
    shutil.move(copied / "shards", tmp_path / "my_shards")
    shutil.move(copied / "tokenizer", tmp_path / "my_tokenizer")
    (tmp_path / "my_tokenizer" / "manifest.json").unlink()  # As of a tokenizer that others made.
    config = json.loads((copied / "train" / "config.json").read_text())
    config["data"]["directory"] = str(tmp_path / "my_shards")
    config["tokenizer"] = {"directory": str(tmp_path / "my_tokenizer")}
    (copied / "train" / "config.json").write_text(json.dumps(config))
    inputs = read_inputs(copied)
    assert set(inputs.shards) == {"reference", "library"}
    assert "my_tokenizer" in inputs.tokenizer_kind
    assert inputs.tokenizer.vocab_size == 1024
