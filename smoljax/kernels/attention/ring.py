"""Ring attention: the sequence is split over devices, and keys and values travel round them (arXiv:2310.01889).

Columns are in zig-zag order (ring_order.py): of the two chunks of queries and two of keys that meet at a step, exactly two
pairs matter on every device, so all devices compute the same. No device ever holds more keys than its own and those
in passing.

B batch, S sequence, N query heads, K key-value heads, H head width, C columns of a chunk, R devices of the ring. What has no
suffix is a pair: the low and the high chunk that a device holds.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from smoljax.kernels.attention import pallas_tpu, ring_chunks
from smoljax.kernels.attention.drop import drop
from smoljax.kernels.attention.mesh import SEQUENCE_AXIS, sequence_parts, split_axes
from smoljax.kernels.attention.pallas_tpu import blocks
from smoljax.kernels.attention.request import Request
from smoljax.kernels.attention.xla import MASKED
from smoljax.kernels.platform import platform

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
    batch, heads = split_axes(q_BSNH, k_BSKH)
    forward, backward = _chunks(mesh.abstract_device)
    scores = {"window": window, "scale": float(scale), "logit_cap": logit_cap}
    ring = Ring(
        sequence_parts(),
        q_BSNH.shape[1] // (2 * sequence_parts()),
        window,
        functools.partial(forward, **scores),
        functools.partial(backward, **scores),
    )
    spec = PartitionSpec(batch, SEQUENCE_AXIS, heads, None)
    output_BSNH, max_BRN = jax.shard_map(
        lambda *arrays: _local(ring, *arrays),
        in_specs=(spec, spec, spec, None if segment_ids is None else PartitionSpec(*spec[:2])),
        out_specs=(spec, PartitionSpec(batch, SEQUENCE_AXIS, heads)),
        check_vma=False,
    )(q_BSNH, k_BSKH, v_BSKH, segment_ids)
    return output_BSNH, jnp.max(max_BRN, axis=(0, 1))


def refusal(request: Request) -> str | None:
    """Why this backend cannot do what is asked, or None when it can."""
    n = sequence_parts()
    if n == 1:
        return f"no mesh axis {SEQUENCE_AXIS!r} of more than one device splits the sequence"
    if not request.causal:
        return "its balance is that of causal attention"
    if request.seq_len % (2 * n):
        return (
            f"a sequence of {request.seq_len} does not divide into two chunks for each of the {n} devices of mesh axis "
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

    def near(self, here, step):
        """Of the two pairs of chunks that matter to device `here` at a step from 1 on, the one that is of the same end.

        Returns:
          Whether both chunks are the low ones (keys of a device before this one) or the high ones, and how many chunks apart
          they are.
        """
        there = (here - step) % self.devices  # Whose keys are here now.
        return there < here, jnp.abs(here - there)

    def far(self, here, step):
        """The other pair, the high queries and the low keys: how many chunks apart. At step 0, of a device's own."""
        return 2 * self.devices - 1 - here - (here - step) % self.devices


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _local(ring, q_BSNH, k_BSKH, v_BSKH, ids_BS):
    return _forward(ring, q_BSNH, k_BSKH, v_BSKH, ids_BS)[0]


def _forward(ring, q_BSNH, k_BSKH, v_BSKH, ids_BS):
    q, *keys = (_ends(x) for x in (q_BSNH, k_BSKH, v_BSKH, ids_BS))
    ids, here = keys[2], jax.lax.axis_index(SEQUENCE_AXIS)

    def meet(keys, end, key_end, distance, *, causal=False):
        k_BCKH, v_BCKH, key_ids_BC = (x[key_end] for x in keys)
        shift = distance * ring.chunk
        chunks = (q[end], k_BCKH, v_BCKH, ids[end], key_ids_BC)
        return ring.forward(*chunks, causal=causal, shift=shift)

    def visit(so_far, keys, number):
        (low, high), max_BN = so_far
        is_low, distance = ring.near(here, number)
        near = jax.lax.cond(
            is_low, lambda: meet(keys, LOW, LOW, distance), lambda: meet(keys, HIGH, HIGH, distance)
        )
        low, high = _join(low, near, counts=is_low), _join(high, near, counts=~is_low)
        max_BN = jnp.maximum(max_BN, near[2])
        if ring.reach > 1:
            far = meet(keys, HIGH, LOW, ring.far(here, number))
            high, max_BN = _join(high, far), jnp.maximum(max_BN, far[2])
        return (low, high), max_BN

    *low, max_BN = meet(keys, LOW, LOW, 0, causal=True)
    *high, high_max_BN = meet(keys, HIGH, HIGH, 0, causal=True)
    max_BN = jnp.maximum(max_BN, high_max_BN)
    if ring.reach:
        far = meet(keys, HIGH, LOW, ring.far(here, 0))
        high, max_BN = _join(high, far), jnp.maximum(max_BN, far[2])
    so_far = ((tuple(low), tuple(high)), max_BN)

    for jump, first, last in ring.stretches:
        keys = _send(ring, keys, jump)

        def step(carry, number):
            so_far, keys = carry
            following = _send(ring, keys, 1)  # While this step computes.
            return (visit(so_far, keys, number), following), None

        (so_far, keys), _ = jax.lax.scan(step, (so_far, keys), jnp.arange(first, last))
        so_far = visit(so_far, keys, last)

    (low, high), max_BN = so_far
    output_BSNH = jnp.concatenate([low[0], high[0]], axis=1).astype(q_BSNH.dtype)
    output_BSNH = checkpoint_name(output_BSNH, "attention_output")
    lse = checkpoint_name((low[1], high[1]), "attention_logsum")
    return (output_BSNH, max_BN[:, None]), (q_BSNH, k_BSKH, v_BSKH, ids_BS, output_BSNH, lse)


