"""The lists of the URL filter, held so that many processes share one copy.

As Python sets, the 4.6 million domains of datatrove's list take half a gigabyte in each process. Here a list is the
sorted 64-bit hashes of its lines (36 MB), in a file that is made once (in 7 seconds, with 340 MB) and mapped into
memory, so that all processes on a machine share its pages. That two names among 5 million and a billion others share a hash has
a chance of one in 4,000.
"""

import fcntl
import functools
import gzip
import importlib.util
import io
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from smoljax import files
from smoljax.errors import SmoljaxError

_ARCHIVES = "url_filterblacklists*.tar.gz"
_HASHED = ("domains", "urls")
_WORDS = ("banned_words", "soft_banned_words", "banned_subwords")
_SYMBOLS = re.compile(r"[^a-zA-Z0-9]+")


class HashedLines:
    """A set of strings, of which only the hashes are kept: uint64 [N], sorted."""

    def __init__(self, hashes: np.ndarray):
        self._hashes = hashes

    def __contains__(self, line: str) -> bool:
        wanted = np.uint64(xxhash.xxh3_64_intdigest(line))
        at = self._hashes.searchsorted(wanted)
        return at < len(self._hashes) and self._hashes[at] == wanted

    def __len__(self) -> int:
        return len(self._hashes)


@dataclass(frozen=True)
class Lists:
    """What the URL filter removes, as datatrove's lists name it.

    Attributes:
      domains: registered domains and hosts.
      urls: whole addresses.
      banned_words: one of them as a word of the URL is enough.
      soft_banned_words: several of them are.
      banned_subwords: also inside of words. All three are letters and digits in lower case.
    """

    domains: HashedLines
    urls: HashedLines
    banned_words: frozenset[str]
    soft_banned_words: frozenset[str]
    banned_subwords: frozenset[str]


def squashed(text: str) -> str:
    """Letters and digits of ASCII in lower case, and nothing else."""
    return "".join(words(text)).lower()


def words(text: str) -> list[str]:
    """What stands between characters that are no letters and digits of ASCII, in its own case."""
    return _SYMBOLS.split(text)


@functools.cache
def load(folder: str | None) -> Lists:
    """The lists in a folder that is laid out as datatrove's assets are, or those of the installed datatrove.

    The folder holds banned_words.txt, soft_banned_words.txt and banned_subwords.txt, and either
    url_filterblacklists*.tar.gz with the members "domains" and "urls", or these two files as they are. One entry per
    line; a blank line, or one that begins with "#", is none.

    The hashes are kept in $XDG_CACHE_HOME/smoljax (by default ~/.cache/smoljax) under the hash of the file they
    are made from.

    Raises:
      SmoljaxError: a file is missing, or the cache cannot be written.
    """
    root = _installed() if folder is None else Path(folder).expanduser()
    domains, urls = (_hashed(root, name) for name in _HASHED)
    return Lists(domains, urls, *(_word_list(root / f"{name}.txt") for name in _WORDS))


def cache_folder() -> Path:
    """Where the hashes are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smoljax"


def _installed() -> Path:
    spec = importlib.util.find_spec("datatrove")
    if spec is None or not spec.submodule_search_locations:
        raise SmoljaxError(
            "the url filter reads its lists from the package datatrove, which is not installed: run "
            "`pip install --no-deps datatrove`, or set the preset's url.lists to a folder that holds them"
        )
    return Path(spec.submodule_search_locations[0]) / "assets"


def _word_list(path: Path) -> frozenset[str]:
    if not path.is_file():
        raise SmoljaxError(_missing(path.parent, path.name))
    with open(path, encoding="utf-8") as lines:
        return frozenset(squashed(line) for line in lines if not line.startswith("#")) - {""}


def _hashed(root: Path, name: str) -> HashedLines:
    source = next(iter(sorted(root.glob(_ARCHIVES), reverse=True)), root / name)
    if not source.is_file():
        raise SmoljaxError(_missing(root, f"{_ARCHIVES} and no file {name!r}"))
    with open(source, "rb") as file:
        key = xxhash.xxh3_64_hexdigest(file.read())
    path = cache_folder() / f"url-{name}-{key}.npy"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # Workers that start together make it once.
            hashes = _stored(path)
            if hashes is None:
                _write(path, _sorted_hashes(source, name))
                hashes = _stored(path)
    except OSError as error:
        raise SmoljaxError(
            f"the url filter cannot keep its lists in {path.parent} ({error}): set XDG_CACHE_HOME to a folder "
            "that can be written"
        ) from error
    return HashedLines(hashes)


def _stored(path: Path) -> np.ndarray | None:
    """The hashes in a file whose first number is the hash of the others; None if it is missing or damaged."""
    try:
        numbers = np.load(path, mmap_mode="r")
    except (FileNotFoundError, ValueError, EOFError):
        return None
    if numbers.size == 0 or numbers[0] != xxhash.xxh3_64_intdigest(numbers[1:]):
        return None
    return numbers[1:]


def _write(path: Path, hashes: np.ndarray) -> None:
    check = np.array([xxhash.xxh3_64_intdigest(hashes)], np.uint64)
    with files.atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, np.concatenate([check, hashes]))


def _sorted_hashes(source: Path, name: str) -> np.ndarray:
    try:
        with open(source, "rb") as file:
            lines = _member(source, file, name) if source.name != name else _lines(file)
            return np.unique(np.fromiter(map(xxhash.xxh3_64_intdigest, lines), np.uint64))
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, UnicodeDecodeError) as error:
        raise SmoljaxError(
            f"{source} is damaged ({error}): install the package datatrove again, or fetch the list anew"
        ) from error


def _member(source: Path, file: BinaryIO, name: str) -> Iterator[str]:
    with tarfile.open(fileobj=file, mode="r:gz") as archive:
        for member in archive:
            if member.name.removeprefix("./") == name:
                yield from _lines(archive.extractfile(member))
                return
    raise SmoljaxError(_missing(source, name))


def _lines(file: BinaryIO) -> Iterable[str]:
    text = io.TextIOWrapper(file, encoding="utf-8")
    return filter(None, (line.strip() for line in text if not line.startswith("#")))


def _missing(place: Path, name: str) -> str:
    return (
        f"{place} holds no {name}: the url filter needs the lists as the package datatrove ships them "
        "(datatrove/assets); set the preset's url.lists to a folder that is laid out so"
    )
