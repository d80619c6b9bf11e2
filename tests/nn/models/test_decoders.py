"""Decoders compute what transformers computes: of each family, with each switch of its config, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import decoder_oracle as oracle
import numpy as np
import pytest
import safetensors.numpy
from helpers import padded, run_alone
from tokenizers import Tokenizer, models, pre_tokenizers

import aq_jax as aq
from aq_jax.calibration.text import read_text
from aq_jax.converters import huggingface
from aq_jax.nn.architecture import Architecture, read_architecture
from aq_jax.nn.compiled import BoundProgram
from aq_jax.nn.generator import Generator
from aq_jax.nn.models import FAMILIES
from aq_jax.nn.models.decoder_config import Attention
from aq_jax.nn.rope import Rope
from aq_jax.ops import Scores
from aq_jax.validate.data import HeldOut
from aq_jax.validate.outputs import GeneratorJudge

VOCAB, NEW = 120, 32
TEXTS = [[int(i) for i in np.random.default_rng(n).integers(3, VOCAB, n)] for n in (13, 7, 1)]
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-3,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
WIDE = {"head_dim": 16}
FOUR = {"num_hidden_layers": 4}
YARN = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 16}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 300.0, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 300.0, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": YARN,
    "yarn to the letter": YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "truncate": False, "attention_factor": 0.8},
    "yarn by scales": YARN | {"mscale": 0.8, "mscale_all_dim": 0.5},
}  # fmt: skip
BIASES = {"attention_bias": True, "mlp_bias": True}
SLIDE = {"use_sliding_window": True, "sliding_window": 4}
TYPES = ["sliding_attention", "full_attention"]
# By model_type: what each case adds to SIZES; the first is the family as it usually is.
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "usual": {}, "one key": {"num_key_value_heads": 1},
        "tied, with biases": {"tie_word_embeddings": True, **BIASES},
        **{f"rope {name}": {"rope_parameters": rope, **WIDE} for name, rope in ROPES.items()},
    },
    "mistral": {
        "usual": {"sliding_window": 5}, "no window, wide heads": {"sliding_window": None, **WIDE},
        "tied": {"tie_word_embeddings": True, "hidden_act": "gelu"}, "yarn": {"rope_parameters": YARN},
    },
    "qwen2": {
        "usual": {}, "windows": {**SLIDE, "max_window_layers": 1}, "tied": {"tie_word_embeddings": True},
        "types": {**SLIDE, "layer_types": TYPES}, "yarn": {"rope_parameters": YARN},
    },
    "qwen3": {
        "usual": WIDE, "windows": {**SLIDE, "max_window_layers": 1, **WIDE},
        "tied, with biases": {"tie_word_embeddings": True, "attention_bias": True, **WIDE},
        "llama3": {"rope_parameters": ROPES["llama3"], **WIDE},
    },
    "gemma": {
        "usual": WIDE, "untied": {"tie_word_embeddings": False, "attention_bias": True, **WIDE},
        "linear": {"rope_parameters": ROPES["linear"], **WIDE},
    },
    "gemma2": {
        "usual": {"sliding_window": 5, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0,
                  "final_logit_softcapping": 1.5, **WIDE},
        "no caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None, "layer_types": TYPES[::-1],
                    "sliding_window": 5, "attention_bias": True, **WIDE},
        "dynamic": {"rope_parameters": ROPES["dynamic"], **WIDE},
    },
    "gemma3_text": {
        "usual": {"sliding_window": 5, "query_pre_attn_scalar": 20, "layer_types": TYPES, **WIDE},
        "pattern": {"sliding_window": 3, "_sliding_window_pattern": 3, **FOUR, **WIDE},
        "cap, scaling": {
            "final_logit_softcapping": 1.5, "layer_types": TYPES, "sliding_window": 5,
            "rope_parameters": {"full_attention": ROPES["linear"],
                                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}, **WIDE,
        },
    },
    "phi3": {
        "usual": {}, "window": {"sliding_window": 5, "tie_word_embeddings": True},
        "part": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}},
    },
    "smollm3": {
        "usual": FOUR, "every second": {"no_rope_layer_interval": 2, "tie_word_embeddings": False, **BIASES},
        "windows": {**SLIDE, "no_rope_layers": [0, 1]}, "yarn": {"rope_parameters": YARN},
    },
    "olmo2": {
        "usual": {}, "with biases": {"attention_bias": True, "tie_word_embeddings": True},
        "dynamic": {"rope_parameters": ROPES["dynamic"]},
    },
    "olmo3": {
        "usual": {"sliding_window": 5, **FOUR}, "types": {"sliding_window": 3, "layer_types": TYPES[::-1]},
        "with biases": {"attention_bias": True, "sliding_window": 3},
    },
    "granite": {
        "usual": {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.3,
                  "logits_scaling": 2.5},
        "plain": {**BIASES, "tie_word_embeddings": True}, "yarn": {"rope_parameters": YARN},
    },
}  # fmt: skip
# In a process of its own: transformers sets up warnings of its own when it is imported.
TRANSFORMERS = """
import json, sys
import numpy as np, torch
from transformers import AutoConfig, AutoModelForCausalLM
cases, texts, new, out = json.loads(sys.argv[1])
for kind, variants in cases.items():
    for name, fields in variants.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, attn_implementation="eager", **fields)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        found = {}
        with torch.no_grad():
            for key, weight in model.named_parameters():
                gain = "norm" in key and "gemma" not in kind
                weight.normal_(1 if gain else 0, 0.3 if weight.ndim == 1 else 1.5 * weight.shape[1] ** -0.5)
            for i, text in enumerate(texts):
                ids = torch.tensor([text])
                found[f"hidden{i}"] = model.model(ids).last_hidden_state[0].numpy()
                found[f"logits{i}"] = model(ids).logits[0].numpy()
                mask = torch.ones_like(ids)
                more = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new, pad_token_id=0)
                found[f"new{i}"] = more[0, len(text):].numpy()
        model.save_pretrained(f"{out}/{kind} {name}")
        np.savez(f"{out}/{kind} {name}.npz", **found)
