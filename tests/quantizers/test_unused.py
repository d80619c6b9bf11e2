"""Notes of what a config says that holds for no tensor, by every way to quantize a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import aq_jax as aq
from aq_jax import Override, QuantizationConfig
from aq_jax.cli import main
from aq_jax.config import CalibrationConfig, ConversionConfig, ShardsConfig
from aq_jax.quantizers.treatment import treat
from aq_jax.quantizers.unused import unused_notes

SHAPES = {"embed.weight": (4, 64), "dense.weight": (8, 64), "odd.weight": (2, 33), "bias": (8,)}
TREES = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}


def notes(quant_type: str = "int4", **fields: Any) -> list[str]:
    config = QuantizationConfig(quant_type, **fields)
    treatments = {name: treat(config, name, shape, np.dtype(np.float32)) for name, shape in SHAPES.items()}
    return unused_notes(config, treatments, {"lm_head.weight": "embed.weight"})


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, []),
        ({"overrides": (Override("dense", "int8"), Override("weight", group_size=8))}, []),
        ({"mixed_precision_layers": ("embed", "bias")}, []),
        ({"overrides": (Override("dens_e", "int8"),)}, ["override 'dens_e' matches no tensor"]),
        (
            {"overrides": (Override("weight"), Override("dense", "int8"))},
            ["override 'dense' holds for no tensor: overrides before it match all that it does"],
        ),
        (
            {"overrides": (Override("lm_head", "int8"),)},
            ["override 'lm_head' matches no tensor but lm_head.weight, which is tied to embed.weight: name that"],
        ),
        (
            {"overrides": (Override("bias", "int8"),)},
            ["override 'bias' quantizes nothing: what it matches has one axis, or holds no floats"],
        ),
        (
            {"overrides": (Override("dense", "fp16", group_size=8, rotate=True),)},
            ["override 'dense': group_size, rotate: without effect on fp16"],
        ),
        (
            {"mixed_precision_layers": ("embed", "head")},
            ["mixed_precision_layers: 'head' is a part of the name of no tensor but lm_head.weight, which is tied to "
             "embed.weight: name that"],
        ),
        ({"rotate": True, "group_size": 8}, ["not rotated, as their last axis is odd: odd.weight"]),
        ({"quant_type": "fp16", "group_size": 8, "symmetric": False},
         ["group_size, symmetric: without effect on fp16"]),
        ({"quant_type": "none", "group_size": 8, "overrides": (Override("dense", "int4"),)}, []),
    ],
)  # fmt: skip
def test_what_holds_for_no_tensor_is_named(fields: dict[str, Any], wanted: list[str]) -> None:
    assert notes(**fields) == wanted


def test_every_way_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source" / "v1.parquet"  # where nothing lies beside it that would be noted as well
    source.parent.mkdir()
    aq.save(source, TREES)
    config = QuantizationConfig("int4", overrides=(Override("nowhere", "int8"),))
    wanted = ["override 'nowhere' matches no tensor"]
    one = ConversionConfig(str(source), str(tmp_path / "one.parquet"), config)
    assert aq.convert(one).notes == wanted
    many = ConversionConfig(one.source, str(tmp_path / "many") + "/", config, shards=ShardsConfig(size=1500, workers=1))
    assert aq.convert(many).notes == wanted
    assert aq.quantize_file(one.source, tmp_path / "two.parquet", config).notes == wanted
    with pytest.warns(UserWarning, match=wanted[0]):
        aq.quantize_tree({name: jnp.asarray(array) for name, array in TREES.items()}, config)
    toml = tmp_path / "c.toml"
    toml.write_text(
        f"source = {str(one.source)!r}\noutput = 'x.parquet'\n[quantization]\nquant_type = 'int4'\n"
        "[[override]]\npattern = 'nowhere'\nquant_type = 'int8'\n"
    )
    assert main(["convert", str(toml), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == wanted


def test_a_text_that_nothing_reads_is_said(tmp_path: Path) -> None:
    aq.save(tmp_path / "v1.parquet", TREES)
    done = aq.quantize_file(
        tmp_path / "v1.parquet", tmp_path / "v2.parquet", "int8", calibration=CalibrationConfig(text="nowhere.txt")
    )
    assert done.notes == ["calibration: without effect, as no solver runs the model; its text is not read"]


def test_a_part_of_every_name_is_refused() -> None:
    with pytest.raises(aq.ConfigError, match="mixed_precision_layers has an empty text"):
        QuantizationConfig("int8", mixed_precision_layers=("",))
