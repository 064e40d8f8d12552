"""Decontamination in a run: on where a config names benchmarks, and every hit is told."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from smoljax.configuration import build
from smoljax.curation import CurationConfig, curate, presets, read_documents, stage_seconds, table
from smoljax.errors import SmoljaxError
from tests.curation import material

CODE = "def area(width, height):\n    # the area of a rectangle is its width times its height, and nothing else\n" + (
    "    return width * height\n" * 9
)  # fmt: skip


@pytest.fixture
def corpus(tmp_path) -> str:
    """Twenty texts and a program. Texts 3 and 4 hold items of "quiz", the program one of "exam", text 4 one of both."""
    (tmp_path / "in").mkdir()
    for i in range(20):
        (tmp_path / f"in/{i:02d}.txt").write_text(material.prose(i))
    (tmp_path / "in/a.py").write_text(CODE)
    lines = material.prose(4).splitlines()
    write(
        tmp_path / "quiz.jsonl",
        [
            {"question": "What happened?", "answer": material.prose(3).splitlines()[2].upper()},
            {"question": "And then?", "answer": lines[0] + " " + lines[1]},
            {"question": "Who?", "answer": "A sentence that is in none of the documents, although it is long."},
            {"question": "Yes?", "answer": "No."},
        ],
    )  # fmt: skip
    area = "The area of a rectangle is: its width times its height, and nothing else."
    write(tmp_path / "exam.jsonl", [{"text": area}, {"text": lines[5] + lines[6]}])
    return material.write_recipe(
        tmp_path,
        f"Files('prose', '{tmp_path}/in/*.txt', 'document')",
        f"Files('code', '{tmp_path}/in/*.py', 'code')",
    )


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sets(folder: Path) -> dict:
    return {
        "quiz": {"files": f"{folder}/quiz.jsonl", "fields": ("answer",), "context": ("question",)},
        "exam": f"{folder}/exam.jsonl",
    }


def run(recipe: str, folder: Path, *, scored: dict | None, **changes) -> dict:
    values = {"recipe": recipe, "heldout_fraction": 0.2, "shard_bytes": 6_000} | changes
    config = build(CurationConfig, values, "curation")
    return curate(config, folder, evaluation_sets=scored, workers=1)


def removed(folder: Path) -> dict[str, str]:
    """Path -> reason of the documents that decontamination removed."""
    return {
        row["path"]: row["reason"]
        for source in ("prose", "code")
        for batch in read_documents(folder, source, part="removed")
        for row in batch.to_pylist()
        if row["reason"].startswith("decontamination")
    }


def test_contaminated_documents_of_every_preset_go_and_each_hit_is_told(corpus, tmp_path):
    manifest = run(corpus, tmp_path / "run", scored=sets(tmp_path))
    assert removed(tmp_path / "run") == {
        "03.txt": "decontamination:quiz",
        "04.txt": "decontamination:quiz",
        "a.py": "decontamination:exam",
    }
    (stage,) = (s for s in manifest["stages"] if s["name"] == "decontamination")
    counts = {"decontamination:exam": 1, "decontamination:quiz": 2}
    assert (stage["kept"], stage["removed_by_reason"]) == (18, counts)
    found = manifest["decontamination"]
    assert json.loads((tmp_path / "run/documents/decontamination.json").read_text()) == found
    assert found["ngram"] == 13
    rows = {name: (r["items"], r["short"], r["items_hit"], r["documents"]) for name, r in found["sets"].items()}  # fmt: skip
    assert rows == {"quiz": (4, 1, 2, 2), "exam": (2, 0, 2, 2)}
    lines = (tmp_path / "run/documents/decontamination.jsonl").read_text().splitlines()
    hits = [json.loads(line) for line in lines]
    assert [(hit["source"], hit["path"], hit["set"], hit["item"]) for hit in hits] == [
        ("prose", "03.txt", "quiz", "quiz.jsonl#0"),
        ("prose", "04.txt", "quiz", "quiz.jsonl#1"),
        ("prose", "04.txt", "exam", "exam.jsonl#1"),
        ("code", "a.py", "exam", "exam.jsonl#0"),
    ]
    assert hits[3]["ngram"] == "the area of a rectangle is its width times its height and nothing"
    assert all(len(hit["ngram"].split()) == 13 for hit in hits)
    text = table(manifest, stage_seconds(tmp_path / "run"))
    assert "quiz                         4         2         1         2" in text
    assert "shares 13 words in a row" in text


def test_it_runs_before_dedup_wherever_a_preset_does_not_place_it(corpus, tmp_path):
    def order(**changes):
        manifest = run(corpus, tmp_path / "run", scored=sets(tmp_path), **changes)
        return [s["name"] for s in manifest["stages"] if s["name"] in ("decontamination", "dedup")]

    assert order() == ["decontamination", "dedup"]
    last = {name: {**p, "order": (*p["order"], "decontamination")} for name, p in presets.defaults().items()}  # fmt: skip
    assert order(presets=last) == ["dedup", "decontamination"]
    assert len(removed(tmp_path / "run")) == 3
    hits = (tmp_path / "run/documents/decontamination.jsonl").read_text()
    assert hits.count("\n") == 4
    bare = {name: {"order": ("extract",)} for name in ("document", "code")}
    assert order(presets=bare) == ["decontamination"]


def test_of_two_near_duplicates_the_clean_one_stays(corpus, tmp_path):
    """The contaminated one is first, so that dedup alone would keep it, and decontamination behind it would lose both."""
    item = "An answer that somebody put into the middle of the text, word by word as it is in the quiz."
    clean = material.prose(50, sentences=40)
    lines = clean.splitlines()
    (tmp_path / "in/50.txt").write_text("\n".join([*lines[:20], item, *lines[20:]]))
    (tmp_path / "in/51.txt").write_text(clean)
    write(tmp_path / "quiz.jsonl", [{"question": "Why?", "answer": item}])
    kept = {}
    for place in ("before", "after"):
        chosen = presets.defaults()
        chosen["document"]["dedup"] = {"minhash": "fineweb"}
        if place == "after":
            chosen["document"]["order"] = (*chosen["document"]["order"], "decontamination")
        run(corpus, tmp_path / place, scored=sets(tmp_path), presets=chosen)
        assert removed(tmp_path / place)["50.txt"] == "decontamination:quiz"
        kept[place] = {
            path
            for part in ("train", "heldout")
            for batch in read_documents(tmp_path / place, "prose", part=part)
            for path in batch.column("path").to_pylist()
        }
    assert "51.txt" in kept["before"]
    assert "51.txt" not in kept["after"]


def test_it_is_off_without_sets_and_by_one_switch(corpus, tmp_path):
    for name, changes in {
        "none": {"scored": None},
        "off": {"scored": sets(tmp_path), "decontamination_ngram": 0},
    }.items():
        manifest = run(corpus, tmp_path / name, **changes)
        assert manifest["decontamination"] is None
        assert removed(tmp_path / name) == {}
        assert "decontamination" not in table(manifest, {})
        assert not list((tmp_path / name / "documents").glob("decontamination*"))
    longer = run(corpus, tmp_path / "run", scored=sets(tmp_path), decontamination_ngram=30)
    assert set(removed(tmp_path / "run")) == {"04.txt"}
    assert longer["decontamination"]["sets"]["exam"]["short"] == 1


def test_a_set_counts_by_what_it_holds(corpus, tmp_path):
    """Another time of the file changes nothing; another item makes the index and what follows it anew."""
    folder = tmp_path / "run"
    first = run(corpus, folder, scored=sets(tmp_path))
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    os.utime(tmp_path / "quiz.jsonl", (1, 1))
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("quiz.jsonl", "exam.jsonl"):
        shutil.copy(tmp_path / name, moved)
    assert run(corpus, folder, scored=sets(moved)) == first
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")} == written
    write(tmp_path / "exam.jsonl", [{"text": material.prose(7)}])
    run(corpus, folder, scored=sets(tmp_path))
    assert set(removed(folder)) == {"03.txt", "04.txt", "07.txt"}
    for path in (folder / "curation/extract").rglob("*.parquet"):
        assert path.stat().st_mtime_ns == written[path]


def test_a_damaged_index_is_named(corpus, tmp_path):
    folder = tmp_path / "run"
    run(corpus, folder, scored=sets(tmp_path))
    path = folder / "curation/evaluation/all/keys.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    shutil.rmtree(folder / "documents")
    shutil.rmtree(folder / "curation/filter")
    with pytest.raises(SmoljaxError, match=r"evaluation/all/keys\.npy is damaged"):
        run(corpus, folder, scored=sets(tmp_path))
    shutil.rmtree(folder / "curation/evaluation/all")  # As the message says.
    run(corpus, folder, scored=sets(tmp_path))
    assert len(removed(folder)) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decontamination_ngram": 4}, "decontamination_ngram is 4: it must be from 5 to 50 words"),
        (
            {"presets": {"document": {"order": ("extract", "decontamination"), "decontamination": {"ngram": 5}}}},
            "presets.document.decontamination has ngram: it takes no arguments",
        ),
        (
            {
                "scored": None,
                "presets": {name: {"order": ("extract", "decontamination")} for name in ("document", "code")},
            },
            "presets.document.order names 'decontamination', and there is nothing to look for",
        ),
        ({"scored": {"quiz": "nowhere.jsonl"}}, "the evaluation set 'quiz': no file matches 'nowhere.jsonl'"),
    ],
)  # fmt: skip
def test_wrong_configurations_are_refused_before_any_work(corpus, tmp_path, changes, message):
    with pytest.raises(SmoljaxError) as caught:
        run(corpus, tmp_path / "run", **({"scored": sets(tmp_path)} | changes))
    assert message in str(caught.value)
    assert not (tmp_path / "run/curation/extract").exists()


def test_the_verb_takes_the_sets_from_the_evaluation_section(corpus, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(
        "from ml_collections import ConfigDict\n\n"
        f"def get_config():\n    return ConfigDict(dict(curation=dict(recipe={corpus!r}), "
        f"evaluation=dict(sets={sets(tmp_path)!r})))\n"
    )
    command = [sys.executable, "-m", "smoljax.curate", f"--config={config}", "--only=documents"]
    done = subprocess.run(
        [*command, f"--workdir={tmp_path}/run"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(removed(tmp_path / "run")) == 3
    assert "evaluation set " in done.stdout
