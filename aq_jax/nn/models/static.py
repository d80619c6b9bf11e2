"""Static embeddings: a table with a row a token, whose mean over a text is its embedding.

Those that model2vec writes have config.json; those of sentence-transformers' StaticEmbedding have none. A table may be
smaller than the vocabulary: then a mapping says which row is a token's, and weights what it is multiplied by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from aq_jax.config.fields import Fields
from aq_jax.core.dispatch import Activations
from aq_jax.errors import FormatError
from aq_jax.nn.models.family import Family, Model
from aq_jax.nn.weights import keep

TABLES = ("embedding.weight", "embeddings")  # sentence-transformers' name, and model2vec's
# How a table was made, and what `nn.static` reads.
IDLE = (
    "model_type", "architectures", "tokenizer_name", "apply_pca", "apply_zipf", "sif_coefficient", "hidden_dim",
    "seq_length", "pooling", "embedding_dtype", "vocabulary_quantization", "normalize", "max_length",
)  # fmt: skip


@dataclass(frozen=True)
class StaticConfig:
    """The sizes of a table.

    Args:
        vocab_size: The number of tokens.
        hidden_size: The width of rows.
        rows: The number of rows.
        mapped: Whether a mapping says which row is a token's.
        weighted: Whether a token's row is multiplied by its weight.
    """

    vocab_size: int
    hidden_size: int
    rows: int
    mapped: bool = False
    weighted: bool = False
    max_position_embeddings: int = 2**31 - 1

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], where: str) -> StaticConfig:
        """Read model2vec's config.json, with the sizes that `sizes` adds.

        Raises:
            FormatError: for a table that is missing, and for fields that are not known.
        """
        given = Fields(fields, where)
        given.leave(*IDLE)
        counts = {name: given.take(name, int, 1) for name in ("vocab_size", "hidden_size", "rows")}
        config = cls(**counts, **{name: given.take(name, bool, False) for name in ("mapped", "weighted")})
        given.finish()
        return config


def sizes(shapes: Mapping[str, tuple[int, ...]], where: str) -> dict[str, Any]:
    """Find the sizes that config.json lacks, by the shapes of stored tensors.

    Raises:
        FormatError: for shapes that are not those of a table, its mapping and its weights.

    >>> sizes({"embeddings": (5, 8), "mapping": (9,)}, "m.parquet")["vocab_size"]
    9
    """
    table = next((shapes[name] for name in TABLES if name in shapes), ())
    beside = {name: shapes[name] for name in ("mapping", "weights") if name in shapes}
    count = beside.get("mapping", table[:1])
    if len(table) != 2 or len(count) != 1 or any(shape != count for shape in beside.values()):
        found = {name: list(shape) for name, shape in shapes.items()}
        raise FormatError(
            f"{where}: has tensors {str(found)[:200]}; wanted a table, {' or '.join(TABLES)}, and of each token a "
            "number in mapping and weights, if they are there"
        )
    there = {"mapped": "mapping" in beside, "weighted": "weights" in beside}
    return {"vocab_size": count[0], "hidden_size": table[1], "rows": table[0]} | there


class Static(Model):
    """The table: ids to rows.

    Args:
        config: The table's sizes.
        activations: Nothing: no layer multiplies.
        rngs: The random streams of the initial table.
    """

    table = "embed.embedding"

    def __init__(self, config: StaticConfig, *, activations: Activations = "float32", rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = nnx.Embed(config.rows, config.hidden_size, rngs=rngs)
        if config.mapped:  # float32, as all that is no code: it holds integers below 2^24
            self.mapping = nnx.Param(jnp.zeros(config.vocab_size, jnp.float32))
        if config.weighted:
            self.weights = nnx.Param(jnp.ones(config.vocab_size, jnp.float32))
        self.layers = nnx.List([])

    def begin(self, ids: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens width"]:
        """Look up the tokens' rows."""
        rows = self.mapping.get_value()[ids].astype(jnp.int32) if self.config.mapped else ids
        found = self.embed(rows)
        return found * self.weights.get_value()[ids][..., None] if self.config.weighted else found


NAMES = (
    (r"embedding\.weight|embeddings", "embed.embedding", keep),
    ("mapping", "mapping", keep), ("weights", "weights", keep),
)  # fmt: skip
STATIC = Family(
    ("model2vec", "static_embedding"), "embed", StaticConfig.from_json, Static, lambda _: NAMES,
    kinds={"embeddings": "embedding"}, sizes=sizes,
)  # fmt: skip
