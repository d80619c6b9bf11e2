"""Checkpoints that somebody has quantized already: known by the names, shapes and dtypes of their tensors.

Their scales and packed codes look like weights, and must not be rounded like weights. Nothing is read here but names,
shapes, dtypes and config.json.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from aq_jax.errors import FormatError
from aq_jax.store.folders import Folder
from aq_jax.store.jsonfile import read_json

Shapes = Mapping[str, tuple[tuple[int, ...], np.dtype]]

_MAX_CONFIG = 4 << 20
# Entries of config.json that say how the weights were quantized: transformers', compressed-tensors', MLX's.
_ENTRIES = ("quantization_config", "compression_config", "quantization")
_SAYS_HOW = frozenset({"quant_method", "quant_algo", "format", "bits", "config_groups", "load_in_4bit", "load_in_8bit"})
# The last part of a tensor's name, where there are codes -> what writes such.
_LEAVES: Mapping[str, str] = {
    "qweight": "GPTQ or AWQ", "qzeros": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors", "bitmask": "compressed-tensors",
    "quant_map": "bitsandbytes", "absmax": "bitsandbytes", "nested_absmax": "bitsandbytes", "SCB": "bitsandbytes",
    "W_q": "HQQ", "_data": "quanto", "_weight_qdata": "torchao", "qdata": "torchao", "weight:qdata": "torchao",
    "weights_scaling_factor": "TensorRT Model Optimizer", "weight_scale_2": "TensorRT Model Optimizer",
    "q_weight": "EXL2", "trellis": "EXL3", "Qidxs": "QuIP#", "dense_weights": "SpQR",
    "codebooks": "AQLM", "qvalue": "Qwix",
}  # fmt: skip
# Beside codes named NAME: its scales.
_SCALES = ("_scale_inv", "_scale", "_scales", ".scale", ".scales", ".scale_inv")
# What codes and their grids are called in layouts that have no entry above.
_CODE_WORDS = ("weight", "quant", "qdata", "int_data", "packed", "indices", "codes")
_GRID_WORDS = ("scale", "zero", "absmax", "centroid", "codebook")
# Integers that number things in float models.
_NUMBERS = ("ids", "index", "mask", "bias")
# Beside codes named PREFIX.weight.
_SIBLINGS = ("scales", "scale", "scale_inv", "SCB", "weight_scales")


@dataclass(frozen=True, slots=True)
class Prequantized:
    """How weights were quantized, and by what that was recognized.

    Args:
        kind: such as "GPTQ".
        by: the tensor, or the entry of config.json.
    """

    kind: str
    by: str


def recognize(shapes: Shapes, config: Mapping[str, Any]) -> Prequantized | None:
    """Say how a checkpoint is quantized already, if it is.

    Args:
        shapes: shape and dtype of each tensor, by name.
        config: of config.json, or nothing.

    >>> codes, grids = ((16, 64), np.dtype("int32")), ((4, 64), np.dtype("float16"))
    >>> found = recognize({"q_proj.qweight": codes, "q_proj.scales": grids}, {"quantization_config": {"bits": 4}})
    >>> found.kind, found.by
    ('GPTQ', 'q_proj.qweight, int32 [16, 64]')
    >>> recognize({"norm.scale": ((64,), np.dtype("float32"))}, {}) is None
    True
    """
    codes = [name for name in shapes if _is_code(name, shapes)]
    coded = {part for name in codes for part in (name, name.rpartition(".")[0])}
    for kind_of in (_by_its_name, _by_its_scales):  # the first is surer
        for name in shapes:
            if kind := kind_of(name, shapes, coded):
                return Prequantized(kind, _named(name, shapes))
    if found := _by_its_module(codes, shapes):
        return Prequantized(f"{shapes[found][1].name} codes", _named(found, shapes))
    entry, method = declared(config)
    if not entry:
        return None
    # Codes of a kind that is not known here; where there are none, somebody has dequantized the weights.
    codes += [name for name in shapes if _may_be_code(name, shapes)]
    return Prequantized(method, f"{entry} in config.json, and {_named(codes[0], shapes)}") if codes else None


def declared(config: Mapping[str, Any]) -> tuple[str, str]:
    """The entry of config.json that says that weights are quantized, and the method that it names; "" if there is none.

    >>> declared({"text_config": {"quantization_config": {"quant_method": "awq"}}})
    ('text_config.quantization_config', 'awq')
    """
    for above, fields in (("", config), *((f"{key}.", value) for key, value in config.items())):
        for entry in _ENTRIES if isinstance(fields, Mapping) else ():
            found = fields.get(entry)
            if isinstance(found, Mapping) and not _SAYS_HOW.isdisjoint(found):
                method = found.get("quant_method") or found.get("quant_algo") or found.get("format")
                return f"{above}{entry}", str(method or "an unnamed method")[:60]
    return "", ""


def check_quantizable(shapes: Shapes, folder: Folder, quantizes: bool) -> list[str]:
    """Refuse to quantize what is quantized already.

    Args:
        shapes: of the tensors.
        folder: that they, or the table that holds them, lie in; its config.json is looked at.
        quantizes: False for a plain table, which holds any tensor as it is.

    Returns:
        What there is to know about a checkpoint that passes.

    Raises:
        FormatError: naming the kind, and by what it was recognized.
    """
    config = read_config(folder)
    found, (entry, method) = recognize(shapes, config), declared(config)
    if found is None:
        eight = [name for name, (_, dtype) in shapes.items() if dtype.name.startswith("float8")] if quantizes else []
        notes = []
        if eight:
            notes.append(f"{len(eight)} tensors of eight-bit floats are taken as plain numbers, such as {eight[0]}")
        if not entry:
            return notes
        return [
            *notes,
            f"{folder.at('config.json')}: {entry} says {method}, but all weights are plain numbers, and are taken as "
            "such; remove the entry from the copy if a loader minds it",
        ]
    if quantizes:
        raise FormatError(
            f"{folder}: is quantized already ({found.kind}, known by {found.by}): its scales would be rounded like "
            "weights; convert the float original, or, to keep it as it is, leave the quantization out"
        )
    return [f"quantized already ({found.kind}, known by {found.by}): codes and scales are kept as they are"]


def read_config(folder: Folder) -> dict[str, Any]:
    """What config.json says; nothing if it is not there, or no JSON object, of which its readers complain."""
    try:
        return read_json(folder, "config.json", dict, _MAX_CONFIG) or {}
    except FormatError:
        return {}


def _by_its_name(name: str, shapes: Shapes, coded: Collection[str]) -> str:
    """What a tensor's name says of how it was quantized, "" if nothing; `coded` are names, and modules, of codes."""
    prefix, _, leaf = name.rpartition(".")
    if leaf in _LEAVES and prefix in coded:
        return _gptq_or_awq(f"{prefix}." if prefix else "", shapes) if leaf in ("qweight", "qzeros") else _LEAVES[leaf]
    if ".quant_state." in name:
        return "bitsandbytes"
    if name == "scaled_fp8":
        return "FP8 with scale_weight"
    if leaf == "B" and name in coded and f"{prefix}.s" in shapes:
        return "Marlin"
    blocks = name.endswith("_blocks") and name in coded
    return "MXFP4" if blocks and f"{name.removesuffix('_blocks')}_scales" in shapes else ""


