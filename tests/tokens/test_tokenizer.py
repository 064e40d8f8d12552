import io
import json
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from smoljax.errors import SmoljaxError
from smoljax.interop import chat_template
from smoljax.tokens import tokenizer

_NASTY = st.sampled_from(
    [
        *(
            "\u2581",
            "\u2581\u2581",
            "\x00",
            "\r\n",
            "\r",
            "   ",
            "\t\t",
            "\ufeff",
            "\ue000",
            "\u0301",
        ),
        *(
            "<s>",
            "</s>",
            "<unk>",
            "<pad>",
            "<0x41>",
            "<|im_end|>",
            "\u2047",
            " \u2047 ",
            "\u2585",
            "\ufffd",
        ),
        *(
            "\u00a0",
            "\u200b",
            "\u2028",
            "\x85",
            "\U0010ffff",
            "ﬁ",
            "e\u0301",
            "12345",
            "def f(x):\n    return",
        ),
    ]
)
TEXTS = st.lists(st.one_of(st.text(), _NASTY), max_size=8).map("".join)


@settings(max_examples=400, deadline=None)
@given(text=TEXTS)
@example("\u2581")
@example(" \u2581 \u2581\u2581x \x00")
@example("\ufeff\ufeff")
def test_trained_round_trip_is_exact(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert not {bpe.bos_id, bpe.eos_id, bpe.pad_id, 0}.intersection(ids)


def test_sentencepiece_alone_loses_the_space_mark(tokenizer_dir):
    """Negative control: what the escape is for."""
    raw = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_dir / "tokenizer.model"))
    assert raw.decode(raw.encode("a\u2581b")) == "a b"


