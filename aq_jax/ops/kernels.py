"""Who computes what models do with packed weights: kernels by operation, all of the same numerics.

    product    x @ W.T              refuses(w, activations)    run(x, w, activations): [rows, inputs] -> [rows, outputs]
    rows       rows of a table      refuses(table)             run(table, ids, inside): [*batch] -> [*batch, width]

`refuses` says why a kernel does not take a call, or nothing. Weights are given without their rotation, which has been
moved to the other side. The first kernel of an operation that takes a call computes it, unless one is asked for by
name: by the argument `kernel`, or for all operations that have it by the variable AQ_JAX_KERNEL.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol

from aq_jax.errors import ConfigError
from aq_jax.ops import xla

VARIABLE = "AQ_JAX_KERNEL"


class Kernel(Protocol):
    """One way to compute an operation; see above for its arguments."""

    @property
    def refuses(self) -> Callable[..., str]: ...
    @property
    def run(self) -> Callable[..., Any]: ...


KERNELS: dict[str, dict[str, Kernel]] = {
    "product": {"xla": xla.Product()},
    "rows": {"xla": xla.Rows()},
}


def choose(operation: str, kernel: str | None, *what: Any) -> str:
    """Name the kernel that computes a call.

    Args:
        operation: a key of KERNELS.
        kernel: the one that is asked for; by default that of the variable, if it is there for this operation, or else
            the first that takes the call.
        what: see above, `refuses`.

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
    for name in known if kernel is None else [kernel]:
        if not (why := known[name].refuses(*what)):
            return name
        reasons.append(f"kernel {name!r}: {why}")
    raise ConfigError(f"{operation}: {'; '.join(reasons)}")
