"""Exported files run in llama.cpp, which is the only proof that they are right: `make test-export`.

llama.cpp computes in f32 on the CPU with its own kernels, so logits agree to rounding and no further.
"""

import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
import tokenizers as hf

from smoljax.interop import gguf as smoljax_gguf
from smoljax.interop.hf_leaves import leaves, unflatten
from smoljax.model import ModelConfig, forward, generate
from smoljax.tokens import tokenizer as smoljax_tokenizer

llama_cpp = pytest.importorskip(
    "llama_cpp",
    reason="llama_cpp is not installed: `make test-export` builds it and runs this file",
)

LENGTH = 200
# Largest absolute difference between logits whose standard deviation is about 4.
TOLERANCE = 2e-4
YARN = dict(kind="yarn", factor=4.0, original_max_seq_len=64)
LLAMA3 = dict(
    kind="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_seq_len=64,
)


def model(**fields):
    sizes = dict(
        vocab_size=512,
        num_layers=4,
        hidden_size=64,
        intermediate_size=192,
        num_heads=4,
        num_kv_heads=2,
        max_seq_len=256,
        scan_layers=True,
    )
    return ModelConfig(**(sizes | fields))


MODELS = {
    "smollm3": model(),
    "smollm3-untied-wide-heads": model(tie_embeddings=False, head_dim=32),
    "smollm3-yarn": model(rope_scaling=YARN),
    "smollm3-yarn-attention-factor": model(rope_scaling=YARN | {"attention_factor": 1.3}),
    "llama": model(nope_layers=(), rope_theta=10_000.0, norm_eps=1e-5),
    "llama-llama3-scaling": model(nope_layers=(), rope_scaling=LLAMA3, tie_embeddings=False),
    "qwen3": model(nope_layers=(), qk_norm=True, head_dim=32, rope_theta=1e6),
    "qwen3-yarn": model(nope_layers=(), qk_norm=True, rope_scaling=YARN),
}


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return smoljax_tokenizer.load(corpus / "tokenizer")


@pytest.fixture(scope="module")
def documents(corpus):
    files = sorted((corpus / "documents").rglob("*.parquet"))
    return [t for f in files for t in pq.read_table(f, columns=["text"])["text"].to_pylist()]


def random_params(config):
    """Random weights of a size at which attention looks at few tokens: then every error of RoPE shows."""
    rng = np.random.default_rng(0)

    def values(leaf):
        if len(leaf.tensor_shape) == 1:
            return rng.uniform(0.5, 1.5, leaf.full_shape)
        std = 0.5 if leaf.path in (("embedding",), ("head",)) else leaf.tensor_shape[-1] ** -0.5
        gain = 1.5 if leaf.path[-1] in ("query", "key") else 1.0
        return rng.normal(0, gain * std, leaf.full_shape)

    return unflatten({leaf.path: jnp.asarray(values(leaf), jnp.float32) for leaf in leaves(config)})


def tokens_of(config):
    return np.random.default_rng(1).integers(4, config.vocab_size, LENGTH)


def load(path):
    """A model of llama.cpp with its cache in f32."""
    return llama_cpp.Llama(
        str(path),
        n_ctx=256,
        n_batch=256,
        n_threads=2,
        logits_all=True,
        type_k=0,
        type_v=0,
        flash_attn=False,
        verbose=False,
    )


def logits_of_llama_cpp(path, tokens):
    llama = load(path)
    llama.eval([int(token) for token in tokens])
    return np.array(llama.scores[: len(tokens)])


def save(path, config, params, tokenizer, **options):
    smoljax_gguf.save(path, config, params, tokenizer, **options)
    return path


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_tokens_are_those_of_smoljax(tmp_path, tokenizer, name):
    config, tokens = MODELS[name], tokens_of(MODELS[name])
    params = random_params(config)
    path = save(tmp_path / "m.gguf", config, params, tokenizer)
    expected = np.asarray(forward(config, params, jnp.asarray(tokens)[None])[0])
    found = logits_of_llama_cpp(path, tokens)
    print(
        f"{name}: std {expected.std():.2f}, largest difference {np.abs(found - expected).max():.2e}"
    )
    assert expected.std() > 2
    assert np.abs(found - expected).max() < TOLERANCE
    prompt = [int(token) for token in tokens[:24]]
    (continuation,) = generate(config, params, [prompt], max_new_tokens=32, temperature=0.0)
    assert greedy(path, prompt, 32) == [int(token) for token in continuation]


def greedy(path, prompt, count):
    llama, new = load(path), []
    llama.eval(prompt)
    while len(new) < count:
        new.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
        llama.eval(new[-1:])
    return new


