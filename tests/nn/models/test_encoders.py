"""Encoders compute what transformers computes: of each family, with each switch of its config, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import encoder_oracle as oracle
import numpy as np
import pytest
import safetensors.numpy
from helpers import padded, run_alone
from tokenizers import Tokenizer, models, pre_tokenizers

import aq_jax as aq
from aq_jax.converters import huggingface
from aq_jax.nn.architecture import Architecture
from aq_jax.nn.compiled import BoundProgram
from aq_jax.nn.encoder import Encoder
from aq_jax.nn.models import FAMILIES

VOCAB = 120
# The first is longer than a window, and than the distances that have a bias of their own.
TEXTS = [[int(i) for i in np.random.default_rng(n).integers(3, VOCAB, n)] for n in (70, 7, 1)]
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 96, "layer_norm_eps": 1e-3,
}  # fmt: skip
DISTIL = {
    "vocab_size": VOCAB, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 96,
}  # fmt: skip
MODERN = {name: value for name, value in SIZES.items() if name != "layer_norm_eps"} | {
    "norm_eps": 1e-3, "local_attention": 9, "pad_token_id": 1, "bos_token_id": None, "eos_token_id": None,
    "cls_token_id": None, "sep_token_id": None,
}  # fmt: skip
BIASES = {"attention_bias": True, "mlp_bias": True, "norm_bias": True}
# By model_type: the fields of each case; the first is the family as it usually is.
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "bert": {"usual": SIZES, "relu": SIZES | {"hidden_act": "relu", "type_vocab_size": 1}},
    "roberta": {"usual": SIZES, "gelu_new, another padding": SIZES | {"hidden_act": "gelu_new", "pad_token_id": 2}},
    "xlm-roberta": {"usual": SIZES | {"type_vocab_size": 1}},
    "camembert": {"usual": SIZES},
    "distilbert": {"usual": DISTIL, "sines, relu": DISTIL | {"sinusoidal_pos_embds": True, "activation": "relu"}},
    "mpnet": {"usual": SIZES, "relu": SIZES | {"hidden_act": "relu"}},
    "modernbert": {
        "usual": MODERN | {"num_hidden_layers": 3}, "biases": MODERN | BIASES,
        "types, other rotations": MODERN | {
            "layer_types": ["full_attention", "sliding_attention"], "hidden_activation": "silu",
            "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 500.0},
                                "sliding_attention": {"rope_type": "linear", "rope_theta": 50.0, "factor": 2.0}},
        },
    },
    "nomic_bert": {
        "usual": SIZES | {"pad_token_id": 0},
        "rotation, gelu": SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
                                   "hidden_act": "gelu", "type_vocab_size": 1},
    },
}  # fmt: skip
# Qwen3-Embedding: a language model without a head, whose last token is the embedding.
LAST = {name: value for name, value in SIZES.items() if name != "layer_norm_eps"}
LAST |= {"head_dim": 16, "num_key_value_heads": 2, "tie_word_embeddings": False, "eos_token_id": None}
# In a process of its own: transformers sets up warnings of its own when it is imported.
TRANSFORMERS = """
import json, sys
import numpy as np, torch
from transformers import AutoConfig, AutoModel
cases, texts, out = json.loads(sys.argv[1])
for kind, variants in cases.items():
    for name, fields in variants.items():
        torch.manual_seed(0)
        model = AutoModel.from_config(AutoConfig.for_model(kind, **fields), attn_implementation="eager").eval()
        found = {}
        with torch.no_grad():
            for key, weight in model.named_parameters():
                gain = "norm" in key.lower() and key.endswith("weight")
                weight.normal_(1 if gain else 0, 0.3 if weight.ndim == 1 else 1.5 * weight.shape[1] ** -0.5)
            for i, text in enumerate(texts):
                found[f"hidden{i}"] = model(torch.tensor([text])).last_hidden_state[0].numpy()
            if kind == "qwen3":
                length = max(map(len, texts))
                ids = torch.tensor([[0] * (length - len(text)) + text for text in texts])
                mask = torch.tensor([[0] * (length - len(text)) + [1] * len(text) for text in texts])
                found["last"] = model(ids, attention_mask=mask).last_hidden_state[:, -1].numpy()
        model.save_pretrained(f"{out}/{kind} {name}")
        np.savez(f"{out}/{kind} {name}.npz", **found)
