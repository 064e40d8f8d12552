"""The encoders against transformers: hidden states of tiny models with the same weights (make_golden.py wrote them).

B batch, S sequence, D width
"""

import dataclasses
import json

import numpy as np
import pytest

from smoljax.errors import SmoljaxError
from smoljax.quality import bert
from tests.quality import material
from tests.quality.material import FAMILIES

TOLERANCE = 1e-5


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def folder(tmp_path, family):
    return material.write_encoder(tmp_path / "encoder", family)


def difference(config, params, expected, *, mask=None) -> float:
    """The largest between our hidden states and transformers', at tokens."""
    mask_BS = expected["mask"] if mask is None else mask
    hidden_BSD = np.asarray(bert.encode(config, params, expected["tokens"], mask_BS))
    return float(np.abs(hidden_BSD - expected["hidden"])[expected["mask"]].max())


def test_hidden_states_are_those_of_transformers(family, folder):
    config, params = bert.load(folder)
    expected = material.golden(family)
    assert difference(config, params, expected) < TOLERANCE
    everything = np.ones_like(expected["mask"])
    assert difference(config, params, expected, mask=everything) > 0.01


def test_wrong_positions_and_wrong_epsilon_are_seen(tmp_path):
    config, params = bert.load(material.write_encoder(tmp_path / "encoder", "roberta"))
    expected = material.golden("roberta")
    assert config.first_position == 2
    for wrong in ({"first_position": 0}, {"norm_eps": 1e-3}):
        assert difference(dataclasses.replace(config, **wrong), params, expected) > 10 * TOLERANCE


def test_what_is_read_from_the_folder(tmp_path):
    found = {name: bert.load(material.write_encoder(tmp_path / name, name))[0] for name in FAMILIES}
    assert [found[name].pooling for name in FAMILIES] == ["mean", "cls", "mean"]
    assert [found[name].normalize for name in FAMILIES] == [True, True, False]
    assert [found[name].num_positions for name in FAMILIES] == [48, 46, 46]
    assert {config.max_tokens for config in found.values()} == {40}


def test_pooling_as_earlier_versions_wrote_it(tmp_path):
    folder = material.write_encoder(tmp_path / "encoder", "bert")
    modes = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    assert bert.load(folder)[0].pooling == "cls"


def test_a_plain_model_is_pooled_by_the_mean(tmp_path):
    folder = material.write_encoder(tmp_path / "encoder", "bert")
    (folder / "modules.json").unlink()
    config, _ = bert.load(folder)
    assert (config.pooling, config.normalize, config.max_tokens) == ("mean", True, 40)


def test_prefixed_names_and_buffers_of_old_files(tmp_path):
    positions = {"bert.embeddings.position_ids": np.arange(48, dtype=np.int64)[None]}
    old = material.write_encoder(tmp_path / "old", "bert", prefix="bert.", extra=positions)
    config, params = bert.load(old)
    assert difference(config, params, material.golden("bert")) < TOLERANCE


def edited(folder, name, **fields):
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("config.json", {"hidden_act": "relu"}, r"hidden_act is 'relu', this encoder knows 'gelu'"),
        ("config.json", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("config.json", {"is_decoder": True}, "is_decoder is True"),
        ("config.json", {"num_hidden_layers": 3}, r"no tensor encoder\.layer\.2\.attention"),
        ("config.json", {"intermediate_size": 64}, r"has shape \[48, 32\], expected \[64, 32\]"),
        ("1_Pooling/config.json", {"pooling_mode": "max"}, r"pools by \['max'\]"),
    ],
)
def test_what_the_encoder_does_not_do_is_refused(tmp_path, name, fields, message):
    folder = material.write_encoder(tmp_path / "encoder", "bert")
    edited(folder, name, **fields)
    with pytest.raises(SmoljaxError, match=message):
        bert.load(folder)


def test_unknown_modules_are_refused(tmp_path):
    folder = material.write_encoder(tmp_path / "encoder", "bert")
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(
        json.dumps([*modules, {"type": "models.Dense", "path": ""}])
    )
    with pytest.raises(SmoljaxError, match="modules Transformer, Pooling, Normalize, Dense"):
        bert.load(folder)
    (folder / "modules.json").write_text("[3]")
    with pytest.raises(SmoljaxError, match="not a list of modules"):
        bert.load(folder)