"""


def read(kind: str, **fields: Any) -> Any:
    return FAMILIES[kind].read(SIZES | fields, "config.json")


# ------------------------------------------------------------------------------------------------ the oracle

# By model_type: fields, the window of each layer, and the base of its rotation; 0 for none.
USUAL: dict[str, tuple[dict[str, Any], list[int], list[float]]] = {
    "mistral": ({"sliding_window": 5, "rope_theta": 300.0}, [5, 5], [300, 300]),
    "qwen2": ({**SLIDE, "max_window_layers": 1}, [0, 4], [1e4, 1e4]),
    "qwen3": (WIDE, [0, 0], [1e4, 1e4]),
    "gemma": (WIDE, [0, 0], [1e4, 1e4]),
    "gemma2": (CASES["gemma2"]["usual"], [5, 0], [1e4, 1e4]),
    "gemma3_text": (CASES["gemma3_text"]["usual"], [5, 0], [1e4, 1e6]),
    "phi3": ({"partial_rotary_factor": 0.5, "sliding_window": 5}, [5, 5], [1e4, 1e4]),
    "smollm3": ({"no_rope_layer_interval": 2, "rope_theta": 300.0}, [0, 0], [300, 0]),
    "olmo2": ({}, [0, 0], [1e4, 1e4]),
    "olmo3": ({"sliding_window": 5, "layer_types": TYPES}, [5, 0], [5e5, 5e5]),
    "granite": (CASES["granite"]["usual"] | BIASES, [0, 0], [1e4, 1e4]),
}


@pytest.mark.parametrize("kind", USUAL)
def test_logits_are_those_of_the_oracle(kind: str) -> None:
    given, windows, thetas = USUAL[kind]
    tied = kind.startswith("gemma")
    fields = SIZES | given | {"tie_word_embeddings": tied}
    tensors = oracle.weights(kind, fields)
    architecture = Architecture(FAMILIES[kind], FAMILIES[kind].read(fields, "config.json"), fields)
    model = architecture.fill(tensors, "float32", "m.parquet")
    found = BoundProgram(model, lambda model, ids, mask: model.logits(model(ids, mask)))(*padded(TEXTS))
    config = fields | {"windows": windows, "thetas": thetas}
    for logits, text in zip(found, TEXTS, strict=True):
        wanted = oracle.logits(kind, config, tensors, text)
        assert wanted.std() > 0.3
        np.testing.assert_allclose(logits[: len(text)], wanted, atol=1e-4)


# ------------------------------------------------------------------------------------------------ transformers


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What transformers saves and computes of each case."""
    if importlib.util.find_spec("torch") is None or sys.modules.get("torch", ...) is None:
        pytest.skip("needs torch")
    folder = tmp_path_factory.mktemp("transformers")
    cases = {kind: {name: SIZES | fields for name, fields in each.items()} for kind, each in CASES.items()}
    run_alone(folder, TRANSFORMERS, json.dumps([cases, TEXTS, NEW, str(folder)]))
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    for kind, each in CASES.items():
        for name in each:
            tokenizer.save(str(folder / f"{kind} {name}" / "tokenizer.json"))
    return folder


