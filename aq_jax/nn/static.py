"""Read the settings of static embeddings: which tokens of a text count, and what follows their mean.

sentence-transformers counts all tokens of a text. model2vec cuts texts, leaves unknown tokens out, and normalizes if
config.json says so; a folder whose config.json has its model_type is read as it reads it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from aq_jax.errors import FormatError
from aq_jax.nn.pooling import Normalize, Pooling, Stage
from aq_jax.store.folders import Folder
from aq_jax.store.jsonfile import read_json
from aq_jax.store.modules import MODULES, STATIC, read_modules, transformer_path

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TYPE, FILE = "model2vec", "tokenizer.json"
CUT = 512  # tokens, if config.json has no max_length
UNLIMITED = 2**31 - 1


class StaticFolder(NamedTuple):
    """A folder of static embeddings.

    Args:
        folder: The folder that holds tokenizer.json and the weights.
        fields: The fields of model2vec's config.json; none of sentence-transformers'.
        modules: The kinds of modules after the table; None without modules.json.
    """

    folder: Path
    fields: dict[str, Any]
    modules: list[str] | None

    @property
    def of_model2vec(self) -> bool:
        """Tell whether model2vec's definition counts."""
        return bool(self.fields)

    @property
    def config(self) -> dict[str, Any]:
        """The fields of config.json, or what says that there is none."""
        return self.fields or {"model_type": "static_embedding"}


class Tokens(NamedTuple):
    """The tokens of a text that count.

    Args:
        most: The largest number of tokens; the rest is cut.
        letters: The largest number of letters, the rest of which is cut before; None for no limit.
        ignored: The token that does not count; None for none.
    """

    most: int
    letters: int | None = None
    ignored: int | None = None


def find_static(folder: Path) -> StaticFolder | None:
    """Find static embeddings in a folder; None if it holds another model.

    Raises:
        FormatError: for damaged files.
    """
    here = folder / transformer_path(Folder(folder))
    modules = read_modules(Folder(folder))
    fields = read_json(folder, "config.json", dict) or {}
    own = fields.get("model_type") == TYPE
    if modules is None:
        return StaticFolder(here, fields, None) if own else None
    kinds = [module.kind for module in modules]
    return StaticFolder(here, fields if own else {}, kinds[1:]) if kinds[:1] == [STATIC] else None


def read_static_stages(static: StaticFolder) -> tuple[Stage, ...]:
    """Read what follows the table from model2vec's config.json.

    Raises:
        FormatError: for a `normalize` that modules.json contradicts, or that is neither true nor false.
    """
    where, said = static.folder / "config.json", static.fields.get("normalize", False)
    if not isinstance(said, bool):
        raise FormatError(f"{where}: normalize is {said!r}; wanted true or false")
    if static.modules not in (None, ["Normalize"] * said):
        raise FormatError(f"{where}: normalize is {said}; {MODULES} has {static.modules} after the table")
    return (Pooling(), Normalize()) if said else (Pooling(),)


def read_tokens(static: StaticFolder) -> Tokens:
    """Read which tokens count.

    Raises:
        FormatError: for a max_length that is no number, and as `read_static_tokenizer`.
    """
    tokenizer = read_static_tokenizer(static)
    own = (tokenizer.truncation or {}).get("max_length", UNLIMITED)
    if not static.of_model2vec:
        return Tokens(own)
    limit = static.fields.get("max_length", CUT)
    if limit is not None and (type(limit) is not int or limit < 1):
        file = static.folder / "config.json"
        raise FormatError(f"{file}: max_length is {limit!r}; wanted a positive integer, or null")
    model = json.loads(tokenizer.to_str())["model"]
    unknown = model.get("unk_id")
    if (token := model.get("unk_token")) is not None:
        unknown = tokenizer.token_to_id(token)
    if limit is None:
        return Tokens(UNLIMITED, None, unknown)
    lengths = [len(token) for token in tokenizer.get_vocab()]
    return Tokens(limit, limit * int(np.median(lengths)), unknown)


def read_static_tokenizer(static: StaticFolder) -> Tokenizer:
    """Read tokenizer.json as it is, but for special tokens, which are not added; its truncation is as the file has it.

    Raises:
        FormatError: if there is none, or it is damaged.
    """
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    file = static.folder / FILE
    try:
        found = Tokenizer.from_file(str(file))
        found.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    except Exception as error:  # tokenizers raises no other class
        raise FormatError(f"{file}: holds no tokenizer that can be built: {error}") from None
    found.no_padding()
    return found
