"""Scores of documents from any language model: the file, the requests that a model gets, and what its replies mean.

The file is JSONL, one document a line:

    {"id": "...", "score": 3, "model": "...", "prompt": "education-1a2b3c4d"}
    {"id": "...", "reply": "The page explains ... Score: 3", "model": "...", "prompt": "..."}

  id      of a document in WORKDIR/documents, unless the line brings its own `text`
  score   0 to 5, whole or not; or instead of it
  reply   what the language model answered, in which "Score: 3", {"score": 3} or 3 alone is found
  text    the document itself, for scores of another corpus
  model, prompt   who judged, and by which rubric; for the record

Other fields are left alone, so a line of the requests with `reply` added is a line of this file.
"""

import dataclasses
import hashlib
import heapq
import json
import math
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from smoljax import files
from smoljax.errors import SmoljaxError, require
from smoljax.quality.config import MAX_SCORE
from smoljax.tokens.documents import find_sources
from smoljax.tokens.shards import SPLITS

# What the judge sees of a document: about as much as an embedder that reads 512 tokens.
EXCERPT_CHARACTERS = 2500
RUBRIC = """Below is the beginning of a document. Judge how much someone who is at school, from the first grades to the \
last, could learn from it. Start at 0 and add one point for each statement that is true, in this order; stop at the first that is not:

1. It says something correct about a subject that is taught, even if advertising, menus or small talk stand around it.
2. That subject is what most of it is about, though it may be told without order or mixed with other matters.
3. It explains its subject in order and in plain words, so that a teacher could use parts of it in class.
4. It reads like a chapter of a textbook or a good tutorial: one subject, built up step by step, with examples or \
exercises, and hardly anything beside the point.
5. It could be handed to pupils as it is: complete, exact, free of distraction, with reasons given for what it claims.

Lists of links or products, price tables, licences, logs and texts that only experts can follow earn 0 or 1.

Document:
<<<
{excerpt}
>>>

Give your reasons in at most 60 words. Then end with a line of exactly this form, with a whole number from 0 to 5:
Score: N"""
PROMPT = f"education-{hashlib.sha256(RUBRIC.encode()).hexdigest()[:8]}"

