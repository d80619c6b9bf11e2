"""Calibration of small models: what linears are given, what moves, and what is said where nothing can be learned."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import bert_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_llama
from flax import nnx

import aq_jax as aq
from aq_jax import CalibrationConfig, ConfigError, QuantizationConfig, QuantSpec, quantizers
from aq_jax.calibration.layer_inputs import HessianSums, LayerInputs
from aq_jax.calibration.layerwise import CalibrationResult, _gptaq_correction, calibrate, get_weight
from aq_jax.calibration.notes import limit_notes, text_notes
from aq_jax.calibration.text import BATCH_SHAPES, BUILT_IN, Text, built_in_sentences, pad_batches, read_text, tokenize
from aq_jax.nn.models.bert import NAMES, Bert, BertConfig
from aq_jax.nn.sentences import SentenceSettings
from aq_jax.nn.weights import abstract_model, fill
from aq_jax.quantizers import gptq
from aq_jax.store.inspection import inspect_table

CONFIG = BertConfig.from_json(bert_oracle.CONFIG, "test")
LINEARS = ("query", "key", "value", "out", "up", "down")
PATHS = [f"layers.{i}.{name}.kernel" for i in range(2) for name in LINEARS]
POLICY = QuantizationConfig("int2", group_size=16, symmetric=False, rotate=True, solver="gptq")
SENTENCES = [[2, *np.random.default_rng(n).integers(5, 100, 3 + n % 11), 3] for n in range(150)]


def bert(weights: dict[str, np.ndarray] | None = None) -> Bert:
    tensors = bert_oracle.weights() if weights is None else weights
    return fill(abstract_model(lambda rngs: Bert(CONFIG, rngs=rngs)), tensors, NAMES, "float32", "test")


def embeddings(model: Bert, ids: list[list[int]]) -> np.ndarray:
    out = []
    for padded, lengths in pad_batches(ids):
        mask = jnp.arange(padded.shape[1]) < lengths[:, None]
        out.append(np.asarray(SentenceSettings().unit_embeddings(model(jnp.asarray(padded), mask), mask))[lengths > 0])
    return np.concatenate(out)


def run(
    correction: float = 0.5, policies: dict[str, QuantizationConfig] | None = None, model: Bert | None = None
) -> tuple[Bert, CalibrationResult]:
    model = bert() if model is None else model
    quantized = nnx.clone(model)
    policies = dict.fromkeys(PATHS, POLICY) if policies is None else policies
    config = CalibrationConfig(correction=correction)
    done = calibrate(model, quantized, policies, pad_batches(SENTENCES), config, lambda path: get_weight(model, path))
    return quantized, done


@pytest.fixture(scope="module")
def solved() -> tuple[Bert, CalibrationResult]:
    return run()


def test_moments_are_those_of_the_numpy_forward() -> None:
    model, ids = bert(), SENTENCES[:20]
    inputs = LayerInputs(model, model, pad_batches(ids))
    assert inputs.linears_by_input == [["query", "key", "value"], ["out"], ["up"], ["down"]]
    inputs.advance()
    hessians = inputs.hessian_sums(0)
    one_layer = {**bert_oracle.CONFIG, "num_hidden_layers": 1}
    x = np.concatenate([bert_oracle.hidden_states(bert_oracle.weights(), text, one_layer) for text in ids])
    assert int(hessians.tokens) == sum(map(len, ids)) == len(x)
    np.testing.assert_allclose(hessians.own, x.T @ x, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(hessians.cross, hessians.own, rtol=1e-5)
    assert inputs.hessian_sums(3).own.shape == (64, 64)


def test_every_linear_is_solved_and_programs_do_not_grow_with_layers(solved: tuple[Bert, CalibrationResult]) -> None:
    quantized, done = solved
    assert set(done.weights) == set(PATHS)
    assert done.fallbacks == {}
    assert done.tokens == sum(map(len, SENTENCES))
    assert done.compiles == 7 * BATCH_SHAPES  # begin, each of four stages, the output, and all of them
    for path, q in done.weights.items():
        layer, name = path.split(".")[1:3]
        kernel = getattr(quantized.layers[int(layer)], name).kernel
        np.testing.assert_allclose(kernel[...].T, aq.dequantize(q), atol=1e-6)
        assert 0 < done.errors[path] < 0.2


@pytest.mark.slow
def test_it_beats_mse_and_the_correction_helps_end_to_end(solved: tuple[Bert, CalibrationResult]) -> None:
    fresh = [[2, *np.random.default_rng(10_000 + n).integers(5, 100, 3 + n % 11), 3] for n in range(100)]
    wanted = embeddings(bert(), fresh)
    config = QuantizationConfig("int2", group_size=16, symmetric=False, rotate=True)
    names = [name for name, w in bert_oracle.weights().items() if "encoder" in name and w.ndim == 2]
    searched = {
        name: np.asarray(aq.dequantize(aq.quantize(w, config))) if name in names else w  # type: ignore[arg-type]
        for name, w in bert_oracle.weights().items()
    }
    cosines = [
        float((embeddings(model, fresh) * wanted).sum(1).mean())
        for model in (bert(searched), run(correction=0.0)[0], solved[0])
    ]
    assert cosines[0] < cosines[1] < cosines[2]


@pytest.mark.slow
def test_embeddings_are_solved_under_the_gradient() -> None:
    policies = dict.fromkeys(("word.embedding", "position.embedding", "token_type.embedding"), POLICY)
    assert set(run(policies=policies)[1].weights) == set(policies)
    config = QuantizationConfig("int2", group_size=16, symmetric=False, rotate=True)
    name, weights = "embeddings.word_embeddings.weight", bert_oracle.weights()
    searched = weights | {name: np.asarray(aq.dequantize(aq.quantize(weights[name], config)))}  # type: ignore[arg-type]
    wanted = embeddings(bert(), SENTENCES)
    only_word, _ = run(policies={"word.embedding": POLICY})
    cosines = [(embeddings(model, SENTENCES) * wanted).sum(1).mean() for model in (bert(searched), only_word)]
    assert cosines[0] < cosines[1]


def test_layers_that_are_given_zeros_and_scales_that_float32_does_not_hold_are_named() -> None:
    """The latter are left to mse, which refuses them."""
    weights = bert_oracle.weights()
    for part in ("weight", "bias"):
        weights[f"encoder.layer.1.attention.self.value.{part}"] *= 0  # so that `out` is given zeros
    weights["encoder.layer.0.attention.self.key.weight"] *= np.float32(1e-38)
    _, done = run(model=bert(weights))
    assert done.fallbacks == {
        "layers.0.key.kernel": "its weights need scales that float32 cannot hold",
        "layers.1.out.kernel": "its inputs were all zero on this text",
    }
    assert done.errors["layers.1.value.kernel"] == 0
    assert all(0 <= error < 1 for error in done.errors.values())


def test_an_embedding_on_which_nothing_depends_is_named() -> None:
    weights = bert_oracle.weights()
    for part in ("weight", "bias"):
        weights[f"encoder.layer.1.output.LayerNorm.{part}"] *= 0
    _, done = run(policies={"word.embedding": POLICY}, model=bert(weights))
    assert done.fallbacks == {"word.embedding": "the model's output did not depend on it on this text"}
    assert not done.weights


def test_little_damping_grows_until_float32_has_a_correction() -> None:
    """Moments of fewer tokens than inputs have no inverse."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 384)).astype(np.float32)
    f = x + 0.1 * rng.normal(size=x.shape).astype(np.float32)
    sums = HessianSums(jnp.asarray(x.T @ x), jnp.asarray(x.T @ f), jnp.asarray(20.0))
    found = {damping: np.asarray(_gptaq_correction(sums, damping)) for damping in (1e-6, 1e-4)}
    assert np.isfinite(found[1e-6]).all()
    assert 0.5 < np.linalg.norm(found[1e-6]) / np.linalg.norm(found[1e-4]) < 3


