"""HQQ, bitsandbytes and torchao: what is refused by name, what zeros become, and parity with the programs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from schemes import write

import aq_jax as aq
from aq_jax.codes.levels import NF4
from aq_jax.converters import open_source
from aq_jax.io.tensorfile import read_header
from aq_jax.store.folders import Folder

Arrays = dict[str, np.ndarray]
GOLDEN = Path(__file__).parents[2] / "golden" / "schemes"


def nf4(**state: Any) -> Arrays:
    """Four rows of 32 in blocks of 64."""
    fields = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [4, 32]} | state
    codes = np.random.default_rng(0).integers(0, 256, (64, 1)).astype(np.uint8)
    return {
        "a.weight": codes, "a.weight.absmax": np.float32([1, 2]), "a.weight.quant_map": np.float32(NF4),
        "a.weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(fields).encode(), np.uint8),
    }  # fmt: skip


def hqq(**changed: Any) -> Arrays:
    """Four rows of 32 in groups of 16: four bits, two rows of groups a byte."""
    text = np.frombuffer(b"4bit_u8", np.uint8)
    numbers = {"nbits": 4, "group_size": 16, "axis": 1} | changed
    found: Arrays = {"a.W_q": np.ones((4, 16), np.uint8), "a.packing": text, "a.shape": np.int64([4, 32])}
    found |= {f"a.{name}": np.full((8, 1), 0.5, np.float16) for name in ("scale", "zero")}
    return found | {f"a.{name}": np.int32(value) for name, value in numbers.items()}


def nested(offset: float, scale: float = 1) -> Arrays:
    """The same, its two scales nested."""
    numbers = {"nested_offset": offset, "nested_blocksize": 256}
    return nf4(**numbers) | {
        "a.weight.absmax": np.zeros(2, np.uint8), "a.weight.nested_absmax": np.float32([scale]),
        "a.weight.nested_quant_map": np.full(256, 2, np.float32),
    }  # fmt: skip


BNB, HQQ, AO = ({"quant_method": method} for method in ("bitsandbytes", "hqq", "torchao"))
INT8 = {"a.weight": np.ones((4, 8), np.int8), "a.SCB": np.ones(4, np.float32)}
REFUSED: dict[str, tuple[Arrays, dict[str, Any], str]] = {
    "a shape that lies": (nf4(shape=[4, 2**30]), BNB, "a.weight has 64 bytes; wanted 2147483648"),
    "a shape of texts": (nf4(shape=["4", 32]), BNB, "an axis of .* is '4'; wanted an integer"),
    "no blocks": (nf4(blocksize=0), BNB, "blocks of 0"),
    "nested without its numbers": (nf4() | {"a.weight.absmax": np.zeros(2, np.uint8)}, BNB, "nested_blocksize of"),
    "a nested offset beyond float32": (nested(-1e300), BNB, "nested_offset of .* is '-1e.300'; wanted a number"),
    "nested scales beyond float32": (nested(1, 3e38), BNB, "a.weight: group 0 has the scale"),
    "other levels": (nf4() | {"a.weight.quant_map": np.zeros(16, np.float32)}, BNB, "other levels than nf4"),
    "a state that is no JSON": (
        nf4() | {"a.weight.quant_state.bitsandbytes__nf4": np.zeros(9, np.uint8)}, BNB, "not a JSON file"
    ),
    "a scale below zero": (nf4() | {"a.weight.absmax": np.float32([-1, 1])}, BNB, "a.weight: group 0 has the scale"),
    "a layout of a GPU": (INT8 | {"a.weight_format": np.uint8(2)}, BNB, "a layout of a GPU"),
    "axis 0": (hqq(axis=0), HQQ, "a.axis is 0: its groups are no runs of inputs"),
    "one bit": (hqq(nbits=1), HQQ, "1 bits"),
    "groups of nothing": (hqq(group_size=0), HQQ, "groups of 0"),
    "a scale that is quantized": (hqq() | {"a.quant_scale": np.uint8(1)}, HQQ, "is quantized itself"),
    "bits that are floats": (hqq() | {"a.nbits": np.float32(1.58)}, HQQ, "a.nbits is float32"),
    "codes of six bits that are more": (
        hqq(nbits=6) | {"a.W_q": np.full((8, 16), 64, np.uint8), "a.packing": np.frombuffer(b"8bit_u8", np.uint8)}, HQQ,
        "holds the code 64",
    ),
    "no metadata": ({"a._weight_qdata": INT8["a.weight"], "a._weight_scale": INT8["a.SCB"]}, AO, "do not say what a.w"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_table_cannot_hold_is_refused_by_name(what: str, tmp_path: Path) -> None:
    tensors, entry, text = REFUSED[what]
    write(tmp_path, tensors, {"quantization_config": entry})
    with pytest.raises(aq.FormatError, match=text), open_source(tmp_path, packed=True) as source:
        aq.save(tmp_path / "m.parquet", {"a.weight": source.read("a.weight")})


TORCHAO: dict[str, tuple[str, str, str]] = {
    "a layout of a device": ('"Int8Tensor"', '"Int4TilePackedTo4dTensor"', "a layout of a device"),
    "blocks of rows": ("[1, 64]", "[2, 64]", "has blocks of"),
    "codes of fewer bits": ('"int8"', '"int2"', "holds codes from"),
    "names that are no texts": ('_names": ["qdata"', '_names": [["qdata"]', "wanted a text"),
    "no object": ('{\\"_type\\": \\"Int8Tensor\\"', '[{\\"_type\\": \\"Int8Tensor\\"', "not a JSON file"),
}


@pytest.mark.parametrize("what", TORCHAO)
def test_metadata_of_torchao_that_say_something_else(what: str, tmp_path: Path) -> None:
    """The header's text, with as many characters as before."""
    old, new, text = TORCHAO[what]
    data = (GOLDEN / "torchao" / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    notes = header["__metadata__"]
    notes |= {key: value.replace(old.replace("\\", ""), new.replace("\\", "")) for key, value in notes.items()}
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % 8)
    (tmp_path / "model.safetensors").write_bytes(len(written).to_bytes(8, "little") + written + data[8 + size :])
    (tmp_path / "config.json").write_bytes((GOLDEN / "torchao" / "config.json").read_bytes())
    read_header(Folder(tmp_path), "model.safetensors")
    with pytest.raises(aq.FormatError, match=text), open_source(tmp_path, packed=True) as source:
        [source.read(name) for name in source.shapes]


