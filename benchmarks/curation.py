"""Claim: smoljax curates several times as fast as datatrove 0.10, with the same decisions; and what memory both take.

    pip install "smoljax[data,test]" orjson  # datatrove reads JSONL with it
    python -m benchmarks.curation [--parts filters signatures job pages] [--documents 2000] [--rounds 3]

Real documents (tests/curation/corpora.py, English), each side in a process of its own that sees the text for the first time;
the sides take turns, so that noise from neighbours meets both. Neither side finds PyTorch.
  filters     the chain gopher_repetition, gopher_quality, c4, fineweb, which ends at the first rule that fails, on one core
  signatures  MinHash signatures of FineWeb's script (14 x 8, sha1), on one core
  job         JSONL files to documents: the same filters and MinHash deduplication, from process start to end, with one worker on
              one core and two on two; memory is the greatest share of any process
  pages       WARC files to documents by the preset "fast", likewise (datatrove has no fast extractor: smoljax alone), and
              resiliparse's own two calls on the same pages: no pipeline around them can be faster
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SIDES = ("smoljax", "datatrove")
PARTS = ("filters", "signatures", "job", "pages")
FILTERS = ("gopher_repetition", "gopher_quality", "c4", "fineweb")
C4 = {"terminal_lines": False}  # As FineWeb runs it.
FILES = 8
RECIPE = """
from smoljax.curation.sources import Files

def sources(workdir):
    return (Files("documents", {pattern!r}, {preset!r}),)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3, help="of filters and signatures")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(WORK[args.parts[0], args.side](args)))
        return
    lines = [_about(args)]
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        _write_input(args)
        for part in args.parts:
            compare = _in_turns if part in ("filters", "signatures") else _whole_jobs
            lines += compare(part, args)
            print("\n".join(lines), flush=True)
            _write_results(lines)


def _in_turns(part: str, args: argparse.Namespace) -> list[str]:
    found: dict[str, list[dict]] = {side: [] for side in SIDES}
    for _ in range(args.rounds):
        for side in SIDES:
            found[side].append(_ask(part, side, args, workers=1))
    assert len({run["outcome"] for runs in found.values() for run in runs}) == 1, found
    rates = {s: [run["documents"] / run["seconds"] for run in runs] for s, runs in found.items()}
    ratios = [ours / theirs for ours, theirs in zip(*rates.values())]
    memory = {side: max(run["greatest_mb"] for run in runs) for side, runs in found.items()}
    return [
        f"\n### {part}: {found['smoljax'][0]['documents']:,} documents, one core, first sight; "
        f"both sides: {found['smoljax'][0]['outcome']}\n",
        "| | documents/s, median of rounds | peak memory |",
        "|---|--:|--:|",
        *(f"| {s} | {statistics.median(rates[s]):,.0f} | {memory[s]:,.0f} MB |" for s in SIDES),
        f"\n{statistics.median(ratios):.1f} times as fast, {min(ratios):.1f} to {max(ratios):.1f} by rounds.",
    ]


