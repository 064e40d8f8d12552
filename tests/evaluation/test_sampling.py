"""Text in, text out: streamed pieces join to the same text, whole characters at a time."""

import jax
import pytest

from smoljax.errors import SmoljaxError
from smoljax.evaluation.sampling import GenerationConfig, Sampler
from smoljax.model import ModelConfig, init
from smoljax.tokens import tokenizer

MODEL = ModelConfig(
    vocab_size=512,
    num_layers=2,
    hidden_size=32,
    intermediate_size=64,
    num_heads=2,
    num_kv_heads=1,
    max_seq_len=64,
    scan_layers=False,
)


@pytest.fixture(scope="module")
def make(corpus):
    params = init(MODEL, jax.random.key(0))
    loaded = tokenizer.load(corpus / "tokenizer")
    return lambda **settings: Sampler(MODEL, params, loaded, GenerationConfig(**settings))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streamed_pieces_join_to_the_whole(make, temperature):
    """An untrained model at temperature 1 draws single bytes too, so characters do get cut between pieces."""
    sampler = make(max_new_tokens=40, temperature=temperature, top_p=1.0, seed=3)
    (whole,) = sampler.continue_all(["def é"])
    pieces = list(sampler.stream("def é"))
    assert "".join(pieces) == whole
    assert len(pieces) > 1


def test_a_seed_names_the_text(make):
    first, again, other = (
        make(max_new_tokens=16, temperature=1.0, seed=seed).continue_all(["import "])
        for seed in (0, 0, 1)
    )
    assert first == again != other


def test_the_models_length_bounds_the_text(make):
    sampler = make(max_new_tokens=1000)
    assert sampler.continue_all(["def "])  # Cut where max_seq_len ends, not refused.
    with pytest.raises(SmoljaxError, match=r"longest prompt has \d+ tokens.*max_seq_len is 64"):
        sampler.continue_all(["x = 1\n" * 100])


def test_no_prompts_are_named(make):
    with pytest.raises(SmoljaxError, match=r"config\.generation\.prompts is empty"):
        make().continue_all([])
