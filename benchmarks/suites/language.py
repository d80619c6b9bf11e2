"""Measure what SmolLM2 predicts at three and two bits beside its float weights, ours and other libraries'.

Each library quantizes the linears; our float32 model runs what it dequantizes, with the embeddings as they are, which
are the head too. Ours are whole tables of the configs, int8 embeddings included.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import models, peers
from benchmarks.children import ChildError
from benchmarks.suites.contenders import peer_children
from benchmarks.timing import Line, Result, Skipped

VARIABLE = "AQ_JAX_LANGUAGE"  # a folder with smollm2.gguf, and the texts calibration.txt and judged.txt
MODULES = ("torchao_peer", "hqq_peer", "ggml_peer")
GROUPS = {3: 64, 2: 64}
CONFIGS = ("int3", "tcq3", "int2", "tcq2")
WINDOW = 512  # tokens
NAMES = ("torchao, HQQ scales", "hqq", "ggml Q3_K", "ggml Q2_K")  # the best of each library


def source() -> Path:
    """Return the path of the model."""
    return Path(os.environ[VARIABLE], "smollm2.gguf")


def missing_source() -> Skipped | None:
    """Return why there is no model, if there is none."""
    folder = os.environ.get(VARIABLE)
    return None if folder else Skipped("SmolLM2", f"{VARIABLE} names no folder")


def iter_linears() -> Iterator[tuple[str, np.ndarray]]:
    """Read the dequantized linears, one by one."""
    from aq_jax.converters import open_source

    with open_source(source()) as opened:
        for name, (shape, _) in opened.shapes.items():
            if len(shape) == 2 and "embed" not in name:
                yield name, np.ascontiguousarray(np.asarray(opened.read(name)), np.float32)


def contenders(module: str) -> dict[str, Callable[..., Any]]:
    """Return, in a child, "peer|bits" -> a call that writes dequantized linears to a file, and returns bits."""
    found = [peer for peer in peers.load(module) if peer.name in NAMES]
    return {f"{peer.name}|{bits}": partial(dequantized, peer, bits) for peer in found for bits in GROUPS
            if bits in peer.widths}  # fmt: skip


def dequantized(peer: peers.Peer, bits: int, path: str) -> list[int]:
    """Write dequantized linears to a file; return their bits, and the number of weights."""
    from safetensors.numpy import save_file

    out, needed, count = {}, 0, 0
    group = peers.nearest_group(peer, bits, GROUPS[bits])
    for name, w in iter_linears():
        q = peer.quantize(peer.prepare(w), bits, group)
        out[name] = np.ascontiguousarray(peer.dequantize(q), np.float32)
        needed, count = needed + peer.packed_bits(q), count + w.size
    save_file(out, path)
    return [needed, count]


class Judge:
    """The float model's predictions, of windows of a text.

    Args:
        folder: The folder of the float model's table.
        windows: The number of windows.
    """

    def __init__(self, folder: Path, windows: int) -> None:
        import aq_jax as aq
        from aq_jax.calibration.text import read_text
        from aq_jax.nn import Generator
        from aq_jax.validate.data import HeldOut
        from aq_jax.validate.outputs import GeneratorJudge

        text = str(Path(os.environ[VARIABLE], "judged.txt"))
        config = aq.CalibrationConfig(text, sentences=windows, joined=True, max_tokens=WINDOW)
        floats = aq.load_model(folder / "float.arrow")
        assert isinstance(floats, Generator)
        self._folder, self._tensors = folder, aq.load(folder / "float.arrow", "numpy")
        self._judge = GeneratorJudge(floats, HeldOut(read_text(config), 0, None), WINDOW)

    def report(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Compare the model with these weights in place of its own."""
        import aq_jax as aq
        from aq_jax.nn import Generator

        path = self._folder / "judged.arrow"
        aq.save(path, {name: tensors.get(name, value) for name, value in self._tensors.items()})
        model = aq.load_model(path)
        assert isinstance(model, Generator)
        return self._judge.outputs(model)


def language(full: bool) -> Iterator[Line]:
    """Yield a line for each way to quantize: its divergence, perplexity and agreement, with standard errors."""
    if missing := missing_source():
        yield missing
        return
    from safetensors.numpy import load_file

    from aq_jax.conversion import corridor
    from aq_jax.converters import open_source

    folder = models.scratch_folder() / "language"
    folder.mkdir()
    with open_source(source()) as opened:
        corridor.to_table(opened, folder / "float.arrow")
    judge = Judge(folder, 32 if full else 8)
    for name in CONFIGS if full else ():
        yield from _ours(judge, folder, name)
    with peer_children("benchmarks.suites.language:contenders", modules=MODULES) as (children, skipped):
        yield from skipped
        for child in children.values():
            for name in child.names:
                peer, bits = name.split("|")
                path = folder / "weights.safetensors"
                try:
                    needed, count = child.call(name, str(path))
                except ChildError as why:
                    yield Skipped(f"{peer} {bits} bits", str(why))
                    continue
                yield _line(f"{peer} {bits} bits", needed / count, judge.report(load_file(path)))


def _ours(judge: Judge, folder: Path, name: str) -> Iterator[Line]:
    import aq_jax as aq
    from aq_jax.config.schema import load_config
    from aq_jax.store.inspection import inspect_table

    path, text = folder / "ours" / f"{name}.parquet", Path(os.environ[VARIABLE], "calibration.txt")
    path.parent.mkdir(exist_ok=True)
    sets = (f"source={source()}", f"output={path}", f"calibration.text={text}")
    aq.convert(load_config(f"configs/smollm2_{name}.toml", sets))
    linears = [each for each in inspect_table(path).layers if len(each.shape) == 2 and "embed" not in each.name]
    bits = 8 * sum(each.bytes for each in linears) / sum(each.params for each in linears)
    yield _line(f"aq_jax gptq {name}", bits, judge.report(aq.load(path, "numpy")))


def _line(name: str, bits: float, found: Mapping[str, Any]) -> Result:
    kl, perplexity, same = found["kl"], found["perplexity"], found["same_top"]
    figures = {
        "bits": bits, "standard error": kl["standard_error"], "perplexity": perplexity["quantized"],
        "its standard error": perplexity["standard_error"], "float perplexity": perplexity["float"],
        "same top": same["rate"], "its error": same["standard_error"],
    }  # fmt: skip
    return Result(f"SmolLM2, {name}: KL divergence", kl["mean"], "nats a token", figures=figures)
