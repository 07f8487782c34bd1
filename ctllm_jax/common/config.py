"""From a nested mapping (an ml_collections config) to typed, frozen dataclasses: every key is known, none is missing.

The dataclass is the list of keys that a component reads, so an unknown key and an unused key are the same error.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from ctllm_jax.common.errors import UserError

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], where: str = "config") -> T:
    """Builds the dataclass `cls` from a mapping, recursively.

    Raises:
      UserError: an unknown or missing key, or a value of the wrong type, named with its full path.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; known keys: {', '.join(sorted(fields))}")
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{where}: key {missing[0]!r} is missing")
    arguments = {name: _convert(hints[name], value, f"{where}.{name}") for name, value in values.items()}
    try:
        return cls(**arguments)
    except ValueError as error:  # the dataclass's own checks
        raise UserError(f"{where}: {error}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        return _convert(next(option for option in options if option is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        _require(isinstance(value, Mapping), where, "a group of keys", value)
        return build(hint, value, where)
    if origin is tuple:
        _require(isinstance(value, (list, tuple)), where, "a list", value)
        return tuple(_convert(typing.get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        _require(isinstance(value, Mapping), where, "a group of keys", value)
        item = typing.get_args(hint)[1]
        return {key: _convert(item, entry, f"{where}.{key}") for key, entry in value.items()}
    if hint is float:
        _require(isinstance(value, (int, float)) and not isinstance(value, bool), where, "a number", value)
        return float(value)
    if hint is int:
        _require(isinstance(value, int) and not isinstance(value, bool), where, "a whole number", value)
    elif hint in (str, bool):
        _require(isinstance(value, hint), where, {str: "text", bool: "True or False"}[hint], value)
    return value


def _require(holds: bool, where: str, wanted: str, value: Any) -> None:
    if not holds:
        raise UserError(f"{where}: expected {wanted}, found {value!r}")
