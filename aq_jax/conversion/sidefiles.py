"""What lies beside a model's weights and goes with them: configs, tokenizers, templates, modules, code, licences.

Everything in the folder is taken but weights, caches, what leads out of it, and what is too large or too much. Copied
code is never imported.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from aq_jax.errors import FormatError
from aq_jax.store.folders import Entry, FileState, Folder
from aq_jax.store.manifest import MANIFEST
from aq_jax.store.modules import read_modules

MAX_FILE, MAX_BYTES, MAX_FILES, MAX_DEPTH = 128 << 20, 1 << 30, 1000, 4
"""Bytes of one file and of all, how many files, and how many folders one in another."""
_MAX_ENTRIES = 20_000
"""Names that are looked at."""
RECORD = "side_files"
"""The entry of a table's config that lists what was copied beside it."""
# Weights, of this framework and others, and what is made of them.
WEIGHTS = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.h5", "*.keras", "*.ot",
    "*.msgpack", "*.onnx", "*.onnx_data*", "*.onnx.data", "*.ort", "*.gguf", "*.ggml", "*.llamafile", "*.tflite",
    "*.pb", "*.mlmodel", "*.mlpackage", "*.mlmodelc", "*.npz", "*.npy", "*.parquet", "*.arrow", "*.engine", "*.nemo",
    "*.params", "*.data-*-of-*", "*.ckpt.index", "*.index.json", "openvino*.xml", "*.zarr", "*.tar", "*.tar.*",
    "*.tgz", "*.zip",
)  # fmt: skip
_WEIGHT_FOLDERS = frozenset({"onnx", "openvino", "coreml", "tflite", "gguf", "original", "flax_model", "saved_model"})
_CACHES = frozenset({"__pycache__", "Thumbs.db"})
# Read by people: another of that name in the folder that is written to stays, and is no reason to refuse.
_DOCUMENTS = ("*.md", "LICEN[CS]E*", "NOTICE*", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.pdf")
# What a folder of tables is searched for if its table does not say what was copied beside it.
KNOWN = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer*.json",
    "tokenizer*.model", "spiece.model", "spm.model", "sentencepiece*.model", "*.tiktoken", "tekken.json",
    "vocab.json", "vocab.txt", "merges.txt", "normalizer.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.*", "additional_chat_templates/*", "modules.json", "sentence_*_config.json",
    "config_sentence_transformers.json", "[0-9]_*/config.json",
)  # fmt: skip
_SAFE, _PICKLE = "model.safetensors", "pytorch_model.bin"
# What is there, in the order in which a checkpoint is looked for -> the files that are read then.
_READ = {
    _SAFE: _SAFE, f"{_SAFE}.index.json": "*.safetensors*",
    _PICKLE: _PICKLE, f"{_PICKLE}.index.json": "pytorch_model*.bin*",
}  # fmt: skip
_MODEL = "Transformer"
"""The module of sentence-transformers whose weights are the table."""
_SHOWN = 6


@dataclass(frozen=True, slots=True)
class Made:
    """Files that are made for a model, by name, and are read as those of a folder are.

    Args:
        of: what they are made of, for messages.
        files: contents by name.
    """

    of: str
    files: Mapping[str, bytes]

    def at(self, name: str) -> str:
        return f"the {name} that is made of {self.of}"

    def read(self, name: str) -> bytes:
        return self.files[name]

    def state(self, name: str) -> FileState | None:
        return FileState(len(self.files[name]), None)


@dataclass(slots=True)
class SideFiles:
    """What goes with a model, and what stays.

    Args:
        names: of the files that go, relative, parts joined by `/`.
        left: why others do not, and their names (of a folder as a whole, with a `/` at the end).
        pickles: those of the names that are weights of a module as a pickle.
        origin: where they are; None if they are where they are to be.
    """

    names: list[str] = field(default_factory=list)
    left: dict[str, list[str]] = field(default_factory=dict)
    pickles: list[str] = field(default_factory=list)
    origin: Folder | Made | None = None

    def leave(self, why: str, name: str) -> None:
        self.left.setdefault(why, []).append(name)

    @property
    def notes(self) -> list[str]:
        """What was left behind, a line for each reason."""
        notes = [f"left behind, {why}: {_listed(names)}" for why, names in self.left.items()]
        if self.pickles:
            notes.append(
                f"copied as they are, but no model is loaded with them, being pickles: {_listed(self.pickles)}; save "
                "them as model.safetensors"
            )
        return notes