def integers(zeros: np.ndarray) -> tuple[Arrays, dict[str, str]]:
    """Four rows of 32 in groups of 16, as torchao has them."""
    state = {"target_dtype": {"_data": "int4"}, "block_size": [1, 16], "dtype": {"_data": "bfloat16"}}
    arrays = {"qdata": np.ones((4, 32), np.int8), "scale": np.full((4, 2), 0.5, np.float16), "zero_point": zeros}
    notes = {"a.weight": json.dumps({"_type": "IntxUnpackedToInt8Tensor", "_data": state})}
    return {f"a._weight_{leaf}": value for leaf, value in arrays.items()}, notes


def test_zero_points_that_are_integers_become_bytes(tmp_path: Path) -> None:
    """Floats are of no known precision, whatever they hold."""
    kinds = {"int8": "int4_f16i", "int32": "int4_f16i", "float16": "int4"}
    for dtype, kind in kinds.items():
        zeros = np.arange(-4, 4).reshape(4, 2).astype(dtype)
        arrays, notes = integers(zeros)
        write(tmp_path, arrays, {"quantization_config": AO}, notes)
        with open_source(tmp_path, packed=True) as source:
            q = source.read("a.weight")
        assert isinstance(q, aq.QTensor)
        assert q.spec.quant_type == kind
        np.testing.assert_array_equal(aq.dequantize(q), np.repeat(0.5 * (1 - zeros.astype(np.float32)), 16, 1))
    arrays, notes = integers(np.array([[-128, 127]] * 3 + [[0, 128]], np.int32))
    write(tmp_path, arrays, {"quantization_config": AO}, notes)
    with (
        pytest.raises(aq.FormatError, match=r"a\.weight: has zero points from -128 to 128; wanted -128 to 127"),
        open_source(tmp_path, packed=True) as source,
    ):
        source.read("a.weight")


