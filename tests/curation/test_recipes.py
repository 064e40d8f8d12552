"""The recipes in data/ that read the user's own files and TFDS datasets, end to end."""

import json

import pytest

from smoljax.curation import CurationConfig, curate, read_documents
from smoljax.errors import SmoljaxError
from tests.curation import material


def texts(run, source: str) -> list[str]:
    return [
        text
        for part in ("train", "heldout")
        for batch in read_documents(run, source, part=part)
        for text in batch.column("text").to_pylist()
    ]


def test_files_recipe_takes_a_source_per_pattern(tmp_path):
    (tmp_path / "a.warc.gz").write_bytes(material.warc_gz([material.page(i) for i in range(5)]))
    rows = "".join(json.dumps({"body": material.prose(i)}) + "\n" for i in range(10, 14))
    (tmp_path / "b.jsonl").write_text(rows)
    config = CurationConfig(
        "data/files.py",
        arguments={
            "patterns": {"crawl": f"{tmp_path}/*.warc.gz", "rows": f"{tmp_path}/b.jsonl"},
            "presets": {"rows": "document"},
            "text_field": "body",
        },
        heldout_fraction=0.0,
    )
    curate(config, tmp_path / "run", workers=1)
    assert len(texts(tmp_path / "run", "crawl")) == 5
    assert texts(tmp_path / "run", "rows") == [material.prose(i) for i in range(10, 14)]


def test_files_recipe_without_patterns_says_what_to_give(tmp_path):
    config = CurationConfig("data/files.py", arguments={"patterns": {}})
    with pytest.raises(SmoljaxError, match=r"config\.curation\.arguments\.patterns names no input"):
        curate(config, tmp_path / "run")


@pytest.fixture(scope="module")
def tfds_directory(tmp_path_factory):
    """A TFDS dataset of 20 texts in ArrayRecord files, written by TFDS itself."""
    tfds = pytest.importorskip("tensorflow_datasets")

    from array_record.python import array_record_module

    directory = tmp_path_factory.mktemp("tfds")
    folder = directory / "small_text/1.0.0"
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
    records = [features.serialize_example({"text": material.prose(i)}) for i in range(20)]
    writer = array_record_module.ArrayRecordWriter(
        str(folder / "small_text-train.array_record-00000-of-00001"), "group_size:1"
    )
    for record in records:
        writer.write(record)
    writer.close()
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=[
            tfds.core.SplitInfo(name="train", shard_lengths=[20], num_bytes=sum(map(len, records)))
        ],
        filename_template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        check_data=False,
    )
    return directory


@pytest.mark.parametrize("shard_bytes", [2000, 1 << 30])
def test_tfds_recipe_reads_by_random_access(tfds_directory, tmp_path, shard_bytes):
    config = CurationConfig(
        "data/tfds_text.py",
        arguments={
            "dataset": "small_text",
            "directory": str(tfds_directory),
            "preset": "document",
        },
        heldout_fraction=0.0,
        shard_bytes=shard_bytes,
    )
    curate(config, tmp_path / "run", workers=1)
    assert sorted(texts(tmp_path / "run", "small_text")) == sorted(map(material.prose, range(20)))
    shards = list((tmp_path / "run/documents/small_text/train").iterdir())
    assert len(shards) == (1 if shard_bytes == 1 << 30 else len(shards))
    assert (len(shards) > 5) == (shard_bytes == 2000)


def test_tfds_slice(tfds_directory, tmp_path):
    config = CurationConfig(
        "data/tfds_text.py",
        arguments={
            "dataset": "small_text:1.0.0",
            "directory": str(tfds_directory),
            "split": "train[:25%]",
            "preset": "document",
        },
        heldout_fraction=0.0,
    )
    curate(config, tmp_path / "run", workers=1)
    assert len(texts(tmp_path / "run", "small_text")) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "no_such_text"}, "TFDS dataset 'no_such_text' is not in"),
        ({"dataset": "small_text", "split": "test"}, "has no split 'test'"),
        ({"dataset": "small_text", "text_field": "body"}, "has no feature 'body': it has text"),
    ],
)
def test_tfds_errors(tfds_directory, tmp_path, arguments, message):
    config = CurationConfig(
        "data/tfds_text.py", arguments={"directory": str(tfds_directory)} | arguments
    )
    with pytest.raises(SmoljaxError, match=message):
        curate(config, tmp_path / "run", workers=1)
