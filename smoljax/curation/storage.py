"""Local paths and fsspec URLs (gs://, s3://, https://, memory://): list, describe and open them."""

import glob
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from smoljax.errors import SmoljaxError

_MAGIC = frozenset("*?[")


@dataclass(frozen=True)
class File:
    """One input file.

    Attributes:
      path: how to open it.
      name: its path under the pattern's fixed folder, with "/"; it does not change when the folder moves.
      size: bytes.
      version: changes when the content does (modification time, or the object store's etag or checksum).
    """

    path: str
    name: str
    size: int
    version: str


def is_remote(path: str) -> bool:
    """Whether fsspec has to open `path`."""
    return "://" in path


def list_files(pattern: str) -> list[File]:
    """The files that a path, a folder or a glob (`**` included) names, sorted by name.

    Raises:
      SmoljaxError: nothing is there, or the protocol's package is not installed.
    """
    files = _list_remote(pattern) if is_remote(pattern) else _list_local(pattern)
    if not files:
        raise SmoljaxError(
            f"no file matches {pattern!r}: check the path (a folder is read with all its sub-folders; "
            "quote a glob so that the shell does not expand it)"
        )
    return sorted(files, key=lambda file: file.name)


def open_file(path: str) -> BinaryIO:
    """Opens `path` for reading bytes; the stream can seek."""
    if is_remote(path):
        return _filesystem(path)[0].open(path, "rb")
    return open(path, "rb")


def _list_local(pattern: str) -> list[File]:
    root = _fixed_part(pattern)
    if os.path.isdir(pattern):
        found = glob.iglob(os.path.join(glob.escape(pattern), "**"), recursive=True)
    elif os.path.isfile(pattern):
        root, found = os.path.dirname(pattern), [pattern]
    else:
        found = glob.iglob(pattern, recursive=True)
    files = []
    for path in found:
        if os.path.isfile(path):
            status = os.stat(path)
            name = Path(os.path.relpath(path, root or ".")).as_posix()
            files.append(File(path, name, status.st_size, str(status.st_mtime_ns)))
    return files


def _list_remote(pattern: str) -> list[File]:
    filesystem, bare = _filesystem(pattern)
    if filesystem.isdir(bare):
        root, found = bare, filesystem.find(bare, detail=True)
    elif _MAGIC & set(bare):
        root, found = _fixed_part(bare), filesystem.glob(bare, detail=True)
    else:
        root = bare.rpartition("/")[0]
        found = {bare: filesystem.info(bare)} if filesystem.exists(bare) else {}
    files = []
    for path, info in found.items():
        if info["type"] == "file":
            version = next(
                (str(info[key]) for key in ("etag", "md5Hash", "mtime", "created") if key in info),
                "",
            )
            name = path.removeprefix(root).lstrip("/")
            files.append(File(filesystem.unstrip_protocol(path), name, info["size"], version))
    return files


def _filesystem(path: str) -> tuple:
    import fsspec

    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        protocol = path.partition("://")[0]
        extra = {"gs": "gcs", "gcs": "gcs"}.get(protocol)
        hint = (
            f'run `pip install "smoljax[{extra}]"`' if extra else "install fsspec's package for it"
        )
        raise SmoljaxError(f"cannot open {path!r} ({error}): {hint}") from error


def _fixed_part(pattern: str) -> str:
    """The folder before the first wildcard."""
    parts = pattern.split("/")
    fixed = []
    for part in parts[:-1] if _MAGIC & set(parts[-1]) else parts:
        if _MAGIC & set(part):
            break
        fixed.append(part)
    return "/".join(fixed)
