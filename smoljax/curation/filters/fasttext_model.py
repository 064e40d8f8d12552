"""The predictions of a fastText classifier, without reading any word twice.

fastText looks up all runs of `minn` to `maxn` characters of each word of a text, decodes their rows, and takes the mean of
all rows (Joulin et al. 2017). The rows of a word always have the same sum, so it is remembered by word. Scores equal
the library's up to its rounding: it adds the rows of a whole text in float32.

The file's format, and which rows belong to a word, are those of fastText 0.9.2 (src/fasttext.cc, dictionary.cc,
quantmatrix.cc, loss.cc).
"""

import itertools
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_MAGIC, _VERSION = 793712314, 12
_HIERARCHICAL, _SOFTMAX = 1, 3
_LABEL = b"__label__"
_END = b"</s>"
# FNV-1a of 32 bits.
_OFFSET, _FACTOR = np.uint32(2166136261), np.uint32(16777619)
# Added to each factor of a probability, which is 0 below it.
_LEAST = 1e-5
# Words that are remembered; a longer text is read in parts of so many.
_CAPACITY = 1 << 15


class UnknownModel(ValueError):
    """The file holds no model, or one that this module does not follow; the message says which."""


class Model:
    """A classifier of texts, from a .bin or .ftz file. A .bin's rows are mapped into memory, not read.

    Attributes:
      labels: as the model calls them, "__label__en".
    """

    def __init__(self, path: Path):
        """Reads the file.

        Raises:
          UnknownModel: the file is damaged, or its model is no classifier by single words.
        """
        with open(path, "rb") as file:
            try:
                self._read(file)
            except (struct.error, ValueError, IndexError) as error:
                raise UnknownModel(str(error)) from error
        self._forget()

    def scores(self, text: str) -> np.ndarray:
        """float32 [labels]: the probability of each label; line breaks are spaces."""
        return self.scores_of([text])[0]

    def scores_of(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [texts, labels]: `scores` of each; a word that several of them hold is looked up once."""
        bare = [text.replace("\0", " ") for text in texts]
        rows = pc.ascii_split_whitespace(pa.array(bare, pa.large_string()))
        encoded = pc.dictionary_encode(rows.values)
        words, numbers = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
        end = words.index(_END.decode()) if _END.decode() in words else -1
        totals = np.zeros((len(texts), self._dim + 1))
        totals += self._sums_of([_END.decode()])  # Of the line.
        for first in range(0, len(words), _CAPACITY):
            sums = self._sums_of(words[first : first + _CAPACITY])
            for total, (start, stop) in zip(totals, itertools.pairwise(rows.offsets.to_numpy())):
                here = numbers[start:stop]
                if end >= 0:
                    here = here[: np.argmax(np.append(here, end) == end)]
                if len(words) > _CAPACITY:
                    here = here[(here >= first) & (here < first + len(sums))] - first
                total += sums[here].sum(axis=0, dtype=np.float64)
        hidden = totals[:, :-1] / np.maximum(1.0, totals[:, -1:])
        return np.array([self._probabilities(row) for row in hidden], np.float32)

    def _sums_of(self, words: list[str]) -> np.ndarray:
        """float32 [words, dim + 1]: the sum of the rows of each of some distinct words, and their number."""
        found = np.fromiter(map(self._known.get, words, itertools.repeat(-1)), np.int64, len(words))
        self._texts_with[found] += found >= 0
        sums = self._sums[found]
        missing = np.flatnonzero(found < 0)
        new = [words[i] for i in missing.tolist()]
        rows, owners = self._rows_of([word.encode() for word in new])
        learned = np.zeros((len(new), self._dim + 1), np.float32)
        if len(rows):
            vectors = self._input.rows(rows)
            starts = np.flatnonzero(np.diff(owners, prepend=-1))
            learned[owners[starts], :-1] = np.add.reduceat(vectors, starts, axis=0)
            learned[:, -1] = np.bincount(owners, minlength=len(new))
        sums[missing] = learned
        self._remember(new, learned)
        return sums

    def _remember(self, new: list[str], sums: np.ndarray) -> None:
        """Remembers the sums of words, where need be in the place of those that came only once."""
        if len(self._known) + len(new) > _CAPACITY:
            kept = [(word, at) for word, at in self._known.items() if self._texts_with[at]]
            old = self._sums
            self._forget()
            if kept and len(kept) + len(new) <= _CAPACITY:
                words, places = zip(*kept)
                self._known.update(zip(words, range(len(words))))
                self._sums[: len(words)] = old[list(places)]
        start = len(self._known)
        self._known.update(zip(new, range(start, start + len(new))))
        self._sums[start : start + len(new)] = sums

    def _forget(self) -> None:
        self._known: dict[str, int] = {}
        self._sums = np.zeros((_CAPACITY, self._dim + 1), np.float32)
        self._texts_with = np.zeros(_CAPACITY, np.int32)

    def _rows_of(self, words: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """(rows of the input matrix, number of the word that each belongs to), int64 [rows], word by word."""
        whole = [(self._words[word], i) for i, word in enumerate(words) if word in self._words]
        rows, owners = np.array(whole, np.int64).reshape(-1, 2).T
        if self._maxn > 0:
            ascii_ones, others = [], []
            for i, word in enumerate(words):
                if word and word != _END and self._is_word(word):
                    (ascii_ones if word.isascii() else others).append(i)
            for part, find in ((ascii_ones, self._ascii_grams), (others, self._grams)):
                grams, of = find([words[i] for i in part])
                rows = np.concatenate([rows, grams])
                owners = np.concatenate([owners, np.array(part, np.int64)[of]])
        order = np.argsort(owners, kind="stable")
        return rows[order], owners[order]

    def _is_word(self, word: bytes) -> bool:
        return not word.startswith(_LABEL) or word in self._words

    def _ascii_grams(self, words: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """What `_grams` gives of words of ASCII, in which every byte is a character: five times as fast."""
        letters = np.frombuffer(b"".join([b"<%b>" % word for word in words]), np.uint8)
        sizes = np.fromiter(map(len, words), np.int64, len(words)) + 2
        ends = np.cumsum(sizes)
        owners = np.repeat(np.arange(len(words), dtype=np.int32), sizes)
        # Of each character, how many there are from it to the end of its word.
        left = np.repeat(ends.astype(np.int32), sizes) - np.arange(len(letters), dtype=np.int32)
        hashes = np.full(len(letters), _OFFSET)
        found = [(np.empty(0, np.uint32), np.empty(0, np.int32))]
        for n in range(1, self._maxn + 1):
            hashes = (hashes[: max(0, len(letters) - n + 1)] ^ letters[n - 1 :]) * _FACTOR
            if n >= self._minn:
                whole = left[: len(hashes)] >= n
                if n == 1:  # A mark of a word's border alone is no run.
                    whole[ends - 1] = whole[ends - sizes] = False
                found.append(
                    (hashes[whole] % np.uint32(self._buckets), owners[: len(hashes)][whole])
                )
        return self._kept_rows(*map(np.concatenate, zip(*found)))

    def _grams(self, words: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """(rows, numbers of the words) of all runs of minn to maxn characters of "<word>"."""
        text = np.frombuffer(b"".join([b"<%b>" % word for word in words]), np.uint8)
        starts = np.flatnonzero((text & 0xC0) != 0x80)  # Of characters.
        sizes = np.diff(starts, append=len(text))
        sizes_of_words = np.fromiter(map(len, words), np.int64, len(words)) + 2
        ends = np.searchsorted(starts, np.cumsum(sizes_of_words))  # Of words, in characters.
        counts = np.diff(ends, prepend=0)
        owners = np.repeat(np.arange(len(words)), counts)
        stops = np.repeat(ends, counts)
        # As fastText does it: bytes of 128 and more are negative.
        letters = text.view(np.int8).astype(np.uint32)
        at, hashes = np.arange(len(starts)), np.full(len(starts), _OFFSET)
        found = []
        for n in range(1, self._maxn + 1):
            inside = at + (n - 1) < stops[at]
            at, hashes = at[inside], hashes[inside]
            last = at + (n - 1)
            for k in range(int(sizes[last].max(initial=0))):
                long = np.flatnonzero(sizes[last] > k) if k else slice(None)
                hashes[long] = (hashes[long] ^ letters[starts[last[long]] + k]) * _FACTOR
            if n >= self._minn:
                # A mark of a word's border alone is no run.
                taken = slice(None) if n > 1 else (sizes[at] > 0) & self._is_inner(at, owners, ends)
                found.append((hashes[taken] % np.uint32(self._buckets), owners[at[taken]]))
        return self._kept_rows(*map(np.concatenate, zip(*found)))

    @staticmethod
    def _is_inner(at: np.ndarray, owners: np.ndarray, ends: np.ndarray) -> np.ndarray:
        first = np.append(0, ends[:-1])[owners[at]]
        return (at > first) & (at < ends[owners[at]] - 1)

    def _kept_rows(self, buckets: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of buckets; a pruned model has lost most."""
        if self._pruned is None:
            return buckets.astype(np.int64) + len(self._words), owners
        rows = self._pruned[buckets]
        kept = np.flatnonzero(rows)
        return rows[kept].astype(np.int64) + (len(self._words) - 1), owners[kept]

    def _probabilities(self, hidden: np.ndarray) -> np.ndarray:
        outputs = self._output @ hidden.astype(np.float32)
        if self._loss == _SOFTMAX:
            exponentials = np.exp(outputs - outputs.max())
            return exponentials / exponentials.sum() + _LEAST
        if self._loss != _HIERARCHICAL:
            return _tabulated_sigmoid(outputs) + _LEAST
        right = 1.0 / (1.0 + np.exp(-outputs.astype(np.float64)))
        steps = np.log(np.concatenate([1.0 - right, right]) + _LEAST)
        found = np.exp(np.add.reduceat(steps[self._paths], self._path_starts))
        return np.where(found < _LEAST, 0.0, found)  # fastText does not look that far.

    def _read(self, file: BinaryIO) -> None:
        magic, version = _take(file, "<ii")
        if magic != _MAGIC or version > _VERSION:
            raise UnknownModel("it does not begin as a model of fastText")
        numbers = _take(file, "<12id")
        self._dim, ngrams, self._loss, kind = numbers[0], *numbers[5:8]
        self._buckets, self._minn, self._maxn = numbers[8:11]
        if kind != 3:
            raise UnknownModel("it holds vectors of words, and classifies nothing")
        if ngrams > 1:
            raise UnknownModel("it looks at words together")
        if version == 11:
            self._maxn = 0
        entries, words, _, _, pruned = _take(file, "<3i2q")
        names, counts = zip(*(_entry(file) for _ in range(entries)))
        self._words = {name: row for row, name in enumerate(names[:words])}
        self.labels = [name.decode() for name in names[words:]]
        self._pruned = None
        if pruned >= 0:
            buckets, rows = np.frombuffer(_read(file, 8 * pruned), "<i4").reshape(-1, 2).T
            # Of each bucket its row, counted from 1, in as few bytes as that takes; 0 if it was lost.
            self._pruned = np.zeros(self._buckets, np.min_scalar_type(pruned))
            self._pruned[buckets] = rows + 1
        (quantised,) = _take(file, "<?")
        self._input = (_Quantised if quantised else _Dense)(file)
        (quantised_output,) = _take(file, "<?")
        output = (_Quantised if quantised and quantised_output else _Dense)(file)
        self._output = output.rows(np.arange(output.count))
        if self._loss == _HIERARCHICAL:
            self._output = self._output[: len(self.labels) - 1]  # The last row is none of a node.
            paths = _paths(counts[words:])
            self._paths = np.concatenate(paths)
            self._path_starts = np.cumsum([0, *map(len, paths[:-1])])


class _Dense:
    """float32 [count, dim], mapped into memory."""

    def __init__(self, file: BinaryIO):
        self.count, dim = _take(file, "<qq")
        at = file.tell()
        self._matrix = np.asarray(np.memmap(file, "<f4", "r", at, (self.count, dim)))
        file.seek(at + 4 * self.count * dim)

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        return self._matrix[numbers]


class _Quantised:
    """Rows of parts, each one of 256, times a norm that is one of 256 too."""

    def __init__(self, file: BinaryIO):
        has_norms, self.count, _, size = _take(file, "<?qqi")
        self._codes = np.frombuffer(_read(file, size), np.uint8).reshape(self.count, -1)
        self._parts = _centroids(file)
        self._norms = None
        if has_norms:
            codes = np.frombuffer(_read(file, self.count), np.uint8)
            self._norms = _centroids(file)[0][codes]

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        codes = self._codes[numbers]
        found = np.concatenate([part[codes[:, m]] for m, part in enumerate(self._parts)], axis=1)
        return found if self._norms is None else found * self._norms[numbers]


def _tabulated_sigmoid(x: np.ndarray) -> np.ndarray:
    """As fastText has it for labels that are scored one by one: in steps of 1/32, and 0 or 1 beyond -8 and 8."""
    steps = np.floor((np.clip(x, -8.0, 8.0) + 8.0) * 32.0) / 32.0 - 8.0
    return np.where(x < -8.0, 0.0, np.where(x > 8.0, 1.0, 1.0 / (1.0 + np.exp(-steps))))


def _centroids(file: BinaryIO) -> list[np.ndarray]:
    """float32 [256, width] for each part of a row."""
    dim, parts, width, last = _take(file, "<4i")
    values = np.frombuffer(_read(file, 4 * 256 * dim), "<f4")
    cuts = np.split(values, 256 * width * np.arange(1, parts))
    return [cut.reshape(256, -1) for cut in cuts[:-1]] + [cuts[-1].reshape(256, last)]


def _paths(counts: tuple[int, ...]) -> list[np.ndarray]:
    """Of each label, its way through the Huffman tree: node for a step to the left, node + nodes for one to the right."""
    labels = len(counts)
    weights = [*counts, *[10**15] * (labels - 1)]
    parents: dict[int, tuple[int, bool]] = {}
    leaf, node = labels - 1, labels
    for parent in range(labels, 2 * labels - 1):
        weights[parent] = 0
        for right in (False, True):
            # The weight of a node that is not made yet is greater than any other.
            other = weights[node] if node < parent else 10**15
            if leaf >= 0 and weights[leaf] < other:
                child, leaf = leaf, leaf - 1
            else:
                child, node = node, node + 1
            parents[child] = parent, right
            weights[parent] += weights[child]
    found = []
    for label in range(labels):
        steps, at = [], label
        while at in parents:
            at, right = parents[at]
            steps.append(at - labels + right * (labels - 1))
        found.append(np.array(steps, np.int64))
    return found


def _entry(file: BinaryIO) -> tuple[bytes, int]:
    """(word or label, how often it was seen)."""
    name = bytearray()
    while (character := _read(file, 1)) != b"\0":
        name += character
    count, _ = _take(file, "<qb")
    return bytes(name), count


def _take(file: BinaryIO, form: str) -> tuple:
    return struct.unpack(form, _read(file, struct.calcsize(form)))


def _read(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise UnknownModel("it is cut")
    return data
