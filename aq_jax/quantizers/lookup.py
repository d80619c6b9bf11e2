"""Look up the quantizers that a config names, and refuse unknown ones."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp

from aq_jax.codes import CODES, Code
from aq_jax.config import ConversionConfig, QuantizationConfig
from aq_jax.config.quantization import check_choice
from aq_jax.config.schema import load_config
from aq_jax.errors import ConfigError
from aq_jax.quantizers import QUANTIZERS, Calibrated, DataFree, Entry, MatrixQuantizer, Quantizer
from aq_jax.quantizers.statistics import Groups

_RENAMED = {"search": "mse"}


def find_quantizer(solver: Any) -> Entry:
    """Look up a quantizer by name, or check an object that is one.

    Raises:
        ConfigError: for an unknown name, and for an object that is not a quantizer.

    >>> find_quantizer("absmax").grids
    ('symmetric',)
    """
    if not isinstance(solver, str):
        return _checked(solver)
    if solver in _RENAMED and solver not in QUANTIZERS:
        new = _RENAMED[solver]
        raise ConfigError(f"solver = {solver!r} is called {new!r} now: write solver = {new!r}")
    check_choice("solver", solver, tuple(QUANTIZERS))
    found = _checked(QUANTIZERS[solver], solver)
    if found.name != solver:
        raise ConfigError(
            f"QUANTIZERS[{solver!r}]: its name is {found.name!r}; wanted the name that it has in the table"
        )
    return found


def _checked(entry: Any, name: str = "") -> Entry:
    try:
        wrong = _problem(entry)
    except TypeError:
        wrong = "cannot be hashed, and programs are compiled for it; make it a frozen dataclass"
    if wrong:
        raise ConfigError(f"{f'QUANTIZERS[{name!r}]' if name else f'solver = {entry!r}'}: {wrong}")
    return entry


@lru_cache  # checking an object against a protocol takes as long as quantizing a small array
def _problem(entry: Any) -> str:
    kind = Calibrated if getattr(entry, "needs", None) == "inputs" else Quantizer
    if isinstance(entry, kind if kind is Calibrated else (Quantizer, MatrixQuantizer)) and not isinstance(entry, type):
        return ""
    wanted = f"an object of a subclass of aq_jax.quantizers.{kind.__name__} with a name"
    return f"is not a quantizer; wanted a name, or {wanted}"


def quantizer_of(policy: QuantizationConfig) -> Entry:
    """Look up the quantizer of one tensor's policy (`QuantizationConfig.for_tensor`).

    The default replaces the model's quantizer where an override asks for grids that it does not make, or for a code
    that it does not support.

    >>> quantizer_of(QuantizationConfig("int8", symmetric=False)).name
    'minmax'
    """
    code = CODES.get(policy.quant_type)
    if policy.solver is not None and _makes(found := find_quantizer(policy.solver), policy.symmetric, code):
        return found
    return find_quantizer(policy.default_solver)


def data_free_quantizer(policy: QuantizationConfig, name: str) -> DataFree:
    """Look up the quantizer of one tensor's policy, where only weights are known.

    Raises:
        ConfigError: for a quantizer that needs the running model, naming the tensor.
    """
    found = quantizer_of(policy)
    if found.needs == "inputs":
        raise ConfigError(
            f"{name}: solver = {found.name!r} runs the model, which is not known here; use `convert`, or `quantize` "
            "on a table with config.json and tokenizer files beside it"
        )
    return cast(DataFree, found)


def calibrated_quantizer(policy: QuantizationConfig) -> Calibrated | None:
    """Look up the quantizer that solves a tensor of this policy on the running model; None if there is none."""
    found = quantizer_of(policy)
    return cast(Calibrated, found) if found.needs == "inputs" else None


def with_fallback(policy: QuantizationConfig) -> QuantizationConfig:
    """Replace a calibrated quantizer in a tensor's policy by its fallback for weights whose inputs are not known."""
    found = calibrated_quantizer(policy)
    return policy if found is None else dataclasses.replace(policy, solver=fallback_of(policy, found))


def fallback_of(policy: QuantizationConfig, quantizer: Calibrated) -> str:
    """Name the quantizer that takes the place of a calibrated one in a tensor's policy."""
    fits = find_quantizer(quantizer.fallback).supports(CODES[policy.quant_type])
    return quantizer.fallback if fits else policy.default_solver


def calibrated(config: QuantizationConfig) -> bool:
    """Tell whether any tensor may be solved on the running model."""
    return bool(_on_inputs(config))


