"""Our Pallas TPU attention beside JAX's splash attention and tokamax's, compiled ahead of time: what the compiler says, not a timing.

For v5e, v5p and v6e, sequences of 4096 and 32768, head widths 64 and 128, 16 query heads and 4 key-value heads, causal with
segment ids, bf16, one row, output and all gradients. For each kernel: scoped VMEM, and the bundles of instructions that the
compiler schedules for the scores of 512 by 512 positions of one head in the inner loop: of a block that needs no mask / of one
that does, where the kernel tells them apart. A bundle takes a cycle at least; waits for memory and for the MXU are not in it,
nor are the steps' own cost (about 250 bundles; ours takes four heads a step, the others one). For the program: temporaries in
HBM, and estimated cycles of what surrounds the kernels (transposes, reductions), of which alone the compiler has an estimate.

Writes the table into FILE after every row: those that it has already stay as they are, and so does what is written above the table;
--only makes some of them anew. Each row compiles in a process of its own, as the compiler writes its schedules to a folder that is
named when it is loaded (LIBTPU_INIT_ARGS).

Command:   python -m benchmarks.attention_tpu [--only CHIP,S,H,KERNELS] [--file FILE]   (--only takes the beginning of it as well;
           needs libtpu and tokamax: pip install "smoljax[plan,tokamax]"; no accelerator; about ten seconds of one core a row)

B batch, S sequence, N query heads, K key-value heads, H head width
"""

import argparse
import datetime
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
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
BLOCK = 512
HEADER = (
    "| chip | S | H | kernels | VMEM of each kernel, KiB | bundles of each kernel | HBM temporaries, MiB "
    "| cycles around kernels, thousands |\n|---|---|---|---|---|---|---|---|\n"
)


def main() -> None:
    """Compiles what is asked for and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    date = datetime.date.today().isoformat()
    parser.add_argument("--file", default=f"benchmarks/results/attention_tpu_{date}.md")
    parser.add_argument("--only", help="CHIP,S,H,KERNELS of the rows to make, or the beginning")
    parser.add_argument("--row", help="CHIP,S,H,KERNELS: compile one row here, print it as JSON")
    args = parser.parse_args()
    if args.row:
        chip, S, H, name = args.row.split(",")
        print(json.dumps(_compiled(chip, FUNCTIONS[name], int(S), int(H))))
        return
    path = Path(args.file)
    above, _, table = (path.read_text() if path.exists() else _introduction()).partition(HEADER)
    rows = {tuple(re.split(r" *\| *", line)[1:5]): line for line in table.splitlines()}
    names = [
        (chip, str(S), str(H), name)
        for S, chip, H, name in itertools.product((4096, 32768), TOPOLOGIES, (64, 128), FUNCTIONS)
    ]
    for each in names:
        if each not in rows if args.only is None else ",".join(each).startswith(args.only):
            rows[each] = f"| {' | '.join(each)} | {_row(*each)} |"
            print(rows[each], flush=True)
            text = above + HEADER + "".join(f"{rows[one]}\n" for one in names if one in rows)
            files.atomic_write_bytes(path, text.encode())


def _introduction() -> str:
    first, what = __doc__.split("\n\n")[:2]
    return (
        f"# {' '.join(first.split())}\n\njax {jax.__version__}. {what}\n\n"
        f"Splash and tokamax's splash have blocks of {BLOCK} throughout, as ours, and one backward kernel each.\n\n"
    )


def _row(chip, S, H, name) -> str:
    """One line of the table; a refusal by the compiler is a result as well."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final"
        environment = os.environ | {
            "LIBTPU_INIT_ARGS": flags,
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }
        command = [sys.executable, "-m", "benchmarks.attention_tpu", f"--row={chip},{S},{H},{name}"]
        ended = subprocess.run(command, capture_output=True, text=True, env=environment)
        if ended.returncode:
            return f"refused: {ended.stderr.strip().splitlines()[-1][:200]} | | | "
        compiled = json.loads(ended.stdout.splitlines()[-1])
        bundles = _bundles(Path(folder))
    return (
        f"{', '.join(compiled['vmem'])} | {', '.join(bundles)} | {compiled['temporaries']:.1f} "
        f"| {compiled['cycles'] / 1e3:.0f}"
    )