def test_solved_values_that_are_no_better_than_zeros_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    solve = gptq.solve_matrix

    def tiny(*given: Any, **settings: Any) -> Any:
        q = solve(*given, **settings)
        return dataclasses.replace(q, scale=q.scale * np.float32(1e-25))

    monkeypatch.setattr(gptq, "solve_matrix", tiny)
    path = "layers.0.up.kernel"
    _, done = run(policies={path: QuantizationConfig("tcq3", group_size=0, solver="gptq")})
    assert done.fallbacks == {path: "its solved values are no better than zeros: their relative error is 1"}


def test_numbers_that_are_not_finite_are_named() -> None:
    weights = bert_oracle.weights()
    weights["encoder.layer.0.output.dense.bias"][3] = np.inf
    with pytest.raises(aq.AqError, match=r"layers\.1\.query\.kernel: its inputs are not finite"):
        run(model=bert(weights))


# ------------------------------------------------------------------------------------------------ text


def test_text_is_drawn_by_its_seed(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("\n".join(f" line {n} " for n in range(50)) + "\n\n   \n")
    first, again = (read_text(CalibrationConfig(str(tmp_path / "t.txt"), 20, seed=3)) for _ in range(2))
    other = read_text(CalibrationConfig(str(tmp_path / "t.txt"), 20, seed=4))
    assert first == again
    assert first.record() == again.record()
    assert first.record()["digest"] != other.record()["digest"]
    assert len(set(first.lines)) == 20
    assert all(line == line.strip() and line for line in first.lines)
    assert first.record() | {"digest": ""} == {"text": "t.txt", "sentences": 20, "digest": "", "seed": 3}


def test_the_text_that_is_always_there_is_prose() -> None:
    found = built_in_sentences()
    assert len(found) > 800
    assert sum(len(sentence.split()) for sentence in found) / len(found) > 8
    assert read_text(CalibrationConfig(sentences=5)).name == BUILT_IN


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", "holds no text"),
        (b" \n\n", "holds no text"),
        (b"\xff\xfe", "utf-8"),
        (None, "no such file"),
    ],
)
def test_text_that_is_none_is_refused(tmp_path: Path, content: bytes | None, error: str) -> None:
    path = tmp_path / "t.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"calibration\.text = .*t\.txt.*{error}"):
        read_text(CalibrationConfig(str(path)))


