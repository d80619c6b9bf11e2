"""Trees and tables to Orbax checkpoints and back: what is read is what was written, or refused."""

from __future__ import annotations

import copy
import gc
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from blake3 import blake3
from flax import nnx
from helpers import listing
from orbax.checkpoint import v1 as ocp

import aq_jax as aq
from aq_jax.config import QuantizationConfig, QuantSpec
from aq_jax.converters import orbax
from aq_jax.converters.orbax.metadata import AbstractArray, ArrayEntry, TensorEntry
from aq_jax.converters.orbax.tensors import read_arrays
from aq_jax.core.qtensor import QTensor, scale_shape, zero_shape
from aq_jax.store import DTYPES, open_table
from aq_jax.store.digest import table_digest

# What Orbax leaves of a load that failed; `gc.collect` at the end of such a test keeps it there.
failed_loads = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
SPECS = {
    "int8": ((6, 20), QuantSpec(8, per_channel=True)),
    "int4": ((6, 32), QuantSpec(4, group_size=16)),
    "rotated": ((4, 16), QuantSpec(4, group_size=8, rotation=16)),
    "across_rows": ((6, 20), QuantSpec(2, group_size=32)),  # groups run over the flattened tensor
    "no_bytes": ((5, 7), QuantSpec(3, group_size=8)),  # a row is no whole number of bytes: int8 codes
    "stacked": ((3, 6, 32), QuantSpec(3, group_size=16)),
    "tensor": ((4, 8), QuantSpec(2)),
    "empty": ((0, 8), QuantSpec(8, per_channel=True)),
    "bytes": ((6, 32), QuantSpec(4, group_size=16, code="int4_f16i")),  # zero points of another dtype than scales
    "packed": ((6, 32), QuantSpec(2, group_size=4, code="int2_f16p")),  # and of another shape
}


