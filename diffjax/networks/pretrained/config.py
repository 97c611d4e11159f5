"""Configurations of published networks: what is left out is filled in, what is not understood is refused."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from diffjax.networks.functional import Architecture, described


class Field(NamedTuple):
    """A field of a configuration: its default, and its allowed values where not all are."""

    default: Any
    allowed: tuple | None = None


def free(**defaults: Any) -> dict[str, Field]:
    """Fields of any value."""
    return {name: Field(default) for name, default in defaults.items()}


def only(**values: Any) -> dict[str, Field]:
    """Fields that must have the first of these values, or one of them."""
    choices = {name: value if isinstance(value, tuple) else (value,) for name, value in values.items()}
    return {name: Field(value[0], value) for name, value in choices.items()}


def read(config: Mapping[str, Any], fields: Mapping[str, Field]) -> dict[str, Any]:
    """All fields of a configuration.

    Raises ValueError for a field that is not known, or whose value is not supported: says what is.
    """
    name = config.get("_class_name")
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    unknown = {key: value for key, value in given.items() if key not in fields and value is not None}
    if unknown:
        raise ValueError(f"the configuration of {name} has fields that are not read: {unknown}")
    full = {key: given.get(key, field.default) for key, field in fields.items()}
    for key, field in fields.items():
        if field.allowed is not None and full[key] not in field.allowed:
            raise ValueError(f"{key} of {name} must be one of {field.allowed}, got {full[key]!r}")
    return full


def each(name: str, value: Any, count: int) -> list:
    """One value for every resolution, from one for all or a list of them."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} must have an entry for each of {count} resolutions, got {list(value)}")
    return list(value)


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The record from which `networks.build` makes the network again."""
    return described("published", config=json.dumps(dict(config), sort_keys=True))
