"""The table of docs/numbers.md, walked: a row is a tensor, a cell what is done with it and what becomes of it."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

import aq_jax as aq
from aq_jax.config import ConversionConfig, QuantizationConfig
from aq_jax.conversion import write
from aq_jax.conversion.write import ConversionResult, quantized_rows
from aq_jax.converters import huggingface
from aq_jax.converters.checkpoint import open_checkpoint
from aq_jax.converters.convert import dry_run
from aq_jax.io.dense import plain_rows
from aq_jax.io.tensorfile import SAFETENSORS_DTYPES
from aq_jax.ops import KERNELS
from aq_jax.quantizers.absmax import AbsMax
from aq_jax.quantizers.candidates import Quantized
from aq_jax.quantizers.compiled_tiles import GroupsPerTile
from aq_jax.quantizers.native_groups import NativeGroups
from aq_jax.quantizers.treatment import treat
from aq_jax.store import DTYPES, Row
from aq_jax.store.layout import group_count
from aq_jax.store.row_rules import RowOrder, check
from aq_jax.store.rows import row_location

DOCUMENT = Path(__file__).parent.parent / "docs" / "numbers.md"
NAME = "some.weight"
HUGE = 2**29  # elements from which on nothing is allocated any more
# The table's columns -> the config that quantizes.
CONFIGS = {
    "int8": QuantizationConfig("int8"),
    "int8, `keep`": QuantizationConfig("int8", on_nonfinite="keep"),
    "int2": QuantizationConfig("int2"),
    "fp16": QuantizationConfig("int8", mixed_precision_layers=("weight",)),
}


@dataclass(frozen=True)
class Input:
    """A tensor, as the first column of the table describes it."""

    text: str
    dtype: str
    shape: tuple[int, ...]
    change: str
    value: float

    @property
    def stored(self) -> str:
        """The dtype's name in this library; that of a dtype that it does not have is its own."""
        return SAFETENSORS_DTYPES.get(self.dtype, self.dtype)

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def array(self) -> np.ndarray:
        """[[1, 2, 0.5, 1], [0.25, 4, 1, 2]], or what the text makes of it."""
        dtype = DTYPES[self.stored]
        plain = np.resize(np.array([1, 2, 0.5, 1, 0.25, 4, 1, 2]), self.shape)
        if self.change == "times":
            plain = plain * self.value
        elif self.change == "all":
            plain = np.full(self.shape, self.value)
        if dtype == np.bool_:
            raw = (plain > 1).view(np.uint8)
            if self.change == "with":
                raw[0, 3] = int(self.value)
            return raw.view(np.bool_)
        with np.errstate(all="ignore"):
            made = plain.astype(dtype)
            if self.change == "with":
                made[0, 3] = int(self.value) if dtype.kind in "iu" else self.value
        return made


def parse_input(text: str) -> Input:
    match = re.fullmatch(r"`(\w+)`(?: \[([\d, ]*)\])?(?: (with|all|times) `([^`]+)`)?", text)
    assert match, f"{DOCUMENT.name}: {text!r} describes no tensor"
    dtype, shape, change, value = match.groups()
    sizes = (2, 4) if shape is None else tuple(int(n) for n in shape.split(",") if n.strip())
    base, _, exponent = (value or "0").partition("^")
    number = float(base) ** int(exponent) if exponent else float(base)
    return Input(text, dtype, sizes, change or "", number)


def read_table() -> tuple[list[str], list[list[str]]]:
    _, _, table = DOCUMENT.read_text().rpartition("\n\n")
    lines = table.splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(len(row) == len(header) for row in rows)
    return header, rows


HEADER, ROWS = read_table()
CELLS = [(row[0], column, cell) for row in ROWS for column, cell in zip(HEADER[1:], row[1:], strict=True)]
SMALL = [cell for cell in CELLS if parse_input(cell[0]).count < HUGE]
LARGE = [cell for cell in CELLS if parse_input(cell[0]).count >= HUGE and cell[2] != "-"]


# ------------------------------------------------------------------------------------------------ what is done