def quantized(shape: tuple[int, ...], spec: QuantSpec, seed: int = 0) -> QTensor:
    """Any codes on any grid: nothing here depends on how they were chosen."""
    rng = np.random.default_rng(seed)
    *lead, length = shape
    whole = spec.bits < 8 and length * spec.bits % 8 == 0
    codes = (
        rng.integers(0, 256, (*lead, length * spec.bits // 8), np.uint8)
        if whole
        else rng.integers(-(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1), shape, np.int8)
    )
    grids, code = scale_shape(shape, spec), spec.coding
    zeros = (4 * rng.normal(size=zero_shape(shape, spec))).astype(DTYPES[code.zero_dtype])
    scale = rng.uniform(0.5, 2, grids).astype(DTYPES[code.grid_dtype])
    return QTensor(*map(jnp.asarray, (codes, scale, zeros)), spec, length)


@pytest.fixture
def tree() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    embed = quantized((8, 16), QuantSpec(4, group_size=16), 7)
    return {
        "layers": [{"kernel": quantized(*case, seed), "bias": jnp.ones(3)} for seed, case in enumerate(SPECS.values())],
        "numbered": {2: jnp.arange(2), 10: jnp.arange(3)},
        "pair": (jnp.asarray(rng.normal(size=(3, 5)), jnp.bfloat16), None, {}),
        "a.b/c d%\u00fc": jnp.asarray(rng.normal(size=4), jnp.float8_e4m3fn),
        "": jnp.float32(2.5),
        "nothing": jnp.zeros((0, 4), jnp.int8),
        "embed": embed,
        "head": embed,
    }


def assert_same(found: Any, wanted: Any) -> None:
    """The same tree, static fields and bits."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        assert isinstance(a, jax.Array), path
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


# ------------------------------------------------------------------------------------------------ trees


def test_a_tree_comes_back_bit_for_bit(tree: dict[str, Any], tmp_path: Path) -> None:
    assert orbax.save(tmp_path / "c", tree) == tmp_path / "c"
    found = orbax.load(tmp_path / "c")
    assert_same(found, tree)
    assert found["head"].codes is found["embed"].codes  # one tensor, as it was
    assert list(found) == list(tree)
    assert [f.name for f in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("tree", [{}, [], None, jnp.arange(3), {"e": jnp.zeros(0)}], ids=str)
def test_the_smallest_trees_come_back(tree: Any, tmp_path: Path) -> None:
    orbax.save(tmp_path / "c", tree)
    assert_same(orbax.load(tmp_path / "c"), tree)


def test_a_batch_of_tensors_comes_back(tmp_path: Path) -> None:
    one = [quantized((6, 20), QuantSpec(2, group_size=32), seed) for seed in range(3)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *one)
    assert batch.scale.shape == (3, 4)  # not those of one tensor of shape [3, 6, 20]
    orbax.save(tmp_path / "c", [batch])
    assert_same(orbax.load(tmp_path / "c"), [batch])


def test_every_dtype_comes_back_as_jax_has_it(tmp_path: Path) -> None:
    arrays = {name: np.arange(6).reshape(2, 3).astype(dtype) for name, dtype in DTYPES.items()}
    orbax.save(tmp_path / "c", arrays)
    found = orbax.load(tmp_path / "c")
    for name, array in arrays.items():
        narrow = {"int64": "int32", "uint64": "uint32", "float64": "float32", "complex128": "complex64"}.get(name, name)
        assert found[name].dtype.name == narrow
        assert np.asarray(found[name]).tobytes() == array.astype(DTYPES[narrow]).tobytes(), name
    orbax.save(tmp_path / "large", {"n": np.array([1, 2**40])})
    with pytest.raises(aq.AqError, match=r"n: int64 value 1099511627776 at \[1\] does not fit int32"):
        orbax.load(tmp_path / "large")


def test_orbax_itself_reads_the_codes_as_bytes(tree: dict[str, Any], tmp_path: Path) -> None:
    orbax.save(tmp_path / "c", tree)
    raw = ocp.load(tmp_path / "c", checkpointable_name="aq_jax_arrays")
    known = json.loads(next((tmp_path / "c" / "aq_jax_metadata").iterdir()).read_text())
    text = json.dumps({k: v for k, v in known.items() if k != "digest"}, sort_keys=True, separators=(",", ":"),
                      ensure_ascii=False)  # fmt: skip
    assert blake3(text.encode()).hexdigest() == known["digest"]
    assert (known["format"], known["version"]) == ("aq_jax.orbax", "1.0")
    for name, key in (("layers.0.kernel", "layers.0.kernel:codes"), ("a.b/c d%ü", "a.b%2Fc%20d%25%C3%BC")):
        entry = known["tensors"][name]
        entry = entry.get("codes", entry.get("array"))
        assert raw[key].shape == tuple(entry["shape"])
        assert blake3(np.asarray(raw[key]).tobytes()).hexdigest() == entry["digest"]
    assert {a.dtype.name for k, a in raw.items() if k.endswith(":codes")} == {"uint8"}
    assert known["tensors"]["layers.0.kernel"]["codes"]["dtype"] == "int8"
    assert known["tensors"]["layers.0.kernel"]["spec"] == {
        "bits": 8, "per_channel": True, "group_size": 0, "rotation": 0,
    }  # fmt: skip
    assert not any("nothing" in key or "layers.7.kernel:codes" in key for key in raw)  # no elements, no array


def test_what_is_loaded_is_computed_with(tmp_path: Path) -> None:
    q = quantized(*SPECS["int4"])
    orbax.save(tmp_path / "c", {"w": q})
    found = orbax.load(tmp_path / "c")["w"]
    x = jnp.ones((3, 32))
    np.testing.assert_array_equal(aq.qdot(x, found), aq.qdot(x, q))


def test_settings_for_other_checkpoints_do_not_reach_ours(tmp_path: Path) -> None:
    context = ocp.Context()
    context.array.saving.storage_options = ocp.options.ArrayOptions.Saving.StorageOptions(dtype=jnp.float16)
    context.pytree.loading.partial_load = True
    tree = {"w": jnp.linspace(0, 1, 7), "q": quantized(*SPECS["int4"])}
    with context:
        orbax.save(tmp_path / "c", tree)
        assert_same(orbax.load(tmp_path / "c"), tree)


GOOD = quantized(*SPECS["int4"])


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": {"b": 1.5}}, r"^a\.b: is a float; wanted arrays and QTensors in dictionaries"),
        ({"a": "text"}, "^a: is a str; wanted arrays"),
        ("text", "^the tree: is a str; wanted arrays"),
        ({"a": {1.5: jnp.ones(1)}}, r"^a: has a key 1\.5; wanted strings and integers"),
        ({"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)}, r"^a\.b: two leaves of the tree have this name"),
        ({1: jnp.ones(1), "1": jnp.ones(1)}, "^1: two leaves of the tree have this name"),
        ({"\ud800": jnp.ones(1)}, r"^'\\ud800': is no valid Unicode"),
        ({"k": jax.random.key(0)}, "^k: .* of dtype key<fry> cannot be stored; wanted one of float64, "),
        ({"s": GOOD, "t": {"u": replace(GOOD, scale=None)}}, "^t.u.scale: NoneType of dtype object cannot be stored"),
        ({"o": np.array([None])}, "^o: ndarray of dtype object cannot be stored"),
        ({"i": jnp.ones(2, jnp.int4)}, "^i: .* of dtype int4 cannot be stored"),
        ({"q": replace(GOOD, scale=GOOD.scale[:3])}, r"q: no checkpoint can have scale float32\[3, 2\] for QuantSpec"),
        ({"q": replace(GOOD, scale=GOOD.scale.astype(np.float16))}, "q: no checkpoint can have scale float16"),
        ({"q": replace(GOOD, length=31)}, "q: no checkpoint can have codes"),
        ({"q": replace(GOOD, codes=GOOD.codes.astype(np.int32))}, "q: no checkpoint can have codes int32"),
        ({"q": replace(GOOD, spec=QuantSpec(9))}, "q: no checkpoint can have spec"),
    ],
)
def test_what_cannot_be_saved_is_named_and_leaves_nothing(tree: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(aq.AqError, match=message):
        orbax.save(tmp_path / "c", tree)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("there", ["folder", "file", "link"])
def test_what_is_there_already_is_left_alone(there: str, tmp_path: Path) -> None:
    path = tmp_path / "c"
    if there == "link":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.mkdir() if there == "folder" else path.write_text("mine")
    aq.save(tmp_path / "m.parquet", {"w": np.ones(2)})
    for write in (lambda: orbax.save(path, {"w": jnp.ones(2)}), lambda: orbax.from_table(tmp_path / "m.parquet", path)):
        with pytest.raises(aq.FormatError, match="c: already exists; remove it, or write to another path"):
            write()
    assert listing(tmp_path) == ["c", "m.parquet"]
    assert there != "file" or path.read_text() == "mine"


@failed_loads
def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    tree = {"w": np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, limits[1]))  # Orbax begins to write, and cannot go on
    try:
        with pytest.raises(aq.AqError, match="c: the checkpoint cannot be written: "):
            orbax.save(tmp_path / "c", tree)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert listing(tmp_path) == []
    orbax.save(tmp_path / "c", tree)
    assert orbax.load(tmp_path / "c")["w"].sum() == tree["w"].sum()
    gc.collect()


def test_what_a_killed_process_left_behind_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / "c.orbax-checkpoint-tmp" / "aq_jax_arrays").mkdir(parents=True)
    orbax.save(tmp_path / "c", {"w": jnp.ones(2)})
    assert [f.name for f in tmp_path.iterdir()] == ["c"]


# ------------------------------------------------------------------------------------------------ damage

# Large enough that Orbax puts their bytes where it has no checksum of its own.
SMALL = {
    "w": {
        "q": quantized((32, 64), QuantSpec(4, group_size=64)),
        "b": jnp.asarray(np.random.default_rng(0).normal(size=400), np.float32),
    },
    "e": jnp.zeros(0),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return orbax.save(tmp_path_factory.mktemp("small") / "c", SMALL)


@pytest.fixture
def small(saved: Path, tmp_path: Path) -> Path:
    """Copy the checkpoint, which a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "c"))


