"""Peak matmul rates, for model FLOPs utilisation.

M rows and columns of the measured product
"""

import time

import jax
import jax.numpy as jnp

# Dense bf16 FLOP/s of one device, from the vendors' data sheets, by the start of `device_kind`.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device: jax.Device) -> float:
    """FLOP/s of one device at its best: from the table, or measured by an f32 product where it is not listed."""
    for kind, flops in PEAK_FLOPS.items():
        if device.device_kind.startswith(kind):
            return flops
    return measured_matmul_flops(device)


def measured_matmul_flops(device: jax.Device, size: int = 2048) -> float:
    """Best rate of 6 products of two [size, size] f32 matrices, in FLOP/s.

    On a host split into several forced CPU devices they share its cores: divide by their number.
    """
    x_MM = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    product = jax.jit(jnp.matmul)
    product(x_MM, x_MM).block_until_ready()
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        product(x_MM, x_MM).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return (
        2 * size**3 / best / len(jax.local_devices())
        if device.platform == "cpu"
        else 2 * size**3 / best
    )
