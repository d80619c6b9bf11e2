"""A model's methods as jitted functions that are given the weights with every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from aq_jax.core.dispatch import COMPILER_OPTIONS, backend


class Compiled:
    """A function of a model and arrays, compiled once for each shape of the arrays.

    The weights are arguments of the program: XLA would fold them, for minutes, if they were constants of it.

    Args:
        model: a concrete NNX model.
        function: (model, *arrays, **options) -> arrays.
        options: names of arguments that are static.

    >>> from flax import nnx
    >>> double = Compiled(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), lambda model, x: 2 * model(x))
    >>> double(jax.numpy.ones((3, 2))).shape, double.compiles
    ((3, 2), 1)
    """

    def __init__(self, model: nnx.Module, function: Callable[..., Any], options: tuple[str, ...] = ()) -> None:
        graph, state = nnx.split(model)
        self._leaves, tree = jax.tree.flatten(state)  # a list is taken apart faster than a State, in every call

        def run(leaves: list[Any], *arrays: Any, **static: Any) -> Any:
            return function(nnx.merge(graph, jax.tree.unflatten(tree, leaves)), *arrays, **static)

        self._run = jax.jit(run, static_argnames=options, compiler_options=dict(COMPILER_OPTIONS[backend()]))
        self._shapes: set[Any] = set()

    @property
    def compiles(self) -> int:
        """How many programs there are so far."""
        return len(self._shapes)

    def __call__(self, *arrays: Any, **static: Any) -> Any:
        """The function's result for this model."""
        self._shapes.add((tuple((a.shape, a.dtype) for a in arrays), tuple(sorted(static.items()))))
        return self._run(self._leaves, *arrays, **static)