def test_inputs_that_torchao_quantizes_while_the_model_runs_are_noted(tmp_path: Path) -> None:
    arrays, notes = integers(np.zeros((4, 2), np.int8))
    for value, wanted in ((None, 0), ("int8_asym_per_token", 1)):
        said = json.loads(notes["a.weight"])
        said["_data"]["activation_quantization"] = value
        write(tmp_path, arrays, {"quantization_config": AO}, {"a.weight": json.dumps(said)})
        with open_source(tmp_path) as source:
            assert sum("inputs are quantized while the model runs" in note for note in source.notes) == wanted


def test_offsets_of_torchao_are_kept_as_they_are(tmp_path: Path) -> None:
    """Halves, of code 0; float32 ones become zero points."""
    codes = np.random.default_rng(0).integers(0, 256, (4, 16), np.uint8).view(np.int8)
    notes = {"a.weight": json.dumps({"_type": "Int4Tensor", "_data": {"block_size": [1, 16]}})}
    levels = np.stack([(codes << 4).astype(np.int8) >> 4, codes >> 4], -1).reshape(4, 2, 16).astype(np.float32)
    for dtype, kind in {"float16": "int4_f16a", "float32": "int4"}.items():
        scale = np.array([[0.5, -0.25, 3, 1], [1, 2, 0.75, 7]], dtype)
        offsets = np.array([[0.3, 0, -2, 1], [1, -2, 0.125, 5]], dtype)
        arrays = {"a._weight_qdata": codes, "a._weight_scale": scale, "a._weight_zero_point": offsets}
        write(tmp_path, arrays, {"quantization_config": AO}, notes)
        with open_source(tmp_path, packed=True) as source:
            assert source.quantized == {"a.weight": kind}
            found, size = np.asarray(aq.dequantize(source.read("a.weight"))), source.nbytes("a.weight")
        wanted = levels * scale.T[..., None].astype(np.float32) + offsets.T[..., None].astype(np.float32)
        np.testing.assert_allclose(found, wanted.reshape(4, 32), rtol=0, atol=2e-6 if kind == "int4" else 0)
        assert size <= 1.05 * sum(array.nbytes for array in arrays.values())
    far = {"a._weight_zero_point": np.full((2, 4), 1e5, np.float32), "a._weight_scale": np.full((2, 4), 2e-38, "f4")}
    write(tmp_path, arrays | far, {"quantization_config": AO}, notes)
    with pytest.raises(aq.FormatError, match="zero point -inf"), open_source(tmp_path) as source:
        source.read("a.weight")


def test_blocks_of_zeros_have_a_scale_of_one(tmp_path: Path) -> None:
    """A nested scale may come out a little below zero where all codes are the level 0."""
    codes = nf4()["a.weight"].copy()
    codes[32:] = 0x77
    for scale in (0, -1e-9):
        arrays = nf4() | {"a.weight": codes, "a.weight.absmax": np.float32([2, scale])}
        write(tmp_path, arrays, {"quantization_config": BNB})
        with open_source(tmp_path, packed=True) as source:
            q = source.read("a.weight")
        assert isinstance(q, aq.QTensor)
        assert np.asarray(q.scale).reshape(-1).tolist() == [2, 1]
        found = np.asarray(aq.dequantize(q)).reshape(-1)
        high, low = codes[:32, 0] >> 4, codes[:32, 0] & 15
        assert (found[:64] == np.float32(NF4)[np.stack([high, low], 1).reshape(-1)] * 2).all()
        assert not found[64:].any()


