"""Compare embeddings of real sentences with float32 ones, and with transformers'; measure memory and programs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import models
from benchmarks.suites.encode import start_others
from benchmarks.timing import Line, Result

if TYPE_CHECKING:
    from aq_jax.core.dispatch import Activations


def quality(full: bool) -> Iterator[Line]:
    """Measure quality with rounded activations, as models run."""
    import jax
    from flax import nnx

    from aq_jax.nn import QLinear

    texts = models.sentences(400)
    float32 = models.encoder("float32")
    exact = np.asarray(float32.encode(texts))
    goals = ("0.9988", "0.9995", "0.9971", "0.998")
    modes: tuple[tuple[str, Activations, tuple[str, str, str, str]], ...] = (
        ("int8", "int8", goals),
        ("int8h", "int8", goals),
        ("int8", "bfloat16", ("", "", "", "")),
        ("int8", "float32", ("", "", "", "")),
    )
    smallest = {}
    for weights, how, limits in modes:
        what = f"{weights} weights, x {how}"
        cosines = (np.asarray(models.encoder(weights, how).encode(texts)) * exact).sum(1)
        smallest[weights, how] = float(cosines.min())
        note = f"smallest {cosines.min():.5f}; {len(texts)} sentences of prose"
        yield Result(f"{what}: embedding cosine, mean", float(cosines.mean()), "", limits[0], limits[1], note)
        yield Result(f"{what}: 1st percentile", float(np.quantile(cosines, 0.01)), "", limits[2], limits[3])
    ids = [encoding.ids for encoding in float32.tokenizer.encode_batch(texts)]
    embedded = {}
    with start_others() as (children, skipped):
        yield from skipped
        for child in children.values():
            for peer in set(child.names) & {"torch float32", "ONNX Runtime int8"}:
                embedded[peer] = np.asarray(child.call(peer, ids), np.float32)
    for peer, found in sorted(embedded.items()):
        if peer == "torch float32":
            difference = float(np.abs(found[:200] - exact[:200]).max())
            yield Result("float32: largest difference from transformers, 200 sentences", difference, "", "<= 1e-5", "")
        else:
            cosines = (found * exact).sum(1)
            low = np.quantile(cosines, 0.01)
            note = f"mean {cosines.mean():.5f}, 1st percentile {low:.5f}; ours {smallest['int8', 'int8']:.5f}"
            yield Result(f"{peer}: smallest embedding cosine", float(cosines.min()), "", "", "", note)

    linears = [layer for _, layer in nnx.iter_modules(models.encoder("int2").model) if isinstance(layer, QLinear)]
    held = sum(leaf.nbytes for layer in linears for leaf in jax.tree.leaves(nnx.state(layer)))
    share = held / sum(4 * math.prod(layer.outputs) * (math.prod(layer.inputs) + 1) for layer in linears)
    yield Result("int2 g128: bytes of linears in memory, of float32", share, "", "<= 0.09", "<= 0.08")

    fresh = models.encoder("int8")
    lengths = np.random.default_rng(1).integers(3, 257, 2000)
    fresh.encode_ids([[101] * int(n) for n in lengths])
    yield Result("programs compiled for 2,000 sentences of 3 to 256 tokens", fresh.compiles, "", "<= 8", "<= 5")
