"""Write down how a model's makers choose tokens, as generation_config.json.

llama.cpp's converter reads it there: github.com/ggml-org/llama.cpp, gguf-py/gguf/metadata.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from aq_jax.converters.gguf.model_config import Fields
from aq_jax.converters.gguf.pooling import ENCODERS
from aq_jax.errors import ConfigError, FormatError

PREFIX = "general.sampling."
_NAMES = {
    "temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "penalty_repeat": "repetition_penalty",
}  # fmt: skip
# With these values, others change nothing: the penalty is that of the whole text, and no other rule is on.
_OFF = {"penalty_last_n": -1, "xtc_probability": 0.0, "mirostat": 0}


def generation_files(fields: Fields, ids: Mapping[str, Any]) -> dict[str, bytes]:
    """Return generation_config.json of a language model; nothing where the file does not say how tokens are chosen.

    It does not say whether they are drawn: they are where it says of which, unless its temperature is 0.

    Args:
        fields: The fields of the file.
        ids: The ids of special tokens, which transformers reads there.

    Raises:
        FormatError: for numbers that are none, or out of their range.

    >>> said = {"general.sampling.temp": 0.7, "general.sampling.top_k": -1}
    >>> json.loads(generation_files(Fields("m.gguf", said, "llama"), {"eos_token_id": 2})["generation_config.json"])
    {'eos_token_id': 2, 'do_sample': True, 'temperature': 0.7, 'top_k': 0}
    """
    from aq_jax.nn.sampling import Sampling

    said: dict[str, Any] = {
        ours: fields.all[PREFIX + name] for name, ours in _NAMES.items() if PREFIX + name in fields.all
    }
    if not said or fields.architecture in ENCODERS:
        return {}
    if isinstance(top_k := said.get("top_k"), int):
        said["top_k"] = max(top_k, 0)  # as llama.cpp, which takes all tokens where it is below 1
    said = {name: float(f"{value:.7g}") if isinstance(value, float) else value for name, value in said.items()}
    try:
        Sampling(**said).check(f"{fields.where}: {PREFIX}*")
    except ConfigError as error:
        raise FormatError(str(error)) from None
    draws = said.get("temperature") != 0 and said.keys() != {"repetition_penalty"}
    if not draws:
        said = {name: value for name, value in said.items() if name == "repetition_penalty"}
    found = dict(ids) | {"do_sample": draws} | said
    return {"generation_config.json": (json.dumps(found, indent=2) + "\n").encode()}


def unused_sampling(fields: Fields) -> list[str]:
    """List the fields of how tokens are chosen that generation_config.json has no place for; an encoder's are all."""
    known = set() if fields.architecture in ENCODERS else {PREFIX + name for name in _NAMES}
    known |= {PREFIX + name for name, off in _OFF.items() if str(fields.all.get(PREFIX + name)) == str(off)}
    return [key for key in fields.all if key.startswith(PREFIX) and key not in known]
