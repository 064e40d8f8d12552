"""Source distributions as a corpus: pinned by version and hash, fetched by pip from whatever index it is set to.

pip prepares the metadata of an sdist before it saves it, which normally downloads the build tools and runs code of
the package. Here pip is given a build backend that only copies the PKG-INFO that every sdist holds, so nothing of
a package is run and nothing else is downloaded.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from smoljax import files
from smoljax.errors import SmoljaxError

_TEMPORARY = ".fetch-"
_STAMP = ".fetched"
_SCRATCH_BYTES = 1 << 30
# The names under which sdists ask for their build backend.
_BACKENDS = (
    "setuptools.build_meta",
    "flit_core.buildapi",
    "hatchling.build",
    "poetry.core.masonry.api",
)
_BACKEND = """
import pathlib, re

def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    metadata = pathlib.Path("PKG-INFO").read_text(encoding="utf-8")
    name = re.search("^Name: (.*)$", metadata, re.M)[1].strip()
    version = re.search("^Version: (.*)$", metadata, re.M)[1].strip()
    folder = re.sub("[-_.]+", "_", name) + "-" + version + ".dist-info"
    path = pathlib.Path(metadata_directory, folder)
    path.mkdir()
    path.joinpath("METADATA").write_text(metadata, encoding="utf-8")
    path.joinpath("WHEEL").write_text("Wheel-Version: 1.0\\n")
    return folder
"""


@dataclass(frozen=True)
class Sdist:
    """One source distribution.

    Attributes:
      name: the package's name on the index.
      version: exact.
      sha256: of the .tar.gz file, in hexadecimal digits.
      members: patterns of the files to unpack, by their path under the top folder (`*` crosses "/").
    """

    name: str
    version: str
    sha256: str
    members: tuple[str, ...] = ("*",)

    @property
    def folder(self) -> str:
        """The archive's top folder, and its name without ".tar.gz"."""
        return f"{self.name.lower().replace('-', '_')}-{self.version}"

    @property
    def stamp(self) -> str:
        """What is noted in the unpacked folder; another stamp is fetched anew."""
        return f"sha256 {self.sha256}\nmembers {' '.join(self.members)}\n"


def fetch(sdists: Sequence[Sdist], directory: Path, *, environment: Mapping | None = None) -> None:
    """Unpacks the sdists to `directory/<name>-<version>/`; one that is there already is not fetched again.

    Args:
      sdists: what to fetch.
      directory: made when it is missing. Each package appears there whole, or not at all.
      environment: variables for pip on top of this process's own.

    Raises:
      SmoljaxError: pip could not fetch a file, or its hash is another.
    """
    missing = [sdist for sdist in sdists if not _is_there(sdist, directory)]
    if not missing:
        return
    directory = directory.absolute()  # pip's hooks run in folders of their own.
    directory.mkdir(parents=True, exist_ok=True)
    for left in directory.glob(f"{_TEMPORARY}*"):  # By a fetch that was killed.
        shutil.rmtree(left, ignore_errors=True)
    print(f"fetching {', '.join(sdist.folder for sdist in missing)}", file=sys.stderr, flush=True)
    with (
        files.explain_full_disk(directory),
        tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=directory) as temporary,
    ):
        _download(missing, Path(temporary), environment or {})
        for sdist in missing:
            _unpack(sdist, Path(temporary))
        os.sync()  # Once for thousands of small files; the rename must not reach the disk before them.
        for sdist in missing:
            shutil.rmtree(directory / sdist.folder, ignore_errors=True)
            os.replace(Path(temporary) / "unpacked" / sdist.folder, directory / sdist.folder)


def _is_there(sdist: Sdist, directory: Path) -> bool:
    try:
        return (directory / sdist.folder / _STAMP).read_text(encoding="utf-8") == sdist.stamp
    except OSError:
        return False


def _download(sdists: Sequence[Sdist], folder: Path, environment: Mapping) -> None:
    for backend in _BACKENDS:
        path = folder / "backends" / Path(*backend.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        for package in path.parents[: backend.count(".")]:
            (package / "__init__.py").touch()
        path.write_text(_BACKEND, encoding="utf-8")
    pins = [f"{s.name}=={s.version} --hash=sha256:{s.sha256}\n" for s in sdists]
    (folder / "pins.txt").write_text("".join(pins), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-input", "--retries=2", "--no-deps", "--no-binary=:all:", "--require-hashes"]
    command += ["--no-build-isolation", f"--dest={folder}", f"--requirement={folder / 'pins.txt'}"]
    variables = os.environ | {"PYTHONPATH": str(folder / "backends")}
    with _scratch() as scratch:
        variables |= {"TMPDIR": scratch} | environment
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        errors = [line for line in lines if "ERROR" in line] or lines[-1:]
        raise SmoljaxError(
            f"pip could not fetch {', '.join(f'{s.name}=={s.version}' for s in sdists)} "
            f"({errors[0].strip()}): check the connection to the package index, and `pip config list`, "
            "then run the same command again"
        )


@contextlib.contextmanager
def _scratch() -> Iterator[str]:
    """A folder for pip, which unpacks every file of an sdist to read one: in memory where there is room."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or shutil.disk_usage(memory).free < _SCRATCH_BYTES:
        memory = None
    with tempfile.TemporaryDirectory(prefix="smoljax-fetch-", dir=memory) as folder:
        yield folder


def _unpack(sdist: Sdist, downloads: Path) -> None:
    archive = downloads / f"{sdist.folder}.tar.gz"
    if not archive.is_file():
        raise SmoljaxError(
            f"pip fetched no {archive.name} for {sdist.name}=={sdist.version}: "
            f"it fetched {', '.join(sorted(p.name for p in downloads.glob('*.tar.gz'))) or 'nothing'}"
        )
    unpacked = downloads / "unpacked"

    def chosen(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
        name = member.name.partition("/")[2]
        if not member.isfile() or not any(fnmatchcase(name, p) for p in sdist.members):
            return None
        return tarfile.data_filter(
            member, folder
        )  # Refuses absolute paths, "..", and links to outside.

    with tarfile.open(archive) as tar:
        tar.extractall(unpacked, filter=chosen)
    (unpacked / sdist.folder / _STAMP).write_text(sdist.stamp, encoding="utf-8")
