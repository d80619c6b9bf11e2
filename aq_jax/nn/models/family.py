"""What every model has, and what a family of models says of itself: all that others ask of them."""

from __future__ import annotations

import abc
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from aq_jax.nn.weights import Mapped

Task = Literal["embed", "generate"]
# Of each layer, keys and values of all positions: [batch, positions, kv_heads, head_size].
Cache = list[tuple[Float[Array, "batch positions heads size"], Float[Array, "batch positions heads size"]]]

# The axis of [outputs, inputs] along which linear layers of these names are cut for tensor parallelism.
CUTS: Mapping[str, int] = dict.fromkeys(("query", "key", "value", "gate", "up", "head"), 0) | {"out": 1, "down": 1}
# What a stored name says of a tensor: the first pattern that is found in it.
KINDS: Mapping[str, str] = {
    "norms": r"(?i)layer_?norm|(^|\.)norm\.",
    "attention": r"attention|attn",
    "feed-forward": r"intermediate|mlp|output\.dense",
    "embeddings": r"embed|lm_head",
}


class Config(Protocol):
    """What of a model's sizes others ask for."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def max_position_embeddings(self) -> int: ...


class Model(nnx.Module):
    """A model that runs whole, on padded texts, or layer by layer, as calibration runs it.

    Its `config` is a `Config`; each of its `layers` is called as layer(x, mask) and gives what the next one is given.
    """

    config: Any
    layers: Any
    table: ClassVar[str]
    """The path of the embedding table with a row a token: "word.embedding"."""

    @abc.abstractmethod
    def begin(self, ids: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens width"]:
        """What the first layer is given."""

    def end(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Hidden states, of what the last layer gives."""
        return x

    def __call__(
        self, ids: Int[Array, "batch tokens"], mask: Bool[Array, "batch tokens"]
    ) -> Float[Array, "batch tokens width"]:
        """Hidden states of whole texts; those of masked tokens mean nothing."""
        x = self.begin(ids)
        for layer in self.layers:
            x = layer(x, mask)
        return self.end(x)


class LanguageModel(Model):
    """A model that goes on with a text, and keeps keys and values of what it has seen in a cache."""

    @abc.abstractmethod
    def empty_cache(self, batch: int, positions: int) -> Cache:
        """Room for the keys and values of so many positions."""

    @abc.abstractmethod
    def extend(
        self, ids: Int[Array, "batch tokens"], cache: Cache, start: int | Int[Array, ""]
    ) -> tuple[Float[Array, "batch tokens width"], Cache]:
        """Hidden states of tokens that follow `start` others, and the cache with them in it."""

    @abc.abstractmethod
    def logits(self, hidden: Float[Array, "*batch width"]) -> Float[Array, "*batch vocabulary"]:
        """Scores of the next token."""


@dataclass(frozen=True)
class Family:
    """Models of one kind: how config.json is read, what is made of it, and where stored tensors go.

    Args:
        model_types: as config.json names them.
        task: "embed" for an encoder, whose hidden states become embeddings; "generate" for a `LanguageModel`.
        read: of the parsed config.json and the file's name, for errors: the model's config.
        module: of a config, `activations` and `rngs`: the model.
        names: of a config: where each stored tensor goes (see `nn.weights.match_names`).
        heads: pattern of stored names that go nowhere, and of which a user may think that they are used.
        cuts: see `CUTS`; a layer that is not named is on every device.
        kinds: see `KINDS`.
        tokenizer: the class of which transformers makes the tokenizer of a folder that names none.
    """

    model_types: tuple[str, ...]
    task: Task
    read: Callable[[Mapping[str, Any], str], Any]
    module: Callable[..., Model]
    names: Callable[[Any], tuple[Mapped, ...]]
    heads: str = r"(?!)"
    cuts: Mapping[str, int] = field(default_factory=lambda: CUTS)
    kinds: Mapping[str, str] = field(default_factory=lambda: KINDS)
    tokenizer: str | None = None

    def kind(self, name: str) -> str:
        """What a tensor is for, by its stored name."""
        return next((kind for kind, pattern in self.kinds.items() if re.search(pattern, name)), "other")
