"""What an entry of `CODES` says of itself: nobody else knows what its codes are, or how many bytes they take.

`Elementwise` answers nearly all of it for codes of so many bits an element in the ordinary stream: such an entry says
what its codes stand for. Where arrays are given, what is asked follows them: NumPy arrays are computed by NumPy, JAX
arrays by JAX, which is not imported before one is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

from aq_jax.errors import ConfigError

# A NumPy array; configs ask codes, too, and NumPy is not imported for them.
if TYPE_CHECKING:
    import numpy as np

    Host: TypeAlias = np.ndarray
else:
    Host = Any
Shape = tuple[int, ...]
Rounding = Literal["tread", "rise", "affine"]


class Grid(NamedTuple):
    """What a quantizer proposes for some groups: where their codes lie, and how values are rounded to them.

    Args:
        scale: float32, within [2^-126, 2^126].
        zero_point: float32; 0 for `tread`, -0.5 for `rise` (0 where all of a group is zero).
        base: the value of the lowest code, which `affine` subtracts.
        sound: False where the scale had to be forced into its bounds: such a group is not represented well.
        rounding: one way for all groups; codes without zero points are given `tread` alone.
    """

    scale: Any
    zero_point: Any
    base: Any
    sound: Any
    rounding: Rounding


@runtime_checkable
class Code(Protocol):
    """How numbers become bytes. Entries are hashable, as frozen dataclasses are: programs are compiled for them.

    A group has one float32 in the table's column `scales`. How a matrix is encoded as a whole, under a metric, is a
    quantizer's business: `quantizers.Calibrated.solve` gives a QTensor.

    Args:
        name: the format's `quant_type`.
        bits: of a code, rounded up to whole ones; `data_bytes` says what a tensor takes.
        even: whether a code q stands for (q - zero_point) * scale: what sums of integers, training and solvers that
            move codes by steps need.
        zero_points: whether there is one a group, beside its scale: in the table's column, which is empty without, and
            in the QTensor, where None stands without.
        top: the largest level at scale 1, -1, 0 and 1 being levels, too; 0 where codes are not rounded one by one, but
            chosen by a quantizer of their own.
    """

    name: str
    bits: int
    even: bool = False
    zero_points: bool = False
    top: float = 1.0

    @property
    def plain(self) -> str:
        """The name of this code for weights as they are: what a config asks for."""
        ...

    @property
    def turned(self) -> str:
        """Its name for rotated weights: its own, if the table's `rotation` alone says so; "" if it has none."""
        ...

    # What a config leaves open

    def quantizer(self, symmetric: bool) -> str:
        """Name the quantizer where none is named."""
        ...

    def grouping(self, per_channel: bool | None, group_size: int) -> tuple[bool, int]:
        """Settle (per_channel, group_size); None is left open, and both at once do not come.

        Raises:
            ConfigError: for what this code does not have.
        """
        ...

    # A row of the table: `count` elements, beginning where a piece may, of a tensor of this shape

    def data_bytes(self, count: int, shape: Sequence[int]) -> int:
        """Count the bytes of `data`."""
        ...

    def piece(self, group: int, shape: Sequence[int]) -> int:
        """Count the elements at whose multiples a tensor may be cut into pieces, with groups of so many elements."""
        ...

    def unit(self, shape: Sequence[int]) -> int:
        """Count the elements at whose multiples reading may begin and end; a piece begins at one of them."""
        ...

    def span(self, start: int, stop: int, shape: Sequence[int]) -> tuple[int, int]:
        """Say which bytes of `data` elements `start` to `stop` lie in, both at multiples of `unit` or at the end."""
        ...

    def read(
        self,
        data: Host,
        scales: Host,
        zero_points: Host,
        group: int,
        shape: Sequence[int],
        out: Host,
    ) -> None:
        """Decode a row into float32, a rotation left in it; `group` elements share a scale."""
        ...

    # A QTensor: `codes` is an array whose first axes may be those of a batch

    def codes_like(self, shape: Shape) -> tuple[Shape, str]:
        """Say which shape and dtype the codes of a tensor of one axis or more have, int8 or uint8."""
        ...

    def rows(self, shape: Shape) -> int | None:
        """Count the rows of a matrix, where the shape of its codes does not tell them."""
        ...

    def shape(self, codes: Shape, length: int, rows: int | None) -> Shape:
        """Undo `codes_like`, with the length of the last axis and what `rows` said."""
        ...

    def lay(self, stream: Host, shape: Shape) -> Host:
        """Turn `data` of elements of this shape into an array of codes, without a copy where that is possible."""
        ...

    def flat(self, codes: Host, shape: Shape) -> Host:
        """Undo `lay`."""
        ...

    def element(self, row: int, shape: Shape) -> int:
        """Say at which element of a tensor a row of axis 0 of its codes begins."""
        ...

    def axes(self, ndim: int) -> tuple[int | None, ...]:
        """Say along which axis of the tensor each axis of its codes runs; None for one that is never cut."""
        ...

    def divides(self, shape: Shape, parts: Sequence[int]) -> str:
        """Say why the codes cannot be cut with a tensor into so many parts of each axis, or nothing."""
        ...

    # Numbers

    def encode(self, w: Any, grid: Grid) -> Any:
        """Round [*groups, size] to codes: integers held as float32. NaN has the code of 0, infinities saturate."""
        ...

    def place(self, w: Any, grid: Grid) -> Any:
        """As `encode`, but not rounded yet where rounding to the nearest integer is all that is left."""
        ...

    def decode(self, codes: Any, scale: Any, zero_point: Any) -> Any:
        """Say what codes [*groups, size] of float32 stand for, in float32; without zero points, that is whatever."""
        ...

    def values(self, q: Any) -> Any:
        """Decode a QTensor in JAX, a rotation left in it."""
        ...

    def take(self, table: Any, ids: Any, inside: Any) -> Any:
        """Decode rows [*batch, length] of a QTensor [rows, length] in JAX; NaN where an id is not `inside`."""
        ...


def check_even(code: Code, what: str) -> None:
    """Refuse what can only be done with evenly spaced levels.

    Raises:
        ConfigError: naming the code, and what was to be done.
    """
    if not code.even:
        raise ConfigError(f"{what} needs evenly spaced levels, which {code.plain} does not have")
