"""Held-out loss of Muon and AdamW at equal steps: a grid of learning rates at one seed, then more seeds at each best.

Runs configs/ablations/muon_vs_adamw.py through `smoljax.train`; a finished run is not repeated. Rates are ranked at the
end of the decay only. Prints a table and writes benchmarks/results/muon_vs_adamw.json.

Command:   python benchmarks/muon_vs_adamw.py --workdir=runs/quickstart
"""

import argparse
import math
import statistics
import subprocess
import sys
from pathlib import Path

from smoljax import files
from smoljax.training.metrics import read_metrics

CONFIG = "configs/ablations/muon_vs_adamw.py"
RATES = {"adamw": (3e-3, 6e-3, 1.2e-2), "muon": (6e-3, 1.2e-2, 2.4e-2)}
# Student's t, 97.5%, by degrees of freedom.
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", default="runs/quickstart", help="holds shards and tokenizer")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    workdir = Path(arguments.workdir)
    result = {"config": CONFIG, "grid": {}, "best_rate": {}, "losses": {}, "bits_per_byte": {}}
    for optimizer, rates in RATES.items():
        grid = {rate: held_out(workdir, optimizer, rate, seed=0) for rate in rates}
        best = min(grid, key=lambda rate: grid[rate]["loss"])
        if best in (rates[0], rates[-1]):
            print(f"note: the best rate of {optimizer}, {best:g}, is at the edge of its grid")
        rows = [held_out(workdir, optimizer, best, seed=seed) for seed in range(arguments.seeds)]
        result["grid"][optimizer] = {f"{rate:g}": row["loss"] for rate, row in grid.items()}
        result["best_rate"][optimizer] = best
        result["losses"][optimizer] = [row["loss"] for row in rows]
        result["bits_per_byte"][optimizer] = [row["bits_per_byte"] for row in rows]
    print(table(result))
    files.atomic_write_json(Path("benchmarks/results/muon_vs_adamw.json"), result)


def held_out(workdir: Path, optimizer: str, rate: float, *, seed: int) -> dict[str, float]:
    """Final held-out loss (nats per token) and bits per byte of one run, which is trained when it is missing."""
    run = workdir / "muon_vs_adamw" / f"{optimizer}_{rate:g}_seed{seed}"
    final = [row for row in read_metrics(run / "train") if "heldout/all/loss" in row]
    if not final:
        command = [
            sys.executable,
            "-m",
            "smoljax.train",
            f"--config={CONFIG}:{optimizer}",
            f"--workdir={run}",
            f"--config.data.directory={workdir / 'shards'}",
            f"--config.tokenizer.directory={workdir / 'tokenizer'}",
            f"--config.optimizer.learning_rate={rate}",
            f"--config.seed={seed}",
        ]
        print(" ".join(command[1:]), flush=True)
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        final = [row for row in read_metrics(run / "train") if "heldout/all/loss" in row]
    return {name: final[-1][f"heldout/all/{name}"] for name in ("loss", "bits_per_byte")}


def table(result: dict) -> str:
    """The grid, and mean and 95% interval over seeds."""
    lines = []
    for optimizer, grid in result["grid"].items():
        figures = "  ".join(f"{rate}: {loss:.4f}" for rate, loss in grid.items())
        lines.append(f"{optimizer:6} held-out loss by learning rate (seed 0)  {figures}")
    for optimizer, losses in result["losses"].items():
        mean, half = interval(losses)
        bits = statistics.mean(result["bits_per_byte"][optimizer])
        lines.append(
            f"{optimizer:6} best rate {result['best_rate'][optimizer]:g}, {len(losses)} seeds: "
            f"loss {mean:.4f} +- {half:.4f}, {bits:.4f} bits per byte"
        )
    pairs = [a - m for a, m in zip(result["losses"]["adamw"], result["losses"]["muon"])]
    mean, half = interval(pairs)
    lines.append(f"AdamW minus Muon, paired by seed: {mean:.4f} +- {half:.4f} nats per token")
    return "\n".join(lines)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95% interval (Student's t)."""
    if len(values) < 2:
        return values[0], math.inf
    half = T_975[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), half


if __name__ == "__main__":
    main()
