"""A table with config.json and tokenizer files beside it, as a model that runs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from flax import nnx

from aq_jax.core.dispatch import ACTIVATIONS, Activations
from aq_jax.core.ops import lacks_for_integers
from aq_jax.core.qtensor import QTensor
from aq_jax.errors import ConfigError, FormatError
from aq_jax.loader import WeightLoader
from aq_jax.nn import bert, llama
from aq_jax.nn.bert import Pooling
from aq_jax.nn.encoder import Encoder, Sentences
from aq_jax.nn.generator import Generator
from aq_jax.nn.parallel import check_mesh, shardings
from aq_jax.nn.weights import Mapped, abstract, fill

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from tokenizers import Tokenizer

J = TypeVar("J", dict[str, Any], list[Any])
NAMES_OF_JSON = {dict: "object", list: "array"}
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
VOCABULARIES = ("vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def load_model(
    path: str | os.PathLike[str], activations: Activations | None = None, *, mesh: Mesh | None = None
) -> Encoder | Generator:
    """A BERT encoder or a Llama from a table; quantized weights stay packed.

    Args:
        path: a table of schema V1 or V2, or a folder of shards, with config.json and tokenizer files beside it, as
            `convert` leaves them.
        activations: what inputs of quantized layers are rounded to (see `qdot`): "int8" (W8A8), "bfloat16" or
            "float32". Default: "int8" if all quantized weights have 8 bits, else "float32". Models of float weights
            compute in float32.
        mesh: devices over whose axis "model" the linear layers are spread (tensor parallelism; `nn.parallel` says how);
            each process reads what its own devices hold. All processes of the mesh make the same calls. Results are
            those of one device, but for the order in which sums are added up.

    Returns:
        An Encoder, whose `encode` embeds sentences, or a Generator, whose `generate` continues a prompt.

    Raises:
        FileNotFoundError: if there is no table.
        FormatError: for missing or damaged files, tensors that do not fit the model, or another kind of model.
        ConfigError: for other activations, for those that this table's weights cannot be multiplied by, and for a mesh
            without such an axis.

    >>> import struct, tempfile
    >>> import numpy as np, aq_jax as aq
    >>> from aq_jax.converters import llama2c
    >>> folder = Path(tempfile.mkdtemp())  # a Llama of 8 x 8 matrices, and a vocabulary of bytes
    >>> fields = struct.pack("<7i", 8, 8, 1, 1, 1, 260, 16)
    >>> _ = (folder / "model.bin").write_bytes(fields + np.ones(2680, "<f4").tobytes())
    >>> pieces = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % byte for byte in range(256)), b" "]
    >>> tokens = b"".join(struct.pack("<fi", 0, len(piece)) + piece for piece in pieces)
    >>> _ = (folder / "tok.bin").write_bytes(struct.pack("<i", 6) + tokens)
    >>> int8 = aq.QuantizationConfig("int8")
    >>> _ = llama2c.to_table(folder / "model.bin", folder / "tok.bin", folder / "m.parquet", int8)
    >>> model = aq.load_model(folder / "m.parquet")
    >>> model.score("hello").shape  # of the space that every text begins with, and five letters
    (6,)
    """
    if activations not in (None, *ACTIVATIONS):
        raise ConfigError(f"activations = {activations!r}: wanted one of {', '.join(ACTIVATIONS)}")
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if mesh is not None:
        check_mesh(mesh)
    with WeightLoader(path) as loader:
        if mesh is None:
            tensors = loader.load_weights(packed=True)
            plan = read_architecture(folder)
        else:
            plan = read_architecture(folder)
            infos = {name: loader.describe(name) for name in loader.get_layer_names() if name not in loader.aliases}
            tensors = loader.load_weights(packed=True, shardings=shardings(infos, plan.names, mesh))
    how = chosen_activations(tensors, activations, str(path))
    tokenizer = read_tokenizer(folder, plan.config.vocab_size)
    model = plan.fill(tensors, how, str(path))
    if isinstance(model, llama.Llama):
        return Generator(model, tokenizer, read_ends(folder, plan.fields))
    least = tokenizer.num_special_tokens_to_add(is_pair=False) + 1
    return Encoder(model, tokenizer, read_sentences(folder, model.config.max_position_embeddings, least))


@dataclass(frozen=True)
class Architecture:
    """A model without its weights.

    Args:
        config: its sizes.
        names: how stored names map to its parameters.
        fields: of config.json.
    """

    config: bert.BertConfig | llama.LlamaConfig
    names: tuple[Mapped, ...]
    fields: dict[str, Any]

    def fill(self, tensors: Mapping[str, Any], activations: Activations, where: str) -> bert.Bert | llama.Llama:
        """The model with these weights (see `nn.weights.fill`)."""
        config = self.config

        def make(rngs: nnx.Rngs) -> bert.Bert | llama.Llama:
            if isinstance(config, bert.BertConfig):
                return bert.Bert(config, activations=activations, rngs=rngs)
            return llama.Llama(config, activations=activations, rngs=rngs)

        return fill(abstract(make), tensors, self.names, activations, where)


def read_architecture(folder: Path) -> Architecture:
    """What config.json says.

    Raises:
        FormatError: if there is none, or it is of a model that is not computed here.
    """
    file = folder / "config.json"
    fields = read_json(file, dict)
    if fields is None:
        raise FormatError(f"{file}: no such file; wanted the model's config, which `convert` copies there")
    if fields.get("model_type") == "bert":
        return Architecture(bert.BertConfig.from_json(fields, str(file)), bert.NAMES, fields)
    if fields.get("model_type") == "llama":
        config = llama.LlamaConfig.from_json(fields, str(file))
        return Architecture(config, llama.names(config), fields)
    raise FormatError(f"{file}: model_type is {fields.get('model_type')!r}; wanted 'bert' or 'llama'")


def chosen_activations(tensors: dict[str, Any], asked: Activations | None, where: str) -> Activations:
    """Those asked for; by default eight bits where the weights have eight and multiply as integers, else float32.

    Raises:
        ConfigError: if these weights cannot be multiplied by those asked for.
    """
    quantized = {name: value for name, value in tensors.items() if isinstance(value, QTensor)}
    matrices = {name: value for name, value in quantized.items() if value.ndim == 2}  # only these are multiplied by
    lacking = {name: lack for name, value in sorted(matrices.items()) if (lack := lacks_for_integers(value))}
    if asked is None:
        return "int8" if quantized and not lacking and all(q.spec.bits == 8 for q in quantized.values()) else "float32"
    if asked != "float32" and not quantized:
        raise ConfigError(
            f"{where}: found float weights only; activations = {asked!r} wants quantized ones, whose inputs it rounds; "
            "convert with a quant_type, or leave activations out"
        )
    if asked == "int8" and lacking:
        raise ConfigError(
            f"{where}: activations = 'int8' cannot be multiplied by {len(lacking)} weights: "
            + "; ".join(f"{name}: found {matrices[name]}, wanted {lack}" for name, lack in lacking.items())
            + "; convert with a group_size that divides their rows, or leave activations out"
        )
    return asked


def read_json(path: Path, kind: type[J]) -> J | None:
    """A JSON file that holds an object (dict) or an array (list), or None if there is no such file.

    Raises:
        FormatError: if it is no JSON, or of another kind.
    """
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise FormatError(f"{path}: no JSON: {error}") from None
    if not isinstance(found, kind):
        raise FormatError(f"{path}: holds {type(found).__name__}; wanted a JSON {NAMES_OF_JSON[kind]}")
    return found


def read_tokenizer(folder: Path, vocabulary: int) -> Tokenizer:
    """tokenizer.json, or what transformers makes of older files.

    Raises:
        FormatError: if there are none, or they are damaged, or another model's: there is nothing to look up for a token
            whose number is no row of the vocabulary.
    """
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    try:
        if file.exists():
            found = Tokenizer.from_file(str(file))
        elif not any((folder / name).exists() for name in VOCABULARIES):  # transformers makes one that knows no word
            raise FileNotFoundError(f"wanted it, or one of {', '.join(VOCABULARIES)}, which `convert` copies there")
        else:
            from transformers import AutoTokenizer

            found = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    except Exception as error:  # tokenizers raises no other class
        raise FormatError(f"{file}: no tokenizer can be made of it: {error}") from None
    largest = max(found.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= vocabulary:
        raise FormatError(f"{folder}: the tokenizer has a token {largest}; vocab_size in config.json is {vocabulary}")
    return found


def read_sentences(folder: Path, positions: int, least: int = 1) -> Sentences:
    """What the files of sentence-transformers say; without them, the mean over at most all positions.

    Args:
        folder: that has them.
        positions: of the model.
        least: so many tokens a text must have room for, that is, one beside the special tokens.

    Raises:
        FormatError: for modules and poolings that are not computed here, for lengths of texts that leave no room, and
            for damaged files.
    """
    own = read_json(folder / "sentence_bert_config.json", dict) or {}
    general = read_json(folder / "tokenizer_config.json", dict) or {}
    # The first that is there; Hugging Face writes 10^30 where there is no limit.
    limits = (
        ("sentence_bert_config.json", "max_seq_length", own.get("max_seq_length")),
        ("tokenizer_config.json", "model_max_length", general.get("model_max_length")),
        ("config.json", "max_position_embeddings", positions),
    )
    file, name, limit = next(said for said in limits if said[2] is not None)
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not min(limit, positions) >= least:
        raise FormatError(
            f"{folder / file}: {name} is {limit!r}, of {positions} positions; wanted so many tokens: {least} or more"
        )
    limit = int(min(limit, positions))
    lower_case = own.get("do_lower_case") is True
    file = folder / "modules.json"
    modules = read_json(file, list)
    if modules is None:
        return Sentences(max_tokens=limit, lower_case=lower_case)
    kinds = [str(module.get("type")).rpartition(".")[2] for module in modules if isinstance(module, dict)]
    if len(kinds) != len(modules) or kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise FormatError(f"{file}: {kinds}; wanted Transformer, Pooling and perhaps Normalize")
    return Sentences(read_pooling(folder / str(modules[1].get("path"))), len(kinds) == 3, limit, lower_case)


def read_pooling(folder: Path) -> Pooling:
    """The one pooling that a folder's config.json asks for, in the old spelling (a flag each) or the new one."""
    file = folder / "config.json"
    fields = read_json(file, dict)
    if fields is None:
        raise FormatError(f"{file}: no such file; wanted the pooling, which modules.json says is there")
    spelled = fields.get("pooling_mode")
    if spelled is not None:
        chosen = spelled if isinstance(spelled, list) else [spelled]
    else:
        flags = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
        on = [name for name, flag in fields.items() if name.startswith("pooling_mode_") and flag is True]
        chosen = [flags.get(name, name) for name in on] or ["mean"]  # as sentence-transformers reads it
    for pooling in POOLINGS:
        if chosen == [pooling]:
            return pooling
    raise FormatError(f"{file}: pools by {chosen}; wanted one of {', '.join(POOLINGS)}")


def read_ends(folder: Path, fields: dict[str, Any]) -> tuple[int, ...]:
    """The ids that end a text: of generation_config.json, or else of config.json."""
    found = (fields | (read_json(folder / "generation_config.json", dict) or {})).get("eos_token_id")
    ids = found if isinstance(found, list) else [found]
    return tuple(i for i in ids if isinstance(i, int))
