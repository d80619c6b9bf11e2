"""The table of schemes in which other programs quantize checkpoints: one file an entry; nobody else has a list of them.

Each entry says, from config.json and the names, shapes and dtypes of tensors, which of them are one weight, and reads
its codes and grids. The tensors lie in safetensors, which `converters.checkpoint` reads.

    compressed_tensors      llm-compressor's: packed integers, int8, float8 (`..._config`: what config.json says)
    gptq, awq, mlx          integers packed along inputs; along outputs, in an order of their own; with offsets
    hqq, bitsandbytes       integers with float zero points; nf4, fp4 and int8
    torchao                 plain integers
    entry, source           the protocol, and the source of a table's tensors
    words, grids            codes from words, and QTensors of codes and grids
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aq_jax.conversion.source import Source
from aq_jax.converters.checkpoint import open_checkpoint
from aq_jax.converters.schemes.awq import Awq
from aq_jax.converters.schemes.bitsandbytes import BitsAndBytes
from aq_jax.converters.schemes.compressed_tensors import CompressedTensors
from aq_jax.converters.schemes.entry import Scheme, Tensors, Weight
from aq_jax.converters.schemes.gptq import Gptq
from aq_jax.converters.schemes.hqq import Hqq
from aq_jax.converters.schemes.mlx import Mlx
from aq_jax.converters.schemes.source import SchemeSource, declared
from aq_jax.converters.schemes.torchao import TorchAo
from aq_jax.store.folders import Folder

SCHEMES: dict[str, Scheme] = {
    "compressed-tensors": CompressedTensors(),
    "gptq": Gptq(),
    "awq": Awq(),
    "mlx": Mlx(),
    "hqq": Hqq(),
    "bitsandbytes": BitsAndBytes(),
    "torchao": TorchAo(),
}
"""An open table: add a scheme under its name."""

__all__ = ["SCHEMES", "Scheme", "Tensors", "Weight", "open_folder"]


@contextmanager
def open_folder(location: str | Path | Folder, *, packed: bool, allow_pickle: bool = False) -> Iterator[Source]:
    """Open a Hugging Face folder, as `open_checkpoint`; quantized weights by the first scheme that recognizes them.

    Args:
        location: The folder.
        packed: Whether weights that a scheme reads become QTensors; otherwise they are dequantized.
        allow_pickle: See `open_checkpoint`.

    Raises:
        FormatError, FileNotFoundError: as `open_checkpoint`, and as `Scheme.weights`.
    """
    with open_checkpoint(location, allow_pickle) as stored:
        config = declared(stored, SCHEMES.values())
        scheme = next((scheme for scheme in SCHEMES.values() if config and scheme.recognizes(config)), None)
        found = None if scheme is None else SchemeSource(stored, scheme, config, packed)
        yield found if found is not None and found.quantized else stored
