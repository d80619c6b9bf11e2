"""Read a folder of PyTorch weights as a source: safetensors, alone or sharded, or, on request, a pickle."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from aq_jax.conversion.prequantized import read_config
from aq_jax.conversion.sidefiles import SideFiles, side_files
from aq_jax.converters.mapped_tensors import MappedTensors
from aq_jax.converters.pickles import check_pickle, read_pickle
from aq_jax.errors import FormatError
from aq_jax.io.tensorfile import WRITER, Extent, read_header
from aq_jax.store import DTYPES
from aq_jax.store.folders import Folder
from aq_jax.store.jsonfile import read_json
from aq_jax.store.modules import transformer_path

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
WEIGHTS = (SINGLE, INDEX, PICKLE, PICKLE_INDEX)
# Tensors that models tie to their embedding: checkpoints may list their names without holding their values.
_TIED = re.compile(r"(^|\.)((lm_head|embed_out|embed_tokens|output_embeddings)\.weight|decoder\.(weight|bias))$")
_EMBEDDING = re.compile(r"(^|\.)(\w*embed\w*|wte|shared)\.weight$")
_TIE_FIELD = "tie_word_embeddings"


class Checkpoint(MappedTensors):
    """The tensors of a folder, read through memory maps: nothing is copied until it is used."""

    def __init__(self, folder: Folder) -> None:
        super().__init__(folder)
        self._arrays: dict[str, np.ndarray] = {}
        self.false_aliases: set[str] = set()
        """Keys of metadata that look like tied names, and are none."""
        self.metadata: dict[str, str] = {}
        """The metadata of all files."""

    def read(self, name: str) -> np.ndarray:
        return self._arrays[name] if name in self._arrays else super().read(name)

    def side_files(self, target: Folder) -> SideFiles:
        return side_files(self.config_folder, target)

    def add(self, name: str, extent: Extent) -> None:
        """Add a tensor of a safetensors file."""
        self._refuse_duplicate(name, extent.file)
        self.extents[name] = extent
        self.shapes[name] = (extent.shape, DTYPES[extent.dtype])

    def add_array(self, name: str, array: np.ndarray, file: str) -> None:
        """Add a tensor that was read from a file already."""
        self._refuse_duplicate(name, file)
        self._arrays[name] = array
        self.shapes[name] = (array.shape, array.dtype)

    def drop_false_aliases(self) -> None:
        """Drop aliases that are mere notes, whose keys look like names by chance; call it when all files are read."""
        for name in [name for name in self.aliases if name in self.shapes or name in self.false_aliases]:
            del self.aliases[name]

    def _refuse_duplicate(self, name: str, file: str) -> None:
        if name in self.shapes:
            raise FormatError(
                f"{self.folder.join(file)}: holds tensor {name!r}, which another file holds too; wanted each name once"
            )


def weights_folder(folder: Folder) -> Folder | None:
    """Find the folder that holds weights: this one, or one in it; None if neither does.

    Before version 2, sentence-transformers kept the model in a folder that modules.json names.
    """
    if any(folder.holds(name) for name in WEIGHTS):
        return folder
    inner = transformer_path(folder)
    return Folder(folder.join(inner)) if inner else None


@contextmanager
def open_checkpoint(location: str | Path | Folder, allow_pickle: bool = False) -> Iterator[Checkpoint]:
    """Open a Hugging Face folder: model.safetensors, else its shards, else, on request, pickles.

    Of safetensors only headers are read now, here or at a URL; tensors follow when they are asked for. The order is
    that of transformers: where a folder holds several of these, both read the same weights.

    Raises:
        FormatError: if the folder holds no weights, or files that are damaged, incomplete or of an unknown dtype.
        FileNotFoundError: if there is no such folder.
    """
    folder = location if isinstance(location, Folder) else Folder(location)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: does not exist")
    checkpoint = Checkpoint(weights_folder(folder) or folder)
    checkpoint.config_folder, folder = folder, checkpoint.folder
    if folder.state(SINGLE) is not None:
        _read_safetensors(SINGLE, checkpoint)
    elif folder.state(INDEX) is not None:
        _read_shards(INDEX, checkpoint, _read_safetensors)
    elif pickle := next((name for name in (PICKLE, PICKLE_INDEX) if folder.state(name) is not None), None):
        check_pickle(folder, pickle, allow_pickle)
        if pickle == PICKLE:
            _read_pickle(PICKLE, checkpoint)
        else:
            _read_shards(PICKLE_INDEX, checkpoint, _read_pickle)
    else:
        raise FormatError(f"{folder}: holds none of {', '.join(WEIGHTS)}; name a folder of Hugging Face weights")
    checkpoint.drop_false_aliases()
    yield checkpoint


def _read_shards(index: str, checkpoint: Checkpoint, read: Callable[[str, Checkpoint], None]) -> None:
    folder = checkpoint.folder
    path = folder.join(index)
    try:
        weight_map = (read_json(folder, index, dict) or {})["weight_map"]
        files = sorted(set(weight_map.values()))
    except (FormatError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            f"{path}: has no weight_map of names and files ({repr(error)[:200]}); fetch it again"
        ) from None
    for file in files:
        if not isinstance(file, str) or not _is_safe_file_name(file):
            raise FormatError(f"{path}: names the file {str(file)[:80]!r}; wanted a plain file name in the same folder")
        if folder.state(file) is None:
            raise FormatError(f"{path}: names {file!r}, which does not exist; fetch the missing shard")
        read(file, checkpoint)
    if not files:
        raise FormatError(f"{path}: its weight_map is empty; fetch it again")
    checkpoint.drop_false_aliases()
    missing = [name for name in weight_map if name not in checkpoint.shapes and name not in checkpoint.aliases]
    tied = [name for name in missing if _TIED.search(name)] if _ties_embeddings(checkpoint) else []
    if tied:
        checkpoint.notes.append(
            f"{path}: lists {', '.join(tied[:5])}, which no file holds: tied to the embedding, as config.json has it"
        )
    missing = [name for name in missing if name not in tied]
    strangers = [name for name in checkpoint.shapes if name not in weight_map]
    if missing or strangers:
        lost, more = ([name[:80] for name in names[:5]] for names in (missing, strangers))
        raise FormatError(f"{path}: the shards lack {lost}, and hold {more} that it does not name")


def _ties_embeddings(checkpoint: Checkpoint) -> bool:
    """Return whether there is an embedding, and config.json ties the output to it, which is its default."""
    fields = read_config(checkpoint.folder)
    inner = fields.get("text_config")
    said = [each[_TIE_FIELD] for each in (fields, inner) if isinstance(each, dict) and _TIE_FIELD in each]
    return bool(fields) and all(each is True for each in said) and any(map(_EMBEDDING.search, checkpoint.shapes))


def _is_safe_file_name(file: str) -> bool:
    """Return whether a name is a file's in the same folder, on any system, and does nothing to a terminal."""
    return Path(file).name == file and file.isprintable() and not file.startswith(".") and len(file.encode()) <= 255


def _read_safetensors(file: str, checkpoint: Checkpoint) -> None:
    """Add the tensors of a safetensors file."""
    extents, notes = read_header(checkpoint.folder, file)
    checkpoint.metadata |= notes
    for name, extent in extents.items():
        checkpoint.add(name, extent)
    # safetensors stores a tied tensor once, and notes the name that it dropped as {dropped: kept}; "format" is its own,
    # and the writer is ours.
    for alias, kept in notes.items():
        if kept not in extents or alias in extents or alias == "format" or (alias, kept) == WRITER:
            continue
        if checkpoint.aliases.setdefault(alias, kept) != kept:
            # Two files whose notes differ mean something else by them.
            where = checkpoint.folder.join(file)
            checkpoint.notes.append(
                f"{where}: its note {alias!r} is {kept!r}, and differs in another file: it ties nothing"
            )
            checkpoint.false_aliases.add(alias)


def _read_pickle(file: str, checkpoint: Checkpoint) -> None:
    """Add the tensors of a pickle."""
    assert checkpoint.folder.local is not None  # noqa: S101
    arrays, aliases = read_pickle(checkpoint.folder.local / file)
    for name, array in arrays.items():
        checkpoint.add_array(name, array, file)
    checkpoint.aliases |= aliases