def _ours(q_BSNH, k_BSKH, v_BSKH, ids_BS):
    return attention(q_BSNH, k_BSKH, v_BSKH, segment_ids=ids_BS, implementation="pallas_tpu")


def _splash(q_BSNH, k_BSKH, v_BSKH, ids_BS):
    S = q_BSNH.shape[1]
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute")
    sizes = splash.BlockSizes(
        **{f"block_{name}": BLOCK for name in names}, use_fused_bwd_kernel=True
    )
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((S, S))] * N),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
    )
    return _by_row(kernel, splash.SegmentIds, q_BSNH, k_BSKH, v_BSKH, ids_BS)


def _tokamax(q_BSNH, k_BSKH, v_BSKH, ids_BS):
    try:
        from tokamax._src.ops.experimental.tpu.splash_attention import (
            splash_attention_kernel as kernels,
        )
        from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask
    except ImportError as error:
        raise SystemExit(
            f"tokamax's TPU kernel is missing ({error}): pip install tokamax"
        ) from None
    S = q_BSNH.shape[1]
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute")
    config = kernels.SplashConfig(**{f"block_{name}": BLOCK for name in names})
    mask = splash_attention_mask.CausalMask((S, S))
    kernel = kernels.make_splash_mha(mask, config=config, q_seq_shards=1)
    return _by_row(kernel, kernels.SegmentIds, q_BSNH, k_BSKH, v_BSKH, ids_BS)


def _by_row(kernel, segment_ids, q_BSNH, k_BSKH, v_BSKH, ids_BS):
    def row(q_SNH, k_SKH, v_SKH, ids_S):
        scaled_SNH = q_SNH * q_SNH.shape[-1] ** -0.5
        q, k, v = (jnp.swapaxes(x, 0, 1) for x in (scaled_SNH, k_SKH, v_SKH))
        return jnp.swapaxes(kernel(q, k, v, segment_ids(ids_S, ids_S)), 0, 1)

    return jax.vmap(row)(q_BSNH, k_BSKH, v_BSKH, ids_BS)


FUNCTIONS = {"ours": _ours, "splash": _splash, "tokamax": _tokamax}


def _compiled(chip, function, S, H) -> dict:
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
    text = compiled.as_text()
    # A kernel's metadata may span lines, so its figures are looked for up to the next instruction that has any.
    kernels = text.split('custom_call_target="tpu_custom_call"')[1:]
    scoped = (
        re.search(r'"used_scoped_memory_configs":\[\{[^}]*"size":"(\d+)"', x) for x in kernels
    )
    return {
        "vmem": [f"{int(size[1]) // 1024}" if size else "?" for size in scoped],
        "temporaries": compiled.memory_analysis().temp_size_in_bytes / 2**20,
        "cycles": sum(int(x) for x in re.findall(r'"estimated_cycles":"(\d+)"', text)),
    }


def _bundles(folder: Path) -> list[str]:
    """For each kernel, bundles for 512 by 512 scores in the parts of its program that have products and exponentials.

    Scores are counted by the unit that computes exponentials: 1024 an instruction, 256 for 512 by 512 of them, and a rest
    for what is kept of each query.
    """
    results = []
    for path in sorted(
        folder.glob("*attention*-final_hlo-static-per-bundle-utilization.txt")
    ) + sorted(folder.glob("*splash*-final_hlo-static-per-bundle-utilization.txt")):
        units, _, _, *rows = path.read_text().splitlines()[1:]
        names = [name.strip() for name in units.split(",")]
        use = np.array([[int(x) for x in row.split()] for row in rows if row.strip()])
        (listing,) = folder.glob(re.sub(r"-\d+-final_hlo.*", "", path.name) + "*-final_bundles.txt")
        lines = re.findall(r"^\s*0x[0-9a-f]+.*|^\s*0 .*", listing.read_text(), re.MULTILINE)
        ends = [i + 1 for i, line in enumerate(lines) if "sbr.rel" in line]
        parts = [(use[a:b], b - a) for a, b in itertools.pairwise([0, *ends, len(use)]) if b > a]
        counted = []
        for part, length in parts:
            totals = dict(zip(names, part.sum(0)))
            if totals["MXU"] and totals["EUP"] >= 256:
                counted.append(length / (totals["EUP"] // 256))
        results.append(" / ".join(f"{x:.0f}" for x in sorted(counted)))
    return results


if __name__ == "__main__":
    main()