def refused(path: Path) -> str:
    """The error in which loading ends, one of those in which it may; what is loaded is right."""
    try:
        found = orbax.load(path)
    except (aq.FormatError, aq.IntegrityError) as error:
        return str(error)
    assert_same(found, SMALL)
    return ""


@failed_loads
@pytest.mark.slow
def test_no_flipped_bit_is_silently_wrong(small: Path) -> None:
    rng = np.random.default_rng(5)
    caught: dict[str, list[str]] = {}
    for file in sorted(f for f in small.rglob("*") if f.is_file()):
        good = file.read_bytes()
        errors = caught.setdefault(str(file.relative_to(small)), [])
        flips = 0 if not good else 30 if file.parent.name == "d" else 10
        for bit in rng.integers(0, 8 * max(1, len(good)), flips):
            bad = bytearray(good)
            bad[bit // 8] ^= 1 << (bit % 8)
            file.write_bytes(bad)
            errors.append(refused(small))
        file.write_bytes(good)
    assert not refused(small)
    assert all(caught["aq_jax_metadata/data.json"])
    seen = [error for name, errors in caught.items() if "/d/" in name for error in errors]
    assert sum("its bytes have digest" in error for error in seen) > 5  # which Orbax alone would have loaded
    gc.collect()


@failed_loads
def test_no_flipped_bit_of_an_array_gets_through(small: Path) -> None:
    """The bytes of arrays, wherever Orbax puts them: without digests all of these would load."""
    raw = ocp.load(small, checkpointable_name="aq_jax_arrays")
    for key, array in raw.items():
        flat = np.array(array)
        flat.reshape(-1).view(np.uint8)[-1] ^= 4
        rewrite(small, raw | {key: flat})
        with pytest.raises(aq.IntegrityError, match=rf"{key.replace(':', '.')}: its bytes have digest .*; wanted"):
            orbax.load(small)
    rewrite(small, raw)
    assert not refused(small)
    for bad, message in (
        (raw | {"w.b": np.array(raw["w.b"]).astype(np.float64)}, r"w\.b: "),
        (
            raw | {"w.b": np.array(raw["w.b"]).reshape(4, 100)},
            r"w\.b: is float32\[4, 100\]; wanted float32\[400\]",
        ),
        (raw | {"more": np.ones(3)}, "cannot be read"),
        ({key: value for key, value in raw.items() if key != "w.b"}, "cannot be read"),
        ({key: value for key, value in raw.items() if key != "w.q:scale"}, "cannot be read"),
    ):
        rewrite(small, bad)
        if "w.b" in bad and np.asarray(bad["w.b"]).dtype == np.float64:  # exact in float32 as well
            assert not refused(small)
            continue
        with pytest.raises(aq.IntegrityError, match=message):
            orbax.load(small)
    gc.collect()


def rewrite(path: Path, arrays: dict[str, Any]) -> None:
    """Other arrays beside the metadata."""
    other = path.with_name("other")
    ocp.save_checkpointables(other, {"aq_jax_arrays": arrays}, overwrite=True)
    shutil.rmtree(path / "aq_jax_arrays")
    (other / "aq_jax_arrays").rename(path / "aq_jax_arrays")


@failed_loads
def test_files_that_are_cut_or_gone_are_refused(small: Path) -> None:
    files = [f for f in small.rglob("*") if f.is_file()]
    gone = 0
    for file in files:
        good = file.read_bytes()
        for end in {0, len(good) // 2} if good else ():
            file.write_bytes(good[:end])
            refused(small)
        file.unlink()
        gone += bool(refused(small))
        file.write_bytes(good)
    assert gone >= 3
    for name, message in (("aq_jax_metadata", "holds no aq_jax_metadata"), ("aq_jax_arrays", "cannot be read")):
        (small / name).rename(small.parent / "away")
        with pytest.raises(aq.AqError, match=message):
            orbax.load(small)
        with pytest.raises(aq.AqError, match=message):
            orbax.to_table(small, small.parent / "m.parquet")
        (small.parent / "away").rename(small / name)
    assert not refused(small)
    gc.collect()


EDITS: dict[str, Callable[[Any], Any]] = {
    "bits": lambda k: k["tensors"]["w.q"]["spec"].update(bits=2),
    "rotation": lambda k: k["tensors"]["w.q"]["spec"].update(rotation=16),
    "symmetric": lambda k: k["tensors"]["w.q"]["spec"].update(symmetric=False),
    "group_size": lambda k: k["tensors"]["w.q"]["spec"].update(group_size=8),
    "length": lambda k: k["tensors"]["w.q"].update(length=63),
    "shape": lambda k: k["tensors"]["w.b"]["array"].update(shape=[4, 100]),
    "dtype": lambda k: k["tensors"]["w.b"]["array"].update(dtype="int32"),
    "digest": lambda k: k["tensors"]["w.b"]["array"].update(digest="0" * 64),
    "tensor": lambda k: k["tensors"].pop("w.b"),
    "empty": lambda k: k["tensors"]["e"]["array"].update(shape=[0, 2]),
    "name": lambda k: k["tree"]["dict"][0][1]["dict"][0].__setitem__(0, "r"),
    "order": lambda k: k["tree"]["dict"].reverse(),
    "kind": lambda k: k["tree"]["dict"][0].__setitem__(1, {"list": k["tree"]["dict"][0][1]["dict"]}),
    "writer": lambda k: k.update(writer="another"),
    "signature": lambda k: k.update(digest="0" * 64),
    "no_signature": lambda k: k.pop("digest"),
}


def edit(path: Path, change: Callable[[Any], Any], sign: bool = False) -> None:
    file = path / "aq_jax_metadata" / "data.json"
    known = json.loads(file.read_text())
    change(known)
    if sign:
        known["digest"] = table_digest(known).hex()
    file.write_text(json.dumps(known))


@pytest.mark.parametrize("change", EDITS.values(), ids=EDITS)
def test_an_edited_field_is_refused(change: Callable[[Any], Any], small: Path) -> None:
    edit(small, lambda known: None)
    assert not refused(small)
    edit(small, change)
    with pytest.raises(aq.IntegrityError, match=r"aq_jax_metadata has digest \w+; wanted \w+: it was damaged"):
        orbax.load(small)


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_the_first_release_wrote_of_symmetry_is_read_and_not_kept(symmetric: bool, small: Path) -> None:
    edit(small, lambda k: k["tensors"]["w.q"]["spec"].update(symmetric=symmetric), sign=True)
    assert_same(orbax.load(small), SMALL)


NONSENSE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "version": (lambda k: k.update(version="2.0"), "format version '2.0' is unknown; this release reads 1.0"),
    "no_version": (lambda k: k.pop("version"), "wanted 'aq_jax.orbax' and a version"),
    "format": (lambda k: k.update(format="other"), "is of format 'other'; wanted 'aq_jax.orbax'"),
    "tensors": (lambda k: k.update(tensors=[]), r"no checkpoint can have tensors \[\]"),
    "tree": (lambda k: k.update(tree=5), "no checkpoint can have tree 5"),
    "kind": (lambda k: k.update(tree={"set": []}), "no checkpoint can have tree"),
    "items": (lambda k: k.update(tree={"dict": [["a"]]}), "no checkpoint can have dict"),
    "keys": (lambda k: k.update(tree={"dict": [["a", None], ["a", None]]}), "no checkpoint can have keys"),
    "unused": (lambda k: k.update(tree=None), r"no checkpoint can have tree \[\]"),
    "unknown": (lambda k: k.update(tree={"list": [[0, "w.q"], [1, "x"]]}), "no checkpoint can have tree"),
    "entry": (lambda k: k["tensors"].update(e=[]), r"e: no checkpoint can have entry \[\]"),
    "row": (lambda k: k["tensors"]["e"].update(row={"dtype": "x"}), "e: no checkpoint can have row"),
    "negative": (lambda k: k["tensors"]["e"]["array"].update(shape=[-1]), "e: no checkpoint can have array"),
    "float": (lambda k: k["tensors"]["e"]["array"].update(shape=[2.0]), "e: no checkpoint can have array"),
    "dtype": (lambda k: k["tensors"]["e"]["array"].update(dtype="text"), "e: no checkpoint can have array"),
    "bits": (lambda k: k["tensors"]["w.q"]["spec"].update(bits=2), r"w\.q: no checkpoint can have codes"),
    "one_bit": (lambda k: k["tensors"]["w.q"]["spec"].update(bits=1), r"w\.q: no checkpoint can have spec"),
    "symmetric": (lambda k: k["tensors"]["w.q"]["spec"].update(symmetric=1), r"w\.q: no checkpoint can have spec"),
    "another": (lambda k: k["tensors"]["w.q"]["spec"].update(signed=True), r"w\.q: no checkpoint can have spec"),
    "rotation": (lambda k: k["tensors"]["w.q"]["spec"].update(rotation=3), r"w\.q: no checkpoint can have spec"),
    "group_size": (lambda k: k["tensors"]["w.q"]["spec"].update(group_size=8), r"w\.q: no checkpoint can have scale"),
    "spec": (lambda k: k["tensors"]["w.q"]["spec"].pop("bits"), r"w\.q: no checkpoint can have spec"),
    "part": (lambda k: k["tensors"]["w.q"].pop("scale"), r"w\.q: no checkpoint can have scale None"),
    "length": (lambda k: k["tensors"]["w.q"].update(length=63), r"w\.q: no checkpoint can have codes"),
}


@pytest.mark.parametrize(("change", "message"), NONSENSE.values(), ids=NONSENSE)
def test_nonsense_is_refused_whatever_its_digest(change: Callable[[Any], Any], message: str, small: Path) -> None:
    edit(small, change, sign=True)
    with pytest.raises(aq.FormatError, match=message):
        orbax.load(small)


@failed_loads
def test_metadata_that_is_none_is_refused(small: Path) -> None:
    for text in ("", "{", "[]", "5", '{"a": NaN}', "[" * 5000):
        (small / "aq_jax_metadata" / "data.json").write_text(text)
        with pytest.raises((aq.FormatError, aq.IntegrityError)):
            orbax.load(small)
    gc.collect()


def test_what_is_no_checkpoint_is_named(small: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for read in (orbax.load, lambda path: orbax.to_table(path, tmp_path / "m.parquet")):
        with pytest.raises(FileNotFoundError, match="missing: does not exist"):
            read(tmp_path / "missing")
        with pytest.raises(aq.FormatError, match="file: is a file; wanted the folder"):
            read(tmp_path / "file")
        with pytest.raises(aq.FormatError, match="folder: "):
            read(tmp_path / "folder")
    ocp.save(tmp_path / "plain", {"w": jnp.ones(2)})
    with pytest.raises(aq.FormatError, match="plain: holds no aq_jax_metadata: another program wrote it"):
        orbax.load(tmp_path / "plain")
    assert not (tmp_path / "m.parquet").exists()


# ------------------------------------------------------------------------------------------------ shardings

SHARDED = """
import sys
import jax, jax.numpy as jnp, numpy as np
sys.path[:0] = sys.argv[2:]
from test_orbax import SPECS, assert_same, quantized
import aq_jax as aq
from aq_jax.config import QuantSpec
from aq_jax.converters import orbax

path = sys.argv[1] + "/c"
auto = (jax.sharding.AxisType.Auto,) * 2
line, grid = jax.make_mesh((8,), ("x",), axis_types=auto[:1]), jax.make_mesh((2, 4), ("a", "b"), axis_types=auto)
P, on = jax.P, lambda *spec: jax.NamedSharding(grid, P(*spec))
rows = jax.NamedSharding(line, P("x"))
tree = {
    "q": quantized((16, 64), QuantSpec(4, group_size=16)),  # 32 bytes and 4 groups a row
    "channels": quantized((16, 24), QuantSpec(8, per_channel=True)),
    "across": quantized((16, 20), QuantSpec(2, group_size=32)),  # 5 bytes a row; groups run over rows
    "stacked": quantized((4, 8, 32), QuantSpec(2, group_size=16)),
    "plain": [jnp.arange(64.0).reshape(16, 4), jnp.zeros((0, 4))],
    "tied": None,
}
tree["tied"] = tree["q"]
saved = {name: jax.device_put(leaf, rows) if name in ("q", "channels") else leaf for name, leaf in tree.items()}
saved["tied"] = saved["q"]
saved["plain"] = [jax.device_put(tree["plain"][0], rows), tree["plain"][1]]
orbax.save(path, saved)
assert len(saved["q"].codes.sharding.device_set) == 8

where = {
    "q": on("a", "b"), "channels": on("b", "a"), "across": on("a"), "stacked": on("a", None, "b"),
    "plain": [on(("a", "b"), None), on("a")], "tied": jax.sharding.SingleDeviceSharding(jax.devices()[5]),
}
found = orbax.load(path, where)
assert_same(found, tree)
specs = jax.tree.map(lambda leaf: tuple(getattr(leaf.sharding, "spec", ())), found)
for name, codes, scale in (
    ("q", ("a", "b"), ("a", "b")),
    ("channels", ("b", "a"), ("b", None)),
    ("across", ("a", None), ()),
    ("stacked", ("a", None, "b"), ("a", None, None)),
):
    q = found[name]
    assert (tuple(q.codes.sharding.spec), tuple(q.scale.sharding.spec)) == (codes, scale), (name, q.codes.sharding)
    assert q.zero_point.sharding == q.scale.sharding
    np.testing.assert_array_equal(aq.dequantize(q), aq.dequantize(tree[name]))
assert found["q"].codes.addressable_shards[0].data.shape == (8, 8)
assert found["plain"][0].sharding == where["plain"][0]
assert found["tied"].codes.devices() == {jax.devices()[5]}

again = orbax.load(path, {"q": jax.tree.map(lambda leaf: leaf.sharding, found["q"]), "plain.0": rows})
assert_same(again, tree)
assert again["q"].scale.sharding == found["q"].scale.sharding
assert again["plain"][0].sharding == rows
assert again["across"].codes.devices() == {jax.devices()[0]}
same = orbax.load(path, on())
assert_same(same, tree)
assert all(leaf.sharding.is_fully_replicated and len(leaf.devices()) == 8 for leaf in jax.tree.leaves(same))

for bad, message in (
    ({"q": on("b"), "plane": rows}, "shardings: the checkpoint has no 'plane'; the nearest is 'plain."),
    ({"plain.0": on(None, ("a", "b"))}, "plain.0: shape [16, 4] cannot be sharded by"),
    ({"across": on(None, "b")}, "across: P(None, 'b') on a mesh of {'a': 2, 'b': 4} cuts the 20 columns into 4"),
    ({"q": jax.tree.map(lambda leaf: on(None, None, "a"), tree["q"])}, "q: shape [16, 32] cannot be sharded by"),
    ({"q": "a"}, "shardings: q is 'a'; wanted jax.sharding.Sharding"),
):
    try:
        orbax.load(path, bad)
    except aq.FormatError as error:
        assert str(error).startswith(message), error
    else:
        raise AssertionError(message)
print("done")
"""


def test_a_checkpoint_goes_onto_other_shardings(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, str(tmp_path), *map(str, Path(__file__).parents[:2])],
        cwd=root, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert len(jax.devices()) == 1
    found = orbax.load(tmp_path / "c")  # in a process of one device
    wanted = quantized((16, 64), QuantSpec(4, group_size=16))
    assert_same(found["q"], wanted)


# ------------------------------------------------------------------------------------------------ tables


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Of every kind of row."""
    rng = np.random.default_rng(3)
    tied = rng.normal(size=(8, 16)).astype(np.float32)
    weights = {
        "a.weight": rng.normal(size=(8, 16)).astype(ml_dtypes.bfloat16),
        "b.weight": tied,
        "half.weight": rng.normal(size=(4, 4)).astype(np.float32),
        "bias": np.ones(8, np.float16),
        "ids": np.arange(4) + 2**40,
        "none": np.ones((0, 3), np.float32),
        "tied.weight": tied,
    }
    aq.save(tmp_path / "v1.parquet", weights)
    config = QuantizationConfig("int4", group_size=8, mixed_precision_layers=("half",))
    aq.quantize_file(tmp_path / "v1.parquet", tmp_path / "v2.parquet", config)
    return tmp_path / "v2.parquet"


def rows_of(path: Path) -> Any:
    with open_table(path) as reader:
        assert reader.metadata is not None
        rows = [(row.layer_name, row.digest, row.solver, row.cosine, row.rel_mse) for row in reader.rows()]
        return rows, reader.aliases, reader.metadata.config, reader.version


@pytest.mark.parametrize("name", ["v1.parquet", "v2.parquet"])
def test_a_table_comes_back_as_it_was(name: str, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orbax.from_table(table.with_name(name), tmp_path / "c")
    monkeypatch.setattr("aq_jax.converters.orbax.source.BATCH_BYTES", 300)  # one or two tensors at a time
    seen: list[tuple[str, int, int]] = []
    done = orbax.to_table(tmp_path / "c", tmp_path / "again.parquet", progress=lambda *args: seen.append(args))
    assert rows_of(tmp_path / "again.parquet") == rows_of(table.with_name(name))
    assert sum(size for _, size, _ in seen) == seen[0][2] == done.source_bytes
    assert len(done.notes) == (name[1] == "2")
    assert all(note.startswith("3 tensors were quantized already") for note in done.notes)
    assert (tmp_path / "again.parquet").read_bytes() == table.with_name(name).read_bytes()


def test_the_tensors_of_a_table_are_in_the_checkpoint(table: Path, tmp_path: Path) -> None:
    orbax.from_table(table, tmp_path / "c")
    with pytest.raises(aq.AqError, match="ids: int64 value 1099511627776"):
        orbax.load(tmp_path / "c")
    with jax.enable_x64(True):
        found, wanted = orbax.load(tmp_path / "c"), aq.load(table, packed=True)
    assert_same(found, wanted)
    assert isinstance(found["a.weight"], QTensor)
    assert found["tied.weight"].codes is found["b.weight"].codes
    assert found["half.weight"].dtype == np.float32  # as it was; the checkpoint has no more than the table
    assert ocp.load(tmp_path / "c", checkpointable_name="aq_jax_arrays")["half.weight"].dtype == np.float16


def test_quantized_tensors_are_not_rounded_twice(table: Path, tmp_path: Path) -> None:
    orbax.from_table(table, tmp_path / "c")
    with pytest.raises(aq.FormatError, match=r"a\.weight: is int4 already, and would be rounded twice"):
        orbax.to_table(tmp_path / "c", tmp_path / "m.parquet", QuantizationConfig("int2"))
    orbax.from_table(table.with_name("v1.parquet"), tmp_path / "plain")
    config = QuantizationConfig("int4", group_size=8, mixed_precision_layers=("half",))
    orbax.to_table(tmp_path / "plain", tmp_path / "m.parquet", config)
    assert rows_of(tmp_path / "m.parquet")[:2] == rows_of(table)[:2]
    assert not (tmp_path / "x.parquet").exists()


@failed_loads
def test_a_table_s_float16_is_refused_where_its_dtype_does_not_hold_it() -> None:
    half = np.array([[1, 2], [-300, 4]], np.float16)
    like = AbstractArray(half.shape, half.dtype)
    for dtype, held in (("float32", True), ("bfloat16", True), ("int8", False), ("float8_e4m3fnuz", False)):
        entry = TensorEntry({"array": ArrayEntry(like, like, "")}, None, 0, {"quant_type": "fp16", "dtype": dtype})
        if held:
            assert entry.upcast(half, "w").astype(np.float16).tolist() == half.tolist()
        else:
            with pytest.raises(
                aq.AqError, match=rf"^w: float16 value -300\.0 at \[1, 0\] does not fit {dtype}, its dtype"
            ):
                entry.upcast(half, "w")


def test_a_damaged_tensor_does_not_get_into_a_table(small: Path, tmp_path: Path) -> None:
    raw = ocp.load(small, checkpointable_name="aq_jax_arrays")
    rewrite(small, raw | {"w.b": np.array(raw["w.b"]) + 1})
    with pytest.raises(aq.IntegrityError, match=r"w\.b: its bytes have digest"):
        orbax.to_table(small, tmp_path / "m.parquet")
    assert not (tmp_path / "m.parquet").exists()
    gc.collect()


FOREIGN = {
    "encoder": {"layers": [{"kernel": np.float32}, {"kernel": ml_dtypes.bfloat16}], "bias": np.float16},
    "ids": np.int32,
}


def foreign() -> Any:
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda dtype: jnp.asarray(rng.normal(size=(8, 16)) * 9, dtype), FOREIGN)


def names(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(p, simple=True, separator="."): a for p, a in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_table(path: Path, wanted: dict[str, Any]) -> None:
    found = aq.load(path, "numpy")
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].tobytes()) == (array.dtype, np.asarray(array).tobytes()), name


@pytest.mark.parametrize(("batch", "reads"), [(1, 4), (800, 2), (1 << 20, 1)])
def test_an_ordinary_checkpoint_becomes_a_table(
    batch: int, reads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aq_jax.converters.orbax.source.BATCH_BYTES", batch)
    tree = foreign()
    seen: list[str] = []

    def read(folder: Path, item: str, asked: Any) -> Any:
        seen.append(item)
        return read_arrays(folder, item, asked)

    monkeypatch.setattr("aq_jax.converters.orbax.source.read_arrays", read)
    ocp.save(tmp_path / "c", tree | {"step": 7, "note": "text", "nothing": {}})
    done = orbax.to_table(tmp_path / "c", tmp_path / "m.parquet")
    assert_table(tmp_path / "m.parquet", names(tree))
    assert len(seen) == reads
    assert sorted(done.notes) == ["note: is no array, and was left out", "step: is no array, and was left out"]


def test_an_ordinary_checkpoint_is_quantized_as_its_table_is(tmp_path: Path) -> None:
    tree, config = foreign(), QuantizationConfig("int4", group_size=16)
    ocp.save(tmp_path / "c", tree)
    done = orbax.to_table(tmp_path / "c", tmp_path / "q.parquet", config)
    assert set(done.quantized) == {"encoder.layers.0.kernel", "encoder.layers.1.kernel"}
    assert any("encoder.bias; an override" in note for note in done.notes)
    aq.save(tmp_path / "v1.parquet", names(tree))
    aq.quantize_file(tmp_path / "v1.parquet", tmp_path / "v2.parquet", config)
    assert sorted(rows_of(tmp_path / "q.parquet")[0]) == sorted(rows_of(tmp_path / "v2.parquet")[0])


def test_one_of_several_trees_is_asked_for(tmp_path: Path) -> None:
    tree = foreign()
    ocp.save_checkpointables(tmp_path / "c", {"params": tree, "averages": {"w": jnp.ones(2)}, "notes": {"step": 1}})
    with pytest.raises(aq.FormatError, match=r"c: found trees of arrays: .*'averages'.*; wanted one, or its name"):
        orbax.to_table(tmp_path / "c", tmp_path / "m.parquet")
    with pytest.raises(aq.FormatError, match="wanted 'weights'"):
        orbax.to_table(tmp_path / "c", tmp_path / "m.parquet", checkpointable="weights")
    orbax.to_table(tmp_path / "c", tmp_path / "m.parquet", checkpointable="params")
    assert_table(tmp_path / "m.parquet", names(tree))


def test_a_state_of_flax_has_the_names_of_its_parameters_everywhere(tmp_path: Path) -> None:
    """In `save` and `load`, in checkpoints that Orbax wrote of it, and in shardings: patterns with $ find them."""
    model = nnx.Dict(dense=nnx.Linear(16, 8, rngs=nnx.Rngs(0)), value=nnx.Param(jnp.ones((4, 16))))
    state = nnx.state(model, nnx.Param)
    config = QuantizationConfig("int8", overrides=(aq.Override(r"^dense\.kernel$", "int4", group_size=8),))
    wanted = {"dense.kernel": "int4", "dense.bias": "none", "value": "int8"}
    ocp.save(tmp_path / "theirs", state)
    orbax.save(tmp_path / "ours", state)
    for name in ("theirs", "ours"):
        orbax.to_table(tmp_path / name, tmp_path / "m.parquet", config)
        with aq.WeightLoader(tmp_path / "m.parquet") as loader:
            assert {name: loader.describe(name).quant_type for name in loader.get_layer_names()} == wanted
    quantized = aq.quantize_tree(state, config)
    assert quantized["dense"]["kernel"].get_value().spec == QuantSpec(4, group_size=8)
    assert jax.tree.structure(quantized["value"].get_value()) == jax.tree.structure(
        aq.quantize(jnp.ones((4, 16)), "int8")
    )
    orbax.save(tmp_path / "q", quantized)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    found = orbax.load(tmp_path / "q", nnx.get_named_sharding(quantized, mesh))
    assert_same(found, nnx.to_pure_dict(quantized))
    # A dictionary's own "value", beside others, is a name like any.
    ocp.save(tmp_path / "dict", {"attention": {"key": jnp.ones(2), "value": jnp.ones(3)}})
    orbax.to_table(tmp_path / "dict", tmp_path / "m.parquet")
    assert set(aq.load(tmp_path / "m.parquet")) == {"attention.key", "attention.value"}


def test_checkpoints_of_the_first_interface_are_read(tmp_path: Path) -> None:
    from orbax import checkpoint as v0

    tree = foreign()
    with v0.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", tree)
    orbax.to_table(tmp_path / "c", tmp_path / "m.parquet")
    assert_table(tmp_path / "m.parquet", names(tree))


def test_what_a_table_cannot_hold_is_named(tmp_path: Path) -> None:
    for name, tree, message in (
        ("twice", {"a": {"b": jnp.ones(2)}, "a.c": jnp.ones(2), "x": {"y.z": jnp.ones(1)}, "x.y": {"z": jnp.ones(1)}},
         r"x\.y\.z: two arrays have this name"),
        ("int4", {"w": jnp.ones(2, jnp.int4)}, "w: is int4; a table can hold float64"),
    ):  # fmt: skip
        ocp.save(tmp_path / name, tree)
        with pytest.raises(aq.FormatError, match=message):
            orbax.to_table(tmp_path / name, tmp_path / "m.parquet")
    ocp.save(tmp_path / "fine", {"w": jnp.ones(2)})
    with pytest.raises(aq.FormatError, match=r"ends in \.parquet or \.arrow"):
        orbax.to_table(tmp_path / "fine", tmp_path / "m.txt")
    assert not (tmp_path / "m.parquet").exists()


def test_a_copy_of_the_metadata_is_checked_too(small: Path) -> None:
    """Two checkpoints of the same shapes: the arrays of one are not those of the other."""
    other = copy.copy(SMALL) | {"w": {"q": quantized((32, 64), QuantSpec(4, group_size=64), 9), "b": SMALL["w"]["b"]}}
    orbax.save(small.parent / "d", other)
    shutil.copytree(small / "aq_jax_metadata", small.parent / "d" / "aq_jax_metadata", dirs_exist_ok=True)
    with pytest.raises(aq.IntegrityError, match=r"w\.q\.codes: its bytes have digest"):
        orbax.load(small.parent / "d")
