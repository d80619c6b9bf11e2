"""Measure products with quantized weights, and other libraries', beside a float32 product in JAX."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import models, peers
from benchmarks.children import Child
from benchmarks.machine import cores
from benchmarks.peers.torch_threads import load_torch, on_device, on_processor
from benchmarks.suites.contenders import start_children
from benchmarks.timing import Line, Result, compare, race, ratio

SHAPES = ((384, 384), (384, 1536), (1536, 384), (2048, 2048))  # inputs, outputs
ROWS = (1, 8, 32, 512)


def random_matrices(inputs: int, outputs: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw x and W, the same in every process."""
    rng = np.random.default_rng(inputs + outputs + rows)
    return rng.standard_normal((rows, inputs), np.float32), rng.standard_normal((outputs, inputs), np.float32)


def torch_products(platform: str) -> dict[str, Callable[..., Any]]:
    """Return, in a child, the calls of torch's products."""
    torch = load_torch()
    device, wait = on_device(torch, platform)
    calls: dict[str, Callable[..., Any]] = {}
    for inputs, outputs in SHAPES:
        for rows in ROWS:
            x, w = map(torch.from_numpy, random_matrices(inputs, outputs, rows))
            for kind in ("float32", "bfloat16"):
                a, b = (t.to(device, getattr(torch, kind)) for t in (x, w))
                calls[f"torch {kind}|{inputs}|{outputs}|{rows}"] = partial(
                    _without_result, wait, torch.nn.functional.linear, a, b
                )
    return calls


def onnx_products(platform: str) -> dict[str, Callable[..., Any]]:
    """Return, in a child, the calls of ONNX Runtime's dynamic int8 products, made by its own quantizer."""
    on_processor(platform)
    onnx, runtime = peers.library("onnx"), peers.library("onnxruntime")
    quantization = peers.library("onnxruntime.quantization")
    calls: dict[str, Callable[..., Any]] = {}
    for inputs, outputs in SHAPES:
        x, w = random_matrices(inputs, outputs, 1)
        session = onnx_session(onnx, runtime, quantization, w)
        for rows in ROWS:
            x, _ = random_matrices(inputs, outputs, rows)
            name = f"ONNX Runtime dynamic int8|{inputs}|{outputs}|{rows}"
            calls[name] = partial(session.run, None, {"x": x})
    return calls


def onnx_session(onnx: Any, runtime: Any, quantization: Any, w: np.ndarray) -> Any:
    """Build a session of x @ W.T, with W quantized ahead, and x when it comes."""
    make, kind = onnx.helper, onnx.TensorProto.FLOAT
    weight = onnx.numpy_helper.from_array(np.ascontiguousarray(w.T), "w")
    ends = [
        make.make_tensor_value_info(name, kind, ["rows", size]) for name, size in zip("xy", w.shape[::-1], strict=True)
    ]
    graph = make.make_graph([make.make_node("MatMul", ["x", "w"], ["y"])], "product", ends[:1], ends[1:], [weight])
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8)
    plain, small = (Path(models.scratch_folder(), f"{kind}.onnx") for kind in ("plain", "int8"))
    onnx.save(model, plain)
    quantization.quantize_dynamic(plain, small)
    return open_session(runtime, str(small))


def open_session(runtime: Any, model: str | bytes) -> Any:
    """Open a model of ONNX Runtime on as many threads as this process has cores."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads = cores()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # would slow the others down
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _without_result(wait: Callable[[], Any], call: Callable[..., Any], *arguments: Any) -> None:
    """Call, wait until it is done, and drop the result, which no pipe carries."""
    call(*arguments)
    wait()


def qdot(full: bool) -> Iterator[Line]:
    """Measure `qdot` for each type of activations, beside the others' products."""
    from aq_jax.core.dispatch import backend

    targets = {
        "torch products": ("benchmarks.suites.qdot:torch_products", backend()),
        "onnx products": ("benchmarks.suites.qdot:onnx_products", backend()),
    }
    with start_children(targets) as (children, skipped):
        yield from skipped
        for inputs, outputs in SHAPES if full else SHAPES[1:2] + SHAPES[3:]:
            for rows in ROWS if full else (1, 32, 512):
                yield from _products(inputs, outputs, rows, list(children.values()), 15 if full else 5)


def vnni_peak() -> float:
    """Measure the operations a second of a core's 8-bit dot products on registers, two for each product; 0 without any.

    Raises:
        BuildError: if it does not compile here.
    """
    from aq_jax import native
    from aq_jax.native.toolchain import find_compiler, this_machine

    if "avx512vnni" not in native.probe().isas:
        return 0.0
    program = models.scratch_folder() / "vnni_peak"
    source = Path(__file__).parent.parent / "vnni_peak.cc"
    command = [
        *find_compiler(this_machine()).command,
        "-O2",
        "-mavx512f",
        "-mavx512vnni",
        str(source),
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True)
    return float(subprocess.run([program], check=True, capture_output=True, text=True).stdout)


def _products(inputs: int, outputs: int, rows: int, children: list[Child], rounds: int) -> Iterator[Line]:
    import jax
    import jax.numpy as jnp

    import aq_jax as aq
    from aq_jax.core.dispatch import ACTIVATIONS

    x, dense = map(jnp.asarray, random_matrices(inputs, outputs, rows))
    packed: dict[str, Any] = {
        "int8": aq.quantize(dense, "int8"),
        "int4 g128": aq.quantize(dense, aq.QuantizationConfig("int4", group_size=128)),
    }
    plain = jax.jit(lambda x, w: x @ w.T)
    contenders: dict[str, Callable[[], object]] = {"float32": lambda: plain(x, dense).block_until_ready()}
    for kind, q in packed.items():
        for how in ACTIVATIONS:
            w = aq.prepare(q, activations=how)  # as models do when they are built
            contenders[f"{kind}, x {how}"] = lambda w=w, how=how: aq.qdot(x, w, how).block_until_ready()
    ending = f"|{inputs}|{outputs}|{rows}"
    theirs = {}
    for child in children:
        theirs |= {name.removesuffix(ending): child.remote(name) for name in child.names if name.endswith(ending)}
    times = race(contenders | theirs, rounds)
    base = times["float32"]
    for kind in packed:
        figures = {f"x {how}": ratio(base, times[f"{kind}, x {how}"]).value for how in ACTIVATIONS}
        chosen = "int8" if kind == "int8" else "float32"  # the default of models with such weights
        ours = times[f"{kind}, x {chosen}"]
        case = f"qdot {kind}, {inputs} x {outputs}, {rows} rows"
        best = f"{max(figures.values()):.2f}"
        yield compare(case, "JAX float32", base, ours, goal=best, note=f"x {chosen}", figures=figures)
        if kind != "int8":
            continue
        if (inputs, rows, cores()) == (2048, 512, 1) and (peak := vnni_peak()):
            share = 2 * rows * inputs * outputs / ours.median / peak
            yield Result(
                f"{case}: of the core's VNNI peak", share, "", "0.35", "0.6", f"{peak / 1e9:.0f} G operations/s"
            )
        for peer in theirs:
            goals = ("0.9", "1.1") if peer.startswith("ONNX") and (inputs, rows) == (2048, 512) else ("", "")
            yield compare(case, peer, times[peer], ours, *goals, figures={})