def test_every_code_point_round_trips(bpe):
    points = [c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
    text = "".join(map(chr, points[:: max(1, len(points) // 60_000)])) + "".join(
        map(chr, range(0x3000))
    )
    assert bpe.decode(bpe.encode(text)) == text


def test_batch_equals_single_for_any_number_of_threads(bpe, texts):
    batch = [*texts[:10], "", "\u2581 <s>"]
    for threads in (1, 2, 5):
        encoded = bpe.encode_batch(batch, num_threads=threads)
        assert [ids.tolist() for ids in encoded] == [bpe.encode(text) for text in batch]
        assert all(ids.dtype == np.int32 for ids in encoded)


def test_same_texts_same_bytes_in_another_process(tokenizer_dir, texts, tmp_path):
    script = (
        "import json, sys\nfrom smoljax.tokens import tokenizer\n"
        "texts = json.load(open(sys.argv[1]))\n"
        "tokenizer.train(texts, sys.argv[2], vocab_size=2048)\n"
        "assert not {'jax', 'tensorflow', 'flax'} & set(sys.modules)\n"
    )
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    subprocess.run(
        [sys.executable, "-c", script, tmp_path / "texts.json", tmp_path / "again"],
        check=True,
        env={"PYTHONHASHSEED": "7", "PATH": ""},
        cwd=".",
    )
    for name in ("tokenizer.model", "manifest.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tokenizer_dir / name).read_bytes()


def test_manifest_and_special_ids(bpe, tokenizer_dir, texts):
    manifest = json.loads((tokenizer_dir / "manifest.json").read_text())
    assert manifest["vocab_size"] == bpe.vocab_size == 2048
    assert manifest["fingerprint"] == bpe.fingerprint
    assert (bpe.bos_id, bpe.eos_id, bpe.pad_id) == (1, 2, 3)
    assert manifest["training_bytes"] == sum(len(text.encode()) for text in texts)
    assert bpe.lossy is None


def test_digits_are_split(bpe):
    assert len(bpe.encode("20261124")) == 8


def test_hostile_training_text(tmp_path):
    """NUL, a word longer than 16 bits count, lone surrogates: neither crash the trainer nor break the round trip."""
    hostile = [
        "a\x00b " * 50,
        "y" * 200_000,
        "x\ud800z \u2581\u2581",
        "plain words and more words " * 40,
    ]
    trained = tokenizer.train(hostile, tmp_path / "t", vocab_size=285)
    text = "a\x00b \u2581\u2581 yyyy plain words"
    assert trained.decode(trained.encode(text)) == text


def test_training_reads_no_more_than_asked(tmp_path):
    def endless():
        while True:
            yield "some words that never end, again and again\n" * 100

    tokenizer.train(endless(), tmp_path / "t", vocab_size=300, max_bytes=50_000)
    assert json.loads((tmp_path / "t" / "manifest.json").read_text())["training_bytes"] < 60_000


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (
            ["hello there"],
            8192,
            r"vocab_size is 8192, but 11 bytes of text support at most \d+ ids",
        ),
        ([], 8192, "no text to train"),
        (["hello there"], 100, "at least 512"),
    ],
)
def test_training_errors_leave_nothing(tmp_path, texts, vocab_size, message):
    with pytest.raises(SmoljaxError, match=message):
        tokenizer.train(texts, tmp_path / "t", vocab_size=vocab_size)
    assert list(tmp_path.iterdir()) == []


def test_load_errors(tmp_path):
    with pytest.raises(SmoljaxError, match="does not exist"):
        tokenizer.load(tmp_path / "none.model")
    with pytest.raises(SmoljaxError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        tokenizer.load(tmp_path)
    for content in (b"", b"not a tokenizer at all", b"{}", b'{"model": 3}', bytes(range(256))):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(SmoljaxError, match="is not a tokenizer"):
            tokenizer.load(tmp_path / "bad.model")


def test_surrogates_and_wrong_types_are_refused(bpe):
    with pytest.raises(SmoljaxError, match=r"text 1 of the batch .* U\+DC80 at character 2"):
        bpe.encode_batch(["fine", "ab\udc80"])
    with pytest.raises(SmoljaxError, match="text 0 of the batch is bytes"):
        bpe.encode_batch([b"raw"])
    with pytest.raises(SmoljaxError, match="token id 2048 is outside the vocabulary of 2048"):
        bpe.decode([5, 2048])


@pytest.fixture(scope="module")
def byte_level(texts, tmp_path_factory):
    """A GPT-2 style tokenizer.json whose chat token is an ordinary added token, as some published files have it."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<|endoftext|>", "<s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts[:20], trainer)
    model.add_tokens([tokenizers.AddedToken("<|im_end|>", special=False)])
    model.enable_truncation(5)
    path = tmp_path_factory.mktemp("byte_level") / "tokenizer.json"
    model.save(str(path))
    return path


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_tokenizer_json_round_trip(byte_level, text):
    loaded = tokenizer.load(byte_level, bos="<|endoftext|>", eos="<|im_end|>")
    ids = loaded.encode(text)
    assert loaded.decode(ids) == text
    assert not {loaded.bos_id, loaded.eos_id}.intersection(ids)
    assert loaded.encode_batch([text, text])[1].tolist() == ids


def test_tokenizer_json_as_the_library_has_it_matches_specials(byte_level):
    """Negative control: the library's default turns typed text into the special token."""
    raw = tokenizers.Tokenizer.from_file(str(byte_level))
    assert raw.token_to_id("<|endoftext|>") in raw.encode("<|endoftext|>").ids


def test_tokenizer_json_roles(byte_level, tmp_path):
    loaded = tokenizer.load(byte_level, eos="<|endoftext|>")
    assert loaded.bos_id != loaded.eos_id == loaded.pad_id
    with pytest.raises(SmoljaxError, match=r"eos token '</eos>' is not in .*<\|endoftext\|>"):
        tokenizer.load(byte_level, eos="</eos>")
    content = json.loads(byte_level.read_text())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] == "<|im_end|>"]
    for name in ("<s>", "<|endoftext|>"):
        del content["model"]["vocab"][name]
    bare = tmp_path / "tokenizer.json"
    bare.write_text(json.dumps(content))
    with pytest.raises(SmoljaxError, match=r"begins a document: name it, load\(path, bos=\.\.\.\)"):
        tokenizer.load(bare)
    config = {"bos_token": {"content": "<|im_end|>"}, "eos_token": "<|im_end|>", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    beside = tokenizer.load(tmp_path)
    assert beside.decode([beside.bos_id]) == ""
    assert beside.bos_id not in beside.encode("<|im_end|>")


def test_fingerprint_is_of_what_determines_ids(byte_level, bpe, tokenizer_dir, tmp_path):
    reformatted = tmp_path / "tokenizer.json"
    reformatted.write_text(json.dumps(json.loads(byte_level.read_text()), indent=7))
    first = tokenizer.load(byte_level, eos="<|endoftext|>")
    assert tokenizer.load(reformatted, eos="<|endoftext|>").fingerprint == first.fingerprint
    assert tokenizer.load(reformatted, eos="<|im_end|>").fingerprint != first.fingerprint
    assert tokenizer.load(tokenizer_dir / "tokenizer.model").fingerprint == bpe.fingerprint


def test_normalising_models_say_so(texts, tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(texts[:5]).splitlines()),
        model_writer=model,
        vocab_size=400,
        model_type="unigram",
        minloglevel=2,
    )
    (tmp_path / "nfkc.model").write_bytes(model.getvalue())
    loaded = tokenizer.load(tmp_path / "nfkc.model")
    assert "does not give every text back" in loaded.lossy
    assert loaded.pad_id == loaded.eos_id
    assert loaded.bos_id not in loaded.encode("<s> x </s>")

    lower = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "<s>": 1, "</s>": 2, "a": 3}, "[UNK]")
    )
    lower.normalizer = tokenizers.normalizers.Lowercase()
    lower.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    lower.save(str(tmp_path / "words.json"))
    words = tokenizer.load(tmp_path / "words.json")
    assert words.lossy
    # The model's own vocabulary holds "<s>" as a word; text still cannot reach it.
    assert not {1, 2}.intersection(words.encode("a <s> a </s>"))


def test_special_id(bpe, byte_level):
    assert (bpe.special_id("</s>"), bpe.special_id("<pad>")) == (2, 3)
    assert bpe.special_id("a") is None  # A piece, and no special one.
    assert bpe.special_id("<|im_end|>") is None
    ordinary = tokenizer.load(byte_level, eos="<|endoftext|>")
    assert ordinary.special_id("<|endoftext|>") == ordinary.eos_id
    assert ordinary.special_id("<|im_end|>") is None  # Added, but text becomes it.
    as_eos = tokenizer.load(byte_level, bos="<|endoftext|>", eos="<|im_end|>")
    assert as_eos.special_id("<|im_end|>") == as_eos.eos_id


def test_a_tokenizer_that_is_trained_for_chats(texts, bpe, tmp_path):
    names = ["<|im_start|>", "<|im_end|>"]
    chat = tokenizer.train(texts, tmp_path / "t", vocab_size=2048, special_tokens=names)
    assert [chat.special_id(name) for name in names] == [4, 5]
    question = [{"role": "user", "content": "Who typed <|im_start|>?"}]
    ids, _ = chat_template.encode(chat, question)
    # The system turn and the user's, not what the user typed.
    assert ids.count(4) == ids.count(5) == 2
    assert "Who typed <|im_start|>?" in chat.decode(ids)
    assert bpe.special_id("<|im_start|>") is None
