"""Read sentence-transformers' settings of an encoder: modules, prompts, and the length of a text.

Each setting is applied as sentence-transformers applies it, or refused by name.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3
from jaxtyping import Array, Bool, Float, Int

from aq_jax.errors import AqError, FormatError
from aq_jax.nn.pooling import Dense, Pooling, Stage, embed, normalize
from aq_jax.nn.stages import read_stages
from aq_jax.nn.static import find_static, read_static_stages, read_static_tokenizer, read_tokens
from aq_jax.nn.tokenizer import CONFIG, gives_types, prepend_lower_case, read_tokenizer, replace_surrogates
from aq_jax.store.folders import Folder
from aq_jax.store.jsonfile import read_json
from aq_jax.store.modules import MODULES, read_modules, transformer_path

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SETTINGS = "config_sentence_transformers.json"
# The first that exists is read.
MODEL_SETTINGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
ALWAYS = {"query": "", "document": ""}  # names of prompts that every model has
HUB = {"subfolder", "token", "cache_dir", "revision", "local_files_only", "trust_remote_code", "use_fast"}
# Arguments of the model that change no number, or only the dtype in which the float model is read.
IDLE_OF_MODEL = {"attn_implementation", "dtype", "torch_dtype", "add_pooling_layer", "low_cpu_mem_usage", "device_map"}
# Fields of sentence_..._config.json that are applied, and fields that change no number of `encode`.
APPLIED = {"max_seq_length", "do_lower_case", "processor_kwargs", "tokenizer_args"}
IDLE = {"unpad_inputs", "query_length", "document_length", "query_expansion"}
ONLY: Mapping[str, tuple[Any, ...]] = {
    "transformer_task": ("feature-extraction",),
    "module_output_name": ("token_embeddings",),
    "modality_config": (
        {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        {"text": {"method": "forward", "method_output_name": ["last_hidden_state"]}},
    ),
    "processing_kwargs": ({}, None),
    "tokenizer_name_or_path": (None,),
}

ONLY_OF_SCORES: Mapping[str, tuple[Any, ...]] = ONLY | {
    "transformer_task": ("sequence-classification",),
    "module_output_name": ("scores",),
    "modality_config": ({"text": {"method": "forward", "method_output_name": "logits"}},),
}


@dataclass(frozen=True)
class SentenceSettings:
    """A folder's settings for sentences.

    Args:
        stages: The stages from hidden states to an embedding: a Pooling, and those after it.
        max_tokens: The largest number of tokens of a text; the rest is cut.
        prompts: The texts that may stand before a text, by name.
        default_prompt: The name of the prompt that stands before a text by default.
        truncate_dim: The number of an embedding's dimensions that are kept; None keeps all.
        prompt_tokens: The number of a text's first tokens that a pooling without the prompt leaves out.
        max_letters: The largest number of letters of a text; None for no limit.
        ignored: The token that does not count; None if all do.
    """

    stages: tuple[Stage, ...] = (Pooling(),)
    max_tokens: int = 512
    prompts: Mapping[str, str] = field(default_factory=lambda: dict(ALWAYS))
    default_prompt: str | None = None
    truncate_dim: int | None = None
    prompt_tokens: int = 0
    max_letters: int | None = None
    ignored: int | None = None

    def prompt(self, prompt_name: str | None = None, prompt: str | None = None) -> str:
        """Choose the text to put before texts: a prompt, or that of a name, or the default one.

        Raises:
            AqError: for an unknown name, and for a prompt that is no string.
        """
        if prompt is not None:
            if not isinstance(prompt, str):
                raise AqError(f"prompt is {type(prompt).__name__}; wanted a string")
            if prompt_name is not None:
                warnings.warn("both prompt and prompt_name are given: prompt_name is ignored", stacklevel=3)
            return prompt
        name = self.default_prompt if prompt_name is None else prompt_name
        if name is None:
            return ""
        if not isinstance(name, str) or name not in self.prompts:
            raise AqError(f"prompt_name is {name!r}; the model has {', '.join(map(repr, self.prompts))}")
        return self.prompts[name]

    @property
    def includes_prompt(self) -> bool:
        """Return whether the tokens of a prompt count in the pooling."""
        return all(stage.include_prompt for stage in self.stages if isinstance(stage, Pooling))

    def width(self, hidden: int) -> int:
        """Count the dimensions of an embedding."""
        for stage in self.stages:
            if isinstance(stage, Pooling):
                hidden *= len(stage.modes)
            elif isinstance(stage, Dense):
                hidden = stage.weight.shape[1]
        return hidden if self.truncate_dim is None else min(hidden, self.truncate_dim)

    def embed(
        self,
        hidden: Float[Array, "batch tokens width"],
        mask: Bool[Array, "batch tokens"],
        skipped: Int[Array, ""] | int | None = None,
    ) -> Float[Array, "batch features"]:
        """Turn hidden states into embeddings (see `pooling.embed`); by default, skip the default prompt's tokens."""
        whole = embed(hidden, mask, self.stages, self.prompt_tokens if skipped is None else skipped)
        return whole if self.truncate_dim is None else whole[:, : self.truncate_dim]

    def unit_embeddings(
        self, hidden: Float[Array, "batch tokens width"], mask: Bool[Array, "batch tokens"]
    ) -> Float[Array, "batch features"]:
        """Turn hidden states into embeddings of length 1, whose products are cosines."""
        return normalize(self.embed(hidden, mask))

    def counted(self, ids: Sequence[int]) -> list[int]:
        """Return those of a text's tokens that count."""
        return [i for i in ids if i != self.ignored]

    def with_default_prompt(self, tokenizer: Tokenizer) -> SentenceSettings:
        """Return the settings with the `prompt_tokens` of the default prompt."""
        return dataclasses.replace(self, prompt_tokens=prompt_tokens(tokenizer, self.prompt()))

    def record(self) -> dict[str, Any]:
        """Return the settings that decide an embedding, as JSON types."""
        stages = [
            [type(stage).__name__, *(_digest(v) if isinstance(v, np.ndarray) else v for v in vars(stage).values())]
            for stage in self.stages
        ]
        return {
            "stages": stages, "max_tokens": self.max_tokens, "prompt": self.prompt(),
            "truncate_dim": self.truncate_dim, "prompt_tokens": self.prompt_tokens,
            **({} if self.max_letters is None else {"max_letters": self.max_letters}),
            **({} if self.ignored is None else {"ignored": self.ignored}),
        }  # fmt: skip


