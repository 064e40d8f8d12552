"""What happens before the first array: several hosts find each other, and compiled programs are kept."""

import os
import threading
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from smoljax.errors import SmoljaxError


def start(*, timeout: float = 300) -> None:
    """Connects the hosts of a run and turns on the compile cache.

    Several hosts, each with the same command: on Cloud TPUs (queued resources or GKE, one slice or several) JAX finds them by
    what the machines say of themselves. Elsewhere set JAX_COORDINATOR_ADDRESS (process 0's host:port), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID. The compile cache is JAX_COMPILATION_CACHE_DIR, by default ~/.cache/smoljax/compiled.

    Args:
      timeout: seconds in which all hosts have to meet.

    Raises:
      SmoljaxError: the variables are incomplete or wrong, not all hosts met in time, they were not told the same number, or
        there is nobody to ask.
        A process that missed the others has to end: JAX aborts it later.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address:
        _meet_at(address, timeout)
    elif "tpu" in (jax.config.jax_platforms or "") and not _only_tpu_host():
        _meet_on_tpus(timeout)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update(
            "jax_compilation_cache_dir", str(Path.home() / ".cache" / "smoljax" / "compiled")
        )
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _meet_at(address: str, timeout: float) -> None:
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()):
        raise SmoljaxError(
            f"JAX_COORDINATOR_ADDRESS is {address!r}: give process 0's host and a free port there, as in 10.0.0.2:8482"
        )
    processes, process = _number("JAX_NUM_PROCESSES"), _number("JAX_PROCESS_ID")
    if process >= processes:
        raise SmoljaxError(
            f"JAX_PROCESS_ID is {process} and JAX_NUM_PROCESSES {processes}: count the processes from 0 to {processes - 1}"
        )
    _initialize(
        timeout,
        f"process {process} of {processes}: not all met at {address} within {timeout:g} seconds. Each of 0 to {processes - 1} has "
        f"to be started once, with JAX_NUM_PROCESSES={processes}, and reach that address; the logs of the others say more",
        coordinator_address=address,
        num_processes=processes,
        process_id=process,
    )
    told = multihost_utils.process_allgather(np.array(processes)).ravel().tolist()
    if set(told) != {processes}:
        raise SmoljaxError(
            f"JAX_NUM_PROCESSES is not the same everywhere: the processes from 0 on were told {told}"
        )


def _meet_on_tpus(timeout: float) -> None:
    try:
        _initialize(
            timeout,
            f"not all hosts of these TPUs met within {timeout:g} seconds: start the same command on every host of every slice "
            "(tpu_scripts/launch.sh does); the logs of the others say more",
        )
    except ValueError as error:
        if "coordinator_address" not in str(error):
            raise
        # Nothing here speaks of other hosts (a TPU of a notebook service): this one is alone.
    except OSError as error:
        raise SmoljaxError(
            "the metadata server, which names the hosts of these TPUs, does not answer: set JAX_COORDINATOR_ADDRESS, "
            f"JAX_NUM_PROCESSES and JAX_PROCESS_ID on every host, or try again ({type(error).__name__})"
        ) from error


def _initialize(timeout: float, missing: str, **known) -> None:
    """jax.distributed.initialize, or `missing` as an error after so long. JAX would abort the process with a stack trace."""
    failures = []

    def initialize():
        try:
            jax.distributed.initialize(initialization_timeout=int(2 * timeout) + 60, **known)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=initialize, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise SmoljaxError(missing)
    if failures:
        raise failures[0]


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise SmoljaxError(
            f"{name} is {text or 'not set'}: with JAX_COORDINATOR_ADDRESS every process needs JAX_NUM_PROCESSES (how many "
            "there are) and JAX_PROCESS_ID (which one it is, from 0)"
        )
    return int(text)


def _only_tpu_host() -> bool:
    """Whether GKE's variables say that there is one host; without them JAX asks the metadata server."""
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    return bool(hosts) and "," not in hosts and os.environ.get("MEGASCALE_NUM_SLICES", "1") == "1"
