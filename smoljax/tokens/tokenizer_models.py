"""The two kinds of model that a Tokenizer wraps: SentencePiece models and Hugging Face `tokenizer.json` files."""

import hashlib
import json
from pathlib import Path

from smoljax.errors import SmoljaxError, require

_SPACE_MARK = "\u2581"  # What SentencePiece writes for a space.
_BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]")
_EOS_NAMES = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[EOS]")
_PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>")


class SentencePieceModel:
    """A SentencePiece model; U+2581 goes around it where the model is of the kind that `train` makes."""

    def __init__(self, file: Path, data: bytes, names: dict[str, str | None]):
        spm = require("sentencepiece", extra="train")
        self.file = file
        try:
            self._sp = spm.SentencePieceProcessor(model_proto=data)
            self.vocab_size = self._sp.get_piece_size()
        except RuntimeError as error:
            raise _not_a_tokenizer(file) from error
        if self.vocab_size == 0:
            raise _not_a_tokenizer(file)
        sp, ids = self._sp, range(self.vocab_size)
        self.unk_id = sp.unk_id()
        self.special_ids = {i for i in ids if sp.is_control(i) or sp.is_unknown(i)}
        by_name = {sp.id_to_piece(i): i for i in ids}
        own = {"bos": sp.bos_id(), "eos": sp.eos_id(), "pad": sp.pad_id()}
        own = {role: i for role, i in own.items() if i >= 0}
        controls = [sp.id_to_piece(i) for i in sorted(self.special_ids)]
        self.bos_id, self.eos_id, self.pad_id = _find_roles(file, names, own, by_name, controls)
        self.fingerprint = _digest(data, self.bos_id, self.eos_id, self.pad_id)
        bytes_of_mark = [by_name.get(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        plain_prefix = sp.encode("a", out_type=str)[:1] == ["a"]
        self._mark_ids = bytes_of_mark if plain_prefix and None not in bytes_of_mark else None

    def name(self, i: int) -> str:
        return self._sp.id_to_piece(i)

    def encode_batch(self, texts: list[str], num_threads: int) -> list[list[int]]:
        batch = self._sp.encode(texts, num_threads=num_threads)
        if self._mark_ids is not None:
            for i, text in enumerate(texts):
                if _SPACE_MARK in text:
                    batch[i] = self._encode_around_marks(text)
        return batch

    def decode(self, ids: list[int]) -> str:
        return self._sp.decode(ids)

    def _encode_around_marks(self, text: str) -> list[int]:
        first, *rest = self._sp.encode(text.split(_SPACE_MARK), num_threads=1)
        for piece in rest:
            first += self._mark_ids + piece
        return first


class HuggingFaceModel:
    """A `tokenizer.json` of the library `tokenizers`, without its template, truncation and padding."""

    def __init__(self, file: Path, data: bytes, names: dict[str, str | None]):
        tokenizers = require("tokenizers", extra="train")
        self.file = file
        try:
            content = json.loads(data)
            # These never take part: a document gets bos and eos from the shard writer, and is never cut.
            content.update(post_processor=None, truncation=None, padding=None)
            probe = tokenizers.Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # The library raises plain Exception.
            raise _not_a_tokenizer(file) from error
        added = content.get("added_tokens") or []
        by_name = probe.get_vocab(with_added_tokens=True)
        own = {
            role: by_name[name]
            for role, name in _names_beside(file).items()
            if name is not None and name in by_name
        }
        specials = [token["content"] for token in added if token.get("special")]
        self.bos_id, self.eos_id, self.pad_id = _find_roles(file, names, own, by_name, specials)
        for token in added:
            # A role may be filled by a token that the file calls ordinary; text must not reach it either.
            is_role = token["id"] in (self.bos_id, self.eos_id, self.pad_id)
            token["special"] = is_role or token.get("special", False)
        self._model = tokenizers.Tokenizer.from_str(json.dumps(content))
        self._model.encode_special_tokens = True  # "<s>" in a text is three characters.
        self.special_ids = {token["id"] for token in added if token["special"]}
        unk = content.get("model", {}).get("unk_token")
        self.unk_id = by_name.get(unk) if isinstance(unk, str) else None
        self.vocab_size = max(by_name.values()) + 1
        canonical = json.dumps(content, sort_keys=True).encode()
        self.fingerprint = _digest(canonical, self.bos_id, self.eos_id, self.pad_id)

    def name(self, i: int) -> str | None:
        return self._model.id_to_token(i)

    def encode_batch(self, texts: list[str], num_threads: int) -> list[list[int]]:
        # The library's threads are set for the whole process (RAYON_NUM_THREADS), not per call.
        if num_threads == 1 and len(texts) == 1:
            return [self._model.encode(texts[0], add_special_tokens=False).ids]
        batch = self._model.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=False)


def _not_a_tokenizer(file: Path) -> SmoljaxError:
    return SmoljaxError(
        f"{file} is not a tokenizer: expected a SentencePiece .model or a Hugging Face tokenizer.json"
    )


def _names_beside(file: Path) -> dict[str, str | None]:
    """Token names by role from the files that Hugging Face puts beside a tokenizer.json."""
    found: dict[str, str | None] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            config = json.loads((file.parent / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        for role in ("bos", "eos", "pad"):
            token = config.get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            found[role] = token or found.get(role)
    return found


def _find_roles(
    file: Path,
    names: dict[str, str | None],
    own: dict[str, int],
    by_name: dict[str, int],
    specials: list[str],
) -> tuple[int, int, int]:
    """Ids of bos, eos, pad: as the caller names them, as the file says, or by a usual name."""
    roles = dict(own)
    usual = {"bos": _BOS_NAMES, "eos": _EOS_NAMES, "pad": _PAD_NAMES}
    for role, name in names.items():
        if name is not None:
            if name not in by_name:
                raise SmoljaxError(
                    f"{role} token {name!r} is not in {file}; its special tokens are {', '.join(specials) or 'none'}"
                )
            roles[role] = by_name[name]
        elif role not in roles:
            found = [by_name[usual_name] for usual_name in usual[role] if usual_name in by_name]
            if found:
                roles[role] = found[0]
    for role, purpose in (("bos", "begins"), ("eos", "ends")):
        if role not in roles:
            raise SmoljaxError(
                f"{file} does not say which token {purpose} a document: name it, load(path, {role}=...); "
                f"its special tokens are {', '.join(specials) or 'none'}"
            )
    return roles["bos"], roles["eos"], roles.get("pad", roles["eos"])


def _digest(data: bytes, *ids: int) -> str:
    return hashlib.sha256(data + repr(ids).encode()).hexdigest()
