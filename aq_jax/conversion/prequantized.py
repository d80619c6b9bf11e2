"""Recognize checkpoints that are quantized already, by the names, shapes and dtypes of their tensors.

Their scales and packed codes look like weights, and must not be rounded like weights. Only names, shapes, dtypes and
config.json are read.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
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
# The last part of the name of a tensor of codes -> the program that writes such names.
_LEAVES: Mapping[str, str] = {
    "qweight": "GPTQ or AWQ", "qzeros": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors", "bitmask": "compressed-tensors",
    "quant_map": "bitsandbytes", "absmax": "bitsandbytes", "nested_absmax": "bitsandbytes", "SCB": "bitsandbytes",
    "W_q": "HQQ", "_data": "quanto", "_weight_qdata": "torchao", "qdata": "torchao", "weight:qdata": "torchao",
    "weights_scaling_factor": "TensorRT Model Optimizer", "weight_scale_2": "TensorRT Model Optimizer",
    "q_weight": "EXL2", "trellis": "EXL3", "Qidxs": "QuIP#", "dense_weights": "SpQR",
    "codebooks": "AQLM", "qvalue": "Qwix",
}  # fmt: skip
# The suffixes of the scales beside codes named NAME.
_SCALES = ("_scale_inv", "_scale", "_scales", ".scale", ".scales", ".scale_inv")
# Words in the names of codes, and of their grids, in layouts that have no entry above.
_CODE_WORDS = ("weight", "quant", "qdata", "int_data", "packed", "indices", "codes")
_GRID_WORDS = ("scale", "zero", "absmax", "centroid", "codebook")
# Suffixes of integer tensors in float models.
_NUMBERS = ("ids", "index", "mask", "bias")
# The names of scales beside codes named PREFIX.weight.
_SIBLINGS = ("scales", "scale", "scale_inv", "SCB", "weight_scales")


@dataclass(frozen=True, slots=True)
class Prequantized:
    """The way in which weights were quantized, and the evidence for it.

    Args:
        kind: The method, such as "GPTQ".
        by: The tensor, or the entry of config.json, that shows it.
    """

    kind: str
    by: str


def recognize(shapes: Shapes, config: Mapping[str, Any]) -> Prequantized | None:
    """Recognize how a checkpoint is quantized already; return None if it is not.

    Args:
        shapes: The shape and dtype of each tensor, by name.
        config: The fields of config.json, if there are any.

    >>> codes, grids = ((16, 64), np.dtype("int32")), ((4, 64), np.dtype("float16"))
    >>> found = recognize({"q_proj.qweight": codes, "q_proj.scales": grids}, {"quantization_config": {"bits": 4}})
    >>> found.kind, found.by
    ('GPTQ', 'q_proj.qweight, int32 [16, 64]')
    >>> recognize({"norm.scale": ((64,), np.dtype("float32"))}, {}) is None
    True
    """
    codes = [name for name in shapes if _holds_codes(name, shapes)]
    coded = {part for name in codes for part in (name, name.rpartition(".")[0])}
    for kind_of in (_method_by_name, _method_by_scales):  # the first is surer
        for name in shapes:
            if kind := kind_of(name, shapes, coded):
                return Prequantized(kind, _described(name, shapes))
    if found := _codes_by_module(codes, shapes):
        return Prequantized(f"{shapes[found][1].name} codes", _described(found, shapes))
    entry, method = declared_method(config)
    if not entry:
        return None
    # Codes of an unknown kind; if there are none, somebody dequantized the weights.
    codes += [name for name in shapes if _may_hold_codes(name, shapes)]
    return Prequantized(method, f"{entry} in config.json, and {_described(codes[0], shapes)}") if codes else None


def declared_method(config: Mapping[str, Any]) -> tuple[str, str]:
    """Find the entry of config.json that declares quantized weights, and the method that it names; "" if there is none.

    >>> declared_method({"text_config": {"quantization_config": {"quant_method": "awq"}}})
    ('text_config.quantization_config', 'awq')
    """
    for where, _, found in _declarations(config):
        method = found.get("quant_method") or found.get("quant_algo") or found.get("format")
        return where, str(method or "an unnamed method")[:60]
    return "", ""


def declared_entries(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the entries of config.json that declare quantized weights.

    >>> declared_entries({"quantization": {"bits": 4, "group_size": 64}})
    [{'bits': 4, 'group_size': 64}]
    """
    return [dict(found) for _, _, found in _declarations(config)]


def without_entries(folder: Folder, name: str) -> bytes:
    """Return the text of a config.json without its entries that declare quantized weights; nothing if it has none."""
    try:
        config = read_json(folder, name, dict, _MAX_CONFIG) or {}
    except FormatError:
        return b""
    found = [(fields, where.rpartition(".")[2]) for where, fields, _ in _declarations(config)]
    for fields, entry in found:
        del fields[entry]
    return json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n" if found else b""


def _declarations(config: Mapping[str, Any]) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """List the entries that declare quantized weights: their path, what holds them, and they themselves."""
    for above, fields in (("", config), *((f"{key}.", value) for key, value in config.items())):
        for entry in _ENTRIES if isinstance(fields, Mapping) else ():
            found = fields.get(entry)
            if isinstance(found, Mapping) and not _SAYS_HOW.isdisjoint(found):
                yield f"{above}{entry}", fields, found


