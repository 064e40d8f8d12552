"""BERT-type encoders (BERT, RoBERTa, XLM-RoBERTa) in JAX: what embeds the texts of most sentence-transformers folders.

Devlin et al. 2019; the arithmetic is that of transformers' BertModel without dropout (tests/quality/test_bert.py holds them
together to 1e-5). An encoder is its parameters, stacked over layers, and a pure function of them.

B batch, S sequence, D width, N heads, H head width, F feed-forward width, V vocabulary, L layers
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from smoljax.errors import SmoljaxError
from smoljax.interop import safetensors_files
from smoljax.kernels import attention

# Family: whether it counts positions from behind the number of its padding token, as RoBERTa does.
FAMILIES = {"bert": False, "roberta": True, "xlm-roberta": True}
# Buffers that older files hold; the positions 0, 1, 2... and no parameter.
_BUFFERS = ("position_ids", "token_type_ids")
_PREFIXES = ("", "bert.", "roberta.")
_LAYER = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attended": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
_NORMS = {"attention_norm": "attention.output.LayerNorm", "norm": "output.LayerNorm"}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The sizes of an encoder.

    Attributes:
      num_layers, num_heads, hidden_size, intermediate_size: L, N, D, F.
      norm_eps: epsilon of LayerNorm.
      first_position: number of the first token's row in the table of positions.
      num_positions: longest sequence that has positions, with its special tokens.
      max_tokens: longest sequence that it is meant for.
      pooling: "mean" over all tokens, special ones with them, or "cls", the first token.
      normalize: vectors have length 1.
    """

    num_layers: int
    num_heads: int
    hidden_size: int
    intermediate_size: int
    norm_eps: float
    first_position: int
    num_positions: int
    max_tokens: int
    pooling: str
    normalize: bool


def load(folder: Path) -> tuple[BertConfig, dict]:
    """Config and parameters (f32) of a sentence-transformers folder, or of a plain BERT one (mean pooling, length 1).

    Raises:
      SmoljaxError: something in it is not what this encoder does, or a tensor is missing or of another shape.
    """
    file = folder / "config.json"
    fields = safetensors_files.read_json(file)
    expected = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}
    for name, value in expected.items():
        if fields.get(name, value) != value:
            raise SmoljaxError(
                f"{file}: {name} is {fields[name]!r}, this encoder knows {value!r} alone: choose another embedder"
            )
    pooling, normalize, max_tokens = _modules(folder)
    try:
        shift = fields["pad_token_id"] + 1 if FAMILIES[fields["model_type"]] else 0
        positions = fields["max_position_embeddings"] - shift
        config = BertConfig(
            num_layers=fields["num_hidden_layers"],
            num_heads=fields["num_attention_heads"],
            hidden_size=fields["hidden_size"],
            intermediate_size=fields["intermediate_size"],
            norm_eps=fields["layer_norm_eps"],
            first_position=shift,
            num_positions=positions,
            max_tokens=min(max_tokens or positions, positions),
            pooling=pooling,
            normalize=normalize,
        )
    except KeyError as error:
        raise SmoljaxError(
            f"{file} has no {error}: save the model again with transformers"
        ) from error
    return config, _parameters(folder, config)


def embed(config: BertConfig, params: dict, tokens_BS: jax.Array, mask_BS: jax.Array) -> jax.Array:
    """Vectors of sequences, f32 [B, D].

    Args:
      config, params: of `load`.
      tokens_BS: int32, with special tokens.
      mask_BS: bool, False at padding, which stands behind the tokens.
    """
    hidden_BSD = encode(config, params, tokens_BS, mask_BS)
    if config.pooling == "cls":
        vector_BD = hidden_BSD[:, 0]
    else:
        weight_BS1 = mask_BS[:, :, None].astype(jnp.float32)
        vector_BD = (hidden_BSD * weight_BS1).sum(1) / weight_BS1.sum(1)
    if config.normalize:
        vector_BD /= jnp.maximum(jnp.linalg.norm(vector_BD, axis=-1, keepdims=True), 1e-12)
    return vector_BD


