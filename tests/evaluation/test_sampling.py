"""Text in, text out: streamed pieces join to the same text, whole characters at a time."""

import jax
import pytest

from smoljax.errors import SmoljaxError
from smoljax.evaluation.sampling import GenerationConfig, Sampler, before_stop, held_back
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


@pytest.mark.parametrize(
    ("stops", "before", "held"),
    [
        ((), "one two\n\nthree", 0),
        (("two",), "one ", 0),
        (("three", "two"), "one ", 0),  # The first to come, not the first in the list.
        (("\n\n",), "one two", 0),
        (("absent",), "one two\n\nthree", 0),
        (("eel",), "one two\n\nthree", 2),
        (("reed", "eel"), "one two\n\nthree", 3),
    ],
)
def test_where_a_stop_text_cuts(stops, before, held):
    assert before_stop("one two\n\nthree", stops) == before
    if before == "one two\n\nthree":
        assert held_back(before, stops) == held


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stop_texts_end_rows_in_a_batch_and_in_a_stream(make, temperature):
    """Stops are cut from what the model writes without them, at token boundaries and across them."""
    settings = {"max_new_tokens": 40, "temperature": temperature, "top_p": 1.0, "seed": 3}
    prompts = ["def ", "import "]
    free = make(**settings).continue_all(prompts)
    places = range(3, len(free[0]) - 3, 5)
    for stop in {free[0][place : place + 3] for place in places} - {free[0][:3]}:
        sampler = make(**settings, stop=(stop, "never written"))
        expected = [text.split(stop)[0] for text in free]
        assert sampler.continue_all(prompts) == expected
        pieces = list(sampler.stream(prompts[0]))
        assert "".join(pieces) == expected[0]


def test_a_stopped_batch_does_not_go_on_to_the_end(make, monkeypatch):
    from smoljax.evaluation import sampling

    free = make(max_new_tokens=56, temperature=0.0).continue_all(["def "])[0]
    taken = []

    def counted(*args, **kwargs):
        for chunks in original(*args, **kwargs):
            taken.append(len(chunks[0]))
            yield chunks

    original = sampling.stream
    monkeypatch.setattr(sampling, "stream", counted)
    make(max_new_tokens=56, temperature=0.0, stop=(free[2:4],)).continue_all(["def "])
    assert sum(taken) <= sampling.TOKENS_PER_LOOK


def test_a_stream_holds_back_what_may_become_a_stop_text():
    from smoljax.evaluation.sampling import Continuation

    text = Continuation(lambda ids: "".join(chr(i) for i in ids), ("STOP",))
    text.add([ord(c) for c in "a ST"])
    assert text.certain() == "a "
    text.add([ord("A")])
    assert text.certain() == "a STA"
    text.add([ord(c) for c in "STOP and more"])
    assert text.stopped
    assert text.whole() == "a STA"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop": "\n"}, "stop is"),
        ({"stop": ("a", "")}, "stop is"),
        ({"cache_dtype": "int4"}, "config.generation.cache_dtype is 'int4'"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(SmoljaxError, match=message):
        GenerationConfig(**settings)


def test_every_setting_reaches_the_model(make):
    plain = {"max_new_tokens": 40, "temperature": 1.0, "top_p": 1.0, "seed": 3}
    free = make(**plain).continue_all(["def "])
    for changed in ({"min_p": 0.9}, {"repetition_penalty": 0.01}, {"top_k": 2}, {"top_p": 0.1}):
        assert make(**plain | changed).continue_all(["def "]) != free
    with pytest.raises(SmoljaxError, match="min_p is 3"):
        make(**plain, min_p=3).continue_all(["def "])


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
