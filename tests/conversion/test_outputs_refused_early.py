"""An output that cannot be written is found before anything that takes long: reading, calibrating, encoding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import aq_jax as aq
from aq_jax.calibration.solve import SolvedWeights
from aq_jax.cli.models import embed
from aq_jax.config import AllocationConfig, ConversionConfig, QuantizationConfig, ShardsConfig, TrainingConfig
from aq_jax.converters import huggingface
from aq_jax.converters.convert import dry_run
from aq_jax.errors import ConfigError
from aq_jax.store.files import check_writable, locked

GPTQ = QuantizationConfig("int4", solver="gptq")


def never(*_: Any, **__: Any) -> Any:
    pytest.fail("minutes were spent")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "hf"
    folder.mkdir()
    safetensors.numpy.save_file({"w": np.ones((4, 8), np.float32)}, folder / "model.safetensors")
    aq.save(tmp_path / "v1.parquet", {"w": np.ones((4, 8), np.float32)})
    (tmp_path / "file").write_text("no folder")  # in which root, too, cannot write
    return folder


def calls(model: Path, out: str) -> dict[str, Callable[[], object]]:
    v1, m = str(model.parent / "v1.parquet"), f"{out}/m.parquet"
    one = ConversionConfig(str(model), m, GPTQ)
    bits = AllocationConfig(target_bpw=4.0)
    return {
        "convert": lambda: aq.convert(one),
        "shards": lambda: aq.convert(ConversionConfig(str(model), out, shards=ShardsConfig(workers=1))),
        "url": lambda: aq.convert(ConversionConfig(str(model), f"file://{m}", GPTQ)),
        "allocate": lambda: dry_run(ConversionConfig(str(model), m, GPTQ, allocate=bits)),
        "plan of widths": lambda: dry_run(
            ConversionConfig(
                str(model), v1, GPTQ, allocate=AllocationConfig(target_bpw=4.0, save=f"{out}/plan.toml")
            )
        ),
        "quantize": lambda: aq.quantize_file(v1, m, GPTQ),
        "dequantize": lambda: aq.dequantize_file(v1, m),
        "folder": lambda: huggingface.from_table(v1, out),
        "embed": lambda: embed(v1, ["a"], f"{out}/e.npy"),
    }  # fmt: skip


@pytest.mark.parametrize("what", calls(Path(), ""))
def test_what_cannot_be_written_is_said_first(model: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr(huggingface, "write_safetensors", never)
    monkeypatch.setattr("aq_jax.conversion.corridor._solve", never)
    monkeypatch.setattr("aq_jax.calibration.allocation.allocate", never)
    monkeypatch.setattr("aq_jax.converters.tables.TableSource.read", never)
    monkeypatch.setattr("aq_jax.nn.load_model", never)
    out = str(model.parent / "file" / "sub")
    with pytest.raises(OSError, match="Not a directory") as caught:
        calls(model, out)[what]()
    assert str(caught.value.filename).startswith(out)


@pytest.mark.parametrize("url", ["", "file://"])
def test_a_folder_that_holds_no_training_is_said_first(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setattr("aq_jax.conversion.corridor._solve", never)
    monkeypatch.setattr("aq_jax.calibration.allocation.allocate", never)
    bits = AllocationConfig(target_bpw=4.0)
    config = ConversionConfig(str(model), f"{url}{tmp_path}/m.parquet", GPTQ, allocate=bits, train=TrainingConfig())
    (tmp_path / "m.parquet.training").mkdir()
    with pytest.raises(ConfigError, match=r"m\.parquet\.training: already exists and holds no training; move it"):
        aq.convert(config)
    (tmp_path / "m.parquet.training" / "lock").touch()
    with (
        locked(tmp_path / "m.parquet.training", ""),
        pytest.raises(ConfigError, match=r"m\.parquet\.training: another process trains here; wait for it"),
    ):
        aq.convert(config)


@pytest.mark.parametrize("scheme", ["", "file://", "fsspec+file://"])
def test_checkpoints_lie_beside_the_output_or_here(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    if scheme.startswith("fsspec"):
        pytest.importorskip("fsspec")
    found = []

    def solve(*args: Any) -> SolvedWeights:
        found.append(args[-1])
        return SolvedWeights({}, {"w": "it is a test"}, (), {}, 0.0)

    monkeypatch.setattr("aq_jax.conversion.corridor._solve", solve)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    output = f"{scheme}{tmp_path}/out/m.parquet"
    done = aq.convert(ConversionConfig(str(model), output, GPTQ, train=TrainingConfig()))
    there, notes = Path("m.parquet.training"), [note for note in done.notes if "checkpoints" in note]
    if scheme.startswith("fsspec"):
        assert notes == [f"{output} is not on this machine: the training kept its checkpoints in {there}"]
    else:
        there = tmp_path / "out" / there
        assert notes == []
    assert found == [there]
    assert list(Path().iterdir()) == []


def test_nothing_is_left_behind_and_no_folder_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path / "a" / "b" / "c.txt")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.delattr("os.O_TMPFILE", raising=False)  # a system that has no files without names
    check_writable(tmp_path / "a" / "b" / "c.txt")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file/sub"):
        check_writable(tmp_path / "file" / "sub" / "c.txt")
