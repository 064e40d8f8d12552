"""What importing curation loads."""

import subprocess
import sys


def test_curation_loads_no_training_library():
    script = (
        "import sys\nfrom smoljax.curation import curate, filters\n"
        "heavy = {'jax', 'flax', 'tensorflow', 'tensorflow_datasets', 'spacy', 'trafilatura', 'torch'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_missing_extra_is_named():
    script = "import sys\nsys.modules['resiliparse'] = None\nfrom smoljax.curation import filters"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert 'pip install "smoljax[data]"' in done.stderr


def test_presets_load_without_the_extra():
    script = (
        "import sys\nsys.modules['pyarrow'] = None\nfrom smoljax.curation.presets import defaults"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
