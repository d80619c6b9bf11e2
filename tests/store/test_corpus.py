"""What the first release wrote means what it meant: every kind of table, shards, checkpoints, models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import aq_jax as aq
from aq_jax.converters import orbax
from aq_jax.store import open_table
from aq_jax.store.verify import verify_table

CORPUS = Path(__file__).parent.parent / "golden" / "corpus"
MEANING = json.loads((CORPUS / "meaning.json").read_text(encoding="utf-8"))
TEXTS = ["the quick cats", "she runs in that house of the small sun"]


@pytest.fixture(scope="module")
def expected() -> Mapping[str, np.ndarray]:
    with np.load(CORPUS / "expected.npz") as file:
        return dict(file)


def assert_means(found: np.ndarray, wanted: np.ndarray, name: str, rotated: bool) -> None:
    """Bit for bit; the sums of a rotation are in any order."""
    assert found.shape == wanted.shape, name
    if found.dtype.kind not in "iubc" and found.dtype.itemsize < 8:
        found = found.astype(np.float32)
    assert found.dtype == wanted.dtype, name
    if rotated:
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * float(np.linalg.norm(wanted)), err_msg=name)
    else:
        assert found.tobytes() == wanted.tobytes(), name


@pytest.mark.parametrize("file", MEANING)
def test_tables_of_the_first_release(file: str, expected: Mapping[str, np.ndarray]) -> None:
    meaning, stem = MEANING[file], file.partition(".")[0]
    rows = meaning["rows"]
    with open_table(CORPUS / file) as table:
        assert table.version == meaning["version"]
        assert dict(table.aliases) == meaning["aliases"]
        assert list(table.names) == list(rows)
        for name, row in rows.items():
            info, *more = table.pieces(name)
            found = {key: getattr(info, key) for key in row if key not in ("pieces", "shape")}
            assert found | {"pieces": 1 + len(more), "shape": list(info.shape)} == row, name
    plain, packed = aq.load(CORPUS / file, "numpy"), aq.load(CORPUS / file, "jax", packed=True)
    assert sorted(plain) == sorted([*rows, *meaning["aliases"]])
    for name, row in rows.items():
        wanted = expected[f"{stem}/{name}"]
        assert_means(plain[name], wanted, name, bool(row["rotation"]))
        if isinstance(value := packed[name], aq.QTensor):
            assert value.spec.quant_type == row["quant_type"]
            assert_means(np.asarray(aq.dequantize(value)), wanted, name, bool(row["rotation"]))
    for alias, name in meaning["aliases"].items():
        assert plain[alias] is plain[name]
    assert verify_table(CORPUS / file).ok


@pytest.mark.parametrize("folder", ["checkpoint", "checkpoint_of_table"])
def test_checkpoints_of_the_first_release(folder: str, expected: Mapping[str, np.ndarray], tmp_path: Path) -> None:
    tree = orbax.load(CORPUS / folder)
    found: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, aq.QTensor)):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        found[name] = leaf
        rotated = isinstance(leaf, aq.QTensor) and bool(leaf.spec.rotation)
        value = np.asarray(aq.dequantize(leaf) if isinstance(leaf, aq.QTensor) else leaf)
        assert_means(value, expected[f"{folder}/{name}"], name, rotated)
    assert {f"{folder}/{name}" for name in found} == {key for key in expected if key.startswith(f"{folder}/")}
    if folder == "checkpoint":
        assert tree["pair"] == (None, {})
        assert tree["layers"][0]["tied"] is tree["layers"][0]["int4.group"]
    else:
        orbax.to_table(CORPUS / folder, tmp_path / "m.parquet")
        with open_table(tmp_path / "m.parquet") as again, open_table(CORPUS / "converted.parquet") as table:
            assert [again.read(i).digest for i in range(len(table.names))] == [
                table.read(i).digest for i in range(len(table.names))
            ]


def test_models_of_the_first_release(expected: Mapping[str, np.ndarray]) -> None:
    encoder, generator = (aq.load_model(CORPUS / name / "m.parquet", "float32") for name in ("gptq", "llama"))
    np.testing.assert_allclose(encoder.encode(TEXTS), expected["gptq:encode"], atol=1e-5)
    np.testing.assert_allclose(generator.score(TEXTS[0]), expected["llama:score"], atol=1e-4)
