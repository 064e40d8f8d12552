"""Flash attention for TPUs in Pallas: blocks.py plans, forward.py and backward.py compute, chunks.py lays out what they get,
attend.py joins them."""

from smoljax.kernels.attention.pallas_tpu.attend import attend, refusal
from smoljax.kernels.attention.pallas_tpu.chunks import chunk_backward, chunk_forward

__all__ = ["attend", "chunk_backward", "chunk_forward", "refusal"]
