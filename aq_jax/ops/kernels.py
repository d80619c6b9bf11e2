"""The open table of kernels by operation; all kernels of an operation have the same numerics.

    product            refuses(w, activations)                       x @ W.T, and after it
                       run(x, w, activations, after)
    rows               refuses(table)                                rows of a table
                       run(table, ids, inside)
    attention          refuses(query, heads, dtype, scores, biased)  over whole texts
                       run(query, key, value, mask, heads, dtype, scores, bias)
    cached_attention   refuses(query, keys, dtype, scores)           over a cache
                       run(query, keys, values, positions, dtype, scores, first)
    quantize           refuses(size, code)                           codes on given grids
                       run(w, grid, code)
    dequantize         refuses(w)                                    values of codes
                       run(w, dtype)

`xla` shows the shapes of each; `after` is an `epilogue.Epilogue`, `scores` a `scores.Scores`, `keys` and `values` of a
cache are `cached.Cached`; a bias, or None, is added to scores. `refuses` returns the reason why a kernel does not
take a call, or ""; it sees only shapes. Weights come without their rotation, which is applied to the other operand; a
kernel of products that says `rotates = True` applies it itself. The first kernel of an operation that takes a call
computes it, unless one is asked for by name: by the argument `kernel`, or for all operations that have it by the
variable AQ_JAX_KERNEL.

A kernel of "quantize" may also have `solve(w, spec, recipes, formulation)`, which chooses the grids as well, for
quantizers that have recipes; `formulation(w)` is XLA's way to its result.

A kernel of products or rows may want its weights in another form: see `Preparing`. It may be the first for weights that
are prepared; others go first to kernels that take them as they are, since preparing in every call is slow. To add a
kernel, assign it: `KERNELS["product"]["mine"] = Mine()`. Programs are compiled for entries, and prepared weights hold
theirs: they are hashable and equal to their copies, as frozen dataclasses are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from typing import Any, Protocol, runtime_checkable

from aq_jax.core.prepared import Prepared
from aq_jax.core.qtensor import QTensor
from aq_jax.errors import ConfigError
from aq_jax.native.host import VARIABLE
from aq_jax.ops import native, native_codes, xla, xla_attention


@runtime_checkable
class Kernel(Protocol):
    """One way to compute an operation; the module's docstring lists the arguments."""

    @property
    def refuses(self) -> Callable[..., str]: ...
    @property
    def run(self) -> Callable[..., Any]: ...


class Preparing(Kernel, Protocol):
    """A kernel that prepares its weights: `run` gets a `core.prepared.Prepared` unless `prepare` returned None.

    Entries of one name in "product" and "rows" are one kernel: both get what one of them prepared. A kernel may also
    have `restore(arrays, like)`, which makes the QTensor from its arrays, bit for bit. Then the arrays are kept instead
    of the QTensor, since both would take twice the memory; `like` is the QTensor with shapes for arrays.
    """

    def prepare(self, q: QTensor) -> Any:
        """Make the arrays that this kernel wants, or return None for a weight that it takes as it is."""


KERNELS: dict[str, dict[str, Kernel]] = {
    "product": {"native": native.Product(), "xla": xla.Product()},
    "rows": {"native": native.Rows(), "xla": xla.Rows()},
    "attention": {"native": native.Attention(), "xla": xla_attention.Attention()},
    "cached_attention": {"native": native.CachedAttention(), "xla": xla_attention.CachedAttention()},
    "quantize": {"native": native_codes.Quantize(), "xla": xla.Quantize()},
    "dequantize": {"native": native_codes.Dequantize(), "xla": xla.Dequantize()},
}


def choose_kernel(
    operation: str, kernel: str | None, *what: Any, weight: QTensor | Prepared | None = None
) -> tuple[str, Kernel]:
    """Choose the kernel that computes a call; return its name and itself.

    Args:
        operation: A key of KERNELS.
        kernel: The name of a kernel; by default the one in the variable, if this operation has it, or else the first
            that takes the call.
        what: The arguments of `refuses`.
        weight: The weight as it is: the kernel that it was prepared for is tried first, and otherwise those that need
            not prepare it.

    Raises:
        ConfigError: for an unknown kernel, and if none takes the call, with the reason of each.
    """
    known = KERNELS[operation]
    if kernel is None and (forced := os.environ.get(VARIABLE)):
        if not any(forced in others for others in KERNELS.values()):
            names = dict.fromkeys(name for others in KERNELS.values() for name in others)
            raise ConfigError(f"{VARIABLE} = {forced!r}: wanted one of {', '.join(names)}")
        kernel = forced if forced in known else None
    if kernel is not None and kernel not in known:
        raise ConfigError(f"kernel = {kernel!r}: {operation} has {', '.join(known)}")
    reasons: list[str] = []
    for name in [kernel] if kernel is not None else _in_order(known, weight):
        if not (why := known[name].refuses(*what)):
            return name, known[name]
        reasons.append(f"kernel {name!r}: {why}")
    raise ConfigError(f"{operation}: {'; '.join(reasons)}")


def _in_order(known: dict[str, Kernel], weight: QTensor | Prepared | None) -> list[str]:
    if isinstance(weight, Prepared):
        return sorted(known, key=lambda name: name != weight.kernel)
    return sorted(known, key=lambda name: weight is not None and hasattr(known[name], "prepare"))


def choices(*operations: str) -> Hashable:
    """Return all that `choose_kernel` depends on beside a call, as a key for programs in which it chose.

    Args:
        operations: The operations that the program has; by default it may have all.
    """
    return os.environ.get(VARIABLE), *[tuple(KERNELS[name].items()) for name in operations or KERNELS]
