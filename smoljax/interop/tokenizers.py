"""A smoljax tokenizer in the forms that others read: Hugging Face's `tokenizer.json`, and the fields of a GGUF file.

SentencePiece BPE and Hugging Face's BPE merge by different rules. SentencePiece merges the pair whose joined piece
scores highest, the leftmost of equals, over the whole text at once; Hugging Face merges the pair that comes first
in a list of pairs. The list made here gives the same result, and `export` compares the two on a few texts and on
every piece before it writes anything.
"""

import dataclasses
import itertools
import json
from pathlib import Path

from smoljax.errors import SmoljaxError, require
from smoljax.files import atomic_write_bytes, atomic_write_json, atomic_write_text
from smoljax.tokens.tokenizer import JSON_FILE, MODEL_FILE, Tokenizer
from smoljax.tokens.tokenizer_models import HuggingFaceModel, SentencePieceModel

_SPACE_MARK = "\u2581"  # What SentencePiece writes for a space.
# Piece types of sentencepiece_model.proto; GGUF's token types have the same numbers.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BPE = 2  # TrainerSpec.ModelType
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
# What the two libraries could disagree about; every piece of the vocabulary is added to these.
_PROBES = (
    "",
    "plain text, 12 words: 3.14159 and 2024-01-01.\n",
    " leading and trailing  ",
    "two  and   three    four     five\t\ttabs\r\n\n\n\r ends",
    "\u2581 the mark itself\u2581\u2581 \u2581a",
    "\x00 nul \x7f \x85 \ufeff \u2028 \u3000 \u200b",
    "e\u0301 combining, \u00e9 composed, ﬁ ligature, ｆｕｌｌ",
    "你好，世界 こんにちは 안녕 नमस्ते עברית 😀👩‍👩‍👧 \U0010fffd",
    "<s></s><unk><pad><0x41>",
    "aaaaaaaaaaaaaaa bababababa         x",
)


def export(folder: Path | str, tokenizer: Tokenizer, *, chat_template: str | None = None) -> None:
    """Writes `tokenizer` into `folder` as the files that `transformers.AutoTokenizer.from_pretrained(folder)` reads.

    These are tokenizer.json, tokenizer_config.json, special_tokens_map.json, and chat_template.jinja where a
    template is given; for a SentencePiece model also tokenizer.model, which keeps its fingerprint for smoljax and
    its scores for llama.cpp. AutoTokenizer then gives the ids of `tokenizer.encode`, with two differences in its defaults:

    * It adds BOS in front (as training did), unless called with `add_special_tokens=False`.
    * It reads "<s>" inside a text as the special token; smoljax never does. `split_special_tokens=True` turns
      that off, and a service that gets text from strangers should set it.

    A SentencePiece model is translated; a `tokenizer.json` goes out as it came, its own post-processor with it
    (so that it adds BOS only where it did before), but without truncation and padding.

    Args:
      folder: made where it is missing; other files in it are left alone.
      chat_template: Jinja text for `apply_chat_template`.

    Raises:
      SmoljaxError: a SentencePiece model that is no BPE with byte fallback, that normalises text, or whose ids the
        translation does not give exactly. Nothing is written then.
    """
    hf = require("tokenizers", extra="train")
    folder = Path(folder)
    model = tokenizer._model
    if isinstance(model, SentencePieceModel):
        data = _dump_json(_translate(_read_proto(model), tokenizer))
        _compare(hf.Tokenizer.from_str(data.decode()), tokenizer)
    else:
        data = _own_json(model)
    names = {
        f"{role}_token": model.name(i)
        for role, i in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id))
    }
    names["pad_token"] = model.name(tokenizer.pad_id)
    if model.unk_id is not None and model.unk_id >= 0:
        names["unk_token"] = model.name(model.unk_id)
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "clean_up_tokenization_spaces": False,
    }
    if isinstance(model, SentencePieceModel):
        config.update(add_bos_token=True, add_eos_token=False)
    if chat_template is not None:
        config["chat_template"] = chat_template  # For readers older than the file of its own.
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(folder / JSON_FILE, data)
    if isinstance(model, SentencePieceModel):
        atomic_write_bytes(folder / MODEL_FILE, model._sp.serialized_model_proto())
    atomic_write_json(folder / "tokenizer_config.json", config)
    atomic_write_json(folder / "special_tokens_map.json", names)
    if chat_template is not None:
        atomic_write_text(folder / "chat_template.jinja", chat_template)


