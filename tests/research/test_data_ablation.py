"""What filters are worth: variants of a preset, and the whole comparison on a corpus half of which is noise."""

import json
import random
import shutil
import sysconfig
from pathlib import Path

import pytest

from smoljax.curation import presets
from smoljax.errors import SmoljaxError
from smoljax.research import data_ablation
from smoljax.research.data_ablation import AblationConfig, Outcome, variants_of


def test_variants_of_a_preset():
    preset = {
        "order": ("extract", "language", "gopher_quality", "dedup"),
        "gopher_quality": {"min_words": 30},
        "by_language": {"fr": {"gopher_quality": {"min_mean_word_length": 2}}},
    }
    variants = variants_of(preset)
    assert list(variants) == ["raw", "language", "gopher_quality", "dedup", "all"]
    assert variants["raw"] == {"order": ("extract",)}
    assert variants["language"] == {"order": ("extract", "language")}
    assert variants["gopher_quality"] == {
        "order": ("extract", "gopher_quality"),
        "gopher_quality": {"min_words": 30},
        "by_language": {"fr": {"gopher_quality": {"min_mean_word_length": 2}}},
    }
    assert variants["all"] == preset


def test_every_variant_of_every_preset_is_a_preset():
    from smoljax.curation import chain

    for name, preset in presets.defaults().items():
        for variant, stages in variants_of(preset).items():
            chain.check(f"{name}.{variant}", stages)


def test_the_gain_is_paired_by_seed():
    """Seeds differ more than variants do; their differences do not."""
    raw = Outcome("raw", 10, 100, 1.0, (2.0, 3.0, 4.0))
    better = Outcome("dedup", 9, 90, 1.1, (1.9, 2.9, 3.9))
    row = data_ablation.table([raw, better]).splitlines()[3]
    assert row.endswith("| +0.1000 ± 0.0000 |")
    assert "± 2.4841" in row  # Of the variant alone: 4.3027 / sqrt(3).


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> dict:
    """Half of the pages are Python of the standard library, half are generated tables; other modules are scored."""
    folder = tmp_path_factory.mktemp("pages")
    library = Path(sysconfig.get_path("stdlib"))
    draw = random.Random(0)
    for number, path in enumerate(sorted(library.glob("email/*.py"))):
        shutil.copy(path, folder / f"{number:03d}.py")
        table = "\n".join(
            " ".join(str(draw.randrange(10**6)) for _ in range(12))
            for _ in range(path.stat().st_size // 80)
        )
        (folder / f"{number:03d}_table.py").write_text(f"# automatically generated\n{table}\n")
    from smoljax.command_line import load_config

    config = load_config("tests/tiny_config.py")
    config["curation"] = {
        "recipe": "data/files.py",
        "arguments": {
            "patterns": {"pages": f"{folder}/*.py", "scored": f"{library}/json/*.py"},
            "presets": {"pages": "code", "scored": "scored"},
        },
        "presets": {**presets.defaults(), "scored": {"order": ("extract",)}},
    }
    config["training"] |= {
        "num_steps": 40,
        "eval_every": 40,
        "checkpoint_every": 40,
        "eval_batches": 1000,
    }
    config["ablation"] = {
        "preset": "code",
        "heldout": ("scored",),
        "variants": ("raw", "code_quality"),
        "seeds": 2,
    }
    return config


def test_a_filter_that_removes_noise_is_worth_it(config, tmp_path, monkeypatch):
    raw, filtered = data_ablation.ablate(config, tmp_path)
    modules = len(list((Path(sysconfig.get_path("stdlib")) / "email").glob("*.py")))
    assert (raw.variant, raw.documents) == ("raw", 2 * modules)
    assert filtered.documents <= modules
    assert min(raw.bits_per_byte) - max(filtered.bits_per_byte) > 0.1
    assert raw.bits_per_byte[0] != raw.bits_per_byte[1]
    data = config["data"]
    assert filtered.epochs == pytest.approx(
        40 * data["batch_size"] * data["seq_len"] / filtered.tokens
    )
    written = json.loads((tmp_path / "ablation/ablation.json").read_text())
    assert [row["variant"] for row in written["variants"]] == ["raw", "code_quality"]
    assert (tmp_path / "ablation/ablation.png").stat().st_size > 5000

    def refused(*_):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(data_ablation, "_train_once", refused)
    assert data_ablation.ablate(config, tmp_path) == [raw, filtered]
    changed = {**config, "optimizer": {**config["optimizer"], "learning_rate": 1e-3}}
    with pytest.raises(AssertionError, match="trained again"):
        data_ablation.ablate(changed, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "wep"}, "config.ablation.preset is 'wep'"),
        ({"variants": ("raw", "gopher")}, "config.ablation.variants names 'gopher'"),
        (
            {"heldout": ("other",)},
            "config.ablation.heldout names .other.: it must be a source of another preset",
        ),
        ({"heldout": ("pages",)}, "config.ablation.heldout names .pages.: it must be"),
    ],
)
def test_what_is_not_there_is_named(config, tmp_path, change, message):
    with pytest.raises(SmoljaxError, match=message):
        data_ablation.ablate({**config, "ablation": {**config["ablation"], **change}}, tmp_path)


def test_one_seed_is_refused():
    with pytest.raises(SmoljaxError, match="seeds is 1"):
        AblationConfig(preset="fast", heldout=("clean",), seeds=1)
    with pytest.raises(SmoljaxError, match="heldout is empty"):
        AblationConfig(preset="fast", heldout=())
