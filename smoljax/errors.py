"""The one error that a person is meant to read: it names the field or file, the value, and the next step."""

import importlib
from types import ModuleType


class SmoljaxError(ValueError):
    """Something in the input, the configuration or the machine is wrong, and the message says how to mend it."""


def require(module: str, *, extra: str) -> ModuleType:
    """Imports `module`, or raises a SmoljaxError that names the extra to install.

    Args:
      module: dotted name of the module.
      extra: the extra of setup.py that brings it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise  # The module is there; something that it needs is broken, and that is another story.
        raise SmoljaxError(
            f"this step needs the Python module {module!r}, which is not installed: "
            f'run `pip install "smoljax[{extra}]"`'
        ) from error
