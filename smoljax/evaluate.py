"""Scores a trained model: `python -m smoljax.evaluate --config=configs/quickstart.py --workdir=runs/quickstart`.

Reads the newest checkpoint and the held-out shards; prints and writes WORKDIR/evaluation.json: bits per byte of each
source, beside a unigram model, gzip -9 and xz -9 on the same text.
"""

from pathlib import Path

from smoljax import command_line


def main(config: dict, workdir: Path) -> int:
    """Evaluates all of the held-out split."""
    from smoljax import files
    from smoljax.evaluation import baselines, perplexity
    from smoljax.parallel.start import start

    start()
    from smoljax.training import Run, make_eval_step

    run = Run(config, workdir)
    step, params = run.restore_params()
    eval_step = make_eval_step(
        run.model,
        mesh=run.mesh,
        shardings=run.params_shardings,
        loss_chunk=run.training.loss_chunk,
        quantization=run.training.quantization,
    )
    results = perplexity.held_out(
        eval_step, params, run.mixture, mesh=run.mesh, batch_size=run.data.batch_size
    )
    sources = [source for source in results if source != "all"]
    for source, row in baselines.baselines(run.data.directory, sources, run.tokenizer).items():
        results[source]["baselines"] = row
    files.atomic_write_json(workdir / "evaluation.json", {"step": step, "heldout": results})
    print(table(results))
    return 0


def table(results: dict[str, dict]) -> str:
    """Bits per byte of each source, beside the baselines, as text."""
    columns = ("unigram", "gzip", "xz")
    lines = [f"{'bits per byte':20} {'model':>8} " + " ".join(f"{name:>8}" for name in columns)]
    for source, row in results.items():
        figures = " ".join(f"{row['baselines'][name]:8.3f}" for name in columns)
        lines.append(f"{source:20} {row['bits_per_byte']:8.3f} {figures}")
    return "\n".join(lines)


if __name__ == "__main__":
    command_line.run(main, usage=__doc__)
