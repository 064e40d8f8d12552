"""Claim: the cost of curation is linear in documents, and the memory of a worker does not grow with them.

    pip install "smoljax[data,report,test]"
    python -m benchmarks.curation_scale [--sizes 10000 30000 100000 300000 1000000] [--folder DIR]

Documents are mixtures of real sentences (tests/curation/corpora.py, English), about 900 bytes each; one in twenty is an exact
copy of an earlier one and one in twenty a near copy (one sentence replaced). They lie in JSONL files of 16 MB and pass all of the
preset "fast" (language, FineWeb's filters, exact and MinHash deduplication, addresses) in one process: CPU seconds, which other
work on the machine hardly changes, and the peak of its memory. The table and a plot are written to benchmarks/results/.
"""

import argparse
import datetime
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000)
FILE_BYTES = 16 << 20
EXACT, NEAR = 0.05, 0.05
RECIPE = """
from smoljax.curation.sources import Files

def sources(workdir):
    return (Files("mixture", {pattern!r}, "fast"),)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--folder", type=Path, help="for the documents; removed afterwards")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(curate(args.folder)))
        return
    rows = []
    for size in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            write_documents(Path(folder), size)
            command = [sys.executable, __file__, "--worker", f"--folder={folder}"]
            variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                command, stdout=subprocess.PIPE, env=variables, cwd=ROOT, check=True
            )
        rows.append({"documents": size, **json.loads(done.stdout.splitlines()[-1])})
        print(rows[-1], flush=True)
        write_results(rows)


def write_documents(folder: Path, count: int) -> None:
    """Files of JSONL; the first documents of a larger corpus are those of a smaller one."""
    from tests.curation import corpora

    found = (s.strip() for text in corpora.texts("en", 3000) for s in text.split(". "))
    sentences = [" ".join(s.split()) + "." for s in found if 40 <= len(s) <= 240 and "{" not in s]
    random_of = random.Random(0)
    earlier: list[list[str]] = []
    lines: list[str] = []
    size = number = 0
    for at in range(count):
        draw = random_of.random()
        if earlier and draw < EXACT + NEAR:
            chosen = list(random_of.choice(earlier))
            if draw < NEAR:
                chosen[random_of.randrange(len(chosen))] = random_of.choice(sentences)
        else:
            chosen = random_of.choices(sentences, k=random_of.randint(6, 10))
        if at % 100 == 0:  # Copies are of one document in a hundred, so that this stays small.
            earlier.append(chosen)
        lines.append(json.dumps({"text": "\n".join(chosen)}) + "\n")
        size += len(lines[-1])
        if size >= FILE_BYTES or at == count - 1:
            (folder / f"{number:04d}.jsonl").write_text("".join(lines), encoding="utf-8")
            lines, size, number = [], 0, number + 1


def curate(folder: Path) -> dict:
    """All of a curation in this process; its CPU seconds, peak memory and what it keeps."""
    from smoljax import curation

    recipe = folder / "recipe.py"
    recipe.write_text(RECIPE.format(pattern=f"{folder}/*.jsonl"))
    config = curation.CurationConfig(str(recipe), heldout_fraction=0.0, shard_bytes=FILE_BYTES)
    start, wall = time.process_time(), time.monotonic()
    manifest = curation.curate(config, folder / "run", workers=1)
    seconds = time.process_time() - start
    reasons: dict[str, int] = {}
    for stage in manifest["stages"]:
        reasons |= stage["removed_by_reason"]
    return {
        "bytes": sum(path.stat().st_size for path in folder.glob("*.jsonl")),
        "kept": manifest["sources"]["mixture"]["train"]["documents"],
        "exact": reasons.get("dedup:exact", 0),
        "near": reasons.get("dedup:minhash", 0),
        "cpu_seconds": round(seconds, 1),
        "wall_seconds": round(time.monotonic() - wall, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
    }


def write_results(rows: list[dict]) -> None:
    """The table and the plot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    stem = ROOT / f"benchmarks/results/curation_scale_{datetime.date.today()}"
    lines = [
        f"{datetime.date.today()}, one process; `python -m benchmarks.curation_scale`\n",
        "| documents | MB | kept | exact copies | near copies | CPU s | documents per CPU s | peak memory |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['documents']:,} | {row['bytes'] / 1e6:,.0f} | {row['kept']:,} | {row['exact']:,} | {row['near']:,} "
            f"| {row['cpu_seconds']:,.1f} | {row['documents'] / row['cpu_seconds']:,.0f} | {row['peak_mb']:,} MB |"
        )
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    figure, (time_axes, memory_axes) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    sizes = [row["documents"] for row in rows]
    seconds = [row["cpu_seconds"] for row in rows]
    linear = [seconds[-1] * size / sizes[-1] for size in sizes]
    time_axes.loglog(sizes, linear, ":", color="gray", label="linear, through the last")
    time_axes.loglog(sizes, seconds, "o-", label="measured")
    time_axes.set(xlabel="documents", ylabel="CPU seconds", title="Cost of curation")
    time_axes.legend()
    memory_axes.semilogx(sizes, [row["peak_mb"] for row in rows], "o-")
    memory_axes.set(xlabel="documents", ylabel="MB", title="Peak memory of the process")
    memory_axes.set_ylim(bottom=0)
    figure.savefig(stem.with_suffix(".png"), dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
