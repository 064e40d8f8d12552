"""What a work item writes into its folder: Parquet files of documents, and counts by stage."""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smoljax.curation import items, schema
from smoljax.curation.chain import Step

# Columns whose values repeat. A dictionary of texts, and which is the least, take 14 MB and tell nobody anything.
_REPEATED = ("source", "media_type", "language", "reason")


# Of text, in a row group: small ones cost more for their columns than for what is in them.
_GROUP_BYTES, _GROUP_ROWS = 1 << 19, 512


class Writer:
    """A Parquet file; the same batches give the same bytes. Small batches share a row group."""

    def __init__(self, path: Path, batch_schema: pa.Schema, *, compression: str = "zstd"):
        self._path, self._schema, self._compression = path, batch_schema, compression

    def __enter__(self) -> "Writer":
        self._file = pq.ParquetWriter(
            self._path,
            self._schema,
            compression=self._compression,
            use_dictionary=[name for name in self._schema.names if name in _REPEATED],
            write_statistics=False,
        )
        self._waiting: list[pa.RecordBatch] = []
        self._rows = self._bytes = 0
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self._flush()
        self._file.close()

    def write(self, batch: pa.RecordBatch) -> None:
        """Adds the rows of a batch."""
        if not batch.num_rows:
            return
        self._waiting.append(batch.cast(self._schema))
        self._rows += batch.num_rows
        self._bytes += text_bytes(batch)
        if self._bytes >= _GROUP_BYTES or self._rows >= _GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._file.write_batch(pa.concat_batches(self._waiting))
        self._waiting, self._rows, self._bytes = [], 0, 0


def read(folder: str, name: str) -> Iterator[pa.RecordBatch]:
    """The row groups of a finished item's file, after its content was compared with the manifest."""
    table = pq.ParquetFile(items.verified(folder, name))
    for group in range(table.num_row_groups):
        yield from table.iter_batches(1 << 20, [group], use_threads=False)


def text_bytes(batch: pa.RecordBatch) -> int:
    """UTF-8 bytes of the texts of a batch; 0 for raw pages."""
    if "text" not in batch.schema.names:
        return 0
    return pc.sum(pc.binary_length(batch.column("text"))).as_py() or 0


class Counts:
    """Kept and removed rows, bytes of text before and after, edits and seconds by stage, summed over batches."""

    def __init__(self):
        self.stages: dict[str, dict] = {}

    def run(self, step: Step, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, pa.RecordBatch]:
        """Runs a stage on a batch, and counts."""
        start = time.monotonic()
        kept, removed = step.run(batch)
        self.add(step.name, kept, removed, time.monotonic() - start)
        entry = self.stages[step.name]
        # A stage that edits leaves fewer or more bytes than it was given.
        entry["read_bytes"] += text_bytes(batch) - text_bytes(kept) - text_bytes(removed)
        if step.edits is not None:
            entry["edits"] = dict(sorted(step.edits.items()))
        return kept, removed

    def add(
        self, stage: str, kept: pa.RecordBatch, removed: pa.RecordBatch, seconds: float = 0.0
    ) -> None:
        """Counts one batch of a stage."""
        entry = self.expect(stage)
        entry["kept"] += kept.num_rows
        entry["kept_bytes"] += text_bytes(kept)
        entry["read_bytes"] += text_bytes(kept) + text_bytes(removed)
        entry["seconds"] = round(entry["seconds"] + seconds, 4)
        reasons = entry["removed_by_reason"]
        for reason, count in Counter(removed.column("reason").to_pylist()).items():
            reasons[reason] = reasons.get(reason, 0) + count

    def expect(self, stage: str) -> dict:
        """The entry of a stage, which is there even if no document reaches it."""
        empty = {"kept": 0, "kept_bytes": 0, "read_bytes": 0, "removed_by_reason": {}}
        return self.stages.setdefault(stage, empty | {"edits": {}, "seconds": 0.0})


def without_text(removed: pa.RecordBatch) -> pa.RecordBatch:
    """Removed rows as REMOVED documents: raw pages lose their bytes."""
    return schema.removed_raw(removed) if "content" in removed.schema.names else removed
