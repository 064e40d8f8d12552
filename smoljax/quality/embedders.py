"""Texts to vectors by a frozen model: cut into tokens, batched by length, computed on all devices of this host.

N texts, R chunks of texts, B rows of a batch, S sequence, D width of the vectors
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from smoljax.errors import SmoljaxError, require
from smoljax.interop import hf_config, safetensors_files
from smoljax.quality import bert
from smoljax.tokens import tokenizer as tokenizers
from smoljax.tokens.tokenizer import Tokenizer

# Raised when the same model and text give another vector than before.
CODE_VERSION = 1
RUN = "model:"
_DECODER_TOKENS = (
    512  # Of a chunk, for a model that says nothing else: what FineWeb-Edu's embedder reads.
)
_SHORTEST = 32  # Lengths are rounded up to 32, 64, 128...; each is compiled once.
# Of a batch on one device. A CPU is faster with few: one core embeds 16.0 texts/s by all-MiniLM-L6-v2 (256 tokens) in batches of
# 1,024 tokens, and 9.7 in batches of 4,096.
_BATCH_TOKENS = {"cpu": 1024}
_BATCH_TOKENS_ELSEWHERE = 2**14
# More characters than these for each token of a chunk are not read. English has 4 to 5 to a token.
_CHARACTERS_PER_TOKEN = 16


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How texts become rows of tokens.

    Attributes:
      encode: texts to int arrays of ids, without special tokens.
      prefix, suffix: ids of special tokens around a chunk.
      max_tokens: of a chunk, with its special tokens.
    """

    encode: Callable[[list[str]], list[np.ndarray]]
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    max_tokens: int

    def rows(self, texts: Sequence[str], chunks: str) -> tuple[list[np.ndarray], np.ndarray]:
        """Rows of ids, and for each the number of its text.

        The starts of all texts come first, in order; with chunks="start_end", the ends of those that are longer follow.
        """
        room = self.max_tokens - len(self.prefix) - len(self.suffix)
        reach = self.max_tokens * _CHARACTERS_PER_TOKEN
        starts = self.encode([text[:reach] for text in texts])
        cut = [(i, ids[:room]) for i, ids in enumerate(starts)]
        if chunks == "start_end":
            longer = [i for i, ids in enumerate(starts) if len(ids) > room or len(texts[i]) > reach]
            ends = self.encode([texts[i][-reach:] for i in longer])
            cut += [(i, ids[-room:]) for i, ids in zip(longer, ends)]
        rows = [np.concatenate([self.prefix, ids, self.suffix]).astype(np.int32) for _, ids in cut]
        return rows, np.array([i for i, _ in cut], np.int64)


