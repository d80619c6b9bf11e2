"""What an entry of `QUANTIZERS` is, and so what a user's own quantizer must be."""

from __future__ import annotations

from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np

from aq_jax.codes import Code, Grid
from aq_jax.config import QuantSpec
from aq_jax.core.qtensor import QTensor
from aq_jax.quantizers.measure import Measure

Needs = Literal["weights", "inputs"]
Grids = Literal["symmetric", "asymmetric"]
ALL: tuple[Grids, ...] = ("symmetric", "asymmetric")


class Described(Protocol):
    """What every entry says of itself. Entries are hashable, as frozen dataclasses are: programs are compiled for them.

    Args:
        name: as configs and tables have it.
        needs: "weights", or "inputs": those of a running model.
        grids: which kinds it makes.
    """

    name: str
    needs: Needs
    grids: tuple[Grids, ...] = ALL

    def serves(self, code: Code) -> bool:
        """Say whether it can choose such codes; by default, those of evenly spaced levels."""
        return code.even


@runtime_checkable
class Quantizer(Described, Protocol):
    """Chooses grids by the weights alone. A class of this one needs a name and `__call__`, if it makes all grids.

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

    def __call__(self, groups: Measure, code: Code, symmetric: bool) -> tuple[Grid, ...]:
        """Give candidates for the grids of some groups.

        Args:
            groups: what may be asked of the weights; JAX arrays within a program, NumPy's for one long group.
            code: whose `bits` and `top` say which levels there are.
            symmetric: one constant zero point for the tensor, 0 or -0.5.
        """
        ...


@runtime_checkable
class Calibrated(Described, Protocol):
    """Solves weights under the inputs that they are given while the model runs.

    Args:
        fallback: the quantizer, by name, of weights whose inputs are not known.
    """

    needs: Needs = "inputs"
    fallback: str = "mse"

    def check(self, spec: QuantSpec, shape: tuple[int, ...], where: str) -> None:
        """Refuse what cannot be solved.

        Raises:
            ConfigError: naming `where`.
        """
        ...

    def metric(self, moment: Any, damping: float, rotation: int) -> Any:
        """Make a second moment ready to solve under, for weights that are rotated in such blocks."""
        ...

    def solve(self, w: np.ndarray, under: Any, spec: QuantSpec, symmetric: bool, quick: bool = False) -> QTensor:
        """Quantize [outputs, inputs] under a metric, to NumPy leaves; `quick` is for comparing widths."""
        ...


Entry: TypeAlias = Quantizer | Calibrated
