"""Times every backend that can run here, forward and forward plus gradients: python -m smoljax.kernels.attention.bench

B batch, S sequence, N query heads, K key-value heads, H head width
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from smoljax.errors import SmoljaxError
from smoljax.kernels import attention
from smoljax.kernels.attention.api import BACKENDS


def main() -> None:
    """Prints the fastest and median time of each backend for one shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="16,256,8,4,32", help="B,S,N,K,H")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--documents", type=int, default=2, help="segments per row; 0: no segment ids"
    )
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    B, S, N, K, H = (int(size) for size in args.shape.split(","))
    keys = jax.random.split(jax.random.key(0), 3)
    q_BSNH = jax.random.normal(keys[0], (B, S, N, H), args.dtype)
    k_BSKH = jax.random.normal(keys[1], (B, S, K, H), args.dtype)
    v_BSKH = jax.random.normal(keys[2], (B, S, K, H), args.dtype)
    segment_ids = None
    if args.documents:
        segment_ids = jnp.broadcast_to(jnp.arange(S) * args.documents // S + 1, (B, S))

    programs = {}
    for name in BACKENDS:

        def forward(q, k, v, name=name):
            return attention(q, k, v, segment_ids=segment_ids, implementation=name)

        def gradients(q, k, v, forward=forward):
            return jax.grad(lambda *args: forward(*args).sum(), (0, 1, 2))(q, k, v)

        try:
            programs[name] = [
                jax.jit(f).lower(q_BSNH, k_BSKH, v_BSKH).compile() for f in (forward, gradients)
            ]
        except SmoljaxError as error:
            print(f"{name:10s} left out: {error}")
    times = {name: ([], []) for name in programs}
    for _ in range(args.rounds):  # Taking turns, so that noise meets all.
        for name, compiled in programs.items():
            for program, seconds in zip(compiled, times[name]):
                start = time.perf_counter()
                jax.block_until_ready(program(q_BSNH, k_BSKH, v_BSKH))
                seconds.append(time.perf_counter() - start)
    flops = 4 * B * N * S * S * H / 2  # Causal: half of the square.
    print(
        f"{args.shape} {args.dtype}, {args.documents} documents, minimum (median) of {args.rounds}"
    )
    for name, (forward, gradients) in times.items():
        megabytes = programs[name][1].memory_analysis().temp_size_in_bytes / 1e6
        print(
            f"{name:10s} forward {min(forward) * 1e3:8.2f} ({statistics.median(forward) * 1e3:.2f}) ms, "
            f"with gradients {min(gradients) * 1e3:8.2f} ({statistics.median(gradients) * 1e3:.2f}) ms, "
            f"{3.5 * flops / min(gradients) / 1e9:.1f} causal GFLOP/s, {megabytes:.0f} MB held"
        )


if __name__ == "__main__":
    main()