def side_files(folder: Folder, target: Folder | None = None, table: Collection[str] = ()) -> SideFiles:
    """Find what goes with the weights of a model's folder.

    Args:
        folder: that holds the model.
        target: where they go; if that is inside the folder, it is passed over.
        table: files that the weights are read from, if that is no checkpoint.

    >>> import tempfile
    >>> folder = Folder(tempfile.mkdtemp())
    >>> for name in ("config.json", "model.safetensors", "rust_model.ot", "code.py", ".git/HEAD"):
    ...     folder.write(name, b"{}")
    >>> found = side_files(folder)
    >>> found.names, found.notes[-1]
    (['code.py', 'config.json'], 'left behind, weights of another kind: rust_model.ot')
    """
    found = SideFiles(origin=folder)
    if not folder.exists():
        return found  # whoever reads the weights says so
    modules, own = module_folders(folder), _place(target, folder)
    waiting, seen, held = deque([""]), 0, 0
    while waiting:  # the nearest first: what a model cannot do without lies at the top
        above = waiting.popleft()
        try:
            entries = folder.entries(above)
        except OSError:
            if not above:
                raise
            found.leave("not to be read", f"{above}/")
            continue
        seen += len(entries)
        if seen > _MAX_ENTRIES:
            found.leave(f"beyond {_MAX_ENTRIES:,} names", f"{above}/")
            continue
        if above and above not in modules and any(_is_weight(entry.name) for entry in entries):
            found.leave("weights of another kind", f"{above}/")
            continue
        own_weights = modules.get(above, _MODEL) == _MODEL
        there = {entry.name for entry in entries if own_weights}
        read = next((files for mark, files in _READ.items() if mark in there), "")
        for entry in entries:
            name = f"{above}/{entry.name}" if above else entry.name
            if name == own or name in table or fnmatchcase(entry.name, read):
                continue
            if why := _why_left(entry, name, modules, entries):
                found.leave(why, f"{name}/" if entry.kind == "folder" else name)
            elif entry.kind == "folder":
                waiting.append(name)
            elif len(found.names) >= MAX_FILES or held + entry.size > MAX_BYTES:
                found.leave(f"beyond {MAX_FILES:,} files or {MAX_BYTES >> 20:,} MB", name)
            else:
                found.names.append(name)
                found.pickles += [name] if entry.name == _PICKLE else []
                held += entry.size
    return found


def side_files_beside(folder: Folder, record: object, target: Folder) -> SideFiles:
    """Find what goes with a table: what was copied beside it, or is called as such files are.

    Other things in the folder may be anybody's: tables, reports, sources. In its own folder a table has what it needs.

    Args:
        folder: that the table lies in.
        record: of the table's config, the names that were copied; anything else if it has none. It is not trusted.
        target: where they go.
    """
    noted = {name for name in record if isinstance(name, str)} if isinstance(record, list) else set()
    if is_same(folder, target):
        return SideFiles([name for name in record if name in noted] if isinstance(record, list) else [])
    whole, modules = side_files(folder, target), module_folders(folder)
    found = SideFiles(origin=folder)
    for name in whole.names:
        if name in noted or _is_known(name) or name.rpartition("/")[0] in modules:
            found.names.append(name)
        elif not isinstance(record, list):
            found.leave("not known as a model's own", name)
    if missing := sorted(noted - set(found.names)):
        found.left["not beside the table any more"] = missing
    return found


def _is_known(name: str) -> bool:
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in KNOWN)


def is_same(a: Folder, b: Folder) -> bool:
    """Whether two folders are one."""
    if a.local is None or b.local is None:
        return a.location.rstrip("/") == b.location.rstrip("/")
    return a.local.resolve() == b.local.resolve()


def _place(target: Folder | None, folder: Folder) -> str:
    """Under which name a folder lies in another; "" if it does not."""
    if target is None:
        return ""
    if target.local is None or folder.local is None:
        inside = target.location.startswith(f"{folder.location.rstrip('/')}/")
        return target.location[len(folder.location.rstrip("/")) + 1 :].rstrip("/") if inside else ""
    inner, outer = target.local.resolve(), folder.local.resolve()
    return inner.relative_to(outer).as_posix().removeprefix(".") if inner.is_relative_to(outer) else ""


