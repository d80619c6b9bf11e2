"""Families that this file alone registers: an encoder, and a language model, from a folder to what they give."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from tokenizers import Tokenizer, models, pre_tokenizers

import aq_jax as aq
from aq_jax.config.fields import Fields
from aq_jax.nn.architecture import read_architecture
from aq_jax.nn.models import FAMILIES, Family, LanguageModel, Model
from aq_jax.nn.parallel import shardings
from aq_jax.nn.weights import keep, transpose

WORDS, WIDTH, INNER = 40, 16, 32
LINES = [" ".join(f"w{i}" for i in np.random.default_rng(n).integers(0, WORDS, 4)) for n in range(80)]
IDS = [[int(word[1:]) for word in line.split()] for line in LINES]
GPTQ = aq.QuantizationConfig("int4", group_size=16, symmetric=False, solver="gptq")


@dataclass(frozen=True)
class Sizes:
    """Of both; the second has layers that are wider inside."""

    vocab_size: int
    hidden_size: int
    max_position_embeddings: int = 16


def read(fields: Mapping[str, Any], where: str) -> Sizes:
    given = Fields(fields, where)
    return Sizes(given.take("words", int), given.take("dim", int))


class Once(nnx.Module):
    def __init__(self, config: Sizes, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(config.hidden_size, config.hidden_size, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        return jnp.tanh(self.linear(x))


class Bag(Model):
    """An encoder of one linear layer; the folder says nothing of sentences, so that they are means."""

    table = "words.embedding"

    def __init__(self, config: Sizes, *, activations: str, rngs: nnx.Rngs) -> None:
        self.config = config
        self.words = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = nnx.List([Once(config, rngs)])

    def begin(self, ids: jax.Array) -> jax.Array:
        return self.words(ids)


class Bottle(nnx.Module):
    def __init__(self, config: Sizes, activations: str, rngs: nnx.Rngs) -> None:
        self.activations = activations
        self.widen = nnx.Linear(config.hidden_size, INNER, use_bias=False, rngs=rngs)
        self.narrow = nnx.Linear(INNER, config.hidden_size, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        return x + self.narrow(nnx.relu(self.widen(x)))


class Pairs(LanguageModel):
    """Each token says what follows it; there is nothing to keep in a cache."""

    table = "pieces.embedding"

    def __init__(self, config: Sizes, *, activations: str, rngs: nnx.Rngs) -> None:
        self.config = config
        self.pieces = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = nnx.List([Bottle(config, activations, rngs) for _ in range(2)])

    def begin(self, ids: jax.Array) -> jax.Array:
        return self.pieces(ids)

    def empty_cache(self, batch: int, positions: int, dtype: str = "float32") -> list:
        return []

    def extend(self, ids: jax.Array, cache: list, start: Any, first: Any = None) -> tuple[jax.Array, list]:
        return self(ids, ids >= 0), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        return self.pieces.attend(hidden)


BAG = Family(
    ("bag",), "embed", read, Bag,
    lambda config: (
        ("lookup", "words.embedding", keep),
        (r"mix\.w", "layers.0.linear.kernel", transpose),
        (r"mix\.b", "layers.0.linear.bias", keep),
        ("verdict", None, keep),
    ),
    heads="verdict",
)  # fmt: skip
PAIRS = Family(
    ("pairs",), "generate", read, Pairs,
    lambda config: (
        ("lookup", "pieces.embedding", keep),
        (r"block(\d)\.(widen|narrow)", r"layers.\1.\2.kernel", transpose),
    ),
    cuts={"widen": 0, "narrow": 1},
    kinds={"feed-forward": "block"},
)  # fmt: skip


def weights(kind: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"lookup": (WORDS, WIDTH)}
    if kind == "bag":
        shapes |= {"mix.w": (WIDTH, WIDTH), "mix.b": (WIDTH,), "verdict": (2, WIDTH)}
    else:
        shapes |= {f"block{i}.widen": (INNER, WIDTH) for i in range(2)}
        shapes |= {f"block{i}.narrow": (WIDTH, INNER) for i in range(2)}
    return {name: rng.normal(size=shape).astype(np.float32) / 2 for name, shape in shapes.items()}


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model as others would leave it, of a family that is known for this test."""
    kind = request.param
    monkeypatch.setitem(FAMILIES, kind, {"bag": BAG, "pairs": PAIRS}[kind])
    out = tmp_path / "model"
    out.mkdir()
    safetensors.numpy.save_file(weights(kind), out / "model.safetensors")
    (out / "config.json").write_text(json.dumps({"model_type": kind, "words": WORDS, "dim": WIDTH}))
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(out / "tokenizer.json"))
    (tmp_path / "lines.txt").write_text("\n".join(LINES))
    return out


