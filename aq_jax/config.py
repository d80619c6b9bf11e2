"""What a user may ask for: the numerics of one tensor, the policy of a model, the contents of a TOML file.

QuantSpec             how one tensor lies on its grid (bits, granularity, symmetric)
QuantizationConfig    which spec, which solver, for which names
ConversionConfig      a TOML file: source, output and the above
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from aq_jax.errors import ConfigError

BITS: Mapping[str, int] = types.MappingProxyType({"int8": 8, "int4": 4, "int3": 3, "int2": 2})
SOLVER_NAMES = ("absmax", "minmax", "search")
QUANT_TYPES = (*BITS, "fp16", "none")
PUBLISHED_INT2_GROUP = 128
Compression = Literal["none", "zstd"]


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """The numerics of one quantized tensor: hashable, so that it can be a static part of a pytree.

    Args:
        bits: 8, 4, 3 or 2.
        per_channel: one grid for each index of axis 0.
        group_size: one grid for this many consecutive elements of the flattened tensor; 0 for none.
        symmetric: one constant zero point (0 or -0.5) instead of one for each grid.

    Neither channels nor groups means one grid for the tensor.

    >>> QuantSpec(bits=2, group_size=128).group_elements((384, 1536))
    128
    >>> QuantSpec(bits=8, per_channel=True).group_elements((384, 1536))
    1536
    """

    bits: int = 8
    per_channel: bool = False
    group_size: int = 0
    symmetric: bool = True

    @property
    def quant_type(self) -> str:
        return f"int{self.bits}"

    @property
    def quant_axis(self) -> int:
        """The format's column: -1 for one grid a tensor, 0 for channels and groups."""
        return 0 if self.per_channel or self.group_size else -1

    def group_elements(self, shape: tuple[int, ...]) -> int:
        """How many consecutive elements of the flattened tensor share a grid (at least 1)."""
        if self.group_size:
            return self.group_size
        return max(1, math.prod(shape[1:] if self.per_channel else shape))

    def group_count(self, shape: tuple[int, ...]) -> int:
        """How many grids a tensor of this shape has; one at least for a whole tensor, even an empty one."""
        if self.group_size:
            return -(-math.prod(shape) // self.group_size)
        return (shape[0] if shape else 1) if self.per_channel else 1


def _pick(what: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{what} = {value!r}: wanted one of {', '.join(allowed)}{hint}")


@dataclass(frozen=True, slots=True)
class Override:
    """Different numerics for the tensors whose name matches a pattern; what is left at None stays as the policy says.

    Args:
        pattern: a regular expression, found anywhere in the name.
        quant_type: as in `QuantizationConfig`, and so are the others; channels and groups exclude each other, so that
            naming one drops the other.

    Raises:
        ConfigError: if the pattern is no regular expression.

    >>> config = QuantizationConfig("int4", group_size=64, overrides=(Override(r"embed", quant_type="int8"),))
    >>> config.for_tensor("embed.word").quant_type, config.for_tensor("layer.0").quant_type
    ('int8', 'int4')
    """

    pattern: str
    quant_type: str | None = None
    per_channel: bool | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    solver: str | None = None
    on_nonfinite: str | None = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigError(f"override pattern {self.pattern!r} is no regular expression: {error}") from None


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """How the tensors of a model are quantized.

    Args:
        quant_type: int8, int4, int3, int2; fp16 (floats kept in float16); none (kept as they are).
        per_channel: one grid for each index of axis 0. Default: int8 yes, narrower widths no;
            a group size always means groups.
        group_size: consecutive elements of the flattened tensor that share a grid. Without channels and
            without a size, int2 takes groups of 128; other widths then have one grid for the tensor,
            unless `per_channel` was left open too, which means 128 below eight bits.
        symmetric: one constant zero point for the tensor.
        solver: absmax (symmetric), minmax (asymmetric) or search. Default: absmax or minmax at eight bits,
            search below.
        mixed_precision_layers: tensors whose name contains one of these are kept in float16, or in their
            own dtype where float16's largest error exceeds 2^-10 of the tensor's largest value.
        on_nonfinite: what to do with NaN, inf, and scales outside [2^-126, 2^126]:
            "error" refuses the tensor by name, "keep" keeps it unquantized.
        overrides: exceptions by name; the first match wins, and goes before mixed_precision_layers
            if it names a quant_type.

    Raises:
        ConfigError: for an unknown or contradictory value.

    >>> QuantizationConfig(quant_type="int2").spec
    QuantSpec(bits=2, per_channel=False, group_size=128, symmetric=True)
    """

    quant_type: str = "int8"
    per_channel: bool | None = None
    group_size: int = 0
    symmetric: bool = True
    solver: str | None = None
    mixed_precision_layers: tuple[str, ...] = ()
    on_nonfinite: str = "error"
    overrides: tuple[Override, ...] = field(default=())

    def __post_init__(self) -> None:
        # Lists are what TOML and most callers have; a config must be hashable.
        object.__setattr__(self, "mixed_precision_layers", tuple(self.mixed_precision_layers))
        object.__setattr__(self, "overrides", tuple(self.overrides))
        _pick("quant_type", self.quant_type, QUANT_TYPES)
        _pick("on_nonfinite", self.on_nonfinite, ("error", "keep"))
        if self.solver is not None:
            _pick("solver", self.solver, SOLVER_NAMES)
        if isinstance(self.group_size, bool) or not 0 <= self.group_size < 2**31:
            raise ConfigError(f"group_size = {self.group_size!r}: wanted 0 (no groups) or a size below 2^31")
        if self.group_size and self.per_channel:
            raise ConfigError(
                f"per_channel = true and group_size = {self.group_size} contradict each other: "
                "set one of them (groups run over the flattened tensor)"
            )
        if self.solver == "absmax" and not self.symmetric:
            raise ConfigError("solver = 'absmax' is symmetric: set symmetric = true, or solver = 'minmax' or 'search'")
        if self.solver == "minmax" and self.symmetric:
            raise ConfigError(
                "solver = 'minmax' is asymmetric: set symmetric = false, or solver = 'absmax' or 'search'"
            )
        for override in self.overrides:
            self._overridden(override)  # refuses contradictions now, not at the first tensor that matches

    @property
    def bits(self) -> int:
        """Bits of a code; 16 for fp16, 0 for none."""
        return BITS.get(self.quant_type, 16 if self.quant_type == "fp16" else 0)

    @property
    def spec(self) -> QuantSpec:
        """The numerics of every tensor that is quantized.

        Raises:
            ConfigError: if quant_type is fp16 or none.
        """
        if self.quant_type not in BITS:
            raise ConfigError(f"quant_type = {self.quant_type!r} has no grid: wanted one of {', '.join(BITS)}")
        bits, size, channels = BITS[self.quant_type], self.group_size, self.per_channel
        if not size:
            if channels is None:
                channels, size = (True, 0) if bits == 8 else (False, PUBLISHED_INT2_GROUP)
            elif not channels and bits == 2:
                size = PUBLISHED_INT2_GROUP
        return QuantSpec(bits=bits, per_channel=bool(channels) and not size, group_size=size, symmetric=self.symmetric)

    @property
    def solver_name(self) -> str:
        if self.solver is not None:
            return self.solver
        if self.quant_type == "int8":
            return "absmax" if self.symmetric else "minmax"
        return "search"

    def for_tensor(self, name: str) -> QuantizationConfig:
        """The config of one tensor: overrides and mixed precision applied, none left to apply."""
        plain = dataclasses.replace(self, overrides=(), mixed_precision_layers=())
        override = next((o for o in self.overrides if re.search(o.pattern, name)), None)
        if override is not None:
            plain = plain._overridden(override)
        if (override is None or override.quant_type is None) and any(k in name for k in self.mixed_precision_layers):
            return dataclasses.replace(plain, quant_type="fp16")
        return plain

    def _overridden(self, override: Override) -> QuantizationConfig:
        given = {
            f.name: value
            for f in dataclasses.fields(override)
            if f.name != "pattern" and (value := getattr(override, f.name)) is not None
        }
        # Channels and groups exclude each other: naming one drops the other.
        if given.get("group_size") and "per_channel" not in given:
            given["per_channel"] = None
        if given.get("per_channel") and "group_size" not in given:
            given["group_size"] = 0
        # A solver of the policy that cannot make the override's kind of grid gives way to the default.
        if "symmetric" in given and "solver" not in given and self.solver in ("absmax", "minmax"):
            given["solver"] = None
        try:
            return dataclasses.replace(self, overrides=(), mixed_precision_layers=(), **given)
        except ConfigError as error:
            raise ConfigError(f"override {override.pattern!r}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The resolved policy as JSON types: what a table's metadata records."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        out["mixed_precision_layers"] = list(self.mixed_precision_layers)
        out["overrides"] = [
            {k: v for k, v in dataclasses.asdict(override).items() if v is not None} for override in self.overrides
        ]
        out["solver"] = self.solver_name
        if self.quant_type in BITS:
            out |= {"per_channel": self.spec.per_channel, "group_size": self.spec.group_size}
        return out


@dataclass(frozen=True, slots=True)
class ConversionConfig:
    """A conversion, as a TOML file describes it.

    Args:
        source: a folder, or `package:NAME/FOLDER` for a folder inside an installed package.
        output: the table to write, .parquet or .arrow.
        quantization: None writes plain weights (schema V1).
        compression: "zstd" compresses the weights too (.parquet only).
        allow_pickle: read pytorch_model.bin, which can run code when loaded, if there is nothing safer.

    Raises:
        ConfigError: for an unknown compression, or a source or output that can be no name.

    >>> ConversionConfig("path/to/folder", "build/model.parquet", QuantizationConfig("int8")).compression
    'none'
    """

    source: str
    output: str
    quantization: QuantizationConfig | None = None
    compression: Compression = "none"
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        _pick("compression", self.compression, ("none", "zstd"))
        for key in ("source", "output"):
            path = getattr(self, key)
            if not path or "\0" in path:
                raise ConfigError(f"{key} = {path!r}: wanted the name of a file or folder")


def load_config(path: str | Path, sets: tuple[str, ...] = ()) -> ConversionConfig:
    """Read a TOML file that describes a conversion.

    Args:
        path: of the file.
        sets: assignments such as `quantization.group_size=64`, which go before the file.

    Raises:
        ConfigError: for a file that is no TOML, an unknown key (the known ones are listed), a wrong type.
        OSError: if the file cannot be read.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "c.toml")
    >>> _ = path.write_text('source = "model"\\noutput = "model.parquet"\\n[quantization]\\nquant_type = "int4"')
    >>> load_config(path, ("quantization.group_size=64",)).quantization.spec
    QuantSpec(bits=4, per_channel=False, group_size=64, symmetric=True)
    """
    raw = Path(path).read_bytes()
    try:
        tree = tomllib.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # tomllib's own, wrong utf-8, numbers of thousands of digits
        raise ConfigError(f"{path}: not a TOML file: {error}") from None
    try:
        for assignment in sets:
            _assign(tree, assignment)
        return parse_config(tree, where=str(path))
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:  # a value too long or too deep even to be shown in a message
        raise ConfigError(f"{path}: {error}") from None


def parse_config(tree: Mapping[str, Any], where: str = "config") -> ConversionConfig:
    """Build a ConversionConfig from nested dictionaries, as TOML gives them."""
    top = dict(tree)
    overrides = top.pop("override", [])
    quantization = top.pop("quantization", None)
    if not isinstance(overrides, list):
        raise ConfigError(f"{where}: override must be [[override]] tables, one for each exception")
    if quantization is None and overrides:
        raise ConfigError(f"{where}: [[override]] without [quantization]: there is nothing to override")
    if quantization is not None:
        parsed = [_build(Override, o, f"{where}: override {i + 1}") for i, o in enumerate(overrides)]
        quantization = _build(QuantizationConfig, quantization, f"{where}: quantization", overrides=tuple(parsed))
    known = ("source", "output", "compression", "allow_pickle", "quantization", "override")
    return _build(ConversionConfig, top, where, known=known, quantization=quantization)


def _assign(tree: dict[str, Any], assignment: str) -> None:
    """Put one `a.b=value` into the tree; the value is TOML, or else taken as a string."""
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


def _build(cls: type, given: object, where: str, known: tuple[str, ...] | None = None, **extra: object) -> Any:
    """A dataclass from a TOML table, refusing unknown keys and wrong types by name."""
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


def _fits(value: object, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return isinstance(value, str)  # which string is checked by the dataclass, with a better text
    if origin is tuple:
        return isinstance(value, list) and all(_fits(item, args[0]) for item in value)
    return type(value) is hint


def _spell(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return " or ".join(_spell(arg) for arg in args if arg is not type(None))
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin is tuple:
        return f"a list of {_spell(args[0]).split()[-1]}s"
    return {bool: "true or false", int: "an integer", str: "a string"}[hint]