def _digest(array: np.ndarray) -> str:
    return blake3(np.ascontiguousarray(array).data).hexdigest(length=16)


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> int:
    """Count a prompt's tokens, without the special one at its end, as sentence-transformers does."""
    ids = tokenizer.encode(replace_surrogates(prompt)).ids if prompt else []
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special} if ids else set()
    return len(ids) - (bool(ids) and ids[-1] in special)


def read_sentences(folder: Path, positions: int, width: int | None = None, least: int = 1) -> SentenceSettings:
    """Read the settings of sentence-transformers' files; without modules.json, the mean of all the model's positions.

    Args:
        folder: The folder that holds the files.
        positions: The number of the model's positions.
        width: The width of its hidden states, which the stages after the pooling must fit; None checks nothing.
        least: The number of tokens that a text must have room for: the special tokens and one more.

    Raises:
        FormatError: for modules, poolings and settings that are not supported, for lengths of texts that leave no room,
            for folders outside this one, and for damaged files.
    """
    static, modules = find_static(folder), read_modules(Folder(folder))
    if static is None:
        here, own, file = read_model_settings(folder)
        limit = read_max_tokens(here, own, file, positions, least)
    else:
        limit, letters, ignored = read_tokens(static)
        if static.of_model2vec:
            return SentenceSettings(read_static_stages(static), limit, max_letters=letters, ignored=ignored)
    if modules is None:
        if unread := [name for name in (SETTINGS, *MODEL_SETTINGS) if (folder / name).exists()]:
            note = f"{folder}: without {MODULES}, as sentence-transformers does, this ignores {', '.join(unread)}"
            warnings.warn(note, stacklevel=3)
        return SentenceSettings(max_tokens=limit)
    stages = read_stages(folder, modules, width)
    settings = read_json(folder, SETTINGS, dict) or {}
    where = folder / SETTINGS
    if (kind := settings.get("model_type", "SentenceTransformer")) != "SentenceTransformer":
        raise FormatError(f"{where}: model_type is {kind!r}; wanted 'SentenceTransformer': one vector for a text")
    prompts, default = settings.get("prompts") or {}, settings.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise FormatError(f"{where}: prompts is {str(prompts)[:80]}; wanted an object of names and strings")
    prompts = ALWAYS | {name: text or "" for name, text in prompts.items()}
    if default is not None and (not isinstance(default, str) or default not in prompts):
        known = ", ".join(map(repr, prompts))
        raise FormatError(f"{where}: default_prompt_name is {default!r}; prompts has {known}")
    dim = settings.get("truncate_dim")
    if dim is not None and (type(dim) is not int or dim < 1):
        raise FormatError(f"{where}: truncate_dim is {dim!r}; wanted a positive integer")
    return SentenceSettings(stages, limit, prompts, default, dim)


