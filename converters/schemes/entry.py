"""The protocol of a scheme, in which another program quantized a checkpoint, and the weights that it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from aq_jax.errors import FormatError

if TYPE_CHECKING:
    from aq_jax.config import QuantSpec
    from aq_jax.conversion.source import Source
    from aq_jax.converters.schemes.grids import Packed

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight that a scheme stores in several tensors.

    Args:
        name: The weight's name.
        shape: The weight's shape, [out, in] for a layer.
        dtype: The dtype that the weight is dequantized to.
        spec: The numerics of its codes.
        parts: The names of the tensors that it is made of; no other weight is made of them.
        read: A function that reads its codes and grids.
        dropped: The names of tensors beside it that say nothing, such as biases of zeros.
        notes: What the checkpoint says of it that no table holds, such as how its inputs are quantized.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    spec: QuantSpec
    parts: tuple[str, ...]
    read: Callable[[], Packed]
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Scheme(Protocol):
    """A way in which another program stores quantized weights; a subclass needs `about`, `recognizes` and `weights`.

    Args:
        about: The program's name, for messages and for the table's column `solver`.
        files: The files beside config.json that say how weights are quantized, and are wrong beside a table.
    """

    about: str
    files: tuple[str, ...] = ()

    def recognizes(self, config: Config) -> bool:
        """Return whether the entry of config.json that declares quantized weights is this scheme's."""
        ...

    def weights(self, source: Source, config: Config) -> Iterator[Weight]:
        """Find the quantized weights by names, shapes and dtypes, and by the few tensors that say how others are read.

        Args:
            source: The tensors of the checkpoint.
            config: The entry of config.json.

        Raises:
            FormatError: for tensors that are missing, or whose shapes do not fit, and for what a table cannot hold.
        """
        ...

    def leaves_out(self, name: str, source: Source) -> bool:
        """Return whether a tensor belongs to no weight, and says nothing that a table holds; by default, none is so."""
        return False


class Tensors:
    """The tensors of a checkpoint, with the errors of a scheme that does not find what it wants.

    Args:
        source: The tensors.
        about: The scheme's name.
    """

    def __init__(self, source: Source, about: str) -> None:
        self.source, self.about = source, about

    def __contains__(self, name: str) -> bool:
        return name in self.source.shapes

    def ending(self, *leaves: str) -> list[str]:
        """List the modules, each with its dot, that have a tensor of one of these names."""
        found = {name.removesuffix(leaf): None for name in self.source.shapes for leaf in leaves if name.endswith(leaf)}
        return [module for module in found if not module or module.endswith(".")]

    def shape(self, name: str) -> tuple[int, ...]:
        self.require(name)
        return self.source.shapes[name][0]

    def dtype(self, name: str) -> np.dtype:
        self.require(name)
        return self.source.shapes[name][1]

    def expect(self, name: str, shape: tuple[int, ...], *dtypes: str) -> np.dtype:
        """Check a tensor's shape and dtype, and return the dtype.

        Raises:
            FormatError: if there is no such tensor, or it is another one.
        """
        self.require(name)
        found, dtype = self.source.shapes[name]
        if found != shape or dtype.name not in dtypes:
            raise self.error(
                f"{name} is {dtype.name} {list(found)}; wanted {' or '.join(dtypes)} {list(shape)}: it does not fit "
                "the other tensors of its layer, or config.json"
            )
        return dtype

    def expect_group(self, name: str, said: object, inputs: int, groups: int) -> None:
        """Check a layer's groups against the inputs of a group in config.json: -1 for all, None if it says nothing.

        Raises:
            FormatError: if these are others.
        """
        if said is None:
            return
        size = self.integer("group_size", said)
        if (min(size, inputs) if size > 0 else inputs) * groups != inputs:
            raise self.error(
                f"{name} has {groups} groups of {inputs} inputs, and config.json says group_size = {size}; wanted "
                "groups of that size, which divide the inputs"
            )

    def integer(self, what: str, value: object) -> int:
        """Return an integer of config.json.

        Raises:
            FormatError: if it is none.
        """
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**31:
            raise self.error(f"{what} is {str(value)[:80]!r}; wanted an integer")
        return value

    def number(self, what: str, value: object) -> float:
        """Return a number of config.json, or of a tensor's own JSON, that float32 can hold.

        Raises:
            FormatError: if it is none.
        """
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _FLOAT_MAX:
            raise self.error(f"{what} is {str(value)[:80]!r}; wanted a number of float32")
        return float(value)

    def text(self, what: str, value: object) -> str:
        """Return a text of config.json, or of the file's metadata.

        Raises:
            FormatError: if it is none.
        """
        if not isinstance(value, str):
            raise self.error(f"{what} is {str(value)[:80]}; wanted a text")
        return value

    def read(self, name: str) -> np.ndarray:
        self.require(name)
        return np.asarray(self.source.read(name))

    def where(self, name: str) -> str:
        """Name a tensor and its place, for errors."""
        return f"{self.source.folder}: {name}"

    def error(self, text: str) -> FormatError:
        return FormatError(f"{self.source.folder}: as {self.about} stores weights, {text}")

    def require(self, name: str) -> None:
        """Check that there is a tensor.

        Raises:
            FormatError: if there is none.
        """
        if name not in self.source.shapes:
            raise self.error(f"{name} is missing; fetch the checkpoint again")


FLOATS = ("float16", "bfloat16", "float32")
_FLOAT_MAX = float(np.finfo(np.float32).max)
