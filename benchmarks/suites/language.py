"""Measure what language models predict at eight to two bits beside their float weights, ours and other libraries'.

Each library quantizes the linears; our float32 model runs what it dequantizes, with the embeddings as they are, which
are the head too. Ours are whole tables of the configs, int8 embeddings included.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import language_models, peers
from benchmarks.children import ChildError
from benchmarks.language_models import Subject, text
from benchmarks.suites.contenders import peer_children
from benchmarks.timing import Line, Result, Skipped

MODULES = ("torchao_peer", "hqq_peer", "ggml_peer")
GROUPS = {3: 64, 2: 64}
CONFIGS = ("int8", "int3", "tcq3", "int2", "tcq2")
WINDOW = 512  # tokens
TEXTS = CALIBRATION, JUDGED = "calibration.txt", "judged.txt"
NAMES = ("torchao, HQQ scales", "hqq", "ggml Q3_K", "ggml Q2_K")  # the best of each library


def iter_linears(path: str) -> Iterator[tuple[str, np.ndarray]]:
    """Read the dequantized linears of a file, one by one."""
    from aq_jax.converters import open_source

    with open_source(path) as opened:
        for name, (shape, _) in opened.shapes.items():
            if len(shape) == 2 and "embed" not in name:
                yield name, np.ascontiguousarray(np.asarray(opened.read(name)), np.float32)


def contenders(module: str, source: str) -> dict[str, Callable[..., Any]]:
    """Return, in a child, "peer|bits" -> a call that writes dequantized linears to a file, and returns bits."""
    found = [peer for peer in peers.load(module) if peer.name in NAMES]
    return {f"{peer.name}|{bits}": partial(dequantized, peer, bits, source) for peer in found
            for bits in GROUPS if bits in peer.widths}  # fmt: skip


def dequantized(peer: peers.Peer, bits: int, source: str, path: str) -> list[int]:
    """Write the dequantized linears of a source to a file; return their bits, and the number of weights."""
    from safetensors.numpy import save_file

    out, needed, count = {}, 0, 0
    group = peers.nearest_group(peer, bits, GROUPS[bits])
    for name, w in iter_linears(source):
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

        config = aq.CalibrationConfig(text(JUDGED), sentences=windows, joined=True, max_tokens=WINDOW)
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
    for subject in language_models.present():
        if isinstance(subject, Subject) and (missing := [name for name in TEXTS if not Path(text(name)).is_file()]):
            yield Skipped(subject.name, f"its folder lacks {', '.join(missing)}")
        elif isinstance(subject, Subject):
            yield from _quantized(subject, full)
        else:
            yield subject


def _quantized(subject: Subject, full: bool) -> Iterator[Line]:
    from safetensors.numpy import load_file

    from aq_jax.conversion import corridor
    from aq_jax.converters import open_source

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with open_source(subject.path) as opened:
            corridor.to_table(opened, folder / "float.arrow")
        judge = Judge(folder, subject.judging if full else 8)
        for name in CONFIGS if full else ():
            yield _ours(subject, judge, folder, name)
        target = "benchmarks.suites.language:contenders"
        with peer_children(target, str(subject.path), modules=MODULES) as (children, skipped):
            yield from skipped
            for child in children.values():
                for name in child.names:
                    peer, bits = name.split("|")
                    title, path = f"{peer} {bits} bits", folder / "weights.safetensors"
                    try:
                        needed, count = child.call(name, str(path))
                    except ChildError as why:
                        yield Skipped(f"{subject.name}, {title}", str(why))
                        continue
                    yield _line(subject, title, needed / count, judge.report(load_file(path)))


def _ours(subject: Subject, judge: Judge, folder: Path, name: str) -> Line:
    import aq_jax as aq
    from aq_jax.config.schema import load_config
    from aq_jax.store.inspection import inspect_table

    path = folder / "ours" / f"{name}.parquet"
    path.parent.mkdir(exist_ok=True)
    config = load_config(
        f"configs/smollm2_{name}.toml",
        (
            f"source={subject.path}",
            f"output={path}",
            f"calibration.text={text(CALIBRATION)}",
            f"calibration.sentences={subject.calibrating}",
        ),
    )
    assert config.quantization is not None
    if config.quantization.group_size:
        config = replace(config, quantization=replace(config.quantization, group_size=subject.group))
    aq.convert(config)
    linears = [each for each in inspect_table(path).layers if len(each.shape) == 2 and "embed" not in each.name]
    bits = 8 * sum(each.bytes for each in linears) / sum(each.params for each in linears)
    return _line(subject, f"aq_jax gptq {name}", bits, judge.report(aq.load(path, "numpy")))


def _line(subject: Subject, name: str, bits: float, found: Mapping[str, Any]) -> Result:
    kl, perplexity, same = found["kl"], found["perplexity"], found["same_top"]
    figures = {
        "bits": bits, "standard error": kl["standard_error"], "perplexity": perplexity["quantized"],
        "its standard error": perplexity["standard_error"], "float perplexity": perplexity["float"],
        "same top": same["rate"], "its error": same["standard_error"],
    }  # fmt: skip
    return Result(f"{subject.name}, {name}: KL divergence", kl["mean"], "nats a token", figures=figures)
