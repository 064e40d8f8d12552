"""What a run left behind, read and checked for the report; a missing piece is named with the step that makes it."""

import dataclasses
import hashlib
import heapq
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from smoljax import configuration
from smoljax.errors import SmoljaxError, require
from smoljax.tokens.config import TokenizerConfig
from smoljax.tokens.shards import shard_directory
from smoljax.tokens.tokenizer import Tokenizer
from smoljax.training.metrics import JSONL, read_metrics

VERB_OF = {
    "documents/manifest.json": "curate --only=documents",
    "tokenizer/manifest.json": "curate --only=tokenizer",
    "shards": "curate --only=shards",
    "train/config.json": "train",
    "evaluation.json": "evaluate",
    "samples.json": "generate --samples=yes",
}


@dataclasses.dataclass(frozen=True, order=True)
class Document:
    """One document, as the report shows it."""

    source: str
    path: str
    language: str
    text: str
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The outputs of every step of a run.

    Attributes:
      workdir: folder of the run.
      documents: documents/manifest.json.
      tokenizer: the tokenizer that made the shards.
      tokenizer_kind: what its manifest calls it, or where it was loaded from.
      shards: manifest of the shards of each source that was trained on.
      config: the config that was trained.
      metrics: rows of train/metrics.jsonl.
      evaluation: evaluation.json.
      samples: samples.json.
    """

    workdir: Path
    documents: dict
    tokenizer: Tokenizer
    tokenizer_kind: str
    shards: dict[str, dict]
    config: dict
    metrics: list[dict]
    evaluation: dict
    samples: dict

    def kept_examples(self, count: int) -> dict[str, list[Document]]:
        """For each source, `count` training documents, chosen by the hash of their id."""
        return {
            source: _few(_documents(self.workdir / "documents" / source / "train"), count)
            for source in self.documents["sources"]
        }

    def removed_examples(self, count: int) -> dict[str, tuple[int, list[Document]]]:
        """For each reason, most frequent first: how many it removed, and `count` of them, of any source."""
        heaps: dict[str, list] = {}
        numbers: dict[str, int] = {}
        for source in self.documents["sources"]:
            for order, document in _documents(self.workdir / "documents" / source / "removed"):
                _push(heaps.setdefault(document.reason, []), count, order, document)
                numbers[document.reason] = numbers.get(document.reason, 0) + 1
        reasons = sorted(heaps, key=lambda reason: (-numbers[reason], reason))
        return {reason: (numbers[reason], _ordered(heaps[reason])) for reason in reasons}

    def heldout_example(self) -> Document | None:
        """One held-out document of the first source that has any."""
        for source in self.documents["sources"]:
            few = _few(_documents(self.workdir / "documents" / source / "heldout"), 1)
            if few:
                return few[0]
        return None


def read_inputs(workdir: Path) -> Inputs:
    """Reads everything but the documents themselves.

    Raises:
      SmoljaxError: a file is missing or damaged; the message names it and the verb that makes it.
    """
    config = _read_json(workdir, "train/config.json")
    settings = configuration.build(TokenizerConfig, config["tokenizer"], "tokenizer")
    metrics = read_metrics(workdir / "train")
    if not metrics:
        raise _missing(workdir / "train" / JSONL, "train")
    return Inputs(
        workdir=workdir,
        documents=_read_json(workdir, "documents/manifest.json"),
        tokenizer_kind=(
            f"loaded from {settings.directory}"
            if settings.directory
            else _read_json(workdir, "tokenizer/manifest.json")["kind"]
        ),
        tokenizer=settings.load(workdir),
        shards=_read_shards(
            Path(config["data"].get("directory") or workdir / "shards"), config["data"]["sources"]
        ),
        config=config,
        metrics=metrics,
        evaluation=_read_json(workdir, "evaluation.json"),
        samples=_read_json(workdir, "samples.json"),
    )


def _read_json(workdir: Path, name: str) -> dict:
    return _load(workdir / name, VERB_OF[name])


def _load(path: Path, verb: str) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _missing(path, verb) from error
    except ValueError as error:
        raise SmoljaxError(
            f"{path} is damaged ({error}): remove it and make it again with `python -m smoljax.{verb}`"
        ) from error


def _missing(path: Path, verb: str) -> SmoljaxError:
    return SmoljaxError(
        f"the report needs {path}, which is missing: make it with `python -m smoljax.{verb}` "
        "and the same --config and --workdir"
    )


def _read_shards(directory: Path, sources: Sequence[str]) -> dict[str, dict]:
    return {
        source: _load(shard_directory(directory, source) / "manifest.json", VERB_OF["shards"])
        for source in sources
    }


def _documents(folder: Path) -> Iterator[tuple[str, Document]]:
    """(order, document) of each document in a folder; the order is that of a hash of the id."""
    parquet = require("pyarrow.parquet", extra="data")
    fields = [field.name for field in dataclasses.fields(Document)]
    for path in sorted(folder.glob("*.parquet")):
        file = parquet.ParquetFile(path)
        columns = [name for name in ("id", *fields) if name in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=64, columns=columns):
            for row in batch.to_pylist():
                order = hashlib.sha256(row.pop("id").encode()).hexdigest()
                yield order, Document(**row)


def _few(documents: Iterator[tuple[str, Document]], count: int) -> list[Document]:
    heap: list = []
    for order, document in documents:
        _push(heap, count, order, document)
    return _ordered(heap)


def _push(heap: list, count: int, order: str, document: Document) -> None:
    """Keeps the `count` smallest orders; heapq pops the smallest, so orders are stored negated."""
    item = (-int(order, 16), document)
    if len(heap) < count:
        heapq.heappush(heap, item)
    elif item[0] > heap[0][0]:
        heapq.heapreplace(heap, item)


def _ordered(heap: list) -> list[Document]:
    return [document for _, document in sorted(heap, key=lambda item: -item[0])]
