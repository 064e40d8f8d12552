"""Texts to vectors: against sentence-transformers, apart from what stands beside them, and from our own decoder.

N texts, D width
"""

import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from smoljax.errors import SmoljaxError
from smoljax.interop import huggingface
from smoljax.model import ModelConfig, hidden, init
from smoljax.quality.embedders import open_embedder
from smoljax.tokens import tokenizer as tokenizers
from tests.quality import material
from tests.quality.material import FAMILIES

TOLERANCE = 1e-5
LONG = 5  # The number of the golden text that is longer than the encoders read.


def texts_of(name: str) -> list[str]:
    return [str(text) for text in material.golden(name)["texts"]]


def vectors(name: str, folder, *, texts=None, **options) -> np.ndarray:
    found, owners = open_embedder(str(folder), **options).embed(texts or texts_of(name))
    np.testing.assert_array_equal(owners, np.arange(len(found)))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_those_of_sentence_transformers(tmp_path, family):
    folder = material.write_encoder(tmp_path / "encoder", family)
    expected = material.golden(family)["vectors"]
    np.testing.assert_allclose(vectors(family, folder), expected, rtol=0, atol=TOLERANCE)


def test_another_pooling_gives_other_vectors(tmp_path):
    folder = material.write_encoder(tmp_path / "encoder", "bert")
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    expected = material.golden("bert")["vectors"]
    assert np.abs(vectors("bert", folder) - expected).max() > 0.01


@pytest.mark.network
def test_minilm_gives_the_vectors_of_sentence_transformers():
    found = vectors("minilm", material.minilm())
    np.testing.assert_allclose(found, material.golden("minilm")["vectors"], rtol=0, atol=TOLERANCE)


def test_a_vector_depends_on_its_text_alone(tmp_path):
    embedder = open_embedder(str(material.write_encoder(tmp_path / "encoder", "bert")))
    texts = texts_of("bert") * 20
    together, _ = embedder.embed(texts)
    for i in range(6):
        np.testing.assert_array_equal(embedder.embed(texts[i : i + 1])[0][0], together[i])
    order = np.random.default_rng(0).permutation(len(texts))
    mixed, _ = embedder.embed([texts[i] for i in order])
    np.testing.assert_allclose(mixed, together[order], rtol=0, atol=1e-6)
    assert embedder.embed([])[0].shape[0] == 0


def test_the_end_of_a_long_text_is_read_too_when_asked_for(tmp_path):
    embedder = open_embedder(str(material.write_encoder(tmp_path / "encoder", "bert")))
    texts = texts_of("bert")
    starts, _ = embedder.embed(texts)
    both, owners = embedder.embed(texts, chunks="start_end")
    assert owners.tolist() == [0, 1, 2, 3, 4, 5, *sorted(set(owners[6:].tolist()))]
    assert LONG in owners[6:]
    np.testing.assert_allclose(both[:6], starts, rtol=0, atol=1e-6)
    end, _ = embedder.embed([texts[LONG][-200:]], chunks="start_end")
    np.testing.assert_allclose(both[owners == LONG][1], end[-1], rtol=0, atol=1e-6)


def test_fewer_tokens_are_read_when_asked_for(tmp_path):
    folder = material.write_encoder(tmp_path / "encoder", "bert")
    full = vectors("bert", folder, max_tokens=48)
    short = vectors("bert", folder, max_tokens=8)
    changed = np.abs(full - short).max(axis=1) > 1e-3
    assert changed[LONG]
    assert not changed[4]  # "short"
    with pytest.raises(SmoljaxError, match="max_tokens is 49: this embedder reads at most 48"):
        open_embedder(str(folder), max_tokens=49)


def test_the_fingerprint_is_of_all_that_a_vector_depends_on(tmp_path):
    folder = material.write_encoder(tmp_path / "encoder", "bert")
    same = material.write_encoder(tmp_path / "moved", "bert")
    first = open_embedder(str(folder)).fingerprint
    assert open_embedder(str(same)).fingerprint == first
    prints = {first, open_embedder(str(folder), max_tokens=16).fingerprint}
    for name, old, new in (
        ("1_Pooling/config.json", '"mean"', '"cls"'),
        ("tokenizer.json", '"lowercase": true', '"lowercase": false'),
    ):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))
        prints.add(open_embedder(str(folder)).fingerprint)
        (folder / name).write_text(text)
    other = {"embeddings.LayerNorm.bias": np.zeros(32, np.float32)}
    material.write_encoder(folder, "bert", extra=other)
    prints.add(open_embedder(str(folder)).fingerprint)
    assert len(prints) == 5


def test_weights_that_are_not_finite_are_named(tmp_path):
    broken = {"embeddings.LayerNorm.bias": np.full(32, np.nan, np.float32)}
    folder = material.write_encoder(tmp_path / "encoder", "bert", extra=broken)
    with pytest.raises(SmoljaxError, match=r"NaN or infinity for 6 of 6 texts.*'The harbour"):
        vectors("bert", folder)


def test_what_is_no_embedder_is_refused(tmp_path):
    with pytest.raises(SmoljaxError, match="there is no such folder"):
        open_embedder(str(tmp_path / "nowhere"))
    folder = material.write_encoder(tmp_path / "encoder", "bert")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(SmoljaxError, match=r"has no tokenizer\.json"):
        open_embedder(str(folder))
    (folder / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(SmoljaxError, match="of type 't5': known are the encoders bert, roberta"):
        open_embedder(str(folder))
    with pytest.raises(SmoljaxError, match=r"train/config\.json: train that run first"):
        open_embedder(f"model:{tmp_path}")


MODEL = ModelConfig(
    vocab_size=512,
    num_layers=1,
    hidden_size=16,
    intermediate_size=24,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=64,
    scan_layers=False,
    remat="none",
)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A decoder's Hugging Face folder with a tokenizer, and its parameters."""
    folder = tmp_path_factory.mktemp("decoder")
    texts = [f"{text} {text[::-1]}" for text in texts_of("bert")]
    tokenizer = tokenizers.train(texts, folder / "tokenizer", vocab_size=512)
    params = init(MODEL, jax.random.key(0))
    huggingface.save(folder / "model", MODEL, params)
    shutil.copy(folder / "tokenizer" / tokenizers.MODEL_FILE, folder / "model")
    return folder / "model", params, tokenizer


def test_a_decoder_gives_the_mean_of_its_hidden_states(decoder):
    folder, params, tokenizer = decoder
    found = vectors("bert", folder)
    for i in (0, LONG):
        text, vector = texts_of("bert")[i], found[i]
        ids = [tokenizer.bos_id, *tokenizer.encode_batch([text])[0][:63]]
        hidden_BSD = jax.jit(hidden, static_argnums=0)(MODEL, params, np.array([ids], np.int32))
        expected = np.asarray(hidden_BSD[0]).mean(0)
        np.testing.assert_allclose(vector, expected, rtol=0, atol=TOLERANCE)


def test_two_devices_give_the_vectors_of_one(decoder, tmp_path):
    folder, _, _ = decoder
    program = (
        "import sys, jax, numpy; from smoljax.quality.embedders import open_embedder; assert len(jax.devices()) == 2; "
        "numpy.save(sys.argv[2], open_embedder(sys.argv[1]).embed(sys.argv[3:])[0])"
    )
    texts = texts_of("bert")
    subprocess.run(
        [sys.executable, "-c", program, str(folder), str(tmp_path / "v.npy"), *texts],
        env={"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"},
        check=True,
    )
    np.testing.assert_allclose(
        np.load(tmp_path / "v.npy"), vectors("bert", folder), rtol=0, atol=1e-5
    )
