"""Which documents are worth training on: a language model judges a few, a linear head on frozen embeddings judges the rest.

The method of FineWeb-Edu (Penedo et al. 2024, section 4): a language model gives some thousand documents a score from 0 to
5; one linear output on a frozen embedder learns to foretell it; documents whose score is too low are removed.

  config.py       the section `quality` of a config, and the rules by which documents are kept
  annotations.py  the file of scores; the requests for a language model and what its replies mean
  embedders.py    texts to vectors: a sentence-transformers folder (bert.py), or the hidden states of our own model
  head.py         the regression, and what it is worth on annotations that it has not seen (evaluation.py)
  apply.py        WORKDIR/documents to a score of each document, by all devices of this host (scores.py: where it lies)
  select.py       documents and scores to WORKDIR/selected, by processes
  run.py          all of it in order: `python -m smoljax.curate --only=quality`

It stands beside smoljax.curation, which never imports jax.

Measured on two cores (Intel Xeon) with all-MiniLM-L6-v2: 32 documents/s at 256 tokens, 144 at 64. Of 436 pages of manuals, 219
were annotated by the shelf that they come from and 78 more judged the head: F1 0.84 at a score of 3, where keeping all reaches 0.59
(tests/quality/test_real_text.py). FineWeb-Edu reports 0.82 at 3 on its own task.
"""