def test_nested_scales_are_kept_as_they_are(tmp_path: Path) -> None:
    """Bytes and levels; those of other blocks than 256, and of tensors without rows, become float32."""
    arrays = nested(0.25, 0.5) | {"a.weight.absmax": np.uint8([200, 255])}
    table = np.linspace(-1, 1, 256, dtype=np.float32)
    arrays["a.weight.nested_quant_map"] = table
    scales = table[[200, 255]] * np.float32(0.5) + np.float32(0.25)
    high, low = (codes(arrays["a.weight"][:, 0]) for codes in (lambda c: c >> 4, lambda c: c & 15))
    wanted = np.float32(NF4)[np.stack([high, low], 1)].reshape(2, 64) * scales[:, None]
    cases = [({}, "nf4_nested"), ({"nested_blocksize": 128}, "nf4"), ({"shape": [128]}, "nf4")]
    cases += [({"nested_offset": 1e-30}, "nf4"), ({"shape": [4, 32]}, "nf4")]  # a number too small; groups of two rows
    for changes, kind in cases:
        state = {"nested_offset": 0.25, "nested_blocksize": 256, "shape": [2, 64]} | changes
        own = arrays | {
            "a.weight.quant_state.bitsandbytes__nf4": nf4(**state)["a.weight.quant_state.bitsandbytes__nf4"]
        }
        expected = wanted / scales[:, None] * (table[[200, 255]] / 2 + np.float32(state["nested_offset"]))[:, None]
        write(tmp_path, own, {"quantization_config": BNB})
        with open_source(tmp_path, packed=True) as source:
            assert source.quantized == {"a.weight": kind}
            q = source.read("a.weight")
        np.testing.assert_allclose(np.asarray(aq.dequantize(q)).reshape(2, 64), expected, rtol=4e-7, atol=0)
        aq.save(tmp_path / "m.parquet", {"w": q})
        assert aq.load(tmp_path / "m.parquet", packed=True)["w"].spec.quant_type == "nf4"


def test_groups_of_zeros_have_a_nested_scale_above_zero(tmp_path: Path) -> None:
    arrays = nested(0.25, 0.5) | {"a.weight.absmax": np.uint8([200, 3])}
    arrays["a.weight.nested_quant_map"] = np.linspace(-1, 1, 256, dtype=np.float32)
    state = nf4(shape=[2, 64], nested_offset=0.25, nested_blocksize=256)
    arrays |= {name: value for name, value in state.items() if "state" in name}
    write(tmp_path, arrays, {"quantization_config": BNB})
    with pytest.raises(aq.FormatError, match="group 1 has the scale"), open_source(tmp_path, packed=True) as source:
        source.read("a.weight")
    arrays["a.weight"] = np.concatenate([arrays["a.weight"][:32], np.full((32, 1), 0x77, np.uint8)])
    write(tmp_path, arrays, {"quantization_config": BNB})
    with open_source(tmp_path, packed=True) as source:
        q = source.read("a.weight")
    assert isinstance(q, aq.QTensor)
    assert (q.spec.quant_type, np.asarray(q.scale).reshape(-1).tolist()) == ("nf4_nested", [200, 255])
    assert not np.asarray(aq.dequantize(q))[1].any()
    with pytest.raises(ValueError, match=r"1 groups have 257 zero points, wanted 258: .* cannot be cut"):
        aq.dequantize(jax.tree.map(lambda leaf: leaf[1:], q))


def arrays_of(parts: dict[str, Any]) -> Arrays:
    return {name: value.numpy() for name, value in parts.items()}


def by_bitsandbytes(torch: Any) -> tuple[Arrays, Any, dict[str, Any]]:
    functional = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(37, 128, generator=torch.Generator().manual_seed(0))
    codes, state = functional.quantize_4bit(w, blocksize=128, compress_statistics=True, quant_type="nf4")
    parts = {f"a.weight.{leaf}": value for leaf, value in state.as_dict(packed=True).items()} | {"a.weight": codes}
    return arrays_of(parts), functional.dequantize_4bit(codes, state), BNB


def by_hqq(torch: Any) -> tuple[Arrays, Any, dict[str, Any]]:
    quantize = pytest.importorskip("hqq.core.quantize")
    linear = torch.nn.Linear(160, 24, bias=False)
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=80, axis=1)
    layer = quantize.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")
    return arrays_of({f"a.{leaf}": value.data for leaf, value in layer.state_dict().items()}), layer.dequantize(), HQQ


@pytest.mark.slow
@pytest.mark.parametrize("packed_by", [by_bitsandbytes, by_hqq])
def test_values_equal_those_of_the_programs(packed_by: Callable[[Any], Any], tmp_path: Path) -> None:
    arrays, wanted, entry = packed_by(pytest.importorskip("torch"))
    write(tmp_path, arrays, {"quantization_config": entry})
    with open_source(tmp_path) as source:
        np.testing.assert_allclose(source.read("a.weight"), wanted.numpy(), rtol=0, atol=4e-7 if entry == HQQ else 0)
