"""Claim to be measured: attention and training on one GPU, beside cuDNN, PyTorch SDPA and Hugging Face with torch.compile.

    pip install "smoljax[train,gpu]"
    python benchmarks/gpu.py [--torch-python PATH] [--only attention|training] [--shapes 135m,350m,3b] [--tiny]

Attention: forward and all gradients, causal, bf16, the heads of the 135M and 3B models, 4096 and 32768 tokens, one document a row
and eight; TFLOP/s count the pairs that causality and documents leave, 4 H forward and 2.5 times that backward for each.
Training: the train step of configs/smollm3_*.py on random tokens in documents of a quarter row, AdamW, f32 parameters and bf16
products; the peer is transformers' SmolLM3 at the same shape, batch and number of steps, under torch.compile and bf16 autocast,
gradients checkpointed where the config's remat is on. It sees whole rows, as it takes no documents. Model FLOPs utilisation is
by 6 M + 6 L S N H a token (causal attention) over the peak in smoljax/training/throughput.py.
Every program has a process of its own, so that nothing else holds the GPU's memory; times are the fastest and the median of
--rounds rounds. PyTorch with CUDA may live in another environment: --torch-python. What is missing is said in the table.

Writes benchmarks/results/gpu_DATE.md after every row. --tiny runs all of it in small on whatever device there is, and writes nothing:
it shows that the programs run, and its times mean nothing.

Result: none yet, no GPU was at hand.

B batch, S sequence, N query heads, K key-value heads, H head width
"""

import argparse
import datetime
import itertools
import json
import os
import runpy
import statistics
import subprocess
import sys
import time
from pathlib import Path

HEADS = {"135m": (9, 3, 64), "3b": (16, 4, 128)}  # N, K, H
LENGTHS = {4096: 8, 32768: 1}  # S: B
DOCUMENTS = (1, 8)
ATTENTION = ("pallas_gpu", "cudnn", "tokamax", "xla", "torch")
# Rows of a step. XLA's compiler for an H100 gives the train steps 36.6, 36.0 and 49.4 GiB, and JAX takes three quarters of 80 GB.
BATCH = {"135m": 16, "350m": 8, "3b": 2}
TRAINING = ("smoljax", "torch")
TINY = {"S": 256, "B": 1, "num_layers": 2, "vocab_size": 512}
CALLS = 10  # Of a round of attention; a round of training has --steps.


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter that has torch")
    parser.add_argument("--only", choices=["attention", "training"])
    parser.add_argument("--shapes", default=",".join(BATCH), help="of training")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="training steps of a round")
    parser.add_argument("--tiny", action="store_true", help="small, on any device, no table")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(json.loads(args.worker))))
        return 0
    shapes = args.shapes.split(",")
    if unknown := set(shapes) - set(BATCH):
        return refuse(f"--shapes has {', '.join(unknown)}: use some of {', '.join(BATCH)}")
    device, peak = (None, 1e12) if args.tiny else gpu()
    if not (device or args.tiny):
        return refuse(
            'JAX finds no GPU here: run it where one is, with `pip install "smoljax[train,gpu]"`, '
            "or add --tiny to see that its programs run"
        )
    table = Table(device)
    if args.only != "training":
        table.heading("| S | heads | documents | program | fastest ms | median ms | TFLOP/s |")
        for (S, B), name, documents, program in itertools.product(
            LENGTHS.items(), HEADS, DOCUMENTS, ATTENTION
        ):
            task = {
                "program": program,
                "S": S,
                "B": B,
                "heads": HEADS[name],
                "documents": documents,
            }
            row = ask(args, {"kind": "attention"} | task)
            table.row([S, "{}/{} of {}".format(*HEADS[name]), documents, program], row)
    if args.only != "attention":
        table.heading("| shape | batch | program | fastest s a step | median s | tokens/s | MFU |")
        for shape, program in itertools.product(shapes, TRAINING):
            task = {"program": program, "shape": shape, "B": BATCH[shape], "steps": args.steps}
            task |= {"peak": peak, "tiny": args.tiny}
            if program == "torch":  # Whose environment need not have what configs import.
                config = config_of(task)
                task |= {"model": config["model"], "S": config["data"]["seq_len"]}
            table.row([shape, BATCH[shape], program], ask(args, {"kind": "training"} | task))
    return 0


