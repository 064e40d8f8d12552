"""Writes tests/model/golden/*.npz: what transformers' SmolLM3 computes on tiny models, float32, eager attention.

    pip install "smoljax[test-hf]"
    python tests/model/make_golden.py [FOLDER]

Weights are int8 multiples of 1/64, so that the files stay small and both sides start from the same bits.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import SmolLM3Config, SmolLM3ForCausalLM

VARIANTS = {
    "tied": {
        "tie_word_embeddings": True,
        "rope_theta": 50_000.0,
        "no_rope_layer_interval": 4,
        "seed": 0,
    },
    "untied": {
        "tie_word_embeddings": False,
        "rope_theta": 10_000.0,
        "no_rope_layer_interval": 2,
        "seed": 1,
    },
}
ROWS, LENGTH, BOUNDARY = 2, 24, 10  # The packed case is two documents of 10 and 14 tokens per row.


def build(*, tie_word_embeddings, rope_theta, no_rope_layer_interval, seed) -> SmolLM3ForCausalLM:
    config = SmolLM3Config(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tie_word_embeddings,
        no_rope_layer_interval=no_rope_layer_interval,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    config._attn_implementation = "eager"
    model = SmolLM3ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            centre, spread = (64, 10) if "norm" in name else (0, 12)
            steps = (centre + spread * noise).round().clamp(-127, 127)
            parameter.copy_(steps / 64)
    return model


def golden(variant: dict) -> dict[str, np.ndarray]:
    """Weights by their transformers names, tokens, logits with and without packing, and loss and gradient norms packed."""
    model = build(**variant)
    generator = torch.Generator().manual_seed(variant["seed"] + 100)
    tokens = torch.randint(0, model.config.vocab_size, (ROWS, LENGTH), generator=generator)
    segments = (torch.arange(LENGTH) >= BOUNDARY).int() + 1
    allowed = torch.ones(LENGTH, LENGTH).tril().bool() & (segments[:, None] == segments[None])
    mask = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    mask = mask.expand(ROWS, 1, LENGTH, LENGTH)
    with torch.no_grad():
        logits = model(tokens).logits
    packed = model(tokens, attention_mask=mask, position_ids=torch.arange(LENGTH)[None]).logits

    targets = tokens.roll(-1, dims=1)
    targets[:, BOUNDARY - 1] = targets[:, -1] = -100  # First tokens of documents are no targets.
    loss = torch.nn.functional.cross_entropy(packed.flatten(0, 1), targets.flatten())
    loss.backward()

    out = {"tokens": tokens.int(), "logits": logits, "packed_logits": packed, "packed_loss": loss}
    for name, parameter in model.named_parameters():
        out[f"weight/{name}"] = (parameter * 64).round().to(torch.int8)
        out[f"gradient_norm/{name}"] = parameter.grad.norm()
    return {name: array.detach().numpy() for name, array in out.items()}


def main(folder: Path) -> None:
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True, parents=True)
    for name, variant in VARIANTS.items():
        np.savez_compressed(folder / f"smollm3_{name}.npz", **golden(variant))
        print(f"{name}: {(folder / f'smollm3_{name}.npz').stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "golden")
