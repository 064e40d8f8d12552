"""Claim: int8 weights cost less than 0.5% of bits per byte and int4 weights less than 4%, on a trained model.

    make quickstart
    python benchmarks/quantize.py [--workdir runs/quickstart] [--batches 10] [--rounds 3] [--output FILE]

Takes the newest checkpoint of configs/quickstart.py and, for each scheme, writes it to disk (size), scores held-out text
by the quantised weights themselves (bits per byte; `--batches` of each source, spread evenly, 0 for all of it), and
generates greedily after prompts of 16 tokens (tokens per second over whole calls; the best of rounds in which the schemes
take turns).
"""

import argparse
import dataclasses
import functools
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy
from absl import logging

from configs import quickstart
from smoljax import files, model
from smoljax.evaluation import perplexity
from smoljax.interop import quantize
from smoljax.training import Run
from smoljax.training.step import loss_sum

BATCH_SIZES = (1, 8)
PROMPT_TOKENS, NEW_TOKENS = 16, 128


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to run the trained model: its config and parameters, and the bytes that it takes on disk."""

    config: model.ModelConfig
    params: dict
    disk_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--batches", type=int, default=10, help="of each source; 0 is all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="a file for the table")
    args = parser.parse_args()
    logging.set_verbosity(logging.WARNING)

    run = Run(quickstart.get_config().to_dict(), args.workdir)
    step, params = run.restore_params()
    made = variants(run.model, params)
    speeds = {
        size: decode_speeds(made, batch_size=size, rounds=args.rounds) for size in BATCH_SIZES
    }
    scores = {}
    for name, variant in made.items():
        scores[name] = bits_per_byte(run, variant, max_batches=args.batches or None)
        print(f"{name}: {scores[name]['bits_per_byte']:.4f} bits per byte", flush=True)

    rows = [
        "| scheme | bits per byte | against f32 | MB on disk | tokens/s, batch 1 | tokens/s, batch 8 |",
        "|---|---|---|---|---|---|",
    ]
    exact = scores["f32"]["bits_per_byte"]
    for name, variant in made.items():
        bits = scores[name]["bits_per_byte"]
        rows.append(
            f"| {name} | {bits:.4f} | {100 * (bits / exact - 1):+.3f}% | {variant.disk_bytes / 1e6:.2f} | "
            + " | ".join(f"{speeds[size][name]:,.0f}" for size in BATCH_SIZES)
            + " |"
        )
    text = "\n".join([*header(run.model, step, scores["f32"], args), "", *rows, ""])
    print(text)
    if args.output:
        files.atomic_write_text(args.output, text)


def header(
    config: model.ModelConfig, step: int, score: dict, args: argparse.Namespace
) -> list[str]:
    """What was measured, and where."""
    share = f"{args.batches} batches of each source, spread evenly" if args.batches else "all of it"
    return [
        "# Quantised weights of the quickstart's model",
        "",
        f"`python benchmarks/quantize.py --batches {args.batches} --rounds {args.rounds}`, jax {jax.__version__}, "
        f"{jax.devices()[0].device_kind}, step {step} of configs/quickstart.py, {config.num_params / 1e6:.2f}M parameters.",
        "",
        f"Held-out text: {share}, {score['tokens']:,} tokens. Decoding: {NEW_TOKENS} greedy tokens after {PROMPT_TOKENS}, "
        "whole calls, best round. int4 in groups of 16 weights (of 32, 16 and 8 the largest that divides 688), embedding "
        "and head included; w8a8 takes activations in int8 in the layers.",
        "",
        "On a CPU the compiler converts int8 and int4 weights once per call, before the loop over tokens, so these decode in "
        "float32; their speeds differ from that of f32 by the machine's noise, which is large where others use it too.",
    ]


def variants(config: model.ModelConfig, params: dict) -> dict[str, Variant]:
    """The model in each scheme, written to disk once for its size."""
    made = {
        "f32": Variant(config, params, plain_bytes(params, np.float32)),
        "bf16": Variant(
            dataclasses.replace(config, compute_dtype="bfloat16"),
            params,
            plain_bytes(params, jax.numpy.bfloat16),
        ),
    }
    for scheme in quantize.SCHEMES:
        quantized = quantize.quantize(config, params, scheme)
        with tempfile.TemporaryDirectory() as folder:
            quantize.save(Path(folder) / scheme, config, quantized)
            size = sum(file.stat().st_size for file in (Path(folder) / scheme).iterdir())
        made[scheme] = Variant(config, quantized, size)
    return made


def plain_bytes(params: dict, dtype) -> int:
    """Bytes of a safetensors file with all parameters in `dtype`."""
    leaves = {
        jax.tree_util.keystr(path): np.asarray(leaf).astype(dtype)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    return len(safetensors.numpy.save(leaves))


def bits_per_byte(run: Run, variant: Variant, *, max_batches: int | None) -> dict:
    """All sources together, as `python -m smoljax.evaluate` has it."""

    def score(params, batch):
        return loss_sum(variant.config, params, batch, loss_chunk=1024, z_loss=0.0)[1]

    return perplexity.held_out(
        quantize.integer_matmuls(jax.jit(score)),
        variant.params,
        run.mixture,
        mesh=run.mesh,
        batch_size=run.data.batch_size,
        max_batches=max_batches,
    )["all"]


def decode_speeds(made: dict[str, Variant], *, batch_size: int, rounds: int) -> dict[str, float]:
    """New tokens per second of each variant, best round."""
    prompts = np.random.default_rng(0).integers(3, 1000, (batch_size, PROMPT_TOKENS)).tolist()
    fastest = dict.fromkeys(made, float("inf"))
    for number in range(rounds + 1):
        for name, variant in made.items():
            generate = functools.partial(quantize.generate, variant.config, variant.params)
            start = time.perf_counter()
            generate(prompts, max_new_tokens=NEW_TOKENS)
            if number:  # The first compiles.
                fastest[name] = min(fastest[name], time.perf_counter() - start)
    return {name: batch_size * NEW_TOKENS / seconds for name, seconds in fastest.items()}


if __name__ == "__main__":
    main()
