"""A float model and its quantized copy, layer by layer, side by side: what their linears are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from aq_jax.calibration.text import Batch
from aq_jax.nn.bert import Bert
from aq_jax.nn.compiled import Program, leaves_of
from aq_jax.nn.llama import Llama

# A model that can be walked has `layers`, `begin` (what the first layer is given) and `advance` (what the next one is).
Model: TypeAlias = Bert | Llama


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

    All layers share their programs: one for each shape of a batch, and each set of linears that are given the same.

    Args:
        model: in float.
        quantized: a copy; its weights are those that quantized ones stand for, and may change until it has passed.
        batches: of token ids.
    """

    def __init__(self, model: Model, quantized: Model, batches: Sequence[Batch]) -> None:
        self._models, self._lengths = (model, quantized), [jnp.asarray(lengths) for _, lengths in batches]
        begin = Program(model, lambda model, ids: model.begin(ids))
        self._states = [[begin(leaves_of(each), jnp.asarray(ids)) for ids, _ in batches] for each in self._models]
        first, x = model.layers[0], self._states[0][0]
        step = step_of(model)
        self.stages: list[list[str]] = []
        jax.eval_shape(lambda: self._see(first, x, jnp.ones(x.shape[:2], bool), step))
        self._given = Program(first, lambda *args, **how: _given(step, *args, **how), ("stage",))
        self._all = Program(first, lambda *args: _all(step, *args))
        self._floats: list[tuple[list[Array], Array]] = []
        self._programs = (begin, self._given, self._all)
        self.layer = 0

    @property
    def compiles(self) -> int:
        """How many programs there are so far."""
        return sum(program.compiles for program in self._programs)

    def _see(self, layer: nnx.Module, x: Array, mask: Array, step: Any) -> None:
        """Which linears a layer calls, in order; those that are given the same array are one stage."""
        self.stages = [paths for paths, _ in staged(tapped(step, layer, x, mask)[0])]

    def moments(self, stage: int) -> Moments:
        """Of what the linears of a stage are given in the current layer."""
        own = cross = jnp.zeros(())
        leaves = leaves_of(self._models[1].layers[self.layer])
        for x, lengths, (given, _) in zip(self._states[1], self._lengths, self._in_float(), strict=True):
            q = self._given(leaves, x, lengths, stage=stage)
            own, cross = own + _product(q, q), cross + _product(q, given[stage])
        return Moments(own, cross, jnp.float32(sum(int(lengths.sum()) for lengths in self._lengths)))

    def advance(self) -> None:
        """On to the next layer, with the weights that both models have now."""
        leaves = leaves_of(self._models[1].layers[self.layer])
        quantized = [self._all(leaves, x, n)[1] for x, n in zip(self._states[1], self._lengths, strict=True)]
        self._states = [[after for _, after in self._in_float()], quantized]
        self._floats = []
        self.layer += 1

    def _in_float(self) -> list[tuple[list[Array], Array]]:
        """Of each batch, in the float model: what the linears of each stage are given, and the next layer."""
        if not self._floats:
            leaves = leaves_of(self._models[0].layers[self.layer])
            self._floats = [self._all(leaves, x, n) for x, n in zip(self._states[0], self._lengths, strict=True)]
        return self._floats


def step_of(model: Model) -> Callable[[Any, Array, Array], Array]:
    """(layer, x, mask) -> what the next layer is given."""
    return partial(cast(Any, type(model)).advance, model.config)


def mask_of(x: Float[Array, "batch tokens width"], lengths: Int[Array, "batch"]) -> Bool[Array, "batch tokens"]:
    """Which tokens are no padding."""
    return jnp.arange(x.shape[1]) < lengths[:, None]


def tapped(step: Any, layer: nnx.Module, x: Array, mask: Array) -> tuple[list[tuple[str, Array]], Array]:
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

    after = step(nnx.recursive_map(wrap, layer), x, mask)
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
    step: Any, layer: nnx.Module, x: Float[Array, "batch tokens width"], lengths: Int[Array, "batch"]
) -> tuple[list[Array], Array]:
    """What the linears of each stage are given, zeros for padding; and what the next layer is given."""
    mask = mask_of(x, lengths)
    seen, after = tapped(step, layer, x, mask)
    return [jnp.where(mask[..., None], given, 0.0).reshape(-1, given.shape[-1]) for _, given in staged(seen)], after


def _given(
    step: Any, layer: nnx.Module, x: Float[Array, "batch tokens width"], lengths: Int[Array, "batch"], stage: int
) -> Float[Array, "tokens inputs"]:
    """Of one stage alone: the compiler leaves out what comes after."""
    return _all(step, layer, x, lengths)[0][stage]


@jax.jit
def _product(a: Float[Array, "tokens inputs"], b: Float[Array, "tokens inputs"]) -> Float[Array, "inputs inputs"]:
    return jnp.matmul(a.T, b, precision="highest")
