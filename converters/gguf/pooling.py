"""Write down how a file says that tokens become an embedding, as sentence-transformers writes it."""

from __future__ import annotations

import json

from aq_jax.converters.gguf.model_config import Fields
from aq_jax.errors import FormatError
from aq_jax.store.modules import MODULES, OWNER

KEY = "pooling_type"
ENCODERS = ("bert", "nomic-bert")
_NONE = 0
_MODES = {1: "mean", 2: "cls", 3: "lasttoken"}
"""Numbers of llama.cpp's enum llama_pooling_type; 4 is that of rerankers."""


def pooling_files(fields: Fields, width: int) -> dict[str, bytes]:
    """Return modules.json and the pooling's config.json of an encoder; nothing where the file says no pooling.

    Args:
        fields: The fields of the file.
        width: The width of the hidden states.

    Raises:
        FormatError: for a pooling that is not known.

    >>> found = pooling_files(Fields("m.gguf", {"bert.pooling_type": 2}, "bert"), 384)
    >>> sorted(found), json.loads(found["1_Pooling/config.json"])["pooling_mode"]
    (['1_Pooling/config.json', 'modules.json'], 'cls')
    """
    if fields.architecture not in ENCODERS or (kind := fields.take(KEY, int)) in (None, _NONE):
        return {}
    if kind not in _MODES:
        raise FormatError(
            f"{fields.where}: {fields.architecture}.{KEY} is {kind}; wanted "
            f"{', '.join(f'{number} ({mode})' for number, mode in _MODES.items())}, or 0"
        )
    folders = {"Transformer": "", "Pooling": "1_Pooling"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"{OWNER}models.{name}"}
        for i, (name, path) in enumerate(folders.items())
    ]
    pooling = {"embedding_dimension": width, "pooling_mode": _MODES[kind], "include_prompt": True}
    return {MODULES: json.dumps(modules, indent=2).encode(), "1_Pooling/config.json": json.dumps(pooling).encode()}
