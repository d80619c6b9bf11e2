"""Build dataclasses from objects of TOML and JSON, and refuse by name what does not fit a field."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from aq_jax.errors import ConfigError, FormatError

C = TypeVar("C")
_SPELLED = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
"""The types of fields that TOML can hold."""
_POSITIVE = {int: "a positive integer", float: "a positive number"}


def build(cls: type, given: object, where: str, known: tuple[str, ...] | None = None, **extra: object) -> Any:
    """Make a dataclass of a table that a user wrote, which may have the fields of the dataclass and no others.

    Args:
        cls: The dataclass.
        given: The table.
        where: The beginning of errors.
        known: The keys that errors list; by default the fields.
        extra: Fields that the table does not give.

    Raises:
        ConfigError: for unknown, missing and refused keys, and for values of another type.

    >>> from aq_jax.config import CalibrationConfig
    >>> build(CalibrationConfig, {"seed": 3}, "c.toml: calibration").seed
    3
    """
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: wanted a table of keys, found {given!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.name not in extra}
    for key, value in given.items():
        if key not in fields:
            names = known or tuple(fields)
            near = difflib.get_close_matches(key, names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{where}: unknown key {key!r}; known are {', '.join(names)}{hint}")
        if not _fits(value, hints[key]):
            raise ConfigError(f"{where}: {key} = {value!r}: wanted {_spell(hints[key])}")
    missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in given]
    if missing:
        raise ConfigError(f"{where}: missing {', '.join(missing)}")
    try:
        return cls(**given, **extra)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def read_fields(cls: type[C], given: Mapping[str, Any], where: str, allowed: Mapping[str, tuple[Any, ...]]) -> C:
    """Make a dataclass of a JSON object that another program wrote, whose other keys are not looked at.

    Numbers must be positive, and such that 32 bits hold them.

    Args:
        cls: A dataclass of numbers and strings; fields without a default must be there.
        given: The JSON object, such as that of config.json.
        where: The file's name, for errors.
        allowed: The values that a key may have, if it is there.

    Raises:
        FormatError: naming the key, what was found and what was wanted.

    >>> @dataclasses.dataclass
    ... class Sizes:
    ...     width: int
    ...     eps: float = 1e-5
    >>> read_fields(Sizes, {"width": 8, "eps": 1, "model_type": "bert"}, "config.json", {})
    Sizes(width=8, eps=1.0)
    """
    for name, values in allowed.items():
        if name in given and given[name] not in values:
            raise FormatError(f"{where}: {name} is {given[name]!r}; wanted {' or '.join(map(repr, values))}")
    hints = typing.get_type_hints(cls)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        wanted = _spell(hints[field.name], _POSITIVE)
        if field.name in given:
            value = given[field.name]
            if hints[field.name] is float and type(value) is int and abs(value) < 2**53:
                value = float(value)
            if not _fits(value, hints[field.name]) or not _is_usual(value):
                raise FormatError(f"{where}: {field.name} is {value!r}; wanted {wanted}")
            found[field.name] = value
        elif field.default is dataclasses.MISSING:
            raise FormatError(f"{where}: no {field.name}; wanted {wanted}")
    return cls(**found)


def _is_usual(value: object) -> bool:
    """Tell whether a number is positive, and finite or below 2^31; other values always are usual."""
    if type(value) is float:
        return 0 < value < math.inf
    return type(value) is not int or 0 < value < 2**31


def _fits(value: object, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return isinstance(value, str)  # which string is checked by the dataclass, with a better text
    if origin is tuple:
        return isinstance(value, list) and all(_fits(item, args[0]) for item in value)
    return type(value) is hint or (hint is float and type(value) is int)


def _spell(hint: Any, spelled: Mapping[Any, str] = _SPELLED) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return " or ".join(_spell(arg, spelled) for arg in args if arg in _SPELLED or typing.get_origin(arg))
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin is tuple:
        return f"a list of {_spell(args[0]).split()[-1]}s"
    return spelled.get(hint) or _SPELLED.get(hint, str(hint))
