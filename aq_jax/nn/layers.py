"""NNX layers whose weights stay packed: QLinear and QEmbed replace nnx.Linear and nnx.Embed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Integer, Real

from aq_jax.core.dispatch import TOKENS, Activations, backend
from aq_jax.core.prepared import Prepared, abstract_qtensor, to_qtensor
from aq_jax.core.qtensor import QTensor
from aq_jax.errors import ConfigError
from aq_jax.ops import Epilogue, integer_dot_needs, linear, prepare, qdot, qembed

NOTHING = Epilogue()


class PreparedWeight(nnx.Variable[Prepared]):
    """A weight that a kernel has prepared. It is not a parameter: the QTensor is trained and saved."""


class QLinear(nnx.Module):
    """A layer y = x @ W.T + b on a packed weight, in place of nnx.Linear or nnx.LinearGeneral.

    Args:
        weight: The weight [outputs, inputs], which is a Flax kernel transposed. It is prepared for its products (see
            `aq_jax.prepare`), if that was not done before.
        bias: The bias, of the shape of the outputs, or None.
        activations: The type that inputs are rounded to (see `qdot`).
        inputs: The lengths of the last axes of x, which are multiplied as one; by default one axis.
        outputs: The lengths of the axes that replace them in the result; by default one axis.
        dtype: The dtype of inputs and results; None keeps that of the inputs.

    Raises:
        ValueError: if the weight has another shape.
        ConfigError: for 8-bit activations, if integers cannot be multiplied by this weight.

    >>> import jax.numpy as jnp
    >>> from aq_jax import quantize
    >>> layer = QLinear(quantize(jnp.eye(8), "int8"), jnp.ones(8))
    >>> layer(jnp.arange(8.0)).round().tolist()
    [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    """

    def __init__(
        self,
        weight: QTensor | Prepared,
        bias: Array | None = None,
        *,
        activations: Activations = "float32",
        inputs: tuple[int, ...] | None = None,
        outputs: tuple[int, ...] | None = None,
        dtype: DTypeLike | None = None,
    ) -> None:
        self.bias = None if bias is None else nnx.Param(bias)
        self.activations: Activations = activations
        self.inputs = inputs or weight.shape[1:]
        self.outputs = outputs or weight.shape[:1]
        if (math.prod(self.outputs), math.prod(self.inputs)) != weight.shape:
            raise ValueError(
                f"QLinear: weight of shape {list(weight.shape)} does not fit {self.inputs} -> {self.outputs}"
            )
        _check_activations("QLinear", weight, activations)
        self.weight = _variable(weight, activations, "product")
        self.dtype = None if dtype is None else jnp.dtype(dtype)

    def __call__(
        self, x: Real[Array, "..."], out_sharding: Any = None, after: Epilogue = NOTHING
    ) -> Float[Array, "..."]:
        """Replace the last axes of x, as many as `inputs`, by `outputs`.

        Args:
            x: The inputs.
            out_sharding: See nnx.Linear.
            after: What follows the layer and its bias.

        Raises:
            ValueError: for inputs of another shape, and for a bias in `after`, which is the layer's own.
        """
        if after.bias is not None:
            raise ValueError("QLinear: found a bias in `after`; wanted none, since the layer has its own")
        batch = x.shape[: x.ndim - len(self.inputs)]
        if x.shape[len(batch) :] != self.inputs:
            raise ValueError(f"QLinear: x of shape {list(x.shape)}; wanted [..., {', '.join(map(str, self.inputs))}]")
        x = x if self.dtype is None else x.astype(self.dtype)
        if self.bias is not None:
            after = dataclasses.replace(after, bias=self.bias.get_value().reshape(-1))
        y = linear(x.reshape(*batch, math.prod(self.inputs)), self.weight.get_value(), self.activations, after)
        y = y.reshape(*batch, *self.outputs)
        return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)

    @property
    def qtensor(self) -> QTensor:
        """The weight as a QTensor, also where a kernel has prepared it."""
        return to_qtensor(self.weight.get_value())


class QEmbed(nnx.Module):
    """Rows of a packed table, in place of nnx.Embed: the codes of the rows are gathered, then dequantized.

    Args:
        table: The table [rows, width]. It is prepared for looking rows up, if that was not done before.
        activations: The type that the queries of `attend` are rounded to (see `qdot`).
        dtype: The dtype of rows, queries and logits; None gives rows in float32, and keeps that of the queries.

    Raises:
        ConfigError: for 8-bit activations, if integers cannot be multiplied by this table.

    >>> import jax.numpy as jnp
    >>> from aq_jax import quantize
    >>> QEmbed(quantize(jnp.eye(4), "int8"))(jnp.array([2])).tolist()
    [[0.0, 0.0, 1.0, 0.0]]
    """

    def __init__(
        self, table: QTensor | Prepared, *, activations: Activations = "float32", dtype: DTypeLike | None = None
    ) -> None:
        self.activations: Activations = activations
        _check_activations("QEmbed", table, activations)
        self.table = _variable(table, activations, "rows")
        self.dtype = None if dtype is None else jnp.dtype(dtype)

    def __call__(self, ids: Integer[Array, "*batch"], out_sharding: Any = None) -> Float[Array, "*batch width"]:
        """Look up rows by number; see nnx.Embed for `out_sharding`."""
        rows = qembed(self.table.get_value(), ids)
        rows = rows if self.dtype is None else rows.astype(self.dtype)
        return rows if out_sharding is None else jax.sharding.reshard(rows, out_sharding)

    def attend(self, query: Real[Array, "*batch width"], out_sharding: Any = None) -> Float[Array, "*batch rows"]:
        """Compute query @ table.T, the logits of a tied output head."""
        query = query if self.dtype is None else query.astype(self.dtype)
        logits = qdot(query, self.table.get_value(), self.activations)
        return logits if out_sharding is None else jax.sharding.reshard(logits, out_sharding)

    @property
    def qtensor(self) -> QTensor:
        """The table as a QTensor, also where a kernel has prepared it."""
        return to_qtensor(self.table.get_value())


def _variable(
    weight: QTensor | Prepared, activations: Activations, operation: Literal["product", "rows"]
) -> nnx.Variable[Any]:
    """Make a parameter, or a PreparedWeight if a kernel prepares it."""
    if isinstance(weight, Prepared):
        return PreparedWeight(weight)
    prepared = prepare(weight, activations=activations, operation=operation)
    return nnx.Param(weight) if prepared.arrays is None else PreparedWeight(prepared)


def _check_activations(where: str, weight: QTensor | Prepared, activations: Activations) -> None:
    """Refuse, when a layer is made, a weight that `qdot` would refuse when it is called."""
    if activations == "int8" and (lack := integer_dot_needs(abstract_qtensor(weight))):
        raise ConfigError(
            f"{where}: activations = 'int8' needs {lack}; found {weight}; choose a group_size that divides its rows, "
            "or other activations"
        )


def batch_tokens(model: nnx.Module) -> int:
    """Choose the number of tokens that a model is given at once: as many as its kernels want, or the backend."""
    weights = [value.get_value() for _, value in nnx.iter_graph(model) if isinstance(value, PreparedWeight)]
    return min((w.maker.tokens for w in weights if hasattr(w.maker, "tokens")), default=TOKENS[backend()])
