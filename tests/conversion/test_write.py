"""The road that every conversion takes: one tensor at a time, in pieces where it is large."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pytest

import aq_jax as aq
from aq_jax.config import QuantizationConfig
from aq_jax.conversion import write
from aq_jax.conversion.source import Source
from aq_jax.conversion.write import write_model
from aq_jax.converters.tables import open_tables
from aq_jax.io import dense, qtensors
from aq_jax.store import open_table, pieces
from aq_jax.store.folders import Folder

if TYPE_CHECKING:
    from pathlib import Path


class Tensors(Source):
    """A source that remembers what was asked of it."""

    def __init__(self, arrays: Mapping[str, np.ndarray], aliases: Mapping[str, str] | None = None) -> None:
        super().__init__(Folder("."), {name: (a.shape, a.dtype) for name, a in arrays.items()}, aliases)
        self.arrays = arrays
        self.asked: list[str] = []

    def read(self, name: str) -> np.ndarray:
        self.asked.append(name)
        return self.arrays[name]


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_each_tensor_is_asked_for_once_and_not_before_its_turn(tmp_path: Path) -> None:
    source = Tensors({"a": weights(4, 8), "b": weights(4, 8), "c": weights(3)})
    written: list[tuple[str, list[str]]] = []
    done = write_model(
        source, tmp_path / "m.parquet", None, progress=lambda name, *_: written.append((name, list(source.asked)))
    )
    assert written == [("a", ["a"]), ("b", ["a", "b"]), ("c", ["a", "b", "c"])]
    assert (done.quantized, done.kept, done.source_bytes) == ({}, {}, 4 * (32 + 32 + 3))
    assert set(done.seconds) == {"read", "quantize", "write"}
    assert min(done.seconds.values()) >= 0


@pytest.mark.parametrize(
    "config",
    [
        QuantizationConfig("int8"),
        QuantizationConfig("int8", per_channel=False),  # one grid a tensor: each piece repeats it
        QuantizationConfig("int4", group_size=24, solver="absmax"),
        QuantizationConfig("int3", group_size=8, solver="absmax"),
        QuantizationConfig("fp16"),
        QuantizationConfig("none"),
        None,
    ],
    ids=lambda c: "plain" if c is None else f"{c.quant_type}-{c.group_size}-{c.per_channel}",
)
def test_a_tensor_in_pieces_is_the_tensor_in_one(
    tmp_path: Path, config: QuantizationConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Tensors({"w": weights(12, 24), "bias": weights(12)})
    one = write_model(source, tmp_path / "one.parquet", config)
    limited = functools.partial(pieces, limit=256)
    for module in (dense, qtensors, write):
        monkeypatch.setattr(module, "pieces", limited)
    many = write_model(source, tmp_path / "many.parquet", config)
    with open_table(tmp_path / "many.parquet") as table:
        cut = table.pieces("w")
        assert len(cut) > 1
        assert sum(info.num_params for info in cut) == 12 * 24
        assert list(table.names) == ["w", "bias"]
    assert list(many.quantized) == list(one.quantized)
    for name, cosine in one.quantized.items():
        assert cosine - 0.02 < many.quantized[name] <= cosine  # the worst piece's
    a, b = (aq.load(tmp_path / f"{n}.parquet", "numpy") for n in ("one", "many"))
    assert {name: (x.dtype, x.tobytes()) for name, x in a.items()} == {n: (x.dtype, x.tobytes()) for n, x in b.items()}


def test_a_tensor_in_pieces_can_be_quantized_and_restored_from_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = functools.partial(pieces, limit=256)
    for module in (dense, qtensors, write):
        monkeypatch.setattr(module, "pieces", limited)
    aq.save(tmp_path / "v1.parquet", {"w": weights(12, 24).astype(np.float16)})
    aq.quantize_file(tmp_path / "v1.parquet", tmp_path / "v2.parquet", "int8")
    aq.dequantize_file(tmp_path / "v2.parquet", tmp_path / "back.parquet")
    found = aq.load(tmp_path / "back.parquet", "numpy")["w"]
    assert found.dtype == np.float16
    assert np.array_equal(found, aq.load(tmp_path / "v2.parquet", "numpy", dtype="float16")["w"])


def test_what_a_bad_piece_is_refused_for_is_known_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (dense, qtensors, write):
        monkeypatch.setattr(module, "pieces", functools.partial(pieces, limit=256))
    bad = weights(12, 24)
    bad[11, 23] = np.nan  # in the last piece
    keep = QuantizationConfig("int8", on_nonfinite="keep")
    done = write_model(Tensors({"w": bad}), tmp_path / "m.parquet", keep)
    assert "(first at [11, 23])" in done.kept["w"]
    assert done.quantized == {}
    assert aq.load(tmp_path / "m.parquet", "numpy")["w"].tobytes() == bad.tobytes()


def test_strided_and_read_only_arrays_are_written_by_value(tmp_path: Path) -> None:
    w = weights(16, 8)
    w.flags.writeable = False
    for config in (None, QuantizationConfig("int8"), QuantizationConfig("fp16")):
        write_model(Tensors({"w": w.T}), tmp_path / "a.parquet", config)
        write_model(Tensors({"w": np.ascontiguousarray(w.T)}), tmp_path / "b.parquet", config)
        assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_aliases_must_lead_somewhere(tmp_path: Path) -> None:
    write_model(Tensors({"w": weights(4)}, {"tied": "w"}), tmp_path / "m.parquet", None)
    assert list(aq.load(tmp_path / "m.parquet")) == ["w", "tied"]
    with pytest.raises(aq.FormatError, match="alias 'tied' leads to 'nowhere', which is not stored"):
        write_model(Tensors({"w": weights(4)}, {"tied": "nowhere"}), tmp_path / "n.parquet", None)
    assert [f.name for f in tmp_path.iterdir()] == ["m.parquet"]


def test_what_users_wrote_into_a_table_stays_and_what_is_of_codes_goes_with_them(tmp_path: Path) -> None:
    one, two, three = (tmp_path / f"{name}.parquet" for name in ("one", "two", "three"))
    said = {"made": "by hand", "lr": 3}
    aq.save(one, {"w": weights(4, 8)}, config=said)
    aq.quantize_file(one, two, "int8")
    aq.dequantize_file(two, three)
    with open_table(two) as table:
        assert table.config == said | {"quantization": QuantizationConfig("int8").to_dict()}
    with open_table(three) as table:
        assert table.config == said


def test_a_table_is_a_source_in_the_dtypes_that_were(tmp_path: Path) -> None:
    write_model(
        Tensors({"q": weights(4, 8).astype(np.float16), "half": weights(4), "n": np.arange(3)}),
        tmp_path / "m.parquet",
        QuantizationConfig("int8", mixed_precision_layers=("half",)),
    )
    with open_tables(tmp_path / "m.parquet") as source:
        assert source.shapes == {
            "q": ((4, 8), np.float16),
            "half": ((4,), np.float32),
            "n": ((3,), np.int64),
        }
        assert {name: source.read(name).dtype for name in source.shapes} == {
            name: dtype for name, (_, dtype) in source.shapes.items()
        }
        assert source.quantized == {"q": "int8"}
