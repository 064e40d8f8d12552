"""What must be set before jax starts, so that this computer compiles for another."""

import os

from smoljax.planning.topologies import Topology


def environment(topology: Topology) -> dict[str, str]:
    """Environment variables to set before jax is imported: this host's CPU, and libtpu as a compiler that looks for no TPU."""
    variables = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    if topology.chip.platform == "tpu":
        return variables | {
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": topology.compiler_name.replace(":", "-"),
            "TPU_WORKER_HOSTNAMES": "localhost",
        }
    count = f"--xla_force_host_platform_device_count={topology.num_chips}"
    return variables | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()}
