"""Fill an NNX model from a table: rules for names say where each tensor goes, and none is ignored silently."""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from aq_jax.core.dispatch import Activations
from aq_jax.core.qtensor import QTensor
from aq_jax.errors import FormatError, some_of
from aq_jax.nn.swap import quantized_layer
from aq_jax.ops import dequantize

Transform = Callable[[Array], Array]
# (pattern of the whole stored name, path in the model or None to ignore the tensor, transform of a float array)
NameRule = tuple[str, str | None, Transform]
M = TypeVar("M", bound=nnx.Module)


def keep(x: Array) -> Array:
    """Return an array as it is."""
    return x


def transpose(x: Array) -> Array:
    """Transpose [outputs, inputs] to the [inputs, outputs] of Flax kernels."""
    return x.T


def abstract_model(make: Callable[[nnx.Rngs], M]) -> M:
    """Make a model of shapes only, to be filled.

    All initializers get one key: their numbers are never computed, and splitting keys while tracing takes most of the
    time to build a model.

    >>> abstract_model(lambda rngs: nnx.Linear(2, 3, rngs=rngs)).kernel.get_value().shape
    (2, 3)
    """

    def build() -> M:
        key = jax.random.key(0)
        return make(cast(nnx.Rngs, types.SimpleNamespace(params=lambda: key)))

    return nnx.eval_shape(build)


def match_names(stored: Iterable[str], names: Sequence[NameRule]) -> tuple[dict[str, tuple[str, Transform]], list[str]]:
    """Match stored names with parameters, path -> (name, transform), and describe each name that does not fit.

    >>> match_names(["a.weight", "b"], [(r"(.)\\.weight", r"\\1.kernel", transpose)])[1]
    ['b: matches no pattern']
    """
    wrong: list[str] = []
    targets: dict[str, tuple[str, Transform]] = {}
    for name in stored:
        hits = [(match, path, do) for pattern, path, do in names if (match := re.fullmatch(pattern, name))]
        if len(hits) != 1:
            wrong.append(f"{name}: matches {'no pattern' if not hits else f'{len(hits)} patterns'}")
            continue
        match, path, do = hits[0]
        if path is None:
            continue
        target = match.expand(path)
        if target in targets:
            wrong.append(f"{name}: fills {target}, and so does {targets[target][0]}")
        targets[target] = name, do
    return targets, wrong


def fill(model: M, tensors: Mapping[str, Any], names: Sequence[NameRule], activations: Activations, where: str) -> M:
    """Put a table's tensors into a model made under `nnx.eval_shape`.

    A QTensor that is the weight of a layer replaces that layer (QLinear, QEmbed); elsewhere it is dequantized. Plain
    floats become float32, in which the models compute.

    Args:
        model: The abstract model, which is changed and returned.
        tensors: Arrays and QTensors by stored name.
        names: The rules for names.
        activations: The activations of the quantized layers.
        where: The file's name, for errors.

    Raises:
        FormatError: naming tensors that no pattern or several match, parameters that no tensor or several fill, and
            shapes that do not fit.
    """
    targets, wrong = match_names(tensors, names)
    empty = {".".join(map(str, path)): value for path, value in nnx.iter_graph(model) if isinstance(value, nnx.Param)}
    wrong += [f"{targets[target][0]}: the model has no {target}" for target in targets.keys() - empty.keys()]
    wrong += [f"{target}: no tensor fills it" for target in empty.keys() - targets.keys()]
    # Biases first: a layer that is replaced takes its bias with it.
    for target in sorted(
        targets.keys() & empty.keys(), key=lambda target: (target.endswith((".kernel", ".embedding")), target)
    ):
        name, do = targets[target]
        value, wanted = tensors[name], empty[target].get_value().shape
        parent, layer, key = _locate(model, target)
        if isinstance(value, QTensor) and key in ("kernel", "embedding"):
            shape = value.shape[::-1] if key == "kernel" else value.shape
            if shape == wanted:
                _set(*parent, quantized_layer(layer, value, activations))
                continue
        else:
            plain = dequantize(value) if isinstance(value, QTensor) else jnp.asarray(value, jnp.float32)
            value = do(plain)
            shape = value.shape
            if shape == wanted:
                empty[target].set_value(value)
                continue
        wrong.append(f"{name}: shape {list(shape)} does not fit {target}, which wants {list(wanted)}")
    if wrong:
        raise FormatError(f"{where}: {len(wrong)} tensors do not fit the model: {some_of(sorted(wrong), 20, '; ')}")
    return model


def _locate(model: nnx.Module, path: str) -> tuple[tuple[Any, Any], Any, str]:
    """Resolve a path to ((the layer's parent, its key there), the layer, the parameter's name)."""
    *parts, key = path.split(".")
    parent: Any = None
    layer: Any = model
    last: Any = ""
    for part in parts:
        last = int(part) if part.isdigit() else part
        parent, layer = layer, layer[last] if isinstance(last, int) else getattr(layer, last)
    return (parent, last), layer, key


def _set(parent: Any, key: Any, value: Any) -> None:
    if isinstance(key, int):
        parent[key] = value
    else:
        setattr(parent, key, value)
