"""A table's tensors into an NNX model: a list of name patterns says where each goes, and nothing goes unsaid."""

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
from aq_jax.errors import FormatError
from aq_jax.nn.swap import quantized_layer
from aq_jax.ops import dequantize

Transform = Callable[[Array], Array]
# (pattern of the whole stored name, path in the model or None to leave it out, what is done to a float array)
Mapped = tuple[str, str | None, Transform]
M = TypeVar("M", bound=nnx.Module)


def kept(x: Array) -> Array:
    """As it is."""
    return x


def turned(x: Array) -> Array:
    """[outputs, inputs] to the [inputs, outputs] of Flax kernels."""
    return x.T


def abstract(make: Callable[[nnx.Rngs], M]) -> M:
    """A model of shapes only, to be filled.

    All initializers are given one key: what they would draw is never computed, and splitting keys while tracing takes
    most of the time that a model takes to build.

    >>> abstract(lambda rngs: nnx.Linear(2, 3, rngs=rngs)).kernel.get_value().shape
    (2, 3)
    """

    def build() -> M:
        key = jax.random.key(0)
        return make(cast(nnx.Rngs, types.SimpleNamespace(params=lambda: key)))

    return nnx.eval_shape(build)


def match_names(stored: Iterable[str], names: Sequence[Mapped]) -> tuple[dict[str, tuple[str, Transform]], list[str]]:
    """Which stored tensor fills which parameter, and how; and what is wrong with the names, one text each.

    >>> match_names(["a.weight", "b"], [(r"(.)\\.weight", r"\\1.kernel", turned)])[1]
    ['b: matches no pattern']
    """
    wrong: list[str] = []
    goals: dict[str, tuple[str, Transform]] = {}
    for name in stored:
        hits = [(match, path, do) for pattern, path, do in names if (match := re.fullmatch(pattern, name))]
        if len(hits) != 1:
            wrong.append(f"{name}: matches {'no pattern' if not hits else f'{len(hits)} patterns'}")
            continue
        match, path, do = hits[0]
        if path is None:
            continue
        goal = match.expand(path)
        if goal in goals:
            wrong.append(f"{name}: fills {goal}, and so does {goals[goal][0]}")
        goals[goal] = name, do
    return goals, wrong


def fill(model: M, tensors: Mapping[str, Any], names: Sequence[Mapped], activations: Activations, where: str) -> M:
    """Put a table's tensors into a model made under `nnx.eval_shape`.

    A QTensor replaces the layer that it is the weight of (QLinear, QEmbed); elsewhere it is dequantized. Plain floats
    become float32, in which the models compute.

    Args:
        model: abstract; it is changed, and returned.
        tensors: arrays and QTensors by stored name.
        names: the table of patterns.
        activations: of the quantized layers.
        where: the file's name, for errors.

    Raises:
        FormatError: naming every tensor that no pattern or more than one matches, every parameter that none fills or
            several do, and every shape that does not fit.
    """
    goals, wrong = match_names(tensors, names)
    empty = {".".join(map(str, path)): value for path, value in nnx.iter_graph(model) if isinstance(value, nnx.Param)}
    wrong += [f"{goals[goal][0]}: the model has no {goal}" for goal in goals.keys() - empty.keys()]
    wrong += [f"{goal}: no tensor fills it" for goal in empty.keys() - goals.keys()]
    # Biases first: a layer that is replaced takes its bias with it.
    for goal in sorted(goals.keys() & empty.keys(), key=lambda goal: (goal.endswith((".kernel", ".embedding")), goal)):
        name, do = goals[goal]
        value, wanted = tensors[name], empty[goal].get_value().shape
        parent, layer, key = _locate(model, goal)
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
                empty[goal].set_value(value)
                continue
        wrong.append(f"{name}: shape {list(shape)} does not fit {goal}, which wants {list(wanted)}")
    if wrong:
        raise FormatError(f"{where}: {len(wrong)} tensors do not fit the model: " + "; ".join(sorted(wrong)))
    return model


def _locate(model: nnx.Module, path: str) -> tuple[tuple[Any, Any], Any, str]:
    """((the layer's parent, its key there), the layer, the parameter's name) of a path."""
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