def encode(config: BertConfig, params: dict, tokens_BS: jax.Array, mask_BS: jax.Array) -> jax.Array:
    """Hidden states of the last layer, f32 [B, S, D]; those of padding mean nothing."""
    norm = functools.partial(_layer_norm, eps=config.norm_eps)
    segment_ids_BS = mask_BS.astype(jnp.int32)  # Tokens see tokens, and padding sees padding.
    tables = params["embeddings"]
    positions_SD = jax.lax.dynamic_slice_in_dim(
        tables["position"], config.first_position, tokens_BS.shape[1]
    )
    hidden_BSD = tables["word"][tokens_BS] + (positions_SD + tables["type"][:1])[None]
    hidden_BSD = norm(tables["norm"], hidden_BSD)

    def layer(hidden_BSD, weights):
        heads = (*tokens_BS.shape, config.num_heads, config.hidden_size // config.num_heads)
        q_BSNH, k_BSNH, v_BSNH = (
            _linear(weights[name], hidden_BSD).reshape(heads) for name in ("query", "key", "value")
        )
        attended_BSNH = attention(q_BSNH, k_BSNH, v_BSNH, causal=False, segment_ids=segment_ids_BS)
        attended_BSD = _linear(weights["attended"], attended_BSNH.reshape(hidden_BSD.shape))
        hidden_BSD = norm(weights["attention_norm"], hidden_BSD + attended_BSD)
        up_BSF = jax.nn.gelu(_linear(weights["up"], hidden_BSD), approximate=False)
        return norm(weights["norm"], hidden_BSD + _linear(weights["down"], up_BSF)), None

    return jax.lax.scan(layer, hidden_BSD, params["layers"])[0]


def _linear(weights: dict, x):
    return jnp.einsum("bsi,io->bso", x, weights["kernel"]) + weights["bias"][None, None]


def _layer_norm(weights: dict, x, *, eps: float):
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    normal = (x - mean) * jax.lax.rsqrt(variance + eps)
    return normal * weights["scale"][None, None] + weights["bias"][None, None]


def _modules(folder: Path) -> tuple[str, bool, int | None]:
    """Pooling, whether vectors get length 1, and the longest sequence: what modules.json and its neighbours say."""
    if not (folder / "modules.json").is_file():
        return "mean", True, _longest(folder)
    file = folder / "modules.json"
    try:
        modules = json.loads(file.read_text(encoding="utf-8"))
        kinds = [module["type"].rpartition(".")[2] for module in modules]
        paths = [module["path"] for module in modules]
    except (ValueError, KeyError, TypeError) as error:
        raise SmoljaxError(
            f"{file} is not a list of modules with type and path ({error!r}): save the model again"
        ) from error
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise SmoljaxError(
            f"{file} has the modules {', '.join(kinds)}; Transformer, Pooling and Normalize are known here: "
            "choose another embedder"
        )
    file = folder / paths[1] / "config.json"
    given = safetensors_files.read_json(file)
    # Version 6 of sentence-transformers writes {"pooling_mode": "mean"}, earlier ones a field for each kind.
    modes = [
        name.removeprefix("pooling_mode_")
        for name, value in given.items()
        if name.startswith("pooling_mode_") and value is True
    ] or [given.get("pooling_mode")]
    names = {"mean_tokens": "mean", "cls_token": "cls", "mean": "mean", "cls": "cls"}
    if len(modes) != 1 or str(modes[0]) not in names:
        raise SmoljaxError(
            f"{file} pools by {modes}: mean_tokens or cls_token is known here, choose another embedder"
        )
    return names[modes[0]], "Normalize" in kinds, _longest(folder)


def _longest(folder: Path) -> int | None:
    """The longest sequence that a folder's files speak of: sentence-transformers' own field, or the tokenizer's."""
    for file, field in (
        ("sentence_bert_config.json", "max_seq_length"),
        ("tokenizer_config.json", "model_max_length"),
    ):
        if (folder / file).is_file():
            value = safetensors_files.read_json(folder / file).get(field)
            if value is not None:
                return int(value)
    return None


def _parameters(folder: Path, config: BertConfig) -> dict:
    ignored = [f"{prefix}embeddings.{name}" for prefix in _PREFIXES for name in _BUFFERS]
    tensors = safetensors_files.open_folder(folder, ignored=ignored)
    first = "embeddings.word_embeddings.weight"
    prefix = next((prefix for prefix in _PREFIXES if prefix + first in tensors), "")
    D, F = config.hidden_size, config.intermediate_size

    def tensor(name: str, *shape: int) -> np.ndarray:
        """A tensor in f32, whose last axes are `shape`."""
        if prefix + name not in tensors:
            raise SmoljaxError(
                f"{folder} has no tensor {prefix + name}: it is no encoder of the family that its config.json names"
            )
        stored = tensors[prefix + name]
        if stored.shape[-len(shape) :] != shape:
            raise SmoljaxError(
                f"{stored.file}: tensor {prefix + name} has shape {list(stored.shape)}, expected {list(shape)} "
                "at its end by config.json: the two are of different models"
            )
        return np.array(stored.rows(0, stored.shape[0]), np.float32)

    def linear(name: str, width_in: int, width_out: int) -> dict:
        kernel = tensor(f"{name}.weight", width_out, width_in)
        return {"kernel": kernel.T, "bias": tensor(f"{name}.bias", width_out)}

    def norm(name: str) -> dict:
        return {"scale": tensor(f"{name}.weight", D), "bias": tensor(f"{name}.bias", D)}

    def layer(number: int) -> dict:
        top = f"encoder.layer.{number}."
        widths = {"up": (D, F), "down": (F, D)}
        linears = {
            key: linear(top + name, *widths.get(key, (D, D))) for key, name in _LAYER.items()
        }
        return linears | {key: norm(top + name) for key, name in _NORMS.items()}

    layers = [layer(number) for number in range(config.num_layers)]
    return {
        "embeddings": {
            "word": tensor(first, D),
            "position": tensor("embeddings.position_embeddings.weight", D),
            "type": tensor("embeddings.token_type_embeddings.weight", D),
            "norm": norm("embeddings.LayerNorm"),
        },
        "layers": jax.tree.map(lambda *leaves: np.stack(leaves), *layers),
    }
