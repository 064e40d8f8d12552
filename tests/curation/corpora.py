"""Real documents for the curation tests, out of Debian's packages and of the sdists that the quickstart pins.

The help of LibreOffice and the Debian handbook in six languages; the manuals of PostgreSQL, SQLite, Git, Apache and
Python, and SQLAlchemy's, in English; Django's documentation as reST; and thirty saved news pages under the name "web".
The packages are fetched once, by apt and pip as any user can run them, to .pytest_cache/corpora or the folder
that SMOLJAX_TEST_CORPORA names; a lock makes two test runs that start at once fetch them once.
"""

import contextlib
import fcntl
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import bytes_to_str, detect_encoding

from smoljax import files
from smoljax.errors import SmoljaxError

LANGUAGES = ("en", "fr", "es", "de", "it", "pt")
_ROOT = Path(__file__).parents[2]
# One page in so many is taken with all its menus, so that filters see pages of lists too.
_WHOLE_PAGES = 5


@dataclass(frozen=True)
class _Documents:
    """Files of one language in one package.

    Attributes:
      language: of the documents, or "web" for pages in any.
      package: of Debian, or the attribute of data/quickstart.py that pins an sdist.
      pattern: of the files, under the package's folder.
    """

    language: str
    package: str
    pattern: str


_HANDBOOKS = {
    "en": "en-US",
    "fr": "fr-FR",
    "es": "es-ES",
    "de": "de-DE",
    "it": "it-IT",
    "pt": "pt-BR",
}
_SOURCES = (
    *(
        _Documents(
            code,
            f"libreoffice-help-{'en-us' if code == 'en' else code}",
            f"usr/share/libreoffice/help/{'en-US' if code == 'en' else code}/text/**/*.html",
        )
        for code in LANGUAGES
    ),
    *(
        _Documents(code, "debian-handbook", f"usr/share/doc/debian-handbook/html/{folder}/*.html")
        for code, folder in _HANDBOOKS.items()
    ),
    *(
        _Documents(code, "apache2-doc", f"usr/share/doc/apache2-doc/manual/{code}/**/*.html")
        for code in ("en", "fr", "es", "de")
    ),
    # The folder that is no link: the package shows every page three times.
    _Documents("en", "python3.11-doc", "usr/share/doc/python3.11/html/**/*.html"),
    _Documents("en", "postgresql-doc-15", "usr/share/doc/postgresql-doc-15/html/*.html"),
    _Documents("en", "sqlite3-doc", "usr/share/doc/sqlite3/**/*.html"),
    _Documents("en", "git-doc", "usr/share/doc/git-doc/**/*.html"),
    _Documents("en", "debian-faq", "usr/share/doc/debian/FAQ/*.en.html"),
    _Documents("en", "developers-reference", "usr/share/developers-reference/*.html"),
    _Documents("en", "SQLALCHEMY", "doc/**/*.html"),
    _Documents("en", "DJANGO", "docs/**/*.txt"),
    _Documents("web", "NEWSPAPER", "tests/data/html/*.html"),
)


def texts(language: str, count: int) -> list[str]:
    """The first `count` distinct texts in a language ("en", "fr", "es", "de", "it" or "pt"), mixed over the packages.

    There are more than 5,000 in English and 2,000 in each other language. The test is skipped where there is no
    package index.
    """
    found = _texts(language)
    assert count <= len(found), f"{len(found)} texts in {language!r}, not {count}"
    return list(found[:count])


def pages(language: str, count: int) -> list[tuple[str, bytes]]:
    """The first `count` distinct HTML pages of a language, or of "web", as (package and path, bytes)."""
    with _prepared(language):
        named = _page_names(language)
        assert count <= len(named), f"{len(named)} pages in {language!r}, not {count}"
        return [(name, (folder() / name).read_bytes()) for name in named[:count]]


def count_pages(language: str) -> int:
    """How many distinct HTML pages there are in a language, or of "web"."""
    with _prepared(language):
        return len(_page_names(language))


def folder() -> Path:
    """Where the packages lie unpacked, one folder each."""
    default = _ROOT / ".pytest_cache" / "corpora"
    return Path(os.environ.get("SMOLJAX_TEST_CORPORA") or default)


