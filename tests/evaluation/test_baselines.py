"""Baselines against closed forms, the compressors' own programs, and the texts that went into the shards."""

import math
import random
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoljax.errors import SmoljaxError
from smoljax.evaluation.baselines import baselines, documents, target_counts, unigram_bits
from smoljax.tokens import tokenizer as tokenizers
from smoljax.tokens.reader import ShardReader
from smoljax.tokens.shards import shard_directory, write_shards

VOCAB = 512
PROSE = [textwrap.dedent(module.__doc__) for module in (random, textwrap, subprocess, shutil)]
# Every kind of text that could come back changed or be cut in the wrong place.
DOCUMENTS = {
    "train": [PROSE[0], "x", PROSE[1], "naïve café ▁▁ 日本語 \x00 <s></s> \r\n tail  "],
    "heldout": ["", "  a", PROSE[2], "<s>日本語</s> ▁ \x00\r\n", "", PROSE[3], "last"],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A real tokenizer: digits are tokens of their own, so the entropy of digit texts is known."""
    texts = [*PROSE, "0123456789 " * 50]
    return tokenizers.train(texts, tmp_path_factory.mktemp("tokenizer") / "t", vocab_size=VOCAB)


def write(root, tokenizer, texts, *, source="prose", block_tokens=64):
    rows = [(split, f"{split}-{i}", t) for split, ts in texts.items() for i, t in enumerate(ts)]
    write_shards(
        rows,
        root,
        tokenizer,
        source=source,
        block_tokens=block_tokens,
        tokens_per_file=8 * block_tokens,
    )
    return shard_directory(root, source)


@pytest.mark.parametrize("block_tokens", [2, 7, 64, 2**19])
def test_held_out_text_is_exactly_what_was_curated(tmp_path, tokenizer, block_tokens):
    folder = write(tmp_path, tokenizer, DOCUMENTS, block_tokens=block_tokens)
    for split, texts in DOCUMENTS.items():
        assert list(documents(ShardReader(folder, split), tokenizer)) == texts


@pytest.mark.parametrize("block_tokens", [2, 64])
def test_target_counts_are_those_of_the_tokens_with_eos_and_without_bos(
    tmp_path, tokenizer, block_tokens
):
    folder = write(tmp_path, tokenizer, DOCUMENTS, block_tokens=block_tokens)
    expected = np.zeros(VOCAB, int)
    for text in DOCUMENTS["train"]:
        for token in [*tokenizer.encode(text), tokenizer.eos_id]:
            expected[token] += 1
    np.testing.assert_array_equal(target_counts(ShardReader(folder, "train"), tokenizer), expected)
    assert expected[tokenizer.bos_id] == 0


def test_unigram_is_the_closed_form_of_add_one_smoothing(tmp_path, tokenizer):
    # Train: 600 zeros, 200 ones, one eos: 801 targets. Held-out: 30 zeros, 10 twos (never seen), one eos.
    texts = {"train": ["0" * 600 + "1" * 200], "heldout": ["0" * 30 + "2" * 10]}
    write(tmp_path, tokenizer, texts)
    total = 801 + VOCAB
    bits = 30 * math.log2(total / 601) + 10 * math.log2(total / 1) + math.log2(total / 2)
    result = baselines(tmp_path, ["prose"], tokenizer)
    assert result["prose"]["unigram"] == pytest.approx(bits / 40, rel=1e-12)
    assert result["all"] == result["prose"]


def test_unigram_finds_the_entropy_of_a_memoryless_source(tmp_path, tokenizer):
    # Four digits of probability 1/2, 1/4, 1/8, 1/8 have 1.75 bits each; smoothing and eos add less than 1%.
    draw = random.Random(0)
    text = ["".join(draw.choices("0123", (4, 2, 1, 1), k=60_000)) for _ in range(2)]
    write(tmp_path, tokenizer, {"train": text[:1], "heldout": text[1:]}, block_tokens=4096)
    found = baselines(tmp_path, ["prose"], tokenizer)["prose"]
    assert found["unigram"] == pytest.approx(1.75, rel=0.01)
    # No compressor beats the entropy of a memoryless source.
    assert found["gzip"] > 1.75
    assert found["xz"] > 1.75


def test_a_unigram_model_of_other_text_is_worse(tmp_path, tokenizer):
    heldout = ["0012" * 500]
    right = write(tmp_path / "right", tokenizer, {"train": ["0012" * 500], "heldout": heldout})
    wrong = write(tmp_path / "wrong", tokenizer, {"train": ["3456" * 500], "heldout": heldout})
    assert right != wrong
    figures = [baselines(tmp_path / n, ["prose"], tokenizer)["all"] for n in ("right", "wrong")]
    assert figures[0]["unigram"] < 2.6 < figures[1]["unigram"]
    assert figures[0]["gzip"] == figures[1]["gzip"]


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=30).filter(any))
@settings(max_examples=50, deadline=None)
def test_no_fit_needs_fewer_bits_than_the_entropy(counts):
    counts_V = np.array(counts)
    frequencies = counts_V[counts_V > 0] / counts_V.sum()
    entropy = -counts_V.sum() * float(np.sum(frequencies * np.log2(frequencies)))
    assert unigram_bits(counts_V, counts_V) >= entropy - 1e-6
    # Without any training text the model is uniform.
    uniform = unigram_bits(np.zeros_like(counts_V), counts_V)
    assert uniform == pytest.approx(counts_V.sum() * math.log2(len(counts_V)))


@pytest.mark.parametrize(
    ("program", "name", "tolerance"),
    # xz is the same library; gzip has its own deflate, which differs from zlib's by a few bytes in ten thousand.
    [("xz", "xz", 0.0), ("gzip", "gzip", 0.001)],
)
def test_compressed_sizes_are_those_of_the_programs(tmp_path, tokenizer, program, name, tolerance):
    if shutil.which(program) is None:
        pytest.skip(f"no {program} program here")
    sources = {"prose": PROSE * 2, "more": [text.upper() for text in PROSE]}
    for source, texts in sources.items():
        write(tmp_path, tokenizer, {"train": [], "heldout": texts}, source=source)
    result = baselines(tmp_path, list(sources), tokenizer)
    sources["all"] = sources["prose"] + sources["more"]
    for source, texts in sources.items():
        data = "\n".join(texts).encode()
        size = len(
            subprocess.run(
                [program, "-9", "-c"], input=data, capture_output=True, check=True
            ).stdout
        )
        text_bytes = sum(len(text.encode()) for text in texts)
        assert result[source][name] == pytest.approx(8 * size / text_bytes, rel=tolerance)


def test_all_sources_together_are_one_text(tmp_path, tokenizer):
    write(tmp_path, tokenizer, {"train": PROSE, "heldout": PROSE[:2]}, source="one")
    write(tmp_path, tokenizer, {"train": PROSE, "heldout": PROSE[:2]}, source="two")
    result = baselines(tmp_path, ["one", "two"], tokenizer)
    assert result["one"] == result["two"]
    # The second half repeats the first, which a compressor of the whole sees and two of the halves do not.
    assert result["all"]["xz"] < 0.6 * result["one"]["xz"]
    assert list(result) == ["one", "two", "all"]


def test_a_source_without_held_out_text_is_named(tmp_path, tokenizer):
    write(tmp_path, tokenizer, {"train": PROSE, "heldout": []})
    with pytest.raises(SmoljaxError, match=r"source 'prose' has no held-out text.*heldout"):
        baselines(tmp_path, ["prose"], tokenizer)


def test_shards_of_another_tokenizer_are_refused(tmp_path, tokenizer):
    write(tmp_path / "shards", tokenizer, DOCUMENTS)
    other = tokenizers.train(PROSE[:2], tmp_path / "other", vocab_size=400)
    with pytest.raises(SmoljaxError, match="tokenizer"):
        baselines(tmp_path / "shards", ["prose"], other)


def test_baselines_load_no_accelerator_library():
    script = "import sys, smoljax.evaluation.baselines; print({'jax','flax','tensorflow'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
