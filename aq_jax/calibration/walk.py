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
        self._advance = Program(first, lambda layer, x, lengths: step(layer, x, mask_of(x, lengths)))
        self._programs = (begin, self._given, self._advance)
        self.layer = 0

    @property
    def compiles(self) -> int:
        """How many programs there are so far."""
        return sum(program.compiles for program in self._programs)

    def _see(self, layer: nnx.Module, x: Array, mask: Array, step: Any) -> None:
        """Which linears a layer calls, in order; those that are given the same array are one stage."""
        last: Any = None
        for path, given in tapped(step, layer, x, mask):
            if given is last:
                self.stages[-1].append(path)
            else:
                self.stages.append([path])
            last = given

    def moments(self, stage: int) -> Moments:
        """Of what the linears of a stage are given in the current layer."""
        own = cross = jnp.zeros(())
        leaves = [leaves_of(model.layers[self.layer]) for model in self._models]
        for *states, lengths in zip(*self._states, self._lengths, strict=True):
            f, q = (self._given(w, x, lengths, stage=stage) for w, x in zip(leaves, states, strict=True))
            own, cross = own + _product(q, q), cross + _product(q, f)
        return Moments(own, cross, jnp.float32(sum(int(lengths.sum()) for lengths in self._lengths)))

    def advance(self) -> None:
        """On to the next layer, with the weights that both models have now."""
        for model, states in zip(self._models, self._states, strict=True):
            leaves = leaves_of(model.layers[self.layer])
            for i, lengths in enumerate(self._lengths):
                states[i] = self._advance(leaves, states[i], lengths)
        self.layer += 1


def step_of(model: Model) -> Callable[[Any, Array, Array], Array]:
    """(layer, x, mask) -> what the next layer is given."""
    return partial(cast(Any, type(model)).advance, model.config)


def mask_of(x: Float[Array, "batch tokens width"], lengths: Int[Array, "batch"]) -> Bool[Array, "batch tokens"]:
    """Which tokens are no padding."""
    return jnp.arange(x.shape[1]) < lengths[:, None]


def tapped(step: Any, layer: nnx.Module, x: Array, mask: Array) -> list[tuple[str, Array]]:
    """The path of each nnx.Linear of a layer that is called, and what it is given."""
    seen: list[tuple[str, Array]] = []

    class Tap(nnx.Module):
        def __init__(self, path: str, linear: nnx.Linear) -> None:
            self.path, self.linear = path, linear

        def __call__(self, x: Array) -> Array:
            seen.append((self.path, x))
            return self.linear(x)

    def wrap(path: Any, node: Any) -> Any:
        return Tap(".".join(map(str, path)), node) if type(node) is nnx.Linear else node

    step(nnx.recursive_map(wrap, layer), x, mask)
    return seen


def _given(
    step: Any, layer: nnx.Module, x: Float[Array, "batch tokens width"], lengths: Int[Array, "batch"], stage: int
) -> Float[Array, "tokens inputs"]:
    """What the linears of a stage are given; zeros for padding."""
    mask, count, last = mask_of(x, lengths), -1, None
    for _, given in tapped(step, layer, x, mask):
        count += given is not last
        if count == stage:
            return jnp.where(mask[..., None], given, 0.0).reshape(-1, given.shape[-1])
        last = given
    raise AssertionError(f"stage {stage} of {count + 1}")


@jax.jit
def _product(a: Float[Array, "tokens inputs"], b: Float[Array, "tokens inputs"]) -> Float[Array, "inputs inputs"]:
    return jnp.matmul(a.T, b, precision="highest")
