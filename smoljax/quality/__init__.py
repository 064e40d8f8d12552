"""Which documents are worth training on: a language model judges a few, a linear head on frozen embeddings judges the rest.

The method of FineWeb-Edu (Penedo et al. 2024, section 4): a language model gives some thousand documents a score from 0 to
5; one linear output on a frozen embedder learns to foretell it; documents whose score is too low are removed.

  config.py       the section `quality` of a config, and the rules by which documents are kept
  annotations.py  the file of scores; the requests for a language model and what its replies mean
  embedders.py    texts to vectors: a sentence-transformers folder (bert.py), or the hidden states of our own model
  head.py         the regression, and what it is worth on annotations that it has not seen (evaluation.py)
  apply.py        WORKDIR/documents to WORKDIR/selected
  run.py          all of it in order: `python -m smoljax.curate --only=quality`

It stands beside smoljax.curation, which never imports jax.
"""
