"""Exported tokenizers against the libraries that read them, on real documents and on arbitrary text."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
import sentencepiece
import tokenizers as hf
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as proto

from smoljax.errors import SmoljaxError
from smoljax.interop import tokenizers
from smoljax.tokens import tokenizer as smoljax_tokenizer

TEXTS = (
    "two  and   three    spaces\t\ttabs\r\n\n\n",
    "\u2581 the mark itself\u2581\u2581 \u2581",
    "\x00 nul, e\u0301, 你好，世界 😀👩‍👩‍👧 <0x41> <s></s>",
    "in 2024, 3.14159 x=10**100",
)


@pytest.fixture(scope="module")
def trained(corpus):
    return smoljax_tokenizer.load(corpus / "tokenizer")


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    tokenizers.export(folder, trained, chat_template="{{ messages }}")
    return folder


def read(folder):
    loaded = hf.Tokenizer.from_file(str(folder / "tokenizer.json"))
    loaded.encode_special_tokens = True
    return loaded


def ids(loaded, text):
    return loaded.encode(text, add_special_tokens=False).ids


def test_ids_of_real_documents_are_equal(corpus, trained, exported):
    files = sorted((corpus / "documents").rglob("*.parquet"))
    texts = [t for file in files for t in pq.read_table(file, columns=["text"])["text"].to_pylist()]
    loaded = read(exported)
    found = loaded.encode_batch(texts, add_special_tokens=False)
    assert len(texts) > 10
    assert [e.ids for e in found] == [ids.tolist() for ids in trained.encode_batch(texts)]
    assert [loaded.decode(e.ids) for e in found] == texts


@settings(max_examples=300, deadline=None)
@given(
    st.text(
        st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \u2581\n\tea01<s>")), max_size=60
    )
)
@example(TEXTS[0])
@example(TEXTS[1])
@example(TEXTS[2])
@example(TEXTS[3])
def test_ids_of_any_text_are_equal(trained, exported, text):
    loaded = read_once(exported)
    assert ids(loaded, text) == trained.encode(text)
    assert loaded.decode(ids(loaded, text)) == text


_READ = {}


def read_once(folder):
    return _READ.setdefault(folder, read(folder))


def test_a_default_call_begins_with_bos_and_special_names_are_special(trained, exported):
    loaded = hf.Tokenizer.from_file(str(exported / "tokenizer.json"))
    assert loaded.encode("a b").ids == [trained.bos_id, *trained.encode("a b")]
    assert loaded.encode("a", "b").type_ids == [0, 0, 1, 1]
    assert trained.eos_id in loaded.encode("</s>").ids
    assert trained.eos_id not in trained.encode("</s>")
    assert loaded.decode(loaded.encode("a b").ids) == "a b"


def test_files_name_the_special_tokens_and_the_template(exported):
    config = json.loads((exported / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    assert names.items() <= config.items()
    assert json.loads((exported / "special_tokens_map.json").read_text()) == names
    assert config["chat_template"] == "{{ messages }}"
    assert (exported / "chat_template.jinja").read_text() == "{{ messages }}"


def test_our_loader_reads_what_was_exported(trained, exported):
    again = smoljax_tokenizer.load(exported)
    assert (
        again.fingerprint == trained.fingerprint
    )  # So that shards made with it can still be read.
    by_json = smoljax_tokenizer.load(exported / "tokenizer.json")
    assert (by_json.bos_id, by_json.eos_id, by_json.pad_id) == (1, 2, 3)
    assert [by_json.encode(t) for t in TEXTS] == [trained.encode(t) for t in TEXTS]


@pytest.mark.parametrize("model_type", [None, "smollm3", "llama", "qwen3"])
def test_autotokenizer_gives_the_ids(trained, exported, tmp_path, model_type):
    transformers = pytest.importorskip("transformers", reason="transformers: extra test-hf")
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    if model_type is not None:  # It decides which class AutoTokenizer takes.
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    for text in (*TEXTS[:2], *TEXTS[3:]):
        assert auto(text, add_special_tokens=False).input_ids == trained.encode(text)
    for text in TEXTS:
        found = auto(text, split_special_tokens=True).input_ids
        assert found == [trained.bos_id, *trained.encode(text)]
        assert auto.decode(found, skip_special_tokens=True) == text
    roles = (auto.bos_token_id, auto.eos_token_id, auto.pad_token_id)
    assert roles == (trained.bos_id, trained.eos_id, trained.pad_id)
    assert auto.chat_template == "{{ messages }}"


def test_another_order_of_merges_gives_other_ids(trained, exported):
    content = json.loads((exported / "tokenizer.json").read_text())
    content["model"]["merges"].reverse()
    loaded = hf.Tokenizer.from_str(json.dumps(content))
    text = "the parameters of the function are returned"
    assert ids(loaded, text) != trained.encode(text)


def sentencepiece_model(folder, **options):
    """A small SentencePiece model of another kind than ours."""
    path = folder / "foreign.model"
    defaults = dict(
        model_type="bpe",
        byte_fallback=True,
        vocab_size=400,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(
                [f"the number {i} of words and other things" for i in range(99)]
            ),
            model_writer=file,
            minloglevel=2,
            hard_vocab_limit=False,
            **(defaults | options),
        )
    return smoljax_tokenizer.load(path)


@pytest.mark.parametrize("dummy_prefix", [True, False], ids=["llama2", "no-prefix"])
def test_foreign_sentencepiece_models_give_equal_ids(tmp_path, dummy_prefix):
    foreign = sentencepiece_model(tmp_path, add_dummy_prefix=dummy_prefix)
    tokenizers.export(tmp_path / "out", foreign)
    loaded = read(tmp_path / "out")
    for text in ("the words  and numbers 12", " other things\n of ", "\u2581x ﬁ ①"):
        assert ids(loaded, text) == foreign.encode(text)
    assert loaded.decode(ids(loaded, "the words")) == "the words"
    assert tokenizers.gguf_fields(foreign)["tokenizer.ggml.add_space_prefix"] is dummy_prefix


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(model_type="unigram"), "unigram"),
        (dict(byte_fallback=False, vocab_size=60), "0 byte pieces"),
        (dict(normalization_rule_name="nmt_nfkc"), "normalisation rules"),
        (dict(remove_extra_whitespaces=True), "remove_extra_whitespaces"),
    ],
)
def test_other_kinds_of_model_are_refused_and_nothing_is_written(tmp_path, options, message):
    foreign = sentencepiece_model(tmp_path, **options)
    with pytest.raises(SmoljaxError, match=message):
        tokenizers.export(tmp_path / "out", foreign)
    with pytest.raises(SmoljaxError, match=message):
        tokenizers.gguf_fields(foreign)
    assert not (tmp_path / "out").exists()


def test_a_translation_that_is_not_exact_is_refused(tmp_path, trained, monkeypatch):
    monkeypatch.setattr(tokenizers, "_merges", lambda pieces: [])
    with pytest.raises(SmoljaxError, match="cannot be exported exactly"):
        tokenizers.export(tmp_path / "out", trained)
    assert not (tmp_path / "out").exists()


def byte_level(folder, *, pre_tokenizer=None, change=None):
    """A tokenizer.json as GPT-2 has it, trained on a few words."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer or hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the other numbers and words", "def f(x): return 12"] * 9, trainer
    )
    content = json.loads(tokenizer.to_str())
    content.update(change or {})
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return smoljax_tokenizer.load(folder)


