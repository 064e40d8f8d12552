"""Ring attention: the sequence is split over devices, and keys and values travel round them (arXiv:2310.01889).

Columns are in zig-zag order (ring_order.py): of the two chunks of queries and two of keys that meet at a step, exactly two
pairs matter on every device, so all devices compute the same. No device ever holds more keys than its own and those
in passing.

B batch, S sequence, N query heads, K key-value heads, H head width, E the two ends of the sequence that a device holds (its low and
its high chunk), C columns of a chunk
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from smoljax.errors import SmoljaxError
from smoljax.kernels.attention import pallas_tpu, ring_chunks
from smoljax.kernels.attention.pallas_tpu import blocks
from smoljax.kernels.attention.pallas_tpu.attend import BATCH_AXES, HEADS_AXIS, SEQUENCE_AXIS
from smoljax.kernels.attention.ring_order import devices

LOW, HIGH = 0, 1


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
) -> tuple[jax.Array, jax.Array]:
    """softmax(cap(q k^T * scale)) v over the allowed pairs, sums in f32; S of all arrays, identifiers included, in zig-zag order.

    A remat policy that saves the names "attention_output" and "attention_logsum" spares the backward pass a second
    round of the forward one.

    Returns:
      The output [B, S, N, H] in the dtype of q, and the largest allowed score of each head over all devices before the cap, f32
      [N], padding left out, through which no gradient flows.

    Raises:
      SmoljaxError: batch or heads do not divide over the mesh.
    """
    del causal  # It is: see refusal.
    mesh = jax.sharding.get_abstract_mesh()
    batch = tuple(axis for axis in BATCH_AXES if axis in mesh.shape)
    heads = HEADS_AXIS if HEADS_AXIS in mesh.shape else None
    _check_divides(
        q_BSNH, k_BSKH, math.prod(mesh.shape[a] for a in batch), mesh.shape.get(heads, 1)
    )
    forward, backward = _chunks(mesh.abstract_device)
    scores = {"window": window, "scale": float(scale), "logit_cap": logit_cap}
    ring = Ring(
        devices(),
        q_BSNH.shape[1] // (2 * devices()),
        window,
        functools.partial(forward, **scores),
        functools.partial(backward, **scores),
    )
    spec = PartitionSpec(batch, SEQUENCE_AXIS, heads, None)
    output_BSNH, max_BEN = jax.shard_map(
        lambda *arrays: _local(ring, *arrays),
        in_specs=(spec, spec, spec, None if segment_ids is None else PartitionSpec(*spec[:2])),
        out_specs=(spec, PartitionSpec(batch, SEQUENCE_AXIS, heads)),
        check_vma=False,
    )(q_BSNH, k_BSKH, v_BSKH, segment_ids)
    return output_BSNH, jnp.max(max_BEN, axis=(0, 1))


def refusal(*, causal: bool, seq_len: int) -> str | None:
    """Why this backend cannot do what is asked, or None when it can."""
    n = devices()
    if n == 1:
        return f"no mesh axis {SEQUENCE_AXIS!r} of more than one device splits the sequence"
    if not causal:
        return "its balance is that of causal attention"
    if seq_len % (2 * n):
        return (
            f"a sequence of {seq_len} does not divide into two chunks for each of the {n} devices of mesh axis "
            f"{SEQUENCE_AXIS!r}: it takes multiples of {2 * n}"
        )
    return None


@dataclasses.dataclass(frozen=True)
class Ring:
    """What is static about a round.

    Attributes:
      devices: n, how many hold a part of the sequence each.
      chunk: C, columns of each of the 2n chunks.
      window: a query sees keys less than this many positions back; None is no limit.
      forward, backward: of one pair of chunks (ring_chunks.py says what they take and return), given all but causal and shift.
    """

    devices: int
    chunk: int
    window: int | None
    forward: Callable
    backward: Callable

    @property
    def reach(self) -> int:
        """How many chunks back the first query of a chunk sees a key: one more than these is out of the window."""
        if self.window is None:
            return 2 * self.devices
        return -(-(self.window - 1) // self.chunk)

    @property
    def stretches(self) -> tuple[tuple[int, int, int], ...]:
        """(jump to its first step, first step, last step) of each run of steps at which some pair is in the window.

        At step s a device has the keys of the s-th before it, and two chunks of theirs and its own are min(s, n - s) apart
        or more: of a short window only the first and the last steps matter.
        """
        n, reach = self.devices, self.reach
        if 2 * reach >= n - 1:
            return ((1, 1, n - 1),)
        return ((1, 1, reach), (n - 2 * reach, n - reach, n - 1)) if reach else ()

    def pairs(self, here, step):
        """(end of the queries, end of the keys, chunks between them) that matter to device `here` at a step from 1 on."""
        there = (here - step) % self.devices  # Whose keys are here now.
        # Both low chunks where the keys come from before this device, both high ones where they come from behind it.
        end = jnp.where(there < here, LOW, HIGH)
        near = (end, end, jnp.abs(here - there))
        far = (HIGH, LOW, 2 * self.devices - 1 - here - there)
        return (near, far) if self.reach > 1 else (near,)

    def own_pairs(self, here):
        """The same of a device's own chunks, those with themselves left out."""
        return ((HIGH, LOW, 2 * self.devices - 1 - 2 * here),) if self.reach else ()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _local(ring, q_BSNH, k_BSKH, v_BSKH, ids_BS):
    return _forward(ring, q_BSNH, k_BSKH, v_BSKH, ids_BS)[0]


