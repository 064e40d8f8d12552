"""Every config loads, builds, and says what its golden text says."""

import runpy

import pytest

from smoljax import configuration, optim
from smoljax.command_line import load_config
from smoljax.model import ModelConfig
from smoljax.parallel import MeshConfig
from smoljax.training import TrainingConfig
from tests.golden.flatten import CONFIGS, flattened_text, golden_path

SECTIONS = {
    "model": ModelConfig,
    "optimizer": optim.OptimizerConfig,
    "training": TrainingConfig,
    "mesh": MeshConfig,
}
NAMES = [path.stem for path in CONFIGS]


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_the_golden_text_is_up_to_date(path):
    assert flattened_text(path) == golden_path(path).read_text(encoding="utf-8"), (
        "a config changed; if it was meant, run `make golden` and commit the difference"
    )


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_every_section_builds(path):
    config = load_config(str(path))
    for name, cls in SECTIONS.items():
        configuration.build(cls, config[name], name)


@pytest.mark.parametrize(
    ("name", "num_params"),
    [
        ("smollm3_3b", 3_075_098_624),  # transformers' SmolLM3 on the meta device
        ("smollm3_135m", 134_515_008),  # as published for SmolLM2-135M
        ("smollm3_350m", 361_821_120),  # as published for SmolLM2-360M
    ],
)
def test_parameter_counts_are_the_published_ones(name, num_params):
    config = load_config(f"configs/{name}.py")
    assert configuration.build(ModelConfig, config["model"], "model").num_params == num_params


def test_smollm3_3b_learns_at_the_published_rate():
    """nanotron's lambda: warm-up lr*step/2000; decay lr*(522000-(step-4198001))/522000; steps counted from 1."""
    config = load_config("configs/smollm3_3b.py")
    schedule = optim.learning_rate_schedule(
        configuration.build(optim.OptimizerConfig, config["optimizer"], "optimizer"),
        config["training"]["num_steps"],
    )
    published = {
        1_000: 1e-4,
        2_000: 2e-4,
        4_198_001: 2e-4,
        4_459_001: 1e-4,
        4_720_000: 2e-4 * (522_000 - (4_720_000 - 4_198_001)) / 522_000,
    }
    for step, rate in published.items():
        assert float(schedule(step)) == pytest.approx(rate, rel=1e-6), step


def test_smollm3_3b_long_is_the_published_stage():
    """long_context_32k_to_64.yaml: 22,000 steps of 36 sequences, theta 5e6; 1,000 steps up to 2e-5, then a cosine of 21,000 to 0."""
    config = load_config("configs/smollm3_3b_long.py")
    data, num_steps = config["data"], config["training"]["num_steps"]
    assert data["batch_size"] * data["seq_len"] == 2_359_296
    assert num_steps == 22_000
    assert config["model"]["rope_theta"] == 5e6
    schedule = optim.learning_rate_schedule(
        configuration.build(optim.OptimizerConfig, config["optimizer"], "optimizer"), num_steps
    )
    published = {500: 1e-5, 1_000: 2e-5, 6_250: 1e-5 * (1 + 0.5**0.5), 11_500: 1e-5}
    for step, rate in published.items():
        assert float(schedule(step)) == pytest.approx(rate, rel=1e-5), step
    assert float(schedule(22_000)) == 0.0


def test_smollm3_mixtures_sum_to_what_was_published():
    stages = runpy.run_path("data/smollm3_mixtures.py")["STAGES"]
    assert [len(mixture) for _, mixture in stages] == [41, 46, 56]
    assert [round(sum(mixture.values()), 5) for _, mixture in stages] == [1.0, 1.00005, 1.00565]
    assert [start + 1 for start, _ in stages] == [1, 3_450_001, 4_198_001]
    languages = ("fra", "spa", "deu", "ita", "por")
    shares = [sum(mixture[f"fw2_{name}"] for name in languages) for _, mixture in stages]
    assert [round(share, 4) for share in shares] == [0.0785, 0.0797, 0.0800]
