"""Read weights that torch pickled, and nothing else that a pickle may say."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from aq_jax.core.frameworks import identity_key, to_numpy
from aq_jax.core.torch_tensors import torch_module
from aq_jax.errors import FormatError
from aq_jax.store import DTYPES
from aq_jax.store.folders import Folder

# Before 2.10 a crafted pickle gets around weights_only (CVE-2025-32434, CVE-2026-24747).
SAFE_TORCH = (2, 10)


def check_pickle(folder: Folder, name: str, allowed: bool) -> None:
    """Refuse a pickle that was not asked for, or is elsewhere.

    Raises:
        FormatError: saying which.
    """
    if not allowed:
        raise FormatError(
            f"{folder.join(name)}: is a pickle, which can run code when it is read; convert it to safetensors where it "
            "comes from, or, if you trust its author, set allow_pickle = true"
        )
    if folder.local is None:
        raise FormatError(
            f"{folder.join(name)}: is not on this machine, where pickles are read; fetch the folder first"
        )


def read_pickle(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read the tensors of a pickle by torch, which builds nothing else.

    Returns:
        The arrays by name, which torch maps; and tied tensors: name -> stored name.

    Raises:
        FormatError: for a torch that a crafted pickle gets the better of, and for what torch refuses, or is no dict of
            tensors, or has a dtype that is unknown.
    """
    torch = torch_module()
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < SAFE_TORCH:
        raise FormatError(
            f"{path}: torch {torch.__version__} can be made to run code by a crafted pickle (CVE-2026-24747); "
            "install torch >= 2.10"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a hostile pickle makes torch raise is the file's fault
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise FormatError(f"{path}: torch refuses it: {text[:200]}") from None
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(v, torch.Tensor) and v.layout == torch.strided for v in state.values()):
        raise FormatError(f"{path}: holds something other than named tensors; save model.state_dict()")
    arrays: dict[str, np.ndarray] = {}
    aliases: dict[str, str] = {}
    tied: dict[object, str] = {}
    for name, tensor in state.items():
        if (stored := tied.setdefault(identity_key(tensor), name)) != name:
            aliases[name] = stored
            continue
        if (dtype := str(tensor.dtype).removeprefix("torch.")) not in DTYPES:
            raise FormatError(f"{path}: {name} has dtype {dtype}; known are {', '.join(DTYPES)}")
        arrays[name] = to_numpy(tensor, name)
    return arrays, aliases
