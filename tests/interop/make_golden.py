"""Writes golden/*.npz: what transformers computes on tiny models of each family, on a CPU with eager attention.

    pip install "smoljax[test-hf]"
    python tests/interop/make_golden.py [FOLDER]

Weights are int8 multiples of 1/64, so that the files stay small, both sides start from the same bits, and bfloat16
holds them exactly. Every file says, next to the results, what config.json transformers writes for the model today
("config_v5") and what its version 4 wrote ("config_v4"); both are seen here to load as the same model.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

ROWS, LENGTH, BOUNDARY = 2, 24, 10  # The packed case is two documents of 10 and 14 tokens per row.
PROMPT_LENGTHS, NEW_TOKENS = (5, 11), 16

_FAMILIES = {
    "smollm3": {"num_hidden_layers": 4, "rms_norm_eps": 1e-6},
    "llama": {"num_hidden_layers": 2, "rms_norm_eps": 1e-5},
    # Width of a head 32, where 64 / 4 would be 16.
    "qwen3": {"num_hidden_layers": 2, "rms_norm_eps": 1e-6, "head_dim": 32},
}


def _rope(theta: float, **scaling) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **scaling}}


_YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
_YARN_EXPLICIT = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 2.0,
    "beta_slow": 0.4,
    "attention_factor": 1.3,
    "truncate": False,
}
# Of the 8 wavelengths with theta 10,000, one is below 64 / 4, two lie between, five are above 64 / 1.
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 2.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_WINDOW = {"use_sliding_window": True, "sliding_window": 8}

# (family, variant): the fields of its config that are not the family's.
VARIANTS = {
    ("smollm3", "tied"): {"no_rope_layer_interval": 4, **_rope(50_000.0)},
    ("smollm3", "untied"): {
        "tie_word_embeddings": False,
        "no_rope_layer_interval": 2,
        **_rope(10_000.0),
    },
    ("smollm3", "interval_3"): {"no_rope_layer_interval": 3, **_rope(50_000.0)},
    ("smollm3", "all_rope"): {"no_rope_layers": [1, 1, 1, 1], **_rope(50_000.0)},
    ("smollm3", "irregular"): {"no_rope_layers": [0, 1, 1, 0], **_rope(50_000.0)},
    ("smollm3", "yarn"): _rope(50_000.0, **_YARN),
    ("smollm3", "window"): {"no_rope_layer_interval": 2, **_WINDOW, **_rope(50_000.0)},
    ("llama", "tied"): {"tie_word_embeddings": True, **_rope(10_000.0)},
    ("llama", "untied"): _rope(500_000.0),
    ("llama", "llama3"): {"tie_word_embeddings": True, **_rope(10_000.0, **_LLAMA3)},
    ("qwen3", "tied"): {"tie_word_embeddings": True, **_rope(1_000_000.0)},
    ("qwen3", "untied"): _rope(10_000.0),
    ("qwen3", "yarn"): {"tie_word_embeddings": True, **_rope(10_000.0, **_YARN_EXPLICIT)},
    ("qwen3", "window"): {
        "tie_word_embeddings": True,
        "max_window_layers": 1,
        **_WINDOW,
        **_rope(10_000.0),
    },
}


def build(family: str, variant: dict, *, seed: int) -> torch.nn.Module:
    """A model with random weights that int8 holds in steps of 1/64."""
    config = transformers.AutoConfig.for_model(
        family,
        **{
            "vocab_size": 256,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "pad_token_id": None,  # A padding id would have no gradient of its embedding.
            "bos_token_id": 1,
            "eos_token_id": 2,
            **_FAMILIES[family],
            **variant,
        },
    )
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            centre, spread = (64, 10) if "norm" in name else (0, 12)
            steps = (centre + spread * noise).round().clamp(-127, 127)
            parameter.copy_(steps / 64)
    return model


def golden(family: str, variant: dict, *, seed: int) -> dict[str, np.ndarray]:
    """Weights by their transformers names, tokens, and all that the model makes of them."""
    model = build(family, variant, seed=seed)
    generator = torch.Generator().manual_seed(seed + 100)
    tokens = torch.randint(0, model.config.vocab_size, (ROWS, LENGTH), generator=generator)
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    configs, bfloat16_logits = _saved(model, tokens, logits)
    packed_logits, packed_loss = _packed(model, tokens)
    packed_loss.backward()
    new_tokens, gap = _greedy(model, tokens)
    assert gap > 1e-3, f"{family} has two next tokens within {gap}: take another seed"

    out = {
        "tokens": tokens.int(),
        "logits": logits,
        "bfloat16_logits": bfloat16_logits.view(torch.int16),
        "packed_logits": packed_logits,
        "packed_loss": packed_loss,
        "greedy_tokens": new_tokens.int(),
        "greedy_gap": torch.tensor(gap),
    }
    for name, parameter in model.named_parameters():
        out[f"weight/{name}"] = (parameter * 64).round().to(torch.int8)
        out[f"gradient_norm/{name}"] = parameter.grad.norm()
    arrays = {name: tensor.detach().numpy() for name, tensor in out.items()}
    return arrays | {name: np.array(text) for name, text in configs.items()}


def version_4(config: dict) -> dict:
    """The config.json of transformers 4 and of early releases: what a family takes for granted is left out."""
    taken_for_granted = {
        "layer_types": config.get("layer_types"),  # Derived from the window's fields.
        "tie_word_embeddings": config["model_type"] == "smollm3",
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "no_rope_layers": [
            int((layer + 1) % config.get("no_rope_layer_interval", 1) != 0)
            for layer in range(config["num_hidden_layers"])
        ],
    }
    old = {
        name: value
        for name, value in config.items()
        if name not in taken_for_granted or value != taken_for_granted[name]
    }
    rope = dict(old.pop("rope_parameters"))
    old["rope_theta"] = rope.pop("rope_theta")
    old["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    if rope["rope_type"] == "yarn":
        rope["type"] = rope.pop("rope_type")  # As SmolLM3's model card spells it.
    return old | {"torch_dtype": old.pop("dtype"), "transformers_version": "4.53.0"}


def _saved(model, tokens, logits) -> tuple[dict[str, str], torch.Tensor]:
    """Both spellings of config.json, seen to give `logits`; and the first row's logits in bfloat16.

    Loading is what keeps RoPE's frequencies in float32 there: casting a model with .to() would round them.
    """
    auto = transformers.AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        path = Path(folder) / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps(version_4(config)))
        reloaded = auto.from_pretrained(folder, dtype="float32", attn_implementation="eager").eval()
        small = auto.from_pretrained(folder, dtype="bfloat16", attn_implementation="eager").eval()
    with torch.no_grad():
        assert torch.equal(reloaded(tokens, use_cache=False).logits, logits)
        bfloat16_logits = small(tokens[:1], use_cache=False).logits
    texts = {"config_v5": json.dumps(config), "config_v4": json.dumps(version_4(config))}
    return texts, bfloat16_logits


def _packed(model, tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and mean loss of rows of two documents; positions that start again are how transformers tells them."""
    positions = torch.arange(LENGTH) - torch.where(torch.arange(LENGTH) < BOUNDARY, 0, BOUNDARY)
    logits = model(tokens, position_ids=positions[None].expand(ROWS, -1), use_cache=False).logits
    targets = tokens.roll(-1, dims=1)
    targets[:, BOUNDARY - 1] = targets[:, -1] = -100  # First tokens of documents are no targets.
    return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _greedy(model, tokens) -> tuple[torch.Tensor, float]:
    """The new tokens of each prompt, one prompt at a time, and the least lead of a chosen token over the next."""
    model.generation_config.eos_token_id = None  # All rows get all tokens.
    rows, leads = [], []
    for row, length in zip(tokens, PROMPT_LENGTHS, strict=True):
        result = model.generate(
            row[None, :length],
            generation_config=transformers.GenerationConfig(
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                use_cache=True,
                return_dict_in_generate=True,
                output_logits=True,
            ),
        )
        rows.append(result.sequences[0, length:])
        best = torch.cat(result.logits).topk(2).values
        leads.append((best[:, 0] - best[:, 1]).min().item())
    return torch.stack(rows), min(leads)


def main(folder: Path) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    for seed, ((family, name), variant) in enumerate(VARIANTS.items()):
        path = folder / f"{family}_{name}.npz"
        np.savez_compressed(path, **golden(family, variant, seed=seed))
        print(f"{path.stem}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "golden")
