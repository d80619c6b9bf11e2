"""Where weights lie: each format knows its own, an unknown place is refused, and a format is added from outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf_file
import llama2c_oracle
import numpy as np
import pytest
import safetensors.numpy

import aq_jax as aq
from aq_jax.config import ConversionConfig, QuantizationConfig, ShardsConfig
from aq_jax.conversion.sidefiles import SideFiles, side_files
from aq_jax.conversion.source import Source
from aq_jax.converters import FORMATS, open_source, orbax
from aq_jax.converters.convert import dry_run
from aq_jax.nn.architecture import read_architecture
from aq_jax.nn.sentences import read_sentence_tokenizer
from aq_jax.store import open_table
from aq_jax.store.folders import Folder
from aq_jax.store.inspection import inspect_table

INT4 = QuantizationConfig("int4", group_size=8, solver="absmax", mixed_precision_layers=("half",))


def weights() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    shapes = {"a.weight": (16, 24), "half.weight": (4, 8), "norm.weight": (24,)}
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


# ------------------------------------------------------------------------------------------- a format of one's own


class NpzSource(Source):
    def __init__(self, folder: Folder, arrays: Any) -> None:
        self._arrays = arrays
        super().__init__(folder, {name: (arrays[name].shape, arrays[name].dtype) for name in arrays}, files=["w.npz"])

    def read(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def side_files(self, target: Folder) -> SideFiles:
        return side_files(self.folder, target)


class Npz:
    about = "a folder of one w.npz, with a file MARK"

    def recognizes(self, location: str) -> bool:
        return Folder(location).holds("MARK")

    @contextmanager
    def open(self, location: str, *, packed: bool, allow_pickle: bool) -> Iterator[NpzSource]:
        with np.load(Path(location, "w.npz")) as arrays:
            yield NpzSource(Folder(location), arrays)


@pytest.fixture
def npz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "npz"
    folder.mkdir()
    np.savez(folder / "w.npz", **weights())  # type: ignore[arg-type]
    (folder / "MARK").touch()
    (folder / "config.json").write_text("{}")
    with pytest.raises(
        aq.FormatError,
        match=r"npz: is of no known format; wanted one of these: a Hugging Face folder, .*; an Orbax checkpoint",
    ):
        aq.convert(ConversionConfig(str(folder), str(tmp_path / "m.parquet")))
    monkeypatch.setitem(FORMATS, "npz", Npz())
    return folder


@pytest.mark.parametrize(
    ("config", "workers"),
    [(None, 0), (INT4, 0), (None, 1), (INT4, 1), (INT4, 2)],
    ids=["plain", "int4", "plain shards", "int4 shards", "processes"],
)
def test_a_format_from_outside_is_a_source_like_any_other(
    npz: Path, tmp_path: Path, config: QuantizationConfig | None, workers: int
) -> None:
    aq.save(tmp_path / "v1.parquet", weights())  # the oracle: the same weights by another road
    wanted = tmp_path / "v1.parquet"
    if config is not None:
        aq.quantize_file(tmp_path / "v1.parquet", wanted := tmp_path / "v2.parquet", config)
    shards = ShardsConfig(size=1000, workers=workers) if workers else None
    output = tmp_path / "out" / ("shards" if workers else "m.parquet")
    conversion = ConversionConfig(str(npz), str(output), config, shards=shards)
    planned = dry_run(conversion).rows
    assert not output.parent.exists()
    said: list[tuple[str, int, int]] = []
    done = aq.convert(conversion, lambda *step: said.append(step))
    assert done.source_bytes == sum(size for _, size, _ in said) == said[0][2] == 4 * (16 * 24 + 32 + 24)
    with open_table(output) as table, open_table(wanted) as expected:
        assert [row.digest for row in table.rows()] == [row.digest for row in expected.rows()]
        assert len(table.files) == (2 if workers else 1)
        kinds = [(info.layer_name, info.shape, info.quant_type or info.dtype) for info in table.infos]
    assert [(row.name, row.shape, row.quant_type) for row in planned] == kinds
    assert ((output if workers else output.parent) / "config.json").read_text() == "{}"


def test_a_format_from_outside_is_quantized_by_its_name_alone(npz: Path, tmp_path: Path) -> None:
    aq.quantize_file(npz, tmp_path / "out" / "m.arrow", INT4)
    assert aq.load(tmp_path / "out" / "m.arrow", "numpy")["norm.weight"].tobytes() == weights()["norm.weight"].tobytes()
    back = aq.dequantize_file(npz, tmp_path / "hf")
    assert safetensors.numpy.load_file(back.path)["a.weight"].tobytes() == weights()["a.weight"].tobytes()


def test_what_a_format_changes_in_between_is_converted_anew(npz: Path, tmp_path: Path) -> None:
    config = ConversionConfig(str(npz), str(tmp_path / "out"), shards=ShardsConfig(size=1000, workers=1))

    def stop(name: str, size: int, total: int) -> None:
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            aq.convert(config, lambda name, *_: stop(name, 0, 0) if "half" in name else None)
    np.savez(npz / "w.npz", **{name: array + 1 for name, array in weights().items()})  # type: ignore[arg-type]
    aq.convert(config)
    assert np.array_equal(aq.load(tmp_path / "out", "numpy")["a.weight"], weights()["a.weight"] + 1)


# ------------------------------------------------------------------------------------------- those that are known


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """The same weights in every format, but for GGUF and llama2.c's, which have their own."""
    hf, tables, llama = (tmp_path / name for name in ("hf", "tables", "llama"))
    for folder in (hf, tables, llama):
        folder.mkdir()
    safetensors.numpy.save_file(weights(), hf / "model.safetensors")
    aq.save(tmp_path / "m.arrow", weights())
    aq.save(tables / "a.parquet", weights())
    orbax.from_table(tmp_path / "m.arrow", tmp_path / "checkpoint")
    shape = {"dim": 16, "hidden": 24, "layers": 1, "heads": 4, "kv_heads": 2, "vocab": 300, "seq": 8}
    llama2c_oracle.write_model(llama / "model.bin", **shape)
    llama2c_oracle.write_tokenizer(llama / "tokenizer.bin", [" ", *map(chr, range(256, 296))])
    (tmp_path / "m.gguf").write_bytes(gguf_file.whole(gguf_file.LLAMA, {"token_embd.weight": gguf_file.floats((3, 8))}))
    return {
        "huggingface": hf, "table": tmp_path / "m.arrow", "shards": tables, "orbax": tmp_path / "checkpoint",
        "llama2c": llama / "model.bin", "gguf": tmp_path / "m.gguf",
    }  # fmt: skip


