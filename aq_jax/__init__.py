"""aq_jax: quantize neural-network weights in JAX, keep them in Arrow tables, load them anywhere.

The names below are resolved when they are first used (PEP 562), so that importing the package, as the command line
does, imports no jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from aq_jax._version import __version__

__all__ = [
    "QUANTIZERS",
    "AllocationConfig",
    "AqError",
    "CalibrationConfig",
    "ConfigError",
    "ConversionConfig",
    "FormatError",
    "IntegrityError",
    "Override",
    "QTensor",
    "QuantSpec",
    "QuantizationConfig",
    "ShardsConfig",
    "TrainingConfig",
    "WeightLoader",
    "__version__",
    "convert",
    "dequantize",
    "dequantize_file",
    "fake_quant",
    "load",
    "load_config",
    "load_model",
    "prepare",
    "qdot",
    "qembed",
    "quantize",
    "quantize_file",
    "quantize_tree",
    "save",
]

# Name -> the module that it is resolved from.
_PUBLIC = {
    "AqError": "errors",
    "ConfigError": "errors",
    "FormatError": "errors",
    "IntegrityError": "errors",
    "QuantSpec": "config",
    "AllocationConfig": "config",
    "CalibrationConfig": "config",
    "ConversionConfig": "config",
    "QuantizationConfig": "config",
    "ShardsConfig": "config",
    "TrainingConfig": "config",
    "Override": "config",
    "load_config": "config.schema",
    "QTensor": "core.qtensor",
    "dequantize": "ops",
    "prepare": "ops",
    "qdot": "ops",
    "qembed": "ops",
    "quantize": "quantizers.apply",
    "quantize_tree": "quantizers.tree",
    "fake_quant": "quantizers.apply",
    "QUANTIZERS": "quantizers",
    "WeightLoader": "io.loader",
    "load": "io.loader",
    "save": "io.save",
    "quantize_file": "converters.convert",
    "dequantize_file": "converters.convert",
    "convert": "converters.convert",
    "load_model": "nn",
}


if TYPE_CHECKING:
    from aq_jax.config import (
        AllocationConfig,
        CalibrationConfig,
        ConversionConfig,
        Override,
        QuantizationConfig,
        QuantSpec,
        ShardsConfig,
        TrainingConfig,
    )
    from aq_jax.config.schema import load_config
    from aq_jax.converters.convert import convert, dequantize_file, quantize_file
    from aq_jax.core.qtensor import QTensor
    from aq_jax.errors import AqError, ConfigError, FormatError, IntegrityError
    from aq_jax.io.loader import WeightLoader, load
    from aq_jax.io.save import save
    from aq_jax.nn import load_model
    from aq_jax.ops import dequantize, prepare, qdot, qembed
    from aq_jax.quantizers import QUANTIZERS
    from aq_jax.quantizers.apply import fake_quant, quantize
    from aq_jax.quantizers.tree import quantize_tree


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'aq_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"aq_jax.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