"""


def save_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


# ------------------------------------------------------------------------------------------------ the oracle

# By model_type: config.json, and what the oracle makes of it.
USUAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "roberta": (SIZES, {}),
    "distilbert": (DISTIL | {"n_layers": oracle.DEPTH}, {}),
    "mpnet": (SIZES, {}),
    "modernbert": (MODERN | {"global_attn_every_n_layers": 2},
                   {"reaches": [96, 4, 96], "thetas": [160000.0, 10000.0, 160000.0]}),
    "nomic_bert": (SIZES | {"rope_theta": 50.0}, {"thetas": [50.0] * 3}),
}  # fmt: skip


def oracle_case(kind: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    fields = {"model_type": kind} | USUAL[kind][0]
    return fields | ({} if kind == "distilbert" else {"num_hidden_layers": oracle.DEPTH}), oracle.weights(kind, VOCAB)


@pytest.mark.parametrize("kind", USUAL)
def test_states_are_those_of_the_oracle(kind: str) -> None:
    fields, tensors = oracle_case(kind)
    architecture = Architecture(FAMILIES[kind], FAMILIES[kind].read(fields, "config.json"), fields)
    model = architecture.fill(tensors, "float32", "m.parquet")
    hidden = BoundProgram(model, lambda model, ids, mask: model(ids, mask))(*padded(TEXTS))
    for found, text in zip(hidden, TEXTS, strict=True):
        wanted = oracle.hidden_states(kind, USUAL[kind][1], tensors, text)
        assert wanted.std() > 0.3
        np.testing.assert_allclose(found[: len(text)], wanted, atol=1e-4)


# ------------------------------------------------------------------------------------------------ transformers


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What transformers saves and computes of each case."""
    if importlib.util.find_spec("torch") is None or sys.modules.get("torch", ...) is None:
        pytest.skip("needs torch")
    folder = tmp_path_factory.mktemp("transformers")
    run_alone(folder, TRANSFORMERS, json.dumps([CASES | {"qwen3": {"embedding": LAST}}, TEXTS, str(folder)]))
    for kind, each in CASES.items():
        for name in each:
            save_tokenizer(folder / f"{kind} {name}")
    return folder


@pytest.mark.slow  # importing torch and transformers takes longer than all other tests here
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, each in CASES.items() for name in each])
def test_states_and_embeddings_are_those_of_transformers(theirs: Path, tmp_path: Path, kind: str, name: str) -> None:
    huggingface.to_table(theirs / f"{kind} {name}", tmp_path / "m.parquet")
    found = aq.load_model(tmp_path / "m.parquet")
    assert isinstance(found, Encoder)
    wanted = np.load(theirs / f"{kind} {name}.npz")
    hidden = BoundProgram(found.model, lambda model, ids, mask: model(ids, mask))(*padded(TEXTS))
    for i, text in enumerate(TEXTS):
        assert wanted[f"hidden{i}"].std() > 0.1
        np.testing.assert_allclose(hidden[i, : len(text)], wanted[f"hidden{i}"], atol=1e-4, rtol=1e-4)
    alone = [np.asarray(found.encode_ids([text]))[0] for text in TEXTS]
    for i, one in enumerate(alone):
        np.testing.assert_allclose(one, wanted[f"hidden{i}"].mean(0), atol=1e-4)
    np.testing.assert_allclose(found.encode_ids(TEXTS), alone, atol=1e-5)


