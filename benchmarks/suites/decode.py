"""Measure how fast a quantized language model continues a text, token by token."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np

from aq_jax.native.host import VARIABLE
from benchmarks.machine import cores
from benchmarks.suites.stories import STORIES
from benchmarks.timing import Line, Result, Skipped, Timing, race, ratio

LAYERS, WIDTH, INNER, HEADS, KV_HEADS = 4, 2048, 5632, 32, 4  # TinyLlama's
TOKENS, PROMPT = 16, 16
TYPES = ("int8", "int4", "int2")
OURS = "aq_jax float32"


def decode(full: bool) -> Iterator[Line]:
    """Time a token of four layers beside one pass over their bytes, and of a whole model of 260 thousand parameters."""
    for quant_type in TYPES if full else TYPES[1:2]:
        for activations in ("float32", "int8"):
            yield from layers(quant_type, activations)
    yield from stories()


def layers(quant_type: str, activations: Any) -> Iterator[Line]:
    """Time a token of layers whose weights are random; the head and the table are small."""
    from flax import nnx

    import aq_jax as aq
    from aq_jax.nn import quantize_module
    from aq_jax.nn.decoding import Decoding
    from aq_jax.nn.models import FAMILIES, LanguageModel

    sizes = {"vocab_size": 1024, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
    sizes |= {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 512}
    llama = FAMILIES["llama"]
    numerics = aq.QuantizationConfig(quant_type, group_size=0 if quant_type == "int8" else 128, solver="absmax")
    model = llama.module(llama.read(sizes, "sizes"), activations=activations, rngs=nnx.Rngs(0))
    model = quantize_module(model, numerics, activations=activations)
    packed = words_of(model)
    size = sum(a.nbytes for a in packed)
    decoding = Decoding(cast(LanguageModel, model), ())
    times = race(
        {
            "first": partial(extend, decoding, [1] * PROMPT, 1),
            "all": partial(extend, decoding, [1] * PROMPT, 1 + TOKENS),
            "read": lambda: [a.max() for a in packed],
        },
        9,
    )
    token = a_token(times["all"], times["first"], TOKENS)
    found = ratio(token, times["read"])
    yield Result(
        f"{LAYERS} layers of {WIDTH}, {quant_type}, {activations} inputs, {cores()} cores: a token",
        found.value, "x reading its weights", *(("<= 1.8", "<= 1.2") if quant_type == "int4" else ()),
        low=found.low, high=found.high,
        figures={"ms a token": 1e3 * token.median, "GB/s": size / token.median / 1e9,
                 "reading, GB/s": size / times["read"].median / 1e9},
    )  # fmt: skip


def words_of(model: Any) -> list[np.ndarray]:
    """Return the bytes of a model's arrays as words of eight, whose maximum is as fast as memory is read."""
    import jax
    from flax import nnx

    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]
    return [a.reshape(-1).view(np.uint8)[: a.nbytes // 8 * 8].view(np.int64) for a in arrays]


def extend(decoding: Any, ids: list[int], tokens: int) -> None:
    """Read a prompt, and write as many tokens."""
    from aq_jax.nn.sampling import Sampling

    for _ in decoding.run([ids], [tokens], Sampling(), 0):
        pass


def a_token(every: Timing, first: Timing, count: int) -> Timing:
    """Compute what a token takes: what all take less what the first takes, by how many more they are."""
    pairs = zip(every.times, first.times, strict=True)
    return Timing(tuple((both - one) / count for both, one in pairs), 0.0)


def stories() -> Iterator[Line]:
    """Time the continuation of a story by a real model, quantized, beside its float32 self."""
    folder = os.environ.get(STORIES)
    if not folder:
        yield Skipped("stories260k", f"{STORIES} names no folder")
        return
    import aq_jax as aq
    from aq_jax.converters import llama2c

    with tempfile.TemporaryDirectory() as tables:
        floats = Path(tables, "float32.arrow")
        llama2c.to_table(Path(folder, "stories260K.bin"), Path(folder, "tok512.bin"), floats)
        models: dict[str, Any] = {OURS: aq.load_model(floats)}
        for quant_type in ("int8", "int4"):
            path = Path(tables, f"{quant_type}.arrow")
            aq.quantize_file(floats, path, aq.QuantizationConfig(quant_type, per_channel=True))
            models[quant_type] = aq.load_model(path, "float32")
    counts: dict[str, int] = {}

    def tell(name: str, kernel: str | None = None) -> Callable[[], None]:
        def run() -> None:
            with mock.patch.dict(os.environ, {VARIABLE: kernel} if kernel else {}):
                counts[name] = len(models[name].generate_ids([1], 200))

        return run

    times = race({"float32 JAX": tell(OURS, "xla")} | {name: tell(name) for name in models}, 9)
    for name in ("int8", "int4"):
        for peer, limits in (("float32 JAX", ("1.0", "2")), (OURS, ("", ""))):
            found = ratio(times[peer], times[name])
            scale = counts[name] / counts[OURS]
            yield Result(
                f"stories260k {name}, {cores()} cores: tokens a second", found.value * scale, "x speed", *limits,
                "by native attention" if peer == OURS else "", peer=peer, low=found.low * scale,
                high=found.high * scale, figures={"tokens/s": counts[name] / times[name].median},
            )  # fmt: skip
