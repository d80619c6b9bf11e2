"""Read the TOML files of conversions and plans into dataclasses."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from aq_jax.config import (
    AllocationConfig,
    CalibrationConfig,
    ConversionConfig,
    Override,
    QuantizationConfig,
    ShardsConfig,
    TrainingConfig,
)
from aq_jax.config.fields import build
from aq_jax.errors import ConfigError

T = TypeVar("T")
_MAX_BYTES, _MAX_DOTS = 1 << 18, 32
"""The limits of a file, and of a line: tomllib's time grows with the square of a key's parts, and its memory much."""
_MAX_TEXT = 1000
PLAN = "# A plan of aq-jax"
"""The beginning of each plan that `[allocate]` saves."""


def load_config(path: str | Path, sets: tuple[str, ...] = ()) -> ConversionConfig:
    """Read a TOML file that describes a conversion.

    Args:
        path: The path of the file.
        sets: Assignments such as `quantization.group_size=64`, which override the file.

    Raises:
        ConfigError: for a file that is not TOML, an unknown key (the known ones are listed), a wrong type.
        OSError: if the file cannot be read.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "c.toml")
    >>> _ = path.write_text('source = "model"\\noutput = "model.parquet"\\n[quantization]\\nquant_type = "int4"')
    >>> load_config(path, ("quantization.group_size=64",)).quantization.spec
    QuantSpec(bits=4, per_channel=False, group_size=64, rotation=0)
    """
    return load_toml(path, sets, parse_config)


def load_toml(path: str | Path, sets: tuple[str, ...], parse: Callable[[dict[str, Any], str], T]) -> T:
    """Read a TOML file, make the assignments, and return what `parse` makes of its tables and its name.

    Raises:
        ConfigError, OSError: as `load_config`.
    """
    tree = _read(path)
    with _short_errors(path):
        for assignment in sets:
            _assign(tree, assignment)
        return parse(tree, str(path))


def load_plan(path: str | Path) -> tuple[Override, ...]:
    """Read a plan: a TOML file of [[override]] tables, and of nothing else.

    Raises:
        ConfigError: for a file that is not TOML, that is no plan, or does not exist.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "plan.toml")
    >>> _ = path.write_text('[[override]]\\npattern = "^embed$"\\nquant_type = "int4"')
    >>> load_plan(path)[0].quant_type
    'int4'
    """
    try:
        tree = _read(path)
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"plan = {str(path)!r}: no such file; wanted one that [allocate] saved") from None
    overrides = tree.pop("override", [])
    with _short_errors(path):
        if tree or not isinstance(overrides, list) or not overrides:
            found = ", ".join(tree) or ("no override" if not overrides else "another override")
            raise ConfigError(f"{path}: found {found}; wanted a plan: [[override]] tables, and nothing else")
        return _overrides(overrides, str(path))


def is_plan(path: str | Path) -> bool:
    """Tell whether a file is a plan: it begins as those that `[allocate]` saves, or `load_plan` takes it."""
    try:
        with Path(path).open("rb") as file:
            return file.read(len(PLAN)) == PLAN.encode() or bool(load_plan(path))
    except (ConfigError, OSError):
        return False


@contextmanager
def _short_errors(path: str | Path) -> Iterator[None]:
    """Shorten errors that show a file's values, and turn those that the values themselves cause into ConfigErrors."""
    try:
        yield
    except ConfigError as error:
        if len(text := str(error)) > _MAX_TEXT:
            raise ConfigError(f"{text[: _MAX_TEXT // 2]} … {text[-_MAX_TEXT // 2 :]}") from None
        raise
    except (ValueError, RecursionError) as error:  # a value too long or too deep to be shown at all
        raise ConfigError(f"{path}: {str(error)[:_MAX_TEXT]}") from None


def _read(path: str | Path) -> dict[str, Any]:
    with Path(path).open("rb") as file:
        raw = file.read(_MAX_BYTES + 1)  # no more, whatever size the file claims
    if len(raw) > _MAX_BYTES:
        raise ConfigError(f"{path}: has more than {_MAX_BYTES} bytes; wanted a TOML file, a config")
    for number, line in enumerate(raw.split(b"\n"), 1):
        if (dots := line.count(b".")) > _MAX_DOTS:
            raise ConfigError(f"{path}: line {number} has {dots} dots; wanted at most {_MAX_DOTS}: break it into lines")
    try:
        return tomllib.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # tomllib's own, wrong utf-8, numbers of thousands of digits
        raise ConfigError(f"{path}: not a TOML file: {str(error)[:_MAX_TEXT]}") from None


def _overrides(tables: list[Any], where: str) -> tuple[Override, ...]:
    return tuple(build(Override, table, f"{where}: override {i + 1}") for i, table in enumerate(tables))


def parse_config(tree: Mapping[str, Any], where: str = "config") -> ConversionConfig:
    """Build a ConversionConfig from the nested dictionaries of a TOML file."""
    top = dict(tree)
    overrides = top.pop("override", [])
    quantization = top.pop("quantization", None)
    if not isinstance(overrides, list):
        raise ConfigError(
            f"{where}: override = {str(overrides)[:60]}: wanted [[override]] tables, one for each exception"
        )
    if quantization is None and overrides:
        raise ConfigError(f"{where}: [[override]] without [quantization]: there is nothing to override")
    if quantization is not None:
        parsed = _overrides(overrides, where)
        quantization = build(QuantizationConfig, quantization, f"{where}: quantization", overrides=parsed)
    calibration = build(CalibrationConfig, top.pop("calibration", {}), f"{where}: calibration")
    tables = {"quantization": quantization, "calibration": calibration}
    for key, kind in (("allocate", AllocationConfig), ("train", TrainingConfig), ("shards", ShardsConfig)):
        given = top.pop(key, None)
        tables[key] = None if given is None else build(kind, given, f"{where}: {key}")
    known = ("source", "output", "compression", "allow_pickle", "requantize", "plan", *tables, "override")
    return build(ConversionConfig, top, where, known=known, **tables)


def _assign(tree: dict[str, Any], assignment: str) -> None:
    """Put one `a.b=value` into the tree; a value that is not TOML is taken as a string."""
    key, equals, text = assignment.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise ConfigError(f"--set {assignment!r}: wanted KEY=VALUE, such as quantization.group_size=64")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--set {assignment[:60]!r}: not a TOML value: {error}") from None
    node: Any = tree
    for part in parts[:-1]:
        node = node.setdefault(part, {}) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        raise ConfigError(f"--set {assignment!r}: {'.'.join(parts[:-1])} is no table")
    node[parts[-1]] = value