@pytest.mark.slow
def test_a_language_model_that_modules_json_makes_an_encoder_embeds_as_padded_on_the_left(
    theirs: Path, tmp_path: Path
) -> None:
    source = theirs / "qwen3 embedding"
    save_tokenizer(source)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    (source / "modules.json").write_text(json.dumps([
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]))  # fmt: skip
    (source / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}
    (source / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    huggingface.to_table(source, tmp_path / "m.parquet")
    found = aq.load_model(tmp_path / "m.parquet")
    assert isinstance(found, Encoder)
    wanted = np.load(theirs / "qwen3 embedding.npz")["last"]
    np.testing.assert_allclose(found.encode_ids(TEXTS), wanted, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ calibration


@pytest.mark.slow
@pytest.mark.parametrize("kind", USUAL)
def test_families_are_given_their_bits_calibrated_and_trained(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    fields, tensors = oracle_case(kind)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(fields))
    save_tokenizer(folder)
    lines = np.random.default_rng(0).integers(0, VOCAB, (80, 12))
    (tmp_path / "lines.txt").write_text("\n".join(" ".join(f"w{i}" for i in line) for line in lines))
    config = aq.ConversionConfig(
        str(folder), str(tmp_path / "out" / "m.parquet"),
        aq.QuantizationConfig("int4", group_size=16, symmetric=False, solver="gptq"),
        calibration=aq.CalibrationConfig(str(tmp_path / "lines.txt"), sentences=40),
        allocate=aq.AllocationConfig(target_bpw=8, widths=("int4", "int8"), sentences=8),
        train=aq.TrainingConfig(steps=2, minutes=0, held_out=8, batch_tokens=64),
    )  # fmt: skip
    done = aq.convert(config)
    assert done.allocation["bpw"] <= 8
    assert done.allocation["cosine"] > 0.98
    text = [int(i) for i in lines[-1]]
    wanted = oracle.hidden_states(kind, USUAL[kind][1], aq.load(done.path, "numpy"), text).mean(0)
    found = aq.load_model(done.path)
    assert isinstance(found, Encoder)
    np.testing.assert_allclose(found.encode_ids([text])[0], wanted, atol=1e-4)


# ------------------------------------------------------------------------------------------------ configs

OLD_NOMIC = {
    "n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 96, "layer_norm_epsilon": 1e-3,
    "vocab_size": VOCAB, "rotary_emb_base": 1000, "activation_function": "swiglu", "prenorm": False,
    "qkv_proj_bias": False, "rotary_emb_fraction": 1.0, "rotary_scaling_factor": None, "use_flash_attn": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("nomic_bert", OLD_NOMIC, SIZES | {"rope_theta": 1000.0}),
        ("nomic_bert", OLD_NOMIC | {"rotary_scaling_factor": 2.0, "n_positions": 192, "max_trained_positions": 96},
         SIZES),
        ("modernbert", MODERN | {"global_rope_theta": 500.0, "local_rope_theta": 50.0, "global_attn_every_n_layers": 2},
         MODERN | {"layer_types": ["full_attention", "sliding_attention"], "rope_parameters": {
             "full_attention": {"rope_type": "default", "rope_theta": 500.0},
             "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}}),
        ("roberta", SIZES, SIZES | {"pad_token_id": 1, "type_vocab_size": 2}),
    ],
)  # fmt: skip
def test_older_spellings_and_defaults_mean_what_newer_ones_say(kind: str, old: dict, new: dict) -> None:
    read = FAMILIES[kind].read
    assert read(old, "config.json") == read(new, "config.json")


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "positions of keys": ("bert", SIZES | {"position_embedding_type": "relative_key"}, "'relative_key'; wanted 'abs"),
    "a decoder": ("roberta", SIZES | {"is_decoder": True}, "is_decoder is True; wanted False"),
    "few positions": ("roberta", SIZES | {"max_position_embeddings": 2}, "leaves no position beside that of padding"),
    "buckets": ("mpnet", SIZES | {"relative_attention_num_buckets": 16}, "num_buckets is 16; wanted 32"),
    "heads that do not divide": ("bert", SIZES | {"num_attention_heads": 5}, "5 heads do not divide 32"),
    "heads of odd size": ("modernbert", MODERN | {"num_attention_heads": 32}, "32 heads of 32; wanted heads that"),
    "pruned": ("distilbert", DISTIL | {"pruned_heads": {"0": [1]}}, "pruned_heads is .*; wanted {}"),
    "norms before": ("nomic_bert", OLD_NOMIC | {"prenorm": True}, "prenorm is True; wanted False"),
    "half rotations": ("nomic_bert", OLD_NOMIC | {"rotary_emb_fraction": 0.5}, "fraction is 0.5; wanted 1.0"),
    "an activation": ("distilbert", DISTIL | {"activation": "tanh"}, "activation is 'tanh'; wanted 'silu' or"),
}


@pytest.mark.parametrize("what", WRONG)
def test_values_that_are_not_computed_are_refused(what: str) -> None:
    kind, fields, message = WRONG[what]
    with pytest.raises(aq.FormatError, match=message):
        FAMILIES[kind].read(fields, "config.json")


@pytest.mark.parametrize("kind", CASES)
def test_fields_that_nobody_knows_are_refused(kind: str) -> None:
    fields = next(iter(CASES[kind].values()))
    with pytest.raises(aq.FormatError, match=r"^config.json: has novelty = \[3\], which is not known here$"):
        FAMILIES[kind].read(fields | {"novelty": [3]}, "config.json")
