"""Config sections become dataclasses; a wrong field is named."""

import dataclasses

import pytest
from ml_collections import ConfigDict

from smoljax.configuration import build
from smoljax.errors import SmoljaxError


@dataclasses.dataclass(frozen=True)
class Section:
    num_layers: int
    weights: tuple = ()
    name: str = "x"


def test_lists_become_tuples_and_config_dicts_become_dicts():
    section = ConfigDict({"num_layers": 2, "weights": [[0, {"web": 1.0}]]})
    assert build(Section, section, "model") == Section(2, ((0, {"web": 1.0}),))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"num_layer": 2},
            r"config\.model\.num_layer is not a field of Section.*model\.num_layers",
        ),
        ({"num_layers": 2, "zzz": 1}, r"config\.model\.zzz.*it has name, num_layers, weights"),
        ({"name": "y"}, r"config\.model lacks num_layers"),
    ],
)
def test_a_wrong_field_is_named(values, message):
    with pytest.raises(SmoljaxError, match=message):
        build(Section, values, "model")
