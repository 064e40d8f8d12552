"""Flash attention for TPUs in Pallas: blocks.py plans, forward.py and backward.py compute, attend.py joins them."""

from smoljax.kernels.attention.pallas_tpu.attend import attend, refusal

__all__ = ["attend", "refusal"]
