"""Measure sentences a second of MiniLM: ours, transformers in torch, ONNX Runtime's dynamic int8."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import models, peers
from benchmarks.children import Child
from benchmarks.machine import cores
from benchmarks.peers.torch_threads import load_torch, on_device, on_processor
from benchmarks.suites.contenders import Started, start_children
from benchmarks.suites.qdot import open_session
from benchmarks.timing import Line, Result, compare, race

SHAPES = ((1, 16), (32, 64), (32, 128))  # sentences in a call, tokens of each
MIXED, BATCH = 64, 32  # real sentences; a batch of the other libraries, sorted by length
TABLES = {"float32": "float32", "W8A8": "int8", "W8A8 rotated": "int8h"}
Run = Callable[[np.ndarray, np.ndarray], np.ndarray]
CASES = (*(f"{batch} x {tokens} tokens" for batch, tokens in SHAPES), f"{MIXED} real sentences")


@cache
def case_ids(case: str) -> list[list[int]]:
    """Return the token ids of a case: random ones without padding, or sentences of prose."""
    if case == CASES[-1]:
        from aq_jax.nn.sentences import read_sentence_tokenizer

        texts = models.sentences(400)[:: 400 // MIXED][:MIXED]
        return [encoding.ids for encoding in read_sentence_tokenizer(models.folder()).encode_batch(texts)]
    batch, tokens = SHAPES[CASES.index(case)]
    return np.random.default_rng(0).integers(1000, 30000, (batch, tokens)).tolist()


def embed(run: Run, ids: list[list[int]]) -> np.ndarray:
    """Embed by a model that takes padded batches, as sentence-transformers makes them."""
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    out = np.empty((len(ids), 384), np.float32)
    for start in range(0, len(ids), BATCH):
        members = order[start : start + BATCH]
        batch, mask = (np.zeros((len(members), len(ids[members[0]])), np.int64) for _ in range(2))
        for row, member in enumerate(members):
            batch[row, : len(ids[member])], mask[row, : len(ids[member])] = ids[member], 1
        out[members] = run(batch, mask)
    return out


def _calls(models_by_name: dict[str, Run]) -> dict[str, Callable[..., Any]]:
    def timed(run: Run, case: str) -> None:
        embed(run, case_ids(case))

    calls: dict[str, Callable[..., Any]] = {
        f"{name}|{case}": partial(timed, run, case) for name, run in models_by_name.items() for case in CASES
    }
    # The suite `quality` calls these: embeddings of given ids.
    return calls | {name: lambda ids, run=run: embed(run, ids).tolist() for name, run in models_by_name.items()}


def torch_models(platform: str) -> dict[str, Callable[..., Any]]:
    """Return, in a child, the calls of transformers' BertModel, mean pooled, in float32 and bfloat16."""
    torch = load_torch()
    device, _ = on_device(torch, platform)
    from transformers import BertModel

    def run(ids: np.ndarray, mask: np.ndarray, model: Any) -> np.ndarray:
        with torch.inference_mode():
            tokens, kept = (torch.as_tensor(part, device=device) for part in (ids, mask))
            hidden = model(tokens, kept)[0].float() * kept[..., None]
            return torch.nn.functional.normalize(hidden.sum(1) / kept.sum(1, keepdim=True)).cpu().numpy()

    found = {}
    for name in ("float32", "bfloat16"):
        model = BertModel.from_pretrained(models.folder(), dtype=getattr(torch, name)).eval()
        torch.nn.Module.to(model, device)
        found[f"torch {name}"] = partial(run, model=model)
    return _calls(found)


def onnx_models(platform: str) -> dict[str, Callable[..., Any]]:
    """Return, in a child, the calls of ONNX Runtime's dynamic int8: exported by torch, quantized by its own tool."""
    on_processor(platform)
    runtime, _, torch = peers.library("onnxruntime"), peers.library("onnx"), load_torch()
    session = open_session(runtime, str(_onnx_file(torch)))

    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return mean_pooled(np.asarray(session.run(None, {"ids": ids, "mask": mask})[0]), mask)

    return _calls({"ONNX Runtime int8": run})


