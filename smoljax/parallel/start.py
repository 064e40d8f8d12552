"""What happens before the first array: several hosts find each other, and compiled programs are kept."""

import os
from pathlib import Path

import jax


def start() -> None:
    """Connects the hosts of a pod and turns on the compile cache.

    Several hosts: on a TPU pod JAX finds them by itself; elsewhere set JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID. The compile cache is JAX_COMPILATION_CACHE_DIR, by default
    ~/.cache/smoljax/compiled.
    """
    if os.environ.get("JAX_COORDINATOR_ADDRESS") or len(_tpu_hosts()) > 1:
        processes = os.environ.get("JAX_NUM_PROCESSES")
        process = os.environ.get("JAX_PROCESS_ID")
        jax.distributed.initialize(
            num_processes=int(processes) if processes else None,
            process_id=int(process) if process else None,
        )
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update(
            "jax_compilation_cache_dir", str(Path.home() / ".cache" / "smoljax" / "compiled")
        )
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _tpu_hosts() -> list[str]:
    return [host for host in os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
