"""Checkpoints that other programs quantized: each golden one was packed, and dequantized, by the program itself."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from schemes import group, write

import aq_jax as aq
from aq_jax.config import ConversionConfig, ShardsConfig
from aq_jax.conversion.source import Source
from aq_jax.converters import open_source
from aq_jax.converters.convert import dequantize_file, dry_run
from aq_jax.converters.inspection import inspect
from aq_jax.converters.schemes import SCHEMES, Scheme, Tensors, Weight
from aq_jax.converters.schemes.grids import Packed, spec_of
from aq_jax.converters.schemes.source import SchemeSource
from aq_jax.io.tensorfile import read_header
from aq_jax.store import DTYPES, open_table
from aq_jax.store.folders import Folder

GOLDEN = Path(__file__).parents[2] / "golden" / "schemes"
NAMES = sorted(folder.name for folder in GOLDEN.iterdir() if (folder / "config.json").exists())


def tensors_of(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, bfloat16 too."""
    folder, data = Folder(file.parent), file.read_bytes()
    extents, _ = read_header(folder, file.name)
    return {
        name: np.frombuffer(data, DTYPES[e.dtype], math.prod(e.shape), e.offset).reshape(e.shape)
        for name, e in extents.items()
    }


ROUNDED = {
    "mlx/m.*.float32.*": 2.0**-22,  # offsets become zero points
    "torchao/m.int4.*": 2.0**-8,  # the same, and a bfloat16 that is rounded once more
    "hqq/m.*.float16.*": 2.0**-10,  # the program subtracts and multiplies in float16
    "bitsandbytes/m.int8.*": 2.0**-23,  # it multiplies by 1/127 last
}
"""Weights whose values are not those of the program itself, bit for bit -> the difference, of the largest value."""


def same(found: np.ndarray, wanted: np.ndarray, name: str) -> None:
    """Bit for bit, but for the sign of zero."""
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), name
    a, b = found.astype(np.float32), wanted.astype(np.float32)
    error = next((error for pattern, error in ROUNDED.items() if fnmatch(name, pattern)), 0.0)
    assert np.abs(a - b).max() <= error * np.abs(b).max(), name


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_that_the_program_itself_dequantizes(name: str, tmp_path: Path) -> None:
    wanted = tensors_of(GOLDEN / name / "expected.safetensors")
    with open_source(GOLDEN / name) as source:
        assert set(source.shapes) == set(wanted)
        for tensor, value in wanted.items():
            same(np.asarray(source.read(tensor)), value, f"{name}/{tensor}")
        quantized = dict(source.quantized)
    assert set(quantized) == {tensor for tensor in wanted if tensor.startswith("m.") and "bias" not in tensor}
    done = aq.convert(ConversionConfig(str(GOLDEN / name), str(tmp_path / "m.parquet")))
    assert any(note.startswith(f"{len(quantized)} tensors were quantized already (") for note in done.notes)
    found = aq.load(done.path, "numpy")
    for tensor, value in wanted.items():
        same(found[tensor].astype(value.dtype), value, f"{name}/{tensor}")  # tables give float32
    with open_table(done.path) as table:
        infos = {info.layer_name: info for info in table.infos}
        assert {name: info.quant_type for name, info in infos.items() if info.quantized} == quantized
        assert all(infos[tensor].quant_type == "none" for tensor in wanted if tensor not in quantized)
        assert table.config["quantized_by"]["config"]
    left = json.loads((tmp_path / "config.json").read_text())
    assert not {"quantization", "quantization_config"} & set(left)


def test_shards_and_dry_runs_and_dequantized_folders(tmp_path: Path) -> None:
    config = ConversionConfig(str(GOLDEN / "compressed-tensors"), str(tmp_path / "m.parquet"))
    aq.convert(config)
    whole = aq.load(tmp_path / "m.parquet", "numpy")
    rows = {row.name: row.quant_type for row in dry_run(config).rows}
    with open_table(tmp_path / "m.parquet") as table:
        for info in table.infos:
            assert rows[info.layer_name] == (info.quant_type if info.quantized else info.dtype)
    shards = ShardsConfig(size=1000, workers=1)
    aq.convert(replace(config, output=str(tmp_path / "shards"), shards=shards))
    assert len(list((tmp_path / "shards").glob("*.parquet"))) > 3
    for name, value in aq.load(tmp_path / "shards", "numpy").items():
        same(value, whole[name], name)
    wanted = tensors_of(GOLDEN / "compressed-tensors" / "expected.safetensors")
    for number, source in enumerate((GOLDEN / "compressed-tensors", tmp_path / "m.parquet")):
        done = dequantize_file(source, tmp_path / f"hf{number}")
        found = tensors_of(Path(done.path))
        assert set(found) == set(wanted)
        for name, value in wanted.items():
            same(found[name], value, name)
        assert json.loads((tmp_path / f"hf{number}" / "config.json").read_text()) == {"model_type": "none"}