def _by_its_scales(name: str, shapes: Shapes, coded: Collection[str]) -> str:
    """What the scales beside a tensor's codes say of how it was quantized, "" if there are none."""
    prefix, _, leaf = name.rpartition(".")
    # Scales of this name are nothing else, whatever the weight's dtype is.
    weight = name.rpartition("_scale")[0]
    if leaf in ("weight_scale", "weight_scale_inv") and weight in shapes:
        return _scaled(shapes[weight][1], leaf)
    if name not in coded or not _is_code(name, shapes):
        return ""
    beside = [name + scale for scale in _SCALES]
    beside += [f"{prefix}.{sibling}" if prefix else sibling for sibling in _SIBLINGS if leaf == "weight"]
    scales = next((other for other in beside if other in shapes), None)
    if scales is None:
        return ""
    dtype = shapes[name][1]
    return "MLX" if dtype == np.uint32 else _scaled(dtype, scales.rpartition(".")[2])


def _by_its_module(codes: Collection[str], shapes: Shapes) -> str | None:
    """Find codes that are told by what their module holds: a grid beside them, or numbers beside a weight of bytes."""
    beside: dict[str, list[str]] = {}
    for name in shapes:
        beside.setdefault(name.rpartition(".")[0], []).append(name)
    for name in codes:
        prefix, _, leaf = name.rpartition(".")
        floats = [other for other in beside[prefix] if shapes[other][1].kind not in "iub" and other not in codes]
        of_bytes = leaf == "weight" and shapes[name][1] in (np.int8, np.uint8)
        if of_bytes and any(not other.endswith("bias") for other in floats):
            return name
        if any(shapes[other][0] == shapes[name][0] for other in floats):
            continue  # the weight itself is there; these are kept for another use
        grids = (other.rpartition(".")[2] for other in floats)
        if any(word in leaf for word in _CODE_WORDS) and any(word in grid for grid in grids for word in _GRID_WORDS):
            return name
    return None


def _gptq_or_awq(prefix: str, shapes: Shapes) -> str:
    """AWQ packs codes along the outputs, of which each has a scale in a group; GPTQ along the inputs."""
    codes, scales = shapes.get(f"{prefix}qweight"), shapes.get(f"{prefix}scales")
    if f"{prefix}g_idx" in shapes or codes is None or scales is None:
        return "GPTQ" if f"{prefix}g_idx" in shapes else _LEAVES["qweight"]
    return "GPTQ" if codes[0][-1:] == scales[0][-1:] else "AWQ"


def _scaled(dtype: np.dtype, scales: str) -> str:
    if dtype.name.startswith("float8"):
        return f"FP8 with {scales}"
    return f"{dtype.name} codes with {scales}" if dtype.kind in "iu" else f"rounded weights with {scales}"


def _is_code(name: str, shapes: Shapes) -> bool:
    """Whether a tensor is a matrix of small integers (masks are biases, positions are int64) or of eight-bit floats."""
    shape, dtype = shapes[name]
    small = (dtype.kind in "iu" and dtype.itemsize <= 4) or dtype.name.startswith("float8")
    wide = dtype.kind in "iu" and name.rpartition(".")[2] in ("Qidxs", "dense_weights")
    return (small or wide) and len(shape) >= 2 and not name.endswith("bias")


def _may_be_code(name: str, shapes: Shapes) -> bool:
    """Whether a tensor of integers of any width may be codes, of a model whose config says that it has some."""
    shape, dtype = shapes[name]
    return dtype.kind in "iu" and len(shape) >= 2 and min(shape) > 1 and not name.endswith(_NUMBERS)


def _named(name: str, shapes: Shapes) -> str:
    shape, dtype = shapes[name]
    return f"{name}, {dtype.name} {list(shape)}"
