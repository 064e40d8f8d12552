"""What the output head and its loss cost a TPU, compiled ahead of time: the compiler's own cycles and memory, not a timing.

16,384 tokens of width 2048 to 128,256 words, bf16 products, loss and both gradients on one chip: in chunks of tokens
(smoljax/losses/cross_entropy.py) and in tiles of the vocabulary (vocabulary_tiles.py).

Command:   python benchmarks/loss_tpu.py   (needs libtpu: pip install "smoljax[plan]"; no accelerator)

B batch, S sequence, D model width, V vocabulary
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from smoljax.losses import cross_entropy, vocabulary_tiles
from smoljax.planning import hlo
from smoljax.planning.topologies import CHIPS

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1"}
B, S, D, V = 4, 4096, 2048, 128_256
CHUNK, TILES = 1024, 16


def chunks(hidden_BSD, unembedding_DV, targets_BS, mask_BS):
    return cross_entropy(hidden_BSD, unembedding_DV, targets_BS, mask_BS, chunk_size=CHUNK)[0]


def tiles(hidden_BSD, unembedding_DV, targets_BS, mask_BS):
    return vocabulary_tiles.sums(TILES, 0.0, hidden_BSD, unembedding_DV, targets_BS, mask_BS)[0]


def main() -> None:
    """Prints one line for each chip and form."""
    for chip, name in TOPOLOGIES.items():
        devices = topologies.get_topology_desc(name, platform="tpu").devices
        mesh = Mesh(np.array(devices[:1]), ("data",), axis_types=(AxisType.Auto,))
        place = NamedSharding(mesh, PartitionSpec())
        arguments = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=place)
            for shape, dtype in (
                ((B, S, D), jnp.bfloat16),
                ((D, V), jnp.float32),
                ((B, S), jnp.int32),
                ((B, S), jnp.bool_),
            )
        ]
        for form in (chunks, tiles):
            with jax.set_mesh(mesh):
                gradient = jax.jit(jax.value_and_grad(form, (0, 1)))
                compiled = gradient.lower(*arguments).compile()
            cycles = hlo.read(compiled.as_text()).total_cycles
            seconds = cycles / CHIPS[chip].clock
            temporaries = compiled.memory_analysis().temp_size_in_bytes
            print(
                f"{chip} {form.__name__:6s} {1e3 * seconds:6.0f} ms, temporaries {temporaries / 2**30:.2f} GiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
