"""Agreement with transformers for every family and variant, from arrays that make_golden.py wrote; needs no torch.

The models come in through the loader: each test starts from config.json and model.safetensors. They run operation by
operation, since compiling each variant's programs takes minutes; the last test compiles one of each family.

L layers, D model width, N query or key heads, H head width, B batch, S sequence, V vocabulary
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoljax.losses import cross_entropy
from smoljax.model import forward, generate, hidden, unembedding

pytest.importorskip("safetensors", reason="needs the extra export")
from safetensors.numpy import save_file

from smoljax.interop import hf_config, huggingface

GOLDEN = Path(__file__).parent / "golden"
VARIANTS = sorted(path.stem for path in GOLDEN.glob("*.npz"))
BOUNDARY = 10  # Packed rows are documents of 10 and 14 tokens.
PROMPT_LENGTHS = (5, 11)
TOLERANCE = 2e-4

# Our parameter: its name in transformers, within a layer and outside.
IN_LAYER = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
OUTSIDE = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}

# (variant, a setting that is not its own): results must differ.
WRONG = [
    ("smollm3_tied", {"nope_layers": ()}),
    ("smollm3_tied", {"nope_layers": (0, 1, 2)}),  # Inverted.
    ("smollm3_tied", {"rope_theta": 10_000.0}),
    ("smollm3_untied", {"nope_layers": (0, 2)}),  # Inverted.
    ("smollm3_untied", {"rope_theta": 50_000.0}),
    ("smollm3_interval_3", {"nope_layers": (3,)}),
    ("smollm3_all_rope", {"nope_layers": (3,)}),
    ("smollm3_irregular", {"nope_layers": (3,)}),
    ("smollm3_irregular", {"nope_layers": (1, 2)}),  # Inverted.
    ("smollm3_yarn", {"rope_scaling": None}),
    ("smollm3_yarn", {"rope_scaling": {"attention_factor": 1.0}}),
    ("smollm3_yarn", {"rope_scaling": {"factor": 1.0}}),
    ("smollm3_window", {"sliding_window": None, "windowed_layers": ()}),
    ("smollm3_window", {"sliding_window": 9}),
    ("smollm3_window", {"windowed_layers": (0, 2)}),
    ("llama_tied", {"rope_theta": 20_000.0}),
    ("llama_tied", {"norm_eps": 1e-2}),
    ("llama_untied", {"nope_layers": (1,)}),
    ("llama_llama3", {"rope_scaling": None}),
    ("llama_llama3", {"rope_scaling": {"factor": 4.0}}),
    ("llama_llama3", {"rope_scaling": {"low_freq_factor": 2.0}}),
    ("llama_llama3", {"rope_scaling": {"high_freq_factor": 2.0}}),
    ("llama_llama3", {"rope_scaling": {"original_max_seq_len": 128}}),
    ("qwen3_tied", {"qk_norm": False}),
    ("qwen3_tied", {"rope_theta": 10_000.0}),
    ("qwen3_yarn", {"rope_scaling": None}),
    ("qwen3_yarn", {"rope_scaling": {"beta_fast": 32.0}}),
    ("qwen3_yarn", {"rope_scaling": {"beta_slow": 1.0}}),
    ("qwen3_yarn", {"rope_scaling": {"attention_factor": None}}),
    ("qwen3_yarn", {"rope_scaling": {"truncate": True}}),
    ("qwen3_window", {"sliding_window": None, "windowed_layers": ()}),
    ("qwen3_window", {"windowed_layers": (0, 1)}),
]


@dataclasses.dataclass
class Case:
    golden: dict
    config: object
    params: dict


@pytest.fixture(autouse=True)
def eager():
    with jax.disable_jit():
        yield


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Case by name, each written as a Hugging Face folder and loaded once."""
    cases = {}

    def load(name):
        if name not in cases:
            with np.load(GOLDEN / f"{name}.npz") as arrays:
                golden = dict(arrays)
            folder = tmp_path_factory.mktemp(name)
            weights = {
                key.removeprefix("weight/"): array.astype(np.float32) / 64
                for key, array in golden.items()
                if key.startswith("weight/")
            }
            save_file(weights, folder / "model.safetensors")
            (folder / "config.json").write_text(str(golden["config_v5"]))
            cases[name] = Case(golden, *huggingface.load(folder))
        return cases[name]

    return load


@pytest.fixture(scope="module", params=VARIANTS)
def case(request, load):
    return load(request.param)


def distance(case, config=None, params=None):
    """The largest difference to the logits of transformers."""
    tokens_BS = jnp.asarray(case.golden["tokens"])
    logits_BSV = forward(config or case.config, params or case.params, tokens_BS)
    return float(np.abs(logits_BSV - case.golden["logits"]).max())


def test_logits_agree(case):
    assert np.abs(case.golden["logits"]).max() > 5  # They say something.
    assert distance(case) < TOLERANCE


def test_config_of_transformers_4_is_read_as_that_of_5(case):
    old, new = (
        hf_config.to_config(json.loads(str(case.golden[name])))[0]
        for name in ("config_v4", "config_v5")
    )
    assert old == new == case.config


