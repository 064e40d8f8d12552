"""What every verb shares: --config and --workdir, one clear line when something is wrong, the exit code."""

import difflib
import gc
import multiprocessing
import os
import runpy
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from smoljax import configuration
from smoljax.configuration import plain
from smoljax.errors import SmoljaxError, require

# Exit code of a verb that was stopped on request, after saving what it had.
STOPPED = 42

# Settings of glibc's malloc: huge pages. A compiled training step on a CPU takes its buffers from malloc and returns them every time;
# with pages of 4 kB the page faults are a sixth of the step (benchmarks/train_cpu.py).
MALLOC = "glibc.malloc.hugetlb=1"

# New objects that Python counts before it looks for cycles (700 by itself). Importing JAX and tracing a step make some hundred thousand
# objects that stay, and looking through them again and again takes part of a start (benchmarks/first_step.py, with two other changes).
OBJECTS_BETWEEN_COLLECTIONS = 100_000

HELP = """
Flags:
  --config=FILE           recipe to run, such as configs/quickstart.py (FILE:VARIANT passes VARIANT to its get_config)
  --config.SECTION.FIELD=VALUE   sets one field of the recipe; may be repeated
  --workdir=DIR           folder of the run, local or mounted
"""


def run(
    main: Callable[..., int | None],
    *,
    usage: str,
    options: Mapping[str, str] | None = None,
    default_workdir: str | None = None,
) -> None:
    """Parses the command line, calls `main(config, workdir, **options)` and exits.

    Exit codes: what `main` returns (None counts as 0), or 1 after one line on stderr.

    Args:
      main: the verb; it gets the config as plain nested dicts with tuples, the workdir, and the
        verb's own options as strings ("" when not given).
      usage: what `--help` says.
      options: the verb's own flags, name to help text.
      default_workdir: --workdir where it is not given; None makes it required.
    """
    _set_malloc()
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
    options = options or {}
    if {"--help", "-h", "-help", "--helpfull"} & set(sys.argv[1:]):
        own = "".join(f"  --{name}=...  {text}\n" for name, text in options.items())
        print(usage.rstrip() + "\n" + HELP.rstrip() + "\n" + own, end="")
        sys.exit(0)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    threading.excepthook = _say_in_one_line
    try:
        config, workdir, values = _parse(sys.argv, options, default_workdir)
        code = main(config, workdir, **values)
    except SmoljaxError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on from what is done")
    sys.stdout.flush()
    sys.exit(code or 0)


def _set_malloc() -> None:
    """Starts this process anew, under the same id, with MALLOC: glibc reads its settings only when a process starts."""
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = MALLOC
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _fail(message: str) -> NoReturn:
    """Prints the one line that explains a failure, and ends the process at once.

    Without the interpreter's own ending: native threads may still be at work (the other writes of a checkpoint that met a full
    disk), and under them it crashes or hangs now and then, or prints their complaints after the line that explains.
    """
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    os._exit(1)


def _say_in_one_line(failure: threading.ExceptHookArgs) -> None:
    """What failed in a background thread; the main thread meets it too, where it waits for the result."""
    first = (str(failure.exc_value).splitlines() or [""])[0]
    print(f"in the background: {failure.exc_type.__name__}: {first}", file=sys.stderr, flush=True)


def load_config(path: str) -> dict:
    """The config that `get_config()` of a Python file returns, as plain nested dicts."""
    return plain(_open_config(path))


def _open_config(path: str) -> Mapping:
    """What `get_config()` of a Python file returns."""
    path, _, variant = path.partition(":")
    if not Path(path).is_file():
        raise SmoljaxError(
            f"--config={path}: there is no such file; the recipes are in configs/ (configs/quickstart.py)"
        )
    try:
        get_config = runpy.run_path(path)["get_config"]
    except KeyError as error:
        raise SmoljaxError(
            f"--config={path}: the file has no get_config() that returns a ConfigDict"
        ) from error
    except Exception as error:
        raise SmoljaxError(f"--config={path}: {type(error).__name__}: {error}") from error
    return get_config(variant) if variant else get_config()


def _parse(
    arguments: list[str], options: Mapping[str, str], default_workdir: str | None
) -> tuple[dict, Path, dict[str, str]]:
    flags = require("absl.flags", extra="train")
    config_flags = require("ml_collections.config_flags", extra="train")
    arguments, path = _take_flag(arguments, "config")
    config = _with_named_fields(_open_config(path), arguments)
    config_flags.DEFINE_config_dict("config", config, sys_argv=arguments)
    workdir = flags.DEFINE_string("workdir", default_workdir, "")
    values = {name: flags.DEFINE_string(name, "", text) for name, text in options.items()}
    try:
        rest = flags.FLAGS(arguments)
    except flags.Error as error:
        raise SmoljaxError(f"{error} (see --help)") from error
    except (TypeError, ValueError) as error:
        raise SmoljaxError(f"a --config field has the wrong type: {error}") from error
    if len(rest) > 1:
        raise SmoljaxError(
            f"{rest[1]!r} is not a flag; fields are set by --config.section.field=value"
        )
    if workdir.value is None:
        raise SmoljaxError("--workdir is missing (see --help)")
    if "://" in workdir.value:
        raise SmoljaxError(
            f"--workdir={workdir.value} is a URL; give a local folder or a mounted bucket. Checkpoints alone can go to an "
            "object store: --config.training.checkpoint_directory=gs://BUCKET/run"
        )
    return (
        plain(config),
        Path(workdir.value),
        {name: holder.value for name, holder in values.items()},
    )


def _take_flag(arguments: list[str], name: str) -> tuple[list[str], str]:
    """The arguments without --name=VALUE (or --name VALUE), and the last such value."""
    rest, value, i = [], None, 0
    while i < len(arguments):
        flag, equals, given = arguments[i].partition("=")
        if i and flag in (f"--{name}", f"-{name}"):
            if not equals:
                i += 1
                given = arguments[i] if i < len(arguments) else ""
            value = given
        else:
            rest.append(arguments[i])
        i += 1
    if value is None:
        raise SmoljaxError(f"--{name} is missing (see --help)")
    return rest, value


def _with_named_fields(config: Mapping, arguments: list[str]) -> object:
    """The recipe as a ConfigDict, with the defaults of fields that flags name and that it leaves out.

    Raises:
      SmoljaxError: a flag names a field that neither the recipe nor the section's class has; it names the nearest.
    """
    config_dict = require("ml_collections.config_dict", extra="train")
    config = config_dict.ConfigDict(config)
    for argument in arguments[1:]:
        name = argument.partition("=")[0]
        if not name.startswith("--config."):
            continue
        node, done = config, "config"
        for key in name.removeprefix("--config.").split("."):
            if isinstance(node, tuple | list):
                break  # An index into a tuple; ml_collections checks it.
            fields = node if isinstance(node, config_dict.ConfigDict) else {}
            if key not in fields:
                defaults = configuration.defaults(done.removeprefix("config."))
                if key not in defaults:
                    known = sorted({*fields, *defaults})
                    near = difflib.get_close_matches(key, known, n=1)
                    hint = (
                        f"did you mean --{done}.{near[0]}?"
                        if near
                        else f"it has {', '.join(known)}"
                    )
                    raise SmoljaxError(f"{name}: {done} has no field {key!r}; {hint}")
                default, kind = defaults[key]
                with config.unlocked():
                    node[key] = config_dict.placeholder(kind) if default is None else default
            node, done = node[key], f"{done}.{key}"
    return config
