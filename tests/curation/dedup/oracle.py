"""datatrove's MinHash: its signatures, and its four stages on a disk."""

import struct
from functools import cache
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupSignature,
)
from datatrove.utils.hashing import HashConfig

from smoljax.curation.dedup.minhash import MinHashConfig

# ISO 639-1 to the names of datatrove.
_LANGUAGES = {
    "en": "eng",
    "fr": "fra",
    "es": "spa",
    "de": "deu",
    "it": "ita",
    "pt": "por",
    "ru": "rus",
    "pl": "pol",
}


def signatures(
    texts: list[str], config: MinHashConfig, language: str
) -> tuple[np.ndarray, np.ndarray]:
    """What `minhash.signatures` has to return; the text is cut here, as FinePDFs' script does it before datatrove."""
    step = _signature_step(config, language)
    found = np.full(
        (len(texts), config.buckets * config.hashes_per_bucket), (1 << 61) - 1, np.uint64
    )
    valid = np.zeros(len(texts), bool)
    for row, text in enumerate(texts):
        shingles = step.get_shingles(text[: config.max_characters])
        if shingles.size:
            found[row] = np.concatenate(
                [np.array(b, np.uint64) for b in step.get_signature(shingles)]
            )
            valid[row] = True
    return found, valid


def clusters(
    shards: list[list[str]], config: MinHashConfig, folder: Path
) -> tuple[set[frozenset[tuple[int, int]]], int]:
    """Clusters of more than one document as sets of (shard, row), and how many documents are removed."""
    theirs = _config(config)
    step = MinhashDedupSignature(str(folder / "signatures"), theirs)
    for rank, texts in enumerate(shards):
        documents = (Document(text=text, id=str(row)) for row, text in enumerate(texts))
        step.run(documents, rank, len(shards))
    for bucket in range(config.buckets):
        stage = MinhashDedupBuckets(
            str(folder / "signatures"), str(folder / "edges"), config=theirs
        )
        stage.run(None, bucket, config.buckets)
    MinhashDedupCluster(
        str(folder / "edges"), str(folder / "clusters"), theirs, save_cluster_id=True
    ).run(None, 0, 1)
    members: dict[int, set[tuple[int, int]]] = {}
    for path in (folder / "clusters").glob("*.clusters"):
        for row, cluster in struct.iter_unpack("<2I", path.read_bytes()):
            members.setdefault(cluster, set()).add((int(path.stem), row))
    removed = sum(path.stat().st_size // 4 for path in (folder / "clusters").glob("*.remove"))
    return {frozenset(cluster) for cluster in members.values()}, removed


@cache
def _signature_step(config: MinHashConfig, language: str) -> MinhashDedupSignature:
    return MinhashDedupSignature("memory://unused", _config(config), _LANGUAGES[language])


def _config(config: MinHashConfig) -> MinhashConfig:
    hashes = HashConfig(hash_fc={"sha1": "sha1", "xxh64": "xxhash"}[config.hash])
    return MinhashConfig(
        config.ngram, config.buckets, config.hashes_per_bucket, config.seed, hash_config=hashes
    )
