"""Run a table's model: write embeddings, generate text."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from aq_jax.errors import FormatError

if TYPE_CHECKING:
    from aq_jax.core.dispatch import Activations
    from aq_jax.progress import Progress


@dataclass(frozen=True, slots=True)
class EmbeddingResult:
    """The result of `embed`, with the number of programs that it compiled."""

    path: str
    texts: int
    width: int
    compiles: int
    seconds: Mapping[str, float]


def embed(
    model: str | os.PathLike[str],
    texts: Sequence[str],
    path: str | os.PathLike[str],
    activations: Activations | None = None,
    progress: Progress | None = None,
    *,
    prompt_name: str | None = None,
    prompt: str | None = None,
) -> EmbeddingResult:
    """Write the embedding of each text to a file.

    Args:
        model: The path of a table with config.json and tokenizer files beside it (see `load_model`).
        texts: The texts in the order in which they are written.
        path: The path of a .npy (the array) or .parquet file (columns text and embedding); it appears whole, or not at
            all.
        activations: See `load_model`.
        progress: A callback that gets a word, how many texts were just done, and how many there are.
        prompt_name, prompt: See `Encoder.encode`.

    Raises:
        FormatError, ConfigError: as `load_model`; for a model that is no encoder, or a path of another suffix.
        AqError: for a prompt that the model does not have.
    """
    from aq_jax.nn import Encoder, load_model
    from aq_jax.nn.models import model_types
    from aq_jax.store.embeddings import check_embeddings_path, write_embeddings

    check_embeddings_path(path)
    start = time.perf_counter()
    encoder = load_model(model, activations)
    if not isinstance(encoder, Encoder):
        raise FormatError(f"{model}: holds a language model; wanted an encoder: {model_types('embed')}")
    loaded = time.perf_counter()
    embeddings = np.asarray(encoder.encode(texts, progress, prompt_name=prompt_name, prompt=prompt))
    done = time.perf_counter()
    write_embeddings(path, texts, embeddings)
    seconds = {"load": loaded - start, "encode": done - loaded, "write": time.perf_counter() - done}
    return EmbeddingResult(str(path), len(texts), embeddings.shape[1], encoder.compiles, seconds)


def generate(
    model: str | os.PathLike[str],
    prompt: str,
    max_tokens: int = 128,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    activations: Activations | None = None,
) -> str:
    """Generate the continuation of a prompt (see `Generator.generate`).

    Raises:
        FormatError, ConfigError: as `load_model`; for a model that does not generate.
        AqError: for numbers out of their range.
    """
    from aq_jax.nn import Generator, load_model
    from aq_jax.nn.models import model_types

    generator = load_model(model, activations)
    if not isinstance(generator, Generator):
        raise FormatError(f"{model}: holds an encoder; wanted a language model: {model_types('generate')}")
    return generator.generate(prompt, max_tokens, temperature=temperature, top_p=top_p, seed=seed)
