"""Find models of Hugging Face's hub: in a folder of its cache, or by name, through huggingface_hub."""

from __future__ import annotations

import re
from pathlib import Path

from aq_jax.errors import ConfigError, FormatError

HUB = "hf:"
_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
# What no format here reads, or only if it is named.
_NOT_FETCHED = (
    "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.ot", "*.msgpack", "*.onnx", "*.onnx_data*", "*.tflite",
    "*.gguf", "*.pb", "*.mlmodel", "*.npz", "onnx/*", "openvino/*", "coreml/*", "original/*",
)  # fmt: skip
_SHOWN = 5


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
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise FormatError(
            f"{folder}: holds the snapshots {', '.join(found[:_SHOWN])}{more}, none of them main's; name one, as "
            "FOLDER/snapshots/REVISION"
        )
    return folder / "snapshots" / found[0]


def fetch(source: str) -> Path:
    """Fetch a model from the hub into its cache, if it is not there, and return the folder of its snapshot.

    Weights that no format here reads are not fetched; a file or a folder that is named is.

    Args:
        source: `hf:ORG/NAME`, with `@REVISION` for another than main, and `/FOLDER` or `/FILE` inside it.

    Raises:
        ConfigError: for another text, and without huggingface_hub.
        FileNotFoundError: if there is no such model or revision, or the hub cannot be reached and the cache lacks it.
    """
    path, _, revision = source.removeprefix(HUB).partition("@")
    org, _, rest = path.partition("/")
    name, _, inside = rest.partition("/")
    named = _NAME.fullmatch(f"{org}/{name}") and re.fullmatch(r"[\w./-]{0,200}", revision)
    if not named or ".." in revision or ".." in inside:
        raise ConfigError(f"source = {source!r}: wanted hf:ORG/NAME, and @REVISION for another than main")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
    except ImportError:
        raise ConfigError(f"source = {source!r}: needs huggingface_hub; try: pip install huggingface_hub") from None
    wanted = [f"{inside}*", "*.json"] if inside else None
    try:
        found = snapshot_download(
            f"{org}/{name}",
            revision=revision or None,
            allow_patterns=wanted,
            ignore_patterns=None if inside else list(_NOT_FETCHED),
        )
    except HFValidationError as error:
        raise ConfigError(f"source = {source!r}: {str(error)[:300]}") from None
    except (EntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise FileNotFoundError(
            f"{source}: is not in the hub's cache, and could not be fetched ({type(error).__name__}: {reason}); "
            "fetch it where there is a network, and name the folder"
        ) from None
    return Path(found, inside)
