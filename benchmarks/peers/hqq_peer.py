"""HQQ: half-quadratic quantization, in groups with a float zero, packed."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.peers import Peer, library
from benchmarks.peers.torch_threads import load_torch


class Hqq(Peer):
    """`Quantizer`, groups in rows, scales and zeros in float16, as HQQLinear keeps them.

    Args:
        name: The contender's name.
        quantizer: The library's quantizer.
        optimize: Whether zeros are optimized, which is the method itself.
        torch: The torch module.
    """

    packs = (4, 3, 2)

    def __init__(self, name: str, quantizer: Any, optimize: bool, torch: Any) -> None:
        self.name, self._quantizer, self._optimize, self._torch = name, quantizer, optimize, torch
        self.slow = optimize
        self.widths = {8: (128,), 4: (64, 128), 3: (64, 128), 2: (64, 128)}

    def prepare(self, w: np.ndarray) -> Any:
        return self._torch.from_numpy(w)

    def quantize(self, w: Any, bits: int, group: int) -> Any:
        groups = w.reshape(-1, group)
        # It packs by fourths of the groups, and fails if their number does not divide by four.
        short = -len(groups) % 4
        if short:
            groups = self._torch.cat([groups, groups[-1:].expand(short, group)])
        codes, meta = self._quantizer.quantize(
            groups, nbits=bits, group_size=group, optimize=self._optimize, axis=1, device="cpu"
        )
        codes, meta = self._quantizer.cpu(codes, meta | {"compute_dtype": self._torch.float16})
        return codes, meta | {"compute_dtype": self._torch.float32}, tuple(w.shape)

    def dequantize(self, q: Any) -> np.ndarray:
        codes, meta, shape = q
        found = self._quantizer.dequantize(codes, meta).numpy()
        return found.reshape(-1)[: shape[0] * shape[1]].reshape(shape)

    def stored_bits(self, q: Any) -> int:
        codes, meta, _ = q
        return 8 * (codes.nbytes + meta["scale"].nbytes + meta["zero"].nbytes)

    def prepare_codes(self, codes: np.ndarray, bits: int) -> Any:
        return self._torch.from_numpy(codes.reshape(-1, 32))

    def pack(self, codes: Any, bits: int) -> Any:
        return self._quantizer.pack[self._quantizer.bit_to_packing[bits]](codes)

    def unpack(self, packed: Any, bits: int) -> Any:
        return self._quantizer.unpack[self._quantizer.bit_to_packing[bits]](packed)


def load() -> list[Peer]:
    """Load the method, and its starting point."""
    torch = load_torch()
    quantizer = library("hqq.core.quantize").Quantizer
    return [Hqq("hqq, no optimizer", quantizer, False, torch), Hqq("hqq", quantizer, True, torch)]
