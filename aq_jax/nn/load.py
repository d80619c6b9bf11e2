"""A table with config.json and tokenizer files beside it, as a model that runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aq_jax.core.dispatch import ACTIVATIONS, Activations
from aq_jax.core.ops import grids_lie_in_rows
from aq_jax.core.qtensor import QTensor
from aq_jax.errors import ConfigError, FormatError
from aq_jax.loader import WeightLoader
from aq_jax.nn import bert, llama
from aq_jax.nn.bert import Pooling
from aq_jax.nn.encoder import Encoder, Sentences
from aq_jax.nn.generator import Generator, Text
from aq_jax.nn.weights import abstract, fill

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load_model(path: str | os.PathLike[str], activations: Activations | None = None) -> Encoder | Generator:
    """A BERT encoder or a Llama from a table; quantized weights stay packed.

    Args:
        path: a table of schema V1 or V2, or a folder of shards, with config.json and tokenizer files beside it, as
            `convert` leaves them.
        activations: what inputs of quantized layers are rounded to (see `qdot`): "int8" (W8A8), "bfloat16" or
            "float32". Default: "int8" if all quantized weights have 8 bits, else "float32".

    Returns:
        An Encoder, whose `encode` embeds sentences, or a Generator, whose `generate` continues a prompt.

    Raises:
        FileNotFoundError: if there is no table.
        FormatError: for missing or damaged files, tensors that do not fit the model, or another kind of model.
        ConfigError: for other activations.
    """
    if activations not in (None, *ACTIVATIONS):
        raise ConfigError(f"activations = {activations!r}: wanted one of {', '.join(ACTIVATIONS)}")
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    with WeightLoader(path) as loader:
        tensors = loader.load_weights(packed=True)
    config_file = folder / "config.json"
    fields = read_json(config_file)
    if fields is None:
        raise FormatError(f"{config_file}: no such file; wanted the model's config, which `convert` copies there")
    if not isinstance(fields, dict) or fields.get("model_type") not in ("bert", "llama"):
        kind = fields.get("model_type") if isinstance(fields, dict) else fields
        raise FormatError(f"{config_file}: model_type is {kind!r}; wanted 'bert' or 'llama'")
    how = default_activations(tensors) if activations is None else activations
    tokenizer = read_tokenizer(folder)
    if fields["model_type"] == "bert":
        config = bert.BertConfig.from_json(fields, str(config_file))
        encoder = abstract(lambda rngs: bert.Bert(config, activations=how, rngs=rngs))
        fill(encoder, tensors, bert.NAMES, how, str(path))
        return Encoder(encoder, tokenizer, read_sentences(folder, config.max_position_embeddings))
    config = llama.LlamaConfig.from_json(fields, str(config_file))
    decoder = abstract(lambda rngs: llama.Llama(config, activations=how, rngs=rngs))
    fill(decoder, tensors, llama.names(config), how, str(path))
    return Generator(decoder, tokenizer, read_ends(folder, fields))


def default_activations(tensors: dict[str, Any]) -> Activations:
    """Eight bits where the weights have eight and multiply as integers; else, and for float models, float32."""
    quantized = [value for value in tensors.values() if isinstance(value, QTensor)]
    return "int8" if quantized and all(q.spec.bits == 8 and grids_lie_in_rows(q) for q in quantized) else "float32"


def read_json(path: Path) -> Any:
    """A JSON file, or None if there is none.

    Raises:
        FormatError: if it is no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: no JSON: {error}") from None


def read_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json, or what transformers makes of older files.

    Raises:
        FormatError: if there are none, or they are damaged.
    """
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    try:
        if file.exists():
            return Tokenizer.from_file(str(file))
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder).backend_tokenizer
    except Exception as error:  # tokenizers raises no other class
        raise FormatError(f"{file}: no tokenizer can be made of it: {error}") from None


def read_sentences(folder: Path, positions: int) -> Sentences:
    """What the files of sentence-transformers say; without them, the mean over at most all positions.

    Raises:
        FormatError: for modules and poolings that are not computed here.
    """
    limit = positions
    for name, key in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        given = (read_json(folder / name) or {}).get(key)
        if isinstance(given, int | float):
            limit = max(3, min(limit, int(given)))
            break
    modules = read_json(folder / "modules.json")
    if modules is None:
        return Sentences(max_tokens=limit)
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise FormatError(f"{folder / 'modules.json'}: {kinds}; wanted Transformer, Pooling and perhaps Normalize")
    file = folder / modules[1].get("path", "1_Pooling") / "config.json"
    fields = read_json(file) or {}
    chosen = [name for name, on in fields.items() if name.startswith("pooling_mode") and on is True]
    if isinstance(fields.get("pooling_mode"), str):
        chosen = [f"pooling_mode_{fields['pooling_mode']}_token{'' if fields['pooling_mode'] == 'cls' else 's'}"]
    how: dict[str, Pooling] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(chosen) != 1 or chosen[0] not in how:
        raise FormatError(f"{file}: {', '.join(chosen) or 'no pooling mode'}; wanted one of {', '.join(how)}")
    return Sentences(how[chosen[0]], len(kinds) == 3, limit)


def read_ends(folder: Path, fields: dict[str, Any]) -> Text:
    """The ids that end a text: of generation_config.json, or else of config.json."""
    found = (read_json(folder / "generation_config.json") or fields).get("eos_token_id")
    ids = found if isinstance(found, list) else [found]
    return Text(tuple(i for i in ids if isinstance(i, int)))