def refuse(reason: str) -> int:
    print(reason, file=sys.stderr)
    return 1


def gpu() -> tuple[str | None, float]:
    """Name of JAX's first GPU and its peak FLOP/s, asked of another process, which gives its memory back."""
    code = (
        "import jax; from smoljax.training.throughput import peak_flops; d = jax.devices()[0]; "
        "print(d.platform, d.device_kind, jax.__version__, peak_flops(d), sep='|')"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    platform, *rest = (found.stdout.strip() or "none").split("|")
    if platform != "gpu":
        return None, 0.0
    return f"{rest[0]}, jax {rest[1]}", float(rest[2])


class Table:
    """Prints rows, and writes them where there is a device to name."""

    def __init__(self, device: str | None):
        date = datetime.date.today().isoformat()
        self._path = None if device is None else Path(f"benchmarks/results/gpu_{date}.md")
        method = __doc__.split("\n\n")[2]
        self._text = f"# Attention and training on one GPU: {device}\n\n{method}\n"

    def heading(self, line: str) -> None:
        self._add(f"\n{line}\n{'|---' * (line.count('|') - 1)}|")

    def row(self, labels: list, cells: list[str]) -> None:
        self._add("| " + " | ".join([*map(str, labels), *cells]) + " |")

    def _add(self, line: str) -> None:
        print(line, flush=True)
        self._text += line + "\n"
        if self._path is not None:
            from smoljax import files

            files.atomic_write_bytes(self._path, self._text.encode())


def ask(args, task: dict) -> list[str]:
    """Cells of a row, by a process of its own; why there are none where it fails."""
    task |= {"rounds": args.rounds, "tiny": args.tiny}
    python = args.torch_python if task["program"] == "torch" else sys.executable
    command = [python, __file__, "--worker", json.dumps(task)]
    # Unfiltered tracebacks end in the error itself.
    environment = os.environ | {"JAX_TRACEBACK_FILTERING": "off"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    if ended.returncode:
        reason = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        return [f"none: {reason[:160].replace('|', '/')}", "", ""]
    return json.loads(ended.stdout.splitlines()[-1])


def worker(task: dict) -> list[str]:
    """Runs one program; the cells of its row."""
    if task["tiny"]:
        task |= {"S": TINY["S"], "B": TINY["B"], "steps": 2}
    kind, torch = task["kind"], task["program"] == "torch"
    if kind == "attention":
        run = (torch_attention if torch else jax_attention)(task)
        best, median = fastest(run, task["rounds"])
        N, _, H = task["heads"]
        pairs = task["B"] * N * task["S"] ** 2 / 2 / task["documents"]
        rate = 3.5 * 4 * H * pairs / best * CALLS
        return [f"{best / CALLS * 1e3:.3f}", f"{median / CALLS * 1e3:.3f}", f"{rate / 1e12:.1f}"]
    run, tokens, flops_per_token = (torch_training if torch else jax_training)(task)
    best, median = (x / task["steps"] for x in fastest(run, task["rounds"]))
    rate = tokens / best
    return [
        f"{best:.4f}",
        f"{median:.4f}",
        f"{rate:.0f}",
        f"{rate * flops_per_token / task['peak']:.1%}",
    ]


def fastest(run, rounds: int) -> tuple[float, float]:
    """Fastest and median seconds of a call, after two that compile and warm up."""
    seconds = []
    for i in range(rounds + 2):
        start = time.perf_counter()
        run()
        if i >= 2:
            seconds.append(time.perf_counter() - start)
    return min(seconds), statistics.median(seconds)


def jax_attention(task: dict):
    import jax
    import jax.numpy as jnp

    from smoljax.kernels import attention

    B, S, (N, K, H) = task["B"], task["S"], task["heads"]
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, dout = (
        jax.random.normal(key, (B, S, n, H), jnp.bfloat16) for key, n in zip(keys, (N, K, K, N))
    )
    ids = None
    if task["documents"] > 1:
        ids = jnp.broadcast_to(jnp.arange(S) * task["documents"] // S + 1, (B, S)).astype(jnp.int32)

    @jax.jit
    def both(q, k, v, dout):
        def attend(q, k, v):
            return attention(q, k, v, segment_ids=ids, implementation=task["program"])

        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(dout)

    def run():
        for _ in range(CALLS):
            result = both(q, k, v, dout)
        jax.block_until_ready(result)

    return run


def torch_attention(task: dict):
    torch, device = torch_on(task)
    attend = torch.nn.functional.scaled_dot_product_attention
    if task["documents"] > 1:
        raise SystemExit("SDPA takes documents only as a mask in memory, without its flash kernel")
    B, S, (N, K, H) = task["B"], task["S"], task["heads"]
    q, k, v = (
        torch.randn(B, n, S, H, dtype=torch.bfloat16, device=device, requires_grad=True)
        for n in (N, K, K)
    )
    dout = torch.randn(B, N, S, H, dtype=torch.bfloat16, device=device)

    def run():
        for _ in range(CALLS):
            out = attend(q, k, v, is_causal=True, enable_gqa=True)
            torch.autograd.grad(out, (q, k, v), dout)
        synchronize(torch)

    return run


def config_of(task: dict) -> dict:
    """The shape's config with the batch of the task, for one device."""
    path = Path(__file__).parent.parent / "configs" / f"smollm3_{task['shape']}.py"
    config = runpy.run_path(str(path))["get_config"]().to_dict()
    config["data"] |= {"batch_size": task["B"], "stages": ()}
    config["optimizer"]["name"] = "adamw"
    if task["tiny"]:
        config["data"]["seq_len"] = TINY["S"]
        config["model"] |= {name: TINY[name] for name in ("num_layers", "vocab_size")}
        config["model"]["compute_dtype"] = (
            "float32"  # The CPU has no product of bf16 with sums in f32.
        )
    return config


def jax_training(task: dict):
    import jax
    import numpy as np

    from smoljax import parallel
    from smoljax.training import Run, make_state

    run = Run(config_of(task), Path("."))
    B, S = run.data.batch_size, run.data.seq_len
    window = np.random.default_rng(0).integers(1, run.model.vocab_size, (B, S + 1), np.int32)
    ids = np.broadcast_to(np.arange(S, dtype=np.int32) * 4 // S + 1, (B, S))
    batch = {
        "tokens": window[:, :-1],
        "targets": window[:, 1:],
        "segment_ids": ids,
        "loss_mask": np.ones((B, S), bool),
    }
    batch = parallel.put_batch(batch, run.mesh, rows=slice(0, B), batch_size=B)
    state = make_state(run.model, run.optimizer, seed=0, shardings=run.shardings)
    step = run.train_step()

    def steps():
        nonlocal state
        for _ in range(task["steps"]):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics["loss"])

    return steps, B * S, run.model.flops_per_token(S, "causal")


def torch_training(task: dict):
    torch, device = torch_on(task)
    import transformers

    model, S = task["model"], task["S"]
    N, K, H = model["num_heads"], model["num_kv_heads"], model["hidden_size"] // model["num_heads"]
    peer = transformers.SmolLM3ForCausalLM(
        transformers.SmolLM3Config(
            vocab_size=model["vocab_size"],
            hidden_size=model["hidden_size"],
            intermediate_size=model["intermediate_size"],
            num_hidden_layers=model["num_layers"],
            num_attention_heads=N,
            num_key_value_heads=K,
            max_position_embeddings=S,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            use_cache=False,
            attn_implementation="sdpa",
        )
    ).to(device)
    peer.train()
    if model["remat"] != "none":
        peer.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-4, fused=True)
    compiled = peer if task["tiny"] else torch.compile(peer)
    tokens = torch.randint(0, model["vocab_size"], (task["B"], S), device=device)

    def steps():
        for _ in range(task["steps"]):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = compiled(input_ids=tokens, labels=tokens).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
            optimizer.step()
        synchronize(torch)

    matrices = sum(p.numel() for p in peer.parameters() if p.ndim == 2)
    flops_per_token = 6 * matrices + 6 * model["num_layers"] * S * N * H
    return steps, task["B"] * S, flops_per_token


def torch_on(task: dict):
    try:
        import torch
    except ModuleNotFoundError:
        raise SystemExit(
            "no torch here: name an interpreter that has it with --torch-python"
        ) from None
    if torch.cuda.is_available():
        return torch, "cuda"
    if not task["tiny"]:
        raise SystemExit(f"torch {torch.__version__} finds no GPU: see --torch-python")
    return torch, "cpu"


def synchronize(torch) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
