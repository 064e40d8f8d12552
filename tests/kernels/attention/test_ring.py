"""Ring attention: which pairs meet, refusals, and all that needs several devices (on_eight_devices.py) in a process that has them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from smoljax.errors import SmoljaxError
from smoljax.kernels import attention
from smoljax.kernels.attention import ring_chunks
from smoljax.kernels.attention.ring import Ring
from tests.kernels.attention.test_attention import arrays


@pytest.mark.parametrize("devices", [2, 3, 4, 8])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 4, 5, 8, 9, 17])
def test_every_pair_of_chunks_that_matters_meets_once(devices, window):
    """By walking through the steps: what each device computes, and what it has not to."""
    chunk, n = 4, devices
    ring = Ring(n, chunk, window, None, None)

    def in_reach(distance):
        return distance >= 0 and (window is None or (distance - 1) * chunk + 1 < window)

    expected = {(q, k) for q in range(2 * n) for k in range(q) if in_reach(q - k)}
    met = []
    for here in range(n):
        ends = (here, 2 * n - 1 - here)
        if ring.reach:
            met.append((ends[1], ends[0], ring.far(here, 0)))
        place = 0
        for jump, first, last in ring.stretches:
            assert (place + jump) % n == first
            for step in range(first, last + 1):
                there = (here - step) % n
                keys = (there, 2 * n - 1 - there)
                is_low, distance = ring.near(here, step)
                end = 0 if is_low else 1
                met.append((ends[end], keys[end], int(distance)))
                if ring.reach > 1:
                    met.append((ends[1], keys[0], ring.far(here, step)))
            place = last
        assert place in (0, n - 1)  # From there gradients have one hop home.
    assert all(q - k == distance for q, k, distance in met)
    places = [(q, k) for q, k, _ in met]
    assert len(set(places)) == len(places)
    assert expected <= set(places)
    if window is None:
        assert expected == set(places)


def test_short_windows_leave_steps_out():
    def stretches(window):
        return Ring(8, 4, window, None, None).stretches

    assert stretches(None) == stretches(17) == ((1, 1, 7),)
    assert stretches(5) == stretches(2) == ((1, 1, 1), (6, 7, 7))
    assert stretches(9) == stretches(6) == ((1, 1, 2), (4, 6, 7))
    assert stretches(1) == ()


def test_a_chunk_is_done_in_blocks_that_bound_the_scores(monkeypatch):
    q, k, v, dout = arrays(0, 1, 12, 4, 2, 8)
    ids = np.array([[1] * 5 + [2] * 7], np.int32)
    options = dict(causal=True, window=5, shift=2, scale=0.3)

    def run():
        out, lse, largest = ring_chunks.chunk_forward(q, k, v, ids, ids, **options)
        lse = np.where(np.isfinite(lse), lse, 0)
        drop = np.swapaxes((dout * out).sum(-1), 1, 2)
        return (
            out,
            lse,
            largest,
            *ring_chunks.chunk_backward(q, k, v, dout, lse, drop, ids, ids, **options),
        )

    whole = run()
    monkeypatch.setattr(ring_chunks, "_SCORES", 5 * 12)
    assert ring_chunks._block_size(12, 12) == 4
    for got, want in zip(run(), whole, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_without_a_mesh_it_is_refused_by_name():
    q, k, v, _ = arrays(0, 1, 8, 2, 1, 8)
    with pytest.raises(SmoljaxError, match="'ring' cannot be used here: no mesh axis 'context'"):
        attention(q, k, v, implementation="ring")
    with pytest.raises(SmoljaxError, match="zigzag=True"):
        attention(q, k, v, zigzag=True)


def test_on_eight_devices():
    """130 seconds of one core, most of them to compile."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", Path(__file__).parent / "on_eight_devices.py"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-6000:]
