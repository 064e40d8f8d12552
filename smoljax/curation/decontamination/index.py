"""The n-grams of evaluation sets, as an index on disk that every worker maps into its memory.

Files: keys.npy uint64 [n-grams], sorted, each a hash of an n-gram's words; owners.npy uint32 and starts.npy uint64
[n-grams], the item that has it, and where it begins in words.txt, which holds each item's words joined by spaces;
marks.npy, a bit for each value of the keys' first bits, set if a key begins so: most n-grams of a text end there;
items.json, {"ngram", "items": [set, place] each}. A hash finds candidates, and the words decide.
"""

import functools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from smoljax.curation import items as work_items
from smoljax.curation.decontamination.evaluation_sets import Item
from smoljax.curation.dedup.minhash import Chunks

# English cuts a simplified text at spaces and in a few short forms ("cannot"). It cuts documents and items alike in
# every language, which is all that a comparison needs.
_LANGUAGE = "en"
# Odd 64-bit constant: the key of an n-gram is a polynomial of its words' hashes in wrapping arithmetic.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_ENDS = (ord(" "), ord("\n"))
# Marks per key, at least: one of so many n-grams that no item has is looked up for nothing.
_MARKS = 16


_ARRAYS = ("keys", "marks", "owners", "starts")


class Match(NamedTuple):
    """An n-gram of a text, as its words joined by spaces, and the numbers of all items that have it, ascending."""

    ngram: str
    items: list[int]


def build(items: Iterable[Item], folder: Path, *, ngram: int) -> dict:
    """Writes the index of the items' n-grams into an empty folder.

    Args:
      items: of all sets.
      folder: for the files.
      ngram: words in an n-gram.

    Returns:
      {set: {"items", "short" (items of too few words for an n-gram), "ngrams"}}.
    """
    counts: dict[str, dict[str, int]] = {}
    keys, owners, starts = (
        [np.empty(0, np.uint64)],
        [np.empty(0, np.uint32)],
        [np.empty(0, np.uint64)],
    )
    places = []
    with open(folder / "words.txt", "wb") as text:
        for item in items:
            before, own = _words(item.context), _words(item.text)
            tokens = before + own
            first = max(0, len(before) - ngram + 1)  # Behind the n-grams of the context alone.
            found = _keys(tokens, ngram)[first:]
            keys.append(found)
            owners.append(np.full(len(found), len(places), np.uint32))
            starts.append(np.uint64(text.tell()) + _offsets(tokens)[first : first + len(found)])
            text.write(b" ".join(tokens) + b"\n")
            places.append((item.evaluation_set, item.place))
            entry = counts.setdefault(item.evaluation_set, {"items": 0, "short": 0, "ngrams": 0})
            entry["items"] += 1
            entry["short"] += not len(found)
            entry["ngrams"] += len(found)
    unsorted = np.concatenate(keys)
    order = np.argsort(unsorted, kind="stable")  # Items of one n-gram stay in their order.
    np.save(folder / "keys.npy", unsorted[order])
    np.save(folder / "marks.npy", _marks(unsorted))
    np.save(folder / "owners.npy", np.concatenate(owners)[order])
    np.save(folder / "starts.npy", np.concatenate(starts)[order])
    (folder / "items.json").write_text(json.dumps({"ngram": ngram, "items": places}))
    return counts


