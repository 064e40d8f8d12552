"""Takes a model out of smoljax, or brings one in: `python -m smoljax.convert --config=configs/quickstart.py --workdir=runs/quickstart --to=huggingface --output=exported`.

--to=huggingface   a folder that transformers loads, with the run's tokenizer; --dtype=float32, bfloat16, float16
--to=gguf          a file for llama.cpp, with the run's tokenizer; --dtype=f32, f16, q8_0, q4_0
--to=int8          a folder for smoljax.interop.quantize, rounded weights alone; also int4 and w8a8
--to=orbax         --from=HF_FOLDER as the checkpoint of step 0 of WORKDIR: train and generate go on from it
--to=config        prints config.model for --from=HF_FOLDER

What is converted is the run's newest checkpoint, or the SmolLM3, Llama or Qwen3 folder of --from=HF_FOLDER. An output
that exists is not touched.
"""

import dataclasses
import json
import sys
from pathlib import Path

from smoljax import command_line
from smoljax.errors import SmoljaxError

OPTIONS = {
    "to": "huggingface, gguf, int8, int4, w8a8, orbax or config",
    "output": "folder or file to write; it must not exist",
    "from": "Hugging Face folder to convert instead of the run's newest checkpoint",
    "dtype": "of the tensors written; float32 (f32) by default",
}
DTYPES = {
    "huggingface": ("float32", "bfloat16", "float16"),
    "gguf": ("f32", "f16", "q8_0", "q4_0"),
    "int8": (),
    "int4": (),
    "w8a8": (),
    "orbax": (),
    "config": (),
}


def main(config: dict, workdir: Path, **options: str) -> int:
    """Converts one model."""
    target, folder = options["to"], options["from"]
    output, dtype = options["output"], options["dtype"]
    _check_options(target, folder, output, dtype)
    from smoljax.parallel.start import start

    start()
    if target == "config":
        print(model_section(Path(folder)))
    elif target == "orbax":
        _import(config, workdir, Path(folder))
    else:
        source = _read_folder(Path(folder)) if folder else _read_run(config, workdir)
        try:
            _write(source, target, Path(output), dtype)
        except OSError as error:
            raise SmoljaxError(f"--output={output} cannot be written: {error}") from error
    return 0


@dataclasses.dataclass(frozen=True)
class _Source:
    """A model in memory: its config, parameters, tokenizer and chat template (either may be None), and a name."""

    config: object
    params: dict
    tokenizer: object | None
    chat_template: str | None
    name: str


def _check_options(target: str, folder: str, output: str, dtype: str) -> None:
    if target not in DTYPES:
        raise SmoljaxError(f"--to={target}: set it to one of {', '.join(DTYPES)}")
    if dtype and dtype not in DTYPES[target]:
        allowed = ", ".join(DTYPES[target]) or "left out"
        raise SmoljaxError(f"--dtype={dtype}: with --to={target} it is {allowed}")
    if target in ("orbax", "config"):
        if not folder:
            raise SmoljaxError(f"--to={target} needs --from=HF_FOLDER, the folder that is read")
        if output:
            raise SmoljaxError(
                f"--to={target} takes no --output: a checkpoint goes to --workdir, a config to the screen"
            )
    elif not output:
        raise SmoljaxError(f"--to={target} needs --output=PATH")
    elif Path(output).exists():
        raise SmoljaxError(f"--output={output} exists: name another, or remove it first")


def _read_run(config: dict, workdir: Path) -> _Source:
    from smoljax.training import Run

    run = Run(config, workdir)
    step, params = run.restore_params()
    _say(f"step {step:,} of {workdir}: {run.model.num_params:,} parameters")
    name = config.get("name", workdir.name)
    return _Source(run.model, params, run.tokenizer, None, name)


def _read_folder(folder: Path) -> _Source:
    from smoljax.interop import huggingface
    from smoljax.tokens import tokenizer as tokenizers

    model, params = huggingface.load(folder)
    _say(f"{folder}: {model.num_params:,} parameters")
    tokenizer = None
    if any((folder / name).is_file() for name in (tokenizers.JSON_FILE, tokenizers.MODEL_FILE)):
        tokenizer = tokenizers.load(folder)
    else:
        _say(f"{folder} has no {tokenizers.JSON_FILE}: there is no tokenizer to write")
    return _Source(model, params, tokenizer, _template_of(folder), folder.resolve().name)


