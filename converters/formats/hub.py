"""Find models of Hugging Face's hub: in a folder of its cache, or by name, through huggingface_hub."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path

from aq_jax.conversion.sidefiles import module_folders
from aq_jax.errors import ConfigError, FormatError, some_of
from aq_jax.store.folders import Folder
from aq_jax.store.modules import MODELS

HUB = "hf:"
_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
# What no format here reads, or only if it is named, or asked for.
_NOT_FETCHED: tuple[str, ...] = (
    "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.ot", "*.msgpack", "*.onnx", "*.onnx_data*", "*.tflite",
    "*.gguf", "*.pb", "*.mlmodel", "*.npz", "consolidated*.safetensors",
)  # fmt: skip
_FOLDERS_NOT_FETCHED = ("onnx/*", "openvino/*", "coreml/*", "original/*")
_GGUF, _PART = ".gguf", re.compile(r"-\d{5}(-of-\d{5}\.gguf)$")
_SAFE = ("model.safetensors", "model.safetensors.index.json")
_PICKLES = "pytorch_model*.bin*"
_WITHOUT_WEIGHTS = ("Pooling", "Normalize")
_SECONDS = 10


def snapshot(folder: Path) -> Path:
    """Return the snapshot of a model's folder in the hub's cache: that of main, or the only one; or the folder itself.

    Args:
        folder: Any folder; one of the cache is named models--ORG--NAME, and holds snapshots/REVISION.

    Raises:
        FormatError: if there are several, and none is main's.

    >>> import tempfile
    >>> model = Path(tempfile.mkdtemp(), "models--org--name")
    >>> (model / "snapshots" / "0123abc").mkdir(parents=True)
    >>> snapshot(model).name, snapshot(model.parent) == model.parent
    ('0123abc', True)
    """
    if not folder.name.startswith("models--") or not (folder / "snapshots").is_dir():
        return folder
    found = sorted(each.name for each in (folder / "snapshots").iterdir() if each.is_dir())
    main = folder / "refs" / "main"
    if main.is_file() and main.stat().st_size < 1000 and (commit := main.read_text().strip()) in found:
        return folder / "snapshots" / commit
    if len(found) != 1:
        raise FormatError(
            f"{folder}: holds the snapshots {some_of(found)}, none of them main's; name one, as "
            "FOLDER/snapshots/REVISION"
        )
    return folder / "snapshots" / found[0]


@dataclass(frozen=True)
class HubName:
    """A name on the hub.

    Args:
        repository: The model, ORG/NAME.
        inside: The file or the folder inside it; "" is all of it.
        revision: The branch, tag or commit; "" is main.
    """

    repository: str
    inside: str = ""
    revision: str = ""

    @classmethod
    def parse(cls, source: str) -> HubName:
        """Parse `hf:ORG/NAME`, with `/FOLDER` or `/FILE` inside it, and `@REVISION`.

        Raises:
            ConfigError: for another text.

        >>> HubName.parse("hf:org/name/m.gguf@v1")
        HubName(repository='org/name', inside='m.gguf', revision='v1')
        """
        path, _, revision = source.removeprefix(HUB).partition("@")
        org, _, rest = path.partition("/")
        name, _, inside = rest.partition("/")
        named = _NAME.fullmatch(f"{org}/{name}") and re.fullmatch(r"[\w./-]{0,200}", revision)
        if not named or ".." in revision or ".." in inside:
            raise ConfigError(f"source = {source!r}: wanted hf:ORG/NAME, and @REVISION for another than main")
        return cls(f"{org}/{name}", inside.strip("/"), revision)

    def of(self, file: str) -> str:
        """Return the name of a file of the same model."""
        return f"{HUB}{self.repository}/{file}{f'@{self.revision}' if self.revision else ''}"


def fetch(source: str, allow_pickle: bool = False) -> Path:
    """Fetch a model from the hub into its cache, if it is not there, and return the folder of its snapshot.

    Weights that no format here reads are not fetched, and of GGUF, where a model has many, only the file that is named,
    with all parts of one that is split.

    Args:
        source: `hf:ORG/NAME`, with `@REVISION` for another than main, and `/FOLDER` or `/FILE` inside it.
        allow_pickle: Whether to fetch pytorch_model.bin, or its shards, if there is nothing safer.

    Returns:
        The path of the snapshot, or of what is named in it; nothing is there if the model has no such file.

    Raises:
        ConfigError: for another text, and without huggingface_hub.
        FileNotFoundError: if there is no such model or revision, or the hub cannot be reached and the cache lacks it.
    """
    model = HubName.parse(source)
    if model.inside.endswith(_GGUF):
        return _download(source, model, [_PART.sub(r"-?????\1", escape(model.inside))]) / model.inside
    ignored = [] if any(fnmatchcase(model.inside, each) for each in _NOT_FETCHED) else list(_NOT_FETCHED)
    wanted = [escape(model.inside), f"{escape(model.inside)}/*", "*.json"] if model.inside else None
    if wanted is None:
        ignored += _FOLDERS_NOT_FETCHED
    found = _download(source, model, wanted, ignored) / model.inside
    if not found.is_file() and (pickles := _pickles(Folder(found), allow_pickle)):
        above = f"{escape(model.inside)}/" if model.inside else ""
        _download(source, model, [above + name for name in pickles])
    return found


def list_files(source: str) -> tuple[list[str], bool]:
    """List the files of a model on the hub, and tell whether it was asked: else they are those in its cache.

    Raises:
        ConfigError: as `fetch`.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    model = HubName.parse(source)
    revision = model.revision or None
    with suppress(Exception):  # whatever keeps the hub from answering, its cache can be looked at
        info = HfApi().model_info(model.repository, revision=revision, timeout=_SECONDS)  # it tries once
        return sorted(each.rfilename for each in info.siblings or ()), True
    try:
        folder = snapshot_download(model.repository, revision=revision, allow_patterns=[], local_files_only=True)
    except (LocalEntryNotFoundError, OSError):
        return [], False
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()), False


def _pickles(folder: Folder, allowed: bool) -> list[str]:
    """List the patterns of a folder's pickles: of the model, if they are allowed and nothing is safer, and of modules.

    Those of the modules after the model are small, and copied as they are, as from any other folder.
    """
    folders = {"": MODELS[0]} | module_folders(folder)
    return [
        f"{escape(path)}/{_PICKLES}".lstrip("/")
        for path, kind in folders.items()
        if (allowed if kind in MODELS else kind not in _WITHOUT_WEIGHTS)
        and not any(folder.holds(f"{path}/{name}".lstrip("/")) for name in _SAFE)
    ]


def _download(source: str, model: HubName, wanted: list[str] | None, ignored: list[str] | None = None) -> Path:
    """Fetch the files of a model that match, and return the folder of the snapshot."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
    except ImportError:
        raise ConfigError(f"source = {source!r}: needs huggingface_hub; try: pip install huggingface_hub") from None
    try:
        found = snapshot_download(
            model.repository,
            revision=model.revision or None,
            allow_patterns=wanted,
            ignore_patterns=ignored or None,
        )
    except HFValidationError as error:
        raise ConfigError(f"source = {source!r}: {str(error)[:300]}") from None
    except (EntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise FileNotFoundError(
            f"{source}: is not in the hub's cache, and could not be fetched ({type(error).__name__}: {reason}); "
            "fetch it where there is a network, and name the folder"
        ) from None
    return Path(found)