def convert(folder: Path, **options: Any) -> Any:
    calibration = aq.CalibrationConfig(str(folder.parent / "lines.txt"), sentences=40)
    output = str(folder.parent / "out" / "m.parquet")
    return aq.convert(aq.ConversionConfig(str(folder), output, GPTQ, calibration=calibration, **options))


def solvers(table: str) -> dict[str, str | None]:
    with aq.WeightLoader(table) as loader:
        return {name: loader.describe(name).solver for name in loader.get_layer_names()}


@pytest.mark.parametrize("folder", ["bag"], indirect=True)
def test_an_encoder_of_another_family_is_calibrated_trained_and_embeds(folder: Path) -> None:
    done = convert(folder, train=aq.TrainingConfig(steps=4, minutes=0, held_out=8, batch_tokens=64))
    found = solvers(done.path)
    assert (found["lookup"], found["mix.w"]) == ("trained", "trained")
    assert done.training is not None
    assert done.training["cosine"] > 0.98
    with pytest.warns(UserWarning, match="verdict are a classifier's, and not used to embed"):
        model = aq.load_model(done.path)
    t = aq.load(done.path, "numpy")
    hidden = np.tanh(t["lookup"][IDS] @ t["mix.w"].T + t["mix.b"])
    np.testing.assert_allclose(model.encode(LINES), hidden.mean(1), atol=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("folder", ["pairs"], indirect=True)
def test_a_language_model_of_another_family_is_given_its_bits_calibrated_and_generates(folder: Path) -> None:
    # 1.5 or 2 bits more are scales and zero points.
    done = convert(folder, allocate=aq.AllocationConfig(target_bpw=8, widths=("int4", "int8"), sentences=8))
    found = solvers(done.path)
    assert "gptq" in found.values()
    assert done.allocation["bpw"] <= 8
    assert done.allocation["cosine"] > 0.98
    model = aq.load_model(done.path)
    t = {name: array.astype(np.float64) for name, array in aq.load(done.path, "numpy").items()}
    x = t["lookup"]
    for i in range(2):
        x = x + np.maximum(x @ t[f"block{i}.widen"].T, 0) @ t[f"block{i}.narrow"].T
    logits = x @ t["lookup"].T
    log = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    wanted = log[IDS[0][:-1], IDS[0][1:]]
    np.testing.assert_allclose(model.score(LINES[0]), wanted, atol=1e-4)  # type: ignore[union-attr]
    ids = [IDS[0][0]]
    for _ in range(5):
        ids.append(int(log[ids[-1]].argmax()))
    assert model.generate_ids(ids[:1], 5) == ids[1:]  # type: ignore[union-attr]
    with pytest.raises(aq.ConfigError, match=r"\[train\]: the model is a pairs; wanted an encoder: bert"):
        convert(folder, train=aq.TrainingConfig(steps=1))


@pytest.mark.parametrize("folder", ["pairs"], indirect=True)
def test_its_layers_are_cut_and_told_as_it_says(folder: Path) -> None:
    mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,))
    aq.save(folder.parent / "m.parquet", weights("pairs"))
    with aq.WeightLoader(folder.parent / "m.parquet") as loader:
        infos = {name: loader.describe(name) for name in loader.get_layer_names()}
    found = shardings(infos, read_architecture(folder), mesh)
    wanted = {"lookup": (), "block0.widen": ("model", None), "block1.narrow": (None, "model")}
    assert {name: found[name].spec for name in wanted} == {n: PartitionSpec(*axes) for n, axes in wanted.items()}
    assert [PAIRS.kind(name) for name in wanted] == ["other", "feed-forward", "feed-forward"]
