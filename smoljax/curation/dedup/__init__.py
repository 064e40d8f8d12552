"""Duplicates over the whole corpus: `exact` (equal texts), and MinHash (`minhash`, `bands`, `clusters`)."""

from smoljax.curation.dedup.exact import first_rows, text_hashes

__all__ = ["first_rows", "text_hashes"]
