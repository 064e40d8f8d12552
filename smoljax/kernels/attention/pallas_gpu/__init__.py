"""Flash attention for Hopper GPUs in Pallas: blocks.py plans, forward.py and backward.py compute, attend.py joins them.

Written for Mosaic GPU and not for Triton: since 0.11 JAX's change log calls Pallas' Triton backend deprecated and names Mosaic
GPU as the one to move to, and it alone reaches Hopper's asynchronous copies and warpgroup products. Without a GPU its kernels
run on a CPU in JAX's interpreter of threads, barriers and races, lower for "cuda", and with JAX's CUDA plugin compile down to
machine code: tests/kernels/attention/test_pallas_gpu.py does all three. They have not run on a GPU yet; tests/gpu is for that.
The price: compute capability 9.x only, bf16 and f16 only (products of f32 exist as TF32 alone, and not with transposed factors),
and an interface that JAX calls unstable. No `pl.CostEstimate` is attached: Mosaic GPU's lowering drops it (jax 0.10.2).

By ptxas 12.9 for sm_90a (that test for an H100, with MOSAIC_GPU_DUMP_PTXAS=1 and MOSAIC_GPU_DUMP_TO=DIR) nothing spills from
registers at head widths 64 and 96; at 128 a thread spills 112 bytes in the forward kernel, none in that of dq and 64 in that of dk
and dv; at 256 it is 244, 240 and 1728.
"""

from smoljax.kernels.attention.pallas_gpu.attend import attend, refusal

__all__ = ["attend", "refusal"]
