"""Every config, flattened to one key per line: a changed hyper-parameter shows as a diff in review.

`make golden` (python -m tests.golden.flatten) rewrites the files after a deliberate change.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from smoljax.command_line import load_config

HERE = Path(__file__).parent
CONFIGS = sorted((HERE.parent.parent / "configs").rglob("*.py"))


def golden_path(config: Path) -> Path:
    """Where the flattened text of a config is kept."""
    relative = config.relative_to(HERE.parent.parent / "configs").with_suffix(".txt")
    return HERE / relative


def flatten(config: Mapping, prefix: str = "") -> Iterator[str]:
    """ "section.field = value" lines, in the config's own order."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key} = {value!r}"


def flattened_text(config: Path) -> str:
    """The golden text of a config file."""
    return "\n".join(flatten(load_config(str(config)))) + "\n"


if __name__ == "__main__":
    for config in CONFIGS:
        golden_path(config).parent.mkdir(parents=True, exist_ok=True)
        golden_path(config).write_text(flattened_text(config), encoding="utf-8")