def _forward(ring, q_BSNH, k_BSKH, v_BSKH, ids_BS):
    q, *keys = (_ends(x) for x in (q_BSNH, k_BSKH, v_BSKH, ids_BS))
    q_ids, here = keys[2], jax.lax.axis_index(SEQUENCE_AXIS)

    def meet(so_far, keys, pairs):
        out_EBCNH, lse_EBNC, max_BN = so_far
        for end, key_end, distance in pairs:
            part_BCNH, part_BNC, part_BN = ring.forward(
                _take(q, end),
                *(_take(x, key_end) for x in keys[:2]),
                *(_take(x, at) for x, at in ((q_ids, end), (keys[2], key_end))),
                causal=False,
                shift=distance * ring.chunk,
            )
            joined = _join(_take(out_EBCNH, end), _take(lse_EBNC, end), part_BCNH, part_BNC)
            out_EBCNH, lse_EBNC = (
                jax.lax.dynamic_update_index_in_dim(x, new, end, 0)
                for x, new in zip((out_EBCNH, lse_EBNC), joined)
            )
            max_BN = jnp.maximum(max_BN, part_BN)
        return out_EBCNH, lse_EBNC, max_BN

    out, lse, largest = ring.forward(
        *(_merge_rows(x) for x in (q, *keys[:2], q_ids, q_ids)),
        causal=True,
        shift=0,
    )
    start = (*(_split_rows(x) for x in (out, lse)), _split_rows(largest).max(0))
    so_far = meet(start, keys, ring.own_pairs(here))

    for jump, first, last in ring.stretches:
        keys = _send(ring, keys, jump)

        def step(carry, number):
            so_far, keys = carry
            following = _send(ring, keys, 1)  # While this step computes.
            return (meet(so_far, keys, ring.pairs(here, number)), following), None

        (so_far, keys), _ = jax.lax.scan(step, (so_far, keys), jnp.arange(first, last))
        so_far = meet(so_far, keys, ring.pairs(here, last))

    out_EBCNH, lse_EBNC, max_BN = so_far
    output_BSNH = checkpoint_name(_columns(out_EBCNH.astype(q.dtype)), "attention_output")
    lse_EBNC = checkpoint_name(lse_EBNC, "attention_logsum")
    saved = (q_BSNH, k_BSKH, v_BSKH, ids_BS, output_BSNH, lse_EBNC)
    return (output_BSNH, max_BN[:, None]), saved