WRONG = {
    "smollm3 without the permutation": ("smollm3", {}),
    "llama without the permutation": ("llama", {}),
    "no NoPE": ("smollm3", dict(nope_layers=())),
    "NoPE where there is none": ("llama", dict(nope_layers=None)),
    "another theta": ("llama", dict(rope_theta=50_000.0)),
    "no YaRN": ("smollm3-yarn", dict(rope_scaling=None)),
    "YaRN's own attention factor": ("smollm3-yarn-attention-factor", dict(rope_scaling=YARN)),
    "no llama3 scaling": ("llama-llama3-scaling", dict(rope_scaling=None)),
    "another epsilon": ("llama", dict(norm_eps=1e-2)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_files_are_far_off(tmp_path, tokenizer, monkeypatch, wrong):
    name, change = WRONG[wrong]
    config, tokens = MODELS[name], tokens_of(MODELS[name])
    params = random_params(config)
    if not change:
        monkeypatch.setattr(smoljax_gguf, "_neighbours", lambda matrix, head_dim: matrix)
    fields = {field: getattr(config, field) for field in config.__dataclass_fields__}
    path = save(tmp_path / "m.gguf", ModelConfig(**(fields | change)), params, tokenizer)
    expected = np.asarray(forward(config, params, jnp.asarray(tokens)[None])[0])
    difference = np.abs(logits_of_llama_cpp(path, tokens) - expected).max()
    print(f"{wrong}: {difference:.2f}")
    assert difference > 500 * TOLERANCE


@pytest.mark.parametrize("dtype", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", ["smollm3", "qwen3"])
def test_files_of_few_bits_run(tmp_path, tokenizer, name, dtype):
    config, tokens = MODELS[name], tokens_of(MODELS[name])
    params = random_params(config)
    path = save(tmp_path / "m.gguf", config, params, tokenizer, dtype=dtype)
    found = logits_of_llama_cpp(path, tokens)
    expected = np.asarray(forward(config, params, jnp.asarray(tokens)[None])[0])
    agreement = np.mean(found.argmax(-1) == expected.argmax(-1))
    correlation = np.corrcoef(found.ravel(), expected.ravel())[0, 1]
    print(
        f"{name} {dtype}: {np.abs(found - expected).max():.3f}, top-1 {agreement:.3f}, r {correlation:.5f}"
    )
    assert correlation > {"f16": 0.9999, "q8_0": 0.98, "q4_0": 0.5}[dtype]


TEXTS = (
    "two  and   three    spaces\t\ttabs\r\n\n\n",
    "\x00 nul, e\u0301, 你好，世界 😀👩‍👩‍👧 <0x41>",
    "in 2024, 3.14159 x=10**100",
    " leading, don't WE'LL I'm  ",
    "",
)


def vocabulary(path):
    return llama_cpp.Llama(str(path), vocab_only=True, verbose=False)


def ids(llama, text):
    return llama.tokenize(text.encode(), add_bos=False, special=False)


def test_sentencepiece_ids_are_those_of_smoljax(tmp_path, tokenizer, documents):
    config = model()
    path = save(tmp_path / "m.gguf", config, random_params(config), tokenizer)
    llama = vocabulary(path)
    for text in (*TEXTS, *documents):
        assert ids(llama, text) == tokenizer.encode(text)
        assert llama.detokenize(tokenizer.encode(text)).decode() == text
    assert llama.tokenize(b"a b") == [tokenizer.bos_id, *tokenizer.encode("a b")]
    assert llama.tokenize(b"</s>", add_bos=False, special=True) == [tokenizer.eos_id]
    assert (llama.token_bos(), llama.token_eos()) == (tokenizer.bos_id, tokenizer.eos_id)


def test_the_one_character_that_llama_cpp_reads_otherwise(tmp_path, tokenizer):
    config = model()
    path = save(tmp_path / "m.gguf", config, random_params(config), tokenizer)
    assert ids(vocabulary(path), "a\u2581b") == tokenizer.encode("a b")
    assert tokenizer.encode("a\u2581b") != tokenizer.encode("a b")


LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(folder, documents, kind):
    """A byte-level tokenizer.json trained on documents, split as `kind` does."""
    pre = hf.pre_tokenizers
    patterns = {
        "llama-bpe": LLAMA3_SPLIT,
        "smaug-bpe": LLAMA3_SPLIT,
        "qwen2": LLAMA3_SPLIT.replace("{1,3}", ""),
    }
    plain = pre.ByteLevel(add_prefix_space=False)
    own = hf.Tokenizer(hf.models.BPE(ignore_merges=kind == "llama-bpe"))
    if kind in patterns:
        last = pre.ByteLevel(add_prefix_space=False, use_regex=False)
        own.pre_tokenizer = pre.Sequence([pre.Split(hf.Regex(patterns[kind]), "isolated"), last])
    elif kind == "smollm":
        own.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), plain])
    else:
        own.pre_tokenizer = plain
    own.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    own.train_from_iterator(documents, trainer)
    own.save(str(folder / "tokenizer.json"))
    return smoljax_tokenizer.load(folder)


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2"])
def test_byte_level_ids_are_those_of_smoljax(tmp_path, documents, kind):
    own = byte_level(tmp_path, documents, kind)
    config = model(vocab_size=own.vocab_size)
    path = save(tmp_path / "m.gguf", config, random_params(config), own)
    llama = vocabulary(path)
    assert llama.metadata["tokenizer.ggml.pre"] == kind
    for text in (*TEXTS, "\u2581 the mark", *documents):
        assert ids(llama, text) == own.encode(text)
    assert llama.tokenize(b"a b") == own.encode("a b")  # The file adds no BOS, nor does llama.cpp.


def test_the_chat_template_arrives(tmp_path, tokenizer):
    config = model()
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    path = save(
        tmp_path / "m.gguf", config, random_params(config), tokenizer, chat_template=template
    )
    assert vocabulary(path).metadata["tokenizer.chat_template"] == template


def test_a_file_without_a_tokenizer_loads(tmp_path):
    config = model()
    tokens = tokens_of(config)
    params = random_params(config)
    path = save(tmp_path / "m.gguf", config, params, None)
    expected = np.asarray(forward(config, params, jnp.asarray(tokens)[None])[0])
    assert np.abs(logits_of_llama_cpp(path, tokens) - expected).max() < TOLERANCE
