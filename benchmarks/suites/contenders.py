"""Start the peers as contenders of a suite: each library in a process of its own, or a line that says why not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from benchmarks import peers
from benchmarks.children import Child, ChildError
from benchmarks.timing import Skipped


@contextmanager
def peer_children(
    target: str, *arguments: Any, modules: Iterable[str] = peers.MODULES
) -> Iterator[tuple[dict[str, Child], list[Skipped]]]:
    """Start a child for each module of peers whose library is installed; yield them, and those that are left out.

    Args:
        target: The target of `Child`; its first argument is the module.
        arguments: Its further arguments.
        modules: The names of modules in `benchmarks.peers`.
    """
    found, skipped = {}, []
    with ExitStack() as stack:
        for module in modules:
            try:
                child = stack.enter_context(Child(target, module, *arguments))
            except (peers.MissingLibrary, ChildError) as why:
                skipped.append(Skipped(module.removesuffix("_peer"), str(why)))
            else:
                found[module] = child
        yield found, skipped
