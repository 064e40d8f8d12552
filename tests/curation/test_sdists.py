"""Fetching pinned sdists with pip: from a folder that serves as an index, from no index, and from the real one."""

import hashlib
import importlib.util
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from smoljax.curation.sdists import Sdist, fetch
from smoljax.errors import SmoljaxError

RECIPES = Path(__file__).parents[2] / "data"

# pip must not look elsewhere than where a test says.
ALONE = {"PIP_CONFIG_FILE": "/dev/null", "PIP_EXTRA_INDEX_URL": "", "PIP_CONSTRAINT": ""}


def make_sdist(
    folder: Path, *, backend: str = "setuptools.build_meta", evil: bool = False
) -> Sdist:
    """Writes tiny-1.0.tar.gz, whose own build code would fail, and returns its pin."""
    project = (
        f'[build-system]\nrequires = ["no-such-package-exists"]\nbuild-backend = "{backend}"\n'
    )
    members = {
        "tiny-1.0/PKG-INFO": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
        "tiny-1.0/pyproject.toml": project,
        "tiny-1.0/setup.py": "raise SystemExit('code of the package was run')\n",
        "tiny-1.0/docs/a.txt": "A document.\n",
        "tiny-1.0/docs/deep/b.txt": "Another document.\n",
        "tiny-1.0/src/c.py": "x = 1\n",
    }
    path = folder / "tiny-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(text), 1_700_000_000
            archive.addfile(info, io.BytesIO(text.encode()))
        if evil:
            info = tarfile.TarInfo("tiny-1.0/docs/../../../outside.txt")
            info.size = 4
            archive.addfile(info, io.BytesIO(b"evil"))
    return Sdist("tiny", "1.0", hashlib.sha256(path.read_bytes()).hexdigest(), ("docs/*",))


def local(folder: Path) -> dict[str, str]:
    return ALONE | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}


@pytest.mark.parametrize(
    "backend",
    ["setuptools.build_meta", "flit_core.buildapi", "hatchling.build", "poetry.core.masonry.api"],
)
def test_fetch_unpacks_what_is_asked_runs_no_code_and_does_it_once(tmp_path, backend):
    sdist = make_sdist(tmp_path, backend=backend)
    raw = tmp_path / "raw"
    fetch((sdist,), raw, environment=local(tmp_path))
    found = sorted(p.relative_to(raw).as_posix() for p in raw.rglob("*") if p.is_file())
    assert found == ["tiny-1.0/.fetched", "tiny-1.0/docs/a.txt", "tiny-1.0/docs/deep/b.txt"]
    assert (raw / "tiny-1.0/docs/a.txt").stat().st_mtime == 1_700_000_000
    (tmp_path / "tiny-1.0.tar.gz").unlink()
    fetch((sdist,), raw, environment=local(tmp_path))  # Nothing is asked of pip.


def test_another_hash_is_refused_and_nothing_is_left(tmp_path):
    sdist = make_sdist(tmp_path)
    wrong = Sdist(sdist.name, sdist.version, "0" * 64, sdist.members)
    with pytest.raises(SmoljaxError, match=r"pip could not fetch tiny==1\.0"):
        fetch((wrong,), tmp_path / "raw", environment=local(tmp_path))
    assert list((tmp_path / "raw").iterdir()) == []


def test_members_that_lead_outside_are_refused(tmp_path):
    sdist = make_sdist(tmp_path, evil=True)
    with pytest.raises((SmoljaxError, tarfile.TarError)):
        fetch((sdist,), tmp_path / "raw", environment=local(tmp_path))
    assert not list(tmp_path.rglob("outside.txt"))
    assert not (tmp_path / "raw/tiny-1.0").exists()


def test_no_index_is_one_clear_error(tmp_path):
    sdist = Sdist("tiny", "1.0", "0" * 64)
    nowhere = ALONE | {
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_FIND_LINKS": "",
        "PIP_RETRIES": "0",
    }
    with pytest.raises(
        SmoljaxError, match=r"pip could not fetch tiny==1\.0 .* package index"
    ) as caught:
        fetch((sdist,), tmp_path / "raw", environment=nowhere)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "raw").iterdir()) == []


def test_what_a_killed_fetch_left_is_removed(tmp_path):
    sdist = make_sdist(tmp_path)
    left = tmp_path / "raw/.fetch-left"
    left.mkdir(parents=True)
    (left / "half.tar.gz").write_bytes(b"half")
    fetch((sdist,), tmp_path / "raw", environment=local(tmp_path))
    assert [path.name for path in (tmp_path / "raw").iterdir()] == ["tiny-1.0"]


@pytest.mark.network
def test_the_pins_of_the_quickstart_are_on_the_index(pytestconfig):
    """Fetches the smallest of them, into the pytest cache, and counts what the recipe says it holds."""
    recipe = load_recipe("quickstart")
    folder = Path(pytestconfig.cache.mkdir("sdists"))
    if not (folder / recipe.NEWSPAPER.folder).is_dir() and not index_is_there():
        pytest.skip("no Python package index can be reached")
    fetch((recipe.NEWSPAPER,), folder)
    pages = list((folder / recipe.NEWSPAPER.folder / "tests/data/html").glob("*.html"))
    assert len(pages) == 30


def load_recipe(name: str):
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def index_is_there() -> bool:
    asked = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "index",
            "versions",
            "newspaper4k",
            "--retries=0",
            "--timeout=20",
        ],
        capture_output=True,
    )
    return asked.returncode == 0
