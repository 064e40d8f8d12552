"""What is compared of a batch of documents: hashes of their texts, and their signatures.

Where only documents of one language are compared, both are mixed with a hash of the language. So one sort serves all
languages; documents of two languages could only meet if all their hashes differed by the same 64 bits.
"""

import numpy as np
import pyarrow as pa
import xxhash

from smoljax.curation import schema
from smoljax.curation.dedup import exact, minhash
from smoljax.curation.dedup.config import DedupConfig


def hashes(batch: pa.RecordBatch, config: DedupConfig) -> np.ndarray:
    """Of documents, uint64 [rows, 2]: equal where their texts are, as `config` compares them."""
    texts = batch.column("text").to_pylist()
    if config.ignore_whitespace:
        texts = ["".join(text.split()) for text in texts]
    return exact.text_hashes(texts) ^ _languages(batch, config)


def signatures(batch: pa.RecordBatch, config: DedupConfig) -> tuple[np.ndarray, np.ndarray]:
    """As `minhash.signatures`, of documents in any languages."""
    texts = batch.column("text").to_pylist()
    languages = np.array(
        [code or schema.LANGUAGE for code in batch.column("language").to_pylist()], str
    )
    width = config.minhash.buckets * config.minhash.hashes_per_bucket
    found, valid = np.empty((len(texts), width), np.uint64), np.empty(len(texts), bool)
    for code in np.unique(languages).tolist():
        at = np.flatnonzero(languages == code)
        found[at], valid[at] = minhash.signatures([texts[i] for i in at], config.minhash, code)
    return found ^ _languages(batch, config), valid


def _languages(batch: pa.RecordBatch, config: DedupConfig) -> np.ndarray:
    """uint64 [rows, 1]: what keeps the languages apart, 0 where they need not be."""
    if not config.by_language:
        return np.zeros((batch.num_rows, 1), np.uint64)
    codes = batch.column("language").to_pylist()
    found = [0 if code is None else xxhash.xxh3_64_intdigest(code) for code in codes]
    return np.array(found, np.uint64).reshape(-1, 1)
