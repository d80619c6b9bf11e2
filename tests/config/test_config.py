"""Configs: what a user may write, and how everything else is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from aq_jax import ConfigError, Override, QuantizationConfig, QuantSpec, load_config
from aq_jax.config.schema import parse_config
from aq_jax.quantizers.lookup import quantizer_of

if TYPE_CHECKING:
    from pathlib import Path

FULL = """
source = "models/minilm"
output = "out.parquet"
compression = "zstd"
allow_pickle = true
[quantization]
quant_type = "int2"
per_channel = false
group_size = 64
symmetric = false
solver = "mse"
mixed_precision_layers = ["embed", "norm"]
on_nonfinite = "keep"
[[override]]
pattern = "position"
quant_type = "int8"
[[override]]
pattern = "^head\\\\."
group_size = 32
"""


def test_a_toml_file_with_everything(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(FULL)
    config = load_config(path)
    assert (config.source, config.output, config.compression, config.allow_pickle) == (
        "models/minilm", "out.parquet", "zstd", True)  # fmt: skip
    assert config.quantization == QuantizationConfig(
        quant_type="int2",
        per_channel=False,
        group_size=64,
        symmetric=False,
        solver="mse",
        mixed_precision_layers=("embed", "norm"),
        on_nonfinite="keep",
        overrides=(Override("position", quant_type="int8"), Override(r"^head\.", group_size=32)),
    )


def test_a_file_without_quantization_asks_for_plain_weights(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('source = "a"\noutput = "b.arrow"\n')
    config = load_config(path)
    assert config.quantization is None
    assert config.compression == "none"
    assert not config.allow_pickle


# Defaults: what each width means when nothing else is said, and what narrows it.
SPECS = [
    pytest.param({}, QuantSpec(8, per_channel=True), "absmax", id="int8: channels, absmax"),
    pytest.param({"symmetric": False}, QuantSpec(8, per_channel=True), "minmax", id="int8 asymmetric"),
    pytest.param({"per_channel": False}, QuantSpec(8), "absmax", id="int8 tensor"),
    pytest.param({"group_size": 32}, QuantSpec(8, group_size=32), "absmax", id="int8 groups"),
    pytest.param({"quant_type": "int4"}, QuantSpec(4, group_size=128), "mse", id="int4: groups of 128"),
    pytest.param({"quant_type": "int4", "per_channel": False}, QuantSpec(4), "mse", id="int4 tensor"),
    pytest.param({"quant_type": "int4", "per_channel": True}, QuantSpec(4, True), "mse", id="int4 channels"),
    pytest.param({"quant_type": "int3"}, QuantSpec(3, group_size=128), "mse", id="int3: groups of 128"),
    pytest.param({"quant_type": "int2"}, QuantSpec(2, group_size=128), "mse", id="int2: groups of 128"),
    pytest.param({"quant_type": "int2", "per_channel": False}, QuantSpec(2, group_size=128), "mse",
                 id="int2 with neither channels nor a size: groups of 128, as published"),
    pytest.param({"quant_type": "int2", "per_channel": True}, QuantSpec(2, True), "mse", id="int2 channels"),
    pytest.param({"quant_type": "int2", "group_size": 64}, QuantSpec(2, group_size=64), "mse", id="int2 groups"),
    pytest.param({"quant_type": "int2", "solver": "absmax"}, QuantSpec(2, group_size=128), "absmax", id="the baseline"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "spec", "solver"), SPECS)
def test_defaults(given: dict[str, Any], spec: QuantSpec, solver: str) -> None:
    config = QuantizationConfig(**given)
    assert config.spec == spec
    assert quantizer_of(config).name == solver
    assert config.bits == spec.bits


@pytest.mark.parametrize(("quant_type", "bits"), [("fp16", 16), ("none", 0)])
def test_types_without_a_grid(quant_type: str, bits: int) -> None:
    config = QuantizationConfig(quant_type=quant_type)
    assert config.bits == bits
    with pytest.raises(ConfigError, match=f"{quant_type!r} has no grid: wanted one of int8, int6, int5"):
        _ = config.spec


# quantization tables -> the error, which says where, what was found, what was wanted
REFUSED = [
    ({"group_sise": 64}, "quantization: unknown key 'group_sise'; known are quant_type, per_channel, group_size, "
     "symmetric, solver, rotate, mixed_precision_layers, on_nonfinite; did you mean 'group_size'?"),
    ({"bits": 2}, "quantization: unknown key 'bits'; known are quant_type"),
    ({"overrides": []}, "quantization: unknown key 'overrides'"),
    ({"quant_type": "int9"}, "quant_type = 'int9': wanted one of int8, int6, int5, int4, int3, int2"),
    ({"quant_type": "Int8"}, "did you mean 'int8'?"),
    ({"quant_type": 8}, "quant_type = 8: wanted a string"),
    ({"per_channel": 1}, "per_channel = 1: wanted true or false"),
    ({"per_channel": "false"}, "per_channel = 'false': wanted true or false"),
    ({"group_size": True}, "group_size = True: wanted an integer"),
    ({"group_size": 64.0}, "group_size = 64.0: wanted an integer"),
    ({"group_size": "64"}, "group_size = '64': wanted an integer"),
    ({"group_size": -1}, "group_size = -1: wanted 0 (no groups) or a size below 2^31"),
    ({"group_size": 2**31}, "wanted 0 (no groups) or a size below 2^31"),
    ({"symmetric": 0}, "symmetric = 0: wanted true or false"),
    ({"solver": 3}, "solver = 3: wanted a string"),
    ({"quant_type": "int8h"}, "quant_type = 'int8h': wanted one of int8, int6"),  # `rotate` says so
    ({"mixed_precision_layers": "embed"}, "mixed_precision_layers = 'embed': wanted a list of strings"),
    ({"mixed_precision_layers": [1]}, "mixed_precision_layers = [1]: wanted a list of strings"),
    ({"on_nonfinite": "ignore"}, "on_nonfinite = 'ignore': wanted one of error, keep"),
    ({"per_channel": True, "group_size": 64}, "per_channel = true and group_size = 64 contradict each other"),
]  # fmt: skip


@pytest.mark.parametrize(("table", "text"), REFUSED, ids=[str(t)[:40] for t, _ in REFUSED])
def test_quantization_tables_that_are_refused(table: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)) as caught:
        parse_config({"source": "a", "output": "b", "quantization": table}, where="c.toml")
    assert str(caught.value).startswith("c.toml: quantization")


# whole files -> the error
REFUSED_FILES = [
    ("source = 'a'", "missing output"),
    ("", "missing source, output"),
    ("source = 'a'\noutput = 'b'\nsauce = 1", "unknown key 'sauce'; known are source, output, compression, "
     "allow_pickle, requantize, plan, quantization, calibration, allocate, train, shards, override; "
     "did you mean 'source'?"),
    ("source = 1\noutput = 'b'", "source = 1: wanted a string"),
    ("source = 'a'\noutput = 'b'\ncompression = 'gzip'", "compression = 'gzip': wanted one of none, zstd"),
    ("source = 'a'\noutput = 'b'\ncompression = 1", "compression = 1: wanted 'none' or 'zstd'"),
    ("source = 'a'\noutput = 'b'\nallow_pickle = 1", "allow_pickle = 1: wanted true or false"),
    ("source = 'a'\noutput = 'b'\nquantization = 'int8'", "quantization: wanted a table of keys, found 'int8'"),
    ("source = 'a'\noutput = 'b'\n[override]\npattern = 'x'", "override = {'pattern': 'x'}: wanted [[override]]"),
    ("source = 'a'\noutput = 'b'\n[[override]]\npattern = 'x'", "[[override]] without [quantization]"),
    ("source = 'a'\noutput = 'b'\n[quantization]\n[[override]]\nsymmetric = true", "override 1: missing pattern"),
    ("source = 'a'\noutput = 'b'\n[quantization]\n[[override]]\npattern = '('", "is no regular expression"),
    ("source = 'a'\noutput = 'b'\n[quantization]\n[[override]]\npattern = 'x'\n[[override]]\npatern = 'x'",
     "override 2: unknown key 'patern'; known are pattern, quant_type"),
    ("source = 'a'\noutput = 'b'\n[quantization]\n[[override]]\npattern = 'x'\nquant_type = 'int9'", "'int9'"),
    ("source = 'a", "not a TOML file"),
    ("x = " + "[" * 20000, "not a TOML file"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "error"), REFUSED_FILES, ids=[e[:30] for _, e in REFUSED_FILES])
def test_files_that_are_refused(text: str, error: str, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(error)) as caught:
        load_config(path)
    assert str(caught.value).startswith(str(path))


def test_a_file_that_is_no_text_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(b"source = '\xff'")
    with pytest.raises(ConfigError, match="not a TOML file"):
        load_config(path)
    with pytest.raises(FileNotFoundError):
        load_config(tmp_path / "other.toml")


# --set assignments: TOML values, or else strings; they go before the file.
SETS = [
    ("quantization.group_size=32", lambda c: c.quantization.group_size == 32),
    ("quantization.quant_type=int4", lambda c: c.quantization.quant_type == "int4"),
    ('quantization.quant_type="int4"', lambda c: c.quantization.quant_type == "int4"),
    (" quantization . symmetric = true ", lambda c: c.quantization.symmetric is True),
    ('quantization.mixed_precision_layers=["a"]', lambda c: c.quantization.mixed_precision_layers == ("a",)),
    ("output=other=name.parquet", lambda c: c.output == "other=name.parquet"),
    ("source=package:x/y", lambda c: c.source == "package:x/y"),
]


@pytest.mark.parametrize(("assignment", "holds"), SETS, ids=[s for s, _ in SETS])
def test_set(assignment: str, holds: Any, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(FULL)
    assert not holds(load_config(path))
    assert holds(load_config(path, (assignment,)))


def test_set_makes_tables_and_the_last_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('source = "a"\noutput = "b"\n')
    config = load_config(path, ("quantization.quant_type=int4", "quantization.quant_type=int3"))
    assert config.quantization == QuantizationConfig(quant_type="int3")


@pytest.mark.parametrize(
    ("assignment", "text"),
    [
        ("group_size", "wanted KEY=VALUE"),
        ("=3", "wanted KEY=VALUE"),
        ("a..b=3", "wanted KEY=VALUE"),
        ("source.name=3", "source is no table"),
        ("quantization.bits=3", "unknown key 'bits'"),
        ("quantization.group_size=many", "group_size = 'many': wanted an integer"),
    ],
)
def test_set_that_is_refused(assignment: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(FULL)
    with pytest.raises(ConfigError, match=re.escape(text)):
        load_config(path, (assignment,))


def test_the_first_override_that_matches_wins() -> None:
    config = QuantizationConfig(
        quant_type="int2",
        overrides=(Override("embed", quant_type="int8"), Override("embed.*word", quant_type="int4"), Override("q$")),
    )
    assert config.for_tensor("embed.word").quant_type == "int8"
    assert config.for_tensor("layer.0.q").quant_type == "int2"
    assert config.for_tensor("layer.0.q") == dataclasses.replace(config, overrides=())
    # What is resolved has nothing left to resolve.
    assert config.for_tensor("embed").overrides == ()


# policy, override -> what a matching tensor has
OVERRIDDEN = [
    pytest.param({"per_channel": True}, {"group_size": 64}, QuantSpec(8, group_size=64), "absmax",
                 id="a group size drops channels"),
    pytest.param({"quant_type": "int4", "group_size": 64}, {"per_channel": True}, QuantSpec(4, True), "mse",
                 id="channels drop a group size"),
    pytest.param({"quant_type": "int2", "group_size": 8}, {"quant_type": "int4"}, QuantSpec(4, group_size=8), "mse",
                 id="a type keeps the group size"),
    pytest.param({"solver": "absmax"}, {"symmetric": False}, QuantSpec(8, True), "minmax",
                 id="a solver of the other kind gives way"),
    pytest.param({"quant_type": "int2", "solver": "mse"}, {"symmetric": False},
                 QuantSpec(2, group_size=128), "mse", id="mse can do both"),
    pytest.param({"quant_type": "int2"}, {"quant_type": "int8"}, QuantSpec(8, True), "absmax",
                 id="defaults are those of the new type"),
]  # fmt: skip


@pytest.mark.parametrize(("policy", "override", "spec", "solver"), OVERRIDDEN)
def test_overrides(policy: dict[str, Any], override: dict[str, Any], spec: QuantSpec, solver: str) -> None:
    config = QuantizationConfig(**policy, overrides=(Override("x", **override),)).for_tensor("x")
    assert config.spec == spec
    assert quantizer_of(config).name == solver


def test_overrides_rotate_as_the_policy_does() -> None:
    policy = QuantizationConfig(
        "int4", rotate=True, mixed_precision_layers=("half",),
        overrides=(Override("wide", quant_type="int8"), Override("plain", rotate=False), Override("odd", group_size=8)),
    )  # fmt: skip
    found = {name: policy.for_tensor(name) for name in ("wide", "plain", "odd", "half", "other")}
    assert {name: c.rotate for name, c in found.items() if name != "half"} == {
        "wide": True, "plain": False, "odd": True, "other": True,
    }  # fmt: skip
    assert found["half"].quant_type == "fp16"
    assert found["wide"].spec_for((4, 8), "w") == QuantSpec(8, per_channel=True, rotation=8)
    assert found["odd"].spec_for((4, 8), "w") == QuantSpec(4, group_size=8, rotation=8)
    assert found["odd"].spec_for((4, 7), "w") == QuantSpec(4, group_size=8)
    assert policy.spec.rotation == 0


def test_mixed_precision() -> None:
    config = QuantizationConfig(
        quant_type="int2",
        mixed_precision_layers=["embed", "norm"],
        overrides=(Override("embed.word", quant_type="int8"), Override("embed.type", group_size=32)),
    )
    assert config.for_tensor("model.embed.position").quant_type == "fp16"  # contained anywhere in the name
    assert config.for_tensor("layer.0.norm.weight").quant_type == "fp16"
    assert config.for_tensor("layer.0.q").quant_type == "int2"
    assert config.for_tensor("embed.word").quant_type == "int8"  # an override that names a type goes before
    assert config.for_tensor("embed.type").quant_type == "fp16"  # one that does not, does not
    assert config.for_tensor("Embed").quant_type == "int2"  # case matters
    # Names, not patterns.
    assert QuantizationConfig(mixed_precision_layers=["a.b"]).for_tensor("axb").quant_type == "int8"


def test_hashable_and_canonical() -> None:
    config = QuantizationConfig(mixed_precision_layers=["a"], overrides=[Override("x", group_size=8)])  # type: ignore[arg-type]
    same = QuantizationConfig(mixed_precision_layers=("a",), overrides=(Override("x", group_size=8),))
    assert config == same
    assert len({config, same}) == 1
    assert len({config.spec, same.spec, QuantSpec(8, True)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.quant_type = "int4"  # type: ignore[misc]


def test_to_dict_is_resolved_json() -> None:
    config = QuantizationConfig(
        quant_type="int2", mixed_precision_layers=["a"], overrides=(Override("x", group_size=8),)
    )
    assert json.loads(json.dumps(config.to_dict())) == {
        "quant_type": "int2",
        "per_channel": False,
        "group_size": 128,
        "symmetric": True,
        "solver": "mse",
        "rotate": False,
        "mixed_precision_layers": ["a"],
        "on_nonfinite": "error",
        "overrides": [{"pattern": "x", "group_size": 8}],
    }


@pytest.mark.parametrize(
    ("spec", "shape", "elements", "count", "axis"),
    [
        (QuantSpec(8), (3, 4), 12, 1, -1),
        (QuantSpec(8), (0, 4), 1, 1, -1),
        (QuantSpec(8), (), 1, 1, -1),
        (QuantSpec(8, per_channel=True), (3, 4, 5), 20, 3, 0),
        (QuantSpec(8, per_channel=True), (3,), 1, 3, 0),
        (QuantSpec(8, per_channel=True), (3, 0), 1, 3, 0),
        (QuantSpec(4, group_size=8), (3, 4), 8, 2, 0),
        (QuantSpec(4, group_size=8), (0, 4), 8, 0, 0),
    ],
    ids=str,
)
def test_group_arithmetic(spec: QuantSpec, shape: tuple[int, ...], elements: int, count: int, axis: int) -> None:
    assert (spec.group_elements(shape), spec.group_count(shape), spec.quant_axis) == (elements, count, axis)