def _onnx_file(torch: Any) -> Path:
    from transformers import BertModel

    bert = BertModel.from_pretrained(models.folder(), attn_implementation="eager").eval()

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = bert

        def forward(self, ids: Any, mask: Any) -> Any:
            return self.bert(ids, mask)[0]

    exported, quantized = models.scratch_folder() / "minilm.onnx", models.scratch_folder() / "minilm_int8.onnx"
    ids = torch.ones((2, 8), dtype=torch.int64)
    axes = {name: {0: "batch", 1: "tokens"} for name in ("ids", "mask", "hidden")}
    names = {"input_names": ["ids", "mask"], "output_names": ["hidden"], "dynamic_axes": axes}
    with torch.inference_mode():
        torch.onnx.export(Hidden(), (ids, ids), str(exported), dynamo=False, opset_version=17, **names)
    peers.library("onnxruntime.quantization").quantize_dynamic(exported, quantized)
    return quantized


def mean_pooled(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Pool and normalize as sentence-transformers does."""
    kept = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return kept / np.linalg.norm(kept, axis=1, keepdims=True)


def start_others() -> AbstractContextManager[Started]:
    """Start the other libraries that are installed."""
    from aq_jax.core.dispatch import backend

    return start_children(
        {f"encode by {name}": (f"benchmarks.suites.encode:{name}_models", backend()) for name in ("torch", "onnx")}
    )


def encode(full: bool) -> Iterator[Line]:
    """Yield ratios of sentences a second, and the speeds themselves."""
    with start_others() as (children, skipped):
        yield from skipped
        for case in CASES if full else CASES[:2]:
            yield from _race_case(case, list(children.values()), full)


@cache
def _ours(full: bool) -> dict[str, Any]:
    found = {name: models.encoder(table) for name, table in TABLES.items()}
    return found | ({"int8 weights, bfloat16": models.encoder("int8", "bfloat16")} if full else {})


def _race_case(case: str, others: list[Child], full: bool) -> Iterator[Line]:
    ids, ours = case_ids(case), _ours(full)
    contenders: dict[str, Callable[[], object]] = {
        name: lambda model=model: model.encode_ids(ids).block_until_ready() for name, model in ours.items()
    }
    for child in others:
        ending = f"|{case}"
        contenders |= {n.removesuffix(ending): child.remote(n) for n in child.names if n.endswith(ending)}
    single = len(ids) == 1
    times = race(contenders, (25 if single else 5) if full else (9 if single else 3))
    yield from ratios(case, times)
    for name in ours:
        yield Result(f"MiniLM {name}, {case}: first call longer by", times[name].first, "s")


def ratios(case: str, times: Any) -> Iterator[Line]:
    """Yield W8A8 beside all others, and the other pairs that have a goal."""
    from aq_jax.core.dispatch import backend

    goals = {
        ("W8A8", "float32"): ("2.3", "4"),
        ("W8A8", "torch float32"): ("2", "3"),
        ("W8A8", "ONNX Runtime int8"): ("1.0", "1.35"),
    }
    if case == CASES[1]:
        goals[("int8 weights, bfloat16", "float32")] = ("2", "2.5")
    if backend() != "cpu":
        goals = {}
    pairs = [("W8A8", other) for other in times if other not in ("W8A8", "W8A8 rotated", "int8 weights, bfloat16")]
    pairs += [("W8A8 rotated", "ONNX Runtime int8")]
    count, label = len(case_ids(case)), {"float32": "aq_jax float32"}
    for mine, other in (*pairs, ("int8 weights, bfloat16", "float32"), ("float32", "torch float32")):
        if mine not in times or other not in times:
            continue
        figures = {"sentences/s": count / times[mine].median, "theirs": count / times[other].median}
        yield compare(
            f"MiniLM {mine}, {case}, {cores()} cores", label.get(other, other), times[other], times[mine],
            *goals.get((mine, other), ("", "")), figures=figures,
        )  # fmt: skip
