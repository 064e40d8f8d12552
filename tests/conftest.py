"""What all tests share: the CPU, a compile cache, and no silent rank promotion."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# A suite that a shell starts in the background has SIGINT ignored, and the processes that tests stop would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "compiled")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def pytest_collection_modifyitems(items):
    """Tests in tests/gpu run only where a GPU is."""
    gpu_tests = [item for item in items if "gpu" in Path(item.fspath).parts]
    if not gpu_tests:
        return
    import jax

    if jax.default_backend() != "gpu":
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="no GPU here"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A workdir with the curated documents, tokenizer and shards of tests/tiny_config.py, made once by the real verb."""
    workdir = tmp_path_factory.mktemp("corpus")
    arguments = ["--config=tests/tiny_config.py", f"--workdir={workdir}"]
    result = subprocess.run(
        [sys.executable, "-m", "smoljax.curate", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return workdir


def with_small_files(arguments: list[str]) -> list[str]:
    """The command line that runs `python *arguments` where no file may grow beyond 64 KiB, as on a disk that fills up."""
    program = (
        "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16)); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    return [sys.executable, "-c", program, *arguments]
