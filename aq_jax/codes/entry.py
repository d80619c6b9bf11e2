"""The protocol of an entry of `CODES`: nothing else knows its codes, or how many bytes they take.

`Elementwise` implements nearly all of it for codes of a fixed number of bits an element. Methods follow the arrays that
they are given: NumPy computes with NumPy arrays, JAX with JAX arrays, and JAX is not imported before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

from aq_jax.errors import ConfigError

# A NumPy array. Configs ask codes, too, and must not import NumPy.
if TYPE_CHECKING:
    import numpy as np

    Host: TypeAlias = np.ndarray
else:
    Host = Any
Shape = tuple[int, ...]
Rounding = Literal["mid_tread", "mid_rise", "affine"]


class Grid(NamedTuple):
    """The grids that a quantizer proposes for some groups, and how values are rounded to them.

    Args:
        scale: Float32 scales, within [2^-126, 2^126].
        zero_point: Float32 zero points: 0 for `mid_tread`, -0.5 for `mid_rise` (0 where all of a group is zero).
        base: The value of the lowest code, which `affine` subtracts.
        sound: False where the scale was clipped to its bounds, so that the group is represented badly.
        rounding: The rounding of all groups; codes without zero points get `mid_tread` only.
    """

    scale: Any
    zero_point: Any
    base: Any
    sound: Any
    rounding: Rounding


@runtime_checkable
class Code(Protocol):
    """A code, which turns numbers into bytes.

    Entries are hashable, as frozen dataclasses are: programs are compiled for them.

    A group has one float32 in the table's column `scales`, unless `grid_dtype` and `grid_block` say otherwise. A code
    that is encoded a matrix at a time, under a Hessian, has a quantizer of its own: `quantizers.Calibrated.solve`
    returns its QTensor.

    Args:
        name: The format's `quant_type`.
        bits: The bits of a code, rounded up; `data_bytes` counts the bytes of a tensor.
        uniform: Whether a code q stands for (q - zero_point) * scale, as GPTQ takes them one by one, and training.
        integral: Whether values follow from int8 levels as `float_grids` says, which integer products need.
        matrices: Whether a tensor is coded as matrices, of its last two axes, each of whose rows has one scale, which
            its values are products with.
        zero_points: Whether each group has a zero point beside its scale. Without, the table's column is empty, and
            the QTensor has None.
        max_level: The largest level at scale 1; -1, 0 and 1 are levels, too. 0 for codes that are not rounded one by
            one, but chosen by a quantizer of their own.
        grid_dtype: The dtype of scales, in the table's column and in a QTensor.
        grid_block: How many elements of `scales` stand for how many groups: (groups, elements).
        read_only: Whether such codes come from quantized sources alone, so that a config cannot ask for them.
    """

    name: str
    bits: int
    uniform: bool = False
    integral: bool = False
    matrices: bool = False
    zero_points: bool = False
    max_level: float = 1.0
    grid_dtype: str = "float32"
    grid_block: tuple[int, int] = (1, 1)
    read_only: bool = False

    @property
    def plain_name(self) -> str:
        """The name of this code for weights that are not rotated, as a config names it."""
        ...

    @property
    def rotated_name(self) -> str:
        """The name for rotated weights: the same, if only the table's `rotation` tells; "" if there is none."""
        ...

    @property
    def zero_dtype(self) -> str:
        """The dtype of zero points, in the table's column and in a QTensor: that of scales, if a code has no other."""
        return self.grid_dtype

    # What a config leaves open

    def quantizer(self, symmetric: bool) -> str:
        """Name the default quantizer."""
        ...

    def grouping(self, per_channel: bool | None, group_size: int) -> tuple[bool, int]:
        """Resolve (per_channel, group_size), where None and 0 leave the choice to the code.

        Raises:
            ConfigError: for a grouping that this code does not have.
        """
        ...

    @property
    def instead(self) -> str:
        """The name of the code that takes the place of this one for tensors that `refuses_layout` names."""
        ...

    # A row of the table: `count` elements, beginning where a piece may, of a tensor of this shape

    def data_bytes(self, count: int, shape: Sequence[int]) -> int:
        """Count the bytes of `data`."""
        ...

    def grid_count(self, groups: int) -> int:
        """Count the elements of scales, and of zero points, that stand for so many groups, whole blocks."""
        return groups // self.grid_block[0] * self.grid_block[1]

    def zero_count(self, groups: int) -> int:
        """Count the elements of zero points that stand for so many groups, from where a piece may begin."""
        return self.grid_count(groups)

    def cut_zeros(self, zero_points: Host, start: int, stop: int) -> Host:
        """Return the zero points of groups `start` to `stop`, between which the others may be cut, as a row's own."""
        return zero_points[self.zero_count(start) : self.zero_count(stop)]

    @property
    def in_memory(self) -> Code:
        """The code of a QTensor that is loaded from such rows."""
        return self

    def memory_grids(self, scales: Host, zero_points: Host) -> tuple[Host, Host]:
        """Turn the scales and zero points of a whole row into those of the code in memory."""
        return scales, zero_points

    def refuses_layout(self, shape: Sequence[int], quant_axis: int, group_size: int) -> str:
        """Say why a tensor of this shape and grouping cannot have this code; "" if it can."""
        return ""

    def refuses_grids(self, scales: Host, zero_points: Host) -> str:
        """Say why these numbers cannot be scales and zero points; "" if they can. There is at least one scale."""
        low, high = float(scales.min()), float(scales.max())
        if not (low >= 2.0**-126 and high <= 2.0**126):  # NaN is neither
            return f"scales are {low:g} to {high:g}, they must be finite and within 2^-126 to 2^126"
        return "" if (abs(zero_points) < float("inf")).all() else "zero_points are not all finite"

    def cut_step(self, group: int, shape: Sequence[int]) -> int:
        """Return the number of elements at whose multiples a tensor may be cut into pieces, given its group length."""
        ...

    def read_step(self, shape: Sequence[int]) -> int:
        """Return the number of elements at whose multiples reading may begin and end; pieces begin there, too."""
        ...

    def span(self, start: int, stop: int, shape: Sequence[int]) -> tuple[int, int]:
        """Find the bytes of `data` that hold elements `start` to `stop`, both multiples of `read_step` or the end."""
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
        """Return the shape and dtype (int8 or uint8) of the codes of a tensor of one axis or more."""
        ...

    def zero_shape(self, groups: Shape) -> Shape:
        """Return the shape of zero points, given that of the tensor's groups (see `core.qtensor.group_shape`)."""
        return (*groups[:-1], self.zero_count(groups[-1]))

    def rows(self, shape: Shape) -> int | None:
        """Count the rows of a matrix, if the shape of its codes does not tell."""
        ...

    def shape(self, codes: Shape, length: int, rows: int | None) -> Shape:
        """Undo `codes_like`, given the length of the last axis and the result of `rows`."""
        ...

    def from_stream(self, stream: Host, shape: Shape) -> Host:
        """Reshape or unpack `data` into the codes of a QTensor, without a copy where possible."""
        ...

    def to_stream(self, codes: Host, shape: Shape) -> Host:
        """Undo `from_stream`."""
        ...

    def row_start(self, row: int, shape: Shape) -> int:
        """Return the element of a tensor at which a row of axis 0 of its codes begins."""
        ...

    def axes(self, ndim: int) -> tuple[int | None, ...]:
        """Map each axis of the codes to the tensor's axis; None for an axis that is never cut."""
        ...

    def refuses_shards(self, shape: Shape, parts: Sequence[int]) -> str:
        """Say why the codes cannot be cut into these numbers of parts along each axis, or return ""."""
        ...

    # Numbers

    def encode(self, w: Any, grid: Grid) -> Any:
        """Round [*groups, size] to codes: integers held as float32. NaN has the code of 0, infinities saturate."""
        ...

    def encode_unrounded(self, w: Any, grid: Grid) -> Any:
        """Encode, but leave out a last rounding to the nearest integer: packing does it anyway."""
        ...

    def decode(self, codes: Any, scale: Any, zero_point: Any) -> Any:
        """Turn float32 codes [*groups, size] into values; codes without zero points ignore `zero_point`."""
        ...

    def levels(self, q: Any) -> Any:
        """Decode a QTensor to int8 levels of its shape in JAX, if the code is `integral`."""
        ...

    def float_grids(self, scale: Any, zero_point: Any) -> tuple[Any, Any, Any]:
        """Turn the grids of an `integral` code into float32 ones of a group each: scales, zero points and minimums.

        A value is (level - zero_point) * scale + minimum; None stands for zeros.
        """
        return scale, zero_point, None

    def values(self, q: Any) -> Any:
        """Decode a QTensor in JAX, a rotation left in it."""
        ...

    def take(self, table: Any, ids: Any, inside: Any) -> Any:
        """Decode rows [*batch, length] of a QTensor [rows, length] in JAX; NaN where an id is not `inside`."""
        ...


def check_uniform(code: Code, what: str) -> None:
    """Refuse a code whose levels are not evenly spaced.

    Raises:
        ConfigError: naming the code, and what needs such levels.
    """
    if not code.uniform:
        raise ConfigError(f"{what} needs evenly spaced levels, which {code.plain_name} does not have")
