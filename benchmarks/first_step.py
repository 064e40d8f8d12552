"""Seconds from the start of the process to the end of the first training step of the quickstart model.

    make quickstart        # once, for its shards and its tokenizer
    python benchmarks/first_step.py [--workdir runs/quickstart] [--rounds 3] [--checkouts . ../before]

Starts `python -m smoljax.train` as a person does and waits for the first row of its metrics.jsonl, which is written when the first
step has ended; the process is then killed. "cold" has an empty compile cache, "warm" the one that the cold start left.
Files are in the page cache (one start goes before). Several checkouts of smoljax take turns. Processor time is that of the process
on all cores: other work on the machine hardly changes it.

Result, 2026-11-25, 2 cores (Intel Xeon), jax 0.10.2; "before" is e2c138b, where TensorFlow's import, the matmul peak and ten small
programs of the learning rate came before the first row, and the program of the parameters was unrolled:
    before, a quiet machine, --rounds 2: cold 11.88 s at best (median 11.94), warm 5.92 s (5.99).
    after (c4bc951), a quiet machine, --rounds 3: cold 7.46 s at best (median 7.50), warm 3.26 s (3.31).
    later that day, a slower hour, --rounds 4, 5a7d126 beside 8bcc0b2 (the step is traced while the parameters are made; LLVM's first level):
        cold 7.91 s at best (median 8.05) and 7.10 s (7.37), warm 3.31 s (3.64) and 3.37 s (3.52).
    later still, another quiet hour, --rounds 2, 3f9c327 beside bd325c9 (fewer collections of garbage, Orbax after the first step,
        the model traced once for its shapes and its parameters): cold 6.76 s at best (median 6.87) and 6.36 s (6.47), warm 3.13 s (3.20) and
        2.82 s (2.93).
    last, a quiet hour, --rounds 3, d5ab00f (the step is compiled while the program of the parameters is): cold 6.04 s at best (median 6.16),
        warm 2.84 s (2.90).
    before and after (921cdaf with the projections of 616d5be), a busy machine, --rounds 1, processor time: cold 27.24 s and 15.56 s, warm 10.78 s and 6.05 s.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = "configs/quickstart.py"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkouts", type=Path, nargs="+", default=[Path()])
    args = parser.parse_args()
    if not (args.workdir / "shards").is_dir() or not (args.workdir / "tokenizer").is_dir():
        print(
            f"{args.workdir} has no shards and tokenizer: run `make quickstart` first, or name a workdir that has them "
            "with --workdir",
            file=sys.stderr,
        )
        return 1
    seconds = {(checkout, kind): [] for checkout in args.checkouts for kind in ("cold", "warm")}
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch) / "compiled"
        for checkout in args.checkouts:
            first_step(checkout, args.workdir, cache)
        for _ in range(args.rounds):
            for checkout in args.checkouts:
                shutil.rmtree(cache)
                for kind in ("cold", "warm"):
                    seconds[checkout, kind].append(first_step(checkout, args.workdir, cache))
    for (checkout, kind), pairs in seconds.items():
        times, processor = zip(*pairs)
        print(
            f"{checkout!s:20s} {kind}: {min(times):.2f} s at best, median {statistics.median(times):.2f} s, "
            f"{min(processor):.2f} s of processor time; {len(pairs)} starts"
        )
    return 0


def first_step(checkout: Path, workdir: Path, cache: Path) -> tuple[float, float]:
    """Seconds until the row of step 1 is there, and processor time of all cores until then.

    Raises:
      SystemExit: training ended before it.
    """
    workdir = workdir.resolve()
    with tempfile.TemporaryDirectory() as run:
        command = [
            *(sys.executable, "-m", "smoljax.train", f"--config={CONFIG}", f"--workdir={run}"),
            f"--config.data.directory={workdir / 'shards'}",
            f"--config.tokenizer.directory={workdir / 'tokenizer'}",
        ]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
        }
        rows = Path(run) / "train" / "metrics.jsonl"
        before, start = os.times(), time.perf_counter()
        process = subprocess.Popen(
            command, cwd=checkout, env=environment, stderr=subprocess.PIPE, text=True
        )
        while not (rows.exists() and rows.stat().st_size):
            if process.poll() is not None:
                raise SystemExit(f"training ended before its first step: {process.stderr.read()}")
            time.sleep(0.005)
        elapsed = time.perf_counter() - start
        process.kill()
        process.communicate()
        after = os.times()
    return elapsed, sum(after[2:4]) - sum(before[2:4])


if __name__ == "__main__":
    sys.exit(main())
