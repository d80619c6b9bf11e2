"""Measure products of few rows with large packed weights: beside float32, other libraries', and one pass over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks.children import Child
from benchmarks.suites.contenders import start_children
from benchmarks.suites.qdot import open_session, random_matrices
from benchmarks.timing import Line, compare, race, ratio

SHAPES = ((4096, 4096), (4096, 11008))  # inputs, outputs
ROWS = (1, 4, 32, 512)
GROUP = 128
# The least speed over float32 that one row must have, by the type of weights: of float32 and of int8 inputs.
LEAST = {"int8": ("2", "4"), "int4 g128": ("3", "7"), "int2 g128": ("4", "9")}
ONNX = "ONNX Runtime MatMulNBits"
ONNX_BITS = {"int4 g128": 4, "int2 g128": 2}
INPUTS: dict[Any, int] = {"float32": 1, "int8": 4}  # ONNX Runtime's accuracy_level


def onnx_products() -> dict[str, Callable[..., Any]]:
    """Return, in a child, the calls of ONNX Runtime's MatMulNBits, on random codes."""
    onnx, runtime = peers.library("onnx"), peers.library("onnxruntime")
    calls: dict[str, Callable[..., Any]] = {}
    for inputs, outputs in SHAPES:
        for bits in ONNX_BITS.values():
            for how, level in INPUTS.items():
                session = _session(onnx, runtime, inputs, outputs, bits, level)
                for rows in ROWS:
                    x, _ = random_matrices(inputs, 1, rows)
                    calls[f"{bits}|{how}|{inputs}|{outputs}|{rows}"] = partial(session.run, None, {"x": x})
    return calls


def _session(onnx: Any, runtime: Any, inputs: int, outputs: int, bits: int, level: int) -> Any:
    make, kind = onnx.helper, onnx.TensorProto.FLOAT
    rng, groups = np.random.default_rng(0), inputs // GROUP
    codes = rng.integers(0, 256, (outputs, groups, GROUP * bits // 8), np.uint8)
    scales = rng.uniform(0.01, 0.02, outputs * groups).astype(np.float32)
    node = make.make_node(
        "MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", K=inputs, N=outputs, bits=bits,
        block_size=GROUP, accuracy_level=level,
    )  # fmt: skip
    ends = [make.make_tensor_value_info(n, kind, ["rows", size]) for n, size in (("x", inputs), ("y", outputs))]
    weights = [onnx.numpy_helper.from_array(a, n) for a, n in ((codes, "codes"), (scales, "scales"))]
    graph = make.make_graph([node], "product", ends[:1], ends[1:], weights)
    imports = [make.make_opsetid("", 17), make.make_opsetid("com.microsoft", 1)]
    model = make.make_model(graph, opset_imports=imports, ir_version=8)
    return open_session(runtime, model.SerializeToString())


def weights(full: bool) -> Iterator[Line]:
    """Measure one row, and a few, times 8, 4 and 2 bits."""
    with start_children({ONNX: ("benchmarks.suites.weights:onnx_products",)}) as (children, skipped):
        yield from skipped
        for inputs, outputs in SHAPES if full else SHAPES[:1]:
            for rows in ROWS if full else (1, 32):
                yield from _products(inputs, outputs, rows, children.get(ONNX), 15 if full else 5)


def _products(inputs: int, outputs: int, rows: int, child: Child | None, rounds: int) -> Iterator[Line]:
    import jax
    import jax.numpy as jnp

    import aq_jax as aq

    x, dense = map(jnp.asarray, random_matrices(inputs, outputs, rows))
    # XLA's float32 products of few rows differ thirtyfold by how they are written: the faster of two good ways counts.
    kernel, by_kernel, by_weight = dense.T.copy(), jax.jit(lambda x, k: x @ k), jax.jit(lambda x, w: (w @ x.T).T)
    contenders: dict[str, Any] = {
        "x K": lambda: by_kernel(x, kernel).block_until_ready(),
        "W x": lambda: by_weight(x, dense).block_until_ready(),
    }
    for kind in LEAST:
        bits = kind.partition(" ")[0]
        q: Any = aq.quantize(
            dense, aq.QuantizationConfig(bits, group_size=0 if bits == "int8" else GROUP, solver="absmax")
        )
        for how in INPUTS:
            w = aq.prepare(q, activations=how)  # as models do when they are built
            contenders[f"{kind}|{how}"] = lambda w=w, how=how: aq.qdot(x, w, how).block_until_ready()
            theirs = f"{ONNX_BITS.get(kind)}|{how}|{inputs}|{outputs}|{rows}"
            if child is not None and theirs in child.names:
                contenders[f"{kind}|{how}|onnx"] = child.remote(theirs)
        held = [np.asarray(leaf).reshape(-1).view(np.int64) for leaf in jax.tree.leaves(aq.prepare(q))]
        contenders[f"{kind}|read"] = lambda held=held: [a.max() for a in held]
    times = race(contenders, rounds)
    base = min((times["x K"], times["W x"]), key=lambda timing: timing.median)
    for kind, least in LEAST.items():
        for how, bar in zip(INPUTS, least, strict=True):
            ours, case = times[f"{kind}|{how}"], f"qdot {kind}, {inputs} x {outputs}, {rows} rows, x {how}"
            figures = {"of one pass over the weight": ratio(ours, times[f"{kind}|read"]).value}
            yield compare(case, "JAX float32", base, ours, bar if rows == 1 else "", figures=figures)
            if (peer := times.get(f"{kind}|{how}|onnx")) is not None:
                bars = ("1.0", "1.3") if how == "int8" and rows in (1, 32) else ("", "")
                yield compare(case, ONNX, peer, ours, *bars, figures={})