@cache
def _texts(language: str) -> tuple[str, ...]:
    path = folder() / f"texts-{language}-{_version()}.parquet"
    with _prepared(language):
        if not path.is_file():
            found = {_text(name, (folder() / name).read_bytes()): None for name in _names(language)}
            table = pa.table({"text": [text for text in found if text.strip()]})
            with files.atomic_path(path) as temporary:
                pq.write_table(table, temporary)
    return tuple(pq.read_table(path).column("text").to_pylist())


@cache
def _page_names(language: str) -> tuple[str, ...]:
    """Names of the pages, without those that repeat another's bytes."""
    first: dict[int, str] = {}
    for name in _names(language):
        if name.endswith(".html"):
            first.setdefault(xxhash.xxh3_64_intdigest((folder() / name).read_bytes()), name)
    return tuple(first.values())


def _names(language: str) -> list[str]:
    """Files of a language, the packages in turn, each in the order of its names' hashes."""
    columns = []
    for source in _SOURCES:
        if source.language == language:
            root = folder() / source.package
            found = [p for p in root.glob(source.pattern) if p.is_file() and not p.is_symlink()]
            names = [p.relative_to(folder()).as_posix() for p in found]
            assert names, f"{source.package} holds no {source.pattern}"
            columns.append(sorted(names, key=xxhash.xxh3_64_intdigest))
    longest = max(map(len, columns))
    return [column[i] for i in range(longest) for column in columns if i < len(column)]


def _text(name: str, content: bytes) -> str:
    if not name.endswith(".html"):
        return content.decode("utf-8")
    page = bytes_to_str(content, detect_encoding(content, html5_compatible=True))
    main = xxhash.xxh3_64_intdigest(name) % _WHOLE_PAGES > 0
    return extract_plain_text(page, main_content=main, preserve_formatting=True)


def _version() -> str:
    """Of this file, by which a list of texts that an older one wrote is told apart."""
    return xxhash.xxh3_64_hexdigest(Path(__file__).read_bytes())


@contextlib.contextmanager
def _prepared(language: str) -> Iterator[None]:
    """Holds the folder while the packages of a language are fetched, and read."""
    folder().mkdir(parents=True, exist_ok=True)
    with open(folder() / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for package in sorted({s.package for s in _SOURCES if s.language == language}):
            if not (folder() / package).is_dir():
                (_fetch_sdist if package.isupper() else _fetch_deb)(package)
        yield


def _fetch_sdist(package: str) -> None:
    spec = importlib.util.spec_from_file_location("quickstart", _ROOT / "data/quickstart.py")
    quickstart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quickstart)
    sdist = getattr(quickstart, package)
    try:
        quickstart.fetch((sdist,), folder() / "sdists")
    except SmoljaxError as error:
        pytest.skip(f"the test documents need {package}: {error}")
    os.rename(folder() / "sdists" / sdist.folder, folder() / package)


def _fetch_deb(package: str) -> None:
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            pytest.skip(f"the test documents come in Debian packages: there is no {program} here")
    with files.atomic_directory(folder() / package) as unpacked:
        archives = unpacked / ".archives"
        archives.mkdir()
        done = _apt("download", package, cwd=archives)
        if done.returncode != 0:  # Without lists of packages, or with old ones.
            _apt("update", cwd=archives)
            done = _apt("download", package, cwd=archives)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            pytest.skip(f"the test documents need the Debian package {package}: {reason}")
        (archive,) = archives.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", str(archive), str(unpacked)], check=True)
        shutil.rmtree(archives)
        patterns = [source.pattern for source in _SOURCES if source.package == package]
        wanted = {path for pattern in patterns for path in unpacked.glob(pattern)}
        for path in [p for p in unpacked.rglob("*") if p.is_symlink() or p.is_file()]:
            if path not in wanted or path.is_symlink():
                path.unlink()


def _apt(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """apt-get with its lists in our folder once it had to fetch them, which needs no rights on the system's."""
    own = folder().absolute() / "apt"
    options = []
    if arguments[0] == "update":
        (own / "lists/partial").mkdir(parents=True, exist_ok=True)
        (own / "cache").mkdir(exist_ok=True)
    if own.is_dir():
        options = [f"--option=Dir::State::Lists={own}/lists", f"--option=Dir::Cache={own}/cache"]
    command = ["apt-get", "--quiet", *options, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)
