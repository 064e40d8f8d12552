"""The words of a text, as datatrove 0.10 cuts them: spaCy's rules for the language, without any model."""

import functools

from smoljax.errors import require


def words(text: str, language: str) -> list[str]:
    """The tokens of spaCy's tokenizer, without surrounding whitespace; blank ones are left out.

    Args:
      text: any string.
      language: ISO 639-1 code.
    """
    pipeline = _pipeline(language)
    # What a text teaches the vocabulary is forgotten behind it: memory stays bounded.
    with pipeline.memory_zone():
        tokens = [token.text.strip() for token in pipeline.tokenizer(text)]
    return [token for token in tokens if token]


@functools.cache
def _pipeline(language: str):
    return require("spacy", extra="data").blank(language)
