"""Several processes on loopback that meet as the hosts of a pod do, and those that cannot."""

import contextlib
import http.server
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from smoljax.errors import SmoljaxError
from smoljax.parallel import start

# Says where it is among how many, and what all of them say together. As on a TPU, without one: the variables that JAX sets where
# it finds no chip are taken back, and the CPU computes.
HOST = """
import os, sys
import jax, numpy as np
from jax.experimental import multihost_utils
from smoljax.errors import SmoljaxError
from smoljax.parallel import start
if "GCE_METADATA_IP" in os.environ:
    del os.environ["TPU_SKIP_MDS_QUERY"]
try:
    start.start(timeout=float(sys.argv[1]))
except SmoljaxError as error:
    print("error:", error, flush=True)
    os._exit(1)
jax.config.update("jax_platforms", "cpu")
everyone = multihost_utils.process_allgather(np.array(jax.process_index())).ravel().tolist()
print(jax.process_index(), jax.process_count(), everyone)
"""


def free_port() -> int:
    """A port of loopback that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def hosts(*settings: dict[str, str], timeout: float = 60) -> list[tuple[int, str]]:
    """Starts a process with each of these variables; (exit code, what it printed last) of each."""
    base = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, str(timeout)],
            env=base | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for variables in settings
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    return [
        (process.returncode, (out.splitlines() or [err])[-1])
        for process, (out, err) in zip(processes, outputs, strict=True)
    ]


def by_address(count: int, process: int, port: int) -> dict[str, str]:
    """The three variables for hosts that are not Cloud TPUs."""
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(process),
    }


def gke(hostnames: str, worker: int, port: int) -> dict[str, str]:
    """What GKE sets on a host of a slice."""
    return {
        "JAX_FORCE_TPU_INIT": "1",
        "JAX_COORDINATOR_PORT": str(port),
        "TPU_WORKER_HOSTNAMES": hostnames,
        "TPU_WORKER_ID": str(worker),
    }


def test_two_slices_of_two_hosts_meet_on_gke():
    """As a JobSet of two replicas starts them: processes count on from slice to slice."""
    port = free_port()
    results = hosts(
        *(
            gke("127.0.0.1,127.0.0.1", worker, port)
            | {
                "MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1:8080",
                "MEGASCALE_NUM_SLICES": "2",
                "MEGASCALE_SLICE_ID": str(of_slice),
            }
            for of_slice in range(2)
            for worker in range(2)
        )
    )
    assert results == [(0, f"{process} 4 [0, 1, 2, 3]") for process in range(4)]


@contextlib.contextmanager
def metadata(attributes: dict[str, str]):
    """A metadata server of a TPU VM; gives its address."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            known = attributes.get(
                self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
            )
            self.send_response(404 if known is None else 200)
            self.end_headers()
            self.wfile.write((known or "").encode())

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


def test_slices_of_a_queued_resource_meet_by_their_metadata():
    """Two slices of one host each; nothing is set in the environment of a TPU VM."""
    port = free_port()
    with contextlib.ExitStack() as servers:
        addresses = [
            servers.enter_context(
                metadata(
                    {
                        "agent-worker-number": "0",
                        "worker-network-endpoints": "unknown:unknown:127.0.0.1",
                        "tpu-env": f"ZONE: 'us-east5-a'\nMEGASCALE_COORDINATOR_ADDRESS: '127.0.0.1:8080'\n"
                        f"MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '{of_slice}'\n",
                    }
                )
            )
            for of_slice in range(2)
        ]
        results = hosts(
            *(
                {
                    "JAX_FORCE_TPU_INIT": "1",
                    "JAX_COORDINATOR_PORT": str(port),
                    "GCE_METADATA_IP": address,
                }
                for address in addresses
            )
        )
    assert results == [(0, "0 2 [0, 1]"), (0, "1 2 [0, 1]")]


def test_a_host_that_is_alone_waits_for_nobody():
    """One TPU host of GKE, one that nothing is known of, and a CPU process on a host of a slice."""
    port = free_port()
    pair = gke("127.0.0.1,127.0.0.1", 1, port)
    results = hosts(
        gke("localhost", 0, port), {"JAX_FORCE_TPU_INIT": "1"}, pair | {"JAX_PLATFORMS": "cpu"}
    )
    assert results == [(0, "0 1 [0]")] * 3


def test_hosts_that_miss_each_other_say_so_in_time():
    """Nobody at the address; nobody else there; a TPU host whose neighbour was not started; and one without metadata."""
    begin = time.monotonic()
    pair = gke("127.0.0.1,127.0.0.1", 1, free_port())
    nobody, lonely, tpu, unknown = hosts(
        by_address(2, 1, free_port()),
        by_address(2, 0, free_port()),
        pair
        | {
            "MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1",
            "MEGASCALE_NUM_SLICES": "1",
            "MEGASCALE_SLICE_ID": "0",
        },
        pair | {"GCE_METADATA_IP": f"127.0.0.1:{free_port()}"},
        timeout=5,
    )
    assert time.monotonic() - begin < 60
    for process, (code, line) in ((1, nobody), (0, lonely)):
        assert code == 1
        assert line.startswith(f"error: process {process} of 2: not all met at 127.0.0.1:")
    assert tpu[0] == 1
    assert unknown[0] == 1
    assert unknown[1].startswith("error: the metadata server, which names the hosts")
    assert tpu[1].startswith("error: not all hosts of these TPUs met within 5 seconds: start the")


def test_hosts_that_were_told_different_numbers_say_so():
    port = free_port()
    results = hosts(by_address(2, 0, port), by_address(3, 1, port))
    for code, line in results:
        assert code == 1
        assert line.startswith("error: JAX_NUM_PROCESSES is not the same everywhere")
        assert line.endswith("were told [2, 3]")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.2"}, "JAX_COORDINATOR_ADDRESS is '10.0.0.2': give"),
        ({"JAX_NUM_PROCESSES": ""}, "JAX_NUM_PROCESSES is not set: with JAX_COORDINATOR_ADDRESS"),
        ({"JAX_PROCESS_ID": "first"}, "JAX_PROCESS_ID is first: "),
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID is 2 and JAX_NUM_PROCESSES 2: count"),
        ({"JAX_NUM_PROCESSES": "0"}, "JAX_PROCESS_ID is 0 and JAX_NUM_PROCESSES 0"),
    ],
)
def test_wrong_variables_are_named(monkeypatch, changed, message):
    for name, value in (by_address(2, 0, 1) | changed).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SmoljaxError, match=message):
        start.start()