def test_a_tokenizer_json_goes_out_as_it_came(tmp_path):
    own = byte_level(tmp_path / "in")
    tokenizers.export(tmp_path / "out", own, chat_template="x")
    source = (tmp_path / "in" / "tokenizer.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == source
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["bos_token"] == "<|begin_of_text|>"
    assert config["pad_token"] == config["eos_token"] == "<|end_of_text|>"
    assert "add_bos_token" not in config


def test_truncation_and_padding_do_not_go_out(tmp_path):
    truncation = dict(direction="Right", max_length=2, strategy="LongestFirst", stride=0)
    own = byte_level(tmp_path / "in", change={"truncation": truncation})
    tokenizers.export(tmp_path / "out", own)
    loaded = read(tmp_path / "out")
    assert len(own.encode("the other numbers 345")) > 2
    assert ids(loaded, "the other numbers 345") == own.encode("the other numbers 345")


def test_gguf_fields_of_sentencepiece(corpus, trained):
    fields = tokenizers.gguf_fields(trained)
    model = proto.ModelProto.FromString((corpus / "tokenizer" / "tokenizer.model").read_bytes())
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.tokens"] == [piece.piece for piece in model.pieces]
    assert fields["tokenizer.ggml.scores"] == [piece.score for piece in model.pieces]
    types = fields["tokenizer.ggml.token_type"]
    assert types[:4] == [2, 3, 3, 3]  # <unk> is unknown; <s>, </s> and <pad> are control tokens.
    assert types.count(6) == 256
    assert set(types[4:]) == {1, 6}
    assert fields["tokenizer.ggml.add_space_prefix"] is False
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.add_eos_token"] is False
    roles = [fields[f"tokenizer.ggml.{r}_token_id"] for r in ("unknown", "bos", "eos", "padding")]
    assert roles == [0, 1, 2, 3]


LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(pattern):
    pre = hf.pre_tokenizers
    return pre.Sequence(
        [
            pre.Split(hf.Regex(pattern), "isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@pytest.mark.parametrize(
    ("pre_tokenizer", "name"),
    [
        (None, "gpt-2"),
        (split(LLAMA3), "smaug-bpe"),
        (split(QWEN2), "qwen2"),
        (
            hf.pre_tokenizers.Sequence(
                [
                    hf.pre_tokenizers.Digits(individual_digits=True),
                    hf.pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            ),
            "smollm",
        ),
        (split(r"\w+|\W+"), None),
        (hf.pre_tokenizers.ByteLevel(add_prefix_space=True), None),
        (hf.pre_tokenizers.Whitespace(), None),
    ],
)
def test_gguf_names_the_pre_tokenizer_or_refuses_it(tmp_path, pre_tokenizer, name):
    own = byte_level(tmp_path / "in", pre_tokenizer=pre_tokenizer)
    if name is None:
        with pytest.raises(SmoljaxError, match="pre_tokenizer"):
            tokenizers.gguf_fields(own)
        return
    fields = tokenizers.gguf_fields(own)
    assert fields["tokenizer.ggml.pre"] == name
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.token_type"][:3] == [3, 3, 1]
    assert len(fields["tokenizer.ggml.tokens"]) == own.vocab_size
    assert fields["tokenizer.ggml.merges"][0].count(" ") == 1
    assert fields["tokenizer.ggml.add_bos_token"] is False


def test_gguf_llama3_ignores_merges_and_adds_bos_where_the_file_does(tmp_path):
    own = byte_level(tmp_path / "in", pre_tokenizer=split(LLAMA3))
    content = json.loads((tmp_path / "in" / "tokenizer.json").read_text())
    content["model"]["ignore_merges"] = True
    content["post_processor"] = tokenizers._bos_template("<|begin_of_text|>", own.bos_id)
    (tmp_path / "in" / "tokenizer.json").write_text(json.dumps(content))
    fields = tokenizers.gguf_fields(smoljax_tokenizer.load(tmp_path / "in"))
    assert fields["tokenizer.ggml.pre"] == "llama-bpe"
    assert fields["tokenizer.ggml.add_bos_token"] is True
