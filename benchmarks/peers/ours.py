"""This library, through the same protocol as its peers."""

from __future__ import annotations

import tempfile
from functools import cache
from typing import Any

import numpy as np

from benchmarks.peers import ROW, Peer

ABSMAX, MSE = "aq_jax absmax", "aq_jax mse"


class Ours(Peer):
    """One quantizer; `quantize` as users call it, on an array that is on the device."""

    def __init__(
        self,
        name: str,
        solver: str,
        symmetric: bool = True,
        rotate: bool = False,
    ) -> None:
        self.name, self._solver, self._symmetric, self._rotate = name, solver, symmetric, rotate
        below = {4: (128, 64, 32), 3: (128, 64), 2: (128, 64, 32)}
        self.widths = below | ({8: (ROW, 128, 32)} if solver == "absmax" else {})
        self.packs = (4, 3, 2) if solver == "absmax" else ()

    def prepare(self, w: np.ndarray) -> Any:
        import jax

        return jax.device_put(w)

    def quantize(self, w: Any, bits: int, group: int) -> Any:
        import jax

        import aq_jax as aq

        config = aq.QuantizationConfig(
            f"int{bits}",
            per_channel=None if group else True,
            group_size=group,
            symmetric=self._symmetric,
            solver=self._solver,
            rotate=self._rotate,
        )
        return jax.block_until_ready(aq.quantize(w, config))

    def dequantize(self, q: Any) -> np.ndarray:
        import aq_jax as aq

        return np.asarray(aq.dequantize(q))

    def stored_bits(self, q: Any) -> int:
        """Count the bits of a row in a .parquet table, with digest and name; scales and zero points are compressed."""
        import aq_jax as aq
        from aq_jax.store.inspection import inspect_table

        with tempfile.TemporaryDirectory() as folder:
            aq.save(f"{folder}/w.parquet", {"w": q})
            return 8 * inspect_table(f"{folder}/w.parquet").layers[0].bytes

    def packed_bits(self, q: Any) -> int:
        return 8 * array_bytes(q)

    def prepare_codes(self, codes: np.ndarray, bits: int) -> Any:
        return self.prepare((codes.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8))

    def pack(self, codes: Any, bits: int) -> Any:
        return _compiled("pack", bits)(codes).block_until_ready()

    def unpack(self, packed: Any, bits: int) -> Any:
        return _compiled("unpack", bits)(packed).block_until_ready()


class OurCode(Ours):
    """A rotated code with a scale a row, as it is chosen without data."""

    def __init__(self, code: str) -> None:
        self.name = code

    def quantize(self, w: Any, bits: int, group: int) -> Any:
        import jax

        import aq_jax as aq

        solver = "mse" if self.name.startswith("int") else "viterbi"
        config = aq.QuantizationConfig(self.name, per_channel=True, symmetric=True, rotate=True, solver=solver)
        return jax.block_until_ready(aq.quantize(w, config))


def array_bytes(value: Any) -> int:
    """Count the bytes of an array, or of a QTensor's parts; zero points that are all zero never count."""
    import aq_jax as aq

    if isinstance(value, aq.QTensor) and not np.asarray(value.zero_point).any():
        return value.codes.nbytes + value.scale.nbytes
    return value.nbytes


@cache
def _compiled(name: str, bits: int) -> Any:
    import jax

    from aq_jax.codes import bits_jax

    return jax.jit(lambda x: getattr(bits_jax, name)(x, bits))


def load() -> list[Peer]:
    """Load the quantizers that need no data; the suite `accuracy` has the others."""
    return [
        Ours(ABSMAX, "absmax"),
        Ours(MSE, "mse", symmetric=False),
        Ours("aq_jax mse, rotated", "mse", symmetric=False, rotate=True),
    ]
