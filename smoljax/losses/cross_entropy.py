"""Output head and cross-entropy in one, over chunks of tokens, or of the vocabulary where devices share a batch.

The loss is a sum, so its gradient is known as soon as a chunk's logits are: the forward pass of a differentiated
call computes both and drops the logits (as Liger Kernel's fused linear cross-entropy does, arXiv:2410.10989,
section 3.2). Nothing is recomputed, and peak memory is one chunk of logits.

Multi-token prediction calls it once for each head, with that head's hidden states and targets and the same unembedding;
distillation gives it a teacher's probabilities of some tokens.

No Pallas kernel: what one could save is the traffic of logits, and it would pay with a fourth product, as no tile of logits outlives
the pass that finds the normaliser. For 16,384 tokens of width 2048 to 128,256 words, loss and gradients, the TPU compiler's own
cycles (benchmarks/loss_tpu.py) give the chunks 234 ms on v5e and 92 on v5p (temporaries 1.10 GiB), the tiles of vocabulary_tiles.py 288 and 112 ms (1.59
GiB); four products take 175 and 75 ms at peak, 206 and 88 at the 85% of it that products reach elsewhere. That is at most 3% of a
step of the 3B model (2.78 and 1.18 s by the same count) on a mesh, and 1% on one chip.

B batch, S sequence, C chunks, P tokens of a row in a chunk, D model width, V vocabulary, E tokens that a teacher names
"""

import functools
import math

import jax
import jax.numpy as jnp

from smoljax.errors import SmoljaxError
from smoljax.kernels import cpu_matmul
from smoljax.kernels.platform import one_cpu
from smoljax.losses import vocabulary_tiles

# Mesh axes that split tokens: those of the residual stream (smoljax.parallel.rules).
TOKEN_AXES = ("data", "fsdp", "context", "tensor")


def cross_entropy(
    hidden_BSD: jax.Array,
    unembedding_DV: jax.Array,
    targets_BS: jax.Array,
    loss_mask_BS: jax.Array,
    *,
    chunk_size: int,
    z_loss: float = 0.0,
    probabilities_BSE: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Summed cross-entropy of softmax(hidden @ unembedding) against the targets.

    Args:
      hidden_BSD: final hidden states; their dtype is that of the matmuls. Logits and sums are f32.
      unembedding_DV: output matrix; its gradient is accumulated over chunks in f32.
      targets_BS: int32 token ids; with probabilities_BSE [B, S, E], no id twice at a position.
      loss_mask_BS: bool; False leaves a position out of loss and count.
      chunk_size: tokens per device whose logits fill the memory that logits may take. On one device no more than these
        exist at once (at least one of each row is taken). On a mesh that gives a device more tokens than these, the
        logits of all of them exist to a part of the vocabulary (vocabulary_tiles.py), in the same memory.
      z_loss: weight of the squared log-normaliser (PaLM, arXiv:2204.02311, section 5); 0 leaves it out.
      probabilities_BSE: f32, a teacher's probabilities of E tokens at each position, a few (Hinton et al. 2015, arXiv:1503.02531,
        section 2, at temperature 1): the loss is minus their sum with the log-probabilities, without what the teacher gave
        to other tokens. No gradient flows into them. None: all of it to the one target.

    Returns:
      The sum in nats, z-loss included (f32 scalar, differentiable in the first two arguments); the number of targets
      (int32 scalar); and {"cross_entropy", "z_loss"}: the two parts of the sum (f32 scalars, no gradient).

    Raises:
      SmoljaxError: shapes do not agree or chunk_size is not positive.
    """
    B, S, D = hidden_BSD.shape
    soft = probabilities_BSE is not None
    expected = probabilities_BSE.shape if soft else (B, S)
    if (
        unembedding_DV.shape[0] != D
        or loss_mask_BS.shape != (B, S)
        or targets_BS.shape != expected
        or expected[:2] != (B, S)
    ):
        raise SmoljaxError(
            f"cross_entropy got hidden {hidden_BSD.shape}, unembedding {unembedding_DV.shape}, targets "
            f"{targets_BS.shape}, loss_mask {loss_mask_BS.shape}"
            + (f", probabilities {expected}" if soft else "")
            + ": expected [B, S, D], [D, V], [B, S], [B, S]"
            + (", and [B, S, E] for targets and probabilities" if soft else "")
        )
    if chunk_size < 1:
        raise SmoljaxError(f"cross_entropy got chunk_size={chunk_size}: set it to at least 1")
    devices = _devices_of_the_tokens()
    num_chunks = -(-B * S // (chunk_size * devices))
    if devices > 1 and num_chunks > 1:
        nats, z = vocabulary_tiles.sums(
            num_chunks,
            z_loss,
            hidden_BSD,
            unembedding_DV,
            targets_BS,
            loss_mask_BS,
            probabilities_BSE,
        )
    else:
        num_chunks = min(S, num_chunks)
        arrays = (hidden_BSD, targets_BS, loss_mask_BS, probabilities_BSE)
        hidden, *rest = jax.tree.map(lambda x: _split(x, num_chunks), arrays)
        nats, z = _sums(z_loss, hidden, unembedding_DV, *rest)
    metrics = {"cross_entropy": jax.lax.stop_gradient(nats - z), "z_loss": jax.lax.stop_gradient(z)}
    return nats, jnp.sum(loss_mask_BS, dtype=jnp.int32), metrics


def _devices_of_the_tokens() -> int:
    """Devices of the active mesh over which tokens are split; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape.get(axis, 1) for axis in TOKEN_AXES)


