"""A GGUF file of 4 GB, which takes no room on the disk, becomes a table within a limit of memory, in two goes."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
from gguf_file import LLAMA, Q8_0, header, tensor

import aq_jax as aq
from aq_jax.config import ConversionConfig, ShardsConfig
from aq_jax.store import open_table

ROWS, COLUMNS, LAYERS = 32768, 4096, 10
LIMIT = 10**9


class Peak(threading.Thread):
    """The largest size of this process's own memory, without mapped files, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self.stop = 0, threading.Event()

    def run(self) -> None:
        while not self.stop.wait(0.02):
            lines = Path("/proc/self/status").read_text().splitlines()
            own = sum(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))
            self.bytes = max(self.bytes, own)


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
    shards = ShardsConfig(size="1 GB", max_memory=LIMIT, workers=1)
    config = ConversionConfig(str(tmp_path / "m.gguf"), str(tmp_path / "out"), shards=shards)
    seen: list[str] = []

    def stop(name: str, size: int, total: int) -> None:
        seen.append(name)
        if len(seen) == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        aq.convert(config, stop)
    seen.clear()
    peak = Peak()
    peak.start()
    done = aq.convert(config, lambda name, *_: seen.append(name))
    peak.stop.set()
    peak.join()
    assert seen[0] == "1 files were finished before"
    assert peak.bytes < LIMIT
    with open_table(done.path) as table:
        assert len(table.names) == len(names)
        assert {info.quant_type for info in table.infos} == {"int8_f16"}
