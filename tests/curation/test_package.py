"""What importing curation loads."""

import subprocess
import sys


def test_curation_loads_no_training_library():
    script = (
        "import sys, smoljax.curation, smoljax.curation.pipeline\n"
        "heavy = {'jax', 'flax', 'tensorflow', 'tensorflow_datasets', 'spacy', 'trafilatura', 'torch'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_missing_extra_is_named():
    script = "import sys\nsys.modules['resiliparse'] = None\nimport smoljax.curation"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert 'pip install "smoljax[data]"' in done.stderr
