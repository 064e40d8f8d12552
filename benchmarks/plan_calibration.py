"""Predicted beside published throughput: how far `smoljax.plan` is off.

Command:  python benchmarks/plan_calibration.py [--compile] [--json=FILE]

The closed forms take a second. With --compile some rows are also planned as `smoljax.plan` does, with this project's train step compiled for
the machine (libtpu; one to three minutes each on one core).
Every row uses the same constants (smoljax/planning: estimate, closed_form, topologies): nothing is fitted to a row (one constant to the four of GPUs), and batch, recomputation and
mesh of a row are those that its source states. Where activations move to host memory there, they count as saved.

Shapes: Llama 2 (arXiv 2307.09288, table 1, and the released configs), Llama 3 (arXiv 2407.21783, table 3), MaxText's 16B to 64B
(global_parameter_scale of its base.yml). Published: MaxText's configs/tpu/{v5e,v5p}/README.md ("v5e", "v5p"; FLOPs with full attention),
reference/models/tiering.md ("tiers"), AI-Hypercomputer/tpu-recipes ("recipe"), axlearn's comments in fuji.py ("fuji": 4,194,304 tokens a
step) and its paper as listed elsewhere ("paper"), SmolLM3's 24 days for 11.136T tokens on 384 GPUs ("SmolLM3": tensor 2, nothing recomputed).
"""

import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path

from smoljax import command_line
from smoljax.model import ModelConfig
from smoljax.planning.closed_form import roofline
from smoljax.planning.environment import compile_here
from smoljax.planning.topologies import GIB, topology

ROOT = Path(__file__).parent.parent


def _llama(layers, width, feed_forward, heads, kv_heads, *, vocabulary, **fields):
    return ModelConfig(
        vocab_size=vocabulary,
        num_layers=layers,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_heads=heads,
        num_kv_heads=kv_heads,
        no_rope_layer_interval=0,
        max_seq_len=8192,
        compute_dtype="bfloat16",
        **{"tie_embeddings": False} | fields,
    )


MODELS = {
    "Llama 2 7B": _llama(32, 4096, 11008, 32, 32, vocabulary=32_000),
    "Llama 2 70B": _llama(80, 8192, 28672, 64, 8, vocabulary=32_000),
    "Llama 3.1 8B": _llama(32, 4096, 14336, 32, 8, vocabulary=128_256),
    "Llama 3.1 70B": _llama(80, 8192, 28672, 64, 8, vocabulary=128_256),
    "Llama 3.1 405B": _llama(126, 16384, 53248, 128, 8, vocabulary=128_256),
    "16B": _llama(32, 4096, 28672, 64, 64, vocabulary=32_000, head_dim=128),
    "32B": _llama(32, 8192, 28672, 64, 64, vocabulary=32_000),
    "64B": _llama(64, 8192, 28672, 64, 64, vocabulary=32_000),
    "SmolLM3 3B": _llama(36, 2048, 11008, 16, 4, vocabulary=128_256, tie_embeddings=True),
}

