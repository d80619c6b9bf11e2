"""Read the ids that end texts, and how a model's makers choose tokens: generation_config.json, or else config.json."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aq_jax.errors import ConfigError, FormatError
from aq_jax.nn.models.fields import GENERATION
from aq_jax.nn.sampling import Sampling
from aq_jax.store.jsonfile import read_json

FILE = "generation_config.json"
SETTINGS = ("top_k", "top_p", "min_p", "repetition_penalty")
# Fields that change nothing here: lengths are arguments, and the rest is how transformers computes.
IDLE = {
    "bos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version", "max_length", "max_new_tokens",
    "use_cache", "cache_implementation", "cache_config", "return_legacy_cache", "chat_format", "trust_remote_code",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "max_window_size",
    "prefill_chunk_size", "compile_config", "disable_compile", "max_matching_ngram_size", "target_lookbehind",
    "assistant_lookbehind", "low_memory", "early_stopping", "length_penalty", "output_attentions",
    "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate", "remove_invalid_values",
}  # fmt: skip
ONE = {"num_beams", "num_beam_groups", "num_return_sequences", "typical_p", "encoder_repetition_penalty"}
TOP_K = 50
"""The top-k of transformers where the file says no other number."""


def read_generation_config(folder: Path, fields: Mapping[str, Any]) -> tuple[tuple[int, ...], Sampling]:
    """Read the ids that end a text, and how tokens are chosen unless a call says otherwise.

    The ids are those of generation_config.json, or else of config.json, which has all of it where there is no such file
    (as older folders, and transformers). Fields that ask for what is not done here are named in a warning.

    Args:
        folder: The folder of the model.
        fields: The fields of config.json.

    Raises:
        FormatError: for a field of another type, or out of its range.
    """
    given, file = read_json(folder, FILE, dict), folder / FILE
    if given is None:
        given, file = {name: fields[name] for name in GENERATION if name in fields}, folder / "config.json"
    draws = given.get("do_sample")
    if draws not in (None, True, False):
        raise FormatError(f"{file}: do_sample is {draws!r}; wanted true or false")
    usual: dict[str, Any] = {"temperature": 1.0, "top_k": TOP_K} if draws else {}
    names = ("temperature", *SETTINGS) if draws else SETTINGS
    said = {name: given[name] for name in names if given.get(name) is not None}
    try:
        sampling = Sampling(**(usual | said)).check(str(file))
    except ConfigError as error:
        raise FormatError(str(error)) from None
    known = {"eos_token_id", "do_sample", "temperature", *SETTINGS} | IDLE
    more = {name: value for name, value in given.items() if name not in known and not name.startswith("_") and value}
    if more := [f"{name} = {str(value)[:40]}" for name, value in more.items() if not (name in ONE and value == 1)]:
        warnings.warn(f"{file}: has {', '.join(more)}, which is not applied", stacklevel=3)
    source, ids = (file, given) if given.get("eos_token_id") is not None else (folder / "config.json", fields)
    return _read_ids(ids.get("eos_token_id"), source), sampling


def _read_ids(found: Any, file: Path) -> tuple[int, ...]:
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if not all(type(each) is int and 0 <= each < 2**31 for each in ids):
        raise FormatError(f"{file}: eos_token_id is {str(found)[:80]}; wanted an id, or a list of them")
    return tuple(ids)
