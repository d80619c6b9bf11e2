"""Copy the files that go with a model's weights: configs, tokenizers, templates, modules, code, licences.

Everything in the folder goes along but weights, caches, links out of it, and what is too large or too many. Copied code
is never imported.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from aq_jax.conversion.model_files import (
    PICKLE,
    checkpoint_pattern,
    is_document,
    is_known,
    is_weight,
    reason_to_leave,
)
from aq_jax.errors import FormatError, some_of
from aq_jax.store.folders import FileState, Folder
from aq_jax.store.modules import MODELS, read_modules

MAX_BYTES, MAX_FILES = 1 << 30, 1000
"""The most bytes of all files, and the most files."""
_MAX_ENTRIES = 20_000
"""The most names that are looked at."""
RECORD = "side_files"
"""The entry of a table's config that lists what was copied beside it."""


@dataclass(frozen=True, slots=True)
class GeneratedFiles:
    """Files that are generated for a model, and are read as those of a folder are.

    Args:
        origin: The file that they are generated from, for messages.
        files: The contents by name.
    """

    origin: str
    files: Mapping[str, bytes]

    def join(self, name: str) -> str:
        return f"the {name} that is generated from {self.origin}"

    def read(self, name: str) -> bytes:
        return self.files[name]

    def state(self, name: str) -> FileState | None:
        return FileState(len(self.files[name]), None)


@dataclass(slots=True)
class SideFiles:
    """The files that go with a model, and those that stay behind.

    Args:
        names: The relative paths of the files that go, parts joined by `/`.
        left_behind: The paths of the others by the reason (of a whole folder, with a `/` at the end).
        pickles: The paths among `names` that are a module's weights as a pickle.
        origin: The place that holds the files; None if they already are in the target.
    """

    names: list[str] = field(default_factory=list)
    left_behind: dict[str, list[str]] = field(default_factory=dict)
    pickles: list[str] = field(default_factory=list)
    origin: Folder | GeneratedFiles | None = None

    def leave_behind(self, reason: str, name: str) -> None:
        self.left_behind.setdefault(reason, []).append(name)

    @property
    def notes(self) -> list[str]:
        """List what was left behind, a line for each reason."""
        notes = [f"left behind, {reason}: {some_of(names)}" for reason, names in self.left_behind.items()]
        if self.pickles:
            notes.append(
                f"copied as they are, but no model is loaded with them, because they are pickles: "
                f"{some_of(self.pickles)}; save them as model.safetensors"
            )
        return notes