# source, model, machine, sequence, sequences per chip, what the run recomputes (the nearest of this project's policies: those that save
# to host memory count as saving), chips that share parameters, chips of the tensor axis, published: tokens/s per chip, seconds
# of a step, or TFLOP/s per chip in the convention of 6N and full attention.
# "dots": MaxText's "minimal" and axlearn's dots_saveable, also offloaded, where the kernel runs again. "save_projections": MaxText's
# save_dot_except_mlpwi, and qkv_proj and out_proj offloaded, axlearn's default (NATIVE_ATTENTION); these save what the output projection
# gives and not what attention gives, and run the kernel again instead of that projection, which takes about as long.
# fmt: off
ROWS = [
    ("MaxText v5e", "16B", "v5e-256", 2048, 6, "full", 256, 1, "TFLOP/s", 120),
    ("MaxText v5e", "32B", "v5e-256", 2048, 4, "full", 256, 1, "TFLOP/s", 132),
    ("MaxText v5e", "64B", "v5e-256", 2048, 2, "full", 256, 1, "TFLOP/s", 118),
    ("MaxText v5e", "32B", "v5e-256x4", 2048, 4, "full", 256, 1, "TFLOP/s", 126),
    ("axlearn fuji", "Llama 2 7B", "v5e-256x4", 4096, 1, "dots", 256, 1, "seconds", 2.21),
    ("axlearn fuji", "Llama 2 70B", "v5e-256x4", 4096, 1, "dots", 256, 1, "seconds", 14.37),
    ("MaxText v5p", "32B", "v5p-128", 2048, 6, "dots", 16, 4, "TFLOP/s", 328),
    ("MaxText v5p", "64B", "v5p-128", 2048, 3, "dots", 16, 4, "TFLOP/s", 323),
    ("MaxText tiers", "Llama 2 70B", "v5p-1024", 4096, 2, "save_projections", 512, 1, "tokens/s", 692),
    ("MaxText recipe", "Llama 3.1 405B", "v5p-1024", 8192, 2, "save_attention", 512, 1, "tokens/s", 124.6),
    ("axlearn paper", "Llama 2 7B", "v5p-512", 4096, 4, "dots", 64, 1, "seconds", 2.5),
    ("axlearn paper", "Llama 2 70B", "v5p-1024", 4096, 2, "save_projections", 512, 1, "seconds", 11.6),
    ("MaxText recipe", "Llama 3.1 8B", "v6e-16", 8192, 3, "save_projections", 16, 1, "tokens/s", 7243),
    ("MaxText recipe", "Llama 3.1 8B", "v6e-256", 8192, 4, "save_projections", 256, 1, "tokens/s", 7207),
    ("MaxText recipe", "Llama 3.1 70B", "v6e-64", 8192, 2, "save_projections", 64, 1, "tokens/s", 877),
    ("MaxText recipe", "Llama 3.1 70B", "v6e-256", 8192, 5, "save_projections", 256, 1, "tokens/s", 960),
    ("MaxText recipe", "Llama 2 70B", "v6e-256", 4096, 3, "save_projections", 256, 1, "tokens/s", 905),
    ("MaxText recipe", "Llama 3.1 405B", "v6e-256x2", 8192, 1, "full", 512, 1, "tokens/s", 149.5),
    ("axlearn fuji", "Llama 2 70B", "v6e-256x4", 4096, 1, "save_projections", 256, 1, "seconds", 4.9),
    ("axlearn fuji", "Llama 2 70B", "v6e-256", 4096, 4, "save_projections", 256, 1, "seconds", 19.5),
    ("axlearn fuji", "Llama 2 7B", "h100x256", 4096, 4, "save_projections", 8, 1, "seconds", 1.78),
    ("axlearn fuji", "Llama 2 70B", "h100x512", 4096, 2, "save_projections", 128, 1, "seconds", 12.9),
    ("axlearn paper", "Llama 2 70B", "h100x512", 4096, 2, "save_projections", 128, 1, "seconds", 9.2),
    ("SmolLM3", "SmolLM3 3B", "h100x384", 4096, 1.5, "none", 1, 2, "tokens/s", 13_985),
]
# fmt: on

# Those that --compile compiles, and this project's policy nearest to what the run recomputes, of those that fit.
COMPILED = {
    ("32B", "v5e-256"): "full",
    ("Llama 2 7B", "v5e-256x4"): "dots",
    ("Llama 2 7B", "v5p-512"): "dots",
    ("Llama 3.1 8B", "v6e-16"): "save_attention",
}


