"""Build dataclasses from objects of TOML and JSON, and refuse by name what does not fit a field."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from aq_jax.errors import ConfigError, FormatError

_SPELLED: Mapping[Any, str] = {
    bool: "true or false", int: "an integer", float: "a number", str: "a string", dict: "an object", list: "a list",
}  # fmt: skip
"""The types of fields that TOML and JSON can hold."""
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


class Fields:
    """The fields of a JSON object that another program wrote, each of which its reader knows, or refuses.

    Unless its reader says otherwise, a field that is null is as one that is not there. A field that nobody has asked
    for when `finish` is called is refused: nothing that a file says is left out.

    Args:
        given: The JSON object, such as that of config.json.
        where: The file's name, for errors.

    >>> fields = Fields({"width": 8, "eps": 1, "model_type": "bert", "bias": None}, "config.json")
    >>> fields.take("width", int), fields.take("eps", float, 1e-5), fields.take("bias", bool, True)
    (8, 1.0, True)
    >>> fields.leave("model_type")
    >>> fields.finish()
    """

    def __init__(self, given: Mapping[str, Any], where: str) -> None:
        self.where = where
        self._given = dict(given)
        self._known: set[str] = set()

    def take(self, name: str, kind: type, default: Any = ..., null: Any = ...) -> Any:
        """Return a field's value, or a default; numbers must be positive, and such that 32 bits hold them.

        Args:
            name: The field's name.
            kind: The type of its value.
            default: The value if it is not there; by default it must be.
            null: The value if it is null; by default that of one that is not there.

        Raises:
            FormatError: naming the field, what was found and what was wanted.
        """
        self._known.add(name)
        wanted = _POSITIVE.get(kind) or _SPELLED[kind]
        value = self._given.get(name)
        if value is None:
            value = default if name not in self._given or null is ... else null
            if value is ...:
                raise FormatError(f"{self.where}: no {name}; wanted {wanted}")
            return value
        if kind is float and type(value) is int and abs(value) < 2**53:
            value = float(value)
        if not _fits(value, kind) or not _is_usual(value):
            raise FormatError(f"{self.where}: {name} is {value!r}; wanted {wanted}")
        return value

    def choose(self, name: str, options: Iterable[str], default: Any = ...) -> str:
        """Return a field's value, which is one of these.

        Raises:
            FormatError: as `take`, and for another value.
        """
        value, options = self.take(name, str, default), tuple(options)
        if value not in options:
            raise FormatError(f"{self.where}: {name} is {value!r}; wanted {' or '.join(map(repr, options))}")
        return value

    def require(self, **allowed: object) -> None:
        """Check that fields, if they are there, have these values: others are not computed.

        Raises:
            FormatError: for another value.
        """
        for name, wanted in allowed.items():
            self._known.add(name)
            if self._given.get(name) not in (None, wanted):
                raise FormatError(f"{self.where}: {name} is {self._given[name]!r}; wanted {wanted!r}")

    def leave(self, *names: str) -> None:
        """Leave out fields that change nothing."""
        self._known.update(names)

    def finish(self) -> None:
        """Refuse fields that were not asked for.

        Raises:
            FormatError: naming all of them.
        """
        if more := sorted(name for name in self._given.keys() - self._known if self._given[name] is not None):
            said = ", ".join(f"{name} = {str(self._given[name])[:40]}" for name in more)
            raise FormatError(f"{self.where}: has {said}, which {'is' if len(more) == 1 else 'are'} not known here")


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


def _spell(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return " or ".join(_spell(arg) for arg in args if arg in _SPELLED or typing.get_origin(arg))
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin is tuple:
        return f"a list of {_spell(args[0]).split()[-1]}s"
    return _SPELLED.get(hint, str(hint))
