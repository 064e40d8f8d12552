import subprocess
import sys

from smoljax import optim

HEAVY = ("flax", "grain", "tensorflow", "orbax", "torch")


def test_importing_it_loads_only_jax_and_optax():
    code = f"""
import sys
import smoljax.optim
loaded = [name for name in {HEAVY} if name in sys.modules]
ours = [name for name in sys.modules if name.startswith("smoljax.") and not name.startswith("smoljax.optim")]
print(loaded, sorted(ours))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] ['smoljax.errors']"


def test_every_public_name_is_there_and_documented():
    for name in optim.__all__:
        value = getattr(optim, name)
        assert not callable(value) or value.__doc__, name
    assert sorted(optim.__all__, key=lambda name: (not name.isupper(), name)) == optim.__all__