@pytest.mark.slow  # importing torch and transformers takes longer than all other tests here
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, each in CASES.items() for name in each])
def test_states_logits_and_tokens_are_those_of_transformers(theirs: Path, tmp_path: Path, kind: str, name: str) -> None:
    huggingface.to_table(theirs / f"{kind} {name}", tmp_path / "m.parquet")
    found = aq.load_model(tmp_path / "m.parquet")
    assert isinstance(found, Generator)
    wanted = np.load(theirs / f"{kind} {name}.npz")
    assert wanted["logits0"].std() > 0.1
    hidden = BoundProgram(found.model, lambda model, ids, mask: model(ids, mask))(*padded(TEXTS))
    for i, text in enumerate(TEXTS):
        np.testing.assert_allclose(hidden[i, : len(text)], wanted[f"hidden{i}"], atol=1e-4, rtol=1e-4)
    logits = np.log(np.exp(wanted["logits0"]) / np.exp(wanted["logits0"]).sum(-1, keepdims=True))
    np.testing.assert_allclose(found.log_probabilities(TEXTS[0]), logits[:-1], atol=1e-4)
    new = [wanted[f"new{i}"].tolist() for i in range(len(TEXTS))]
    assert [found.generate_ids(text, NEW) for text in TEXTS] == new
    assert found.generate_ids(TEXTS, NEW) == new


# ------------------------------------------------------------------------------------------------ calibration