@pytest.mark.parametrize(
    ("name", "error"),
    [(".", "Is a directory"), ("t.txt/x", "Not a directory"), ("a" * 300, "File name too long")],
)
def test_a_text_that_cannot_be_read_is_refused_by_its_key(tmp_path: Path, name: str, error: str) -> None:
    (tmp_path / "t.txt").write_text("the cat")
    with pytest.raises(ConfigError, match=rf"^calibration\.text = '.*': {error}; wanted UTF-8, a sentence a line$"):
        read_text(CalibrationConfig(str(tmp_path / name)))


@pytest.mark.parametrize(
    "values", [{"sentences": 0}, {"max_tokens": 2}, {"correction": 1.5}, {"damping": 0.0}, {"seed": -1}]
)
def test_numbers_out_of_range_are_refused(values: dict[str, Any]) -> None:
    key = next(iter(values))
    with pytest.raises(ConfigError, match=f"{key} = "):
        CalibrationConfig(**values)


def test_lines_that_are_cut_are_counted() -> None:
    lines = ["the cat", "the cat sat", "the cat sat on the mat"]  # two special tokens stand around them
    ids, cut = tokenize(lines, bert_oracle.tokenizer(), 5, 100)
    assert [len(each) for each in ids] == [4, 5, 5]
    assert cut == 1


@pytest.mark.parametrize(
    ("values", "longest", "cut", "notes"),
    [
        ({}, 16, 0, []),
        ({"sentences": 2, "max_tokens": 16}, 16, 0, []),
        ({"sentences": 9}, 16, 0, ["calibration.sentences = 9: t.txt has 2 lines to calibrate on"]),
        ({"max_tokens": 20}, 16, 0, ["calibration.max_tokens = 20: the model takes 16 tokens; lines are cut there"]),
        ({"max_tokens": 9}, 9, 1, ["1 of 2 lines to calibrate on have more than 9 tokens, and are cut there"]),
        ({"joined": True, "sentences": 9}, 16, 2, ["calibration.sentences = 9: t.txt has 2 windows to calibrate on"]),
    ],
)
def test_what_exceeds_the_text_or_the_model_is_noted(
    values: dict[str, Any], longest: int, cut: int, notes: list[str]
) -> None:
    text = Text("t.txt", ("the cat", "the dog"), 0)
    assert list(limit_notes(text, CalibrationConfig(**values), longest, cut)) == notes


