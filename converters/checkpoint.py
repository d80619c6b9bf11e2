"""A folder of PyTorch weights as a source of tensors: safetensors, alone or sharded, or (asked for) a pickle."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from aq_jax.errors import FormatError
from aq_jax.frameworks import identity, to_numpy, torch_module
from aq_jax.store import DTYPES

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
# How safetensors spells what the table can hold.
SAFE_DTYPES: Mapping[str, str] = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
}  # fmt: skip
# Before 2.10 a crafted pickle gets around weights_only (CVE-2025-32434, CVE-2026-24747).
SAFE_TORCH = (2, 10)


class Checkpoint:
    """Tensors of a folder, read through memory maps: nothing is copied until it is used."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        self.aliases: dict[str, str] = {}
        self._arrays: dict[str, Any] = {}

    def array(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def add(self, name: str, array: np.ndarray, where: object) -> None:
        if name in self._arrays:
            raise FormatError(f"{where}: tensor {name!r} is in another file too; a checkpoint holds each name once")
        self._arrays[name] = array
        self.shapes[name] = (array.shape, array.dtype)


@contextmanager
def open_checkpoint(folder: str | Path, allow_pickle: bool = False) -> Iterator[Checkpoint]:
    """The tensors of a Hugging Face folder: model.safetensors, else its shards, else (asked for) the pickle.

    The order is that of transformers: where a folder holds more than one of them, both read the same weights.

    Raises:
        FormatError: if the folder holds no weights, or files that are damaged, incomplete or of an unknown dtype.
        FileNotFoundError: if there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder")
    found = Checkpoint()
    if (folder / SINGLE).exists():
        _read_safetensors(folder / SINGLE, found)
    elif (folder / INDEX).exists():
        _read_shards(folder, found)
    elif not (folder / PICKLE).exists():
        raise FormatError(f"{folder}: holds none of {SINGLE}, {INDEX}, {PICKLE}; name a folder of Hugging Face weights")
    elif not allow_pickle:
        raise FormatError(
            f"{folder / PICKLE}: is a pickle, which can run code when it is read; convert it to safetensors where it "
            "comes from, or, if you trust its author, set allow_pickle = true"
        )
    else:
        _read_pickle(folder / PICKLE, found)
    yield found


def _read_shards(folder: Path, found: Checkpoint) -> None:
    path = folder / INDEX
    try:
        places = json.loads(path.read_bytes())["weight_map"]
        files = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path}: has no weight_map of names and files ({error!r}); fetch it again") from None
    for file in files:
        if not isinstance(file, str) or Path(file).name != file or file.startswith("."):
            raise FormatError(f"{path}: names the file {file!r}; wanted a plain file name in the same folder")
        if not (folder / file).is_file():
            raise FormatError(f"{path}: names {file!r}, which is not there; fetch the missing shard")
        _read_safetensors(folder / file, found)
    if not files:
        raise FormatError(f"{path}: its weight_map is empty; fetch it again")
    missing = [name for name in places if name not in found.shapes and name not in found.aliases]
    strangers = [name for name in found.shapes if name not in places]
    if missing or strangers:
        raise FormatError(f"{path}: the shards lack {missing[:5]}, and hold {strangers[:5]} that it does not name")


def _read_safetensors(path: Path, found: Checkpoint) -> None:
    """Views into a safetensors file, whose header the library has checked: bounds, overlaps, sizes."""
    try:
        with safetensors.safe_open(path, framework="numpy") as handle:
            notes = handle.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise FormatError(f"{path}: not a safetensors file: {error}") from None
    with path.open("rb") as file:
        memory = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    start = 8 + int.from_bytes(memory[:8], "little")
    header = json.loads(bytes(memory[8:start]), object_pairs_hook=lambda pairs: _distinct(pairs, path))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in SAFE_DTYPES:
            raise FormatError(f"{path}: {name} has dtype {entry['dtype']}; known are {', '.join(SAFE_DTYPES)}")
        first, last = (start + offset for offset in entry["data_offsets"])
        dtype = DTYPES[SAFE_DTYPES[entry["dtype"]]]
        found.add(name, np.frombuffer(memory[first:last], np.uint8).view(dtype).reshape(entry["shape"]), path)
    # safetensors stores a tied tensor once and notes the name it dropped, as {dropped: kept}; "format" is its own note.
    found.aliases |= {a: kept for a, kept in notes.items() if kept in header and a not in header and a != "format"}


def _distinct(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    """A JSON object whose keys are all different: of two that are equal, readers would silently keep one."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise FormatError(f"{path}: the header repeats a name; fetch the file again")
    return found


def _read_pickle(path: Path, found: Checkpoint) -> None:
    torch = torch_module()
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
        found.add(name, to_numpy(tensor, name), path)
