"""Run a float model and its quantized copy side by side, layer by layer, and record the inputs of their linears."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from aq_jax.calibration.text import Batch
from aq_jax.nn.compiled import Program, Structure, split_module
from aq_jax.nn.models import Model


class HessianSums(NamedTuple):
    """Sums over tokens; f and q are a linear's inputs in the float and in the quantized model.

    Args:
        own: The sum of q^T q.
        cross: The sum of q^T f.
        tokens: The number of tokens.
    """

    own: Float[Array, "inputs inputs"]
    cross: Float[Array, "inputs inputs"]
    tokens: Float[Array, ""]


class LayerInputs:
    """A float model and its quantized copy that run side by side, one layer at a time.

    Layers of one structure share their programs: one for each shape of a batch, and for each set of linears that share
    an input.

    Args:
        model: The float model.
        quantized: Its copy with dequantized weights; those of layers that have not run yet may change.
        batches: Batches of token ids.
    """

    def __init__(self, model: Model, quantized: Model, batches: Sequence[Batch]) -> None:
        self._models, self._lengths = (model, quantized), [jnp.asarray(lengths) for _, lengths in batches]
        begin = Program(lambda model, ids: model.begin(ids))
        first = [begin.bind(each) for each in self._models]
        self._states = [[run(jnp.asarray(ids)) for ids, _ in batches] for run in first]
        self._one_result = Program(_one_result, ("numbers", "index"))
        self._inputs_and_output = Program(_inputs_and_output)
        self._floats: list[tuple[list[Array], Array]] = []
        self._known: list[dict[int, Array]] = [{} for _ in batches]
        self._linears_by_input: dict[Structure, list[list[str]]] = {}
        self._programs = (begin, self._one_result, self._inputs_and_output)
        self.layer = 0

    @property
    def compiles(self) -> int:
        """Count the programs compiled so far."""
        return sum(program.compiles for program in self._programs)

    @property
    def linears_by_input(self) -> list[list[str]]:
        """List the linears that the current layer calls, in order; those that share an input stand together."""
        structure, leaves = split_module(self._models[0].layers[self.layer])
        if structure not in self._linears_by_input:
            found: list[list[str]] = []

            def trace(leaves: list[Array], x: Array, mask: Array) -> None:
                found.extend(paths for paths, _ in group_by_input(record_inputs(structure.merge(leaves), x, mask)[0]))

            x = self._states[0][0]
            jax.eval_shape(trace, leaves, x, jax.ShapeDtypeStruct(x.shape[:2], np.dtype(bool)))
            self._linears_by_input[structure] = found
        return self._linears_by_input[structure]

    def hessian_sums(self, index: int) -> HessianSums:
        """Sum the products of one input of the current layer, over all batches."""
        own = cross = jnp.zeros((), jnp.float32)
        for known, (given, _), q in zip(self._known, self._float_inputs(), self._quantized(index), strict=True):
            own, cross = own + _gram(q, q), cross + _gram(q, given[index])
            known[index] = q
        return HessianSums(own, cross, jnp.float32(sum(int(lengths.sum()) for lengths in self._lengths)))

    def advance(self) -> None:
        """Run the current layer with the weights that both models have now, and go on to the next."""
        self._states = [[after for _, after in self._float_inputs()], list(self._quantized(None))]
        self._floats, self._known = [], [{} for _ in self._known]
        self.layer += 1

    def _quantized(self, index: int | None) -> Iterator[Array]:
        """Compute an input of the current layer's linears in the quantized model, or its output, batch after batch.

        The inputs that are known already are used, not computed again: their linears have not changed since.
        """
        run = self._one_result.bind(self._models[1].layers[self.layer])
        for x, lengths, known in zip(self._states[1], self._lengths, self._known, strict=True):
            yield run(x, lengths, *known.values(), numbers=tuple(known), index=index)

    def _float_inputs(self) -> list[tuple[list[Array], Array]]:
        """Compute each batch's inputs of the linears, and the layer's output, in the float model."""
        if not self._floats:
            run = self._inputs_and_output.bind(self._models[0].layers[self.layer])
            self._floats = [run(x, n) for x, n in zip(self._states[0], self._lengths, strict=True)]
        return self._floats


def token_mask(x: Float[Array, "batch tokens width"], lengths: Int[Array, "batch"]) -> Bool[Array, "batch tokens"]:
    """Mark the tokens that are not padding."""
    return jnp.arange(x.shape[1], dtype=jnp.int32)[None] < lengths[:, None]


def record_inputs(
    layer: nnx.Module, x: Array, mask: Array, known: Mapping[int, Array] = MappingProxyType({})
) -> tuple[list[tuple[str, Array]], Array]:
    """Call a layer; return the path and the input of each nnx.Linear that it calls, and its output.

    Args:
        layer: The layer.
        x: The layer's inputs.
        mask: Which tokens are no padding.
        known: The values of inputs that are known, by their number among those of `group_by_input`. Linears take them
            instead of what the layer computes, so that the compiler drops what leads to them.
    """
    seen: list[tuple[str, Array]] = []

    class InputRecorder(nnx.Module):
        def __init__(self, path: str, linear: nnx.Linear) -> None:
            self.path, self.linear = path, linear

        def __call__(self, x: Array) -> Array:
            seen.append((self.path, x))
            value = known.get(len(group_by_input(seen)) - 1)
            return self.linear(x if value is None else value.reshape(x.shape))

    def wrap(path: Any, node: Any) -> Any:
        return InputRecorder(".".join(map(str, path)), node) if type(node) is nnx.Linear else node

    after = nnx.recursive_map(wrap, layer)(x, mask)
    return seen, after


def group_by_input(seen: Sequence[tuple[str, Array]]) -> list[tuple[list[str], Array]]:
    """Group successive linears that share an input."""
    out: list[tuple[list[str], Array]] = []
    for path, given in seen:
        if out and out[-1][1] is given:
            out[-1][0].append(path)
        else:
            out.append(([path], given))
    return out


def _inputs_and_output(
    layer: nnx.Module,
    x: Float[Array, "batch tokens width"],
    lengths: Int[Array, "batch"],
    known: Mapping[int, Array] = MappingProxyType({}),
) -> tuple[list[Array], Array]:
    """Call a layer; return the inputs of its linears, zeros for padding, and its output."""
    mask = token_mask(x, lengths)
    seen, after = record_inputs(layer, x, mask, known)
    return [
        jnp.where(mask[..., None], given, 0.0).reshape(-1, given.shape[-1]) for _, given in group_by_input(seen)
    ], after


def _one_result(
    layer: nnx.Module,
    x: Float[Array, "batch tokens width"],
    lengths: Int[Array, "batch"],
    *known: Float[Array, "tokens inputs"],
    numbers: tuple[int, ...],
    index: int | None,
) -> Float[Array, "..."]:
    """Compute one input of a layer's linears, or its output, from those that are known: nothing else is computed."""
    inputs, after = _inputs_and_output(layer, x, lengths, dict(zip(numbers, known, strict=True)))
    return after if index is None else inputs[index]


@jax.jit
def _gram(a: Float[Array, "tokens inputs"], b: Float[Array, "tokens inputs"]) -> Float[Array, "inputs inputs"]:
    return jnp.matmul(a.T, b, precision="highest")
