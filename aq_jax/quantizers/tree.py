"""Apply a config's quantizers to a tree of arrays, by their names."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from aq_jax.config import QuantizationConfig
from aq_jax.config.quantization import check_choice
from aq_jax.core.frameworks import is_variable, refuse_masked, to_native_byte_order, to_numpy
from aq_jax.core.prepared import Prepared
from aq_jax.core.qtensor import QTensor
from aq_jax.core.torch_tensors import is_torch
from aq_jax.quantizers.apply import policy_of, quantize, quantize_on_host
from aq_jax.quantizers.treatment import Treatment, kept_notes, treat
from aq_jax.quantizers.unused import unused_notes
from aq_jax.store import DTYPES


def quantize_tree(params: Any, config: QuantizationConfig | str, *, layout: str = "out_in") -> Any:
    """Quantize the floating leaves of two axes or more of a pytree; the others, and QTensors, pass through.

    A leaf's name, which the config's patterns see, is its path joined by dots: {"a": {"b": w}} has "a.b". A variable of
    Flax NNX has its own path, and nothing of it adds to the name: a kernel of `nnx.state(model)` ends in ".kernel".
    Stacked norms and biases, of two axes, are left as they are, with a warning that names them, unless an override says
    otherwise (see `treat`). What the config says that holds for no leaf is warned of, too.
    Concrete leaves stream through tiles of one shape, so that a tree of many shapes compiles no more often than a
    small one; traced and abstract leaves are quantized where they are.

    Args:
        params: A tree of JAX, NumPy or torch arrays. QTensors, integers and other objects pass through.
        config: The config, or just a quant_type.
        layout: "in_out" says that weights are [in, out], as Flax's kernels are: the last two axes of each leaf that is
            quantized are exchanged first, so that groups lie along the inputs. Its QTensor, and what `dequantize` gives
            of it, is [out, in]. Embeddings, by their names, are not turned.

    Raises:
        ConfigError: for another layout.
        AqError: as for `quantize`, naming the leaf.

    >>> import jax.numpy as jnp
    >>> from aq_jax import quantize_tree
    >>> quantize_tree({"dense": {"kernel": jnp.ones((2, 8))}}, "int8", layout="in_out")["dense"]["kernel"].shape
    (8, 2)
    >>> tree = quantize_tree({"dense": {"kernel": jnp.ones((2, 8)), "bias": jnp.ones(2)}}, "int8")
    >>> tree["dense"]["kernel"].shape, tree["dense"]["kernel"].spec.bits, tree["dense"]["bias"].dtype
    ((2, 8), 8, dtype('float32'))
    """
    made, treatments = quantize_leaves(params, config, layout)
    for note in kept_notes(treatments) + unused_notes(policy_of(config), treatments):
        warnings.warn(f"quantize_tree: {note}", stacklevel=2)
    return made


def quantize_leaves(
    params: Any, config: QuantizationConfig | str, layout: str = "out_in"
) -> tuple[Any, dict[str, Treatment]]:
    """Do what `quantize_tree` does, of a part of a model, too; return what became of each leaf instead of warning.

    Raises:
        ConfigError, AqError: as `quantize_tree`.
    """
    check_choice("layout", layout, ("out_in", "in_out"))
    policy, treatments = policy_of(config), dict[str, Treatment]()
    kept = (QTensor, Prepared)

    def quantized(name: str, leaf: Any) -> Any:
        turned = leaf if layout == "out_in" else _turned(name, leaf)
        found = _quantize_leaf(name, turned, policy, treatments)
        if isinstance(found, QTensor) or turned is leaf:
            return found
        return leaf if found is turned else _turned(name, found)  # back, what is float16

    return map_named(quantized, params, lambda x: isinstance(x, kept)), treatments


def _turned(name: str, leaf: Any) -> Any:
    """Exchange the last two axes of a weight [in, out]."""
    shape = getattr(leaf, "shape", ())
    if isinstance(leaf, QTensor | Prepared) or len(shape) < 2 or "embed" in name.rpartition(".")[2].lower():
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((*shape[:-2], shape[-1], shape[-2]), leaf.dtype)
    return leaf.swapaxes(-1, -2)


def map_named(call: Callable[[str, Any], Any], tree: Any, is_leaf: Callable[[Any], bool]) -> Any:
    """Map `call` over the names and leaves of a tree; a name is the parts of a path joined by dots.

    A variable of Flax NNX adds nothing to the name of its value.

    >>> map_named(lambda name, leaf: name, {"a": [1, {"b": 2}]}, lambda x: False)
    {'a': ['a.0', {'b': 'a.1.b'}]}
    """

    def visit(path: tuple[Any, ...], node: Any) -> Any:
        if not is_variable(node):
            return call(path_name(path), node)
        return jax.tree_util.tree_map_with_path(
            lambda inner, leaf: call(path_name((*path, *inner[1:])), leaf), node, is_leaf=is_leaf
        )

    return jax.tree_util.tree_map_with_path(visit, tree, is_leaf=lambda x: is_variable(x) or is_leaf(x))


def path_name(path: tuple[Any, ...]) -> str:
    """Name a tensor by its pytree path: its parts joined by dots."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _quantize_leaf(name: str, leaf: Any, config: QuantizationConfig, treatments: dict[str, Treatment]) -> Any:
    """Quantize one leaf, or pass it through; what was decided is added to `treatments`."""
    dtype = getattr(leaf, "dtype", None)
    if isinstance(leaf, QTensor | Prepared) or dtype is None:
        return leaf
    shape = tuple(leaf.shape)
    dtype = DTYPES.get(str(dtype).removeprefix("torch."), np.dtype(np.void)) if is_torch(leaf) else dtype
    treatment = treat(config, name, shape, dtype)
    policy, spec = treatment.policy, treatment.spec
    treatments[name] = treatment
    if spec is None and not (treatment.half and shape):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):  # of a tree of shapes, which a checkpoint is restored into
        return jax.eval_shape(lambda w: quantize(w, policy, name), leaf)
    if spec is None or isinstance(leaf, Tracer):
        return quantize(leaf, policy, name)
    refuse_masked(leaf, name)
    host = to_numpy(leaf, name) if is_torch(leaf) else to_native_byte_order(np.asarray(leaf))
    return quantize_on_host(host, policy, name, leaf)
