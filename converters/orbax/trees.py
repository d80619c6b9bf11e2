"""Trees as the metadata has them: the shape as JSON, the leaves by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from aq_jax.converters.orbax.entries import nonsense
from aq_jax.core.frameworks import identity, unwrapped
from aq_jax.core.prepared import Prepared
from aq_jax.core.qtensor import QTensor
from aq_jax.errors import AqError, FormatError

_TIED = object()  # a leaf that stands elsewhere, too


def skeleton(tree: Any) -> tuple[Any, dict[str, Any]]:
    """The tree as JSON, and its leaves by name: of one that stands at several places, the first.

    Raises:
        FormatError: for a key that a checkpoint cannot hold, and for two leaves of one name.
        AqError: for a leaf that is no array.
    """
    leaves: dict[str, Any] = {}
    found = _walk(tree, (), leaves, {})
    return found, {name: leaf for name, leaf in leaves.items() if leaf is not _TIED}


def _walk(node: Any, path: tuple[str, ...], leaves: dict[str, Any], seen: dict[object, str]) -> Any:
    """The tree as JSON; its leaves go into `leaves` by name, those that were seen already as _TIED."""
    name, node = ".".join(path), unwrapped(node)
    if node is None:
        return None
    items: Iterable[tuple[Any, Any]]
    if isinstance(node, Mapping):
        kind, items = "dict", list(node.items())
        for key, _ in items:
            if type(key) not in (str, int):
                raise FormatError(f"{name or 'the tree'}: has a key {key!r}; wanted strings and integers as keys")
    elif type(node) in (list, tuple):
        kind, items = type(node).__name__, list(enumerate(node))
    elif isinstance(node, QTensor | Prepared) or hasattr(node, "dtype"):
        if name in leaves:
            raise FormatError(f"{name}: two leaves of the tree have this name; rename one, or a key on its path")
        if (stored := seen.setdefault(identity(node), name)) != name:
            leaves[name] = _TIED
            return stored
        leaves[name] = node.to_qtensor() if isinstance(node, Prepared) else node
        return name
    else:
        raise AqError(
            f"{name or 'the tree'}: is a {type(node).__name__}; wanted arrays and QTensors in dictionaries, lists and "
            "tuples (of a number np.float32 makes an array, of a module nnx.state such a tree)"
        )
    return {kind: [[key, _walk(child, (*path, str(key)), leaves, seen)] for key, child in items]}


def build_tree(node: Any, leaf: Callable[[str], Any], path: tuple[str, ...] = ()) -> Any:
    """The tree of a skeleton, each leaf made by its name."""
    if node is None:
        return None
    if isinstance(node, str):
        return leaf(".".join(path))
    ((kind, items),) = node.items()
    children = [(key, build_tree(child, leaf, (*path, str(key)))) for key, child in items]
    return dict(children) if kind == "dict" else {"list": list, "tuple": tuple}[kind](child for _, child in children)


def leaf_names(node: Any, folder: Path, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """(name, name of its tensor) of every leaf of a skeleton, which is checked."""
    if node is None:
        return
    if isinstance(node, str):
        yield ".".join(path), node
        return
    if not isinstance(node, dict) or len(node) != 1 or (kind := next(iter(node))) not in ("dict", "list", "tuple"):
        raise nonsense(folder, ".".join(path), "tree", node)
    items = node[kind]
    if not isinstance(items, list) or not all(isinstance(item, list) and len(item) == 2 for item in items):
        raise nonsense(folder, ".".join(path), kind, items)
    keys = [key for key, _ in items]
    if not all(type(key) in (str, int) for key in keys) or len(set(keys)) != len(keys):
        raise nonsense(folder, ".".join(path), "keys", keys)
    for key, child in items:
        yield from leaf_names(child, folder, (*path, str(key)))