def write_safetensors(given: Input, folder: Path) -> Path:
    """The tensor in a folder of weights, written without the library, which does not write all dtypes."""
    folder.mkdir(exist_ok=True)
    # Or four or six bits a number, whichever they are.
    data = given.array().tobytes() if given.stored in DTYPES else bytes(given.count * int(given.dtype[1]) // 8)
    entry = {"dtype": given.dtype, "shape": list(given.shape), "data_offsets": [0, len(data)]}
    text = json.dumps({NAME: entry}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder


def v1(given: Input, folder: Path) -> Path:
    """The table of the tensor: from safetensors, or by `save` what safetensors does not have."""
    path = folder / "v1.parquet"
    if path.exists():
        return path
    if given.dtype in SAFETENSORS_DTYPES or given.dtype not in DTYPES:
        huggingface.to_table(write_safetensors(given, folder / "hf"), path)
    else:
        aq.save(path, {NAME: given.array()})
    return path


def compare(found: np.ndarray, given: Input) -> str:
    """`kept`, or the dtype that the values have now."""
    wanted = given.array()
    assert found.shape == wanted.shape
    if found.dtype == wanted.dtype:
        assert found.tobytes() == wanted.tobytes()
        return "kept"
    with np.errstate(over="ignore"):
        assert np.array_equal(found, wanted.astype(found.dtype), equal_nan=found.dtype.kind in "fc")
    return found.dtype.name


def quantized(config: QuantizationConfig, given: Input, folder: Path) -> str:
    source, output = v1(given, folder), folder / "v2.arrow"
    aq.quantize_file(source, output, config)
    with aq.WeightLoader(output) as loader:
        kind = loader.describe(NAME).quant_type
        found = loader.get_layer(NAME, "numpy")
    aq.dequantize_file(output, folder / "back.arrow")
    back = aq.load(folder / "back.arrow", "numpy")[NAME]
    assert back.dtype == DTYPES[given.stored]
    if kind == "none":
        return compare(back, given)
    wanted = given.array().astype(np.float64)
    if kind == "fp16" and given.stored == "float16":
        assert compare(back, given) == "kept"  # whatever it holds
        return kind
    assert np.isfinite(found).all()
    assert np.isfinite(back.astype(np.float64)).all()
    assert found.shape == back.shape == wanted.shape
    most = np.abs(wanted).max(initial=0)
    if kind == "fp16":
        assert found.dtype == back.dtype
        assert np.abs(back.astype(np.float64) - wanted).max(initial=0) <= most * 2.0**-10
    else:
        assert found.dtype == np.float32
        # A constant group is exact.
        bound = 0 if given.change == "all" else most / 2 if kind == "int2" else most / 200
        assert np.abs(found - wanted).max(initial=0) <= bound
    return str(kind)


def loaded(framework: str, given: Input, folder: Path) -> str:
    torch = pytest.importorskip("torch") if framework == "torch" else None
    found = aq.load(v1(given, folder), framework)[NAME]  # type: ignore[arg-type]
    if torch is not None:
        assert str(found.dtype) == f"torch.{given.stored}"
        assert tuple(found.shape) == given.shape
        assert found.reshape(-1).view(torch.uint8).numpy().tobytes() == given.array().tobytes()
        return "kept"
    return compare(np.asarray(found), given)


def written_again(given: Input, folder: Path) -> str:
    source = v1(given, folder)
    huggingface.from_table(source, folder / "again", config_from=folder)
    with open_checkpoint(folder / "again") as found:
        return compare(found.read(NAME), given)


def stored(given: Input, folder: Path) -> str:
    return compare(aq.load(v1(given, folder), "numpy")[NAME], given)


ROADS: dict[str, Callable[[Input, Path], str]] = {
    "V1 table": stored,
    **{column: functools.partial(quantized, config) for column, config in CONFIGS.items()},
    "NumPy": functools.partial(loaded, "numpy"),
    "JAX": functools.partial(loaded, "jax"),
    "torch": functools.partial(loaded, "torch"),
    "safetensors": written_again,
}


def outcome(given: Input, column: str, folder: Path) -> str:
    try:
        return ROADS[column](given, folder)
    except aq.AqError as error:
        assert NAME in str(error), f"the tensor is not named: {error}"  # noqa: PT017
        return f"refused: {error}"


# ------------------------------------------------------------------------------------------------ the walk


@pytest.fixture(autouse=True)
def _unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of small files, for which nobody needs to wait until they are on the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """One for each row of the table, so that its V1 table is written once."""
    return functools.cache(lambda text: tmp_path_factory.mktemp("row"))


def test_the_table_has_a_row_for_every_dtype_that_safetensors_knows(tmp_path: Path) -> None:
    write_safetensors(parse_input("`F32`"), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"???"'))
    with pytest.raises(safetensors.SafetensorError) as caught, safetensors.safe_open(path, framework="numpy"):
        pass
    _, _, listed = str(caught.value).partition("expected one of ")
    known = set(re.findall(r"`(\w+)`", listed))
    assert {"F32", "F4", "BOOL"} < known, "the library does not say any more what it knows"
    described = {given.dtype for text, _, _ in SMALL if (given := parse_input(text)).text == f"`{given.dtype}`"}
    assert known <= described
    assert set(SAFETENSORS_DTYPES) <= known
    # And for every dtype of the format.
    assert set(DTYPES) <= {SAFETENSORS_DTYPES.get(dtype, dtype) for dtype in described}


def test_the_table_has_all_columns() -> None:
    assert HEADER[1:] == list(ROADS)
    assert len({row[0] for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize(("text", "column", "cell"), SMALL, ids=lambda value: str(value).replace("`", ""))
def test_what_the_table_says_is_what_becomes_of_it(
    folder_of: Callable[[str], Path], text: str, column: str, cell: str
) -> None:
    given, folder = parse_input(text), folder_of(text)
    if cell == "-":  # because there is no table of it
        assert outcome(given, "V1 table", folder).startswith("refused")
        return
    found = outcome(given, column, folder)
    if cell.startswith("refused: "):
        assert found.startswith("refused: ")
        assert cell.removeprefix("refused: ") in found
        # Before there is a table of it, which nobody could load.
        assert column != "V1 table" or not (folder / "v1.parquet").exists()
    else:
        assert found == cell


@pytest.mark.parametrize(("dtype", "most"), [("float16", 65504), ("float8_e4m3fn", 448), ("float8_e5m2", 57344)])
@pytest.mark.parametrize("output", ["back.parquet", "back"])
def test_levels_beyond_the_largest_number_of_a_dtype_become_that_number(
    tmp_path: Path, dtype: str, most: float, output: str
) -> None:
    """A grid may end outside of its group, a rotation even further; these dtypes make infinities of it, or NaN."""
    w = np.random.default_rng(0).choice([1, -1, 0.5, -0.3, 0.1], size=(64, 128)) * most
    aq.save(tmp_path / "v1.parquet", {NAME: w.astype(DTYPES[dtype])})
    aq.quantize_file(tmp_path / "v1.parquet", tmp_path / "v2.parquet", QuantizationConfig("int3", rotate=True))
    wide = aq.load(tmp_path / "v2.parquet", "numpy")[NAME]
    with np.errstate(over="ignore"):
        assert not np.isfinite(wide.astype(DTYPES[dtype]).astype(np.float32)).all(), "the test would show nothing"
    aq.dequantize_file(tmp_path / "v2.parquet", tmp_path / output)
    if output == "back":
        with open_checkpoint(tmp_path / "back") as weights:
            found = weights.read(NAME).copy()
    else:
        found = aq.load(tmp_path / output, "numpy")[NAME]
    assert found.dtype == DTYPES[dtype]
    assert np.array_equal(found, np.clip(wide, -most, most).astype(found.dtype))


# ------------------------------------------------------------------------------------------------ too large to be made


def empty(shape: tuple[int, ...], dtype: str, folder: Path) -> np.ndarray:
    """An array of any size, in a file of nothing but a hole."""
    path = folder / f"hole.{dtype}"
    with path.open("wb") as file:
        file.truncate(math.prod(shape) * DTYPES[dtype].itemsize)
    return np.memmap(path, DTYPES[dtype], "r", shape=shape)


def repeated(value: float, count: int, dtype: type) -> np.ndarray:
    """An array of any length that takes no memory."""
    return np.broadcast_to(np.array([value], dtype), (count,))


def large_rows(given: Input, config: QuantizationConfig | None, folder: Path) -> list[Row]:
    """The rows that a tensor would be stored in, by the functions that make them: only arithmetic is left out."""

    def quantize_pieces(array: np.ndarray, policy: QuantizationConfig, name: str, cuts: list[tuple[int, int]]) -> Any:
        spec = policy.spec_for(array.shape, name)
        for start, stop in cuts:
            groups = group_count(stop - start, array.shape, spec.quant_axis, spec.group_size)
            data = repeated(0, spec.coding.data_bytes(stop - start, array.shape), np.uint8)
            yield Quantized(data, repeated(1, groups, np.float32), repeated(0, groups, np.float32), 1.0, 0.0)

    array = empty(given.shape, given.stored, folder)
    if config is None:
        return list(plain_rows(NAME, array))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "quantize_pieces", quantize_pieces)
        patch.setattr(write, "to_float16", lambda array: empty(array.shape, "float16", folder))
        treatment = treat(config, NAME, array.shape, array.dtype)
        return list(quantized_rows(NAME, array, treatment, ConversionResult("")))


def checked(rows: list[Row]) -> str:
    """What a table says to rows; they are read by nobody."""
    order = RowOrder()
    try:
        for position, row in enumerate(rows):
            check(row, row_location("t", position, NAME))
            order.add(row, "t", position)
        order.finish("t")
    except aq.FormatError as error:
        return f"refused: {error}"
    return f"{len(rows)} row{'s' * (len(rows) > 1)}"


@pytest.mark.parametrize(("text", "column", "cell"), LARGE, ids=lambda value: str(value).replace("`", ""))
def test_tensors_that_are_too_large_to_be_made_here(tmp_path: Path, text: str, column: str, cell: str) -> None:
    given = parse_input(text)
    rows = large_rows(given, CONFIGS.get(column), tmp_path)
    assert sum(row.num_params for row in rows) == given.count
    found = checked(rows)
    if cell.startswith("refused: "):
        assert found.startswith(f"refused: t: row 0 ({NAME}): ")
        assert cell.removeprefix("refused: ") in found
    else:
        assert found == cell


@pytest.mark.parametrize("text", dict.fromkeys(text for text, _, _ in LARGE), ids=lambda text: text.replace("`", ""))
@pytest.mark.parametrize("column", [None, "int8", "int2"])
def test_a_plan_of_them_counts_every_byte(tmp_path: Path, text: str, column: str | None) -> None:
    given, folder = parse_input(text), tmp_path / "hf"
    folder.mkdir()
    size = given.count * DTYPES[given.stored].itemsize
    entry = {"dtype": given.dtype, "shape": list(given.shape), "data_offsets": [0, size]}
    header = json.dumps({NAME: entry}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    config = None if column is None else CONFIGS[column]
    (planned,) = dry_run(ConversionConfig(str(folder), str(tmp_path / "m.arrow"), config)).rows
    rows = large_rows(given, config, tmp_path)
    assert planned.bytes == sum(row.data.nbytes + row.scales.nbytes + row.zero_points.nbytes for row in rows)


@pytest.mark.parametrize("kernel", ["native", "xla"])
def test_tiles_beyond_two_to_the_31_are_those_at_the_beginning(tmp_path: Path, kernel: str) -> None:
    """16 GiB of weights, of which the first and the last are there, and equal."""
    values, count = np.random.default_rng(0).normal(size=1 << 19).astype(np.float32), 1 << 32
    with (tmp_path / "w").open("wb") as file:
        for start in (0, count - values.size):
            file.seek(4 * start)
            file.write(values.tobytes())
    config = QuantizationConfig("int4", solver="absmax")
    w, size, spec = np.memmap(tmp_path / "w", np.float32, "r"), config.spec.group_size, config.spec
    entry = KERNELS["quantize"][kernel]
    if why := entry.refuses(size, spec.coding):
        pytest.skip(why)
    recipes = AbsMax().recipes(spec.coding, True)
    road = (
        NativeGroups(w, size, spec, recipes)
        if kernel == "native"
        else GroupsPerTile(w, size, spec, AbsMax(), True, entry)
    )
    near, far = (
        road.candidates(start, start + values.size, keep=True)[0] for start in (0, count - values.size)
    )  # fmt: skip
    assert near.data.any()
    assert np.array_equal(near.data, far.data)
    assert np.array_equal(near.scales, far.scales)
    assert np.array_equal(near.sums, far.sums)


@pytest.mark.parametrize(
    "config", [QuantizationConfig("int8"), QuantizationConfig("int4", group_size=96, solver="absmax")]
)
def test_compiled_programs_are_made_for_over_two_to_the_31_elements(config: QuantizationConfig) -> None:
    """Traced only: an index that 32 bits do not hold is seen then."""
    w = jax.ShapeDtypeStruct((65536, 65536), jnp.float32)
    q = jax.eval_shape(lambda w: aq.quantize(w, config), w)
    assert q.shape == w.shape
    assert jax.eval_shape(aq.dequantize, q).shape == w.shape
    x, ids = jax.ShapeDtypeStruct((2, 65536), jnp.float32), jax.ShapeDtypeStruct((3,), jnp.int32)
    assert jax.eval_shape(aq.qdot, x, q).shape == (2, 65536)
    if config.group_size:  # whose groups cross rows
        with pytest.raises(ValueError, match="a table of 4294967296 elements whose groups cross rows cannot be"):
            jax.eval_shape(aq.qembed, q, ids)
    else:
        assert jax.eval_shape(aq.qembed, q, ids).shape == (3, 65536)