def side_files(folder: Folder, target: Folder | None = None, table: Collection[str] = ()) -> SideFiles:
    """Find the files that go with the weights of a model's folder.

    Args:
        folder: The folder that holds the model.
        target: The folder that they go to; if it is inside the model's folder, it is skipped.
        table: The files that hold the weights, if they are no checkpoint.

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
        return found  # the reader of the weights refuses it
    modules, own = module_folders(folder), _path_inside(target, folder)
    waiting, seen, held = deque([""]), 0, 0
    while waiting:  # breadth first: what a model needs lies at the top
        above = waiting.popleft()
        try:
            entries = folder.entries(above)
        except OSError:
            if not above:
                raise
            found.leave_behind("cannot be read", f"{above}/")
            continue
        seen += len(entries)
        if seen > _MAX_ENTRIES:
            found.leave_behind(f"beyond {_MAX_ENTRIES:,} names", f"{above}/")
            continue
        if above and above not in modules and any(is_weight(entry.name) for entry in entries):
            found.leave_behind("weights of another kind", f"{above}/")
            continue
        own_weights = modules.get(above, MODELS[0]) in MODELS
        read = checkpoint_pattern({entry.name for entry in entries if own_weights})
        for entry in entries:
            name = f"{above}/{entry.name}" if above else entry.name
            if name == own or name in table or fnmatchcase(entry.name, read):
                continue
            if reason := reason_to_leave(entry, name, modules, entries):
                found.leave_behind(reason, f"{name}/" if entry.kind == "folder" else name)
            elif entry.kind == "folder":
                waiting.append(name)
            elif len(found.names) >= MAX_FILES or held + entry.size > MAX_BYTES:
                found.leave_behind(f"beyond {MAX_FILES:,} files or {MAX_BYTES >> 20:,} MB", name)
            else:
                found.names.append(name)
                found.pickles += [name] if entry.name == PICKLE else []
                held += entry.size
    return found


def side_files_beside(folder: Folder, record: object, target: Folder) -> SideFiles:
    """Find the files that go with a table: those that were copied beside it, or are named as such files are.

    Other files in the folder may be anybody's: tables, reports, sources. In its own folder a table has what it needs.

    Args:
        folder: The folder that holds the table.
        record: The names that the table's config records as copied; anything else if it records none. It is not
            trusted.
        target: The folder that they go to.
    """
    noted = {name for name in record if isinstance(name, str)} if isinstance(record, list) else set()
    if is_same_folder(folder, target):
        return SideFiles([name for name in record if name in noted] if isinstance(record, list) else [])
    whole, modules = side_files(folder, target), module_folders(folder)
    found = SideFiles(origin=folder)
    for name in whole.names:
        if name in noted or is_known(name) or name.rpartition("/")[0] in modules:
            found.names.append(name)
        elif not isinstance(record, list):
            found.leave_behind("not recognized as a model's file", name)
    if missing := sorted(noted - set(found.names)):
        found.left_behind["no longer beside the table"] = missing
    return found


def is_same_folder(a: Folder, b: Folder) -> bool:
    """Return whether two folders are the same."""
    if a.local is None or b.local is None:
        return a.location.rstrip("/") == b.location.rstrip("/")
    return a.local.resolve() == b.local.resolve()


def _path_inside(target: Folder | None, folder: Folder) -> str:
    """Return the relative path of a folder inside another; "" if it is elsewhere."""
    if target is None:
        return ""
    if target.local is None or folder.local is None:
        inside = target.location.startswith(f"{folder.location.rstrip('/')}/")
        return target.location[len(folder.location.rstrip("/")) + 1 :].rstrip("/") if inside else ""
    inner, outer = target.local.resolve(), folder.local.resolve()
    return inner.relative_to(outer).as_posix().removeprefix(".") if inner.is_relative_to(outer) else ""


def module_folders(folder: Folder) -> dict[str, str]:
    """List the folders that sentence-transformers' modules.json names, with the kind of module in each.

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
        return {}  # loading the model refuses it


def weights_path(folder: Folder) -> str:
    """Return the relative path of the folder with a model's weights: "" but in sentence-transformers' old layout."""
    path = next((name for name, kind in module_folders(folder).items() if kind in MODELS), "")
    there = path and any(folder.state(f"{path}/{name}") is not None for name in ("config.json", "tokenizer.json"))
    return path if there else ""


def side_file_record(found: SideFiles) -> dict[str, object]:
    """Build the record of the files beside a table, for its config."""
    return {RECORD: found.names} if found.names else {}


def check_side_files(found: SideFiles, target: Folder) -> None:
    """Refuse to overwrite another model's config and tokenizer files.

    Documents for people are no reason to refuse: those that exist stay, and `found` lists them as left behind.

    Raises:
        FormatError: naming a file that already exists with other contents.
    """
    source = found.origin
    if source is None:
        return
    for name in list(found.names):
        parts = name.split("/")
        above = ["/".join(parts[:count]) for count in range(1, len(parts))]
        if in_the_way := [folder for folder in above if target.state(folder) is not None]:
            raise FormatError(
                f"{target.join(in_the_way[0])}: is a file, and {name} needs a folder of that name; write to another "
                "folder, or remove it"
            )
        if not target.holds(name) or _is_equal(source, target, name):
            continue
        if is_document(name):
            found.names.remove(name)
            found.leave_behind("another already exists", name)
            continue
        raise FormatError(
            f"{target.join(name)}: already exists and differs from {source.join(name)}, which belongs beside this "
            "model; write to another folder, or remove it"
        )


def copy_side_files(found: SideFiles, target: Folder) -> None:
    """Copy the files, each whole or not at all; equal ones are left alone."""
    if (origin := found.origin) is None:
        return
    for name in found.names:
        if not target.holds(name):
            target.write(name, origin.read(name))


def _is_equal(a: Folder | GeneratedFiles, b: Folder, name: str) -> bool:
    first, second = a.state(name), b.state(name)
    return first is not None and second is not None and first.size == second.size and a.read(name) == b.read(name)