def _whole_jobs(part: str, args: argparse.Namespace) -> list[str]:
    lines = [
        f"\n### {part}: from process start to end\n",
        "| | workers | documents/s | seconds | greatest process | kept |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    seconds = {}
    sides = {"job": (SIDES, SIDES), "pages": (("smoljax", "resiliparse"), SIDES[:1])}[part]
    for workers in (1, 2):
        for side in sides[workers - 1]:
            run = _ask(part, side, args, workers=workers)
            seconds[side, workers] = run["wall"]
            lines.append(
                f"| {side} | {workers} | {run['documents'] / run['wall']:,.0f} | {run['wall']:.1f} "
                f"| {run['greatest_mb']:,.0f} MB | {run['kept']:,} |"
            )
    if part == "job":
        ratios = [seconds["datatrove", n] / seconds["smoljax", n] for n in (1, 2)]
        lines.append(f"\n{ratios[0]:.1f} times as fast with one worker, {ratios[1]:.1f} with two.")
    return lines


def _ask(part: str, side: str, args: argparse.Namespace, *, workers: int) -> dict:
    """Runs a side in a new process on `workers` cores; adds its wall time and its greatest process to what it says."""
    cores = sorted(os.sched_getaffinity(0))[:workers]
    command = [sys.executable, __file__, "--parts", part, "--side", side]
    command += [f"--folder={args.folder}", f"--workers={workers}", f"--documents={args.documents}"]
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{args.folder}/hidden:{ROOT}", "HF_HUB_OFFLINE": "1"},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    peaks: dict[int, float] = {}
    watcher = threading.Thread(target=_watch, args=(process.pid, peaks), daemon=True)
    watcher.start()
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    found = json.loads(output.splitlines()[-1])
    return {"wall": time.monotonic() - start} | found | {"greatest_mb": max(peaks.values())}


def _watch(pid: int, peaks: dict[int, float]) -> None:
    """Keeps the peak memory (MB) of a process and of all that it started, as long as it lives.

    Pages that several processes share count for each in its part (Pss), so that the sum is what the machine needs.
    """
    import psutil

    while psutil.pid_exists(pid):
        try:
            root = psutil.Process(pid)
            for process in [root, *root.children(recursive=True)]:
                lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
                share = next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
                peaks[process.pid] = max(peaks.get(process.pid, 0.0), share / 1e3)
        except (psutil.NoSuchProcess, OSError, StopIteration):
            pass  # One of them has ended meanwhile.
        time.sleep(0.1)


def _write_input(args: argparse.Namespace) -> None:
    from benchmarks.curation_ablation import warc
    from tests.curation import corpora

    # spaCy would import PyTorch where it is installed: 200 MB for datatrove's side, which needs none of it.
    (args.folder / "hidden").mkdir()
    (args.folder / "hidden" / "torch.py").write_text('raise ImportError("hidden")\n')
    texts = corpora.texts("en", args.documents)
    for number in range(FILES):
        rows = (
            json.dumps({"text": text, "id": str(i)}) for i, text in enumerate(texts[number::FILES])
        )
        (args.folder / f"{number}.jsonl").write_text("\n".join(rows) + "\n")
    if "pages" in args.parts:
        pages = corpora.pages("en", args.documents)
        for number in range(FILES):
            (args.folder / f"{number}.warc.gz").write_bytes(warc(pages[number::FILES]))


def _texts(args: argparse.Namespace) -> list[str]:
    return [
        json.loads(line)["text"]
        for number in range(FILES)
        for line in (args.folder / f"{number}.jsonl").read_text().splitlines()
    ]


def _smoljax_filters(args: argparse.Namespace) -> dict:
    import pyarrow as pa

    from smoljax.curation import chain, schema

    columns = {name: [""] for name in ("id", "source", "path", "media_type")}
    steps = chain.build({"order": ("extract", *FILTERS), "c4": C4}).before_dedup

    def batch(texts: list[str]) -> pa.RecordBatch:
        filled = {name: value * len(texts) for name, value in columns.items()}
        filled |= {"text": texts, "language": ["en"] * len(texts)}
        absent = ("url", "language_score", "cluster_size")
        filled |= {name: [None] * len(texts) for name in absent}
        return pa.RecordBatch.from_pydict(filled, schema=schema.DOCUMENT)

    def run(texts: list[str]) -> int:
        kept = batch(texts)
        for step in steps:
            kept, _ = step.run(kept)
        return kept.num_rows

    texts = _texts(args)
    run(["Loads what is loaded at the first call."])
    start = time.perf_counter()
    kept = sum(run(texts[at : at + 128]) for at in range(0, len(texts), 128))
    return _figures(start, texts, f"{kept:,} kept")


def _datatrove_filters(args: argparse.Namespace) -> dict:
    from datatrove.data import Document

    filters = _peer_filters()

    def keeps(text: str) -> bool:
        document = Document(text=text, id="")
        return all(one.filter(document) is True for one in filters)

    texts = _texts(args)
    keeps("Loads what is loaded at the first call.")
    start = time.perf_counter()
    kept = sum(map(keeps, texts))
    return _figures(start, texts, f"{kept:,} kept")


def _peer_filters() -> list:
    from datatrove.pipeline import filters

    return [
        filters.GopherRepetitionFilter(),
        filters.GopherQualityFilter(),
        filters.C4QualityFilter(filter_no_terminal_punct=False),
        filters.FineWebQualityFilter(),
    ]


def _peer_minhash():
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.hashing import HashConfig

    return MinhashConfig(hash_config=HashConfig(hash_fc="sha1", precision=64))


def _smoljax_signatures(args: argparse.Namespace) -> dict:
    from smoljax.curation.dedup import minhash

    texts = _texts(args)
    minhash.signatures(["Loads what is loaded at the first call, and so on."], minhash.FINEWEB)
    start = time.perf_counter()
    rows = [
        minhash.signatures(texts[i : i + 512], minhash.FINEWEB) for i in range(0, len(texts), 512)
    ]
    digest = sum(int(found[valid].sum()) for found, valid in rows) % 2**64
    return _figures(start, texts, f"checksum {digest:x}")


def _datatrove_signatures(args: argparse.Namespace) -> dict:
    from datatrove.pipeline.dedup import MinhashDedupSignature

    texts = _texts(args)
    signer = MinhashDedupSignature(str(args.folder / "unused"), _peer_minhash())
    signer.get_shingles("Loads what is loaded at the first call, and so on.")
    start = time.perf_counter()
    digest = 0
    for text in texts:
        shingles = signer.get_shingles(text)
        if shingles.size:
            digest += sum(map(sum, signer.get_signature(shingles)))
    return _figures(start, texts, f"checksum {digest % 2**64:x}")


def _figures(start: float, texts: list[str], outcome: str) -> dict:
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "documents": len(texts), "outcome": outcome}


