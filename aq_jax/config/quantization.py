"""The policy of a model: which numerics each tensor gets, and which quantizer, by name."""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass, field
from typing import Any, Protocol

from aq_jax.codes import CODES, Code
from aq_jax.config.spec import LARGEST_ROTATION, QuantSpec
from aq_jax.errors import ConfigError

EXPERTS = "experts"


class NamedQuantizer(Protocol):
    """A quantizer, of which a config only knows the name (see `quantizers.Quantizer`)."""

    @property
    def name(self) -> str: ...


def widths() -> tuple[str, ...]:
    """List the quant_types of codes that a config may name; `rotate` says whether they are rotated."""
    return tuple(name for name, code in CODES.items() if name == code.plain_name and not code.read_only)


def check_choice(what: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{what} = {value!r}: wanted one of {', '.join(allowed)}{hint}")


def check_range(config: object, **ranges: tuple[float, float]) -> None:
    for key, (least, most) in ranges.items():
        if not least <= (value := getattr(config, key)) <= most:
            raise ConfigError(f"{key} = {value!r}: wanted {least} to {most}")


def _solver_name(solver: Any) -> Any:
    return solver if isinstance(solver, str) else getattr(solver, "name", None)


@dataclass(frozen=True, slots=True)
class Override:
    """Different numerics for the tensors whose name matches a pattern; fields that are None stay as the policy says.

    Args:
        pattern: A regular expression that is searched for anywhere in the name.
        quant_type: See `QuantizationConfig`, for the other fields too; channels and groups exclude each other, so that
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
    solver: str | NamedQuantizer | None = None
    rotate: bool | None = None
    on_nonfinite: str | None = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigError(f"override pattern {self.pattern!r} is no regular expression: {error}") from None

    @property
    def given(self) -> dict[str, Any]:
        """Return the fields that are set, beside the pattern."""
        fields = (f.name for f in dataclasses.fields(self) if f.name != "pattern")
        return {name: value for name in fields if (value := getattr(self, name)) is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types, which a table's metadata and a plan record."""
        named = {} if self.solver is None else {"solver": _solver_name(self.solver)}
        return {"pattern": self.pattern} | self.given | named


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """The policy by which the tensors of a model are quantized.

    Args:
        quant_type: The type of codes: int8, int6, int5, int4, int3, int2, a trellis code, which is more accurate at the
            same width (tcq5, tcq4, tcq3, tcq2, tcq1.5), or another code of `codes.CODES`; or fp16 (floats kept in
            float16), or none (kept as they are). Tensors whose shape a code cannot have get the int of that width.
        per_channel: Whether each index of axis 0 has one grid. Default: int8 yes, narrower widths no; a group size
            always means groups.
        group_size: The number of consecutive elements of the flattened tensor that share a grid. Without channels and
            without a size, int2 takes groups of 128; other widths then have one grid for the tensor, unless
            `per_channel` was left open too, which means 128 below eight bits.
        symmetric: Whether one constant zero point serves the whole tensor.
        solver: The name of a quantizer (`aq_jax.QUANTIZERS`): absmax (symmetric), minmax (asymmetric), mse, viterbi
            (trellis codes), or gptq, which is calibrated: `convert` runs the model on text for it. Or a quantizer of
            your own, the object (`aq_jax.quantizers.Quantizer`). Default: absmax or minmax at eight bits, mse below,
            viterbi for trellis codes. Names are looked up when the config is used, before anything is read.
        rotate: Whether blocks of the last axis are first multiplied by a Hadamard matrix, which spreads outliers and is
            undone where the weight is used. Tensors whose last axis is odd are not rotated.
        mixed_precision_layers: Parts of names; tensors whose name contains one of them are kept in float16, or in their
            own dtype where float16's largest error exceeds 2^-10 of the tensor's largest value.
        on_nonfinite: The treatment of NaN, inf, and scales outside [2^-126, 2^126]: "error" refuses the tensor by name,
            "keep" keeps it unquantized.
        overrides: Exceptions by name; the first match wins, and goes before mixed_precision_layers if it names a
            quant_type.

    Raises:
        ConfigError: for an unknown or contradictory value.

    >>> QuantizationConfig(quant_type="int2").spec
    QuantSpec(bits=2, per_channel=False, group_size=128, rotation=0)
    """

    quant_type: str = "int8"
    per_channel: bool | None = None
    group_size: int = 0
    symmetric: bool = True
    solver: str | NamedQuantizer | None = None
    rotate: bool = False
    mixed_precision_layers: tuple[str, ...] = ()
    on_nonfinite: str = "error"
    overrides: tuple[Override, ...] = field(default=())

    def __post_init__(self) -> None:
        # TOML and most callers give lists; a config must be hashable.
        object.__setattr__(self, "mixed_precision_layers", tuple(self.mixed_precision_layers))
        object.__setattr__(self, "overrides", tuple(self.overrides))
        if "" in self.mixed_precision_layers:
            raise ConfigError("mixed_precision_layers has an empty text, which is in every name; wanted parts of names")
        check_choice("quant_type", self.quant_type, (*widths(), "fp16", "none"))
        check_choice("on_nonfinite", self.on_nonfinite, ("error", "keep"))
        if self.solver is not None and not isinstance(_solver_name(self.solver), str):
            raise ConfigError(f"solver = {self.solver!r}: wanted the name of a quantizer, or an object that has one")
        if isinstance(self.group_size, bool) or not 0 <= self.group_size < 2**31:
            raise ConfigError(f"group_size = {self.group_size!r}: wanted 0 (no groups) or a size below 2^31")
        if self.group_size and self.per_channel:
            raise ConfigError(
                f"per_channel = true and group_size = {self.group_size} contradict each other: "
                "set only one of them (groups run over the flattened tensor)"
            )
        if self.coded:
            self._check_code(CODES[self.quant_type])
        for override in self.overrides:
            self._overridden(override)  # refuses contradictions now, not at the first tensor that matches

    def _check_code(self, code: Code) -> None:
        if not self.symmetric and not code.zero_points:
            raise ConfigError(f"symmetric = false: {code.name} has no zero points; set symmetric = true")
        if self.rotate and not code.rotated_name:
            others = ", ".join(name for name in widths() if CODES[name].rotated_name)
            raise ConfigError(f"rotate = true: {code.name} has no rotated form; wanted one of {others}")
        code.grouping(self.per_channel, self.group_size)

    @property
    def bits(self) -> int:
        """Return the bits of a code; 16 for fp16, 0 for none."""
        return CODES[self.quant_type].bits if self.coded else 16 if self.quant_type == "fp16" else 0

    @property
    def coded(self) -> bool:
        """Return whether weights become codes; fp16 and none leave them floats."""
        return self.quant_type in CODES

    @property
    def spec(self) -> QuantSpec:
        """Return the numerics of the model's quantized tensors.

        Raises:
            ConfigError: if quant_type is fp16 or none.
        """
        if not self.coded:
            raise ConfigError(f"quant_type = {self.quant_type!r} has no grid: wanted one of {', '.join(widths())}")
        code = CODES[self.quant_type]
        per_channel, group_size = code.grouping(self.per_channel, self.group_size)
        return QuantSpec(code.bits, per_channel, group_size, code=code.name)

    def spec_for(self, shape: tuple[int, ...], name: str) -> QuantSpec:
        """Fit the numerics to one tensor's shape and name.

        The block of the rotation is the largest power of two up to 128 that divides the last axis; an odd axis is not
        rotated. Channels of weights whose name says `experts`, [experts, outputs, inputs], are rows of the last axis,
        stored as groups of its length, because axis 0 counts whole matrices there.

        >>> QuantizationConfig("int4", rotate=True).spec_for((8, 96), "dense.weight").rotation
        32
        >>> QuantizationConfig("int8").spec_for((4, 8, 96), "mlp.experts.up_proj")
        QuantSpec(bits=8, per_channel=False, group_size=96, rotation=0)
        """
        length = shape[-1] if self.rotate and shape else 0
        block = min(length & -length, LARGEST_ROTATION)
        spec = dataclasses.replace(self.spec, rotation=block) if block > 1 else self.spec
        by_row = spec.coding.matrices or EXPERTS in name.lower()
        if spec.per_channel and len(shape) > 2 and shape[-1] and by_row:
            return dataclasses.replace(spec, per_channel=False, group_size=shape[-1])
        return spec

    def overrides_type(self, name: str) -> bool:
        """Return whether an override of this config sets a tensor's quant_type."""
        override = self.override_of(name)
        return override is not None and override.quant_type is not None

    @property
    def default_solver(self) -> str:
        """Name the quantizer that makes such grids if the config names none."""
        return CODES[self.quant_type].quantizer(self.symmetric) if self.coded else "mse"

    def for_tensor(self, name: str, shape: tuple[int, ...] | None = None) -> QuantizationConfig:
        """Resolve the config of one tensor: overrides and mixed precision are applied, and none is left.

        With a shape, a code that no tensor of this shape can have gives way to another of the same width.

        >>> QuantizationConfig("tcq2").for_tensor("w", (3, 1)).quant_type
        'int2'
        """
        policy = self._named(name)
        if shape is None or not policy.coded:
            return policy
        spec = policy.spec_for(shape, name)
        unfit = spec.coding.refuses_layout(shape, spec.quant_axis, spec.group_size)
        return dataclasses.replace(policy, quant_type=spec.coding.instead) if unfit else policy

    def _named(self, name: str) -> QuantizationConfig:
        if not self.overrides and not self.mixed_precision_layers:
            return self
        plain = dataclasses.replace(self, overrides=(), mixed_precision_layers=())
        override = self.override_of(name)
        if override is not None:
            plain = plain._overridden(override)
        if not self.overrides_type(name) and any(k in name for k in self.mixed_precision_layers):
            return dataclasses.replace(plain, quant_type="fp16")
        return plain

    def override_of(self, name: str) -> Override | None:
        """Return the override that holds for a tensor: the first whose pattern matches its name."""
        return next((override for override in self.overrides if re.search(override.pattern, name)), None)

    def _overridden(self, override: Override) -> QuantizationConfig:
        given = override.given
        # Channels and groups exclude each other: naming one drops the other.
        if given.get("group_size") and "per_channel" not in given:
            given["per_channel"] = None
        if given.get("per_channel") and "group_size" not in given:
            given["group_size"] = 0
        try:
            return dataclasses.replace(self, overrides=(), mixed_precision_layers=(), **given)
        except ConfigError as error:
            raise ConfigError(f"override {override.pattern!r}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return the resolved policy as JSON types, which a table's metadata records."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        out["mixed_precision_layers"] = list(self.mixed_precision_layers)
        out["overrides"] = [override.to_dict() for override in self.overrides]
        out["solver"] = _solver_name(self.default_solver if self.solver is None else self.solver)
        if self.coded:
            out |= {"per_channel": self.spec.per_channel, "group_size": self.spec.group_size}
        return out
