"""The platform that a program is made for."""

import jax


def platform() -> str:
    """ "cpu", "gpu" or "tpu": that of the active mesh, which need not be this host's, or this process's own."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None or device.platform is None:
        return jax.default_backend()
    return device.platform


def one_cpu() -> bool:
    """Whether the program is made for a single CPU device."""
    return platform() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1
