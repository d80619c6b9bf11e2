"""The protocols of a model and of a family of models."""

from __future__ import annotations

import abc
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from aq_jax.nn.pooling import Mode
from aq_jax.nn.weights import NameRule
from aq_jax.ops import Cached, CacheType

Task = Literal["embed", "generate"]
Cache = list[tuple[Cached, Cached]]
"""The keys and values of each layer."""

# The axis of [outputs, inputs] along which tensor parallelism cuts linear layers, by their names.
CUTS: Mapping[str, int] = dict.fromkeys(("query", "key", "value", "gate", "up", "head"), 0) | {"out": 1, "down": 1}
# Kinds of tensors, by the first pattern that is found in a stored name.
KINDS: Mapping[str, str] = {
    "norms": r"(?i)layer_?norm|(^|\.)norm\.|[qk]_norm",
    "attention": r"attention|attn",
    "feed-forward": r"intermediate|mlp|output\.dense",
    "embeddings": r"embed|lm_head",
}


@dataclass(frozen=True)
class Scorer:
    """The head of a sequence classifier, which turns hidden states into scores, in layers of these names.

    Args:
        pooling: Which hidden state of a text it takes: of its first token ("cls"), its last, or their mean.
        layers: The names of its layers, and what follows each: an activation of `pooling.ACTIVATIONS`, or "LayerNorm"
            for a layer that is one. The last gives the scores.
        pad: The token whose hidden states are not taken, wherever it stands; None for no such token.
    """

    pooling: Mode
    layers: tuple[tuple[str, str], ...]
    pad: int | None = None


class Config(Protocol):
    """The sizes that every model's config has."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def max_position_embeddings(self) -> int: ...


class Model(nnx.Module):
    """A model that runs whole, on padded texts, or layer by layer, for calibration.

    Its `config` is a `Config`; each of its `layers` is called as layer(x, mask) and returns the next layer's inputs.
    """

    config: Any
    layers: Any
    table: ClassVar[str]
    """The path of the embedding table with a row a token: "word.embedding"."""

    @abc.abstractmethod
    def begin(self, ids: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens width"]:
        """Compute the first layer's inputs."""

    def end(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Turn the last layer's outputs into hidden states."""
        return x

    def __call__(
        self,
        ids: Int[Array, "batch tokens"],
        mask: Bool[Array, "batch tokens"],
        types: Int[Array, "batch tokens"] | None = None,
    ) -> Float[Array, "batch tokens width"]:
        """Compute hidden states of whole texts; those of masked tokens mean nothing.

        Args:
            ids: The tokens.
            mask: Which of them are no padding.
            types: The types of tokens, of a model whose `begin` takes them; all are 0 by default.
        """
        x = self.begin(ids) if types is None else self.begin(ids, types)  # type: ignore[reportCallIssue]
        for layer in self.layers:
            x = layer(x, mask)
        return self.end(x)


class LanguageModel(Model):
    """A model that continues a text, and keeps keys and values of the tokens so far in a cache."""

    @abc.abstractmethod
    def empty_cache(self, batch: int, positions: int, dtype: CacheType = "float32") -> Cache:
        """Allocate a cache for this many positions."""

    @abc.abstractmethod
    def extend(
        self,
        ids: Int[Array, "batch tokens"],
        cache: Cache,
        start: int | Int[Array, ""],
        first: Int[Array, "batch"] | None = None,
    ) -> tuple[Float[Array, "batch tokens width"], Cache]:
        """Run tokens that follow `start` others; return their hidden states, and the cache with them in it.

        Args:
            ids: The tokens.
            cache: The cache of the others.
            start: The position of the first token in the cache.
            first: The positions in the cache at which the texts begin, where shorter ones are padded on their left; 0
                by default. Hidden states of padding mean nothing.
        """

    @abc.abstractmethod
    def logits(self, hidden: Float[Array, "*batch width"]) -> Float[Array, "*batch vocabulary"]:
        """Compute scores of the next token."""


@dataclass(frozen=True)
class Family:
    """A kind of models: how config.json is read, which module is built, and where stored tensors go.

    Args:
        model_types: The names of the family in config.json.
        task: "embed" for an encoder, whose hidden states become embeddings; "generate" for a `LanguageModel`.
        read: A function from the parsed config.json and the file's name, for errors, to the model's config.
        module: A function from a config, `activations` and `rngs` to the model.
        names: A function from a config to the rules for stored names (see `nn.weights.match_names`).
        heads: A pattern of stored names that are ignored, though a user may think that they are used.
        cuts: The cuts of tensor parallelism, see `CUTS`; a layer that is not named is on every device.
        kinds: The kinds of tensors, see `KINDS`.
        tokenizer: The class of transformers that makes the tokenizer of a folder that names none; None if it takes
            tokenizer.json as it is.
        scorer: A function from the parsed config.json to how a sequence classifier of the family scores; None if it has
            none.
        sizes: A function from the shapes of stored tensors, and the file's name, to fields that config.json lacks and
            `read` takes; None if it has them all.
        headless: A function from a language model's config to that of its hidden states alone, which become embeddings
            if its folder says so by modules.json; None if they never do.
    """

    model_types: tuple[str, ...]
    task: Task
    read: Callable[[Mapping[str, Any], str], Any]
    module: Callable[..., Model]
    names: Callable[[Any], tuple[NameRule, ...]]
    heads: str = r"(?!)"
    cuts: Mapping[str, int] = field(default_factory=lambda: CUTS)
    kinds: Mapping[str, str] = field(default_factory=lambda: KINDS)
    tokenizer: str | None = None
    headless: Callable[[Any], Any] | None = None
    scorer: Callable[[Mapping[str, Any]], Scorer] | None = None
    sizes: Callable[[Mapping[str, tuple[int, ...]], str], dict[str, Any]] | None = None

    def kind(self, name: str) -> str:
        """Classify a tensor by its stored name."""
        return next((kind for kind, pattern in self.kinds.items() if re.search(pattern, name)), "other")
