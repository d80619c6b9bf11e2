"""Read a GGUF file, or all parts of one, as a source."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from aq_jax.conversion.sidefiles import GeneratedFiles, SideFiles
from aq_jax.conversion.source import GeneratingSource, Opener
from aq_jax.converters.gguf.header import Header, Tensor, read_header
from aq_jax.converters.gguf.model_config import EMBEDDING, Fields, model_config
from aq_jax.converters.gguf.names import ARCHITECTURES, Change
from aq_jax.converters.gguf.pooling import pooling_files
from aq_jax.converters.gguf.sampling import generation_files, unused_sampling
from aq_jax.converters.gguf.tokenizer import tokenizer_files
from aq_jax.converters.gguf.types import READABLE
from aq_jax.converters.gguf.vocabulary import Vocabulary
from aq_jax.converters.mapped_files import MappedFiles
from aq_jax.errors import FormatError, some_of
from aq_jax.store import DTYPES
from aq_jax.store.folders import Folder

if TYPE_CHECKING:
    from aq_jax.core.qtensor import QTensor

_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class Extent:
    """The extent of a tensor, and what must be undone.

    Args:
        file: The file's name.
        tensor: The tensor's place in it.
        change: What llama.cpp's converter did to its values.
        heads: The heads of queries or keys whose rows were permuted.
    """

    file: str
    tensor: Tensor
    change: Change = ""
    heads: int = 0


class GGUFTensors(GeneratingSource):
    """The tensors of GGUF files under their Hugging Face names, read through memory maps.

    Args:
        folder: The folder that holds the files.
        extents: The extents by the tensors' names, in order.
        packed: Whether quantized tensors become QTensors; otherwise they are dequantized to float32.
        aliases: Tied tensors: name -> stored name.
    """

    def __init__(
        self, folder: Folder, extents: Mapping[str, Extent], packed: bool, aliases: Mapping[str, str] | None = None
    ) -> None:
        self.extents, self._packed = dict(extents), packed
        shapes = {
            name: (extent.tensor.shape, DTYPES[extent.tensor.type.dtype or "float32"])
            for name, extent in self.extents.items()
        }
        super().__init__(folder, shapes, aliases, sorted({extent.file for extent in self.extents.values()}))
        types = {name: extent.tensor.type for name, extent in self.extents.items()}
        self.quantized = {name: kind.quant_type for name, kind in types.items() if kind.quant_type}
        if packed and self.quantized:
            self.row_metadata = {
                name: {"dtype": "float32", "quant_type": kind.quant_type, "solver": f"GGUF {kind.name}"}
                if kind.quant_type
                else {"dtype": kind.dtype, "quant_type": "none"}
                for name, kind in types.items()
            }
        self._maps = MappedFiles(folder)

    def read(self, name: str) -> np.ndarray | QTensor:
        """Read one tensor: a view of its file if it is plain, else a QTensor, or its values.

        Raises:
            FormatError: if the file has become shorter, and for grids that no table can hold.
            OSError: if it cannot be read.
        """
        extent, (shape, dtype) = self.extents[name], self.shapes[name]
        kind = extent.tensor.type
        tensor = extent.tensor
        size = kind.nbytes(tensor.shape)
        raw = _unchanged(self._maps.part(extent.file, tensor.offset, size, tensor.name), extent)
        if not kind.quant_type:
            array = raw.view(dtype).reshape(shape)
            return array - dtype.type(1) if extent.change == "plus_one" else array
        from aq_jax.codes import CODES
        from aq_jax.converters.gguf.blocks import unpack

        parts, code = unpack(raw.reshape(-1, kind.size), kind.name), CODES[kind.quant_type]
        if parts.scales.size and (why := code.refuses_grids(parts.scales, parts.zero_points)):
            raise FormatError(f"{self.folder.join(extent.file)}: {extent.tensor.name}: {why}")
        data, zeros = parts.data.view(np.uint8), parts.zero_points.astype(DTYPES[code.zero_dtype], copy=False)
        if self._packed:
            from aq_jax.config import QuantSpec
            from aq_jax.core.bitstream import from_stream

            return from_stream(data, parts.scales, zeros, shape, QuantSpec(code.bits, False, kind.group, 0, code.name))
        out = np.empty(math.prod(shape), np.float32)
        if out.size:
            code.read(data, parts.scales, zeros, kind.group, shape, out)
        return out.reshape(shape)

    def release(self) -> None:
        self._maps.release()

    def nbytes(self, name: str) -> int:
        tensor = self.extents[name].tensor
        return tensor.type.nbytes(tensor.shape) if self._packed else super().nbytes(name)

    def read_memory(self, name: str) -> int:
        extent = self.extents[name]
        stored = extent.tensor.type.nbytes(extent.tensor.shape)
        if not extent.tensor.type.quant_type:
            return stored if extent.change else 0  # it is mapped
        copies = 2 if extent.change else 1  # permuted rows, and what is made of them
        return copies * stored + (0 if self._packed else super().nbytes(name))

    def opener(self, names: Collection[str]) -> Opener:
        extents = {name: self.extents[name] for name in names}
        return partial(_open_extents, self.folder.absolute, extents, self._packed, self.aliases)


def _unchanged(raw: np.ndarray, extent: Extent) -> np.ndarray:
    """Undo the permutation of rows: in each head, 2i -> i, and 2i + 1 -> d/2 + i."""
    if extent.change not in ("query", "key") or not raw.size:
        return raw
    rows = extent.tensor.shape[0]
    halves = raw.reshape(extent.heads, rows // extent.heads // 2, 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(-1)


@contextmanager
def _open_extents(
    location: str, extents: Mapping[str, Extent], packed: bool, aliases: Mapping[str, str]
) -> Iterator[GGUFTensors]:
    """Open the tensors whose extents another process found."""
    yield GGUFTensors(Folder(location), extents, packed, aliases)


class GGUFModel(GGUFTensors):
    """A model as GGUF. Its side files are config.json, tokenizer.json and tokenizer_config.json, rebuilt from it.

    Args:
        path: The path of a file, or of any part of one that is split.
        packed: Whether quantized tensors become QTensors; otherwise they are dequantized to float32.

    Raises:
        FormatError: for a file that is damaged, of an architecture that is not known, or that holds tensors of types or
            names that a table, or the architecture, does not have; for a part that is missing.
    """

    def __init__(self, path: Path, packed: bool = False) -> None:
        headers = read_parts(path)
        first = headers[0]
        self._path, self._fields = first.path, first.fields
        name = first.fields.get("general.architecture")
        if not isinstance(name, str) or name not in ARCHITECTURES:
            raise FormatError(f"{path}: its architecture is {str(name)[:60]!r}; known are {', '.join(ARCHITECTURES)}")
        self._architecture = ARCHITECTURES[name]
        found = {each.name: each for header in headers for each in header.tensors}
        files = {each.name: header.path.name for header in headers for each in header.tensors}
        self._factors = self._rope_factors(found.pop(_FACTORS, None), files)
        _refuse_unreadable(path, found)
        extents: dict[str, Extent] = {}
        for theirs, tensor in found.items():
            ours, change = self._architecture.find(theirs, path)
            extents[ours] = Extent(files[theirs], tensor, change, self._heads(name, change, tensor))
        tied = {alias: kept for alias, kept in self._architecture.tied.items() if alias not in extents}
        super().__init__(Folder(path.parent), extents, packed, {a: kept for a, kept in tied.items() if kept in extents})

    def _rope_factors(self, tensor: Tensor | None, files: Mapping[str, str]) -> np.ndarray | None:
        if tensor is None:
            return None
        if tensor.type.name != "F32" or len(tensor.shape) != 1 or tensor.shape[0] > 2**16:
            raise FormatError(
                f"{self._path}: {_FACTORS} is {tensor.type.name} {list(tensor.shape)}; wanted F32, one axis"
            )
        with (self._path.parent / files[_FACTORS]).open("rb") as file:
            file.seek(tensor.offset)
            return np.frombuffer(file.read(4 * tensor.shape[0]), "<f4")

    def _heads(self, architecture: str, change: Change, tensor: Tensor) -> int:
        """Count the heads of a tensor whose rows were permuted; check that what was done to it can be undone."""
        if change == "plus_one" and (not tensor.type.dtype.startswith("float") or len(tensor.shape) != 1):
            raise FormatError(f"{self._path}: {tensor.name} is {tensor.type.name} {list(tensor.shape)}; wanted floats")
        if change not in ("query", "key"):
            return 0
        keys = ["attention.head_count"] if change == "query" else ["attention.head_count_kv", "attention.head_count"]
        said = [self._fields[f"{architecture}.{key}"] for key in keys if f"{architecture}.{key}" in self._fields]
        heads = said[0] if said else None
        rows = tensor.shape[0] if tensor.shape else 0
        if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1 or rows % (2 * heads):
            raise FormatError(
                f"{self._path}: {tensor.name} has {rows} rows, and {keys[0]} is {str(heads)[:40]}; wanted a number of "
                "heads that each have a whole number of pairs of rows"
            )
        return heads

    def side_files(self, target: Folder) -> SideFiles:
        """Rebuild the config and the tokenizer.

        Raises:
            FormatError: for fields that are missing or damaged.
        """
        name = str(self._fields["general.architecture"])
        fields = Fields(self._path, self._fields, name)
        embedding, _ = self._architecture.find(EMBEDDING, self._path)
        if embedding not in self.shapes or len(self.shapes[embedding][0]) != 2:
            raise FormatError(f"{self._path}: holds no {EMBEDDING} of two axes, without which no model can run")
        words = Vocabulary(self._path, self._fields)
        tensors = [extent.tensor for extent in self.extents.values()]
        rows = {tensor.name: tensor.shape[0] for tensor in tensors if len(tensor.shape) == 2}
        config = model_config(fields, rows, bool(self.aliases), self._factors)
        if "attention_bias" in config and any(key.endswith("q_proj.bias") for key in self.shapes):
            config["attention_bias"] = True
        config |= (ids := words.ids())
        files, notes = tokenizer_files(words, config["max_position_embeddings"])
        files = {"config.json": (json.dumps(config, indent=2) + "\n").encode()} | files
        files |= pooling_files(fields, self.shapes[embedding][0][1]) | generation_files(fields, ids)
        found = SideFiles(list(files), origin=GeneratedFiles(str(self._path), files))
        unused = words.unused() if "tokenizer.json" in files else []  # else a note says that there is none
        for what, names in (
            ("that config.json does not have", fields.left()),
            ("that are not applied", [*unused_sampling(fields), *unused, *fields.others()]),
        ):
            if names:
                notes.append(f"fields {what}: {some_of([key[:80] for key in names], 20)}")
        self.notes = [*(note for note in self.notes if note not in notes), *notes]
        return found


def read_parts(path: Path) -> list[Header]:
    """Read the headers of a file, or of all its parts if it is split.

    Raises:
        FormatError: as `read_header`; for a part that is missing, or another file's.
    """
    first = read_header(path)
    count = first.fields.get("split.count", 1)
    if not isinstance(count, int) or isinstance(count, bool) or count < 2:
        return [first]
    match = _SPLIT.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise FormatError(f"{path}: is one of {count} parts; wanted it named NAME-00001-of-{count:05}.gguf")
    headers: list[Header] = []
    names: set[str] = set()
    for number in range(count):
        part = path.with_name(f"{match['stem']}-{number + 1:05}-of-{count:05}.gguf")
        if not part.is_file():
            raise FormatError(f"{path}: its part {part.name} is not beside it; fetch it")
        header = first if part == path else read_header(part)
        if (header.fields.get("split.no"), header.fields.get("split.count")) != (number, count):
            raise FormatError(f"{part}: says that it is another part; fetch it again")
        if doubled := [each.name for each in header.tensors if each.name in names]:
            raise FormatError(f"{part}: holds tensor {doubled[0]!r}, which another part holds too")
        names |= {each.name for each in header.tensors}
        headers.append(header)
    total = headers[0].fields.get("split.tensors.count", len(names))
    if total != len(names):
        raise FormatError(f"{path}: its parts hold {len(names)} tensors; wanted {str(total)[:40]}")
    return headers


def _refuse_unreadable(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse types that no table holds, by name."""
    found = [tensor for tensor in tensors.values() if tensor.type.name not in READABLE]
    if found:
        shown = some_of([f"{tensor.name} ({tensor.type.name})" for tensor in found])
        raise FormatError(
            f"{path}: holds {shown}, of types that no table holds; wanted {', '.join(READABLE)}: convert the "
            "original, or quantize it to one of these"
        )