def test_every_format_knows_its_own_and_gives_the_same(places: dict[str, Path], tmp_path: Path) -> None:
    assert set(places) == set(FORMATS)
    wanted = None
    for name, place in places.items():
        assert [other for other, entry in FORMATS.items() if entry.recognizes(str(place))] == [name]
        output = tmp_path / "out" / name / "m.parquet"
        aq.convert(ConversionConfig(str(place), str(output), INT4))
        if name in ("llama2c", "gguf"):
            assert "config.json" in {file.name for file in output.parent.iterdir()}
            continue
        with open_table(output) as table:
            rows = [row.digest for row in table.rows()]
        wanted = wanted or rows
        assert rows == wanted, name
    aq.convert(ConversionConfig(f"file://{places['table']}", str(tmp_path / "u.parquet"), INT4))


@pytest.mark.parametrize("name", ["table", "orbax", "shards"])
def test_what_is_quantized_already_is_taken_as_it_is_or_refused(
    places: dict[str, Path], tmp_path: Path, name: str
) -> None:
    first = tmp_path / "first" / "m.parquet"
    aq.convert(ConversionConfig(str(places["table"]), str(first), INT4))
    place = {"table": first, "shards": first.parent, "orbax": tmp_path / "again"}[name]
    if name == "orbax":
        orbax.from_table(first, place)
    with pytest.raises(aq.FormatError, match=r"a\.weight: is int4 already, and would be rounded twice"):
        aq.convert(ConversionConfig(str(place), str(tmp_path / "out" / "m.parquet"), INT4))
    plain = ConversionConfig(str(place), str(tmp_path / "out" / "m.parquet"))
    assert [row.quant_type for row in dry_run(plain).rows] == ["int4", "fp16", "none"]
    done = aq.convert(plain)
    assert "1 tensors were quantized already (1 int4), and are written as they are" in done.notes
    assert (tmp_path / "out" / "m.parquet").read_bytes() == first.read_bytes()
    many = ConversionConfig(str(place), str(tmp_path / "many"), shards=ShardsConfig(size=200, workers=1))
    aq.convert(many)
    with open_table(tmp_path / "many") as table, open_table(first) as whole:
        assert [row.digest for row in table.rows()] == [row.digest for row in whole.rows()]
        assert table.version == 2
        assert len(table.files) == 2
    aq.dequantize_file(place, tmp_path / "plain.parquet")
    found, wanted = aq.load(tmp_path / "plain.parquet", "numpy"), aq.load(first, "numpy")
    assert {n: a.tobytes() for n, a in found.items()} == {n: a.tobytes() for n, a in wanted.items()}


