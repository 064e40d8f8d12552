"""From a config section (ml_collections, dict) to a frozen dataclass, with errors that name the field."""

import dataclasses
import difflib
import importlib
import types
import typing
from collections.abc import Mapping
from typing import TypeVar

from smoljax.errors import SmoljaxError

T = TypeVar("T")

# The class of each section of a config; imported when it is needed, because some bring jax.
SECTIONS = {
    "curation": "smoljax.curation:CurationConfig",
    "quality": "smoljax.quality.config:QualityConfig",
    "tokenizer": "smoljax.tokens.config:TokenizerConfig",
    "shards": "smoljax.tokens.config:ShardsConfig",
    "data": "smoljax.input_pipeline:MixtureConfig",
    "model": "smoljax.model:ModelConfig",
    "mesh": "smoljax.parallel:MeshConfig",
    "optimizer": "smoljax.optim:OptimizerConfig",
    "training": "smoljax.training.config:TrainingConfig",
    "evaluation": "smoljax.evaluation.config:EvaluationConfig",
    "generation": "smoljax.evaluation.sampling:GenerationConfig",
    "ablation": "smoljax.research.data_ablation:AblationConfig",
}


def build(cls: type[T], section: Mapping, name: str) -> T:
    """Makes the dataclass `cls` from the fields of one config section.

    Args:
      cls: a frozen dataclass.
      section: a mapping of field names to values; lists and nested mappings become tuples and dicts.
      name: the section's dotted name in the config, for the errors ("model").

    Raises:
      SmoljaxError: a field is unknown or missing, or the dataclass refuses a value.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {key: plain(section[key]) for key in section}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = (
                f"did you mean {name}.{near[0]}?" if near else f"it has {', '.join(sorted(fields))}"
            )
            raise SmoljaxError(f"config.{name}.{key} is not a field of {cls.__name__}: {hint}")
    missing = [
        field.name
        for field in fields.values()
        if field.name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise SmoljaxError(f"config.{name} lacks {', '.join(missing)}, which {cls.__name__} needs")
    return cls(**values)


def defaults(name: str) -> dict[str, tuple[object, type]]:
    """Default value and type of every field with a default in a section's class; of none, for a section that has no class.

    The type of a field that may be None is the other one.
    """
    if name not in SECTIONS:
        return {}
    module, _, cls = SECTIONS[name].partition(":")
    cls = getattr(importlib.import_module(module), cls)
    hints = typing.get_type_hints(cls)
    found = {}
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):
            kind = next(option for option in typing.get_args(kind) if option is not type(None))
        kind = typing.get_origin(kind) or kind
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default, kind
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory(), kind
    return found


def plain(value: object) -> object:
    """ConfigDicts become dicts and lists become tuples, all the way down."""
    if isinstance(value, Mapping) or hasattr(value, "to_dict"):
        return {key: plain(value[key]) for key in value}
    if isinstance(value, list | tuple):
        return tuple(plain(item) for item in value)
    return value
