"""The words of a text, as datatrove 0.10 cuts them: spaCy's rules for the language, without any model.

spaCy cuts each chunk between whitespace for itself, and chunks repeat: what becomes of one is looked up. Only special
cases look further ("):" is one word in "main():", unless "))" follows behind a space), and only from one chunk to the
next behind a single space; such a run of chunks is cut as a whole.

What is remembered is bounded, and no result depends on it. (One of datatrove's does: where spaCy fails on the word
"IS_ALPHA", which is from the second text with it on, datatrove takes it out of the text. Here it stays.)
"""

import functools
import re
from collections.abc import Iterator

import numpy as np

from smoljax.curation.word_rules import LANGUAGES, Rules
from smoljax.errors import SmoljaxError, require

# Chunks of one language that are remembered, and as many from the time before; longer ones than this rarely come again.
_CAPACITY = 1 << 15
_LONGEST = 48
# Characters of documents that are remembered: a batch of readers.read.
_DOCUMENTS = 1 << 20
_LAST_BLANK = 0x3000
# Whitespace that is a word for spaCy: special cases do not look across it.
BREAK = re.compile(r"\s{2,}|[^\S ]")


def words(text: str, language: str) -> list[str]:
    """The tokens of spaCy's tokenizer, without surrounding whitespace; blank ones are left out.

    Args:
      text: any string.
      language: ISO 639-1 code; those that are not in LANGUAGES are cut by spaCy itself, at a tenth of the speed.
    """
    joined = joined_words(text, language)
    return joined.split("\n") if joined else []


def joined_words(text: str, language: str) -> str:
    """`words`, joined by "\\n", which no word holds: faster, since most words are never made."""
    return _chunks(language).joined_words(text) if language in LANGUAGES else _spacy(text, language)


def document_words(text: str, language: str) -> str:
    """`joined_words`, remembered for a while: filters look at the documents of a batch one after the other."""
    return _documents.joined_words(text, language)


class _Documents:
    """The joined words of the last documents."""

    def __init__(self):
        self._known: dict[tuple[str, str], str] = {}
        self._characters = 0

    def joined_words(self, text: str, language: str) -> str:
        joined = self._known.get((text, language))
        if joined is None:
            joined = self._known[text, language] = joined_words(text, language)
            self._characters += len(text)
            while self._characters > _DOCUMENTS:
                oldest = next(iter(self._known))
                self._characters -= len(oldest[0])
                del self._known[oldest]
        return joined


_documents = _Documents()


class _Chunks:
    """What whitespace-separated chunks of a language become: their words, joined by "\\n".

    A chunk whose words special cases would change is "\\n" instead, as it has to be seen with its neighbours.
    """

    def __init__(self, language: str):
        self._rules = Rules(language)
        self._known = _Known(self._rules)

    def joined_words(self, text: str) -> str:
        found = list(map(self._known.__getitem__, text.split()))
        joined = "\n".join(found)
        spaced = [case for case in self._rules.spaced if case in text]
        if joined[:1] == "\n" or "\n\n" in joined or spaced:
            return "\n".join(self._merged(text, found, spaced))
        return joined

    def _merged(self, text: str, found: list[str], spaced: list[str]) -> Iterator[str]:
        """The words of chunks, with the special cases among them: looked for in the runs that may hold one."""
        runs = _Runs(text)
        at = [i for i, joined in enumerate(found) if joined == "\n"]
        for case in spaced:
            at += [runs.chunk_at(match.start()) for match in re.finditer(re.escape(case), text)]
        done = 0
        for start, end in runs.around(at):
            yield from found[done:start]
            yield self._with_cases(runs.chunks(start, end), found[start:end])
            done = end
        yield from found[done:]

    def _with_cases(self, chunks: list[str], known: list[str]) -> str:
        tokens: list[str] = []
        spaces: list[bool] = []
        for chunk, joined in zip(chunks, known):
            tokens += self._rules.cut(chunk) if joined[0] == "\n" else joined.split("\n")
            spaces += [False] * (len(tokens) - len(spaces) - 1) + [True]
        return "\n".join(self._rules.merge(tokens, spaces))


class _Known(dict[str, str]):
    """What was found of chunks; what is not known is found out. When it is full, it begins anew, and the chunks of
    the time before that come again are taken over: so those that keep coming are never forgotten.
    """

    def __init__(self, rules: Rules):
        self._rules = rules
        self._before: dict[str, str] = {}

    def __missing__(self, chunk: str) -> str:
        joined = self._before.get(chunk)
        if joined is None:
            tokens = self._rules.cut(chunk)
            if len(tokens) == 1:
                joined = chunk
            else:
                joined = "\n" if self._rules.has_cases(tokens) else "\n".join(tokens)
        if len(chunk) <= _LONGEST:
            if len(self) >= _CAPACITY:
                self._before = dict(self)
                self.clear()
            self[chunk] = joined
        return joined


class _Runs:
    """The chunks of a text, in runs parted by single spaces; other whitespace parts the runs."""

    def __init__(self, text: str):
        self._text = text
        codes = np.frombuffer(f" {text} ".encode("utf-32-le", "surrogatepass"), np.uint32)
        steps = np.diff(_blank()[np.minimum(codes, _LAST_BLANK + 1)])
        self._starts, self._ends = np.flatnonzero(steps == -1), np.flatnonzero(steps == 1)
        behind = self._ends[:-1]
        parted = (self._starts[1:] - behind > 1) | (codes[behind + 1] != ord(" "))
        # Where runs begin and end, in chunks.
        self._bounds = np.concatenate([[0], np.flatnonzero(parted) + 1, [len(self._starts)]])

    def chunk_at(self, place: int) -> int:
        """The chunk that holds a character."""
        return int(np.searchsorted(self._starts, place, "right")) - 1

    def around(self, chunks: list[int]) -> list[tuple[int, int]]:
        """(first chunk, chunk behind the last) of the runs that hold some of these chunks, in order."""
        runs = np.unique(np.searchsorted(self._bounds, chunks, "right")) - 1
        return list(zip(self._bounds[runs].tolist(), self._bounds[runs + 1].tolist()))

    def chunks(self, start: int, end: int) -> list[str]:
        """The chunks of a run."""
        return self._text[self._starts[start] : self._ends[end - 1]].split()


@functools.cache
def _blank() -> np.ndarray:
    """int8 [code points]: 1 for whitespace."""
    codes = map(chr, range(_LAST_BLANK + 2))
    return np.fromiter(map(str.isspace, codes), np.int8, _LAST_BLANK + 2)


@functools.cache
def _chunks(language: str) -> _Chunks:
    return _Chunks(language)


def _spacy(text: str, language: str) -> str:
    pipeline = _pipeline(language)
    # What a text teaches the vocabulary is forgotten behind it: memory stays bounded.
    with pipeline.memory_zone():
        tokens = [token.text.strip() for token in pipeline.tokenizer(text)]
    return "\n".join(filter(None, tokens))


@functools.cache
def _pipeline(language: str):
    try:
        return require("spacy", extra="data").blank(language)
    except ImportError as error:
        raise SmoljaxError(
            f"there are no rules for the words of language {language!r}: name the languages to keep in the stage "
            f'"language" ({", ".join(LANGUAGES)}, or another of spaCy\'s)'
        ) from error
