"""Held-out bits per byte of one small model trained on raw pages, on what each of FineWeb's filters leaves, and on what all leave.

The pages are those of the tests' corpora (tests/curation/corpora.py: manuals and help pages, out of Debian's packages), written
as WARC files: English ones, and as many again in five other languages. The books that are scored (the Debian handbook, the developers'
reference, the FAQ) are English prose, from none of the packages that are trained on.

Runs `python -m smoljax.curate --only=ablation` on configs/ablations/curation.py and copies its table, figures and plot to
benchmarks/results/curation_ablation.{md,json,png}.

Command:   python -m benchmarks.curation_ablation --workdir=runs/curation_ablation
"""

import argparse
import gzip
import io
import shutil
import subprocess
import sys
from pathlib import Path

from fastwarc.warc import WarcRecord, WarcRecordType

from smoljax import files
from tests.curation import corpora

CONFIG = "configs/ablations/curation.py"
RESULTS = Path("benchmarks/results")
BOOKS = ("debian-handbook", "developers-reference", "debian-faq")
ENGLISH, OF_EACH_OTHER = 3000, 600
PAGES_PER_FILE = 400


def main() -> None:
    """Writes the pages, runs the ablation, keeps its results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/curation_ablation")
    workdir = Path(parser.parse_args().workdir)
    if not (workdir / "raw").is_dir():
        write_pages(workdir / "raw")
    patterns = "--config.curation.arguments.patterns"
    command = [
        sys.executable,
        "-m",
        "smoljax.curate",
        "--only=ablation",
        f"--config={CONFIG}",
        f"--workdir={workdir}",
        f"{patterns}.web={workdir}/raw/web-*.warc.gz",
        f"{patterns}.books={workdir}/raw/books-*.warc.gz",
    ]
    print(" ".join(command[1:]), flush=True)
    subprocess.run(command, check=True)
    for ending in ("json", "md", "png"):
        shutil.copy(
            workdir / f"ablation/ablation.{ending}", RESULTS / f"curation_ablation.{ending}"
        )


def write_pages(folder: Path) -> None:
    """The WARC files of both sources."""
    english = corpora.pages("en", corpora.count_pages("en"))
    books = [page for page in english if page[0].startswith(BOOKS)]
    web = [page for page in english if not page[0].startswith(BOOKS)][:ENGLISH]
    for language in corpora.LANGUAGES[1:]:
        others = corpora.pages(language, corpora.count_pages(language))
        web += [page for page in others if not page[0].startswith(BOOKS)][:OF_EACH_OTHER]
    with files.atomic_directory(folder) as whole:
        for name, pages in (("web", web), ("books", books)):
            for number in range(0, len(pages), PAGES_PER_FILE):
                path = whole / f"{name}-{number // PAGES_PER_FILE:03d}.warc.gz"
                path.write_bytes(warc(pages[number : number + PAGES_PER_FILE]))
            print(f"{name}: {len(pages):,} pages, {sum(len(page) for _, page in pages):,} bytes")


def warc(pages: list[tuple[str, bytes]]) -> bytes:
    """A compressed WARC file: a gzip member with a response record for each page."""
    members = []
    for name, content in pages:
        head = (
            f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        record = WarcRecord()
        record.init_headers(WarcRecordType.response)
        record.headers["WARC-Target-URI"] = f"https://example.org/{name}"
        record.headers["Content-Type"] = "application/http; msgtype=response"
        record.set_bytes_content(head.encode() + content)
        buffer = io.BytesIO()
        record.write(buffer)
        members.append(gzip.compress(buffer.getvalue(), mtime=0))
    return b"".join(members)


if __name__ == "__main__":
    main()