def gguf_fields(tokenizer: Tokenizer) -> dict[str, object]:
    """The `tokenizer.ggml.*` fields that let llama.cpp give the ids of `tokenizer.encode`.

    Differences that llama.cpp has no field for: it reads U+2581 in a text as a space, it does not apply the NFC
    normaliser of Qwen's tokenizers, and a text such as "</s>" can become the special token where the vocabulary
    holds the piece "/s>" or "</s".

    Returns:
      key -> str, bool, int (to be written as uint32), or a list of str, float (float32) or int (int32).

    Raises:
      SmoljaxError: a kind of tokenizer that llama.cpp does not know, by name.
    """
    model = tokenizer._model
    if isinstance(model, SentencePieceModel):
        fields = _sentencepiece_fields(_read_proto(model))
        fields["tokenizer.ggml.add_bos_token"] = True
    else:
        content = json.loads(_own_json(model))
        fields = _byte_level_fields(content, model.file, tokenizer.vocab_size)
        fields["tokenizer.ggml.add_bos_token"] = _adds_bos(content, tokenizer.bos_id)
    fields["tokenizer.ggml.add_eos_token"] = False
    fields["tokenizer.ggml.bos_token_id"] = tokenizer.bos_id
    fields["tokenizer.ggml.eos_token_id"] = tokenizer.eos_id
    fields["tokenizer.ggml.padding_token_id"] = tokenizer.pad_id
    if model.unk_id is not None and model.unk_id >= 0:
        fields["tokenizer.ggml.unknown_token_id"] = model.unk_id
    return fields


# SentencePiece


@dataclasses.dataclass(frozen=True)
class _Proto:
    """What a SentencePiece BPE model says of itself.

    `pieces` are (text, score, type) by id.
    """

    pieces: list[tuple[str, float, int]]
    dummy_prefix: bool


def _read_proto(model: SentencePieceModel) -> _Proto:
    proto_module = require("sentencepiece.sentencepiece_model_pb2", extra="train")
    proto = proto_module.ModelProto.FromString(model._sp.serialized_model_proto())
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != _BPE:
        kind = proto_module.TrainerSpec.ModelType.Name(trainer.model_type).lower()
        raise SmoljaxError(
            f"{model.file} is a SentencePiece {kind} model, and only BPE models can be exported: "
            "use the model's own tokenizer.json, or export without a tokenizer"
        )
    pieces = [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    num_bytes = sum(kind == _BYTE for _, _, kind in pieces)
    if num_bytes != 256:
        raise SmoljaxError(
            f"{model.file} has {num_bytes} byte pieces, expected 256: only SentencePiece models with byte fallback "
            "can be exported"
        )
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise SmoljaxError(
            f"{model.file} does not write spaces as U+2581 before a word, and cannot be exported: "
            "use the model's own tokenizer.json"
        )
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        what = (
            "normalisation rules" if normalizer.precompiled_charsmap else "remove_extra_whitespaces"
        )
        raise SmoljaxError(
            f"{model.file} has {what}, which other libraries apply differently: use the model's own tokenizer.json"
        )
    return _Proto(pieces, normalizer.add_dummy_prefix)


def _translate(proto: _Proto, tokenizer: Tokenizer) -> dict:
    """The content of a tokenizer.json that does what the SentencePiece model does inside smoljax.

    Without a dummy prefix, spaces are spelt as spaces in the vocabulary. U+2581 is then a character like any that
    the vocabulary lacks and falls back to its bytes, which is what smoljax does with it. With a dummy prefix (as
    Llama 2 has) the vocabulary stays as it is, and U+2581 in a text is a space, in smoljax too.
    """
    normalizers: list[dict] = []
    decoders: list[dict] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if proto.dummy_prefix:
        mark = {"String": _SPACE_MARK}
        normalizers.append({"type": "Prepend", "prepend": _SPACE_MARK})
        normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE_MARK})
        decoders.insert(0, {"type": "Replace", "pattern": mark, "content": " "})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        texts = [text for text, _, _ in proto.pieces]
    else:
        texts = [
            text.replace(_SPACE_MARK, " ") if kind == _NORMAL else text
            for text, _, kind in proto.pieces
        ]
    by_score = sorted(
        (i for i, (_, _, kind) in enumerate(proto.pieces) if kind == _NORMAL),
        key=lambda i: -proto.pieces[i][1],
    )
    unknown = [text for text, _, kind in proto.pieces if kind == _UNKNOWN]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(i, text, special=kind != _USER_DEFINED)
            for i, (text, (_, _, kind)) in enumerate(zip(texts, proto.pieces))
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ],
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": None,
        "post_processor": _bos_template(texts[tokenizer.bos_id], tokenizer.bos_id),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown[0] if unknown else None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {text: i for i, text in enumerate(texts)},
            "merges": _merges([texts[i] for i in by_score]),
        },
    }


def _merges(pieces: list[str]) -> list[tuple[str, str]]:
    """All pairs of pieces that join to a piece, best piece first.

    SentencePiece ranks the pairs of one piece equally and takes the leftmost. Two pairs of one piece compete only
    where they overlap, as in "ab", "a", "ba" for "aba"; merging from the left does not leave such a row behind.

    Args:
      pieces: normal pieces, from the highest score to the lowest.
    """
    known = set(pieces)
    cuts = ((piece[:i], piece[i:]) for piece in pieces for i in range(1, len(piece)))
    return [(left, right) for left, right in cuts if left in known and right in known]


def _added_token(i: int, text: str, *, special: bool) -> dict:
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    return {"id": i, "content": text, **flags, "special": special}