def _split(x_BS, num_chunks: int):
    """[B, S, ...] to [C, B, P, ...]. Chunk c takes every C-th token; a tail is filled with zeros, which the loss mask
    leaves out."""
    B, S = x_BS.shape[:2]
    rows = -(-S // num_chunks)
    fill = [(0, 0)] * x_BS.ndim
    fill[1] = (0, rows * num_chunks - S)
    x_BPC = jnp.pad(x_BS, fill).reshape(B, rows, num_chunks, *x_BS.shape[2:])
    return jnp.moveaxis(x_BPC, 2, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(z_loss, hidden_CBPD, unembedding_DV, targets_CBP, mask_CBP, probabilities_CBPE=None):
    """Sum in nats with z-loss, and the z-loss in it."""
    head_DV = unembedding_DV.astype(hidden_CBPD.dtype)

    def add(sums, chunk):
        nats, z, _ = _chunk(z_loss, head_DV, *chunk)
        return (sums[0] + nats, sums[1] + z), None

    zero = jnp.zeros((), jnp.float32)
    chunks = (hidden_CBPD, targets_CBP, mask_CBP, probabilities_CBPE)
    return _loop(add, (zero, zero), chunks)[0]


def _sums_forward(
    z_loss, hidden_CBPD, unembedding_DV, targets_CBP, mask_CBP, probabilities_CBPE=None
):
    head_DV = unembedding_DV.astype(hidden_CBPD.dtype)

    def add(sums, chunk):
        nats, z, dlogits_BPV = _chunk(z_loss, head_DV, *chunk)
        dlogits_BPV = dlogits_BPV.astype(head_DV.dtype)
        dhidden_BPD, dhead_DV = _products(dlogits_BPV, chunk[0], head_DV)
        return (sums[0] + nats, sums[1] + z, sums[2] + dhead_DV), dhidden_BPD

    zero = jnp.zeros((), jnp.float32)
    start = (zero, zero, jnp.zeros(unembedding_DV.shape, jnp.float32))
    chunks = (hidden_CBPD, targets_CBP, mask_CBP, probabilities_CBPE)
    (nats, z, dhead_DV), dhidden_CBPD = _loop(add, start, chunks)
    return (nats, z), (dhidden_CBPD, dhead_DV.astype(unembedding_DV.dtype))


def _sums_backward(z_loss, gradients, cotangents):
    dhidden_CBPD, dhead_DV = gradients
    scale = cotangents[0]  # That of the z-loss is 0: it leaves as a metric, without gradient.
    return (dhidden_CBPD * scale.astype(dhidden_CBPD.dtype), dhead_DV * scale, None, None, None)


_sums.defvjp(_sums_forward, _sums_backward)


def _products(dlogits_BPV, hidden_BPD, head_DV):
    """Gradients by the hidden states, in their dtype, and by the head, f32."""
    if not one_cpu():
        return jnp.einsum("bpv,dv->bpd", dlogits_BPV, head_DV), jnp.einsum(
            "bpd,bpv->dv", hidden_BPD, dlogits_BPV, preferred_element_type=jnp.float32
        )
    # The product of two matrices is all that a CPU multiplies fast.
    D, V = head_DV.shape
    dlogits, hidden = dlogits_BPV.reshape(-1, V), hidden_BPD.reshape(-1, D)
    dhidden = cpu_matmul.matmul_transposed(dlogits, head_DV).astype(hidden.dtype)
    return dhidden.reshape(hidden_BPD.shape), cpu_matmul.transposed_matmul(hidden, dlogits)


def _chunk(z_loss, head_DV, hidden_BPD, targets_BP, mask_BP, probabilities_BPE):
    """Sum in nats, z-loss in it, and the gradient of the sum by the logits (dead code unless used)."""
    logits_BPV = jnp.einsum("bpd,dv->bpv", hidden_BPD, head_DV, preferred_element_type=jnp.float32)
    max_BP1 = jnp.max(logits_BPV, axis=-1, keepdims=True)
    exp_BPV = jnp.exp(logits_BPV - max_BP1)
    sum_BP1 = jnp.sum(exp_BPV, axis=-1, keepdims=True)
    log_normaliser_BP = (jnp.log(sum_BP1) + max_BP1)[..., 0]
    mass_BP = vocabulary_tiles.mass(probabilities_BPE)
    if probabilities_BPE is None:
        target_logit_BP = jnp.take_along_axis(logits_BPV, targets_BP[..., None], axis=-1)[..., 0]
    else:
        target_logits_BPE = jnp.take_along_axis(logits_BPV, targets_BP, axis=-1)
        target_logit_BP = jnp.sum(probabilities_BPE * target_logits_BPE, axis=-1)
    weight_BP = mask_BP.astype(jnp.float32)
    z = jnp.sum(weight_BP * z_loss * jnp.square(log_normaliser_BP))
    nats = jnp.sum(weight_BP * (mass_BP * log_normaliser_BP - target_logit_BP)) + z

    word_11V = jnp.arange(head_DV.shape[1])[None, None]
    factor_BP = weight_BP * (mass_BP + 2 * z_loss * log_normaliser_BP)
    dlogits_BPV = exp_BPV * (factor_BP[..., None] / sum_BP1) - vocabulary_tiles.at_targets(
        weight_BP[..., None], targets_BP, probabilities_BPE, word_11V
    )
    return nats, z, dlogits_BPV


def _loop(body, carry, chunks):
    """lax.scan, without a loop around a single chunk."""
    if chunks[0].shape[0] > 1:
        return jax.lax.scan(body, carry, chunks)
    carry, output = body(carry, jax.tree.map(lambda x: x[0], chunks))
    return carry, jax.tree.map(lambda x: x[None], output)
