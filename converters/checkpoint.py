"""A folder of PyTorch weights as a source of tensors: safetensors, alone or sharded, or (asked for) a pickle."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from aq_jax.conversion.prequantized import read_config
from aq_jax.conversion.sidefiles import SideFiles, side_files
from aq_jax.converters.extents import Extents
from aq_jax.core.frameworks import identity, to_numpy
from aq_jax.core.torch_tensors import torch_module
from aq_jax.errors import FormatError
from aq_jax.io.tensorfile import Extent, read_header
from aq_jax.store import DTYPES
from aq_jax.store.folders import Folder
from aq_jax.store.jsonfile import read_json
from aq_jax.store.modules import transformer_path

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
WEIGHTS = (SINGLE, INDEX, PICKLE, PICKLE_INDEX)
# Tensors that models tie to their embedding, of which checkpoints may list the name and not hold the values.
_TIED = re.compile(r"(^|\.)((lm_head|embed_out|embed_tokens|output_embeddings)\.weight|decoder\.(weight|bias))$")
# Before 2.10 a crafted pickle gets around weights_only (CVE-2025-32434, CVE-2026-24747).
SAFE_TORCH = (2, 10)
_EMBEDDING = re.compile(r"(^|\.)(\w*embed\w*|wte|shared)\.weight$")
_TIES = "tie_word_embeddings"


class Checkpoint(Extents):
    """Tensors of a folder, read through memory maps: nothing is copied until it is used."""

    def __init__(self, folder: Folder) -> None:
        super().__init__(folder)
        self._arrays: dict[str, np.ndarray] = {}
        self.untied: set[str] = set()
        """Words that look like tied names, and are none."""

    def read(self, name: str) -> np.ndarray:
        return self._arrays[name] if name in self._arrays else super().read(name)

    def side_files(self, target: Folder) -> SideFiles:
        return side_files(self.home, target)

    def add(self, name: str, extent: Extent) -> None:
        """Take in a tensor of a safetensors file."""
        self._refuse_double(name, extent.file)
        self.extents[name] = extent
        self.shapes[name] = (extent.shape, DTYPES[extent.dtype])

    def add_array(self, name: str, array: np.ndarray, file: str) -> None:
        """Take in a tensor that is read already, of a file."""
        self._refuse_double(name, file)
        self._arrays[name] = array
        self.shapes[name] = (array.shape, array.dtype)

    def settle_aliases(self) -> None:
        """Drop those that are notes, whose words are names by chance; all files are read."""
        for name in [name for name in self.aliases if name in self.shapes or name in self.untied]:
            del self.aliases[name]

    def _refuse_double(self, name: str, file: str) -> None:
        if name in self.shapes:
            where = self.folder.at(file)
            raise FormatError(f"{where}: tensor {name!r} is in another file too; a checkpoint holds each name once")


def weights_folder(folder: Folder) -> Folder | None:
    """The folder that holds weights: this one, or one in it; None if neither does.

    In the one that modules.json names sentence-transformers kept the model before its version 2.
    """
    if any(folder.holds(name) for name in WEIGHTS):
        return folder
    inner = transformer_path(folder)
    return Folder(folder.at(inner)) if inner else None


@contextmanager
def open_checkpoint(location: str | Path | Folder, allow_pickle: bool = False) -> Iterator[Checkpoint]:
    """The tensors of a Hugging Face folder: model.safetensors, else its shards, else (asked for) pickles.

    Of safetensors, headers are read, here or at a URL, and tensors when they are asked for.

    The order is that of transformers: where a folder holds more than one of them, both read the same weights.

    Raises:
        FormatError: if the folder holds no weights, or files that are damaged, incomplete or of an unknown dtype.
        FileNotFoundError: if there is no such folder.
    """
    folder = location if isinstance(location, Folder) else Folder(location)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: there is no such folder")
    found = Checkpoint(weights_folder(folder) or folder)
    found.home, folder = folder, found.folder
    if folder.state(SINGLE) is not None:
        _read_safetensors(SINGLE, found)
    elif folder.state(INDEX) is not None:
        _read_shards(INDEX, found, _read_safetensors)
    elif pickle := next((name for name in (PICKLE, PICKLE_INDEX) if folder.state(name) is not None), None):
        _check_pickle(folder, pickle, allow_pickle)
        if pickle == PICKLE:
            _read_pickle(PICKLE, found)
        else:
            _read_shards(PICKLE_INDEX, found, _read_pickle)
    else:
        raise FormatError(f"{folder}: holds none of {', '.join(WEIGHTS)}; name a folder of Hugging Face weights")
    found.settle_aliases()
    yield found


def _check_pickle(folder: Folder, name: str, allowed: bool) -> None:
    if not allowed:
        raise FormatError(
            f"{folder.at(name)}: is a pickle, which can run code when it is read; convert it to safetensors where it "
            "comes from, or, if you trust its author, set allow_pickle = true"
        )
    if folder.local is None:
        raise FormatError(f"{folder.at(name)}: a pickle is read from this machine only; fetch the folder first")


def _read_shards(index: str, found: Checkpoint, read: Callable[[str, Checkpoint], None]) -> None:
    folder = found.folder
    path = folder.at(index)
    try:
        places = (read_json(folder, index, dict) or {})["weight_map"]
        files = sorted(set(places.values()))
    except (FormatError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            f"{path}: has no weight_map of names and files ({repr(error)[:200]}); fetch it again"
        ) from None
    for file in files:
        if not isinstance(file, str) or not _is_plain(file):
            raise FormatError(f"{path}: names the file {str(file)[:80]!r}; wanted a plain file name in the same folder")
        if folder.state(file) is None:
            raise FormatError(f"{path}: names {file!r}, which is not there; fetch the missing shard")
        read(file, found)
    if not files:
        raise FormatError(f"{path}: its weight_map is empty; fetch it again")
    found.settle_aliases()
    missing = [name for name in places if name not in found.shapes and name not in found.aliases]
    tied = [name for name in missing if _TIED.search(name)] if _ties_embeddings(found) else []
    if tied:
        found.notes.append(
            f"{path}: lists {', '.join(tied[:5])}, which no file holds: tied to the embedding, as config.json has it"
        )
    missing = [name for name in missing if name not in tied]
    strangers = [name for name in found.shapes if name not in places]
    if missing or strangers:
        lost, more = ([name[:80] for name in names[:5]] for names in (missing, strangers))
        raise FormatError(f"{path}: the shards lack {lost}, and hold {more} that it does not name")


def _ties_embeddings(found: Checkpoint) -> bool:
    """Whether there is an embedding, and config.json ties the output to it: as it does where it says nothing of it."""
    fields = read_config(found.folder)
    inner = fields.get("text_config")
    said = [each[_TIES] for each in (fields, inner) if isinstance(each, dict) and _TIES in each]
    return bool(fields) and all(each is True for each in said) and any(map(_EMBEDDING.search, found.shapes))


def _is_plain(file: str) -> bool:
    """Whether it names a file of the same folder on any system, and nothing that a terminal would obey."""
    return Path(file).name == file and file.isprintable() and not file.startswith(".") and len(file.encode()) <= 255


def _read_safetensors(file: str, found: Checkpoint) -> None:
    """Take in the tensors of a safetensors file."""
    extents, notes = read_header(found.folder, file)
    for name, extent in extents.items():
        found.add(name, extent)
    # safetensors stores a tied tensor once and notes the name it dropped, as {dropped: kept}; "format" is its own note.
    for alias, kept in notes.items():
        if kept not in extents or alias in extents or alias == "format":
            continue
        if found.aliases.setdefault(alias, kept) != kept:
            # Two files that say so of two tensors mean something else by it.
            where = found.folder.at(file)
            found.notes.append(f"{where}: its note {alias!r} is {kept!r}, and another in another file: it ties nothing")
            found.untied.add(alias)


def _read_pickle(file: str, found: Checkpoint) -> None:
    assert found.folder.local is not None  # noqa: S101
    path, torch = found.folder.local / file, torch_module()
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < SAFE_TORCH:
        raise FormatError(
            f"{path}: torch {torch.__version__} can be made to run code by a crafted pickle (CVE-2026-24747); "
            "install torch >= 2.10"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a hostile pickle makes torch raise, it is the file's fault
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise FormatError(f"{path}: torch refuses it: {text[:200]}") from None
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(v, torch.Tensor) and v.layout == torch.strided for v in state.values()):
        raise FormatError(f"{path}: holds something other than named tensors; save model.state_dict()")
    tied: dict[object, str] = {}
    for name, tensor in state.items():
        if (stored := tied.setdefault(identity(tensor), name)) != name:
            found.aliases[name] = stored
            continue
        if (dtype := str(tensor.dtype).removeprefix("torch.")) not in DTYPES:
            raise FormatError(f"{path}: {name} has dtype {dtype}; known are {', '.join(DTYPES)}")
        found.add_array(name, to_numpy(tensor, name), file)