def _bos_template(bos: str, bos_id: int) -> dict:
    def token(type_id: int) -> dict:
        return {"SpecialToken": {"id": bos, "type_id": type_id}}

    def text(name: str, type_id: int) -> dict:
        return {"Sequence": {"id": name, "type_id": type_id}}

    return {
        "type": "TemplateProcessing",
        "single": [token(0), text("A", 0)],
        "pair": [token(0), text("A", 0), token(1), text("B", 1)],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def _compare(exported, tokenizer: Tokenizer) -> None:
    """Raises SmoljaxError where the translated tokenizer gives other ids than `tokenizer`."""
    exported.encode_special_tokens = True
    model = tokenizer._model
    names = [model.name(i).replace(_SPACE_MARK, " ") for i in range(tokenizer.vocab_size)]
    texts = [*_PROBES, *names]
    # Neighbours in the vocabulary share their beginnings, so that merges compete.
    texts += [a + b + a for a, b in itertools.pairwise(names)]
    expected = tokenizer.encode_batch(texts)
    found = exported.encode_batch(texts, add_special_tokens=False)
    for text, ids, encoding in zip(texts, expected, found):
        if ids.tolist() != encoding.ids:
            raise SmoljaxError(
                f"{model.file} cannot be exported exactly: {text!r} is {ids.tolist()[:12]} in smoljax and "
                f"{encoding.ids[:12]} as a tokenizer.json; use the model's own tokenizer.json"
            )


def _sentencepiece_fields(proto: _Proto) -> dict[str, object]:
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [text for text, _, _ in proto.pieces],
        "tokenizer.ggml.scores": [float(score) for _, score, _ in proto.pieces],
        "tokenizer.ggml.token_type": [kind for _, _, kind in proto.pieces],
        "tokenizer.ggml.add_space_prefix": proto.dummy_prefix,
    }


# tokenizer.json


def _own_json(model: HuggingFaceModel) -> bytes:
    """The file's own bytes, or the same content without truncation and padding where it has any."""
    try:
        data = model.file.read_bytes()
    except OSError as error:
        raise SmoljaxError(
            f"{model.file}, from which the tokenizer was loaded, can no longer be read ({error}): put it back"
        ) from error
    content = json.loads(data)
    if not (content.get("truncation") or content.get("padding")):
        return data
    return _dump_json({**content, "truncation": None, "padding": None})


def _dump_json(content: dict) -> bytes:
    return json.dumps(content, ensure_ascii=False, indent=1).encode()


def _byte_level_fields(content: dict, file: Path, vocab_size: int) -> dict[str, object]:
    model = content["model"]
    normalizer = (content.get("normalizer") or {}).get("type")
    if model.get("type") != "BPE" or model.get("byte_fallback") or normalizer not in (None, "NFC"):
        raise SmoljaxError(
            f"{file} is a {model.get('type')} tokenizer with normalizer {normalizer} and byte_fallback="
            f"{model.get('byte_fallback')}; GGUF export knows byte-level BPE without a normalizer or with NFC: "
            "export without a tokenizer"
        )
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for text, i in model["vocab"].items():
        tokens[i], types[i] = text, _NORMAL
    for token in content.get("added_tokens") or []:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = _CONTROL if token.get("special") else _USER_DEFINED
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_tokenizer(content, file),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [
            pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]
        ],
    }


def _pre_tokenizer(content: dict, file: Path) -> str:
    """llama.cpp's name for how the file splits a text into words: these are compiled into it, by name."""
    step = content.get("pre_tokenizer") or {}
    *first, last = step.get("pretokenizers") or [step]
    name = None
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space", True):
        pattern = _split_pattern(first)
        ignores_merges = bool(content["model"].get("ignore_merges"))
        if last.get("use_regex", True):
            individually = [s.get("type") == "Digits" and s.get("individual_digits") for s in first]
            name = {(): "gpt-2", (True,): "smollm"}.get(tuple(individually))
            name = None if ignores_merges else name
        elif pattern == _LLAMA3_SPLIT:
            name = "llama-bpe" if ignores_merges else "smaug-bpe"
        elif pattern == _QWEN2_SPLIT and not ignores_merges:
            name = "qwen2"
    if name is None:
        raise SmoljaxError(
            f"{file} has a pre_tokenizer that GGUF export does not know: {json.dumps(step)[:300]}; expected that of "
            "GPT-2, SmolLM, Llama 3 or Qwen2: export without a tokenizer"
        )
    return name


def _split_pattern(steps: list[dict]) -> str | None:
    if len(steps) != 1 or steps[0].get("type") != "Split":
        return None
    step = steps[0]
    isolated = str(step.get("behavior")).lower() == "isolated" and not step.get("invert")
    return step.get("pattern", {}).get("Regex") if isolated else None


def _adds_bos(content: dict, bos_id: int) -> bool:
    tokenizers = require("tokenizers", extra="train")
    ids = tokenizers.Tokenizer.from_str(json.dumps(content)).encode("a").ids
    return ids[:1] == [bos_id]
