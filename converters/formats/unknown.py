"""Tell what a location of no known format holds, and what to name instead."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from aq_jax.converters.formats.hub import HUB, HubName, list_files
from aq_jax.errors import FormatError, some_of
from aq_jax.store.urls import is_url

_SHOWN = 40
"""The most names in an error: a model on the hub has as many quantizations as GGUF."""
_LATER_PART = re.compile(r"-(?!00001-)\d{5}-of-\d{5}\.gguf$")
_INNER = ("/model.safetensors", "/model.safetensors.index.json")
_PICKLE = re.compile(r"(\d_\w+/)?pytorch_model\.bin(\.index\.json)?")


def refusal(location: str, path: str | None, abouts: Sequence[str]) -> FileNotFoundError | FormatError:
    """Build the error for a location that no format recognizes.

    Args:
        location: The location, as it was named.
        path: Its path or URL; None if nothing is there.
        abouts: The descriptions of the known formats.

    >>> str(refusal("m.bin", None, []))
    'm.bin: does not exist'
    """
    if location.startswith(HUB):
        return _on_the_hub(location, path, abouts)
    if path is None:
        return FileNotFoundError(f"{location}: does not exist")
    names = sorted(os.listdir(path)) if not is_url(path) and os.path.isdir(path) else []
    if hint := _hint(names, lambda name: str(Path(location, name))):
        return FormatError(f"{location}: {hint}")
    return FormatError(f"{location}: is of no known format; wanted one of these: {'; '.join(abouts)}")


def _on_the_hub(location: str, path: str | None, abouts: Sequence[str]) -> FileNotFoundError | FormatError:
    model = HubName.parse(location)
    names, asked = list_files(location)
    where = "the model" if asked else "its part in the hub's cache, beyond which nothing could be fetched,"
    above = f"{model.inside}/" if model.inside else ""
    inside = [name for name in names if f"{name}/".startswith(above)]
    if not inside and above:
        hint = _hint(names, model.of) or f"holds {some_of(names, _SHOWN) or 'nothing'}"
        return FileNotFoundError(f"{location}: {where} has no such file or folder; it {hint}")
    if path is not None and os.path.isfile(path):
        return FormatError(f"{location}: is of no known format; wanted one of these: {'; '.join(abouts)}")
    if hint := _hint(inside, model.of):
        return FormatError(f"{location}: {hint}")
    return FormatError(f"{location}: {where} holds no weights that are read; wanted one of these: {'; '.join(abouts)}")


def _hint(names: Sequence[str], named: Callable[[str], str]) -> str:
    """Say which of a folder's files are weights, and what to do with them; "" if none is."""
    hints, names = [], [name for name in names if name.isprintable()]
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        ggufs = [name for name in ggufs if not _LATER_PART.search(name)] or ggufs  # any part stands for all
        hints.append(f"holds {some_of(ggufs, _SHOWN)}; name one, as {named(ggufs[0])}")
    if pickle := next(filter(_PICKLE.fullmatch, names), None):
        hints.append(
            f"holds {pickle}, a pickle, which can run code when it is read; if you trust its author, set "
            "allow_pickle = true"
        )
    if folders := [name.rpartition("/")[0] for name in names if name.endswith(_INNER)]:
        hints.append(f"holds weights in {some_of(folders, _SHOWN)}; name one, as {named(folders[0])}")
    elif others := [name for name in names if name.endswith(".safetensors")]:
        hints.append(
            f"holds {some_of(others, _SHOWN)}, and wanted is model.safetensors, or shards that a "
            "model.safetensors.index.json lists; if it is the weights, give it that name"
        )
    return "; ".join(hints)
