"""Our Pallas TPU attention beside JAX's splash attention, compiled ahead of time: what the compiler says, not a timing.

For v5e, v5p and v6e, sequences of 4096 and 32768, head widths 64 and 128, 16 query heads and 4 key-value heads, causal with
segment ids, bf16, one row, output and all gradients: scoped VMEM of each kernel, temporaries in HBM, estimated cycles of
what surrounds the kernels (transposes, reductions; kernels themselves have no estimate), and the kernels' own cost estimates.

Writes benchmarks/results/attention_tpu_DATE.md after every row.

Command:   python benchmarks/attention_tpu.py   (needs libtpu: pip install "smoljax[plan]"; no accelerator)

B batch, S sequence, N query heads, K key-value heads, H head width
"""

import datetime
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from smoljax import files
from smoljax.kernels import attention

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
N, K = 16, 4
HEADER = (
    "| chip | S | H | kernels | VMEM of each kernel, KiB | HBM temporaries, MiB | cycles around kernels, thousands "
    "| FLOPs by cost estimate, 1e9 |\n|---|---|---|---|---|---|---|---|\n"
)


def main() -> None:
    """Compiles all and writes the table."""
    date = datetime.date.today().isoformat()
    path = Path(f"benchmarks/results/attention_tpu_{date}.md")
    text = f"# {' '.join(__doc__.splitlines()[0].split())}\n\njax {jax.__version__}. {__doc__.split(chr(10) * 2)[1]}\n"
    text += "Splash has blocks of 512 throughout, as ours. Temporaries are what `memory_analysis` says.\n\n"
    text += HEADER
    for S, chip, H, name in itertools.product((4096, 32768), TOPOLOGIES, (64, 128), FUNCTIONS):
        try:
            row = " | ".join(_compiled(chip, FUNCTIONS[name], S, H))
        except Exception as error:  # A compiler's refusal is a result.
            row = "refused: " + " ".join(str(error).split())[:200].replace("|", "/") + " | | | "
        text += f"| {chip} | {S} | {H} | {name} | {row} |\n"
        print(text.splitlines()[-1], flush=True)
        files.atomic_write_bytes(path, text.encode())


def _ours(q_BSNH, k_BSKH, v_BSKH, ids_BS):
    return attention(q_BSNH, k_BSKH, v_BSKH, segment_ids=ids_BS, implementation="pallas_tpu")


def _splash(q_BSNH, k_BSKH, v_BSKH, ids_BS):
    S, H = q_BSNH.shape[1], q_BSNH.shape[3]
    mask = masks.MultiHeadMask([masks.CausalMask((S, S))] * N)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = splash.BlockSizes(**{f"block_{name}": 512 for name in names})
    kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)

    def row(q_SNH, k_SKH, v_SKH, ids_S):
        q, k, v = (jnp.swapaxes(x, 0, 1) for x in (q_SNH * H**-0.5, k_SKH, v_SKH))
        return jnp.swapaxes(kernel(q, k, v, splash.SegmentIds(ids_S, ids_S)), 0, 1)

    return jax.vmap(row)(q_BSNH, k_BSKH, v_BSKH, ids_BS)


FUNCTIONS = {"ours": _ours, "splash": _splash}


def _compiled(chip, function, S, H):
    devices = topologies.get_topology_desc(TOPOLOGIES[chip], platform="tpu").devices
    mesh = Mesh(np.array(devices[:1]), ("data",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, PartitionSpec())
    q, k = (
        jax.ShapeDtypeStruct((1, S, heads, H), jnp.bfloat16, sharding=whole) for heads in (N, K)
    )
    ids = jax.ShapeDtypeStruct((1, S), jnp.int32, sharding=whole)

    def both(q, k, v, ids, dout):
        out, pull = jax.vjp(lambda q, k, v: function(q, k, v, ids), q, k, v)
        return out, pull(dout)

    with jax.set_mesh(mesh):
        compiled = jax.jit(both).lower(q, k, k, ids, q).compile()
    kernels, cycles, flops = [], 0, 0
    for line in compiled.as_text().splitlines():
        if "tpu_custom_call" in line:
            used = re.search(r'"used_scoped_memory_configs":\[\{[^}]*"size":"(\d+)"', line)
            kernels.append(f"{int(used[1]) // 1024}" if used else "?")
            estimate = re.search(r'"cost_estimate":\{"flops":"(\d+)"', line)
            flops += int(estimate[1]) if estimate else 0
        elif found := re.search(r'"estimated_cycles":"(\d+)"', line):
            cycles += int(found[1])
    megabytes = compiled.memory_analysis().temp_size_in_bytes / 2**20
    return ", ".join(kernels), f"{megabytes:.1f}", f"{cycles / 1e3:.0f}", f"{flops / 1e9:.0f}"


if __name__ == "__main__":
    main()