def check_quantizable(shapes: Shapes, folder: Folder, quantizes: bool) -> list[str]:
    """Refuse to quantize what is quantized already.

    Args:
        shapes: The shape and dtype of each tensor, by name.
        folder: The folder that holds the tensors, or their table; its config.json is read.
        quantizes: False for a plain table, which keeps any tensor as it is.

    Returns:
        Notes about a checkpoint that passes.

    Raises:
        FormatError: naming the method, and the evidence for it.
    """
    config = read_config(folder)
    found, (entry, method) = recognize(shapes, config), declared_method(config)
    if found is None:
        eight = [name for name, (_, dtype) in shapes.items() if dtype.name.startswith("float8")] if quantizes else []
        notes = []
        if eight:
            notes.append(f"{len(eight)} tensors of eight-bit floats are taken as plain numbers, such as {eight[0]}")
        if not entry:
            return notes
        return [
            *notes,
            f"{folder.join('config.json')}: {entry} says {method}, but all weights are plain numbers, and are taken as "
            "such; remove the entry from the copy if a loader minds it",
        ]
    if quantizes:
        raise FormatError(
            f"{folder}: is quantized already ({found.kind}, known by {found.by}): its scales would be rounded like "
            "weights; convert the float original, or, to keep it as it is, leave the quantization out"
        )
    return [f"quantized already ({found.kind}, known by {found.by}): codes and scales are kept as they are"]


def read_config(folder: Folder) -> dict[str, Any]:
    """Read config.json; return nothing if it is missing or no JSON object, which its other readers refuse."""
    try:
        return read_json(folder, "config.json", dict, _MAX_CONFIG) or {}
    except FormatError:
        return {}


def _method_by_name(name: str, shapes: Shapes, coded: Collection[str]) -> str:
    """Tell the method from a tensor's name, "" if it does not show; `coded` are names, and modules, of codes."""
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


def _method_by_scales(name: str, shapes: Shapes, coded: Collection[str]) -> str:
    """Tell the method from the scales beside a tensor's codes, "" if there are none."""
    prefix, _, leaf = name.rpartition(".")
    # Tensors of this name are always scales, whatever the weight's dtype is.
    weight = name.rpartition("_scale")[0]
    if leaf in ("weight_scale", "weight_scale_inv") and weight in shapes:
        return _scale_kind(shapes[weight][1], leaf)
    if name not in coded or not _holds_codes(name, shapes):
        return ""
    beside = [name + scale for scale in _SCALES]
    beside += [f"{prefix}.{sibling}" if prefix else sibling for sibling in _SIBLINGS if leaf == "weight"]
    scales = next((other for other in beside if other in shapes), None)
    if scales is None:
        return ""
    dtype = shapes[name][1]
    return "MLX" if dtype == np.uint32 else _scale_kind(dtype, scales.rpartition(".")[2])


def _codes_by_module(codes: Collection[str], shapes: Shapes) -> str | None:
    """Find codes by what their module holds: a grid beside them, or floats beside a weight of bytes."""
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
            continue  # the weight itself is there too; the codes have another use
        grids = (other.rpartition(".")[2] for other in floats)
        if any(word in leaf for word in _CODE_WORDS) and any(word in grid for grid in grids for word in _GRID_WORDS):
            return name
    return None


def _gptq_or_awq(prefix: str, shapes: Shapes) -> str:
    """Tell GPTQ from AWQ: AWQ packs codes along the outputs, each with a scale in a group; GPTQ along the inputs."""
    codes, scales = shapes.get(f"{prefix}qweight"), shapes.get(f"{prefix}scales")
    if f"{prefix}g_idx" in shapes or codes is None or scales is None:
        return "GPTQ" if f"{prefix}g_idx" in shapes else _LEAVES["qweight"]
    return "GPTQ" if codes[0][-1:] == scales[0][-1:] else "AWQ"


def _scale_kind(dtype: np.dtype, scales: str) -> str:
    if dtype.name.startswith("float8"):
        return f"FP8 with {scales}"
    return f"{dtype.name} codes with {scales}" if dtype.kind in "iu" else f"rounded weights with {scales}"


def _holds_codes(name: str, shapes: Shapes) -> bool:
    """Return whether a tensor is a matrix of small integers (masks are biases, positions int64) or eight-bit floats."""
    shape, dtype = shapes[name]
    small = (dtype.kind in "iu" and dtype.itemsize <= 4) or dtype.name.startswith("float8")
    wide = dtype.kind in "iu" and name.rpartition(".")[2] in ("Qidxs", "dense_weights")
    return (small or wide) and len(shape) >= 2 and not name.endswith("bias")


def _may_hold_codes(name: str, shapes: Shapes) -> bool:
    """Return whether a tensor of integers of any width may hold codes, in a model whose config declares some."""
    shape, dtype = shapes[name]
    return dtype.kind in "iu" and len(shape) >= 2 and min(shape) > 1 and not name.endswith(_NUMBERS)


def _described(name: str, shapes: Shapes) -> str:
    shape, dtype = shapes[name]
    return f"{name}, {dtype.name} {list(shape)}"
