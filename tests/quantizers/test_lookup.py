"""Names and objects in a config: which quantizer they mean, and what is refused, before anything is read."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

import aq_jax as aq
from aq_jax import QUANTIZERS, ConfigError, Override, QuantizationConfig, TrainingConfig
from aq_jax.codes import Affine
from aq_jax.quantizers import Quantizer
from aq_jax.quantizers.absmax import AbsMax
from aq_jax.quantizers.lookup import candidates, quantizer_of


@dataclasses.dataclass
class Unhashable(Quantizer):
    name = "unhashable"


class Nameless:
    needs, grids = "weights", ("symmetric",)

    def __call__(self, *_: Any) -> None: ...


# What a config says -> the error.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"solver": "gptqq"}, "solver = 'gptqq': wanted one of absmax, minmax, mse, viterbi, gptq; did you mean 'gptq'?"),
    ({"solver": "search"}, "solver = 'search' is called 'mse' now: write solver = 'mse'"),
    ({"solver": "absmax", "symmetric": False}, "solver = 'absmax' is symmetric: set symmetric = true, or solver = "
     "'minmax' or 'mse' or 'gptq'"),
    ({"solver": "minmax"}, "solver = 'minmax' is asymmetric: set symmetric = false, or solver = 'absmax' or 'mse'"),
    ({"solver": AbsMax(), "symmetric": False}, "solver = 'absmax' is symmetric"),
    ({"solver": AbsMax}, "is not a quantizer; wanted a name, or an object of a subclass of aq_jax.quantizers.Quan"),
    ({"solver": Unhashable()}, "cannot be hashed, and programs are compiled for it; make it a frozen dataclass"),
    ({"overrides": (Override("x", solver="minmax"),)}, "override 'x': solver = 'minmax' is asymmetric"),
    ({"overrides": (Override("x", solver="serch"),)}, "override 'x': solver = 'serch': wanted one of absmax"),
    ({"overrides": (Override("x", solver="absmax", symmetric=False),)}, "override 'x': solver = 'absmax' is symmetric"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "text"), REFUSED, ids=[str(given)[:40] for given, _ in REFUSED])
def test_what_is_no_quantizer_is_refused_before_anything_is_read(given: dict[str, Any], text: str) -> None:
    config = QuantizationConfig(**given)
    for call in (
        lambda: aq.quantize([[1.0]], config),
        lambda: aq.quantize_tree({}, config),
        lambda: aq.quantize_file("nowhere.parquet", "out.parquet", config),
        lambda: aq.convert(aq.ConversionConfig("nowhere", "out.parquet", config)),
        lambda: aq.convert(aq.ConversionConfig("nowhere", "out", config)),
    ):
        with pytest.raises(ConfigError, match=re.escape(text)):
            call()


def test_an_object_without_a_name_is_refused_when_the_config_is_made() -> None:
    with pytest.raises(ConfigError, match="wanted the name of a quantizer, or an object that has one"):
        QuantizationConfig(solver=Nameless())  # type: ignore[arg-type]


def test_an_entry_is_found_under_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(QUANTIZERS, "other", AbsMax())
    with pytest.raises(ConfigError, match=r"QUANTIZERS\['other'\]: its name is 'absmax'"):
        aq.quantize([[1.0]], QuantizationConfig(solver="other"))


def test_training_needs_a_quantizer_of_the_running_model() -> None:
    config = aq.ConversionConfig("nowhere", "m.parquet", QuantizationConfig("int4"), train=TrainingConfig())
    with pytest.raises(ConfigError, match=r'\[train\]: found no tensor whose weights are trained; wanted .* = "gptq"'):
        aq.convert(config)


def test_a_quantizer_stays_where_an_override_asks_for_the_grids_that_it_makes() -> None:
    config = QuantizationConfig("int4", solver="absmax", overrides=(Override("x", symmetric=True),))
    assert quantizer_of(config.for_tensor("x")).name == "absmax"


def test_candidates_are_counted() -> None:
    found = {
        (name, symmetric): candidates(entry, Affine(4), symmetric)
        for name, entry in QUANTIZERS.items()
        for symmetric in (True, False)
    }
    assert {key for key, count in found.items() if count == 2} == {("mse", True)}
    assert set(found.values()) == {1, 2}