def _smoljax_job(args: argparse.Namespace) -> dict:
    dedup = {"exact": False, "minhash": "fineweb"}
    preset = {"order": ("extract", *FILTERS, "dedup"), "dedup": dedup, "c4": C4}
    return _curate(args, "*.jsonl", {"documents": preset}, "documents")


def _smoljax_pages(args: argparse.Namespace) -> dict:
    from smoljax.curation import presets

    return _curate(args, "*.warc.gz", presets.defaults(), "fast")


def _curate(args: argparse.Namespace, pattern: str, presets: dict, preset: str) -> dict:
    from smoljax.curation import CurationConfig, curate

    with tempfile.TemporaryDirectory(dir=args.folder) as workdir:
        recipe = Path(workdir) / "recipe.py"
        recipe.write_text(RECIPE.format(pattern=str(args.folder / pattern), preset=preset))
        config = CurationConfig(
            str(recipe), presets=presets, heldout_fraction=0.0, shard_bytes=4 << 20
        )
        manifest = curate(config, workdir, workers=args.workers)
    (source,) = manifest["sources"].values()
    kept = source["train"]["documents"]
    return {"documents": kept + source["removed"], "kept": kept}


def _datatrove_job(args: argparse.Namespace) -> dict:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    config = _peer_minhash()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:

        def run(tasks: int, *pipeline) -> None:
            LocalPipelineExecutor(
                list(pipeline),
                tasks=tasks,
                workers=args.workers,
                logging_dir=tempfile.mkdtemp(dir=folder),
            ).run()

        read = JsonlReader(str(args.folder), glob_pattern="*.jsonl")
        run(FILES, read, *_peer_filters(), JsonlWriter(f"{folder}/filtered"))
        again = JsonlReader(f"{folder}/filtered")
        run(FILES, again, MinhashDedupSignature(f"{folder}/signatures", config))
        buckets = MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/buckets", config=config)
        run(config.num_buckets, buckets)
        run(1, MinhashDedupCluster(f"{folder}/buckets", f"{folder}/clusters", config=config))
        writer = JsonlWriter(f"{folder}/output")
        run(FILES, again, MinhashDedupFilter(f"{folder}/clusters"), writer)
        kept = sum(1 for _ in JsonlReader(f"{folder}/output").run())
    return {"documents": len(_texts(args)), "kept": kept}


def _resiliparse(args: argparse.Namespace) -> dict:
    """Parses pages and takes their main content, with resiliparse's defaults for plain text."""
    from fastwarc.warc import ArchiveIterator
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLTree

    pages = []
    for path in sorted(args.folder.glob("*.warc.gz")):
        with open(path, "rb") as file:
            pages += [record.reader.read() for record in ArchiveIterator(file)]
    start = time.perf_counter()
    for page in pages:
        tree = HTMLTree.parse(page.decode("utf-8", "replace"))
        extract_plain_text(tree, main_content=True, preserve_formatting=True)
    return {"documents": len(pages), "wall": time.perf_counter() - start, "kept": len(pages)}


WORK = {
    ("filters", "smoljax"): _smoljax_filters,
    ("filters", "datatrove"): _datatrove_filters,
    ("signatures", "smoljax"): _smoljax_signatures,
    ("signatures", "datatrove"): _datatrove_signatures,
    ("job", "smoljax"): _smoljax_job,
    ("job", "datatrove"): _datatrove_job,
    ("pages", "smoljax"): _smoljax_pages,
    ("pages", "resiliparse"): _resiliparse,
}


def _about(args: argparse.Namespace) -> str:
    from importlib.metadata import version

    peers = ", ".join(f"{name} {version(name)}" for name in ("datatrove", "spacy", "numpy"))
    command = f"python -m benchmarks.curation --parts {' '.join(args.parts)}"
    return f"{datetime.date.today()}, {len(os.sched_getaffinity(0))} cores, {peers}\n\n`{command}`"


def _write_results(lines: list[str]) -> None:
    path = ROOT / f"benchmarks/results/curation_{datetime.date.today()}.md"
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