class Embedder:
    """A frozen model that gives each text a vector.

    Args:
      name: for errors.
      encoding: texts to tokens.
      embed: (params, tokens_BS, mask_BS) -> f32 [B, D]; pure, of each row alone.
      params: its parameters.
      identity: what, beside the parameters, the vectors depend on; JSON-able.

    Attributes:
      fingerprint: hex digest of everything that a vector depends on but the text.
    """

    def __init__(
        self, name: str, encoding: Encoding, embed: Callable, params: dict, *, identity: dict
    ):
        self._name, self._encoding = name, encoding
        settings = {**identity, "code": CODE_VERSION, "max_tokens": encoding.max_tokens}
        self.fingerprint = _fingerprint(settings, params)
        mesh = Mesh(np.array(jax.local_devices()), ("rows",))
        split, whole = PartitionSpec("rows"), PartitionSpec()
        self._split = NamedSharding(mesh, split)
        self._params = jax.device_put(params, NamedSharding(mesh, whole))
        self._embed = jax.jit(
            jax.shard_map(
                embed, mesh=mesh, in_specs=(whole, split, split), out_specs=split, check_vma=False
            )
        )

    def embed(
        self, texts: Sequence[str], *, chunks: str = "start"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Vectors of the chunks of texts, f32 [R, D], and the number of each chunk's text, int64 [R].

        With chunks="start", R is N, in the order of the texts; with "start_end", the ends of longer texts follow.
        Batches have fixed shapes, so that a text's vector does not depend on how many stand beside it; where it stands
        may change the last bits.

        Raises:
          SmoljaxError: a vector is not finite.
        """
        rows, owners = self._encoding.rows(texts, chunks)
        batch_tokens = _BATCH_TOKENS.get(jax.default_backend(), _BATCH_TOKENS_ELSEWHERE)
        buckets: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            length = max(_SHORTEST, 2 ** math.ceil(math.log2(len(row))))
            buckets.setdefault(min(length, self._encoding.max_tokens), []).append(i)
        vectors: list = [None] * len(rows)
        for length, members in sorted(buckets.items()):
            size = max(1, batch_tokens // length) * len(self._split.mesh.devices)
            for start in range(0, len(members), size):
                batch = members[start : start + size]
                for i, vector in zip(batch, self._batch([rows[i] for i in batch], length, size)):
                    vectors[i] = vector
        vectors_RD = np.array(vectors, np.float32).reshape(len(rows), -1 if rows else 0)
        wrong = np.flatnonzero(~np.isfinite(vectors_RD).all(axis=1))
        if len(wrong):
            raise SmoljaxError(
                f"embedder {self._name} gives vectors with NaN or infinity for {len(wrong)} of {len(rows)} texts, the "
                f"first for the one that begins {texts[owners[wrong[0]]][:60]!r}: its weights or its precision do not "
                "hold; choose another embedder"
            )
        return vectors_RD, owners

    def _batch(self, rows: list[np.ndarray], length: int, size: int) -> np.ndarray:
        tokens_BS = np.zeros((size, length), np.int32)
        mask_BS = np.zeros((size, length), bool)
        mask_BS[:, 0] = True  # Rows that fill the batch have one token, so that their mean exists.
        for i, row in enumerate(rows):
            tokens_BS[i, : len(row)] = row
            mask_BS[i, : len(row)] = True
        tokens_BS, mask_BS = jax.device_put((tokens_BS, mask_BS), self._split)
        return np.asarray(self._embed(self._params, tokens_BS, mask_BS))[: len(rows)]


def open_embedder(name: str, *, max_tokens: int | None = None) -> Embedder:
    """The embedder of config.quality.embedder (see QualityConfig).

    Raises:
      SmoljaxError: there is no such folder, it holds no model that is known here, or max_tokens is more than it can read.
    """
    if name.startswith(RUN):
        return _of_run(Path(name.removeprefix(RUN)), max_tokens)
    folder = Path(name)
    if not folder.is_dir():
        raise SmoljaxError(
            f"config.quality.embedder is {name!r}, and there is no such folder: name that of a sentence-transformers "
            f'model or of a Hugging Face decoder, or "{RUN}WORKDIR" for a run of smoljax.train'
        )
    family = safetensors_files.read_json(folder / "config.json").get("model_type")
    if family in bert.FAMILIES:
        return _of_bert(folder, max_tokens)
    if family in hf_config.ARCHITECTURES:
        return _of_decoder(folder, max_tokens)
    raise SmoljaxError(
        f"config.quality.embedder is {name!r}, a model of type {family!r}: known are the encoders "
        f"{', '.join(bert.FAMILIES)} and the decoders {', '.join(hf_config.ARCHITECTURES)}"
    )


def _of_bert(folder: Path, max_tokens: int | None) -> Embedder:
    library = require("tokenizers", extra="train")
    config, params = bert.load(folder)
    file = folder / tokenizers.JSON_FILE
    if not file.is_file():
        raise SmoljaxError(
            f"{folder} has no {tokenizers.JSON_FILE}: save its tokenizer in the fast format first"
        )
    data = file.read_bytes()
    model = library.Tokenizer.from_str(data.decode())
    model.no_truncation()
    model.no_padding()
    frame = model.encode("").ids
    if len(frame) != 2:
        raise SmoljaxError(
            f"{file} puts {len(frame)} special tokens around a text; an encoder of this kind has 2"
        )

    def encode(texts: list[str]) -> list[np.ndarray]:
        encoded = model.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in encoded]

    most = _max_tokens(max_tokens, config.max_tokens, config.num_positions)
    encoding = Encoding(encode, tuple(frame[:1]), tuple(frame[1:]), most)
    identity = {**dataclasses.asdict(config), "tokenizer": hashlib.sha256(data).hexdigest()}
    embed = functools.partial(bert.embed, config)
    return Embedder(str(folder), encoding, embed, params, identity=identity)


def _of_run(workdir: Path, max_tokens: int | None) -> Embedder:
    from smoljax.training import Run

    file = workdir / "train" / "config.json"
    if not file.is_file():
        raise SmoljaxError(
            f"config.quality.embedder is {RUN}{workdir}, and there is no {file}: train that run first"
        )
    config = json.loads(file.read_text(encoding="utf-8"))
    run = Run({**config, "mesh": {}}, workdir)  # Each device has all of the model here.
    _, params = run.restore_params()
    return _of_model(f"{RUN}{workdir}", run.model, params, run.tokenizer, max_tokens)


def _of_decoder(folder: Path, max_tokens: int | None) -> Embedder:
    from smoljax.interop import huggingface

    model, params = huggingface.load(folder)
    return _of_model(str(folder), model, params, tokenizers.load(folder), max_tokens)


def _of_model(
    name: str, model, params: dict, tokenizer: Tokenizer, max_tokens: int | None
) -> Embedder:
    """The mean of a decoder's hidden states after its last norm, over BOS and the tokens of the text."""
    from smoljax.model import hidden

    def embed(params, tokens_BS, mask_BS):
        segment_ids_BS = mask_BS.astype(jnp.int32)
        hidden_BSD = hidden(model, params, tokens_BS, segment_ids_BS).astype(jnp.float32)
        weight_BS1 = mask_BS[:, :, None].astype(jnp.float32)
        return (hidden_BSD * weight_BS1).sum(1) / weight_BS1.sum(1)

    params = {name: params[name] for name in params if name != "mtp"}
    usual = min(_DECODER_TOKENS, model.max_seq_len)
    most = _max_tokens(max_tokens, usual, model.max_seq_len)
    encoding = Encoding(tokenizer.encode_batch, (tokenizer.bos_id,), (), most)
    identity = {**model.as_section(), "tokenizer": tokenizer.fingerprint}
    return Embedder(name, encoding, embed, params, identity=identity)


def _max_tokens(asked: int | None, usual: int, most: int) -> int:
    if asked is not None and asked > most:
        raise SmoljaxError(
            f"config.quality.max_tokens is {asked}: this embedder reads at most {most} tokens"
        )
    return asked or usual


def _fingerprint(settings: dict, params: dict) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
