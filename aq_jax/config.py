"""What a user may ask for: the numerics of one tensor, the policy of a model, a whole conversion.

QuantSpec             how one tensor lies on its grid (bits, granularity, symmetric, rotation)
QuantizationConfig    which spec, which solver, for which names
CalibrationConfig     on which text calibrated solvers run the model
AllocationConfig      how many bits a weight, or how good a model, widths are chosen for
TrainingConfig        how long calibrated weights are trained
ConversionConfig      source, output and the above: what a TOML file holds (`configfile`)
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from aq_jax.errors import ConfigError

BITS: Mapping[str, int] = types.MappingProxyType({"int8": 8, "int4": 4, "int3": 3, "int2": 2})
SOLVER_NAMES = ("absmax", "minmax", "search", "gptq")
QUANT_TYPES = (*BITS, "fp16", "none")
PUBLISHED_INT2_GROUP = 128
LARGEST_ROTATION = 128
Compression = Literal["none", "zstd"]


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """The numerics of one quantized tensor: hashable, so that it can be a static part of a pytree.

    Args:
        bits: 8, 4, 3 or 2.
        per_channel: one grid for each index of axis 0.
        group_size: one grid for this many consecutive elements of the flattened tensor; 0 for none.
        symmetric: one constant zero point (0 or -0.5) instead of one for each grid.
        rotation: the block in which the last axis was multiplied by a Hadamard matrix before; 0 for none
            (see `aq_jax.hadamard`).

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
    rotation: int = 0

    @property
    def quant_type(self) -> str:
        return f"int{self.bits}h" if self.rotation else f"int{self.bits}"

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
    rotate: bool | None = None
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
        solver: absmax (symmetric), minmax (asymmetric), search, or gptq, which is calibrated: `convert` runs the
            model on text for it. Default: absmax or minmax at eight bits, search below.
        rotate: multiply blocks of the last axis by a Hadamard matrix first, which spreads outliers, and undo it where
            the weight is used. Below eight bits only; tensors whose last axis is odd are left as they are.
        mixed_precision_layers: tensors whose name contains one of these are kept in float16, or in their
            own dtype where float16's largest error exceeds 2^-10 of the tensor's largest value.
        on_nonfinite: what to do with NaN, inf, and scales outside [2^-126, 2^126]:
            "error" refuses the tensor by name, "keep" keeps it unquantized.
        overrides: exceptions by name; the first match wins, and goes before mixed_precision_layers
            if it names a quant_type.

    Raises:
        ConfigError: for an unknown or contradictory value.

    >>> QuantizationConfig(quant_type="int2").spec
    QuantSpec(bits=2, per_channel=False, group_size=128, symmetric=True, rotation=0)
    """

    quant_type: str = "int8"
    per_channel: bool | None = None
    group_size: int = 0
    symmetric: bool = True
    solver: str | None = None
    rotate: bool = False
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
        if self.rotate and self.quant_type == "int8":
            raise ConfigError("rotate = true: the format has no rotated int8; leave rotate out, or take int4 or less")
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
    def calibrated(self) -> bool:
        """Whether any tensor may be solved on the running model."""
        return "gptq" in (self.solver, *(override.solver for override in self.overrides))

    def spec_for(self, shape: tuple[int, ...]) -> QuantSpec:
        """The numerics of a tensor of this shape: `spec`, and the block in which it is rotated.

        That is the largest power of two up to 128 that divides the last axis, or 0 if the axis is odd.

        >>> QuantizationConfig("int4", rotate=True).spec_for((8, 96)).rotation
        32
        """
        length = shape[-1] if self.rotate and shape else 0
        block = min(length & -length, LARGEST_ROTATION)
        return dataclasses.replace(self.spec, rotation=block if block > 1 else 0)

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
        if given.get("quant_type") == "int8" and "rotate" not in given:
            given["rotate"] = False  # which the format does not have
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
class CalibrationConfig:
    """On what a model is run to learn what its weights are multiplied by.

    Args:
        text: a file of UTF-8 text, a sentence or a paragraph a line. Default: English prose of Python's own
            documentation, which is always there, and narrow: text like that which the model will see is better.
        sentences: how many lines are drawn, at most.
        max_tokens: of a line; the rest is cut.
        seed: of the draw.
        correction: how far weights move, before they are rounded, towards those that give the float model's outputs
            from the quantized model's inputs: 0 not at all, 1 all the way.
        damping: what is added to the diagonal of the inputs' second moment, of its mean.

    Raises:
        ConfigError: for numbers out of their range.

    >>> CalibrationConfig(sentences=256).max_tokens
    128
    """

    text: str = ""
    sentences: int = 1024
    max_tokens: int = 128
    seed: int = 0
    correction: float = 0.5
    damping: float = 0.01

    def __post_init__(self) -> None:
        for key, least, most in (
            ("sentences", 1, 2**24), ("max_tokens", 3, 2**20), ("seed", 0, 2**32 - 1),
            ("correction", 0, 1), ("damping", 1e-6, 1),
        ):  # fmt: skip
            if not least <= getattr(self, key) <= most:
                raise ConfigError(f"{key} = {getattr(self, key)!r}: wanted {least} to {most}")


@dataclass(frozen=True, slots=True)
class AllocationConfig:
    """For what the width of each tensor is chosen: just one of `target_bpw` and `min_cosine`.

    Args:
        target_bpw: bits a weight, at most, with scales and zero points, over every tensor that the model uses and that
            could be quantized; those whose type the config says count too.
        min_cosine: between the float model's outputs and the quantized one's, as predicted; the fewest bits for it.
        widths: what is chosen from: integer types, and fp16.
        sentences: on how many lines of `calibration.text`, beside those of the calibration, each tensor's error is
            measured; four times as many of those are run before, and twice as many others after.
        save: a file for the plan, which a config's `plan` takes.

    Raises:
        ConfigError: for numbers out of their range, and for both goals or none.

    >>> AllocationConfig(target_bpw=2.75).widths
    ('int2', 'int3', 'int4', 'int8')
    """

    target_bpw: float | None = None
    min_cosine: float | None = None
    widths: tuple[str, ...] = ("int2", "int3", "int4", "int8")
    sentences: int = 64
    save: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(dict.fromkeys(self.widths)))
        if (self.target_bpw is None) == (self.min_cosine is None):
            found = "neither" if self.target_bpw is None else "both"
            raise ConfigError(f"found {found} of target_bpw and min_cosine; wanted one of them, such as 2.75 or 0.95")
        if self.target_bpw is not None and not 0 < self.target_bpw <= 64:
            raise ConfigError(f"target_bpw = {self.target_bpw!r}: wanted bits a weight, above 0 and at most 64")
        if self.min_cosine is not None and not 0 < self.min_cosine < 1:
            raise ConfigError(f"min_cosine = {self.min_cosine!r}: wanted a number between 0 and 1")
        if not self.widths:
            raise ConfigError("widths = []: wanted one or more to choose from")
        for width in self.widths:
            _pick("widths", width, (*BITS, "fp16"))
        if not 1 <= self.sentences <= 2**20:
            raise ConfigError(f"sentences = {self.sentences!r}: wanted 1 to {2**20}")
        if "\0" in self.save:
            raise ConfigError(f"save = {self.save!r}: wanted the name of a file")


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """How long, and how fast, calibrated weights of an encoder are trained to give what the float model gives.

    Args:
        steps: at most; the learning rate falls to its end over them.
        minutes: at most, after calibration; then the learning rate falls over them instead, and the result depends on
            how fast the machine is. 0 for no limit.
        sentences: how many lines of `calibration.text`, at most; those of the calibration are among them.
        held_out: how many other lines the best weights of the run are chosen by; a tenth of all, if there are few.
        patience: of the run's 20 evaluations on those, how many may pass without a better one; then the run goes on
            with its last fifth, in which the learning rate is low.
        batch_tokens: tokens of a step, padding counted; at least one text.
        learning_rate: how far a code may move in a step, of the distance between two codes.

    Raises:
        ConfigError: for numbers out of their range.

    >>> TrainingConfig(steps=500, minutes=0).learning_rate
    0.005
    """

    steps: int = 3000
    minutes: float = 50
    sentences: int = 2**17
    held_out: int = 256
    patience: int = 10
    batch_tokens: int = 2048
    learning_rate: float = 0.005

    def __post_init__(self) -> None:
        for key, least, most in (
            ("steps", 1, 2**24), ("minutes", 0, 2**20), ("sentences", 2, 2**24), ("held_out", 1, 2**20),
            ("patience", 1, 20), ("batch_tokens", 16, 2**20), ("learning_rate", 1e-6, 1),
        ):  # fmt: skip
            if not least <= getattr(self, key) <= most:
                raise ConfigError(f"{key} = {getattr(self, key)!r}: wanted {least} to {most}")


@dataclass(frozen=True, slots=True)
class ConversionConfig:
    """A conversion, as a TOML file describes it.

    Args:
        source: a folder, or `package:NAME/FOLDER` for a folder inside an installed package.
        output: the table to write, .parquet or .arrow.
        quantization: None writes plain weights (schema V1).
        calibration: for solver = "gptq".
        allocate: chooses the width of each tensor; needs solver = "gptq".
        plan: a file of [[override]] tables, as `allocate.save` names one, that go before those of `quantization`.
        train: trains what was calibrated; needs solver = "gptq", and an encoder.
        compression: "zstd" compresses the weights too (.parquet only).
        allow_pickle: read pytorch_model.bin, which can run code when loaded, if there is nothing safer.

    Raises:
        ConfigError: for an unknown compression, a source or output that can be no name, and an allocation or a plan
            of what is not quantized, or both.

    >>> ConversionConfig("path/to/folder", "build/model.parquet", QuantizationConfig("int8")).compression
    'none'
    """

    source: str
    output: str
    quantization: QuantizationConfig | None = None
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    allocate: AllocationConfig | None = None
    plan: str = ""
    train: TrainingConfig | None = None
    compression: Compression = "none"
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        _pick("compression", self.compression, ("none", "zstd"))
        for key in ("source", "output"):
            path = getattr(self, key)
            if not path or "\0" in path:
                raise ConfigError(f"{key} = {path!r}: wanted the name of a file or folder")
        if "\0" in self.plan:
            raise ConfigError(f"plan = {self.plan!r}: wanted the name of a file")
        if self.plan and self.allocate is not None:
            raise ConfigError(f"plan = {self.plan!r} and [allocate]: a plan is used or made; leave one of them out")
        if self.plan and self.quantization is None:
            raise ConfigError(f"plan = {self.plan!r} without [quantization]: there is nothing that it could change")
        if self.train is not None and not (self.quantization is not None and self.quantization.calibrated):
            found = "no [quantization]" if self.quantization is None else "no tensor of that solver"
            raise ConfigError(f'[train]: found {found}; wanted quantization.solver = "gptq", whose weights are trained')
        solver = None if self.quantization is None else self.quantization.solver
        if self.allocate is not None and solver != "gptq":
            found = "no [quantization]" if self.quantization is None else f"solver = {solver!r}"
            raise ConfigError(
                f"[allocate]: found {found}; widths are chosen by what they do to the running model, for which "
                'quantization.solver = "gptq" is wanted'
            )