def _template_of(folder: Path) -> str | None:
    """The chat template that a Hugging Face folder has."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    template = None
    if settings.is_file():
        template = json.loads(settings.read_text(encoding="utf-8")).get("chat_template")
    return template if isinstance(template, str) else None


def _write(source: _Source, target: str, output: Path, dtype: str) -> None:
    dtype = dtype or next(iter(DTYPES[target]), target)
    if target == "huggingface":
        from smoljax.interop import chat_template, huggingface

        template = _template(source, chat_template.TEMPLATE)
        huggingface.save(
            output,
            source.config,
            source.params,
            tokenizer=source.tokenizer,
            dtype=dtype,
            chat_template=template,
        )
    elif target == "gguf":
        from smoljax.interop import chat_template, gguf

        template = _template(source, chat_template.TEMPLATE_FOR_SERVING)
        gguf.save(
            output,
            source.config,
            source.params,
            source.tokenizer,
            dtype=dtype,
            chat_template=template,
            name=source.name,
        )
    else:
        from smoljax.interop import quantize

        template = None
        quantized = quantize.quantize(source.config, source.params, target)
        quantize.save(output, source.config, quantized)
    files = [output] if output.is_file() else sorted(output.iterdir())
    size = sum(file.stat().st_size for file in files)
    chat = ", with a chat template" if template else ""
    _say(f"wrote {output} ({dtype}, {size / 1e6:,.1f} MB{chat})")


def _template(source: _Source, ours: str) -> str | None:
    """The folder's own chat template, or smoljax's where the tokenizer has the tokens of its turns."""
    from smoljax.interop.chat_template import TURN_TOKENS

    if source.tokenizer is None:
        return None
    has_turns = all(source.tokenizer.special_id(name) is not None for name in TURN_TOKENS)
    return source.chat_template or (ours if has_turns else None)


def _import(config: dict, workdir: Path, folder: Path) -> None:
    """Writes the checkpoint of step 0: the folder's parameters and a fresh optimizer state."""
    import jax
    import numpy as np

    from smoljax.interop import huggingface
    from smoljax.training import Run
    from smoljax.training.state import TrainState

    run = Run(config, workdir)
    _check_model(run.model, huggingface.load_config(folder), folder)
    checkpoints = run.checkpoints()
    if (step := checkpoints.latest_step()) is not None:
        raise SmoljaxError(f"--workdir={workdir} has a checkpoint of step {step}: name a new one")
    _, params = huggingface.load(folder, shardings=run.params_shardings)
    shardings = run.shardings
    state = TrainState(
        step=jax.device_put(np.int32(0), shardings.step),
        params=params,
        opt_state=jax.jit(run.optimizer.init, out_shardings=shardings.opt_state)(params),
    )
    checkpoints.save(0, state)
    checkpoints.wait()
    checkpoints.close()
    _say(
        f"{folder} is step 0 of {workdir}: {run.model.num_params:,} parameters, fresh optimizer state. The data must be "
        f"tokenized with the model's own tokenizer: --config.tokenizer.directory={folder}"
    )


def _check_model(wanted: object, found: object, folder: Path) -> None:
    """Refuses a folder whose model is not the one of the config; how it is run may differ."""
    from smoljax.model.config import EXECUTION

    layers = range(wanted.num_layers)
    same_rope = wanted.num_layers == found.num_layers and all(
        wanted.uses_rope(layer) == found.uses_rope(layer) for layer in layers
    )
    skipped = set(EXECUTION) | ({"no_rope_layer_interval", "nope_layers"} if same_rope else set())
    different = [
        f"config.model.{field.name} is {getattr(wanted, field.name)!r}, set it to {_literal(getattr(found, field.name))}"
        for field in dataclasses.fields(wanted)
        if field.name not in skipped and getattr(wanted, field.name) != getattr(found, field.name)
    ]
    if different:
        raise SmoljaxError(
            f"{folder} holds another model than the config: {'; '.join(different)}. "
            f"--to=config --from={folder} prints the whole section"
        )


def model_section(folder: Path) -> str:
    """The model section of a config, as Python, for the model of a Hugging Face folder.

    Raises:
      SmoljaxError: see smoljax.interop.huggingface.load_config.
    """
    from smoljax.interop import huggingface

    model = huggingface.load_config(folder)
    lines = [
        f"        {field.name}={_literal(value)},"
        for field in dataclasses.fields(model)
        if (value := getattr(model, field.name)) != field.default
    ]
    return "\n".join(["config.model = ConfigDict(", "    dict(", *lines, "    )", ")"])


def _literal(value: object) -> str:
    """A field of ModelConfig as a config writes it."""
    from smoljax.model import rope

    return repr(rope.as_mapping(value) if dataclasses.is_dataclass(value) else value)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    command_line.run(main, usage=__doc__, options=OPTIONS)