def test_a_place_of_nobody_is_refused_and_one_of_two_formats_is_asked_for_tables_first(
    places: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("PAR")
    (tmp_path / "pickle.bin").write_bytes(b"PK\3\4")
    for place in ("text.txt", "pickle.bin"):
        with pytest.raises(
            aq.FormatError, match=rf"{place}: is of no known format; wanted one of these: .*; a llama2.c model"
        ):
            aq.convert(ConversionConfig(str(tmp_path / place), str(tmp_path / "x.parquet")))
    with pytest.raises(FileNotFoundError, match="nowhere: does not exist"):
        aq.convert(ConversionConfig(str(tmp_path / "nowhere"), str(tmp_path / "x.parquet")))
    places["llama2c"].with_name("tokenizer.bin").unlink()
    with pytest.raises(aq.FormatError, match=r"model\.bin: has no tokenizer\.bin beside it"):
        aq.convert(ConversionConfig(str(places["llama2c"]), str(tmp_path / "x.parquet")))
    aq.save(places["huggingface"] / "m.parquet", {"other": np.ones(2, np.float32)})
    for first, wanted in (((), "a.weight"), (("shards",), "other")):
        with open_source(places["huggingface"], first=first) as source:
            assert wanted in source.shapes


def test_a_model_that_has_no_folder_yet_has_one_while_it_is_run(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []

    def solve(source: Source, folder: Path, *rest: object) -> None:
        assert read_architecture(folder).fields["model_type"] == "llama"
        assert read_sentence_tokenizer(folder).encode("a").ids[0] == 1
        seen.append(folder)
        raise aq.AqError("enough")

    monkeypatch.setattr("aq_jax.calibration.solve.solve_model", solve)
    gptq = QuantizationConfig("int4", group_size=8, solver="gptq")
    with pytest.raises(aq.AqError, match="enough"):
        aq.convert(ConversionConfig(str(places["llama2c"]), str(tmp_path / "out" / "m.parquet"), gptq))
    assert not seen[0].exists()
    assert not (tmp_path / "out").exists()


def test_side_files_go_with_a_table_that_is_quantized_elsewhere(places: dict[str, Path], tmp_path: Path) -> None:
    (places["huggingface"] / "config.json").write_text('{"model_type": "none"}')
    (places["huggingface"] / "code.py").write_text("1")
    aq.convert(ConversionConfig(str(places["huggingface"]), str(tmp_path / "v1" / "m.parquet")))
    (tmp_path / "v1" / "diary.txt").write_text("mine")
    out = tmp_path / "v2"
    aq.quantize_file(tmp_path / "v1" / "m.parquet", out / "m.parquet", INT4)
    assert sorted(file.name for file in out.iterdir()) == ["code.py", "config.json", "m.parquet"]
    assert inspect_table(out / "m.parquet").config["side_files"] == ["code.py", "config.json"]
    aq.dequantize_file(out / "m.parquet", tmp_path / "v3" / "m.parquet")
    assert sorted(file.name for file in (tmp_path / "v3").iterdir()) == ["code.py", "config.json", "m.parquet"]
    (out / "config.json").write_text("{}")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(aq.FormatError, match=r"config\.json: already exists and differs from"):
        aq.quantize_file(tmp_path / "v1" / "m.parquet", out / "n.parquet", INT4)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
