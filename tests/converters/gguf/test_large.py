"""A GGUF file of 4 GB, which takes no room on the disk, becomes a table within a limit of memory, in two goes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from gguf_file import LLAMA, Q8_0, header, tensor
from limited import limited

import aq_jax as aq
from aq_jax.config import ConversionConfig, ShardsConfig
from aq_jax.store import open_table

ROWS, COLUMNS, LAYERS = 32768, 4096, 10
LIMIT, SIZE = 10**9, "1 GB"


@pytest.mark.slow
def test_a_large_file_is_read_within_a_limit_and_taken_up_again(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 6e9:
        pytest.skip("the table takes 4 GB of the disk")
    parts = [f"blk.{i}.{part}.weight" for i in range(LAYERS) for part in ("ffn_gate", "ffn_up", "ffn_down")]
    size = ROWS * COLUMNS // 32 * 34
    names = ["token_embd.weight", *parts][:29]
    entries = [tensor(name, (ROWS, COLUMNS), Q8_0, size * i) for i, name in enumerate(names)]
    head = header(list((LLAMA | {"llama.embedding_length": COLUMNS}).items()), entries)
    with (tmp_path / "m.gguf").open("wb") as file:
        file.write(head)
        file.truncate(-(-len(head) // 32) * 32 + size * len(names))
    assert (tmp_path / "m.gguf").stat().st_size > 4e9
    config = ConversionConfig(
        str(tmp_path / "m.gguf"),
        str(tmp_path / "out"),
        shards=ShardsConfig(size=SIZE, max_memory=LIMIT, workers=1),
    )
    seen: list[str] = []

    def stop(name: str, size: int, total: int) -> None:
        seen.append(name)
        if len(seen) == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        aq.convert(config, stop)
    (finished,) = (tmp_path / "out").glob("weights-*.parquet")
    written = finished.stat().st_mtime_ns
    assert limited(tmp_path / "m.gguf", tmp_path / "out", LIMIT, str(LIMIT), "none", SIZE) < LIMIT
    assert finished.stat().st_mtime_ns == written
    with open_table(tmp_path / "out") as table:
        assert len(table.names) == len(names)
        assert {info.quant_type for info in table.infos} == {"int8_f16"}