def measure(row: tuple) -> dict:
    """One row in closed form: published and predicted tokens/s per chip."""
    source, name, machine_name, seq_len, sequences, remat, fsdp, tensor, unit, value = row
    machine = topology(machine_name)
    model = dataclasses.replace(MODELS[name], remat=remat)
    chips = machine.num_chips
    here = sequences * seq_len
    times = roofline(model, machine, seq_len=seq_len, tokens=here * chips, fsdp=fsdp, tensor=tensor)
    published = {
        "tokens/s": value,
        "seconds": here / value,
        "TFLOP/s": value * 1e12 / model.flops_per_token(seq_len, attention="full"),
    }[unit]
    return {
        "source": source,
        "model": name,
        "machine": machine_name,
        "remat": remat,
        "published": published,
        "predicted": here / times.step,
        "low": here / times.slowest,
        "high": here / times.fastest,
    }


def compiled(row: tuple) -> dict:
    """The same row as `smoljax.plan` plans it: this project's train step with the model and settings of the row. For a process of its
    own, as libtpu is set up once for one machine."""
    _, name, machine_name, seq_len, sequences, _, fsdp, tensor, _, _ = row
    machine, remat = topology(machine_name), COMPILED[name, machine_name]
    compile_here(machine)
    from smoljax.planning.plan import make_plan

    config = command_line.load_config(str(ROOT / "configs" / "smollm3_3b.py"))
    config["name"] = name
    config["model"] = dataclasses.asdict(dataclasses.replace(MODELS[name], remat=remat))
    config["data"] |= {"seq_len": seq_len, "batch_size": int(sequences * machine.num_chips)}
    config["mesh"] = {
        "data": machine.num_chips // fsdp // tensor,
        "fsdp": fsdp,
        "tensor": tensor,
        "context": 1,
    }
    plan = make_plan(config, machine)
    if not plan.fits:
        return {"remat": remat, "needs": plan.needs / GIB}
    times = plan.estimate.times
    rates = [
        seq_len * sequences / seconds for seconds in (times.step, times.slowest, times.fastest)
    ]
    return {"remat": remat} | dict(zip(("predicted", "low", "high"), rates))


def main() -> None:
    """Prints the tables and the errors."""
    flags = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
    if "--row" in flags:
        print(json.dumps(compiled(ROWS[int(flags["--row"])])))
        return
    rows = [measure(row) for row in ROWS]
    print("Closed forms")
    _print(rows)
    for platform in ("tpu", "gpu"):
        of = [row for row in rows if topology(row["machine"]).chip.platform == platform]
        print(f"{platform.upper()}: {_errors(of)}")
    if "--compile" in flags:
        found = []
        for number, row in enumerate(rows):
            if (row["model"], row["machine"]) in COMPILED:
                command = [sys.executable, __file__, f"--row={number}"]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found.append(row | json.loads(done.stdout.splitlines()[-1]))
        print("\nCompiled")
        _print(found)
        print(_errors([row for row in found if "needs" not in row]))
        rows += found
    if "--json" in flags:
        Path(flags["--json"]).write_text(json.dumps(rows, indent=1) + "\n")


def _print(rows: list[dict]) -> None:
    print(
        f"{'source':15} {'model':15} {'machine':10} {'remat':17} {'published':>10} {'predicted':>10} {'range':>17} {'error':>7}   (tokens/s per chip)"
    )
    for row in rows:
        start = f"{row['source']:15} {row['model']:15} {row['machine']:10} {row['remat']:17} {row['published']:10,.0f}"
        if "needs" in row:
            print(f"{start}   does not fit: {row['needs']:.1f} GiB")
            continue
        span = f"{row['low']:,.0f} to {row['high']:,.0f}"
        print(f"{start} {row['predicted']:10,.0f} {span:>17} {100 * _error(row):+6.0f}%")


def _error(row: dict) -> float:
    return row["predicted"] / row["published"] - 1


def _errors(rows: list[dict]) -> str:
    errors = [_error(row) for row in rows]
    inside = sum(row["low"] <= row["published"] <= row["high"] for row in rows)
    return (
        f"mean error {100 * statistics.mean(errors):+.0f}%, mean absolute error {100 * statistics.mean(map(abs, errors)):.0f}%, "
        f"largest {100 * max(errors, key=abs):+.0f}%; {inside} of {len(rows)} published figures lie in the predicted range"
    )


if __name__ == "__main__":
    main()
