"""From a config section (ml_collections, dict) to a frozen dataclass, with errors that name the field."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import TypeVar

from smoljax.errors import SmoljaxError

T = TypeVar("T")


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


def plain(value: object) -> object:
    """ConfigDicts become dicts and lists become tuples, all the way down."""
    if isinstance(value, Mapping) or hasattr(value, "to_dict"):
        return {key: plain(value[key]) for key in value}
    if isinstance(value, list | tuple):
        return tuple(plain(item) for item in value)
    return value
