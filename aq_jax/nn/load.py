"""Load a table, with config.json and tokenizer files beside it, as a model that runs."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from aq_jax.core.dispatch import ACTIVATIONS, Activations
from aq_jax.core.qtensor import QTensor
from aq_jax.errors import ConfigError, FormatError
from aq_jax.io.loader import WeightLoader
from aq_jax.nn.architecture import read_architecture
from aq_jax.nn.chat import read_chat_template
from aq_jax.nn.encoder import Encoder
from aq_jax.nn.generation_config import read_generation_config
from aq_jax.nn.generator import Generator
from aq_jax.nn.models import LanguageModel
from aq_jax.nn.models.decoder_family import check_tied
from aq_jax.nn.parallel import check_mesh, shardings
from aq_jax.nn.reranker import Reranker, is_reranker, read_scoring_stages
from aq_jax.nn.sentences import (
    ONLY,
    ONLY_OF_SCORES,
    gives_token_types,
    read_max_tokens,
    read_model_settings,
    read_sentence_tokenizer,
    read_sentences,
)  # fmt: skip
from aq_jax.ops import integer_dot_needs

if TYPE_CHECKING:
    from jax.sharding import Mesh


def load_model(
    path: str | os.PathLike[str], activations: Activations | None = None, *, mesh: Mesh | None = None
) -> Encoder | Generator | Reranker:
    """Load a model from a table; quantized weights stay packed.

    Args:
        path: The path of a table of schema V1 or V2, or of a folder of shards, with config.json and tokenizer files
            beside it, as `convert` leaves them.
        activations: The type that inputs of quantized layers are rounded to (see `qdot`): "int8" (W8A8), "bfloat16" or
            "float32". Default: "int8" if all quantized weights have 8 bits, else "float32". Models of float weights
            compute in float32.
        mesh: The devices over whose axis "model" the linear layers are spread (tensor parallelism, see `nn.parallel`);
            each process reads what its own devices hold. All processes of the mesh make the same calls. Results are
            those of one device, except for the order in which sums are added up.

    Returns:
        An Encoder, whose `encode` embeds sentences, a Generator, whose `generate` continues a prompt, or a Reranker,
        whose `rank` orders texts for a query, if the folder holds a sequence classifier.

    Raises:
        FileNotFoundError: if there is no table.
        FormatError: for missing or damaged files, tensors that do not fit the model, or another kind of model.
        ConfigError: for unknown activations, for those that this table's weights cannot be multiplied by, and for a
            mesh without such an axis.

    >>> import struct, tempfile
    >>> import numpy as np, aq_jax as aq
    >>> from aq_jax.converters import llama2c
    >>> folder = Path(tempfile.mkdtemp())  # a language model of 8 x 8 matrices, and a vocabulary of bytes
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
        infos = {name: loader.describe(name) for name in loader.get_layer_names() if name not in loader.aliases}
        architecture = read_architecture(folder, {name: info.shape for name, info in infos.items()})
        where = None
        if mesh is not None:
            where = shardings(infos, architecture, mesh)
        tensors = loader.load_weights(packed=True, shardings=where)
    family, config = architecture.family, architecture.config
    how = choose_activations(tensors, activations, str(path))
    scores = is_reranker(folder, architecture.fields)
    if scores and family.scorer is None:
        raise FormatError(f"{path}: is a sequence classifier, which {family.model_types[0]} has none of here")
    if not scores and (heads := sorted(name for name in tensors if re.fullmatch(family.heads, name))):
        warnings.warn(f"{path}: {', '.join(heads)} are a classifier's, and not used to {family.task}", stacklevel=2)
    tokenizer = read_sentence_tokenizer(folder, ONLY_OF_SCORES if scores else ONLY)
    model = architecture.fill(tensors, how, str(path))
    if family.task == "generate":
        if getattr(config, "tied", False):
            check_tied(tensors, str(path))
        how_to = read_generation_config(folder, architecture.fields)
        return Generator(cast(LanguageModel, model), tokenizer, *how_to, read_chat_template(folder))
    if scores and family.scorer is not None:
        least = tokenizer.num_special_tokens_to_add(is_pair=True) + 2
        most = read_max_tokens(*read_model_settings(folder, ONLY_OF_SCORES), config.max_position_embeddings, least)
        scorer = family.scorer(architecture.fields)
        stages = read_scoring_stages(scorer, folder, architecture.fields, tensors)
        types = gives_token_types(folder, ONLY_OF_SCORES)
        return Reranker(model, tokenizer, stages, most, pad=scorer.pad, types=types)
    least = tokenizer.num_special_tokens_to_add(is_pair=False) + 1
    sentences = read_sentences(folder, config.max_position_embeddings, config.hidden_size, least)
    return Encoder(model, tokenizer, sentences)


def choose_activations(tensors: dict[str, Any], asked: Activations | None, where: str) -> Activations:
    """Choose those asked for; by default eight bits if the weights have eight and multiply as integers, else float32.

    Raises:
        ConfigError: if these weights cannot be multiplied by those asked for.
    """
    quantized = {name: value for name, value in tensors.items() if isinstance(value, QTensor)}
    matrices = {name: value for name, value in quantized.items() if value.ndim == 2}  # only these are multiplied by
    lacking = {name: lack for name, value in sorted(matrices.items()) if (lack := integer_dot_needs(value))}
    if asked is None:
        return "int8" if quantized and not lacking and all(q.spec.bits == 8 for q in quantized.values()) else "float32"
    if asked != "float32" and not quantized:
        raise ConfigError(
            f"{where}: holds float weights only; activations = {asked!r} needs quantized ones, whose inputs it rounds; "
            "convert with a quant_type, or leave activations out"
        )
    if asked == "int8" and lacking:
        raise ConfigError(
            f"{where}: activations = 'int8' cannot be multiplied by {len(lacking)} weights: "
            + "; ".join(f"{name}: found {matrices[name]}, wanted {lack}" for name, lack in lacking.items())
            + "; convert with a group_size that divides their rows, or leave activations out"
        )
    return asked