def module_folders(folder: Folder) -> dict[str, str]:
    """The folders that modules.json of sentence-transformers names, and the kind of module in each.

    >>> import tempfile
    >>> folder = Folder(tempfile.mkdtemp())
    >>> dense = b'[{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]'
    >>> folder.write("modules.json", dense)
    >>> module_folders(folder)
    {'2_Dense': 'Dense'}
    """
    try:
        return {module.path: module.kind for module in read_modules(folder) or () if module.path}
    except FormatError:
        return {}  # whoever runs the model says so


def model_place(folder: Folder) -> str:
    """The folder in a model's folder in which its weights are: "" but for the old layout of sentence-transformers."""
    place = next((name for name, kind in module_folders(folder).items() if kind == _MODEL), "")
    return place if place and folder.state(f"{place}/config.json") is not None else ""


def recorded(found: SideFiles) -> dict[str, object]:
    """What a table's config says of the files beside it."""
    return {RECORD: found.names} if found.names else {}


def check_side_files(found: SideFiles, target: Folder) -> None:
    """Refuse to put one model's config and tokenizer files in the place of another's.

    Documents for people are no reason to: those that are there stay, and `found` names them.

    Raises:
        FormatError: naming a file that is there already with other contents.
    """
    source = found.origin
    if source is None:
        return
    for name in list(found.names):
        parts = name.split("/")
        above = ["/".join(parts[:count]) for count in range(1, len(parts))]
        if in_the_way := [folder for folder in above if target.state(folder) is not None]:
            raise FormatError(
                f"{target.at(in_the_way[0])}: is a file, and {name} belongs into a folder of that name; write to "
                "another folder, or remove it"
            )
        if not target.holds(name) or _same(source, target, name):
            continue
        if any(fnmatchcase(name.rpartition("/")[2], pattern) for pattern in _DOCUMENTS):
            found.names.remove(name)
            found.leave("another is there", name)
            continue
        raise FormatError(
            f"{target.at(name)}: is there already and differs from {source.at(name)}, which belongs beside this "
            "model; write to another folder, or remove it"
        )


def copy_side_files(found: SideFiles, target: Folder) -> None:
    """Copy files, each of them whole or not at all; equal ones are left alone."""
    if (origin := found.origin) is None:
        return
    for name in found.names:
        if not target.holds(name):
            target.write(name, origin.read(name))


def _why_left(entry: Entry, name: str, modules: Mapping[str, str], beside: Sequence[Entry]) -> str:
    """Why a file is not copied, or a folder not looked into; "" if it is."""
    if entry.name.startswith(".") or entry.name in _CACHES:
        return "caches"
    if not _is_plain(entry.name):
        return "names that are not plain"
    if entry.kind == "folder":
        if name not in modules and (entry.name in _WEIGHT_FOLDERS or _is_weight(entry.name)):
            return "weights of another kind"
        return "too many folders one in another" if name.count("/") >= MAX_DEPTH else ""
    if entry.kind == "outside":
        return "links out of the folder"
    if entry.kind == "other":
        return "no files that can be read"
    if name == MANIFEST:
        return "the name that a table's manifest has"
    kind = modules.get(name.rpartition("/")[0], _MODEL)
    if _is_weight(entry.name) and (kind == _MODEL or not _is_modules(entry.name, beside)):
        return "weights of another kind"
    return f"of more than {MAX_FILE >> 20} MB" if entry.size > MAX_FILE else ""


def _is_modules(name: str, beside: Sequence[Entry]) -> bool:
    """Whether these are the weights of a small module behind the Transformer, which the table does not hold."""
    return name == _SAFE or (name == _PICKLE and all(entry.name != _SAFE for entry in beside))


def _is_weight(name: str) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in WEIGHTS)


def _is_plain(part: str) -> bool:
    """Whether a name is one on any system, and nothing that a terminal would obey."""
    reserved = set(part) & set('/\\:*?"<>|')
    return bool(part) and part.isprintable() and not reserved and not part.startswith(".") and len(part.encode()) <= 255


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _same(a: Folder | Made, b: Folder, name: str) -> bool:
    first, second = a.state(name), b.state(name)
    return first is not None and second is not None and first.size == second.size and a.read(name) == b.read(name)
