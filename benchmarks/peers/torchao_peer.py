"""torchao: integers of any width in groups, stored in bytes."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from benchmarks.peers import ROW, Peer, library
from benchmarks.peers.torch_threads import load_torch


class Torchao(Peer):
    """`IntxUnpackedToInt8Tensor`, which `quantize_` with IntxWeightOnlyConfig puts into a model.

    Args:
        name: The contender's name.
        algorithm: The name of an IntxChooseQParamsAlgorithm, which chooses scales.
        torch: The torch module.
    """

    note = "codes not packed"

    def __init__(self, name: str, algorithm: str, torch: ModuleType) -> None:
        intx = library("torchao.quantization.quantize_.workflows")
        self.name, self._torch, self._tensor = name, torch, intx.IntxUnpackedToInt8Tensor
        self._algorithm = intx.IntxChooseQParamsAlgorithm[algorithm]
        self._mapping = library("torchao.quantization.quant_primitives").MappingType.ASYMMETRIC
        self.slow = algorithm != "AFFINE"
        below = {4: (32, 64, 128), 3: (64, 128), 2: (32, 64, 128)}
        self.widths = below if self.slow else {8: (ROW, 32), **below}

    def prepare(self, w: np.ndarray) -> Any:
        return self._torch.from_numpy(w)

    def quantize(self, w: Any, bits: int, group: int) -> Any:
        return self._tensor.from_hp(
            w,
            (1, group or w.shape[1]),
            getattr(self._torch, f"int{bits}"),
            mapping_type=self._mapping,
            intx_choose_qparams_algorithm=self._algorithm,
        )

    def dequantize(self, q: Any) -> np.ndarray:
        return q.dequantize().numpy()

    def stored_bits(self, q: Any) -> int:
        return 8 * (q.qdata.nbytes + q.scale.nbytes + q.zero_point.nbytes)

    def packed_bits(self, q: Any) -> int:
        bits = int(str(q.target_dtype).removeprefix("torch.int"))
        zeros = 0 if self.slow else bits * q.zero_point.numel()  # that algorithm's are all 0
        return bits * q.qdata.numel() + 8 * q.scale.nbytes + zeros


def load() -> list[Peer]:
    """Load both ways to choose scales; asymmetric where there are zeros."""
    torch = load_torch()
    library("torchao")
    return [Torchao("torchao", "AFFINE", torch), Torchao("torchao, HQQ scales", "HQQ_SCALE_ONLY", torch)]
