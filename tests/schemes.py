"""Checkpoints as other programs quantize them, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy


def write(
    folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any], metadata: dict[str, str] | None = None
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.require(value, requirements="C") for name, value in tensors.items()}
    safetensors.numpy.save_file(arrays, folder / "model.safetensors", metadata)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def group(weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The config.json of compressed-tensors, of one group of layers."""
    groups = {"a": {"targets": ["Linear"], "weights": weights}}
    return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups} | more}
