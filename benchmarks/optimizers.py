"""Held-out loss of five optimizers at equal tokens: a grid of learning rates at one seed, then more seeds at each best.

Runs configs/ablations/optimizers.py through `smoljax.train`; a finished run is not repeated. AdamW comes first, and the
leaves that it keeps beside a matrix optimizer get its best rate. A grid whose best rate lies at its edge is extended, at
most three times. Rates are ranked at the end of the decay only.

Wall time is measured apart, in one process: whole training steps of all optimizers in turn, the fastest of several rounds
(SOAP: a mean over the steps from one refresh of its bases to the next).

Writes benchmarks/results/optimizers.json, optimizers.md and optimizers.png.

Command:   python benchmarks/optimizers.py --workdir=runs/quickstart [--only adamw muon] [--seeds=3] [--rounds=5]
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from smoljax import files
from smoljax.research.statistics import estimate
from smoljax.training.metrics import read_metrics

# SOAP's QR and eigendecompositions go to LAPACK, whose threads would contend with XLA's own.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

CONFIG = "configs/ablations/optimizers.py"
RESULTS = Path("benchmarks/results")
RATES = {
    "adamw": (3e-3, 6e-3, 1.2e-2),
    "muon": (6e-3, 1.2e-2, 2.4e-2),
    "normuon": (6e-3, 1.2e-2, 2.4e-2),
    "soap": (3e-3, 6e-3, 1.2e-2),
    "muonh": (1e-2, 2e-2, 4e-2),
}
LABELS = {"adamw": "AdamW", "muon": "Muon", "normuon": "NorMuon", "soap": "SOAP", "muonh": "MuonH"}
EXTENSIONS = 3
PERIOD = 10  # Steps from one refresh of SOAP's bases to the next.

Curve = dict[int, dict[str, float]]


def main() -> None:
    """Runs what is missing, then writes table, figures and plot of what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/quickstart", help="holds shards and tokenizer")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5, help="of the measurement of wall time")
    parser.add_argument("--only", nargs="*", choices=RATES, default=list(RATES))
    arguments = parser.parse_args()
    workdir = Path(arguments.workdir)
    results = {"config": CONFIG, "optimizers": {}}
    beside = RATES["adamw"][1]
    for optimizer in (name for name in RATES if name in arguments.only):
        grid = search(workdir, optimizer, beside)
        best = min(grid, key=lambda rate: final(grid[rate])["loss"])
        if optimizer == "adamw":
            beside = best
        curves = [
            curve(workdir, optimizer, best, beside, seed=seed) for seed in range(arguments.seeds)
        ]
        results["optimizers"][optimizer] = {
            "grid": {f"{rate:g}": final(grid[rate])["loss"] for rate in sorted(grid)},
            "best_rate": best,
            "curves": curves,
        }
    for optimizer, seconds in step_seconds(results, workdir, rounds=arguments.rounds).items():
        results["optimizers"][optimizer]["seconds_per_step"] = seconds
    RESULTS.mkdir(exist_ok=True)
    files.atomic_write_json(RESULTS / "optimizers.json", results)
    files.atomic_write_bytes(RESULTS / "optimizers.md", table(results).encode())
    plot(results, RESULTS / "optimizers.png")
    print(table(results))


def search(workdir: Path, optimizer: str, beside: float) -> dict[float, Curve]:
    """The curve of each learning rate at seed 0; goes on by factors of two while the best rate is at the edge."""
    grid = {
        rate: curve(workdir, optimizer, rate, beside, seed=0) for rate in sorted(RATES[optimizer])
    }
    for _ in range(EXTENSIONS):
        best = min(grid, key=lambda rate: final(grid[rate])["loss"])
        if best not in (min(grid), max(grid)):
            break
        rate = best / 2 if best == min(grid) else best * 2
        grid[rate] = curve(workdir, optimizer, rate, beside, seed=0)
    return grid


def curve(workdir: Path, optimizer: str, rate: float, beside: float, *, seed: int) -> Curve:
    """Held-out loss (nats per token) and bits per byte by step of one run, which is trained when it is missing."""
    run = workdir / "optimizers" / f"{optimizer}_{rate:g}_seed{seed}"
    if not (run / "done").exists():
        command = [
            sys.executable,
            "-m",
            "smoljax.train",
            f"--config={CONFIG}:{optimizer}",
            f"--workdir={run}",
            f"--config.data.directory={workdir / 'shards'}",
            f"--config.tokenizer.directory={workdir / 'tokenizer'}",
            f"--config.optimizer.learning_rate={rate}",
            f"--config.optimizer.adamw_learning_rate={beside}",
            f"--config.seed={seed}",
        ]
        print(" ".join(command[1:]), flush=True)
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        (run / "done").touch()
    return {
        row["step"]: {name: row[f"heldout/all/{name}"] for name in ("loss", "bits_per_byte")}
        for row in read_metrics(run / "train")
        if "heldout/all/loss" in row
    }


