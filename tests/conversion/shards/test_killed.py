"""A conversion into shards that is killed at each of its steps: what is there can be told from a whole table."""

from __future__ import annotations

import os
import random
import shutil
from contextlib import nullcontext
from pathlib import Path

import killing
import pytest
import safetensors.numpy
from killing import Server, contents

import aq_jax as aq
from aq_jax.conversion.shards.journal import JOURNAL
from aq_jax.errors import FormatError

pytestmark = pytest.mark.skipif(
    not hasattr(os, "pidfd_open"), reason="needs Linux: SIGKILL, and descriptors of processes"
)


class Killed:
    """The job in a folder, and what an undisturbed run gives."""

    def __init__(self, job: str, folder: Path, server: Server) -> None:
        self.job, self.folder, self.server = job, folder, server
        (folder / "hf").mkdir(parents=True)
        safetensors.numpy.save_file(killing.tensors(), folder / "hf" / "model.safetensors")
        for name, text in killing.SIDE_FILES.items():
            (folder / "hf" / name).write_text(text)
        self.seconds = server(job, folder)["seconds"]
        self.done = contents(folder)
        shutil.rmtree(folder / "out")  # and once more: the first run warms what the others find
        self.seconds = min(self.seconds, server(job, folder)["seconds"])
        self.files = [name for name in self.done if name.endswith(".parquet")]
        assert len(self.files) >= 3
        shutil.rmtree(folder / "out")
        self.events = server(job, folder, at=0)["events"]
        self.tensors = aq.load(folder / "out", "numpy")

    def kill(self, **how: float) -> bool:
        """Kill it, look, run it again, look. Whether it was killed."""
        shutil.rmtree(self.folder / "out")
        killed = self.server(self.job, self.folder, **how)["killed"]
        out = self.folder / "out"
        if (out / "manifest.json").exists():
            assert aq.load(out, "numpy").keys() == self.tensors.keys()
        elif out.exists() and any(out.glob("*.parquet")):
            refused = pytest.raises(FormatError, match="goes on when it is run again")
            with nullcontext() if len(list(out.glob("weights-*"))) == len(self.files) else refused:
                assert aq.load(out, "numpy").keys() == self.tensors.keys()
        if not (out / "manifest.json").exists() or (out / JOURNAL / "plan.json").exists():
            self.server(self.job, self.folder)
        left = {name: data for name, data in contents(self.folder).items() if Path(name).parent.name != JOURNAL}
        assert left == self.done, "the next run leaves litter, or other files"
        return killed


@pytest.fixture(scope="module")
def plain(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    return Killed("shards plain", tmp_path_factory.mktemp("killed") / "job", server)


def test_some_of_its_steps(plain: Killed) -> None:
    steps = random.Random(1).sample(range(1, plain.events + 1), 7)
    assert all(plain.kill(at=step) for step in [*steps, plain.events])


@pytest.mark.slow
def test_each_of_its_steps(plain: Killed) -> None:
    assert all(plain.kill(at=step) for step in range(1, plain.events + 1))


@pytest.mark.slow
def test_any_moment(server: Server, tmp_path: Path) -> None:
    job = Killed("shards", tmp_path / "job", server)
    moments = random.Random(2)
    assert sum(job.kill(after=moments.uniform(0, job.seconds)) for _ in range(60)) >= 10  # others end before
