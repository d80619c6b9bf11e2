"""Tell what a file beside a model's weights is: weights of another kind, a document, or one that the model needs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase

from aq_jax.store.entries import Entry
from aq_jax.store.manifest import MANIFEST
from aq_jax.store.modules import MODELS

# Weights of all frameworks, and files that are built from them.
_WEIGHTS = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.h5", "*.keras", "*.ot",
    "*.msgpack", "*.onnx", "*.onnx_data*", "*.onnx.data", "*.ort", "*.gguf", "*.ggml", "*.llamafile", "*.tflite",
    "*.pb", "*.mlmodel", "*.mlpackage", "*.mlmodelc", "*.npz", "*.npy", "*.parquet", "*.arrow", "*.engine", "*.nemo",
    "*.params", "*.data-*-of-*", "*.ckpt.index", "*.index.json", "openvino*.xml", "*.zarr", "*.tar", "*.tar.*",
    "*.tgz", "*.zip",
)  # fmt: skip
_WEIGHT_FOLDERS = frozenset({"onnx", "openvino", "coreml", "tflite", "gguf", "original", "flax_model", "saved_model"})
_CACHES = frozenset({"__pycache__", "Thumbs.db"})
# Files for people: one of that name that the target folder already has stays, and is no reason to refuse.
_DOCUMENTS = ("*.md", "LICEN[CS]E*", "NOTICE*", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.pdf")
# The files to look for beside a table that does not record what was copied there.
_KNOWN = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer*.json",
    "tokenizer*.model", "spiece.model", "spm.model", "sentencepiece*.model", "*.tiktoken", "tekken.json",
    "vocab.json", "vocab.txt", "merges.txt", "normalizer.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.*", "additional_chat_templates/*", "modules.json", "sentence_*_config.json",
    "config_sentence_transformers.json", "[0-9]_*/config.json",
)  # fmt: skip
_SAFE, PICKLE = "model.safetensors", "pytorch_model.bin"
# The file that marks a checkpoint, in the order of the search -> the files that hold its weights.
_CHECKPOINTS = {
    _SAFE: _SAFE, f"{_SAFE}.index.json": "*.safetensors*",
    PICKLE: PICKLE, f"{PICKLE}.index.json": "pytorch_model*.bin*",
}  # fmt: skip
MAX_FILE, MAX_DEPTH = 128 << 20, 4
"""The most bytes of a file, and the most nested folders."""


def reason_to_leave(entry: Entry, name: str, modules: Mapping[str, str], beside: Sequence[Entry]) -> str:
    """Return why a file is not copied, or a folder not searched; "" if it is."""
    if entry.name.startswith(".") or entry.name in _CACHES:
        return "caches"
    if not _is_safe_file_name(entry.name):
        return "names that are not plain"
    if entry.kind == "folder":
        if name not in modules and (entry.name in _WEIGHT_FOLDERS or is_weight(entry.name)):
            return "weights of another kind"
        return "nested too deep" if name.count("/") >= MAX_DEPTH else ""
    if entry.kind == "outside":
        return "links out of the folder"
    if entry.kind == "other":
        return "cannot be read"
    if name == MANIFEST:
        return "named like a table's manifest"
    kind = modules.get(name.rpartition("/")[0], MODELS[0])
    if is_weight(entry.name) and (kind in MODELS or not _is_module_weight(entry.name, beside)):
        return "weights of another kind"
    return f"more than {MAX_FILE >> 20} MB" if entry.size > MAX_FILE else ""


def _is_module_weight(name: str, beside: Sequence[Entry]) -> bool:
    """Return whether these are the weights of a small module after the Transformer, which the table does not hold."""
    return name == _SAFE or (name == PICKLE and all(entry.name != _SAFE for entry in beside))


def is_weight(name: str) -> bool:
    """Return whether a name is that of weights, or of what is built from them."""
    return any(fnmatchcase(name.lower(), pattern) for pattern in _WEIGHTS)


def _is_safe_file_name(part: str) -> bool:
    """Return whether a file name is valid on any system, and does nothing to a terminal."""
    reserved = set(part) & set('/\\:*?"<>|')
    return bool(part) and part.isprintable() and not reserved and not part.startswith(".") and len(part.encode()) <= 255


def is_known(name: str) -> bool:
    """Return whether a path is one that a model's files have."""
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in _KNOWN)


def is_document(name: str) -> bool:
    """Return whether a file is for people."""
    return any(fnmatchcase(name.rpartition("/")[2], pattern) for pattern in _DOCUMENTS)


def checkpoint_pattern(names: Collection[str]) -> str:
    """Return the pattern of the files that hold a folder's weights, given the names in it; "" if there are none.

    >>> checkpoint_pattern({"config.json", "pytorch_model.bin", "model.safetensors"})
    'model.safetensors'
    """
    return next((files for mark, files in _CHECKPOINTS.items() if mark in names), "")