# ------------------------------------------------------------------------------------------------ files

GPTQ = QuantizationConfig("int2", group_size=16, symmetric=False, solver="gptq", rotate=True)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    rng = np.random.default_rng(0)
    aq.save(folder / "m.parquet", bert_oracle.weights() | {"pooler.dense.weight": rng.normal(size=(32, 32))})
    bert_oracle.write_side_files(folder)
    lines = [" ".join(rng.choice(bert_oracle.WORDS, 6)) for _ in range(120)]
    (folder / "text.txt").write_text("\n".join(lines))
    return folder / "m.parquet"


@pytest.mark.slow
def test_a_table_is_calibrated_and_says_on_what(table: Path, run: Any) -> None:
    text, first, second = (table.parent / name for name in ("text.txt", "first.parquet", "second.parquet"))
    seen: list[str] = []
    done = aq.quantize_file(
        table, first, GPTQ, calibration=CalibrationConfig(str(text)), progress=lambda name, *_: seen.append(name)
    )
    assert done.notes == ["pooler.dense.weight: the model does not use it; quantized by mse"]
    assert any(name.startswith("calibrating encoder.layer.1") for name in seen)
    layers = {layer.name: layer for layer in inspect_table(first).layers}
    assert layers["encoder.layer.0.attention.self.query.weight"].quant_type == "int2h"
    with aq.WeightLoader(first) as loader:
        rows = {name: loader.describe(name) for name in loader.get_layer_names()}
    assert rows["encoder.layer.0.attention.self.query.weight"].solver == "gptq"
    assert rows["pooler.dense.weight"].solver == "mse"
    record = inspect_table(first).config["calibration"]
    assert (record["text"], record["sentences"], len(record["digest"])) == ("text.txt", 120, 64)
    assert (record["max_tokens"], record["joined"]) == (128, False)
    assert set(record["output_errors"]) == {name for name, row in rows.items() if row.solver == "gptq"}
    floats, quantized = (aq.load_model(path) for path in (table, first))
    sentences = ["cats sat on mats", "the sun", "a dog runs"]
    cosines = (np.asarray(floats.encode(sentences)) * np.asarray(quantized.encode(sentences))).sum(1)  # type: ignore[union-attr]
    assert (cosines > 0.7).all()
    # The same text and seed give the same bytes, from the shell too.
    status, out, err = run(
        "quantize", table, second, "--quant-type", "int2", "--group-size", 16, "--asymmetric", "--rotate",
        "--solver", "gptq", "--text", text,
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert "note: pooler.dense.weight: the model does not use it; quantized by mse" in out
    assert first.read_bytes() == second.read_bytes()


@dataclasses.dataclass(frozen=True)
class Rounded(quantizers.Calibrated):
    """absmax, which does not care for inputs but insists on having them."""

    name = "rounded"
    fallback = "absmax"

    def check(self, spec: QuantSpec, shape: tuple[int, ...], where: str) -> None:
        assert len(shape) == 2, where

    def prepare_hessian(self, hessian: Any, damping: float, rotation: int) -> Any:
        return hessian

    def solve(self, w: Any, hessian: Any, spec: QuantSpec, symmetric: bool, quick: bool = False) -> Any:
        assert hessian.shape == (w.shape[1], w.shape[1])
        return jax.device_get(aq.quantize(w, QuantizationConfig("int4", group_size=16, solver="absmax")))


@pytest.mark.slow
def test_a_calibrated_quantizer_that_only_this_test_knows(table: Path, tmp_path: Path) -> None:
    linear, unused = "encoder.layer.1.output.dense.weight", "pooler.dense.weight"
    overrides = tuple(
        aq.Override(re.escape(name), "int4", group_size=16, solver=Rounded()) for name in (linear, unused)
    )
    config = QuantizationConfig("fp16", overrides=overrides)
    calibration = CalibrationConfig(str(table.parent / "text.txt"), sentences=8, correction=0)
    done = aq.quantize_file(table, tmp_path / "m.parquet", config, calibration=calibration)
    assert f"{unused}: the model does not use it; quantized by absmax" in done.notes
    with aq.WeightLoader(tmp_path / "m.parquet") as loader:
        assert [loader.describe(name).solver for name in (linear, unused)] == ["rounded", "absmax"]
        found = loader.get_quantized(linear)
    wanted = aq.quantize(bert_oracle.weights()[linear], QuantizationConfig("int4", group_size=16, solver="absmax"))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.slow
def test_little_text_and_the_built_in_one_are_noted(table: Path) -> None:
    (table.parent / "one.txt").write_text("the cat")
    calibration = CalibrationConfig(text=str(table.parent / "one.txt"))
    done = aq.quantize_file(table, table.parent / "o.parquet", GPTQ, calibration=calibration)
    assert (
        done.notes[0]
        == "calibrated on 4 tokens, fewer than the 64 inputs of the widest layer: more text would serve better"
    )
    (note,) = text_notes(read_text(CalibrationConfig(sentences=7)), CalibrationResult())
    assert note.startswith("calibrated on 7 sentences of Python's reference manual: English, but about one subject")


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (QuantizationConfig("int4", per_channel=False, solver="gptq"), "gptq.*found one grid a tensor of shape"),
        (QuantizationConfig("int4", group_size=48, solver="gptq"), "gptq.*found groups of 48 of shape"),
    ],
)
def test_grids_that_gptq_does_not_have_are_refused_by_name(table: Path, config: QuantizationConfig, error: str) -> None:
    with pytest.raises(ConfigError, match=rf"embeddings\.\w+\.weight: solver = '{error}"):
        aq.quantize_file(table, table.parent / "no.parquet", config)
    assert not (table.parent / "no.parquet").exists()


