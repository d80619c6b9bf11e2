"""A float model and its quantized copy, layer by layer, side by side: what their linears are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from aq_jax.calibration.text import Batch
from aq_jax.nn.compiled import Program, Structure, split
from aq_jax.nn.models import Model


class Moments(NamedTuple):
    """Sums over tokens, f and q being what a linear is given in the float and in the quantized model.

    Args:
        own: of q^T q.
        cross: of q^T f.
        tokens: how many there were.
    """

    own: Float[Array, "inputs inputs"]
    cross: Float[Array, "inputs inputs"]
    tokens: Float[Array, ""]


class Walk:
    """Two models' hidden states, taken from layer to layer.

    Layers of one structure share their programs: one for each shape of a batch, and each set of linears that are given
    the same.

    Args:
        model: in float.
        quantized: a copy; its weights are those that quantized ones stand for, and may change until it has passed.
        batches: of token ids.
    """

    def __init__(self, model: Model, quantized: Model, batches: Sequence[Batch]) -> None:
        self._models, self._lengths = (model, quantized), [jnp.asarray(lengths) for _, lengths in batches]
        begin = Program(lambda model, ids: model.begin(ids))
        first = [begin.of(each) for each in self._models]
        self._states = [[run(jnp.asarray(ids)) for ids, _ in batches] for run in first]
        self._given = Program(_given, ("stage",))
        self._all = Program(_all)
        self._floats: list[tuple[list[Array], Array]] = []
        self._stages: dict[Structure, list[list[str]]] = {}
        self._programs = (begin, self._given, self._all)
        self.layer = 0

    @property
    def compiles(self) -> int:
        """How many programs there are so far."""
        return sum(program.compiles for program in self._programs)

    @property
    def stages(self) -> list[list[str]]:
        """List the linears that the current layer calls, in order; those that are given one array are one stage."""
        structure, leaves = split(self._models[0].layers[self.layer])
        if structure not in self._stages:
            found: list[list[str]] = []

            def see(leaves: list[Array], x: Array, mask: Array) -> None:
                found.extend(paths for paths, _ in staged(tapped(structure.merge(leaves), x, mask)[0]))

            x = self._states[0][0]
            jax.eval_shape(see, leaves, x, jax.ShapeDtypeStruct(x.shape[:2], np.dtype(bool)))
            self._stages[structure] = found
        return self._stages[structure]

    def moments(self, stage: int) -> Moments:
        """Of what the linears of a stage are given in the current layer."""
        own = cross = jnp.zeros((), jnp.float32)
        run = self._given.of(self._models[1].layers[self.layer])
        for x, lengths, (given, _) in zip(self._states[1], self._lengths, self._in_float(), strict=True):
            q = run(x, lengths, stage=stage)
            own, cross = own + _product(q, q), cross + _product(q, given[stage])
        return Moments(own, cross, jnp.float32(sum(int(lengths.sum()) for lengths in self._lengths)))

    def advance(self) -> None:
        """On to the next layer, with the weights that both models have now."""
        run = self._all.of(self._models[1].layers[self.layer])
        quantized = [run(x, n)[1] for x, n in zip(self._states[1], self._lengths, strict=True)]
        self._states = [[after for _, after in self._in_float()], quantized]
        self._floats = []
        self.layer += 1

    def _in_float(self) -> list[tuple[list[Array], Array]]:
        """Of each batch, in the float model: what the linears of each stage are given, and the next layer."""
        if not self._floats:
            run = self._all.of(self._models[0].layers[self.layer])
            self._floats = [run(x, n) for x, n in zip(self._states[0], self._lengths, strict=True)]
        return self._floats


def mask_of(x: Float[Array, "batch tokens width"], lengths: Int[Array, "batch"]) -> Bool[Array, "batch tokens"]:
    """Which tokens are no padding."""
    return jnp.arange(x.shape[1], dtype=jnp.int32)[None] < lengths[:, None]


def tapped(layer: nnx.Module, x: Array, mask: Array) -> tuple[list[tuple[str, Array]], Array]:
    """The path of each nnx.Linear of a layer that is called, and what it is given; and what the next layer is given."""
    seen: list[tuple[str, Array]] = []

    class Tap(nnx.Module):
        def __init__(self, path: str, linear: nnx.Linear) -> None:
            self.path, self.linear = path, linear

        def __call__(self, x: Array) -> Array:
            seen.append((self.path, x))
            return self.linear(x)

    def wrap(path: Any, node: Any) -> Any:
        return Tap(".".join(map(str, path)), node) if type(node) is nnx.Linear else node

    after = nnx.recursive_map(wrap, layer)(x, mask)
    return seen, after


def staged(seen: Sequence[tuple[str, Array]]) -> list[tuple[list[str], Array]]:
    """Linears that are given the same array, one after another, are one stage."""
    out: list[tuple[list[str], Array]] = []
    for path, given in seen:
        if out and out[-1][1] is given:
            out[-1][0].append(path)
        else:
            out.append(([path], given))
    return out


def _all(
    layer: nnx.Module, x: Float[Array, "batch tokens width"], lengths: Int[Array, "batch"]
) -> tuple[list[Array], Array]:
    """What the linears of each stage are given, zeros for padding; and what the next layer is given."""
    mask = mask_of(x, lengths)
    seen, after = tapped(layer, x, mask)
    return [jnp.where(mask[..., None], given, 0.0).reshape(-1, given.shape[-1]) for _, given in staged(seen)], after


def _given(
    layer: nnx.Module, x: Float[Array, "batch tokens width"], lengths: Int[Array, "batch"], stage: int
) -> Float[Array, "tokens inputs"]:
    """Of one stage alone: the compiler leaves out what comes after."""
    return _all(layer, x, lengths)[0][stage]


@jax.jit
def _product(a: Float[Array, "tokens inputs"], b: Float[Array, "tokens inputs"]) -> Float[Array, "inputs inputs"]:
    return jnp.matmul(a.T, b, precision="highest")
