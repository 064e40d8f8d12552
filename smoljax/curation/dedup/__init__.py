"""Duplicates over the whole corpus: equal texts (`exact`), and near-duplicates by MinHash (`minhash`, `bands`, `clusters`).

`config` says which documents are compared, `compared` what of them.
"""

from smoljax.curation.dedup.bands import write_edges
from smoljax.curation.dedup.clusters import cluster_sizes, read_edges
from smoljax.curation.dedup.compared import hashes, signatures
from smoljax.curation.dedup.config import DedupConfig
from smoljax.curation.dedup.exact import copies
from smoljax.curation.dedup.minhash import MinHashConfig
from smoljax.curation.dedup.signature_files import Writer as SignatureWriter

__all__ = [
    "DedupConfig",
    "MinHashConfig",
    "SignatureWriter",
    "cluster_sizes",
    "copies",
    "hashes",
    "read_edges",
    "signatures",
    "write_edges",
]
