"""Apache Beam's runner inside this process: the same bytes as the process pool, errors in one line, remote folders."""

import importlib.util
import json

import fsspec
import pytest

pytest.importorskip("apache_beam", reason='the extra "beam" is not installed')

from smoljax.configuration import build
from smoljax.curation import CurationConfig, curate, items, runner
from smoljax.errors import SmoljaxError
from tests.curation import material
from tests.curation.test_interruptions import corpus, documents, sets, settings  # noqa: F401
from tests.curation.test_run import tree
from tests.curation.test_runner import fail, item


def config(recipe: str, **changes) -> CurationConfig:
    return build(CurationConfig, settings(recipe) | changes, "curation")


def run(folder, name: str, *, workers: int = 1, **changes) -> dict:
    """Curates the corpus, near-duplicates and an evaluation set among it, to folder/name."""
    chosen = config(str(folder / "recipe.py"), **changes)
    return curate(chosen, folder / name, evaluation_sets=sets(folder), workers=workers)


def test_beam_and_the_pool_write_the_same_bytes(corpus):  # noqa: F811
    manifest = run(corpus, "pool", workers=2)
    run(corpus, "beam", beam_options=())
    assert tree(corpus / "pool") == tree(corpus / "beam")
    reasons = {reason for stage in manifest["stages"] for reason in stage["removed_by_reason"]}
    assert reasons >= {"dedup:exact", "dedup:minhash", "decontamination:quiz"}


def test_work_items_in_an_object_store(corpus):  # noqa: F811
    """Every intermediate file lies behind a URL; the documents come to the local folder, byte for byte."""
    run(corpus, "local")
    store = "memory://bucket/curation"
    run(corpus, "remote", directory=store, beam_options=())
    assert documents(corpus / "local") == documents(corpus / "remote")
    memory = fsspec.filesystem("memory")
    written = {path for path in memory.find("/bucket/curation") if path.endswith("manifest.json")}
    assert len(written) == len(list((corpus / "local/curation").glob("*/*/manifest.json")))
    times = {path: memory.modified(path) for path in written}
    (corpus / "remote/documents/manifest.json").unlink()
    run(corpus, "remote", directory=store, beam_options=())
    assert {path: memory.modified(path) for path in written} == times
    damaged = next(
        path for path in sorted(memory.find("/bucket/curation/filter")) if "kept" in path
    )
    memory.pipe_file(damaged, memory.cat_file(damaged)[::-1])
    memory.rm("/bucket/curation/finish", recursive=True)
    (corpus / "remote/documents/manifest.json").unlink()
    with pytest.raises(SmoljaxError, match=r"kept\.parquet is damaged"):
        run(corpus, "remote", directory=store, beam_options=())
    memory.rm("/bucket", recursive=True)


def test_a_failing_item_gives_its_own_line(tmp_path):
    with pytest.raises(SmoljaxError, match=r"^cannot work on text bad$"):
        runner.run(
            [item("bad", fail), item("good")], tmp_path, workers=1, stage="test", beam_options=()
        )
    assert {path.name for path in tmp_path.iterdir()} == {"good"}
    assert items.finished(item("good"), str(tmp_path))["result"] == {"length": 9}


def test_a_local_folder_is_refused_for_workers_elsewhere(tmp_path):
    with pytest.raises(SmoljaxError, match=r"config\.curation\.directory is .* a local folder"):
        runner.run(
            [item("a")],
            tmp_path,
            workers=1,
            stage="test",
            beam_options=("--runner=DataflowRunner", "--project=p", "--temp_location=gs://b/t"),
        )


def test_an_option_that_beam_does_not_know_is_refused(tmp_path):
    with pytest.raises(SmoljaxError, match="beam_options has num_worker, which Beam does not know"):
        runner.run(
            [item("a")],
            tmp_path,
            workers=1,
            stage="test",
            beam_options=("--runner=FnApiRunner", "--num_worker=3"),
        )


@pytest.mark.skipif(importlib.util.find_spec("apitools") is not None, reason="Dataflow could start")
def test_dataflow_without_its_packages_names_the_extra():
    options = ("--runner=DataflowRunner", "--project=p", "--temp_location=gs://b/t")
    with pytest.raises(SmoljaxError, match=r'pip install "smoljax\[dataflow\]"'):
        runner.run([item("a")], "memory://b/c", workers=1, stage="test", beam_options=options)


def test_the_documents_of_a_run_on_beam_are_listed_in_the_manifest(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / f"in/{i}.txt").write_text(material.prose(i))
    recipe = material.write_recipe(tmp_path, f"Files('s', '{tmp_path}/in/*', 'document')")
    manifest = curate(config(recipe, heldout_fraction=0.0, beam_options=()), tmp_path / "run")
    assert json.loads((tmp_path / "run/documents/manifest.json").read_text()) == manifest
    assert manifest["sources"]["s"]["train"]["documents"] == 3
