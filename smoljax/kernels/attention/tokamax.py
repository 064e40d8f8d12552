"""Attention of the tokamax library (github.com/openxla/tokamax), which brings kernels for GPUs and TPUs of its own.

Taken only where it is named: no measurement here has it ahead yet (benchmarks/gpu.py makes one), and its segments are a mask
of B S S booleans in memory.

B batch, S sequence, N query heads, K key-value heads, H head width
"""

import importlib.util

import jax

from smoljax.errors import require
from smoljax.kernels.attention.request import Request


def attend(
    q_BSNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    causal: bool,
    segment_ids: jax.Array | None,
    window: int | None,
    scale: float,
    logit_cap: float | None = None,
) -> tuple[jax.Array, None]:
    """softmax(q k^T * scale) v by the first of tokamax's kernels that runs here; the output [B, S, N, H] and no maxima."""
    tokamax = require("tokamax", extra="tokamax")
    flags = require("absl.flags", extra="tokamax").FLAGS
    if not flags.is_parsed():
        flags.mark_as_parsed()  # Or it would parse the command line, which is not its own, and raise.
    mask_B1SS = None
    if segment_ids is not None:
        same_BSS = segment_ids[:, :, None] == segment_ids[:, None, :]
        mask_B1SS = same_BSS[:, None]
    ahead = 0 if causal else None if window is None else window - 1
    output_BSNH = tokamax.dot_product_attention(
        q_BSNH,
        k_BSKH,
        v_BSKH,
        mask=mask_B1SS,
        scale=scale,
        is_causal=causal,
        logits_soft_cap=logit_cap,
        local_window_size=None if window is None else (window - 1, ahead),
    )
    return output_BSNH, None


def refusal(request: Request) -> str | None:
    """Why this backend cannot do what is asked, or None when it can."""
    if importlib.util.find_spec("tokamax") is None:
        return 'tokamax is not installed: pip install "smoljax[tokamax]"'
    if request.max_logits:
        return "it does not return maximum logits"
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1:
        return f"its kernels are not split over devices here, and a mesh of {mesh.size} is active"
    return None
