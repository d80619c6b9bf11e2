"""Read the stages that modules.json names after the model: its pooling, dense layers, norms and normalization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from aq_jax.errors import FormatError
from aq_jax.nn.pooling import ACTIVATIONS, MODES, Dense, LayerNorm, Mode, Normalize, Pooling, Stage
from aq_jax.nn.tensorfile import read_tensors
from aq_jax.store.jsonfile import read_json
from aq_jax.store.modules import MODULES, STATIC, Module

FLAGS = {  # of a pooling's old config, in the order in which the vectors are concatenated
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
VECTOR = "sentence_embedding"


def read_stages(folder: Path, modules: Sequence[Module], width: int | None) -> tuple[Stage, ...]:
    """Read the stages after the model: its pooling, and then dense layers, norms and normalization.

    Raises:
        FormatError: for other modules, naming them, and for stages that do not fit each other.
    """
    kinds = [module.kind for module in modules]
    first = [STATIC] if kinds[:1] == [STATIC] else ["Transformer", "Pooling"]
    if kinds[: len(first)] != first or not set(kinds[len(first) :]) <= READERS.keys():
        raise FormatError(
            f"{folder / MODULES}: has {kinds}; wanted Transformer, Pooling and then any of {', '.join(READERS)}, or "
            f"{STATIC} and any of these"
        )
    pooling = Pooling() if first == [STATIC] else read_pooling(folder / modules[1].path)
    stages: list[Stage] = [pooling]
    width = width and width * len(pooling.modes)
    for module in modules[len(first) :]:
        stage = READERS[module.kind](folder / module.path)
        if stage is None:
            continue
        if isinstance(stage, Dense | LayerNorm):
            inputs = stage.weight.shape[0] if isinstance(stage, Dense) else stage.scale.shape[0]
            if width is not None and inputs != width:
                raise FormatError(f"{folder / module.path}: takes {inputs} numbers; the stage before it gives {width}")
            width = stage.weight.shape[1] if isinstance(stage, Dense) else inputs
        stages.append(stage)
    return tuple(stages)


def read_pooling(folder: Path) -> Pooling:
    """Read the poolings that a folder's config.json names, in its old form (a flag each) or the new one.

    Raises:
        FormatError: for unknown poolings and settings.
    """
    file = folder / "config.json"
    fields = read_json(folder, file.name, dict)
    if fields is None:
        raise FormatError(f"{file}: does not exist; wanted the pooling that {MODULES} names")
    known = {"word_embedding_dimension", "embedding_dimension", "pooling_mode", "include_prompt", *FLAGS}
    if more := sorted(fields.keys() - known):
        raise FormatError(f"{file}: has {', '.join(more)}; known are {', '.join(sorted(known))}")
    spelled = fields.get("pooling_mode")
    if spelled is not None:
        chosen = spelled if isinstance(spelled, list) else [spelled]
    else:
        chosen = [mode for flag, mode in FLAGS.items() if fields.get(flag)] or ["mean"]
    if not chosen or not all(mode in MODES for mode in chosen):
        raise FormatError(f"{file}: pools by {chosen}; wanted one or more of {', '.join(MODES)}")
    include = fields.get("include_prompt", True)
    if not isinstance(include, bool):
        raise FormatError(f"{file}: include_prompt is {include!r}; wanted true or false")
    return Pooling(cast("tuple[Mode, ...]", tuple(chosen)), include)


def read_dense(folder: Path) -> Dense:
    """Read a dense layer with its weights.

    Raises:
        FormatError: for settings that are not supported, and for weights that do not fit the config.
    """
    file = folder / "config.json"
    fields = read_json(folder, file.name, dict) or {}
    vector = _check_vector(fields, file)
    wanted = {"in_features", "out_features", "bias", "activation_function", "use_residual", *vector}
    if more := sorted(fields.keys() - wanted):
        raise FormatError(f"{file}: has {', '.join(more)}; known are {', '.join(sorted(wanted))}")
    inputs, outputs = (_size(fields, name, file) for name in ("in_features", "out_features"))
    bias, residual = fields.get("bias", True), fields.get("use_residual", False)
    if not isinstance(bias, bool) or not isinstance(residual, bool):
        raise FormatError(f"{file}: bias is {bias!r}, use_residual {residual!r}; wanted true or false")
    spelled = str(fields.get("activation_function", "torch.nn.modules.activation.Tanh"))
    name = spelled.rpartition(".")[2]
    if not spelled.startswith("torch.nn.") or name not in ACTIVATIONS:
        raise FormatError(f"{file}: activation_function is {spelled!r}; wanted torch.nn's {', '.join(ACTIVATIONS)}")
    shapes: dict[str, tuple[int, ...]] = {"linear.weight": (outputs, inputs)}
    shapes |= {"linear.bias": (outputs,)} if bias else {}
    projected = residual and inputs != outputs
    shapes |= {"residual.weight": (outputs, inputs)} if projected else {}
    found = read_tensors(folder, shapes)
    projection = np.ascontiguousarray(found["residual.weight"].T) if projected else None
    return Dense(np.ascontiguousarray(found["linear.weight"].T), found.get("linear.bias"), name, residual, projection)


def _size(fields: Mapping[str, Any], name: str, file: Path) -> int:
    size = fields.get(name)
    if type(size) is not int or not 0 < size < 2**31:
        raise FormatError(f"{file}: {name} is {size!r}; wanted a positive integer")
    return size


def read_norm(folder: Path) -> LayerNorm:
    """Read a norm with its weights.

    Raises:
        FormatError: for unknown settings, and for weights that do not fit the config.
    """
    file = folder / "config.json"
    fields = read_json(folder, file.name, dict) or {}
    size = _size(fields, "dimension", file)
    if more := sorted(fields.keys() - {"dimension"}):
        raise FormatError(f"{file}: has {', '.join(more)}; known is dimension")
    found = read_tensors(folder, {"norm.weight": (size,), "norm.bias": (size,)})
    return LayerNorm(found["norm.weight"], found["norm.bias"])


def read_normalize(folder: Path) -> Normalize:
    """Read a normalization of embeddings.

    Raises:
        FormatError: if it normalizes anything but sentence embeddings.
    """
    file = folder / "config.json"
    _check_vector(read_json(folder, file.name, dict) or {}, file)
    return Normalize()


def _check_vector(fields: Mapping[str, Any], file: Path) -> tuple[str, str]:
    """Check that a module reads and writes the embedding, and return the names of the fields that say so."""
    names = ("module_input_name", "module_output_name")
    for name in names:
        if fields.get(name) not in (None, VECTOR):
            raise FormatError(f"{file}: {name} is {fields[name]!r}; wanted {VECTOR!r}")
    return names


READERS = {
    "Dense": read_dense,
    "LayerNorm": read_norm,
    "Normalize": read_normalize,
    "Dropout": lambda _: None,  # does nothing once a model is trained
}
