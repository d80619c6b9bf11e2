"""Write checkpoints of a Llama's shapes, as large as needed: sparse files take no room for zeros."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)


def llama_shapes(layers: int, width: int, inner: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """List the names and shapes of a Llama's tensors."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{part}_proj.weight": (width, width) for part in "qkvo"}
        shapes |= {f"{at}.mlp.{part}_proj.weight": (inner, width) for part in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (width, inner), f"{at}.input_layernorm.weight": (width,)}
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def write_checkpoint(folder: Path, shapes: dict[str, tuple[int, ...]], file_bytes: int, filled: float = 1.0) -> int:
    """Write a folder of safetensors in bfloat16 with an index: each tensor random numbers first, then zeros.

    Args:
        folder: The folder to make.
        shapes: The shapes of the tensors by name.
        file_bytes: The approximate bytes of a file.
        filled: The part of each tensor that holds numbers; the rest is a hole in the file.

    Returns:
        The bytes of all tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    files = list(_files(shapes, file_bytes))
    weight_map = {}
    for number, part in enumerate(files):
        name = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        weight_map |= dict.fromkeys(part, name)
        header, end = {}, 0
        for tensor, shape in part.items():
            start, end = end, end + 2 * math.prod(shape)
            header[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            first = file.tell()
            for tensor, shape in part.items():
                file.seek(first + header[tensor]["data_offsets"][0])
                count = max(min(8, shape[-1]), int(math.prod(shape) * filled))
                file.write((random.standard_normal(count, np.float32) * 0.02).astype(BF16).tobytes())
            file.truncate(first + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return sum(2 * math.prod(shape) for shape in shapes.values())


def _files(shapes: dict[str, tuple[int, ...]], size: int) -> Iterator[dict[str, tuple[int, ...]]]:
    part: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if part and 2 * sum(math.prod(s) for s in part.values()) + 2 * math.prod(shape) > size:
            yield part
            part = {}
        part[name] = shape
    yield part