def test_packed_documents_agree(case):
    """Logits, loss and the norm of every parameter's gradient where rows hold two documents."""
    config, golden = case.config, case.golden
    tokens_BS = jnp.asarray(golden["tokens"])
    B, S = tokens_BS.shape
    position_S = jnp.arange(S)
    segment_ids_BS = jnp.broadcast_to((position_S >= BOUNDARY).astype(jnp.int32) + 1, (B, S))
    mask_BS = jnp.broadcast_to((position_S != BOUNDARY - 1) & (position_S != S - 1), (B, S))

    def loss(params):
        hidden_BSD = hidden(config, params, tokens_BS, segment_ids_BS)
        total, num_targets, _ = cross_entropy(
            hidden_BSD,
            unembedding(config, params),
            jnp.roll(tokens_BS, -1, axis=1),
            mask_BS,
            chunk_size=16,
        )
        return total / num_targets, hidden_BSD @ unembedding(config, params)[None]

    (value, logits_BSV), gradient = jax.value_and_grad(loss, has_aux=True)(case.params)
    assert np.abs(logits_BSV - golden["packed_logits"]).max() < TOLERANCE
    # Control: a second document that sees the first is another result.
    second = np.s_[:, BOUNDARY:]
    assert np.abs(golden["logits"][second] - golden["packed_logits"][second]).max() > 0.1
    np.testing.assert_allclose(value, golden["packed_loss"], rtol=1e-5)
    expected = {
        name.removeprefix("gradient_norm/"): norm
        for name, norm in golden.items()
        if name.startswith("gradient_norm/")
    }
    norms = dict(gradient_norms(gradient))
    assert norms.keys() == expected.keys()
    for name, norm in norms.items():
        np.testing.assert_allclose(norm, expected[name], rtol=1e-4, err_msg=name)


def gradient_norms(gradient):
    """Yields each tensor's name in transformers and the norm of its gradient."""
    for path, array in jax.tree_util.tree_leaves_with_path(gradient):
        *groups, name = (key.key for key in path)
        array = np.asarray(array, np.float64)
        if "layers" in groups:
            for layer, part in enumerate(array):
                yield f"model.layers.{layer}.{IN_LAYER[name]}.weight", np.linalg.norm(part)
        else:
            yield f"{OUTSIDE[name]}.weight", np.linalg.norm(array)


def test_greedy_tokens_are_the_same(case):
    assert case.golden["greedy_gap"] > 1e-3  # No choice hangs on rounding.
    assert continuations(case) == case.golden["greedy_tokens"].tolist()


def continuations(case):
    tokens_BS, new_BS = case.golden["tokens"], case.golden["greedy_tokens"]
    prompts = [row_S[:length].tolist() for row_S, length in zip(tokens_BS, PROMPT_LENGTHS)]
    return generate(case.config, case.params, prompts, max_new_tokens=new_BS.shape[1])


def test_bfloat16_rounds_as_much_as_transformers_does(case):
    """Two results of equal, independent rounding errors e lie sqrt(2) e apart; shared roundings bring them nearer."""
    golden = case.golden
    config = dataclasses.replace(case.config, compute_dtype="bfloat16")
    tokens_BS = jnp.asarray(golden["tokens"][:1])
    theirs_BSV = np.asarray(golden["bfloat16_logits"].view(jnp.bfloat16), np.float32)
    error = rms(theirs_BSV - golden["logits"][:1])
    assert rms(forward(config, case.params, tokens_BS) - theirs_BSV) < 2**0.5 * error
    # Control: a wrong model is farther away.
    interleaved = interleave(case.params)
    assert rms(forward(config, interleaved, tokens_BS) - theirs_BSV) > 2 * error


def rms(array):
    return float(np.sqrt(np.mean(np.square(array))))


def test_interleaved_queries_and_keys_do_not_agree(case):
    """llama.cpp's order of rows, with pairs side by side: a checkpoint that was not permuted back."""
    assert distance(case, params=interleave(case.params)) > 0.5


def interleave(params):
    def interleave(x_LDNH):
        L, D, N, H = x_LDNH.shape
        return x_LDNH.reshape(L, D, N, 2, H // 2).swapaxes(3, 4).reshape(L, D, N, H)

    attention = params["layers"]["attention"]
    attention = attention | {name: interleave(attention[name]) for name in ("query", "key")}
    return params | {"layers": params["layers"] | {"attention": attention}}


@pytest.mark.parametrize(("name", "change"), WRONG, ids=lambda value: str(value))
def test_a_wrong_setting_does_not_agree(load, name, change):
    case = load(name)
    scaling = change.get("rope_scaling")
    if scaling is not None:
        change = {"rope_scaling": dataclasses.replace(case.config.rope_scaling, **scaling)}
    wrong = dataclasses.replace(case.config, **change)
    assert wrong != case.config
    assert distance(case, config=wrong) > 0.5


@pytest.mark.parametrize("name", ["smollm3_window", "llama_llama3", "qwen3_yarn"])
def test_compiled_models_agree(load, name):
    case = load(name)
    with jax.disable_jit(False):
        run = jax.jit(forward, static_argnums=0)
        logits_BSV = run(case.config, case.params, jnp.asarray(case.golden["tokens"]))
        assert np.abs(logits_BSV - case.golden["logits"]).max() < TOLERANCE
        assert continuations(case) == case.golden["greedy_tokens"].tolist()
