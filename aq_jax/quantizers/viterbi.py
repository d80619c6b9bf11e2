"""Choose trellis codes by the weights alone: the path of the smallest squared error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from aq_jax.codes import Code
from aq_jax.quantizers.entry import MatrixQuantizer
from aq_jax.quantizers.trellis import ROUNDS, Encoded, encode_matrices, first_scale
from aq_jax.quantizers.trellis_xla import encode


@dataclass(frozen=True)
class Viterbi(MatrixQuantizer):
    """Viterbi's algorithm and its refinement, for trellis codes; see `quantizers.trellis`."""

    name = "viterbi"
    grids = ("symmetric",)

    def supports(self, code: Code) -> bool:
        return code.matrices

    def encode(self, w: Float[np.ndarray, "*lead rows columns"], code: Any) -> Encoded:
        return encode_matrices(w, code)

    def trace(
        self, w: Float[Array, "*lead rows columns"], code: Any
    ) -> tuple[UInt8[Array, "*lead bytes"], Float[Array, "*lead rows"], Bool[Array, ""]]:
        return encode(w, None, first_scale(code), code, ROUNDS)
