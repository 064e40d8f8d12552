"""Writes golden/*.npz: what transformers and sentence-transformers make of tiny encoders of each family, on a CPU.

    pip install "smoljax[test-hf]" sentence-transformers
    python tests/quality/make_golden.py [FOLDER]

Weights are int8 multiples of 1/64, so that the files stay small and both sides start from the same bits. With MINILM in
the environment, the folder of all-MiniLM-L6-v2, its vectors of TEXTS are written as well.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Normalize, Pooling, Transformer

TEXTS = (
    "The harbour keeper mended the lamp before the storm reached the village.",
    "def area(radius):\n    return math.pi * radius ** 2  # of a circle\n",
    "Permission is hereby granted, free of charge, to any person obtaining a copy of this software.",
    "Ünïcödé, 漢字 and 😀; UPPER lower, numbers 3.14159 and 2026-11-25.",
    "short",
    " ".join(
        f"word{number} of a text that is longer than the encoder reads" for number in range(40)
    ),
)
# family: (fields of its config that are not the class's own, pooling, whether vectors get length 1)
FAMILIES = {
    "bert": ({"type_vocab_size": 2, "pad_token_id": 0}, "mean", True),
    "roberta": ({"type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5}, "cls", True),
    "xlm-roberta": (
        {"type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5},
        "mean",
        False,
    ),
}
POSITIONS = 48


def tokenizer_of(family: str) -> transformers.PreTrainedTokenizerFast:
    """A small tokenizer of the family's kind, trained on TEXTS: word pieces, bytes, or a unigram model."""
    library = tokenizers
    if family == "bert":
        model = library.Tokenizer(library.models.WordPiece(unk_token="[UNK]"))
        model.normalizer = library.normalizers.BertNormalizer(lowercase=True)
        model.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
        names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        trainer = library.trainers.WordPieceTrainer(vocab_size=160, special_tokens=names)
        frame = ("[CLS]", "[SEP]")
    elif family == "roberta":
        model = library.Tokenizer(library.models.BPE())
        model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        alphabet = library.pre_tokenizers.ByteLevel.alphabet()
        trainer = library.trainers.BpeTrainer(
            vocab_size=300, special_tokens=names, initial_alphabet=alphabet
        )
        frame = ("<s>", "</s>")
    else:
        model = library.Tokenizer(library.models.Unigram())
        model.pre_tokenizer = library.pre_tokenizers.Metaspace()
        names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        trainer = library.trainers.UnigramTrainer(
            vocab_size=160, special_tokens=names, unk_token="<unk>"
        )
        frame = ("<s>", "</s>")
    model.train_from_iterator(TEXTS, trainer)
    model.post_processor = library.processors.TemplateProcessing(
        single=f"{frame[0]} $A {frame[1]}",
        special_tokens=[(name, model.token_to_id(name)) for name in frame],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        model_max_length=40,
        pad_token=names[0] if family == "bert" else names[1],
        unk_token="[UNK]" if family == "bert" else "<unk>",
    )


def build(family: str, fields: dict, *, vocab_size: int, seed: int) -> torch.nn.Module:
    """An encoder with random weights that int8 holds in steps of 1/64."""
    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        **fields,
    )
    config._attn_implementation = "eager"
    model = transformers.AutoModel.from_config(config, add_pooling_layer=False).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            centre, spread = (64, 10) if "LayerNorm.weight" in name else (0, 16)
            parameter.copy_((centre + spread * noise).round().clamp(-127, 127) / 64)
    return model


def golden(family: str, fields: dict, pooling: str, normalize: bool, *, seed: int) -> dict:
    """Weights, the files of a sentence-transformers folder, hidden states of tokens and vectors of TEXTS."""
    tokenizer = tokenizer_of(family)
    model = build(family, fields, vocab_size=len(tokenizer), seed=seed)
    batch = tokenizer(
        list(TEXTS), padding=True, truncation=True, max_length=40, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    # A long row and a short one, with padding.
    out = {
        "texts": np.array(TEXTS),
        "tokens": batch["input_ids"][[0, 4]].int().numpy(),
        "mask": batch["attention_mask"][[0, 4]].bool().numpy(),
        "hidden": hidden[[0, 4]].numpy(),
    }
    for name, parameter in model.named_parameters():
        out[f"weight/{name}"] = (parameter * 64).round().to(torch.int8).detach().numpy()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/plain")
        tokenizer.save_pretrained(f"{folder}/plain")
        first = Transformer(f"{folder}/plain")
        modules = [first, Pooling(32, pooling_mode=pooling)] + [Normalize()] * normalize
        sentences = SentenceTransformer(modules=modules, device="cpu")
        out["vectors"] = sentences.encode(list(TEXTS))
        sentences.save(f"{folder}/saved")
        for path in sorted(Path(folder, "saved").rglob("*.json")):
            name = str(path.relative_to(Path(folder, "saved")))
            out[f"file/{name}"] = np.array(json.dumps(json.loads(path.read_text())))
    return out


def main(folder: Path) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    for seed, (family, (fields, pooling, normalize)) in enumerate(FAMILIES.items()):
        path = folder / f"{family}.npz"
        np.savez_compressed(path, **golden(family, fields, pooling, normalize, seed=seed))
        print(f"{path.stem}: {path.stat().st_size / 1e3:.0f} kB")
    if "MINILM" in os.environ:
        model = SentenceTransformer(os.environ["MINILM"], device="cpu")
        vectors = model.encode(list(TEXTS))
        np.savez_compressed(folder / "minilm.npz", texts=np.array(TEXTS), vectors=vectors)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "golden")