def test_without_a_model_it_is_refused_by_name(tmp_path: Path) -> None:
    aq.save(tmp_path / "w.parquet", {"w": np.ones((4, 16), np.float32)})
    with pytest.raises(aq.FormatError, match=r"config\.json: no such file"):
        aq.quantize_file(tmp_path / "w.parquet", tmp_path / "q.parquet", GPTQ)
    with pytest.raises(ConfigError, match=r"weight: solver = 'gptq' runs the model, which is not known here"):
        aq.quantize(np.ones((4, 16), np.float32), GPTQ)
    assert list(tmp_path.iterdir()) == [tmp_path / "w.parquet"]


def test_weights_that_are_not_finite_are_refused_by_name(table: Path, tmp_path: Path) -> None:
    weights = bert_oracle.weights()
    weights["encoder.layer.0.output.dense.weight"][3, 5] = np.nan
    aq.save(tmp_path / "m.parquet", weights)
    bert_oracle.write_side_files(tmp_path)
    with pytest.raises(aq.AqError, match=r"encoder\.layer\.0\.output\.dense\.weight: 1 of .* values are not finite"):
        aq.quantize_file(tmp_path / "m.parquet", tmp_path / "q.parquet", GPTQ)


@pytest.mark.slow
def test_a_llama_loses_less_than_by_mse(tmp_path: Path) -> None:
    path, text = small_llama.make(tmp_path), "the an ab then a hen "
    (tmp_path / "t.txt").write_text("\n".join(text[n:] + text[:n] for n in range(20)))
    base = QuantizationConfig("int2", group_size=16, symmetric=False)
    scores = [np.asarray(aq.load_model(path).score("then the hen an ab"))]  # type: ignore[union-attr]
    for solver in ("mse", "gptq"):
        calibration = CalibrationConfig(text=str(tmp_path / "t.txt"))
        config = dataclasses.replace(base, solver=solver)
        done = aq.quantize_file(path, tmp_path / f"{solver}.parquet", config, calibration=calibration)
        scores.append(np.asarray(aq.load_model(done.path).score("then the hen an ab")))  # type: ignore[union-attr]
    searched, calibrated = (np.square(found - scores[0]).mean() for found in scores[1:])
    assert calibrated < 0.7 * searched
