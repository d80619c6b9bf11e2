"""Who computes what models do with weights: kernels by operation, all of the same numerics.

    product          x @ W.T                 refuses(w, activations)        run(x, w, activations)
    rows             rows of a table         refuses(table)                 run(table, ids, inside)
    attention        over whole texts        refuses(query, heads, dtype)   run(query, key, value, mask, heads, dtype)
    cached_attention over a cache            refuses(query, keys, dtype)    run(query, keys, values, positions, dtype)
    quantize         codes on given grids    refuses(size, code)            run(w, grid, code)
    dequantize       values of codes         refuses(w)                     run(w, dtype)

Shapes are those of the first of each, `xla`. `refuses` says why a kernel does not take a call, or nothing; it is given
shapes alone. Weights are given without their rotation, which has been moved to the other side. The first kernel of an
operation that takes a call computes it, unless one is asked for by name: by the argument `kernel`, or for all
operations that have it by the variable AQ_JAX_KERNEL.

A kernel of products or rows may want its weights in another form: `Preparing`. To add one, assign it:
`KERNELS["product"]["mine"] = Mine()`. Entries are hashable, as plain objects are: programs are compiled for them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from typing import Any, Protocol, runtime_checkable

from aq_jax.core.qtensor import QTensor
from aq_jax.errors import ConfigError
from aq_jax.ops import xla, xla_attention

VARIABLE = "AQ_JAX_KERNEL"


@runtime_checkable
class Kernel(Protocol):
    """One way to compute an operation; see above for its arguments."""

    @property
    def refuses(self) -> Callable[..., str]: ...
    @property
    def run(self) -> Callable[..., Any]: ...


class Preparing(Kernel, Protocol):
    """A kernel whose `run` is given a `core.prepared.Prepared`, where `prepare` gave something.

    Entries of one name, in "product" and "rows", are one kernel: both are given what one of them has prepared.
    One that also has `restore(arrays, like)`, which makes the QTensor of its arrays again, bit for bit, keeps them
    instead of the QTensor, for both would take twice the memory; `like` is the QTensor with shapes for arrays.
    """

    def prepare(self, q: QTensor) -> Any:
        """Make the arrays that this kernel wants beside a weight, or instead of it; None if it takes it as it is."""


KERNELS: dict[str, dict[str, Kernel]] = {
    "product": {"xla": xla.Product()},
    "rows": {"xla": xla.Rows()},
    "attention": {"xla": xla_attention.Attention()},
    "cached_attention": {"xla": xla_attention.CachedAttention()},
    "quantize": {"xla": xla.Quantize()},
    "dequantize": {"xla": xla.Dequantize()},
}


def choose(operation: str, kernel: str | None, *what: Any, first: str = "") -> tuple[str, Kernel]:
    """Find the kernel that computes a call, and its name.

    Args:
        operation: a key of KERNELS.
        kernel: the one that is asked for; by default that of the variable, if it is there for this operation, or else
            the first that takes the call.
        what: see above, `refuses`.
        first: the one that is tried before the others: a weight was prepared for it.

    Raises:
        ConfigError: for one that is not there, and if none takes the call, with the reason of each.
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
    tried = [kernel] if kernel is not None else dict.fromkeys((first, *known)) if first in known else known
    for name in tried:
        if not (why := known[name].refuses(*what)):
            return name, known[name]
        reasons.append(f"kernel {name!r}: {why}")
    raise ConfigError(f"{operation}: {'; '.join(reasons)}")


def choices() -> Hashable:
    """All that `choose` depends on beside a call: a program in which it chose is another one where this is."""
    return os.environ.get(VARIABLE), tuple(tuple(entries.items()) for entries in KERNELS.values())
