"""What a formatter is made of: it edits texts, one after the other, and removes none."""

from collections import Counter

import pyarrow as pa

from smoljax.curation import schema


class Formatter:
    """Edits the documents of a shard, in their order: `formatter(batch) -> batch`.

    Attributes:
      edits: what was edited so far, counted by kind; "documents" counts the texts that changed.
    """

    def __init__(self):
        self.edits: Counter[str] = Counter()

    def edit(self, text: str) -> str:
        """One text as it is to be."""
        raise NotImplementedError

    def __call__(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        before = batch.column("text").to_pylist()
        after = [self.edit(text) for text in before]
        changed = sum(old != new for old, new in zip(before, after))
        if not changed:
            return batch
        self.edits["documents"] += changed
        return schema.replace(batch, text=pa.array(after, pa.string()))
