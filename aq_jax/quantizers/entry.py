"""The protocols of entries of `QUANTIZERS`, which your own quantizers follow, too."""

from __future__ import annotations

from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np

from aq_jax.codes import Affine, Code, Grid
from aq_jax.config import QuantSpec
from aq_jax.core.qtensor import QTensor
from aq_jax.native.host import Recipe, takes
from aq_jax.quantizers.statistics import GroupStatistics

Needs = Literal["weights", "inputs"]
Grids = Literal["symmetric", "asymmetric"]
ALL_GRIDS: tuple[Grids, ...] = ("symmetric", "asymmetric")


class QuantizerBase(Protocol):
    """The attributes of every entry. Entries are hashable, as frozen dataclasses are: programs are compiled for them.

    Args:
        name: The name in configs and tables.
        needs: "weights", or "inputs" for those of a running model.
        grids: The kinds of grids that it makes.
    """

    name: str
    needs: Needs
    grids: tuple[Grids, ...] = ALL_GRIDS

    def supports(self, code: Code) -> bool:
        """Tell whether the quantizer can choose such codes; by default, those with evenly spaced levels."""
        return code.uniform


@runtime_checkable
class Quantizer(QuantizerBase, Protocol):
    """A quantizer that chooses grids by the weights alone.

    A subclass needs `name` and `__call__`, and `grids` if it does not make all kinds.

    >>> from dataclasses import dataclass
    >>> from aq_jax import QuantizationConfig, quantize
    >>> from aq_jax.core.grid import absmax_grid
    >>> @dataclass(frozen=True)
    ... class Clipped(Quantizer):
    ...     share: float = 0.9
    ...     name = "clipped"
    ...     grids = ("symmetric",)
    ...
    ...     def __call__(self, groups, code, symmetric):
    ...         return (absmax_grid(groups.lo * self.share, groups.hi * self.share, code),)
    >>> q = quantize([[1.0, -0.5, 0.9]], QuantizationConfig("int8", solver=Clipped()))
    >>> q.codes.tolist(), round(q.scale.item() * 127, 4)
    ([[127, -71, 127]], 0.9)
    """

    needs: Needs = "weights"

    def __call__(self, groups: GroupStatistics, code: Code, symmetric: bool) -> tuple[Grid, ...]:
        """Propose candidates for the grids of some groups.

        Args:
            groups: Statistics of the weights: JAX arrays within a program, NumPy arrays for one long group.
            code: The code, whose `bits` and `max_level` tell its levels.
            symmetric: Whether the tensor has one constant zero point, 0 or -0.5.
        """
        ...

    def recipes(self, code: Code, symmetric: bool) -> tuple[Recipe, ...]:
        """Name the candidates for the native library, which then computes them; none where it does not know them."""
        return ()


@runtime_checkable
class MatrixQuantizer(QuantizerBase, Protocol):
    """A quantizer that chooses the codes of whole matrices by the weights alone, for codes that are `matrices`."""

    needs: Needs = "weights"

    def encode(self, w: np.ndarray, code: Code) -> Any:
        """Choose the codes of [*lead, rows, columns]: see `trellis.Encoded`."""
        ...

    def trace(self, w: Any, code: Code) -> tuple[Any, Any, Any]:
        """Choose codes in JAX, under any transformation: those of a QTensor, scales, and whether all is sound."""
        ...


def recipes_of(quantizer: Quantizer, code: Code, symmetric: bool, group: int) -> tuple[Recipe, ...]:
    """Return the recipes of a quantizer that the native library has; none if a subclass computes something else."""

    def owner(name: str) -> type:
        return next(kind for kind in type(quantizer).__mro__ if name in vars(kind))

    if type(code) is not Affine or not issubclass(owner("recipes"), owner("__call__")):
        return ()
    found = quantizer.recipes(code, symmetric)
    return found if all(takes(recipe, group) for recipe in found) else ()


@runtime_checkable
class Calibrated(QuantizerBase, Protocol):
    """A quantizer that solves weights under the inputs that they get while the model runs.

    Args:
        fallback: The name of the quantizer of weights whose inputs are not known.
    """

    needs: Needs = "inputs"
    fallback: str = "mse"

    def check(self, spec: QuantSpec, shape: tuple[int, ...], where: str) -> None:
        """Refuse a weight that cannot be solved.

        Raises:
            ConfigError: naming `where`.
        """
        ...

    def prepare_hessian(self, hessian: Any, damping: float, rotation: int) -> Any:
        """Prepare a Hessian, the second moment of inputs, for weights that are rotated in such blocks."""
        ...

    def solve(self, w: np.ndarray, hessian: Any, spec: QuantSpec, symmetric: bool, quick: bool = False) -> QTensor:
        """Quantize [outputs, inputs] under a prepared Hessian, to NumPy leaves; `quick` is for comparing widths."""
        ...


DataFree: TypeAlias = Quantizer | MatrixQuantizer
Entry: TypeAlias = DataFree | Calibrated
