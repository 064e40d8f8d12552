"""Lets a trained model talk: `python -m smoljax.generate --config=configs/quickstart.py --workdir=runs/quickstart --prompt="def get_"`.

Prints the text as it is generated. Settings are config.generation: max_new_tokens, temperature, top_k, top_p, min_p,
repetition_penalty, stop, cache_dtype, seed (such as --config.generation.temperature=0). It runs on the run's mesh.
With --samples the prompts of config.generation.prompts are continued and written to WORKDIR/samples.json.
"""

import sys
from pathlib import Path

from smoljax import command_line

OPTIONS = {
    "prompt": "text to continue",
    "samples": "yes: continue config.generation.prompts and write WORKDIR/samples.json",
}


def main(config: dict, workdir: Path, *, prompt: str, samples: str) -> int:
    """Generates from the newest checkpoint."""
    from smoljax import configuration, files
    from smoljax.errors import SmoljaxError
    from smoljax.parallel.start import start

    if bool(prompt) == bool(samples):
        raise SmoljaxError('give one of --prompt="..." and --samples=yes')
    start()
    from smoljax import parallel
    from smoljax.evaluation.sampling import GenerationConfig, Sampler
    from smoljax.training import Run

    run = Run(config, workdir)
    settings = configuration.build(GenerationConfig, config.get("generation", {}), "generation")
    step, params = run.restore_params()
    sampler = Sampler(run.model, params, run.tokenizer, settings)
    with parallel.active(run.mesh):
        if prompt:
            _write_as_it_comes(prompt, sampler)
            return 0
        texts = sampler.continue_all(settings.prompts)
    rows = [
        {"prompt": given, "text": text, "temperature": settings.temperature}
        for given, text in zip(settings.prompts, texts)
    ]
    files.atomic_write_json(workdir / "samples.json", {"step": step, "samples": rows})
    for row in rows:
        print(f"--- {row['prompt']!r}\n{row['prompt']}{row['text']}")
    return 0


def _write_as_it_comes(prompt: str, sampler) -> None:
    sys.stdout.write(prompt)
    for piece in sampler.stream(prompt):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


if __name__ == "__main__":
    command_line.run(main, usage=__doc__, options=OPTIONS)
