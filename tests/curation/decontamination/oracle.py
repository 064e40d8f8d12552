"""datatrove's decontamination, fed with items instead of the downloads of lighteval."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.decont.n_grams import (
    NGramsDecontConfig,
    NGramsDecontFilter,
    NGramsDecontIndexer,
)
from datatrove.utils.hashing import create_hash_func
from datatrove.utils.typeshelper import Languages
from datatrove.utils.word_tokenizers import load_word_tokenizer

from smoljax.curation.decontamination.evaluation_sets import Item


def filter_of(items: Iterable[Item], folder: Path, *, ngram: int) -> NGramsDecontFilter:
    """The filter, with the index that its own indexer makes of the items; the context is the query, the text the gold."""
    config = NGramsDecontConfig(n_grams=ngram)
    indexer = object.__new__(NGramsDecontIndexer)  # Its constructor asks for lighteval.
    indexer.config = config
    indexer.tokenizer = load_word_tokenizer(Languages.english)
    indexer.hash_func = create_hash_func(config.hash_config)
    hashes: dict[str, set[int]] = defaultdict(set)
    for item in items:
        hashes[item.evaluation_set].update(indexer.compute_hashes(item.text, item.context))
    folder.mkdir(parents=True)
    for name, found in hashes.items():
        found = np.array(sorted(found), config.hash_config.np_descr)
        found.tofile(folder / f"{name}.index.hashes")
    return NGramsDecontFilter(str(folder), config)


def decision(oracle: NGramsDecontFilter, text: str) -> tuple[str, str] | None:
    """(set, n-gram) for which a text is removed, or None."""
    document = Document(text=text, id="")
    if oracle.filter(document) is True:
        return None
    return document.metadata["contaminated_task"], document.metadata["contaminated_ngram"]