def _backward(ring, saved, cotangents):
    *arrays, lse = saved
    q, k, v, ids, out, dout = (_ends(x) for x in (*arrays, cotangents[0]))
    drops = [drop(out[end], dout[end]) for end in (LOW, HIGH)]
    here = jax.lax.axis_index(SEQUENCE_AXIS)

    def meet(keys, end, key_end, distance, *, causal=False):
        """dq [B, C, N, H] of these queries, and dk and dv [B, C, K, H] of these keys, from each other."""
        k_BCKH, v_BCKH, key_ids_BC = (x[key_end] for x in keys)
        rows = (dout[end], lse[end], drops[end], ids[end])
        shift = distance * ring.chunk
        return ring.backward(q[end], k_BCKH, v_BCKH, *rows, key_ids_BC, causal=causal, shift=shift)

    def visit(dq, keys, number):
        """dq with what this step adds, and what it adds to the gradients of the keys that are here."""
        is_low, distance = ring.near(here, number)
        dq_BCNH, *dkeys = jax.lax.cond(
            is_low, lambda: meet(keys, LOW, LOW, distance), lambda: meet(keys, HIGH, HIGH, distance)
        )
        dq = (dq[LOW] + jnp.where(is_low, dq_BCNH, 0), dq[HIGH] + jnp.where(is_low, 0, dq_BCNH))
        dkeys = [(jnp.where(is_low, x, 0), jnp.where(is_low, 0, x)) for x in dkeys]
        if ring.reach > 1:
            dq, dkeys = add_far(dq, dkeys, keys, number)
        return dq, dkeys

    def add_far(dq, dkeys, keys, number):
        dq_BCNH, *more = meet(keys, HIGH, LOW, ring.far(here, number))
        dkeys = [(low + x, high) for (low, high), x in zip(dkeys, more)]
        return (dq[LOW], dq[HIGH] + dq_BCNH), dkeys

    keys = (k, v, ids)
    own = [meet(keys, end, end, 0, causal=True) for end in (LOW, HIGH)]
    dq, *dkeys = zip(*own)
    if ring.reach:
        dq, dkeys = add_far(dq, dkeys, keys, 0)

    # The gradients of a device's keys begin there, follow them one step behind, and come home after the last.
    for jump, first, last in ring.stretches:
        keys, dkeys = _send(ring, keys, jump), _send(ring, dkeys, jump - 1)

        def follow(dq, dkeys, keys, number):
            dq, new = visit(dq, keys, number)
            return dq, jax.tree.map(jnp.add, _send(ring, dkeys, 1), new)

        def step(carry, number):
            following = _send(ring, carry[2], 1)
            return (*follow(*carry, number), following), None

        carry, _ = jax.lax.scan(step, (dq, dkeys, keys), jnp.arange(first, last))
        keys = carry[2]
        dq, dkeys = follow(*carry, last)
    if ring.stretches:
        dkeys = _send(ring, dkeys, 1)
    gradients = (jnp.concatenate(x, axis=1).astype(cotangents[0].dtype) for x in (dq, *dkeys))
    return *gradients, None


_local.defvjp(_forward, _backward)


def _join(so_far, part, *, counts=True):
    """(output, log-sum-exp) of attention to two sets of keys from those to each.

    Of the second a query may see none (log-sum-exp -1e30): its share is 0. Likewise for all where it does not count.
    """
    out_BCNH, lse_BNC = so_far
    part_BNC = jnp.where(counts, part[1], MASKED)
    joined_BNC = jnp.logaddexp(lse_BNC, part_BNC)
    share_BCN1, part_BCN1 = (
        jnp.swapaxes(jnp.exp(x - joined_BNC), 1, 2)[..., None] for x in (lse_BNC, part_BNC)
    )
    return share_BCN1 * out_BCNH + part_BCN1 * part[0], joined_BNC


def _send(ring, arrays, hop):
    """Each device's arrays to the hop-th after it."""
    n = ring.devices
    if hop % n == 0:
        return arrays
    return jax.lax.ppermute(arrays, SEQUENCE_AXIS, [(c, (c + hop) % n) for c in range(n)])


def _chunks(device) -> tuple[Callable, Callable]:
    """Forward and backward of one pair of chunks on such a device; None is that of this process."""
    if platform() != "tpu":
        return ring_chunks.chunk_forward, ring_chunks.chunk_backward
    generation = blocks.generation(None if device is None else device.device_kind)
    return tuple(
        functools.partial(chunk, generation=generation, dtype=jnp.float32)
        for chunk in (pallas_tpu.chunk_forward, pallas_tpu.chunk_backward)
    )


def _ends(x_BS):
    """The low chunk and the high one, [B, C, ...] each; None for each where there is no array."""
    return (None, None) if x_BS is None else tuple(jnp.split(x_BS, 2, axis=1))