def _on_inputs(config: QuantizationConfig) -> list[str]:
    found = [find_quantizer(each.solver) for each in (config, *config.overrides) if each.solver is not None]
    return [entry.name for entry in found if entry.needs == "inputs"]


def check_policy(config: QuantizationConfig) -> None:
    """Refuse unknown quantizers, and grids or codes that the named quantizer does not make.

    Raises:
        ConfigError: naming the override, if the quantizer is in one.
    """
    _check(config.solver, config.symmetric, config.quant_type)
    for override in config.overrides:
        symmetric = config.symmetric if override.symmetric is None else override.symmetric
        try:
            _check(override.solver, symmetric, override.quant_type or config.quant_type)
        except ConfigError as error:
            raise ConfigError(f"override {override.pattern!r}: {error}") from None


def _check(solver: Any, symmetric: bool, quant_type: str) -> None:
    code = CODES.get(quant_type)
    if solver is None:
        if code is None:
            return
        solver = code.quantizer(symmetric)
    found = find_quantizer(solver)
    if code is not None and not found.supports(code):
        others = [name for name, entry in QUANTIZERS.items() if entry.supports(code)]
        raise ConfigError(
            f"solver = {found.name!r} cannot choose codes of {code.name}; set solver = {' or '.join(map(repr, others))}"
        )
    if not _makes(found, symmetric):
        others = [name for name, entry in QUANTIZERS.items() if _makes(entry, symmetric, code)]
        raise ConfigError(
            f"solver = {found.name!r} is {_kind(not symmetric)}: set symmetric = {str(not symmetric).lower()}, or "
            f"solver = {' or '.join(map(repr, others))}"
        )


def _kind(symmetric: bool) -> str:
    return "symmetric" if symmetric else "asymmetric"


def _makes(entry: Entry, symmetric: bool, code: Code | None = None) -> bool:
    return _kind(symmetric) in entry.grids and (code is None or entry.supports(code))


def read_conversion(path: str | Path, sets: tuple[str, ...] = ()) -> ConversionConfig:
    """Read a conversion's TOML file, and look up the quantizers that it names.

    Raises:
        ConfigError, OSError: as for `load_config` and `check_conversion`, naming the file.
    """
    config = load_config(path, sets)
    try:
        check_conversion(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config


def check_conversion(config: ConversionConfig) -> None:
    """Refuse a conversion whose quantizers are unknown, or cannot do what it asks, before anything is read.

    Raises:
        ConfigError: for policies that `check_policy` refuses, for training and allocation without the running model,
            and for a folder of shards with it.
    """
    policy = config.quantization
    if policy is None:
        return
    try:
        check_policy(policy)
    except ConfigError as error:
        raise ConfigError(f"quantization: {error}") from None
    runs = _on_inputs(policy)
    wanted = " or ".join(f'"{name}"' for name, entry in QUANTIZERS.items() if entry.needs == "inputs")
    if config.train is not None and not runs:
        raise ConfigError(f"[train]: found no tensor whose weights are trained; wanted quantization.solver = {wanted}")
    if config.allocate is not None and quantizer_of(policy).needs != "inputs":
        named = None if policy.solver is None else quantizer_of(policy).name
        raise ConfigError(
            f"[allocate]: found solver = {named!r}; widths are chosen by what they do to the running model, for which "
            f"quantization.solver = {wanted} is wanted"
        )
    if config.in_shards and runs:
        raise ConfigError(
            f"output = {config.output!r}: is a folder, which is written without ever holding the whole model; solver "
            f"= {runs[0]!r} runs it. Name a .parquet or .arrow, or another solver"
        )


def resolve_solvers(config: QuantizationConfig) -> QuantizationConfig:
    """Replace names of quantizers by their entries: another process may not have them in its table."""

    def entry(solver: Any) -> Entry | None:
        return None if solver is None else find_quantizer(solver)

    overrides = tuple(dataclasses.replace(each, solver=entry(each.solver)) for each in config.overrides)
    return dataclasses.replace(config, solver=entry(config.solver), overrides=overrides)


@lru_cache
def candidates(entry: Entry, code: Code, symmetric: bool) -> int:
    """Count the candidate grids of a quantizer: the codes of all are held until the best is known."""
    if entry.needs == "inputs" or not callable(entry):
        return 1
    call = cast(Quantizer, entry)
    row = jax.ShapeDtypeStruct((1, 8), jnp.float32)
    pads = jax.ShapeDtypeStruct((1,), jnp.float32)
    return len(jax.eval_shape(lambda w, p: [grid[:4] for grid in call(Groups(w, p), code, symmetric)], row, pads))
