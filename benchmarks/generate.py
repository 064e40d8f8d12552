"""Claim: smoljax generates text faster on a CPU than transformers' generate(), with the same weights.

    pip install "smoljax[train,export,test-hf]"
    python benchmarks/generate.py [--torch-python PATH] [--rounds 5] [--models quickstart 135m] [--batches 1 8]
                                  [--dtypes float32 bfloat16]

Greedy, float32 beside float32 and bfloat16 beside bfloat16 (weights, cache and arithmetic), 64 prompt tokens and 128 new
ones, the whole call timed: reading the prompt, the cache, the loop. Two models with random weights: the quickstart's
(configs/quickstart.py) and one of SmolLM2-135M's shape (configs/smollm3_135m.py). smoljax writes them as Hugging Face
folders, which transformers loads as SmolLM3; what share of the tokens is the same is printed (in bfloat16 the sides
round at different places). The sides live in processes of their own and take turns, so that noise from
neighbours meets both; transformers runs with its dynamic cache, with sdpa and with eager attention, and its faster one
counts. All run with glibc's malloc on huge pages, as smoljax's verbs do. The table is written to
benchmarks/results/generate_DATE.md too.

Result, 2026-11-24, 2 cores (AMD EPYC), jax 0.10.2, torch 2.13.0, transformers 5.23.0, times the faster of sdpa and eager:
    quickstart: batch 1 5.5 times, batch 8 2.1 times; 135m: batch 1 2.0 times, batch 8 not measured yet.
2026-11-25, 2 cores (Intel Xeon with AMX), transformers 5.24.0, --models quickstart --rounds 3:
    float32: batch 1 2.9 times, batch 8 2.1 times; bfloat16: 2.9 and 2.2 times.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from smoljax.command_line import MALLOC

PROMPT, NEW = 64, 128
THREADS = len(os.sched_getaffinity(0))
MODELS = {
    "quickstart": "configs/quickstart.py",
    "135m": "configs/smollm3_135m.py",
}
DTYPES = ("float32", "bfloat16")
SIDES = ("smoljax", "sdpa", "eager")
ROOT = Path(__file__).parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter that has torch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        serve(smoljax_side(args) if args.side == "smoljax" else torch_side(args))
        return 0

    found = subprocess.run(
        [args.torch_python, "-c", "import torch, transformers"], capture_output=True
    )
    if found.returncode:
        print(
            f"{args.torch_python} has no torch and transformers: "
            'run `pip install "smoljax[test-hf]"`, or name an interpreter that has them with --torch-python',
            file=sys.stderr,
        )
        return 1
    lines = []
    for model in args.models:
        for dtype in args.dtypes:
            with tempfile.TemporaryDirectory() as folder:
                lines += measure(model, dtype, args, Path(folder) / model)
    print("\n".join(lines))
    path = ROOT / "benchmarks" / "results" / f"generate_{datetime.date.today()}.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


def measure(model: str, dtype: str, args, folder: Path) -> list[str]:
    """One model and dtype, all batch sizes, every side in turn; a markdown section."""
    sides = {}
    for side in SIDES:  # smoljax first: it writes the folder.
        python = sys.executable if side == "smoljax" else args.torch_python
        arguments = ["--side", side, "--folder", str(folder), "--model", model, "--dtype", dtype]
        sides[side] = Side([python, __file__, *arguments])
    lines = [
        f"### {model}: {sides['smoljax'].about['num_params']:,} parameters, {dtype}, greedy, {PROMPT} + {NEW} tokens",
        "",
        f"{THREADS} threads; {', '.join(side.about['label'] for side in list(sides.values())[:2])}; "
        f"tokens/s by the median of {args.rounds} rounds that alternate.",
        "",
        "| batch | smoljax | transformers sdpa | eager | times its faster | by rounds | equal tokens |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for batch in args.batches:
        tokens = {name: side.ask(batch)["tokens"] for name, side in sides.items()}  # Compiles.
        seconds = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, side in sides.items():
                seconds[name].append(side.ask(batch)["seconds"])
        lines.append(row(batch, seconds, tokens))
        print(lines[-1], flush=True)
    for side in sides.values():
        side.end()
    return [*lines, ""]


def row(batch: int, seconds: dict, tokens: dict) -> str:
    """Rates, and how many times as fast smoljax is."""
    rate = {name: batch * NEW / statistics.median(times) for name, times in seconds.items()}
    best = max("sdpa", "eager", key=rate.get)
    ratios = [theirs / ours for ours, theirs in zip(seconds["smoljax"], seconds[best])]
    pairs = [
        ours == theirs
        for ours_M, theirs_M in zip(tokens["smoljax"], tokens[best])
        for ours, theirs in zip(ours_M, theirs_M)
    ]
    return (
        f"| {batch} | {rate['smoljax']:.1f} | {rate['sdpa']:.1f} | {rate['eager']:.1f} | "
        f"{rate['smoljax'] / rate[best]:.2f} | {min(ratios):.2f} to {max(ratios):.2f} | "
        f"{sum(pairs) / len(pairs):.1%} |"
    )


class Side:
    """A process that generates when asked; `about` is what it says of itself."""

    def __init__(self, command: list[str]):
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"GLIBC_TUNABLES": MALLOC, "PYTHONPATH": str(ROOT)},
        )
        self.about = self._read()

    def ask(self, batch: int) -> dict:
        """Generates once for `batch` prompts: "seconds" and "tokens"."""
        self._process.stdin.write(f"{batch}\n")
        self._process.stdin.flush()
        return self._read()

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the side {' '.join(self._process.args)} ended; its error is above")
        return json.loads(line)


def serve(side) -> None:
    """Answers one line per request, until the parent goes."""
    about, generate = side
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        prompts = prompts_of(int(line), about["vocab_size"])
        start = time.perf_counter()
        tokens = generate(prompts)
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)


def prompts_of(batch: int, vocab_size: int) -> list[list[int]]:
    """Any fixed ids, the same on both sides."""
    return [
        [(7919 * b + 104_729 * i + 17) % vocab_size for i in range(PROMPT)] for b in range(batch)
    ]


def smoljax_side(args):
    import runpy

    import jax

    from smoljax import configuration
    from smoljax.interop import huggingface
    from smoljax.model import ModelConfig, generate, init
    from smoljax.model.cache import prepare

    section = runpy.run_path(str(ROOT / MODELS[args.model]))["get_config"]().model
    changed = {"compute_dtype": args.dtype, "scan_layers": False}
    config = configuration.build(ModelConfig, {**section, **changed}, "model")
    params = jax.jit(init, static_argnums=0)(config, jax.random.key(0))
    huggingface.save(args.folder, config, params)
    prepared = jax.jit(prepare, static_argnums=0)(config, params)
    del params
    about = {
        "label": f"jax {jax.__version__}",
        "num_params": config.num_params,
        "vocab_size": config.vocab_size,
    }
    return about, lambda prompts: generate(config, prepared, prompts, max_new_tokens=NEW)


def torch_side(args):
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.folder, dtype=getattr(torch, args.dtype), attn_implementation=args.side
    ).eval()
    model.generation_config.eos_token_id = None  # Random weights would end anywhere.

    def generate(prompts):
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW,
                do_sample=False,
                pad_token_id=0,
            )
        return out[:, ids.shape[1] :].tolist()

    about = {
        "label": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "num_params": sum(parameter.numel() for parameter in model.parameters()),
        "vocab_size": model.config.vocab_size,
    }
    return about, generate


if __name__ == "__main__":
    sys.exit(main())