_SCORE = re.compile(
    r"""score[\s"'*_`]*(?:[:=]|\bis\b)[\s"'*_`]*(?P<number>-?\d+(?:\.\d+)?)(?:\s*/\s*(?P<of>\d+))?"""
    r"(?P<range>\s*(?:-|–|to)\s*\d)?",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Annotation:
    """The score of one document; `text` is None where the document is to be looked up by its id."""

    id: str
    score: float
    text: str | None
    model: str
    prompt: str


def read(path: Path | str) -> tuple[list[Annotation], list[str]]:
    """The annotations of a file in its order, and one sentence for each reply in which no score was found.

    Raises:
      SmoljaxError: the file is missing or holds no score, or a line is not of the format; it names the file, the
        line, what is there and what is expected.
    """
    path = Path(path)
    found: dict[str, Annotation] = {}
    lines: dict[str, int] = {}
    failures = []
    for number, line in enumerate(_lines(path), start=1):
        place = f"{path}:{number}"
        if not line.strip():
            continue
        row = _row(place, line)
        if row["id"] in lines:
            raise SmoljaxError(
                f"{place}: id {row['id']!r} has a score in line {lines[row['id']]} already: keep one of the two"
            )
        lines[row["id"]] = number
        score = row["score"] if "score" in row else parse_reply(row["reply"])
        if score is None:
            failures.append(
                f"{place}: no score from 0 to {MAX_SCORE} in the reply {_short(row['reply'])}"
            )
            continue
        found[row["id"]] = Annotation(
            row["id"], float(score), row.get("text"), row.get("model", ""), row.get("prompt", "")
        )
    if not found:
        raise SmoljaxError(
            f"{path} holds no score ({len(failures)} replies without one{': ' + failures[0] if failures else ''}): "
            'each line needs {"id": ..., "score": 0 to 5} or {"id": ..., "reply": "... Score: 3"}'
        )
    return list(found.values()), failures


def parse_reply(reply: str | None) -> float | None:
    """The score in a language model's reply: a JSON number, {"score": 3}, or the last "Score: 3" in its text.

    None where there is none, or one that is not from 0 to 5, is a range ("3-4") or is out of another number ("8/10").
    """
    try:
        value = json.loads(reply or "")
        value = value.get("score") if isinstance(value, dict) else value
    except (ValueError, RecursionError):
        matches = list(_SCORE.finditer(reply or ""))
        if not matches or matches[-1]["range"] or matches[-1]["of"] not in (None, str(MAX_SCORE)):
            return None
        value = float(matches[-1]["number"])
    return float(value) if _is_score(value) else None


def write_requests(
    documents_dir: Path | str, path: Path | str, *, count: int, sources: Collection[str] = ()
) -> int:
    """Writes requests to score `count` training documents, chosen by the hash of their ids; returns how many they are.

    A line is {"id", "prompt", "request"}: send `request` to a language model, add its answer as `reply`. The choice is
    the same whatever else changes: a larger count has the documents of a smaller one, and more.

    Args:
      documents_dir: WORKDIR/documents.
      path: the file to write.
      count: at most this many.
      sources: to choose from; all when empty.
    """
    chosen: list = []  # The `count` smallest hashes; heapq pops the smallest, so they are stored negated.
    for document_id in _ids(Path(documents_dir), sources):
        item = -int(hashlib.sha256(f"annotate {document_id}".encode()).hexdigest(), 16), document_id
        if len(chosen) < count:
            heapq.heappush(chosen, item)
        elif item > chosen[0]:
            heapq.heapreplace(chosen, item)
    ids = [document_id for _, document_id in sorted(chosen, reverse=True)]
    texts = look_up(documents_dir, ids)
    rows = (
        {
            "id": document_id,
            "prompt": PROMPT,
            "request": RUBRIC.replace("{excerpt}", texts[document_id][:EXCERPT_CHARACTERS]),
        }
        for document_id in ids
    )
    files.atomic_write_text(
        path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    )
    return len(ids)


def look_up(documents_dir: Path | str, ids: Collection[str]) -> dict[str, str]:
    """Texts of the documents with these ids, train and held-out; ids that are not there are left out."""
    pa = require("pyarrow", extra="data")
    compute = require("pyarrow.compute", extra="data")
    wanted = pa.array(sorted(ids), pa.string())
    texts: dict[str, str] = {}
    for source in find_sources(documents_dir):
        for split in SPLITS:
            for batch in _batches(Path(documents_dir) / source / split, ["id", "text"]):
                rows = batch.filter(compute.is_in(batch.column("id"), value_set=wanted))
                texts |= zip(rows.column("id").to_pylist(), rows.column("text").to_pylist())
    return texts


def _ids(documents_dir: Path, sources: Collection[str]) -> Iterator[str]:
    for source in find_sources(documents_dir):
        if not sources or source in sources:
            for batch in _batches(documents_dir / source / "train", ["id"]):
                yield from batch.column("id").to_pylist()


def _batches(folder: Path, columns: list[str]) -> Iterator:
    parquet = require("pyarrow.parquet", extra="data")
    for path in sorted(folder.glob("*.parquet")):
        with parquet.ParquetFile(path) as file:
            yield from file.iter_batches(1024, columns=columns)


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from file
    except OSError as error:
        raise SmoljaxError(
            f"annotations {path} cannot be read ({error.strerror}): name the file in config.quality.annotations"
        ) from error
    except UnicodeDecodeError as error:
        raise SmoljaxError(f"annotations {path} is not UTF-8 text: {error}") from error


def _row(place: str, line: str) -> dict:
    """One line as a dict with an id and one of score and reply, checked."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SmoljaxError(
            f"{place}: not JSON ({error}); a line is one JSON object, as the file's format says"
        ) from error
    if not isinstance(row, dict):
        raise SmoljaxError(f"{place}: {_short(row)} is not a JSON object with id and score")
    if not isinstance(row.get("id"), str) or not row["id"]:
        raise SmoljaxError(
            f"{place}: id is {_short(row.get('id'))}: it must be a document's id, a string"
        )
    if ("score" in row) == ("reply" in row):
        raise SmoljaxError(
            f"{place}: {'both' if 'score' in row else 'neither'} score and reply: give one of them"
        )
    if "score" in row and not _is_score(row["score"]):
        raise SmoljaxError(
            f"{place}: score is {_short(row['score'])}: it must be a number from 0 to {MAX_SCORE}"
        )
    for name in ("text", "model", "prompt", "reply"):
        optional = (str, type(None)) if name == "reply" else str
        if name in row and not isinstance(row[name], optional):
            raise SmoljaxError(f"{place}: {name} is {_short(row[name])}: it must be a string")
    return row


def _is_score(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and 0 <= value <= MAX_SCORE


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:40]}...{text[-37:]}"
