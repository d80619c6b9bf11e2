"""What one rounded tensor does to a model's outputs, against the same in NumPy."""

from __future__ import annotations

import bert_oracle
import jax.numpy as jnp
import numpy as np
import pytest

from aq_jax import AqError
from aq_jax.calibration.layer_inputs import LayerInputs
from aq_jax.calibration.sensitivity import NOISE, FloatOutputs, input_hessians, sensitivities
from aq_jax.calibration.text import choose_common_length, pad_to_one_shape
from aq_jax.codes.rotation import rotate_rows
from aq_jax.nn.models.bert import NAMES, Bert, BertConfig
from aq_jax.nn.sentences import SentenceSettings
from aq_jax.nn.weights import abstract_model, fill
from aq_jax.quantizers.hessian import prepare_hessian

CONFIG = BertConfig.from_json(bert_oracle.CONFIG, "test")
SENTENCES = [[2, *np.random.default_rng(n).integers(5, 60, 1 + n % 9).tolist(), 3] for n in range(70)]
TOKENS = np.unique([i for ids in SENTENCES for i in ids])
UP, QUERY, WORD = "layers.1.up.kernel", "layers.0.query.kernel", "word.embedding"
STORED = {
    UP: "encoder.layer.1.intermediate.dense.weight",
    QUERY: "encoder.layer.0.attention.self.query.weight",
    WORD: "embeddings.word_embeddings.weight",
}
ROTATIONS = {UP: 0, QUERY: 16, WORD: 16}  # Hadamard blocks


@pytest.fixture(scope="module")
def model() -> Bert:
    return fill(abstract_model(lambda rngs: Bert(CONFIG, rngs=rngs)), bert_oracle.weights(), NAMES, "float32", "test")


@pytest.fixture(scope="module")
def outputs(model: Bert) -> FloatOutputs:
    return FloatOutputs(model, pad_to_one_shape(SENTENCES, 16), SentenceSettings())


@pytest.fixture(scope="module")
def hessians(model: Bert) -> dict[str, jnp.ndarray]:
    return dict(input_hessians(model, pad_to_one_shape(SENTENCES, 16), seed=0))


def test_distances_are_those_of_the_changed_model_alone(
    model: Bert, outputs: FloatOutputs, hessians: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: np.asarray(value) for path, value in _parameters(model).items()}
    changed: dict[str, np.ndarray] = {}
    distance = outputs.distance

    def watched(model: Bert, layer: int | None) -> float:
        path = list(ROTATIONS)[len(changed)]
        changed[path] = np.asarray(_parameters(model)[path])
        return distance(model, layer)

    monkeypatch.setattr(outputs, "distance", watched)
    found = sensitivities(model, ROTATIONS, outputs, hessians, 0.01, TOKENS)
    tensors = bert_oracle.weights()
    goal = bert_oracle.embed(tensors, SENTENCES)
    for path, (error, white) in found.items():
        weight = changed[path] if path == WORD else changed[path].T
        after = bert_oracle.embed(tensors | {STORED[path]: weight}, SENTENCES)
        assert error == pytest.approx(1 - (goal * after).sum(1).mean(), rel=2e-3, abs=1e-9), path
        # The noise is as large, under the inputs, as white noise is before GPTQ makes up for it, and lies where it may.
        change = (weight - tensors[STORED[path]]).astype(np.float64)
        rows = TOKENS if path == WORD else np.arange(len(weight))
        assert not np.delete(change, rows, 0).any()
        prepared = prepare_hessian(hessians[path], 0.01, ROTATIONS[path])
        change = rotate_rows(change, ROTATIONS[path]) if ROTATIONS[path] else change
        size = NOISE * (tensors[STORED[path]][rows].astype(np.float64) ** 2).mean()
        wanted = size / np.diagonal(np.asarray(prepared.u, np.float64)) ** 2
        squares = np.einsum("ri,ij,rj->r", change[rows], np.asarray(prepared.h, np.float64), change[rows])
        assert squares.mean() == pytest.approx(wanted.sum(), rel=0.15), path
        assert white == pytest.approx(np.trace(prepared.h) * size / wanted.sum(), rel=1e-4)
    for path, value in _parameters(model).items():
        np.testing.assert_array_equal(before[path], value, err_msg=path)


def test_a_model_like_the_float_one_has_changed_by_nothing(model: Bert, outputs: FloatOutputs) -> None:
    assert outputs.distance(model) < 1e-13  # programs of other shapes may round otherwise
    assert outputs.distance(model, 1) < 1e-13


def test_hessians_are_those_of_the_layer_inputs(model: Bert, hessians: dict) -> None:
    inputs = LayerInputs(model, model, pad_to_one_shape(SENTENCES, 16))
    for layer in range(2):
        for index, members in enumerate(inputs.linears_by_input):
            sums = inputs.hessian_sums(index)
            for name in members:
                wanted = np.asarray(sums.own / sums.tokens)
                np.testing.assert_allclose(hessians[f"layers.{layer}.{name}.kernel"], wanted, rtol=1e-4, atol=1e-4)
        inputs.advance()
    assert hessians.keys() >= {"word.embedding", "position.embedding", "token_type.embedding"}


def test_all_layers_share_programs(model: Bert, hessians: dict) -> None:
    outputs = FloatOutputs(model, pad_to_one_shape(SENTENCES, 16), SentenceSettings())
    paths = [f"layers.{i}.{name}.kernel" for i in range(2) for name in ("query", "up", "down")]
    sensitivities(model, dict.fromkeys(paths, 16), outputs, hessians, 0.01, TOKENS)
    assert [program.compiles for program in outputs.programs] == [1, 1, 1, 1]


def test_outputs_that_are_not_finite_are_refused_by_name(model: Bert, hessians: dict) -> None:
    outputs = FloatOutputs(model, pad_to_one_shape(SENTENCES[:3], 16), SentenceSettings())
    outputs.states[0] = [jnp.full_like(x, jnp.nan) for x in outputs.states[0]]
    with pytest.raises(AqError, match=r"layers.0.query.kernel: the outputs are not finite when it is rounded"):
        sensitivities(model, {QUERY: 16}, outputs, hessians, 0.01, TOKENS)


def test_nine_texts_in_ten_are_whole() -> None:
    batches = pad_to_one_shape(SENTENCES, choose_common_length([len(ids) for ids in SENTENCES], 128))
    assert {ids.shape for ids, _ in batches} == {(64, 16)}
    assert sum(int((lengths > 0).sum()) for _, lengths in batches) == 70
    found = [ids[row, :n].tolist() for ids, lengths in batches for row, n in enumerate(lengths) if n]
    assert found == SENTENCES
    ((ids, lengths),) = pad_to_one_shape([[1] * 100], 16)
    assert (ids.shape, lengths[0]) == ((64, 16), 16)


def _parameters(model: Bert) -> dict[str, jnp.ndarray]:
    from flax import nnx

    return {
        ".".join(map(str, path)): value[...] for path, value in nnx.iter_graph(model) if isinstance(value, nnx.Param)
    }