def read_model_settings(folder: Path, only: Mapping[str, tuple[Any, ...]] = ONLY) -> tuple[Path, dict[str, Any], str]:
    """Find the model's folder; read sentence_bert_config.json, or an older name of it, and return that name.

    Args:
        folder: The folder that holds modules.json, if there is one.
        only: The values that fields may have: of an encoder, or of a reranker (ONLY_OF_SCORES).

    Raises:
        FormatError: for settings that are not supported.
    """
    here = folder / transformer_path(Folder(folder))
    if not (folder / MODULES).exists():
        return here, {}, MODEL_SETTINGS[0]  # without modules.json, sentence-transformers reads none
    for file in MODEL_SETTINGS:
        if found := read_json(here, file, dict):
            break
    else:
        return here, {}, MODEL_SETTINGS[0]
    where = here / file
    for name, allowed in only.items():
        if name in found and found[name] not in allowed:
            raise FormatError(f"{where}: {name} is {found[name]!r}; wanted {' or '.join(map(repr, allowed))}")
    for names, idle in ((("model_args", "model_kwargs"), IDLE_OF_MODEL), (("config_args", "config_kwargs"), set())):
        for name in names:
            given = found.get(name) or {}
            if not isinstance(given, dict):
                raise FormatError(f"{where}: {name} is {str(given)[:80]!r}; wanted an object")
            if more := sorted(given.keys() - idle - HUB):
                raise FormatError(f"{where}: {name} has {', '.join(more)}, which is not supported; take it out")
    known = APPLIED | IDLE | ONLY.keys() | {"model_args", "model_kwargs", "config_args", "config_kwargs"}
    if more := sorted(found.keys() - known):
        raise FormatError(f"{where}: has {', '.join(more)}, which {'is' if len(more) == 1 else 'are'} not known here")
    return here, found, file


def read_sentence_tokenizer(folder: Path, only: Mapping[str, tuple[Any, ...]] = ONLY) -> Tokenizer:
    """Read a folder's tokenizer, with sentence-transformers' settings of it (see `read_model_settings`).

    Raises:
        FormatError: as `read_tokenizer`, and for settings that are not supported.
    """
    if (static := find_static(folder)) is not None:
        return read_static_tokenizer(static)
    here, own, file = read_model_settings(folder, only)
    tokenizer = read_tokenizer(here, _tokenizer_arguments(own, here / file))
    lower = own.get("do_lower_case", False)
    if not isinstance(lower, bool):
        raise FormatError(f"{here / file}: do_lower_case is {lower!r}; wanted true or false")
    if lower:
        prepend_lower_case(tokenizer)
    return tokenizer


def gives_token_types(folder: Path, only: Mapping[str, tuple[Any, ...]] = ONLY) -> bool:
    """Tell whether a folder's tokenizer gives a model types of tokens (see `gives_types`)."""
    here, own, file = read_model_settings(folder, only)
    return gives_types(here, _tokenizer_arguments(own, here / file))


def _tokenizer_arguments(own: Mapping[str, Any], where: Path) -> dict[str, Any]:
    found = own.get("processor_kwargs", own.get("tokenizer_args")) or {}
    if not isinstance(found, dict):
        raise FormatError(f"{where}: processor_kwargs is {found!r}; wanted an object")
    return {name: value for name, value in found.items() if name not in HUB}


def read_max_tokens(here: Path, own: Mapping[str, Any], file: str, positions: int, least: int) -> int:
    """Read the largest number of tokens of a text: from the first file that sets it, and never more than the positions.

    Raises:
        FormatError: for a limit that is no number, or leaves no room.
    """
    general = read_json(here, CONFIG, dict) or {}
    given = _tokenizer_arguments(own, here / file)
    # Hugging Face writes 10^30 for no limit.
    limits = (
        (file, "processor_kwargs.model_max_length", given.get("model_max_length")),
        (file, "max_seq_length", own.get("max_seq_length")),
        (CONFIG, "model_max_length", general.get("model_max_length", general.get("max_len"))),
        ("config.json", "max_position_embeddings", positions),
    )
    file, name, limit = next(said for said in limits if said[2] is not None)
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not min(limit, positions) >= least:
        raise FormatError(
            f"{here / file}: {name} is {limit!r}, of {positions} positions; wanted {least} tokens or more"
        )
    return int(min(limit, positions))
