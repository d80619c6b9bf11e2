"""Start contenders of a suite: each library in a process of its own, or a line that says why not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from benchmarks import peers
from benchmarks.children import Child, ChildError
from benchmarks.timing import Skipped

Started = tuple[dict[str, Child], list[Skipped]]


@contextmanager
def start_children(targets: Mapping[str, tuple[Any, ...]]) -> Iterator[Started]:
    """Start a child for each name; yield those that start, and a line for each of the others.

    Args:
        targets: The arguments of `Child` by name.
    """
    found, skipped = {}, []
    with ExitStack() as stack:
        for name, arguments in targets.items():
            try:
                found[name] = stack.enter_context(Child(*arguments))
            except (peers.MissingLibrary, ChildError) as why:
                skipped.append(Skipped(name, str(why)))
        yield found, skipped


def peer_children(
    target: str, *arguments: Any, modules: Iterable[str] = peers.MODULES
) -> AbstractContextManager[Started]:
    """Start a child for each module of peers, by its name without "_peer".

    Args:
        target: The target of `Child`; its first argument is the module.
        arguments: Its further arguments.
        modules: The names of modules in `benchmarks.peers`.
    """
    return start_children({module.removesuffix("_peer"): (target, module, *arguments) for module in modules})
