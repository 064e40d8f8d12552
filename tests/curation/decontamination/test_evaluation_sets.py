"""Benchmark files as they come: formats, fields, lists, and every way in which one can be wrong."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smoljax.curation.decontamination import evaluation_sets, fingerprint
from smoljax.errors import SmoljaxError

ROWS = [
    {"id": "1", "question": "Why is the sky blue?", "choices": {"text": ["Air", "Paint"], "label": ["A", "B"]}},
    {"id": "2", "question": "Who wrote it?", "choices": {"text": ["Nobody"], "label": ["A"]}},
]  # fmt: skip


def write(folder: Path, name: str, rows: list) -> str:
    path = folder / name
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif name.endswith(".zst"):
        path.write_bytes(pa.compress(lines.encode(), "zstd", asbytes=True))
    else:
        path.write_text(lines)
    return str(path)


def items(section: object) -> list[tuple[str, str, str]]:
    """(place, context, text) of every item of one set."""
    (found,) = evaluation_sets("config.evaluation.sets", {"quiz": section})
    return [(item.place, item.context, item.text) for item in found.items()]


@pytest.mark.parametrize("name", ["q.jsonl", "q.jsonl.gz", "q.jsonl.zst", "q.parquet"])
def test_each_answer_after_its_question_is_an_item(tmp_path, name):
    section = {
        "files": write(tmp_path, name, ROWS),
        "fields": ("choices.text",),
        "context": "question",
    }
    assert items(section) == [
        (f"{name}#0", "Why is the sky blue?", "Air"),
        (f"{name}#0", "Why is the sky blue?", "Paint"),
        (f"{name}#1", "Who wrote it?", "Nobody"),
    ]


def test_without_fields_all_strings_of_a_row_are_the_item(tmp_path):
    found = items(write(tmp_path, "q.jsonl", [*ROWS, "A line of text"]))
    assert found[0] == ("q.jsonl#0", "", "1 Why is the sky blue? Air Paint A B")
    assert found[2] == ("q.jsonl#2", "", "A line of text")


def test_a_folder_of_texts_has_an_item_in_each(tmp_path):
    (tmp_path / "a.txt").write_text("One text\nof two lines.")
    (tmp_path / "b.txt").write_text("Another.")
    expected = [("a.txt#0", "", "One text\nof two lines."), ("b.txt#0", "", "Another.")]
    assert items(str(tmp_path)) == expected


def test_a_null_field_leaves_the_rest(tmp_path):
    rows = [{"question": "Why?", "answer": None}]
    section = {"files": write(tmp_path, "q.jsonl", rows), "fields": ("question", "answer")}
    assert items(section) == [("q.jsonl#0", "", "Why? ")]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (3, "sets.quiz is 3: give the path of its files, or a mapping with files, fields, context"),
        ({"fields": ("a",)}, "sets.quiz is {'fields': ('a',)}: give the path"),
        ({"files": "x", "field": ("a",)}, "sets.quiz.field is not known: there are files, fields"),
        ({"files": "x", "context": ("a",)}, "sets.quiz has a context and no fields"),
        ({"files": "x", "fields": (1,)}, "sets.quiz.fields is (1,): give the key of a row"),
    ],
)
def test_entries_of_another_form_are_refused(section, message):
    with pytest.raises(SmoljaxError) as caught:
        evaluation_sets("config.evaluation.sets", {"quiz": section})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "section", "message"),
    [
        ("none", None, {}, "the evaluation set 'quiz': no file matches"),
        ("q.jsonl", b"", {}, "the evaluation set 'quiz' has no item"),
        ("q.jsonl", b'{"a": "b"}\n{"a"', {}, "q.jsonl is damaged"),
        ("q.jsonl", b"\xff\xfe", {}, "q.jsonl is damaged"),
        ("q.jsonl.gz", gzip.compress(b"[1]\n" * 99)[:-9], {}, "q.jsonl.gz is damaged"),
        ("q.jsonl.gz", gzip.compress(b"[1]\n")[:12] + b"\xff" * 9, {}, "q.jsonl.gz is damaged"),
        ("q.parquet", b"PAR1 and no more", {}, "q.parquet is damaged"),
        ("q.csv", b"a,b\n", {}, "q.csv has no ending that is known: name it .jsonl"),
        ("q.jsonl", b'{"a": "b"}\n', {"fields": ("q",)}, "item 0 has no field 'q': it has a"),
        ("q.jsonl", b'{"a": "b"}\n', {"fields": ("a.b",)}, "has no field 'a.b': it has no keys"),
        ("q.txt", b"text", {"fields": ("q",)}, "has no field 'q': it has no keys"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, name, content, section, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SmoljaxError) as caught:
        items({"files": str(tmp_path / name), **section})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_fingerprint_is_of_names_and_contents(tmp_path):
    def of(folder: str, rows: list, **section) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        files = write(tmp_path / folder, "q.jsonl", rows)
        return fingerprint(evaluation_sets("", {"quiz": {"files": files, **section}}))

    assert of("a", ROWS) == of("b", ROWS)
    assert len({of("a", ROWS), of("a", ROWS[:1]), of("a", ROWS, fields=("id",))}) == 3
