"""Describe the machine and the packages of a measurement."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

RECORDED = (
    "jax", "jaxlib", "flax", "numpy", "pyarrow", "safetensors", "torch", "transformers", "torchao",
    "optimum-quanto", "hqq", "qwix", "gguf", "onnxruntime", "onnx",
)  # fmt: skip


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor(info: str | None = None) -> str:
    """Return the processor's name, with the numbers that distinguish generations of the same name.

    Args:
        info: The text of /proc/cpuinfo.
    """
    file = Path("/proc/cpuinfo")
    info = info if info is not None else file.read_text() if file.exists() else ""
    found = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", info, re.MULTILINE))
    if "model name" not in found:
        return platform.processor() or platform.machine()
    numbers = (
        f" (family {found['cpu family']}, model {found['model']})" if {"cpu family", "model"} <= set(found) else ""
    )
    return found["model name"].strip() + numbers


def accelerator() -> str | None:
    """Return the name of the device that JAX computes on by default, or None for a CPU.

    Another process asks: JAX takes most of a device's memory for the first process that uses it.
    """
    code = "import jax; found = jax.devices()[0]; print(found.platform, found.device_kind, sep='|')"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    kind, _, name = said.strip().partition("|")
    return None if kind == "cpu" else name


def slug(name: str) -> str:
    """Turn a processor's name into a part of a file name.

    >>> slug("AMD EPYC (family 25, model 17)")
    'amd-epyc-family-25-model-17'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions() -> dict[str, str]:
    """List the versions of the packages that take part, if installed."""
    found = {}
    for name in RECORDED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
