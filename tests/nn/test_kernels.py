"""Models by kernels that this file alone registers: those that prepare their weights, and those of attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bert_oracle
import jax.numpy as jnp
import numpy as np
import pytest
import small_bert
import small_llama
from flax import nnx
from panels import NAME, PanelRows, Panels

import aq_jax as aq
from aq_jax.nn import Encoder, Generator, QEmbed, QLinear, quantize_module
from aq_jax.nn.layers import PreparedWeight
from aq_jax.ops import KERNELS
from aq_jax.ops.kernels import VARIABLE

INT4 = aq.QuantizationConfig("int4", group_size=16, solver="absmax")
CONFIG = {**bert_oracle.CONFIG, "num_hidden_layers": 1}
IDS = [[2, 7, 9, 4], [5, 6]]
pytestmark = pytest.mark.usefixtures("unforced")


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    bert = small_bert.make(tmp_path_factory.mktemp("bert"), INT4, CONFIG)
    llama = small_llama.make(tmp_path_factory.mktemp("llama") / "model", INT4, shared=True)
    return {"bert": bert, "llama": llama}


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> Panels:
    """Before XLA's: they are taken where nothing is asked for."""
    own = Panels()
    monkeypatch.setitem(KERNELS, "product", {NAME: own} | KERNELS["product"])
    monkeypatch.setitem(KERNELS, "rows", {NAME: PanelRows()} | KERNELS["rows"])
    return own


def answer(model: Encoder | Generator) -> np.ndarray:
    """What a model says, as one array."""
    if isinstance(model, Encoder):
        return np.asarray(model.encode_ids(IDS))
    return model.log_probabilities(IDS[0])


def layers(model: Any) -> dict[str, QLinear | QEmbed]:
    return {
        ".".join(map(str, path)): layer
        for path, layer in nnx.iter_modules(model)
        if isinstance(layer, QLinear | QEmbed)
    }


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_loaded_model_has_its_weights_prepared(
    kind: str, tables: dict[str, Path], monkeypatch: pytest.MonkeyPatch, request: Any, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv(VARIABLE, "xla")
        plain = aq.load_model(tables[kind])
        wanted, stored = answer(plain), {name: layer.qtensor for name, layer in layers(plain.model).items()}
    panels: Panels = request.getfixturevalue("panels")
    model = aq.load_model(tables[kind])
    found = layers(model.model)
    linears = sum(isinstance(layer, QLinear) for layer in found.values())
    assert panels.made == linears >= 6
    np.testing.assert_allclose(answer(model), wanted, rtol=1e-5, atol=1e-5)
    assert panels.made == linears  # nothing was made in the program
    variables = [layer.weight if isinstance(layer, QLinear) else layer.table for layer in found.values()]
    assert all(isinstance(variable, PreparedWeight) for variable in variables)
    assert model.nbytes == plain.nbytes > 0  # turned, and not held twice
    for name, q in stored.items():
        back = found[name].qtensor
        assert (back.spec, back.length) == (q.spec, q.length)
        for part in ("codes", "scale", "zero_point"):
            assert np.array_equal(getattr(back, part), getattr(q, part)), name
    # It is stored as the model that has nothing prepared.
    for name, each in (("plain", plain), ("prepared", model)):
        state = nnx.to_flat_state(nnx.state(each.model))
        aq.save(tmp_path / f"{name}.arrow", {".".join(map(str, path)): leaf for path, leaf in state})
    assert (tmp_path / "plain.arrow").read_bytes() == (tmp_path / "prepared.arrow").read_bytes()
    # A kernel that is forced later is another program, and is given the QTensors.
    compiles = model.compiles
    monkeypatch.setenv(VARIABLE, "xla")
    np.testing.assert_allclose(answer(model), wanted, rtol=1e-5, atol=1e-5)
    assert model.compiles == compiles + 1


def test_a_module_has_its_weights_prepared_unless_they_are_to_be_cut(panels: Panels) -> None:
    whole, cut = (nnx.Linear(16, 16, rngs=nnx.Rngs(0)) for _ in range(2))
    cut.kernel.set_metadata("out_sharding", (None, "model"))
    model = quantize_module(nnx.Sequential(whole, cut), INT4)
    assert [type(layer.weight) for layer in model.layers] == [PreparedWeight, nnx.Param]
    assert isinstance(model.layers[1].weight.get_value(), aq.QTensor)
    x = jnp.ones((2, 16))
    wanted = (x @ aq.dequantize(model.layers[0].qtensor).T) @ aq.dequantize(model.layers[1].qtensor).T
    np.testing.assert_allclose(model(x), wanted, rtol=1e-5)


class Nothing:
    """Attention that sees nothing, of texts of at most 32 tokens."""

    def refuses(self, query: Any, *rest: Any) -> str:
        return "" if query.shape[1] <= 32 else f"takes at most 32 tokens, found {query.shape[1]}"

    def run(self, query: Any, *rest: Any) -> Any:
        return jnp.zeros_like(query)


@pytest.mark.parametrize(("kind", "operation"), [("bert", "attention"), ("llama", "cached_attention")])
def test_attention_is_a_kernels_and_none_that_is_forced_is_lost_in_a_program(
    kind: str, operation: str, tables: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KERNELS, operation, KERNELS[operation] | {"nothing": Nothing()})
    model = aq.load_model(tables[kind])
    wanted, compiles = answer(model), model.compiles
    monkeypatch.setenv(VARIABLE, "nothing")
    assert np.abs(answer(model) - wanted).max() > 1e-3
    monkeypatch.delenv(VARIABLE)
    assert np.array_equal(answer(model), wanted)
    assert model.compiles == compiles + 1
    monkeypatch.setenv(VARIABLE, "nothing")
    longer: Callable[[], Any] = (
        (lambda: model.encode_ids([[5] * 40])) if isinstance(model, Encoder) else lambda: model.score("a" * 40)
    )
    with pytest.raises(aq.ConfigError, match=rf"^{operation}: kernel 'nothing': takes at most 32 tokens, found"):
        longer()
