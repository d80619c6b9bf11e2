"""Compile functions of a model, to which its weights are arguments, and check and pad the token ids that they get."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from aq_jax.core.dispatch import COMPILER_OPTIONS, backend
from aq_jax.errors import AqError
from aq_jax.ops.kernels import choices


class Structure(NamedTuple):
    """All of a module but the numbers in its arrays: modules of one structure can share a program.

    Args:
        graph: The graph of its nodes, with their static attributes.
        tree: The tree of its arrays.
        mesh: The mesh that they are spread over; None for one device.
    """

    graph: nnx.GraphDef
    tree: Any
    mesh: Mesh | AbstractMesh | None

    def merge(self, leaves: list[Any]) -> Any:
        """Build the module with these arrays."""
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, leaves))


def split_module(module: nnx.Module) -> tuple[Structure, list[Any]]:
    """Split a module into its structure, which is hashable, and its arrays as they are now.

    >>> from flax import nnx
    >>> one, other = (split_module(nnx.Linear(2, 2, rngs=nnx.Rngs(seed)))[0] for seed in range(2))
    >>> one == other, one == split_module(nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0)))[0]
    (True, False)
    """
    graph, state = nnx.split(module)
    leaves, tree = jax.tree.flatten(state)
    shardings = (getattr(leaf, "sharding", None) for leaf in leaves)
    mesh = next((sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)), None)
    return Structure(graph, tree, mesh), leaves


def nbytes(module: nnx.Module) -> int:
    """Count the bytes of a module's arrays in memory, of what kernels have prepared, too."""
    return sum(leaf.nbytes for leaf in split_module(module)[1])


class Program:
    """A function of a module and arrays, compiled once for each structure of the module and shape of the arrays.

    The weights are arguments of the program: as constants, XLA would fold them for minutes; and modules of one
    structure, such as the layers of most models, share it. Static attributes of a module, such as the window of an
    attention, are part of its structure. Other kernels, or a forced one, make another program.

    Args:
        function: The function: (module, *arrays, **options) -> arrays.
        options: The names of the static arguments.
        reuses: Whether the first array, or tree of arrays, is given up, so that the first result may lie in its memory.

    >>> from flax import nnx
    >>> layers = [nnx.Linear(2, 2, rngs=nnx.Rngs(seed)) for seed in range(2)]
    >>> double = Program(lambda layer, x: 2 * layer(x))
    >>> [double(layer, jax.numpy.ones((3, 2))).shape for layer in layers], double.compiles
    ([(3, 2), (3, 2)], 1)
    """

    def __init__(self, function: Callable[..., Any], options: tuple[str, ...] = (), *, reuses: bool = False) -> None:
        self._function, self._options, self._reuses = function, options, reuses
        self._compiled: dict[Structure, tuple[Callable[..., Any], set[Any]]] = {}

    @property
    def compiles(self) -> int:
        """Count the programs compiled so far."""
        return sum(len(shapes) for _, shapes in self._compiled.values())

    def __call__(self, module: nnx.Module, *arrays: Any, **static: Any) -> Any:
        """Call the function."""
        return self.bind(module)(*arrays, **static)

    def bind(self, module: nnx.Module) -> Callable[..., Any]:
        """Bind the function to a module as it is now, which is split once for all calls."""
        structure, leaves = split_module(module)
        if structure not in self._compiled:
            self._compiled[structure] = self._compile(structure), set()
        run, shapes = self._compiled[structure]

        def call(*arrays: Any, **static: Any) -> Any:
            kernels = choices()
            found = tuple((a.shape, a.dtype) for a in jax.tree.leaves(arrays))
            shapes.add((found, tuple(sorted(static.items())), kernels))
            return run(leaves, kernels, *arrays, **static)

        return call

    def _compile(self, structure: Structure) -> Callable[..., Any]:
        def run(leaves: list[Any], kernels: Hashable, *arrays: Any, **static: Any) -> Any:
            # NumPy arrays arrive as they are if nothing is compiled (jax_disable_jit).
            arrays = jax.tree.map(lambda each: each if isinstance(each, jax.Array) else jnp.asarray(each), arrays)
            return self._function(structure.merge(leaves), *arrays, **static)

        return jax.jit(
            run,
            static_argnums=1,
            static_argnames=self._options,
            # Over a mesh, what comes out is spread in another way than what went in.
            donate_argnums=2 if self._reuses and structure.mesh is None else None,
            compiler_options=dict(COMPILER_OPTIONS[backend()]),
            # Replicated over the weights' mesh, so that each process has the results.
            out_shardings=None if structure.mesh is None else NamedSharding(structure.mesh, PartitionSpec()),
        )


class BoundProgram:
    """A `Program` that is bound to one model.

    >>> from flax import nnx
    >>> double = BoundProgram(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), lambda model, x: 2 * model(x))
    >>> double(jax.numpy.ones((3, 2))).shape, double.compiles
    ((3, 2), 1)
    """

    def __init__(
        self, model: nnx.Module, function: Callable[..., Any], options: tuple[str, ...] = (), *, reuses: bool = False
    ) -> None:
        self._program = Program(function, options, reuses=reuses)
        self._call = self._program.bind(model)  # a call flattens a list of leaves faster than a State

    @property
    def compiles(self) -> int:
        """Count the programs compiled so far."""
        return self._program.compiles

    def __call__(self, *arrays: Any, **static: Any) -> Any:
        """Call the function on this model."""
        return self._call(*arrays, **static)


def padded_length(count: int, longest: int) -> int:
    """Return the length to which so many tokens are padded: a power of two or the longest, so that programs are few.

    >>> [padded_length(count, 96) for count in (0, 17, 65)]
    [16, 32, 96]
    """
    return min(max(16, 1 << (count - 1).bit_length()), longest)


def check_token_ids(ids: Sequence[int], vocabulary: int, where: str) -> Int[np.ndarray, "tokens"]:
    """Check one text's ids, and return them as an array: a program would round floats, and find a row for any number.

    Raises:
        AqError: for anything but a list of integers, and for ids outside the vocabulary.
    """
    wanted = f"wanted a list of integers from 0 to {vocabulary - 1}"
    try:
        found = np.asarray(ids)
    except ValueError:  # lists of several lengths
        raise AqError(f"{where}: found ids that are lists and numbers, or lists of several lengths; {wanted}") from None
    if found.shape == (0,):
        return found.astype(np.int32)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise AqError(f"{where}: found ids of {found.dtype}, shape {list(found.shape)}; {wanted}")
    if not 0 <= found.min() <= found.max() < vocabulary:
        raise AqError(f"{where}: found ids from {found.min()} to {found.max()}; {wanted}")
    return found