class Index:
    """An index that was built, opened when it is first asked.

    Args:
      folder: of the finished work item that built it; local or a URL.
    """

    def __init__(self, folder: str):
        self._folder = folder

    @property
    def size(self) -> int:
        """How many items there are."""
        return len(self._files.items)

    def item(self, number: int) -> tuple[str, str]:
        """Set and place of an item."""
        evaluation_set, place = self._files.items[number]
        return evaluation_set, place

    def first(self, text: str) -> str | None:
        """The set of the first n-gram of the text that some item has, in the first such item."""
        for match in self.matches(text):
            return self.item(match.items[0])[0]
        return None

    def matches(self, text: str) -> Iterator[Match]:
        """Every n-gram of the text that some item has, in the order of the text."""
        files = self._files
        tokens = _words(text)
        asked = _keys(tokens, files.ngram)
        if not len(files.keys) or not len(asked):
            return
        starts = np.flatnonzero(_marked(asked, files.marks))
        first = np.searchsorted(files.keys, asked[starts])
        last = np.searchsorted(files.keys, asked[starts], side="right")
        for found in np.flatnonzero(first < last):
            start = starts[found]
            shared = b" ".join(tokens[start : start + files.ngram])
            owners = [
                int(files.owners[number])
                for number in range(first[found], last[found])
                if _holds(files.text, int(files.starts[number]), shared)
            ]
            if owners:
                yield Match(shared.decode(), sorted(set(owners)))

    @functools.cached_property
    def _files(self) -> "_Files":
        paths = {
            name: work_items.verified(self._folder, name)
            for name in (*(f"{array}.npy" for array in _ARRAYS), "words.txt", "items.json")
        }
        arrays = (np.load(paths[f"{name}.npy"], mmap_mode="r") for name in _ARRAYS)
        size = paths["words.txt"].stat().st_size
        text = np.memmap(paths["words.txt"], np.uint8, "r") if size else np.empty(0, np.uint8)
        return _Files(*arrays, text, **json.loads(paths["items.json"].read_text()))


class _Files(NamedTuple):
    """What the files of an index hold."""

    keys: np.ndarray
    marks: np.ndarray
    owners: np.ndarray
    starts: np.ndarray
    text: np.ndarray
    ngram: int
    items: list[list[str]]


def _marks(keys: np.ndarray) -> np.ndarray:
    """uint8 [2^n / 8]: the marks of keys, `_MARKS` or more for each."""
    bits = max(3, (len(keys) * _MARKS).bit_length())
    marks = np.zeros(1 << (bits - 3), np.uint8)
    place = keys >> np.uint64(64 - bits)
    np.bitwise_or.at(marks, place >> np.uint64(3), _bit(place))
    return marks


def _marked(keys: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """bool [keys]: False for those that are certainly not in the index."""
    bits = (len(marks) * 8).bit_length() - 1
    place = keys >> np.uint64(64 - bits)
    return (marks[place >> np.uint64(3)] & _bit(place)) != 0


def _bit(place: np.ndarray) -> np.ndarray:
    """uint8: the bit of a mark in its byte."""
    return np.left_shift(1, place & np.uint64(7), dtype=np.uint64).astype(np.uint8)


def _holds(text: np.ndarray, start: int, words: bytes) -> bool:
    """Whether `words` stand at `start`, whole."""
    end = start + len(words)
    return text[start:end].tobytes() == words and int(text[end]) in _ENDS


def _words(text: str) -> list[bytes]:
    joined = Chunks.of(_LANGUAGE).joined_words(text)
    return joined.split(b" ") if joined else []


def _offsets(tokens: list[bytes]) -> np.ndarray:
    """uint64 [tokens]: where each begins when they are joined by spaces."""
    sizes = np.fromiter(map(len, tokens), np.uint64, len(tokens)) + np.uint64(1)
    return np.cumsum(sizes, dtype=np.uint64) - sizes


def _keys(tokens: list[bytes], ngram: int) -> np.ndarray:
    """uint64 [n-grams]: a hash of each run of `ngram` words."""
    count = len(tokens) - ngram + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    hashes = np.fromiter(map(_word_hash, tokens), np.uint64, len(tokens))
    keys = np.zeros(count, np.uint64)
    for offset in range(ngram):
        keys *= _MULTIPLIER
        keys += hashes[offset : offset + count]
    return keys


_word_hash = functools.lru_cache(maxsize=1 << 17)(xxhash.xxh3_64_intdigest)
