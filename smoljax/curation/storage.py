"""Local paths and fsspec URLs (gs://, s3://, https://, memory://): list, describe and open them."""

import glob
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from smoljax import files
from smoljax.errors import SmoljaxError

_MAGIC = frozenset("*?[")
# What tells versions of a file apart, as the file systems of Google, Amazon, the web and this machine call it.
_VERSIONS = ("etag", "ETag", "md5Hash", "Content-MD5", "mtime", "LastModified", "created")
# Protocol -> what pip installs for it.
_PACKAGES = {
    "gs": '"smoljax[gcs]"',
    "gcs": '"smoljax[gcs]"',
    "s3": "s3fs",
    "http": "aiohttp",
    "https": "aiohttp",
    "hf": "huggingface_hub",
}


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


def read_bytes(path: str) -> bytes:
    """The content of a file; an OSError when there is none."""
    with open_file(path) as file:
        return file.read()


def write_bytes(path: str, data: bytes) -> None:
    """Writes a file, local (atomically) or at a URL."""
    if is_remote(path):
        filesystem, bare = _filesystem(path)
        filesystem.pipe_file(bare, data)
    else:
        files.atomic_write_bytes(path, data)


def size(path: str) -> int | None:
    """Bytes of a file, or None when there is none."""
    try:
        return _filesystem(path)[0].size(path) if is_remote(path) else os.stat(path).st_size
    except OSError:
        return None


def upload(local: Path, path: str) -> None:
    """Writes a local file to a URL; it appears there whole, as object stores do it."""
    filesystem, bare = _filesystem(path)
    filesystem.put_file(str(local), bare)


def download(path: str, local: Path) -> None:
    """Fetches a URL to a local file."""
    filesystem, bare = _filesystem(path)
    filesystem.get_file(bare, str(local))


def make_folder(path: str) -> None:
    """Makes a local folder; an object store has none."""
    if not is_remote(path):
        os.makedirs(path, exist_ok=True)


def remove(path: str) -> None:
    """Removes a file or a folder with all that it holds, if it is there."""
    if not is_remote(path):
        if os.path.isfile(path):
            os.unlink(path)
        shutil.rmtree(path, ignore_errors=True)
        return
    filesystem, bare = _filesystem(path)
    if filesystem.exists(bare):
        filesystem.rm(bare, recursive=True)


def remove_others(path: str, names: set[str]) -> None:
    """Removes the folders in `path` that are not called one of `names`."""
    if not is_remote(path):
        found = [entry.name for entry in os.scandir(path) if entry.is_dir()]
    else:
        filesystem, bare = _filesystem(path)
        entries = filesystem.ls(bare, detail=True) if filesystem.exists(bare) else []
        found = [
            e["name"].rstrip("/").rpartition("/")[2] for e in entries if e["type"] == "directory"
        ]
    for name in set(found) - names:
        remove(f"{path}/{name}")


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
    on_web = pattern.startswith(("http://", "https://"))  # Where each page would pass for a folder.
    if bare.endswith("/") if on_web else filesystem.isdir(bare):
        root, found = bare, filesystem.find(bare, detail=True)
    elif _MAGIC & set(bare):
        root, found = _fixed_part(bare), filesystem.glob(bare, detail=True)
    else:
        root = bare.rpartition("/")[0]
        found = {bare: filesystem.info(bare)} if filesystem.exists(bare) else {}
    files = []
    for path, info in found.items():
        if info["type"] == "file":
            if on_web:
                info = filesystem.info(path)  # A page of links tells no sizes.
                if info["size"] is None:
                    raise SmoljaxError(
                        f"{path!r}: the server does not say how large it is, so it cannot be cut into shards: "
                        "download it first"
                    )
            version = next((str(info[key]) for key in _VERSIONS if key in info), "")
            name = path.removeprefix(root).lstrip("/")
            files.append(File(filesystem.unstrip_protocol(path), name, info["size"], version))
    return files


def _filesystem(path: str) -> tuple:
    import fsspec

    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        package = _PACKAGES.get(path.partition("://")[0])
        hint = f"run `pip install {package}`" if package else "fsspec knows no such protocol"
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