def step_seconds(results: dict, workdir: Path, *, rounds: int) -> dict[str, float]:
    """Seconds of a training step with each optimizer: the fastest mean of PERIOD steps in a row, taken in turn."""
    from smoljax import parallel
    from smoljax.command_line import load_config
    from smoljax.evaluation.perplexity import BATCH_KEYS
    from smoljax.training import Run, make_state

    steps, states = {}, {}
    for optimizer in results["optimizers"]:
        config = load_config(f"{CONFIG}:{optimizer}")
        config["data"]["directory"] = str(workdir / "shards")
        config["tokenizer"]["directory"] = str(workdir / "tokenizer")
        run = Run(config, workdir)
        steps[optimizer] = run.train_step()
        states[optimizer] = make_state(run.model, run.optimizer, seed=0, shardings=run.shardings)
        size = run.data.batch_size
        batch = {key: run.mixture.batch(0)[key] for key in BATCH_KEYS}
        batch = parallel.put_batch(batch, run.mesh, rows=slice(0, size), batch_size=size)
        states[optimizer], _ = steps[optimizer](states[optimizer], batch)
    fastest = dict.fromkeys(steps, math.inf)
    for _ in range(rounds):
        for optimizer, step in steps.items():
            start = time.perf_counter()
            for _ in range(PERIOD):
                states[optimizer], metrics = step(states[optimizer], batch)
            metrics["loss"].block_until_ready()
            fastest[optimizer] = min(fastest[optimizer], (time.perf_counter() - start) / PERIOD)
    return fastest


def final(points: Curve) -> dict[str, float]:
    """The last point of a curve."""
    return points[max(points)]


def steps_to(points: Curve, loss: float) -> float | None:
    """The step, between two evaluations by a line, at which a curve first reaches a loss; None when it never does."""
    before = None
    for step in sorted(points):
        value = points[step]["loss"]
        if value <= loss:
            if before is None:
                return float(step)
            last_step, last = before
            return last_step + (step - last_step) * (last - loss) / (last - value)
        before = step, value
    return None


def table(results: dict) -> str:
    """Mean and 95% interval over seeds, the difference to AdamW paired by seed, and steps to AdamW's final loss."""
    adamw = results["optimizers"].get("adamw")
    lines = [
        "| optimizer | best rate | held-out loss, nats | bits per byte | AdamW minus it, paired | steps to AdamW's loss | time of a step | time to AdamW's loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for optimizer, result in results["optimizers"].items():
        losses = [final(points)["loss"] for points in result["curves"]]
        mean, half, _ = estimate(losses)
        bits = statistics.mean(final(points)["bits_per_byte"] for points in result["curves"])
        cells = ["-", "-", f"{result['seconds_per_step']:.2f} s", "-"]
        if adamw and optimizer != "adamw":
            pairs = [final(theirs)["loss"] - loss for theirs, loss in zip(adamw["curves"], losses)]
            cells[0] = "{:+.3f} ± {:.3f}".format(*estimate(pairs)[:2])
            steps = [
                steps_to(points, final(theirs)["loss"])
                for theirs, points in zip(adamw["curves"], result["curves"])
            ]
            if None not in steps:
                count, of = statistics.mean(steps), max(result["curves"][0])
                cells[1] = f"{count:.0f} of {of}"
                ratio = count * result["seconds_per_step"] / (of * adamw["seconds_per_step"])
                cells[3] = f"{ratio:.2f} of AdamW's"
        lines.append(
            f"| {LABELS[optimizer]} | {result['best_rate']:g} | {mean:.3f} ± {half:.3f} | {bits:.3f} | {' | '.join(cells)} |"
        )
    lines += ["", "Held-out loss by learning rate, seed 0:", ""]
    for optimizer, result in results["optimizers"].items():
        figures = ", ".join(f"{rate}: {loss:.3f}" for rate, loss in result["grid"].items())
        lines.append(f"- {LABELS[optimizer]}: {figures}")
    return "\n".join(lines) + "\n"


def plot(results: dict, path: Path) -> None:
    """Held-out loss by step, mean of the seeds with their range; and the grid of learning rates."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (by_step, by_rate) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for optimizer, result in results["optimizers"].items():
        steps = sorted(result["curves"][0])
        losses = [[points[step]["loss"] for points in result["curves"]] for step in steps]
        (line,) = by_step.plot(
            steps, [statistics.mean(each) for each in losses], label=LABELS[optimizer]
        )
        by_step.fill_between(
            steps,
            [min(each) for each in losses],
            [max(each) for each in losses],
            color=line.get_color(),
            alpha=0.2,
        )
        rates = [float(rate) for rate in result["grid"]]
        by_rate.plot(rates, list(result["grid"].values()), "o-", label=LABELS[optimizer])
    by_step.set(xlabel="step", ylabel="held-out loss, nats per token", title="Best rate, all seeds")
    by_rate.set(xlabel="learning rate", xscale="log", title="Final loss by learning rate, seed 0")
    by_step.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
