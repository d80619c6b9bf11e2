"""Rank texts for a query: a sequence classifier of pairs, as sentence-transformers' CrossEncoder runs it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from aq_jax.core.qtensor import QTensor
from aq_jax.errors import AqError, FormatError
from aq_jax.nn.architecture import is_classifier
from aq_jax.nn.compiled import BoundProgram, nbytes
from aq_jax.nn.encoder import in_order, run_in_batches
from aq_jax.nn.layers import batch_tokens
from aq_jax.nn.models import Model, Scorer
from aq_jax.nn.pooling import ACTIVATIONS, Dense, LayerNorm, Pooling, Stage, embed
from aq_jax.nn.sentences import SETTINGS
from aq_jax.nn.tokenizer import set_truncation, tokenize_texts
from aq_jax.ops import dequantize
from aq_jax.store.folders import Folder
from aq_jax.store.jsonfile import read_json
from aq_jax.store.modules import MODULES, read_modules

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Ranked(NamedTuple):
    """A text's place among those that were ranked.

    Args:
        number: The text's number, from 0.
        score: Its score.
        text: The text.
    """

    number: int
    score: float
    text: str


class Reranker:
    """A sequence classifier of pairs of texts, as `aq_jax.load_model` returns it.

    Args:
        model: A model with its weights.
        tokenizer: The model's tokenizer.
        stages: The stages from hidden states to scores.
        max_tokens: The largest number of tokens of a pair; the longer text is cut.
        pad: The token whose hidden states are not scored, see `Scorer`.
        types: Whether the tokenizer gives the model the types of tokens, if it has several; else all are 0.
    """

    about: ClassVar = "a sequence classifier"

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        stages: Sequence[Stage],
        max_tokens: int,
        *,
        pad: int | None = None,
        types: bool = True,
    ) -> None:
        self.model, self.tokenizer, self.stages, self.max_tokens = model, tokenizer, tuple(stages), max_tokens
        self._types = getattr(model.config, "type_vocab_size", 0) if types else 0
        set_truncation(tokenizer, max_tokens)
        self._score = BoundProgram(model, partial(score_batch, stages=self.stages, pad=pad))
        self._tokens = batch_tokens(model)

    @property
    def compiles(self) -> int:
        """Count the programs compiled so far: one for each padded length, and for each of single pairs."""
        return self._score.compiles

    @property
    def nbytes(self) -> int:
        """Count the bytes of the model's arrays in memory: weights as they are packed, or as kernels prepared them."""
        return nbytes(self.model)

    @property
    def labels(self) -> int:
        """Count the scores of a pair."""
        return next(stage.weight.shape[1] for stage in reversed(self.stages) if isinstance(stage, Dense))

    def rank(
        self,
        query: str,
        texts: Iterable[str],
        top_k: int | None = None,
        *,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> list[Ranked]:
        """Rank texts by their scores for a query, the best first; of equal ones, the first.

        Args:
            query: The query.
            texts: The texts.
            top_k: The number of texts that are returned; by default all.
            progress: A callback that gets a word, how many texts were just done, and how many there are.

        Raises:
            AqError: for a query or texts that are no strings, for a number that is none, and for a model that gives a
                pair several scores.
        """
        if self.labels != 1:
            raise AqError(f"rank: the model gives a pair {self.labels} scores; wanted one; see `predict`")
        if top_k is not None and (type(top_k) is not int or top_k < 1):
            raise AqError(f"rank: top_k = {top_k!r}; wanted a positive integer, or None")
        if not isinstance(query, str) or isinstance(texts, str) or not isinstance(texts, Iterable):
            raise AqError("rank: wanted a string and a list of strings, found others")
        texts = list(texts)
        scores = self.predict([(query, text) for text in texts], progress=progress)[:, 0]
        order = np.argsort(-scores, kind="stable")[:top_k]
        return [Ranked(int(i), float(scores[i]), texts[i]) for i in order]

    def predict(
        self, pairs: Iterable[tuple[str, str]], *, progress: Callable[[str, int, int], None] | None = None
    ) -> Float[np.ndarray, "pairs labels"]:
        """Compute the scores of each pair of texts, after the activation that the folder names.

        Pairs that are too long for the model are cut, the longer text first, with a warning.

        Args:
            pairs: Pairs of strings.
            progress: A callback that gets a word, how many pairs were just done, and how many there are.

        Raises:
            AqError: for pairs that are none, and for a text with a token, or a type of one, that the model has no row
                for.
        """
        given = [tuple(pair) for pair in pairs]
        if not all(len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in given):
            raise AqError("predict: wanted pairs of strings, found others")
        texts = [(str(first), str(second)) for first, second in given]
        found = tokenize_texts(self.tokenizer, texts, self.model.config.vocab_size, "predict")
        if cut := sum(1 for each in found if each.overflowing):
            note = f"{cut} of {len(texts)} pairs are longer than {self.max_tokens} tokens, and were cut"
            warnings.warn(note, stacklevel=2)
        ids, types = ([np.asarray(getattr(each, name), np.int32) for each in found] for name in ("ids", "type_ids"))
        if self._types and (most := max((int(each.max(initial=0)) for each in types), default=0)) >= self._types:
            raise AqError(
                f"predict: the tokenizer gives tokens of type {most}; type_vocab_size in config.json is {self._types}: "
                "leave token_type_ids out of model_input_names"
            )
        numbers = [ids, types] if self._types > 1 else [ids]
        parts = run_in_batches(self._score, numbers, self.max_tokens, self._tokens, progress)
        return in_order(parts, len(texts), self.labels)


def score_batch(
    model: Model,
    ids: Int[Array, "batch tokens"],
    *rest: Int[Array, "..."],
    stages: Sequence[Stage],
    pad: int | None = None,
) -> Float[Array, "batch labels"]:
    """Score a padded batch of pairs; `rest` is the types of tokens, if the model has several, and the lengths."""
    *types, lengths = rest
    mask = jnp.arange(ids.shape[1], dtype=lengths.dtype)[None] < lengths[:, None]
    hidden = model(ids, mask, *types)
    if pad is not None:  # of tokens that are all padding, transformers takes the first
        mask = (mask & (ids != pad)).at[:, 0].set(True)
    return embed(hidden, mask, stages)


def is_reranker(folder: Path, fields: Mapping[str, Any]) -> bool:
    """Tell whether a folder holds a sequence classifier, by sentence-transformers' files, or else by config.json.

    Raises:
        FormatError: for a CrossEncoder of other modules.
    """
    modules, file = read_modules(Folder(folder)), folder / SETTINGS
    if modules is None:
        return is_classifier(fields)
    settings = read_json(folder, SETTINGS, dict) or {}
    if settings.get("model_type") != "CrossEncoder":
        return False
    if (kinds := [module.kind for module in modules]) != ["Transformer"]:
        raise FormatError(f"{folder / MODULES}: has {kinds}; wanted a CrossEncoder of Transformer alone")
    if settings.get("default_prompt_name") is not None:
        raise FormatError(f"{file}: default_prompt_name is {settings['default_prompt_name']!r}; wanted none")
    return True


def read_scoring_stages(
    scorer: Scorer, folder: Path, fields: Mapping[str, Any], tensors: Mapping[str, Any]
) -> tuple[Stage, ...]:
    """Read the stages from hidden states to scores.

    Args:
        scorer: How the model's family scores.
        folder: The folder that holds config.json.
        fields: The fields of config.json.
        tensors: Arrays and QTensors by stored name.

    Raises:
        FormatError: for layers that are missing, or do not fit each other, and for an unknown activation.
    """
    missing = [name for name, _ in scorer.layers if f"{name}.weight" not in tensors]
    if missing:
        raise FormatError(f"{folder}: no tensor {', '.join(f'{name}.weight' for name in missing)}, by which it scores")

    def array(name: str) -> Float[np.ndarray, "..."]:
        found = tensors[name]
        return np.asarray(dequantize(found) if isinstance(found, QTensor) else found, np.float32)

    stages: list[Stage] = [Pooling((scorer.pooling,))]
    width = 0
    for number, (name, act) in enumerate(scorer.layers, 1):
        weight = array(f"{name}.weight")
        bias = array(f"{name}.bias") if f"{name}.bias" in tensors else None
        if weight.ndim != (1 if act == "LayerNorm" else 2) or width not in (0, weight.shape[-1]):
            shape = list(weight.shape)
            raise FormatError(f"{folder}: {name}.weight has the shape {shape}; the layer before gives {width}")
        width = int(weight.shape[0])
        if act == "LayerNorm":
            stages.append(LayerNorm(weight, np.zeros(width, np.float32) if bias is None else bias))
        else:
            last = number == len(scorer.layers)
            act = read_activation(folder, fields, width) if last else act
            stages.append(Dense(np.ascontiguousarray(weight.T), bias, act))
    return tuple(stages)


def read_activation(folder: Path, fields: Mapping[str, Any], labels: int) -> str:
    """Read the name of the activation of scores: by default a sigmoid of one, and none of several.

    Raises:
        FormatError: for an unknown one.
    """
    own = read_json(folder, SETTINGS, dict) or {}
    inside = fields.get("sentence_transformers")
    said = (
        own.get("activation_fn") or (inside.get("activation_fn") if isinstance(inside, dict) else None)
        or fields.get("sbert_ce_default_activation_function")
    )  # fmt: skip
    if said is None:
        return "Sigmoid" if labels == 1 else "Identity"
    name = re.fullmatch(r"torch\.nn\.(?:[a-z.]+\.)?(\w+)", str(said))
    if name is None or name[1] not in ACTIVATIONS:
        raise FormatError(f"{folder}: activation_fn is {said!r}; wanted torch.nn's {', '.join(ACTIVATIONS)}")
    return name[1]
