"""Held-out documents, chosen by the hash of their text: the same text is on the same side in every corpus."""

import pyarrow as pa
import xxhash

# Another seed than that of any other hash of the text, so that the choice is independent of it.
_SEED = 0x5E1DED


def heldout(batch: pa.RecordBatch, fraction: float) -> pa.Array:
    """Bool [rows]: True for about `fraction` (0 to 1) of all texts."""
    below = int(fraction * 2**64)
    texts = batch.column("text").to_pylist()
    return pa.array(
        [xxhash.xxh3_64_intdigest(text.encode(), _SEED) < below for text in texts], pa.bool_()
    )
