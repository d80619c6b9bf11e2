"""Run a table's model: write embeddings, generate text."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from aq_jax.errors import FormatError

if TYPE_CHECKING:
    from aq_jax.core.dispatch import Activations
    from aq_jax.nn.generator import Generator
    from aq_jax.nn.precision import Precision
    from aq_jax.nn.reranker import Ranked
    from aq_jax.progress import Progress

T = TypeVar("T")


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
    precision: Precision = "float32",
    truncate_dim: int | None = None,
    inputs: Sequence[str | os.PathLike[str]] = (),
) -> EmbeddingResult:
    """Write the embedding of each text to a file.

    Args:
        model: The path of a table with config.json and tokenizer files beside it (see `load_model`).
        texts: The texts in the order in which they are written.
        path: The path of a .npy (the array) or .parquet file (columns text and embedding); it appears whole, or not at
            all. It may not be the model, or a .parquet file that holds anything but embeddings.
        activations: See `load_model`.
        progress: A callback that gets a word, how many texts were just done, and how many there are.
        prompt_name, prompt, precision, truncate_dim: See `Encoder.encode`.
        inputs: The files that the texts come from, which `path` may not be.

    Raises:
        FormatError, ConfigError: as `load_model`; for a model that is no encoder; for a path of another suffix, or of
            a file that is not to be replaced.
        AqError: for a prompt that the model does not have.
    """
    from aq_jax.nn import Encoder
    from aq_jax.nn.models import model_types
    from aq_jax.store.embeddings import check_embeddings_path, write_embeddings

    check_embeddings_path(path, (model, *inputs))
    start = time.perf_counter()
    encoder = _load(model, activations, Encoder, f"an encoder: {model_types('embed')}")
    loaded = time.perf_counter()
    chosen = {"prompt_name": prompt_name, "prompt": prompt, "precision": precision, "truncate_dim": truncate_dim}
    embeddings = np.asarray(encoder.encode(texts, progress, **chosen))
    done = time.perf_counter()
    write_embeddings(path, texts, embeddings)
    seconds = {"load": loaded - start, "encode": done - loaded, "write": time.perf_counter() - done}
    return EmbeddingResult(str(path), len(texts), embeddings.shape[1], encoder.compiles, seconds)


def rank(
    model: str | os.PathLike[str],
    query: str,
    texts: Sequence[str],
    top_k: int | None = None,
    activations: Activations | None = None,
    progress: Progress | None = None,
) -> list[Ranked]:
    """Rank texts for a query (see `Reranker.rank`).

    Raises:
        FormatError, ConfigError: as `load_model`; for a model that does not rank.
        AqError: for a number of texts that is none.
    """
    from aq_jax.nn import Reranker

    reranker = _load(model, activations, Reranker, "a sequence classifier, such as a CrossEncoder")
    return reranker.rank(query, texts, top_k, progress=progress)


def load_generator(model: str | os.PathLike[str], activations: Activations | None = None) -> Generator:
    """Load a language model.

    Raises:
        FormatError, ConfigError: as `load_model`; for another kind of model.
    """
    from aq_jax.nn import Generator
    from aq_jax.nn.models import model_types

    return _load(model, activations, Generator, f"a language model: {model_types('generate')}")


def _load(model: str | os.PathLike[str], activations: Activations | None, kind: type[T], wanted: str) -> T:
    from aq_jax.nn import load_model

    found = load_model(model, activations)
    if not isinstance(found, kind):
        raise FormatError(f"{model}: holds {found.about}; wanted {wanted}")
    return found
