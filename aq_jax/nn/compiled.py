"""A model's methods as jitted functions that are given the weights with every call, and the ids that they are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Int

from aq_jax.core.dispatch import COMPILER_OPTIONS, backend
from aq_jax.errors import AqError


class Program:
    """A function of a module and arrays, compiled once for each shape of the arrays.

    The weights are arguments of the program: XLA would fold them, for minutes, if they were constants of it; and
    modules of one structure, as the layers of a model are, share it.

    Args:
        module: concrete; of its weights only the structure is kept.
        function: (module, *arrays, **options) -> arrays.
        options: names of arguments that are static.

    >>> from flax import nnx
    >>> layers = [nnx.Linear(2, 2, rngs=nnx.Rngs(seed)) for seed in range(2)]
    >>> double = Program(layers[0], lambda layer, x: 2 * layer(x))
    >>> [double(leaves_of(layer), jax.numpy.ones((3, 2))).shape for layer in layers], double.compiles
    ([(3, 2), (3, 2)], 1)
    """

    def __init__(self, module: nnx.Module, function: Callable[..., Any], options: tuple[str, ...] = ()) -> None:
        graph, state = nnx.split(module)
        tree = jax.tree.structure(state)

        def run(leaves: list[Any], *arrays: Any, **static: Any) -> Any:
            return function(nnx.merge(graph, jax.tree.unflatten(tree, leaves)), *arrays, **static)

        self._run = jax.jit(
            run,
            static_argnames=options,
            compiler_options=dict(COMPILER_OPTIONS[backend()]),
            out_shardings=_everywhere(state),
        )
        self._shapes: set[Any] = set()

    @property
    def compiles(self) -> int:
        """How many programs there are so far."""
        return len(self._shapes)

    def __call__(self, leaves: list[Any], *arrays: Any, **static: Any) -> Any:
        """The function's result for a module of these leaves."""
        self._shapes.add((tuple((a.shape, a.dtype) for a in arrays), tuple(sorted(static.items()))))
        return self._run(leaves, *arrays, **static)


def _everywhere(state: Any) -> NamedSharding | None:
    """Where results go: to every device of the weights' mesh, so that each process has them; None if there is none."""
    for leaf in jax.tree.leaves(state):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding):
            return NamedSharding(sharding.mesh, PartitionSpec())
    return None


class Compiled(Program):
    """A `Program` and the leaves of one model.

    >>> from flax import nnx
    >>> double = Compiled(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), lambda model, x: 2 * model(x))
    >>> double(jax.numpy.ones((3, 2))).shape, double.compiles
    ((3, 2), 1)
    """

    def __init__(self, model: nnx.Module, function: Callable[..., Any], options: tuple[str, ...] = ()) -> None:
        super().__init__(model, function, options)
        self._leaves = leaves_of(model)  # a list is taken apart faster than a State, in every call

    def __call__(self, *arrays: Any, **static: Any) -> Any:
        """The function's result for this model."""
        return super().__call__(self._leaves, *arrays, **static)


def leaves_of(module: nnx.Module) -> list[Any]:
    """A module's arrays, as `Program` takes them."""
    return jax.tree.leaves(nnx.state(module))


def padded_length(count: int, longest: int) -> int:
    """The length to which so many tokens are padded: a power of two or the longest, so that programs are few.

    >>> [padded_length(count, 96) for count in (0, 17, 65)]
    [16, 32, 96]
    """
    return min(max(16, 1 << (count - 1).bit_length()), longest)


def token_ids(ids: Sequence[int], vocabulary: int, where: str) -> Int[np.ndarray, "tokens"]:
    """One text's ids as an array: a program would round floats, and find some row for any number.

    Raises:
        AqError: for what is no list of integers, and for those that are no row of the vocabulary.
    """
    found = np.asarray(ids)
    if found.shape == (0,):
        return found.astype(np.int32)
    wanted = f"wanted a list of integers from 0 to {vocabulary - 1}"
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise AqError(f"{where}: found ids of {found.dtype}, shape {list(found.shape)}; {wanted}")
    if not 0 <= found.min() <= found.max() < vocabulary:
        raise AqError(f"{where}: found ids from {found.min()} to {found.max()}; {wanted}")
    return found
