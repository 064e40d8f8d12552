"""The columns that pass between curation stages, and how a batch is parted into kept and removed.

A stage is any function `RecordBatch -> (kept RecordBatch, removed RecordBatch)`, a pure function of its
batch: no clock, no randomness, no memory of other batches. The removed batch has the columns of the input and
one more, `reason`, that holds "stage:rule".
"""

from collections.abc import Callable, Sequence

import pyarrow as pa

# Of documents without a language: whose words they have.
LANGUAGE = "en"

Stage = Callable[[pa.RecordBatch], tuple[pa.RecordBatch, pa.RecordBatch]]

# What a reader delivers: the bytes of one document and where they came from.
RAW = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("url", pa.string()),
        pa.field("media_type", pa.string(), nullable=False),
        pa.field("content", pa.binary(), nullable=False),
    ]
)

# What is written for training. The url is null where the input has none, the language where it was not asked for
# (code), and the size of the cluster of near-duplicates where none was looked for.
DOCUMENT = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("url", pa.string()),
        pa.field("media_type", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("language", pa.string()),
        pa.field("language_score", pa.float32()),
        pa.field("cluster_size", pa.int32()),
    ]
)

REASON = pa.field("reason", pa.string(), nullable=False)
REMOVED = DOCUMENT.append(REASON)


def part(
    batch: pa.RecordBatch, reasons: Sequence[str | None]
) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    """Parts `batch` by `reasons`, one per row: None keeps the row, a string "stage:rule" removes it."""
    if len(reasons) != batch.num_rows:
        raise ValueError(f"{len(reasons)} reasons for {batch.num_rows} rows")
    reason = pa.array(reasons, pa.string())
    # Batches of pages are large: one that stays whole is not copied.
    kept = batch if reason.null_count == len(reason) else batch.filter(reason.is_null())
    removed = batch.filter(reason.is_valid())
    columns = [*removed.columns, reason.drop_null()]
    return kept, pa.RecordBatch.from_arrays(columns, schema=batch.schema.append(REASON))


def replace(batch: pa.RecordBatch, **columns: pa.Array) -> pa.RecordBatch:
    """`batch` with the named columns replaced, in the same order and with the same schema."""
    arrays = [columns.get(name, column) for name, column in zip(batch.schema.names, batch.columns)]
    return pa.RecordBatch.from_arrays(arrays, schema=batch.schema)


def documents(raw: pa.RecordBatch, texts: Sequence[str]) -> pa.RecordBatch:
    """A DOCUMENT batch of raw rows and their texts; what later stages find out is null."""
    columns = {name: raw.column(name) for name in ("id", "source", "path", "url", "media_type")}
    columns["text"] = pa.array(texts, pa.string())
    arrays = [columns.get(field.name, pa.nulls(raw.num_rows, field.type)) for field in DOCUMENT]
    return pa.RecordBatch.from_arrays(arrays, schema=DOCUMENT)


def removed_raw(raw: pa.RecordBatch) -> pa.RecordBatch:
    """Removed raw rows (RAW plus reason) as removed documents without text."""
    blank = documents(raw, [""] * raw.num_rows)
    return pa.RecordBatch.from_arrays([*blank.columns, raw.column("reason")], schema=REMOVED)