def _backward(ring, saved, cotangents):
    *arrays, lse = saved
    q, k, v, ids, out, dout = (_ends(x) for x in (*arrays, cotangents[0]))
    product_EBCNH = dout.astype(jnp.float32) * out.astype(jnp.float32)
    drop = jnp.swapaxes(jnp.sum(product_EBCNH, axis=-1), 2, 3)
    rows, here = (q, dout, lse, drop, ids), jax.lax.axis_index(SEQUENCE_AXIS)

    def gradients(rows, keys, **mask):
        (q, dout, lse, drop, q_ids), (k, v, k_ids) = rows, keys
        return ring.backward(q, k, v, dout, lse, drop, q_ids, k_ids, **mask)

    def meet(dq, dkeys, keys, pairs):
        for end, key_end, distance in pairs:
            part_dq, *part_dkeys = gradients(
                [_take(x, end) for x in rows],
                [_take(x, key_end) for x in keys],
                causal=False,
                shift=distance * ring.chunk,
            )
            dq = _add(dq, part_dq, end)
            dkeys = [_add(x, part, key_end) for x, part in zip(dkeys, part_dkeys)]
        return dq, dkeys

    keys = (k, v, ids)
    own = gradients(
        [_merge_rows(x) for x in rows], [_merge_rows(x) for x in keys], causal=True, shift=0
    )
    dq, *dkeys = (_split_rows(x) for x in own)
    dq, dkeys = meet(dq, dkeys, keys, ring.own_pairs(here))

    # The gradients of a device's keys begin there, follow them one step behind, and come home after the last.
    for jump, first, last in ring.stretches:
        keys, dkeys = _send(ring, keys, jump), _send(ring, dkeys, jump - 1)

        def visit(dq, dkeys, keys, number):
            dq, new = meet(dq, [jnp.zeros_like(x) for x in dkeys], keys, ring.pairs(here, number))
            arrived = _send(ring, dkeys, 1)
            return dq, [x + more for x, more in zip(arrived, new)]

        def step(carry, number):
            following = _send(ring, carry[2], 1)
            return (*visit(*carry, number), following), None

        carry, _ = jax.lax.scan(step, (dq, dkeys, keys), jnp.arange(first, last))
        keys = carry[2]
        dq, dkeys = visit(*carry, last)
    if ring.stretches:
        dkeys = _send(ring, dkeys, 1)
    return *(_columns(x.astype(q.dtype)) for x in (dq, *dkeys)), None


_local.defvjp(_forward, _backward)


def _join(out_BCNH, lse_BNC, part_BCNH, part_BNC):
    """Attention to two sets of keys from that to each. Of the second a query may see none (log-sum-exp -1e30: share 0)."""
    joined_BNC = jnp.logaddexp(lse_BNC, part_BNC)
    share_BCN1, part_BCN1 = (
        jnp.swapaxes(jnp.exp(x - joined_BNC), 1, 2)[..., None] for x in (lse_BNC, part_BNC)
    )
    return share_BCN1 * out_BCNH + part_BCN1 * part_BCNH, joined_BNC


def _send(ring, arrays, hop):
    """Each device's arrays to the hop-th after it."""
    n = ring.devices
    if hop % n == 0:
        return arrays
    return jax.lax.ppermute(arrays, SEQUENCE_AXIS, [(c, (c + hop) % n) for c in range(n)])


def _chunks(device) -> tuple[Callable, Callable]:
    """Forward and backward of one pair of chunks on such a device; None is that of this process."""
    platform = jax.default_backend() if device is None else device.platform
    if platform != "tpu":
        return ring_chunks.chunk_forward, ring_chunks.chunk_backward
    generation = blocks.generation(None if device is None else device.device_kind)
    return tuple(
        functools.partial(chunk, generation=generation, dtype=jnp.float32)
        for chunk in (pallas_tpu.chunk_forward, pallas_tpu.chunk_backward)
    )


def _check_divides(q_BSNH, k_BSKH, batch_parts, head_parts):
    B, K = q_BSNH.shape[0], k_BSKH.shape[2]
    if B % batch_parts:
        raise SmoljaxError(
            f"attention got a batch of {B}, which does not divide over the {batch_parts} devices of mesh axes "
            f"{BATCH_AXES}: make it a multiple of {batch_parts}"
        )
    if K % head_parts:
        raise SmoljaxError(
            f"attention got {K} key-value heads, which do not divide over the {head_parts} devices of mesh axis "
            f"{HEADS_AXIS!r}: set it to a divisor of {K}"
        )


def _ends(x_BS):
    """[B, 2C, ...] to [E, B, C, ...]; None stays."""
    if x_BS is None:
        return None
    B, S = x_BS.shape[:2]
    return jnp.moveaxis(x_BS.reshape(B, 2, S // 2, *x_BS.shape[2:]), 1, 0)


def _columns(x_EBC):
    """[E, B, C, ...] back to [B, 2C, ...]."""
    x_BEC = jnp.moveaxis(x_EBC, 0, 1)
    B, E, C = x_BEC.shape[:3]
    return x_BEC.reshape(B, E * C, *x_BEC.shape[3:])


def _merge_rows(x_EB):
    return None if x_EB is None else x_EB.reshape(-1, *x_EB.shape[2:])


def _split_rows(x_EB):
    return x_EB.reshape(2, -1, *x_EB.shape[1:])


def _take(x_E, end):
    return None if x_E is None else jax.lax.dynamic_index_in_dim(x_E, end, 0, keepdims=False)


def _add(x_E, part, end):
    return jax.lax.dynamic_update_index_in_dim(x_E, _take(x_E, end) + part, end, 0)
