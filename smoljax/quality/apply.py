"""Scores every document: WORKDIR/documents to WORKDIR/quality/scores, file by file.

A file's scores are made anew only when the file, the embedder or the head has changed. So a run that was stopped goes on, and
another threshold (select.py) embeds nothing again.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from smoljax.curation import items, storage
from smoljax.progress import Progress
from smoljax.quality.embedders import Embedder
from smoljax.quality.head import Head
from smoljax.quality.scores import SCORES, File

# Raised when the same document, embedder and head give another score than before.
CODE_VERSION = 1
# Texts that are embedded together: enough to fill batches of each length.
_ROWS = 2048


def score(
    files: Sequence[File], directory: Path, *, embedder: Embedder, head: Head
) -> dict[str, str]:
    """Brings `directory/<file name>/scores.npy`, f32 [rows], up to date for the judged files.

    Folders of other names are removed.

    Returns:
      for each judged file, by its name, a hash of all that its scores depend on.

    Raises:
      SmoljaxError: a vector is not finite, or the disk is full.
      KeyboardInterrupt: on Ctrl-C; the files that are done stay.
    """
    judged = [file for file in files if file.judged]
    total = sum(file.rows for file in judged)
    progress = Progress("score", total, unit="documents")

    def work(file: File, folder: Path) -> dict:
        parts = [np.empty(0, np.float32)]
        for texts in _texts(file.path):
            parts.append(head.scores(*embedder.embed(texts, chunks=head.chunks)))
            progress.update(done + sum(map(len, parts)))
        np.save(folder / SCORES, np.concatenate(parts))
        return {}

    storage.make_folder(str(directory))
    storage.remove_others(str(directory), {file.name for file in judged})
    fingerprints = embedder.fingerprint, head.fingerprint
    all_items = [
        items.WorkItem(
            name=file.name,
            key=items.hash_of(CODE_VERSION, file.sha256, *fingerprints),
            work=work,
            argument=file,
            size=file.rows,
            label=str(file.path),
        )
        for file in judged
    ]
    todo = [item for item in all_items if items.finished(item, str(directory)) is None]
    done = total - sum(item.size for item in todo)
    progress.start_at(done)
    for item in todo:
        items.run_item(item, str(directory))
        done += item.size
        progress.update(done)
    if todo:
        progress.close()
    return {item.name: item.key for item in all_items}


def _texts(path: Path) -> Iterator[list[str]]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS, columns=["text"]):
            yield batch.column("text").to_pylist()
