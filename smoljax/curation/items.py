"""Work items: each leaves one folder, whole and with its manifest, or nothing.

An item that is finished under the same key is not run again, so a killed run goes on where it stopped. What an
item writes depends only on its argument: not on workers, order or interruptions. Folders lie on a local disk or,
for workers on many machines, in an object store (any URL of fsspec's).
"""

import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from smoljax import files
from smoljax.curation import storage
from smoljax.errors import SmoljaxError

_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class WorkItem:
    """One unit of work.

    Attributes:
      name: of its folder ("00012").
      key: hash of everything that its output depends on (stage configuration, input fingerprint, code version).
      work: a function at a module's top level, `work(argument, folder) -> JSON-able dict`; it writes its files
        into `folder`, which is empty.
      argument: picklable.
      size: of its input, in bytes, for the progress line.
      label: what it works on, for errors.
    """

    name: str
    key: str
    work: Callable[[Any, Path], dict]
    argument: Any
    size: int
    label: str


def hash_of(*parts: object) -> str:
    """32 hexadecimal digits of anything that JSON can write."""
    return xxhash.xxh3_128_hexdigest(as_json(parts).encode())


def as_json(value: object) -> str:
    """A configuration as JSON; equal ones give equal text."""
    return json.dumps(value, sort_keys=True, default=_jsonable)


def run_item(item: WorkItem, directory: str) -> dict:
    """Runs one item and returns its manifest. Its folder appears whole; a pure function of the item."""
    if not storage.is_remote(directory):
        with files.atomic_directory(Path(directory) / item.name) as folder:
            return _fill(folder, item)
    with tempfile.TemporaryDirectory(prefix="smoljax-") as temporary:
        folder = Path(temporary) / item.name
        folder.mkdir()
        manifest = _fill(folder, item)
        target = f"{directory}/{item.name}"
        storage.remove(target)
        names = [*manifest["files"], _MANIFEST]  # The manifest last: it makes the others count.
        for name in names:
            storage.upload(folder / name, f"{target}/{name}")
    return manifest


def finished(item: WorkItem, directory: str) -> dict | None:
    """The manifest of an item that was run under its key and whose files are all there, or None.

    A manifest that was changed does not count: its numbers go into those of the whole run.
    """
    folder = f"{directory}/{item.name}"
    try:
        manifest = json.loads(storage.read_bytes(f"{folder}/{_MANIFEST}"))
    except (OSError, ValueError):
        return None
    if manifest.get("key") != item.key or manifest.pop("checksum", "") != _checksum(manifest):
        return None
    for name, file in manifest["files"].items():
        if storage.size(f"{folder}/{name}") != file["bytes"]:
            return None
    return manifest


def verified(folder: str, name: str) -> Path:
    """A file of a finished item, on the local disk, after its content was compared with the manifest.

    A remote file is fetched to this thread's scratch folder, where it stays until `forget_fetched`.

    Raises:
      SmoljaxError: the file is missing or was changed.
    """
    manifest = json.loads(storage.read_bytes(f"{folder}/{_MANIFEST}"))
    expected = manifest["files"][name]["xxh3"]
    path = _fetched(folder, name) if storage.is_remote(folder) else Path(folder) / name
    found = _file_hash(path) if path.is_file() else "no file"
    if found != expected:
        raise SmoljaxError(
            f"{folder}/{name} is damaged: its hash is {found}, its manifest says {expected}; "
            f"delete the folder {folder} and run the same command again"
        )
    return path


def forget_fetched() -> None:
    """Removes what `verified` brought from an object store."""
    if hasattr(_fetched_by, "scratch"):
        shutil.rmtree(_fetched_by.scratch, ignore_errors=True)
        del _fetched_by.scratch


# By the thread: a worker of Beam's may run several items at once, each of which forgets what it fetched.
_fetched_by = threading.local()


def _fetched(folder: str, name: str) -> Path:
    if not hasattr(_fetched_by, "scratch"):
        _fetched_by.scratch = Path(tempfile.mkdtemp(prefix="smoljax-fetched-"))
    path = _fetched_by.scratch / f"{xxhash.xxh3_64_hexdigest(folder)}-{name}"
    storage.download(f"{folder}/{name}", path)
    return path


def _fill(folder: Path, item: WorkItem) -> dict:
    start = time.monotonic()
    try:
        result = item.work(item.argument, folder)
    finally:
        forget_fetched()
    manifest = {
        "key": item.key,
        "result": result,
        "files": {
            path.name: {"bytes": path.stat().st_size, "xxh3": _file_hash(path)}
            for path in sorted(folder.iterdir())
        },
        "seconds": round(time.monotonic() - start, 3),
    }
    files.atomic_write_json(folder / _MANIFEST, {**manifest, "checksum": _checksum(manifest)})
    return manifest


def _checksum(manifest: dict) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())


def _file_hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _jsonable(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise SmoljaxError(f"a configuration cannot hold {value!r} of type {type(value).__name__}")
