"""Read a checkpoint that another program quantized: its weights as they are packed, or dequantized."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from aq_jax.conversion.prequantized import declared_entries, read_config, recognize, without_entries
from aq_jax.conversion.sidefiles import SideFiles, is_same_folder
from aq_jax.conversion.source import Source
from aq_jax.converters.schemes.entry import Config, Scheme, Weight
from aq_jax.converters.schemes.grids import to_qtensor
from aq_jax.core.bitstream import to_stream
from aq_jax.core.qtensor import QTensor
from aq_jax.errors import FormatError, some_of
from aq_jax.store.casts import saturated
from aq_jax.store.folders import FileState, Folder
from aq_jax.store.jsonfile import read_json
from aq_jax.store.layout import column_bytes

_CONFIG = "config.json"


class SchemeSource(Source):
    """The tensors of a quantized checkpoint; each weight is one tensor, under its own name.

    Args:
        stored: The checkpoint.
        scheme: The scheme that it is quantized in.
        config: The entry of config.json that says so.
        packed: Whether weights become QTensors; otherwise they are dequantized.

    Raises:
        FormatError: as `Scheme.weights`; for codes of another scheme beside these weights.
    """

    def __init__(self, stored: Source, scheme: Scheme, config: Config, packed: bool) -> None:
        found = {weight.name: weight for weight in scheme.weights(stored, config)}
        parts = {part: weight.name for weight in found.values() for part in weight.parts}
        dropped = {name for weight in found.values() for name in weight.dropped}
        shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        others: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        left_out: list[str] = []
        for name, stored_as in stored.shapes.items():
            if weight := found.get(parts.get(name, "")):
                shapes[weight.name] = weight.shape, weight.dtype
            elif name in dropped or scheme.leaves_out(name, stored):
                left_out.append(name)
            else:
                if name in found:
                    raise FormatError(f"{stored.folder}: {name} is there both packed and as floats; wanted it once")
                shapes[name] = others[name] = stored_as
        if found and (other := recognize(others, {})):
            raise FormatError(
                f"{stored.folder}: its weights are quantized by {scheme.about}, and others in another way "
                f"({other.kind}, known by {other.by}), which is not read beside it; dequantize it with the program "
                "that wrote it"
            )
        super().__init__(stored.folder, shapes, _weights_tied(stored, parts, left_out), stored.files)
        self.config_folder = stored.config_folder
        self.quantized = {name: weight.spec.quant_type for name, weight in found.items()}
        self._stored, self._weights, self._packed, self._scheme = stored, found, packed, scheme
        self._sizes = {name: sum(_columns(weight).values()) for name, weight in found.items()}
        if packed:
            self.row_metadata = {name: _row_metadata(weight, scheme) for name, weight in found.items()}
            self.provenance = {"quantized_by": {"scheme": scheme.about, "config": dict(config)}}
        self.notes = [*stored.notes]
        if left_out:
            what = "zeros" if dropped else "of activations, or of weights that are plain"
            self.notes.append(f"left out, being {what}: {some_of(left_out)}")
        self.notes += dict.fromkeys(note for weight in found.values() for note in weight.notes)

    def read(self, name: str) -> np.ndarray | QTensor:
        if name not in self._weights:
            return self._stored.read(name)
        weight = self._weights[name]
        q = to_qtensor(weight.read(), weight.shape, weight.spec, f"{self.folder}: {name}")
        return q if self._packed else _dequantized(q, weight)

    def release(self) -> None:
        self._stored.release()

    def nbytes(self, name: str) -> int:
        return self._sizes[name] if self._packed and name in self._sizes else super().nbytes(name)

    def read_memory(self, name: str) -> int:
        if name not in self._weights:
            return self._stored.read_memory(name)
        # Words in another order, a byte a code twice, the stream, and grids; the values too, if they are asked for.
        count = math.prod(self.shapes[name][0])
        return 3 * count + 2 * self._sizes[name] + (0 if self._packed else 6 * count)

    def file_states(self) -> list[list[object]]:
        return self._stored.file_states()

    def side_files(self, target: Folder) -> SideFiles:
        """Find the side files; config.json goes without what declares quantized weights."""
        found = self._stored.side_files(target)
        if isinstance(found.origin, Folder) and not is_same_folder(found.origin, target):
            files = {name for name in found.names if name.rpartition("/")[2] in self._scheme.files}
            found.names = [name for name in found.names if name not in files]
            edited = {
                name: without_entries(found.origin, name) for name in found.names if name.rpartition("/")[2] == _CONFIG
            }
            found.origin = EditedFolder(found.origin, {name: text for name, text in edited.items() if text})
            for name in sorted(files):
                found.leave_behind("of the weights as they were quantized", name)
        return found


class EditedFolder(Folder):
    """A folder some of whose files are read with other contents.

    Args:
        folder: The folder.
        edits: The contents by name.
    """

    def __init__(self, folder: Folder, edits: Mapping[str, bytes]) -> None:
        super().__init__(folder.location)
        self._edits = edits

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        if name not in self._edits:
            return super().read(name, offset, length)
        return self._edits[name][offset : None if length is None else offset + length]

    def state(self, name: str) -> FileState | None:
        return FileState(len(self._edits[name]), None) if name in self._edits else super().state(name)


def _weights_tied(stored: Source, parts: Mapping[str, str], left_out: Collection[str]) -> dict[str, str]:
    """Return tied tensors, those that are parts of weights as these weights.

    Raises:
        FormatError: for a part that is tied, of a weight of which another is not, or is tied to something else.
    """
    aliases: dict[str, str] = {}
    tied: dict[tuple[str, str], set[str]] = {}
    for alias, kept in stored.aliases.items():
        if kept in left_out:
            continue
        if kept not in parts:
            aliases[alias] = kept
            continue
        weight = parts[kept]
        stem = weight.removesuffix("weight")
        module = alias.removesuffix(kept.removeprefix(stem))
        if not kept.startswith(stem) or module == alias:
            raise FormatError(f"{stored.folder}: {alias} is tied to {kept}; wanted the same part of a layer")
        tied.setdefault((f"{module}weight", weight), set()).add(kept)
    for (alias, weight), some in tied.items():
        if missing := {part for part, of in parts.items() if of == weight} - some:
            raise FormatError(
                f"{stored.folder}: {alias} is tied to {weight}, of which {min(missing)} is not; wanted all of it tied"
            )
        aliases[alias] = weight
    return aliases


def declared(stored: Source, schemes: Collection[Scheme]) -> dict[str, Any]:
    """Read what declares quantized weights: config.json, or a file of an older program."""
    entries = declared_entries(read_config(stored.folder))
    # A converted checkpoint may keep the entry of what it was converted from.
    known = [entry for entry in entries if any(scheme.recognizes(entry) for scheme in schemes)]
    if entries:
        return [*known, *entries][0]
    for file in dict.fromkeys(file for scheme in schemes for file in scheme.files):
        if stored.folder.state(file) is not None:
            return {"file": file} | (read_json(stored.folder, file, dict) or {})
    return {}


def _columns(weight: Weight) -> dict[str, int]:
    spec = weight.spec
    return column_bytes(
        math.prod(weight.shape), weight.shape, weight.dtype.name, spec.quant_type, spec.quant_axis, spec.group_size
    )


def _row_metadata(weight: Weight, scheme: Scheme) -> dict[str, Any]:
    return {"dtype": weight.dtype.name, "quant_type": weight.spec.quant_type, "solver": scheme.about}


def _dequantized(q: QTensor, weight: Weight) -> np.ndarray:
    stream, scales, zeros = to_stream(q)
    out = np.empty(math.prod(weight.shape), np.float32)
    weight.spec.coding.read(stream, scales, zeros, weight.spec.group_elements(weight.shape), weight.shape, out)
    return saturated(out, weight.dtype).reshape(weight.shape)
