"""A CPU training step of smoljax beside Hugging Face Llama's in PyTorch eager at the same shape, and beside nanodo's.

    pip install "smoljax[train,test-hf]"
    python benchmarks/train_cpu.py [--dtype bfloat16] [--torch-python PATH] [--nanodo CHECKOUT] [--rounds 6] [--steps 3]

All train an 8-layer decoder of width 256 (8 query and 4 key-value heads, SwiGLU 688, tied vocabulary of 8192: 7.9M parameters; 256
tokens, batch 16, AdamW, clipping at 1.0) in processes of their own that take turns, so that noise from neighbours meets all.
smoljax also masks segments, as its training does; the peers have no such mask. nanodo has 8 key-value heads, GELU 1024 and learned
positions: 8.5M parameters. Parameters and AdamW's state are float32 always; with --dtype bfloat16 smoljax computes in it
(compute_dtype) and Hugging Face under torch.autocast, its usual mixed precision (a model cast to bfloat16 as a whole took 5% less
on one core, but then has no float32 parameters to train); nanodo then computes in it too. All run with glibc's malloc on huge pages, as smoljax's verbs do; torch gained from it on the EPYC,
and on the Xeon it did in some hours only. The peak is a 2048-cubed matmul of that dtype, XLA's and torch's, measured in every round; "of peak" is of XLA's.

Result: it depends on the processor, as XLA's matrix products fall behind torch's where AVX-512 is.
    2026-11-24, 2 cores (AMD EPYC), jax 0.10.2, torch 2.13.0, 4 rounds:
        smoljax 1.383 s, 2,962 tokens/s, 70.6% of the 212 GFLOP/s peak; Hugging Face 1.511 s, 2,711 tokens/s, 64.6%:
        1.09 times as fast by minima, 1.08 by the median of paired rounds (0.95 to 1.14).
        Without huge pages (GLIBC_TUNABLES unset) the two were level: 1.635 s and 1.632 s.
    2026-11-25, 2 cores (Intel Xeon with AVX-512 and AMX), the same versions, --rounds 4, with --nanodo:
        float32: smoljax 1.206 s, 3,397 tokens/s, 56.4% of the 304 GFLOP/s peak (torch's is 375); Hugging Face 1.151 s, 3,559 tokens/s;
        nanodo 2.318 s, 1,767 tokens/s. 0.95 times as fast as Hugging Face by minima, 0.97 by the median of paired rounds (0.93 to
        0.99); 1.92 and 1.95 (1.85 to 2.05) times as fast as nanodo.
        --dtype bfloat16: smoljax 0.661 s, 6,200 tokens/s; Hugging Face 0.782 s, 5,235; nanodo 1.732 s, 2,365. 1.18 times as fast as Hugging
        Face by minima and by the median (1.13 to 1.19); 2.62 and 2.55 (2.49 to 2.70) times as fast as nanodo.
    Before the norm and the feed-forward layer had gradients of their own (smoljax.kernels.cpu_layers) the two were 0.90 and 1.05 times as
    fast as Hugging Face; before products of bfloat16 were handed to XLA's fast library (smoljax.kernels.cpu_matmul) the step in
    bfloat16 took 2.0 times the processor time of then, on one core.

B batch, S sequence
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from smoljax.command_line import MALLOC

B, S = 16, 256
SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_layers": 8,
    "num_heads": 8,
    "num_kv_heads": 4,
}
THREADS = 2
LEARNING_RATE = 1e-3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter that has torch")
    parser.add_argument("--nanodo", help="checkout of google-deepmind/nanodo, to run that as well")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=3, help="steps per turn; the fastest counts")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--worker", choices=list(WORKERS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(WORKERS[args.worker](args.dtype))
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
    commands = {
        "smoljax": [sys.executable, __file__, "--dtype", args.dtype, "--worker", "smoljax"],
        "torch": [args.torch_python, __file__, "--dtype", args.dtype, "--worker", "torch"],
    }
    if args.nanodo:
        commands["nanodo"] = [sys.executable, __file__, "--dtype", args.dtype, "--worker", "nanodo"]
    paths = [args.nanodo, os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    workers = {name: Worker(command) for name, command in commands.items()}
    about = {name: worker.about for name, worker in workers.items()}
    if about["smoljax"]["num_params"] != about["torch"]["num_params"]:
        raise SystemExit(f"the two models differ in size: {about}")
    seconds = {name: [] for name in workers}
    peaks, torch_peaks = [], []
    for _ in range(args.rounds):
        peaks.append(workers["smoljax"].ask(0)["peak"])
        torch_peaks.append(workers["torch"].ask(0)["peak"])
        for name, worker in workers.items():
            seconds[name].append(worker.ask(args.steps)["seconds"])
    print(f"{args.dtype}, matmul peak of torch {max(torch_peaks) / 1e9:.0f} GFLOP/s")
    report(seconds, max(peaks), about)
    return 0


def report(seconds: dict, peak: float, about: dict) -> None:
    """Prints both sides: seconds per step, tokens per second and the share of the matmul peak."""
    flops = about["smoljax"]["flops_per_token"] * B * S
    print(f"matmul peak {peak / 1e9:.0f} GFLOP/s, {flops / 1e9:.0f} GFLOP per step, {B * S} tokens")
    print(f"{'':34s} {'min s':>7s} {'median s':>9s} {'tokens/s':>9s} {'of peak':>8s}")
    for name, times in seconds.items():
        best = min(times)
        print(
            f"{about[name]['label']:34s} {best:7.3f} {statistics.median(times):9.3f} {B * S / best:9.0f} "
            f"{flops / best / peak:8.1%}"
        )
    ours = seconds["smoljax"]
    for name in list(seconds)[1:]:
        ratios = [theirs / mine for mine, theirs in zip(ours, seconds[name])]
        print(
            f"smoljax is {min(seconds[name]) / min(ours):.2f} times as fast as {about[name]['label']} by minima, "
            f"{statistics.median(ratios):.2f} times by the median of {len(ratios)} paired rounds "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


class Worker:
    """A process that trains when asked; `about` is what it says of itself."""

    def __init__(self, command: list[str]):
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"GLIBC_TUNABLES": MALLOC},
        )
        self.about = self._read()

    def ask(self, steps: int) -> dict:
        """Fastest of `steps` steps ("seconds"), or the matmul rate in FLOP/s ("peak") for 0 steps."""
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the worker {' '.join(self._process.args)} ended; its error is above")
        return json.loads(line)


def serve(worker) -> None:
    """Answers one line per request, until the parent goes."""
    about, step, peak = worker
    step()  # Compiles, or warms up.
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        steps = int(line)
        answer = {"seconds": min(timed(step) for _ in range(steps))} if steps else {"peak": peak()}
        print(json.dumps(answer), flush=True)


def timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def smoljax_worker(dtype: str):
    import jax
    import jax.numpy as jnp
    import optax

    from smoljax import losses
    from smoljax.model import ModelConfig, hidden, init, unembedding

    config = ModelConfig(**SHAPE, max_seq_len=S, compute_dtype=dtype)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE))
    window_BS = jax.random.randint(jax.random.key(0), (B, S + 1), 0, config.vocab_size)
    segment_ids_BS = jnp.ones((B, S), jnp.int32)
    positions_BS = jnp.broadcast_to(jnp.arange(S), (B, S))
    mask_BS = jnp.ones((B, S), bool)

    def loss(params, window_BS, segment_ids_BS, positions_BS, mask_BS):
        hidden_BSD = hidden(config, params, window_BS[:, :-1], segment_ids_BS, positions_BS)
        total, num_targets, _ = losses.cross_entropy(
            hidden_BSD, unembedding(config, params), window_BS[:, 1:], mask_BS, chunk_size=1024
        )
        return total / num_targets

    def train(params, opt_state, *batch):
        value, gradient = jax.value_and_grad(loss)(params, *batch)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    train = jax.jit(train, donate_argnums=(0, 1))
    params = jax.jit(init, static_argnums=0)(config, jax.random.key(0))
    opt_state = optimizer.init(params)

    def step():
        nonlocal params, opt_state
        batch = (window_BS, segment_ids_BS, positions_BS, mask_BS)
        params, opt_state, value = train(params, opt_state, *batch)
        value.block_until_ready()

    square = jnp.ones((2048, 2048), dtype)
    multiply = jax.jit(lambda x, y: jnp.matmul(x, y, preferred_element_type=jnp.float32))

    def peak():
        multiply(square, square).block_until_ready()
        fastest = min(timed(lambda: multiply(square, square).block_until_ready()) for _ in range(8))
        return 2 * 2048**3 / fastest

    about = {
        "label": f"smoljax, jax {jax.__version__}",
        "num_params": config.num_params,
        "flops_per_token": config.flops_per_token(S, "causal"),
    }
    return about, step, peak


def torch_worker(dtype: str):
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=SHAPE["vocab_size"],
            hidden_size=SHAPE["hidden_size"],
            intermediate_size=SHAPE["intermediate_size"],
            num_hidden_layers=SHAPE["num_layers"],
            num_attention_heads=SHAPE["num_heads"],
            num_key_value_heads=SHAPE["num_kv_heads"],
            max_position_embeddings=S,
            tie_word_embeddings=True,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.999), weight_decay=1e-4, fused=True
    )
    tokens = torch.randint(0, SHAPE["vocab_size"], (B, S))

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    square = torch.ones(2048, 2048, dtype=getattr(torch, dtype))

    def peak():
        return 2 * 2048**3 / min(timed(lambda: torch.mm(square, square)) for _ in range(9))

    about = {
        "label": f"Hugging Face Llama, torch {torch.__version__}",
        "num_params": sum(parameter.numel() for parameter in model.parameters()),
    }
    return about, step, peak


def nanodo_worker(dtype: str):
    """nanodo's decoder with its loss; heads are not grouped, the feed-forward layer is GELU(1024), positions are learned."""
    import jax
    import jax.numpy as jnp
    import optax
    from nanodo.model import DoConfig, TransformerDo

    model = TransformerDo(
        DoConfig(
            D=SHAPE["hidden_size"],
            H=SHAPE["num_heads"],
            L=S,
            N=SHAPE["num_layers"],
            V=SHAPE["vocab_size"],
            F=4 * SHAPE["hidden_size"],
            fsdp_enabled=False,
            dtype=jnp.dtype(dtype),
        )
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE))
    window_BS = jax.random.randint(jax.random.key(0), (B, S + 1), 0, SHAPE["vocab_size"])

    def loss(params, window_BS):
        logits_BSV = model.apply({"params": params}, window_BS[:, :-1])
        nats_BS = optax.losses.softmax_cross_entropy_with_integer_labels(
            logits_BSV, window_BS[:, 1:]
        )
        return jnp.mean(nats_BS)

    def train(params, opt_state, window_BS):
        value, gradient = jax.value_and_grad(loss)(params, window_BS)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    train = jax.jit(train, donate_argnums=(0, 1))
    params = jax.jit(model.init)(jax.random.key(0), window_BS[:, :-1])["params"]
    opt_state = optimizer.init(params)

    def step():
        nonlocal params, opt_state
        params, opt_state, value = train(params, opt_state, window_BS)
        value.block_until_ready()

    about = {
        "label": "nanodo",
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(params)),
    }
    return about, step, None


WORKERS = {"smoljax": smoljax_worker, "torch": torch_worker, "nanodo": nanodo_worker}

if __name__ == "__main__":
    sys.exit(main())