def test_codes_are_read_as_they_are(tmp_path: Path) -> None:
    """Of codes that a plain table can be compared with: those of the format's own bit stream, four bits, by hand."""
    codes = np.arange(64, dtype=np.uint32).reshape(2, 4, 8) % 16
    words = (codes << np.uint32(4) * np.arange(8, dtype=np.uint32)).sum(-1).astype(np.int32)
    write(tmp_path / "hf", {
        "l.weight_packed": words, "l.weight_scale": np.float32([[0.5], [2]]), "l.weight_shape": np.array([2, 32]),
    }, group({"num_bits": 4, "strategy": "channel"}))  # fmt: skip
    with open_source(tmp_path / "hf", packed=True) as source:
        q = source.read("l.weight")
    assert isinstance(q, aq.QTensor)
    assert (q.spec.quant_type, q.spec.per_channel) == ("int4", True)
    np.testing.assert_array_equal(np.stack([q.codes & 15, q.codes >> 4], -1).reshape(2, 4, 8), codes)


OPTIONAL = ("g_idx", "weight_format")
UNREAD = (
    "unpack_view_dtype", "view_as_float", "quant_scale", "quant_zero", "compute_dtype", "offload_meta",
    "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero",
)  # fmt: skip
"""What HQQ writes beside a weight, and any value of which is the same to a reader."""


def read_all(folder: Path) -> None:
    with open_source(folder, packed=True) as source:
        for tensor in source.shapes:
            source.read(tensor)


@pytest.mark.parametrize("name", NAMES)
def test_a_part_that_is_missing_or_does_not_fit_is_refused(name: str, tmp_path: Path) -> None:
    """Of one layer of each kind, each part in turn."""
    whole = tensors_of(GOLDEN / name / "model.safetensors")
    with open_source(GOLDEN / name, packed=True) as source:
        kinds: dict[object, tuple[str, ...]] = {}
        for weight in source._weights.values():  # type: ignore[attr-defined]
            spec, leaves = weight.spec, tuple(part.rpartition(".")[2] for part in weight.parts)
            kinds.setdefault((leaves, spec.code, spec.per_channel, bool(spec.group_size)), weight.parts)
    config = json.loads((GOLDEN / name / "config.json").read_text())
    metadata = read_header(Folder(GOLDEN / name), "model.safetensors")[1]
    write(tmp_path, whole, config, metadata)
    read_all(tmp_path)
    for parts in kinds.values():
        for part in parts:
            if (leaf := part.rpartition(".")[2]) in UNREAD:
                continue
            array, none = whole[part], () if leaf in OPTIONAL else (None,)
            for value in (*none, np.concatenate([array.reshape(-1), array.reshape(-1)]), array.astype(np.complex64)):
                changed = {key: each for key, each in (whole | {part: value}).items() if each is not None}
                write(tmp_path, changed, config, metadata)
                with pytest.raises(aq.FormatError, match=part.rpartition(".")[0] + r"|" + part):
                    read_all(tmp_path)


class Toy(Scheme):
    """A scheme of one's own: `NAME.q` of int8, and `NAME.s`, a scale a row."""

    about = "toy"
    files = ("toy.json",)

    def recognizes(self, config: Any) -> bool:
        return config.get("file") == "toy.json"

    def weights(self, source: Source, config: Any) -> Iterator[Weight]:
        tensors = Tensors(source, self.about)
        for module in tensors.ending("q"):
            shape = tensors.shape(f"{module}q")
            dtype = tensors.expect(f"{module}s", (shape[0], 1), "float32")
            spec, parts = spec_of(8, "", dtype, shape[1], shape), (f"{module}q", f"{module}s")
            yield Weight(module[:-1], shape, dtype, spec, parts, partial(self._read, tensors, *parts))

    @staticmethod
    def _read(tensors: Tensors, codes: str, scales: str) -> Packed:
        return Packed(tensors.read(codes), tensors.read(scales))


def test_a_scheme_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEMES, "toy", Toy())
    codes = np.arange(-12, 12, dtype=np.int8).reshape(3, 8)
    write(tmp_path / "hf", {"w.q": codes, "w.s": np.float32([[1], [2], [0.5]]), "b": np.ones(3, np.float32)}, {})
    (tmp_path / "hf" / "toy.json").write_text("{}")
    done = aq.convert(ConversionConfig(str(tmp_path / "hf"), str(tmp_path / "m.parquet")))
    assert "left behind, of the weights as they were quantized: toy.json" in done.notes
    np.testing.assert_array_equal(aq.load(done.path, "numpy")["w"], codes * np.float32([[1], [2], [0.5]]))
    with open_table(done.path) as table:
        assert [(info.quant_type, info.solver) for info in table.infos] == [("none", None), ("int8", "toy")]


@pytest.mark.parametrize("name", NAMES)
def test_inspect_lists_weights_and_reads_none_of_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = tensors_of(GOLDEN / name / "expected.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(SchemeSource, "read", None)
        found = inspect(GOLDEN / name)
    assert {layer.name: layer.shape for layer in found.layers} == {key: value.shape for key, value in wanted.items()}
    done = aq.convert(ConversionConfig(str(GOLDEN / name), str(tmp_path / "m.arrow")))
    written = {layer.name: layer for layer in inspect(done.path).layers}
    for layer in found.layers:
        if layer.name.startswith("m.") and not layer.name.endswith("bias"):
            assert layer.quant_type == written[layer.name].quant_type
            assert layer.bits == 8 * layer.bytes / layer.params
