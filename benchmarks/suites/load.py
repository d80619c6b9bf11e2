"""Measure loading a table to JAX, beside safetensors' own loaders."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import models, peers
from benchmarks.peers.torch_threads import load_torch
from benchmarks.suites.contenders import start_children
from benchmarks.timing import Line, Result, race, ratio

TO_JAX = "safetensors float32 to JAX"
LIMITS = {
    "arrow float32": ("0.556", "0.4"),
    "parquet float32": ("0.556", "0.4"),
    "arrow packed": ("0.333", "0.2"),
    "parquet packed": ("0.333", "0.2"),
}


def jax_loaders(path: Path) -> dict[str, Callable[[], Any]]:
    """List safetensors' ways to load JAX arrays; the best of them counts."""
    import jax
    import jax.numpy as jnp
    from safetensors import flax, numpy

    return {
        "safetensors.flax.load_file": lambda: jax.block_until_ready(flax.load_file(path)),
        "device_put(load_file())": lambda: jax.block_until_ready(jax.device_put(numpy.load_file(path))),
        "jnp.array of load_file()": lambda: jax.block_until_ready(
            {name: jnp.array(value) for name, value in numpy.load_file(path).items()}
        ),
    }


def torch_loader() -> dict[str, Callable[[], Any]]:
    """Return, in a child, the calls that load the float32 model to torch, mapped (read when used) or read."""
    load_torch()
    load_file = peers.library("safetensors.torch").load_file
    path = models.folder() / "model.safetensors"

    def mapped() -> None:
        load_file(path)

    def read() -> None:
        _kept = {name: tensor.clone() for name, tensor in load_file(path).items()}

    return {"torch, mapped": mapped, "torch, read": read}


def load(full: bool) -> Iterator[Line]:
    """Load the int8 model as float32 and packed, from both containers, digests checked; theirs is the float32 model."""
    import jax

    import aq_jax as aq
    from aq_jax.converters import huggingface

    folder = models.folder()
    with tempfile.TemporaryDirectory() as scratch:
        paths = {suffix: Path(scratch, f"int8.{suffix}") for suffix in ("arrow", "parquet")}
        for path in paths.values():
            huggingface.to_table(folder, path, aq.QuantizationConfig("int8", per_channel=True))

        file = folder / "model.safetensors"
        ways = jax_loaders(file)
        contenders: dict[str, Callable[[], object]] = dict(ways)
        for suffix, path in paths.items():
            contenders[f"{suffix} float32"] = lambda path=path: jax.block_until_ready(aq.load(path))
            contenders[f"{suffix} packed"] = lambda path=path: jax.block_until_ready(aq.load(path, packed=True))
        with start_children({"load by torch": ("benchmarks.suites.load:torch_loader",)}) as (children, skipped):
            yield from skipped
            by_torch = {
                f"safetensors float32 to {name}": child.remote(name)
                for child in children.values()
                for name in child.names
            }
            times = race(contenders | by_torch, 9 if full else 5)
    best = min(ways, key=lambda way: times[way].median)
    times[TO_JAX] = times[best]
    for name, (least, goal) in LIMITS.items():
        for other in (TO_JAX, *by_torch):
            found = ratio(times[name], times[other])
            limits = (f"<= {least}", f"<= {goal}") if other == TO_JAX else ("", "")
            note = f"theirs is the float32 file of {file.stat().st_size / 1e6:.1f} MB"
            note += f", by {best}" if other == TO_JAX else ""
            figures = {"ms": 1e3 * times[name].median, "their ms": 1e3 * times[other].median}
            yield Result(
                f"load int8 .{name}", found.value, "x time", *limits, note, other, found.low, found.high, figures
            )  # fmt: skip
        yield Result(f"load int8 .{name}: first call longer by", times[name].first, "s")
