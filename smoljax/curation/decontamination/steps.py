"""The work items of decontamination: the index before all else, and behind it what was hit, read off what was removed.

Folders under `<workdir>/curation/`:
  evaluation/all/         the index (`index`)
  contamination/NNNNN/    hits.jsonl, {"id", "source", "path", "set", "item", "ngram"} each; items.npy, bool [items]
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smoljax import files
from smoljax.curation import items as work_items
from smoljax.curation.decontamination.evaluation_sets import EvaluationSet
from smoljax.curation.decontamination.index import Index, build

PREFIX = "decontamination:"
_COLUMNS = ["id", "source", "path", "text", "reason"]


def build_index(argument: tuple[Sequence[EvaluationSet], int], folder: Path) -> dict:
    """Writes the index of some sets' n-grams; returns the counts of each set."""
    sets, ngram = argument
    return build((item for wanted in sets for item in wanted.items()), folder, ngram=ngram)


def find_hits(argument: tuple[str, str], folder: Path) -> dict:
    """Looks again at the documents of a shard that were removed for an n-gram, and writes all that they share.

    A line for each item that is the first to have one of the document's n-grams, with that n-gram; items.npy marks
    every item that shares one. Returns {"documents": {set: documents that share an n-gram with it}}.
    """
    removed, index_folder = argument
    index = Index(index_folder)
    hit = np.zeros(index.size, bool)
    documents: Counter[str] = Counter()
    with open(folder / "hits.jsonl", "w", encoding="utf-8") as lines:
        for row in _contaminated(removed):
            first: dict[int, str] = {}
            touched: set[int] = set()
            for match in index.matches(row["text"]):
                first.setdefault(match.items[0], match.ngram)
                touched.update(match.items)
            hit[list(touched)] = True
            documents.update({index.item(number)[0] for number in touched})
            for number, ngram in first.items():
                name, place = index.item(number)
                found = {key: row[key] for key in ("id", "source", "path")}
                found |= {"set": name, "item": place, "ngram": ngram}
                lines.write(json.dumps(found, ensure_ascii=False) + "\n")
    np.save(folder / "items.npy", hit)
    return {"documents": dict(sorted(documents.items()))}


def summary(
    index_folder: str,
    counts: Mapping[str, Mapping],
    folders: Sequence[str],
    results: Sequence[Mapping],
) -> dict:
    """{set: {"items", "short", "ngrams", "items_hit", "documents"}}.

    `items_hit` are the items of which some removed document has an n-gram, `documents` those documents.

    Args:
      index_folder: of `build_index`, and `counts` its result.
      folders: of `find_hits`, and `results` theirs.
    """
    index = Index(index_folder)
    hit = np.zeros(index.size, bool)
    documents: Counter[str] = Counter()
    for folder, result in zip(folders, results):
        hit |= np.load(work_items.verified(folder, "items.npy"))
        documents.update(result["documents"])
    work_items.forget_fetched()
    items_hit = Counter(index.item(number)[0] for number in np.flatnonzero(hit))
    return {
        name: {**count, "items_hit": items_hit[name], "documents": documents[name]}
        for name, count in counts.items()
    }


def write_hits(documents: Path, folders: Sequence[str], found: Mapping) -> None:
    """Writes decontamination.json, what was `found`, and decontamination.jsonl, every hit in the order of the folders."""
    files.atomic_write_json(documents / "decontamination.json", found)
    with open(documents / "decontamination.jsonl", "wb") as target:
        for folder in folders:
            with open(work_items.verified(folder, "hits.jsonl"), "rb") as hits:
                shutil.copyfileobj(hits, target)
    work_items.forget_fetched()


def _contaminated(folder: str) -> Iterator[dict]:
    """The rows of a shard's removed documents that an n-gram removed."""
    file = pq.ParquetFile(work_items.verified(folder, "removed.parquet"))
    for group in range(file.num_row_groups):
        reasons = file.read_row_group(group, columns=["reason"]).column("reason")
        chosen = pc.starts_with(reasons, PREFIX)
        if pc.any(chosen).as_py():
            rows: pa.Table = file.read_row_group(group, columns=_COLUMNS).filter(chosen)
            yield from rows.to_pylist()
