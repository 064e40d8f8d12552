"""The file of scores: what is read out of a language model's replies, which lines are refused, which documents are put up."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smoljax.errors import SmoljaxError
from smoljax.quality import annotations
from smoljax.quality.annotations import Annotation, parse_reply


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("It is a chapter with exercises.\nScore: 3", 3),
        ("**Score:** 4", 4),
        ("Educational score: **2**", 2),
        ("score = 2.5", 2.5),
        ("The score is 1.", 1),
        ("A first look says Score: 1, but on reflection\nScore: 4", 4),
        ("Score: 3/5", 3),
        ('{"score": 0}', 0),
        ('{"reason": "a list", "score": 1.5}', 1.5),
        ('Here: {"reason": "a list", "score": 2}', 2),
        ("5", 5),
        (" 2.5\n", 2.5),
        ("Score: 8/10", None),
        ("Score: 3-4", None),
        ("Score: 3 to 4", None),
        ("Score: 6", None),
        ("Score: -1", None),
        ("Score: high", None),
        ("I cannot judge this.", None),
        ("true", None),
        ('{"score": "3"}', None),
        ("NaN", None),
        ("[3]", None),
        ("", None),
        (None, None),
    ],
)
def test_scores_in_replies(reply, score):
    assert parse_reply(reply) == score


@pytest.fixture
def path(tmp_path):
    return tmp_path / "annotations.jsonl"


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))


def test_lines_of_each_kind(path):
    write(
        path,
        {"id": "a", "score": 3, "model": "m", "prompt": "p"},
        "",
        {"id": "b", "reply": "Score: 4", "request": "ignored"},
        {"id": "c", "score": 0.5, "text": "its own"},
        {"id": "d", "reply": "no idea"},
        {"id": "e", "reply": None},
    )
    found, failures = annotations.read(path)
    assert found == [
        Annotation("a", 3.0, None, "m", "p"),
        Annotation("b", 4.0, None, "", ""),
        Annotation("c", 0.5, "its own", "", ""),
    ]
    assert [failure.split(": ")[0] for failure in failures] == [f"{path}:5", f"{path}:6"]
    assert "'no idea'" in failures[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "2: not JSON"),
        ("[1]", r"2: \[1\] is not a JSON object"),
        ({"score": 3}, "2: id is None"),
        ({"id": 7, "score": 3}, "2: id is 7"),
        ({"id": "b"}, "2: neither score and reply"),
        ({"id": "b", "score": 1, "reply": "Score: 1"}, "2: both score and reply"),
        ({"id": "b", "score": "3"}, "2: score is '3': it must be a number from 0 to 5"),
        ({"id": "b", "score": 6}, "2: score is 6"),
        ({"id": "b", "score": True}, "2: score is True"),
        ('{"id": "b", "score": NaN}', "2: score is nan"),
        ({"id": "b", "score": 1, "text": 5}, "2: text is 5: it must be a string"),
        ({"id": "b", "reply": 5}, "2: reply is 5"),
        ({"id": "a", "score": 1}, "2: id 'a' has a score in line 1 already"),
    ],
)
def test_a_wrong_line_is_named(path, row, message):
    write(path, {"id": "a", "score": 3}, row)
    with pytest.raises(SmoljaxError, match=rf"annotations\.jsonl:{message}"):
        annotations.read(path)


def test_files_without_a_score(path):
    with pytest.raises(SmoljaxError, match=r"cannot be read \(No such file"):
        annotations.read(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SmoljaxError, match="not UTF-8"):
        annotations.read(path)
    path.write_text("")
    with pytest.raises(SmoljaxError, match=r"holds no score \(0 replies"):
        annotations.read(path)
    write(path, {"id": "a", "reply": "no"})
    with pytest.raises(
        SmoljaxError, match=r"holds no score \(1 replies without one: .*:1: no score"
    ):
        annotations.read(path)


@pytest.fixture
def documents(tmp_path):
    """Sources a and b, 30 training documents each and a held-out one."""
    folder = tmp_path / "documents"
    for source in "ab":
        for split, count in (("train", 30), ("heldout", 1)):
            ids = [f"{source}-{split}-{number}" for number in range(count)]
            texts = [f"{name} {'long ' * 1000}" for name in ids]
            (folder / source / split).mkdir(parents=True)
            table = pa.table({"id": ids, "text": texts})
            pq.write_table(table, folder / source / split / "00000.parquet")
    return folder


def requests(documents, tmp_path, **options) -> list[dict]:
    count = annotations.write_requests(documents, tmp_path / "requests.jsonl", **options)
    rows = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert len(rows) == count
    return rows


def test_requests_hold_the_rubric_and_the_beginning(documents, tmp_path):
    rows = requests(documents, tmp_path, count=10)
    assert len({row["id"] for row in rows}) == 10
    for row in rows:
        assert "train" in row["id"]
        assert f"<<<\n{row['id']} long" in row["request"]
        assert len(row["request"]) < len(annotations.RUBRIC) + annotations.EXCERPT_CHARACTERS
        assert row["prompt"] == annotations.PROMPT
    assert {row["id"][0] for row in rows} == {"a", "b"}
    answered = [row | {"reply": "Score: 2"} for row in rows]
    write(tmp_path / "annotations.jsonl", *answered)
    assert len(annotations.read(tmp_path / "annotations.jsonl")[0]) == 10


def test_more_requests_are_the_same_and_more(documents, tmp_path):
    few, many, everything = (
        [row["id"] for row in requests(documents, tmp_path, count=count)] for count in (5, 20, 999)
    )
    assert many[:5] == few
    assert everything[:20] == many
    assert len(everything) == 60
    of_b = requests(documents, tmp_path, count=999, sources=("b",))
    assert [row["id"] for row in of_b] == [name for name in everything if name[0] == "b"]


def test_texts_are_looked_up_in_all_splits(documents):
    found = annotations.look_up(documents, {"a-train-3", "b-heldout-0", "gone"})
    assert set(found) == {"a-train-3", "b-heldout-0"}
    assert found["a-train-3"].startswith("a-train-3 long")
