"""Read modules.json of a sentence-transformers folder: the modules of a model, and their folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath

from aq_jax.errors import FormatError
from aq_jax.store.folders import Folder
from aq_jax.store.jsonfile import read_json

MODULES = "modules.json"
OWNER = "sentence_transformers."
STATIC = "StaticEmbedding"
MODELS = ("Transformer", STATIC)
"""The kinds of modules whose weights are the model's."""
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Module:
    """A module of a sentence-transformers model.

    Args:
        kind: The name of its class, such as "Pooling"; in full if it is not one of sentence-transformers' own.
        path: The path of its folder inside the model's; "" is that folder itself.
    """

    kind: str
    path: str


def read_modules(folder: Folder) -> list[Module] | None:
    """Read modules.json; None if there is none.

    Raises:
        FormatError: as for `read_json`, and if it names a folder that is not inside this one.

    >>> import tempfile
    >>> folder = Folder(tempfile.mkdtemp())
    >>> folder.write("modules.json", b'[{"type": "sentence_transformers.models.Transformer", "path": "0_Transformer"}]')
    >>> read_modules(folder)
    [Module(kind='Transformer', path='0_Transformer')]
    """
    entries, where = read_json(folder, MODULES, list, _MAX_BYTES), folder.join(MODULES)
    if entries is None:
        return None
    if not all(isinstance(entry, dict) for entry in entries):
        raise FormatError(f"{where}: wanted a JSON array of objects, one a module")
    found = []
    for entry in entries:
        kind, path = str(entry.get("type")), entry.get("path", "")
        if not isinstance(path, str) or not is_inside(path):
            raise FormatError(f"{where}: names the folder {str(path)[:80]!r}; wanted one inside this folder")
        own = kind.startswith(OWNER)
        found.append(Module(kind.rpartition(".")[2] if own else kind, _plain(path)))
    return found


def _plain(path: str) -> str:
    plain = PurePosixPath(path).as_posix()
    return "" if plain == "." else plain


def is_inside(path: str) -> bool:
    """Tell whether a relative path stays in its folder, on any system.

    >>> [is_inside(path) for path in ("", "1_Pooling", "a/b", "../a", "/a", "C:a", "a/../../b")]
    [True, True, True, False, False, False, False]
    """
    windows = PureWindowsPath(path)
    return not windows.anchor and ".." not in windows.parts and path.isprintable()


def transformer_path(folder: Folder) -> str:
    """Find the folder of the model itself, with tokenizer and weights: "", or one such as "0_Transformer" of old."""
    modules = read_modules(folder)
    return modules[0].path if modules and modules[0].kind in MODELS else ""
