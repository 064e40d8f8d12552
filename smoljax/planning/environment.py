"""What must be set before this computer can compile for another."""

import os

import jax

from smoljax.planning.topologies import Topology


def compile_here(topology: Topology) -> None:
    """Makes this host's CPU run what runs, and libtpu a compiler that looks for no TPU. To be called before jax touches a device.

    jax itself may be imported already (a flag can need a class that imports it), so its own settings are not made by environment.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    if topology.chip.platform == "tpu":
        os.environ |= {
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": topology.compiler_name.replace(":", "-"),
            "TPU_WORKER_HOSTNAMES": "localhost",
        }
    else:
        count = f"--xla_force_host_platform_device_count={topology.num_chips}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()