@pytest.mark.slow
@pytest.mark.parametrize("kind", USUAL)
def test_families_are_given_their_bits_calibrated_and_run_on_packed_weights(tmp_path: Path, kind: str) -> None:
    folder, fields = tmp_path / "model", SIZES | USUAL[kind][0] | {"tie_word_embeddings": True}
    folder.mkdir()
    safetensors.numpy.save_file(oracle.weights(kind, fields), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": kind} | fields))
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    lines = np.random.default_rng(0).integers(0, VOCAB, (80, 12))
    (tmp_path / "lines.txt").write_text("\n".join(" ".join(f"w{i}" for i in line) for line in lines))
    gptq = aq.QuantizationConfig("int4", group_size=16, symmetric=False, solver="gptq")
    calibration = aq.CalibrationConfig(str(tmp_path / "lines.txt"), sentences=40)
    allocate = aq.AllocationConfig(target_bpw=8, widths=("int4", "int8"), sentences=8)
    output = str(tmp_path / "out" / "m.parquet")
    done = aq.convert(aq.ConversionConfig(str(folder), output, gptq, calibration=calibration, allocate=allocate))
    assert done.allocation["bpw"] <= 8
    assert done.allocation["cosine"] > 0.98
    text = [int(i) for i in lines[-1]]
    wanted = oracle.logits(kind, fields | dict(zip(("windows", "thetas"), USUAL[kind][1:], strict=True)),
                           aq.load(output, "numpy"), text)  # fmt: skip
    log = wanted - np.log(np.exp(wanted).sum(-1, keepdims=True))
    found = aq.load_model(output)
    assert isinstance(found, Generator)
    np.testing.assert_allclose(found.log_probabilities(text), log[:-1], atol=1e-4)
    huggingface.to_table(folder, tmp_path / "float" / "m.parquet")
    floats = aq.load_model(tmp_path / "float" / "m.parquet")
    assert isinstance(floats, Generator)
    judged = GeneratorJudge(floats, HeldOut(read_text(calibration), 0, None), 12).outputs(found)
    assert 0 < judged["kl"]["mean"] < 0.05


# ------------------------------------------------------------------------------------------------ configs

LLAMA3 = {name: value for name, value in ROPES["llama3"].items() if name not in ("rope_type", "rope_theta")}


def test_a_config_of_few_fields_has_the_defaults_of_transformers() -> None:
    few = {name: SIZES[name] for name in list(SIZES)[:5]} | {"max_position_embeddings": 64}
    found = FAMILIES["llama"].read(few | {"rope_scaling": None, "head_dim": None}, "config.json")
    assert (found.layer.kv_heads, found.layer.size, found.layer.epsilon, found.layer.act) == (4, 8, 1e-6, "silu")
    assert (found.tied, found.layer.biased, found.max_position_embeddings) == (False, frozenset(), 64)
    assert found.attentions == (Attention(Rope(tuple(1e4 ** -(i / 4) for i in range(4))), Scores()),) * 2


@pytest.mark.parametrize(
    "said",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},  # transformers 4
        {"rope_theta": 500000, "rope_scaling": {"type": "llama3", **LLAMA3}},
    ],
)
def test_rotations_are_said_in_three_ways(said: dict[str, Any]) -> None:
    new = read("llama", rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3})
    assert read("llama", **said) == new != read("llama")


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("gemma3_text", {"sliding_window_pattern": 2, "rope_local_base_freq": 50.0, "rope_theta": 7e5},
         {"layer_types": TYPES, "rope_parameters": {
             "full_attention": {"rope_type": "default", "rope_theta": 7e5},
             "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}}),
        ("gemma", {"hidden_act": "gelu", "hidden_activation": None}, {}),
        ("phi3", {"partial_rotary_factor": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.5}}),
        ("qwen2", {"layer_types": ["full_attention"] * 2}, {"sliding_window": 3}),
        *((kind, {}, {"sliding_window": 4096}) for kind in ("mistral", "gemma2", "gemma3_text", "olmo3")),
        ("smollm3", {"no_rope_layers": [1, 0]}, {"no_rope_layer_interval": 2}),
    ],
)  # fmt: skip
def test_older_spellings_and_defaults_mean_what_newer_ones_say(kind: str, old: dict, new: dict) -> None:
    assert read(kind, **old) == read(kind, **new)


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    **{
        f"no {name}": ("llama", {name: None}, f"^config.json: no {name}; wanted a positive integer$")
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "max_position_embeddings")
    },
    "longrope": ("phi3", {"rope_scaling": {"type": "longrope"}}, "rope_scaling: type is 'longrope'"),
    "no factor": ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling: no factor; wanted a positive number"),
    "half of llama3": ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "no low_freq_factor"),
    "another number": ("llama", {"rope_scaling": {"type": "linear", "factor": 2, "warp": 3}}, "has warp = 3, which is"),
    "a list of rotations": ("llama", {"rope_scaling": [1, 2]}, r"rope_scaling is \[1, 2\]; wanted an object"),
    "a part of a head": ("llama", {"rope_scaling": {"partial_rotary_factor": 0.5}}, "factor is 0.5; wanted 1.0"),
    "an odd part of a head": ("phi3", {"partial_rotary_factor": 0.4}, "0.4 of 8 numbers are turned; wanted an even"),
    "two rotations": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters":
                                {"rope_theta": 5e5, "rope_type": "default"}}, "has both rope_scaling and rope_param"),
    "two of two rotations": ("gemma3_text", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters":
                                             {"full_attention": {"rope_theta": 5e5}}}, "has both rope_scaling and"),
    "an activation": ("llama", {"hidden_act": "relu2"}, "hidden_act is 'relu2'; wanted 'silu'"),
    "slices": ("llama", {"pretraining_tp": 2}, "pretraining_tp is 2; wanted 1"),
    "a string": ("llama", {"hidden_size": "32"}, "hidden_size is '32'; wanted a positive integer"),
    "more heads than width": ("llama", {"num_attention_heads": 64}, "head_dim 0; wanted a number of heads"),
    "heads that are not shared": ("llama", {"num_key_value_heads": 3}, "num_attention_heads 4, num_key_value_heads 3"),
    "odd heads": ("llama", {"head_dim": 7}, "head_dim 7; wanted a number of heads .*, and an even head_dim"),
    "a theta that is none": ("llama", {"rope_theta": "10000"}, "rope_theta is '10000'; wanted a positive number"),
    "a window that is none": ("qwen2", {"layer_types": TYPES}, "layer_types has 'sliding_attention'; wanted a sliding"),
    **{
        f"{kind} without a window": (kind, {"sliding_window": None, "layer_types": TYPES},
                                     "^config.json: layer_types has 'sliding_attention'; wanted a sliding_window$")
        for kind in ("gemma2", "gemma3_text", "olmo3")
    },
    "few layers": ("qwen3", {"layer_types": TYPES[:1]}, "wanted 2 times 'full_attention' or 'sliding_attention'"),
    "chunks": ("gemma2", {"layer_types": ["chunked_attention"] * 2}, "layer_types is .*chunked"),
    "both ways": ("gemma3_text", {"use_bidirectional_attention": True}, "attention is True; wanted False"),
    "half a rotation": ("smollm3", {"no_rope_layers": [1, 0.5]}, "no_rope_layers is .* wanted 2 times 0 or 1"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_values_that_are_not_computed_are_refused(what: str) -> None:
    kind, fields, message = WRONG[what]
    with pytest.raises(aq.FormatError, match=message):
        read(kind, **fields)


@pytest.mark.parametrize("kind", CASES)
def test_fields_that_nobody_knows_are_refused(kind: str) -> None:
    with pytest.raises(aq.FormatError, match=r"^config.json: has novelty = \{'a': 1\}, which is not known here$"):
        read(kind, novelty={"a": 1})


def test_mixtures_are_refused_as_such(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral", "num_local_experts": 8}))
    with pytest.raises(aq.FormatError, match="model_type is 'mixtral', a mixture of experts, which is not computed"):
        read_architecture(tmp_path)
