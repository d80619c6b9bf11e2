"""The same tasks on a Ray cluster: the same bytes, also when a worker is lost on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import aq_jax as aq
from benchmarks import checkpoints

pytest.importorskip("ray", reason="ray is not installed")

SHAPES = checkpoints.llama_shapes(layers=3, width=64, inner=160, vocabulary=300)
SHARDS = {"size": 60_000}

# Ray warns in its own code, and its processes outlive a test that fails: it gets a process of its own.
SCRIPT = """
import os, signal, sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
import aq_jax as aq

source, output, mark = sys.argv[1:]
cluster = Cluster()
for _ in range(2):
    cluster.add_node(num_cpus=1, memory=2 << 30, object_store_memory=80 << 20, include_dashboard=False)
ray.init(address=cluster.address, log_to_driver=False)


def workers():
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::convert_shard"):
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


def kill():
    while not (found := workers()):
        time.sleep(0.01)
    os.kill(found[0], signal.SIGKILL)
    Path(mark).write_text(str(found[0]))


threading.Thread(target=kill, daemon=True).start()
shards = aq.ShardsConfig(size=60_000, engine="ray")
done = aq.convert(aq.ConversionConfig(source, output, aq.QuantizationConfig("int4"), shards=shards))
print(len(done.quantized))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_two_workers_of_which_one_is_killed_give_the_bytes_of_one_process(tmp_path: Path) -> None:
    checkpoints.write_checkpoint(tmp_path / "model", SHAPES, 100_000)
    alone = aq.ShardsConfig(size=60_000, workers=1)
    config = aq.ConversionConfig(
        str(tmp_path / "model"), str(tmp_path / "alone"), aq.QuantizationConfig("int4"), shards=alone
    )
    aq.convert(config)
    script = tmp_path / "on_ray.py"
    script.write_text(SCRIPT)
    arguments = [sys.executable, str(script), *(str(tmp_path / name) for name in ("model", "ray", "killed"))]
    environment = os.environ | {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            out, errors = process.communicate(timeout=240)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors[-3000:]
    assert (tmp_path / "killed").exists()
    assert int(out.split()[-1]) == len([name for name in SHAPES if "norm" not in name])
    for file in (tmp_path / "alone").iterdir():
        assert (tmp_path / "ray" / file.name).read_bytes() == file.read_bytes()
    assert len(list((tmp_path / "ray").iterdir())) == len(list((tmp_path / "alone").iterdir()))
