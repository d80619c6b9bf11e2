"""A conversion in a process whose memory the system limits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LIMITED = """
import resource, sys, threading, time
from pathlib import Path
source, output, limit, allowed, kind, size = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_DATA, (int(limit), int(limit)))
import aq_jax as aq
peak = 0
def watch():
    global peak
    while True:
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = max(peak, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")))
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
shards = aq.ShardsConfig(size=size, workers=1, max_memory=allowed)
quantization = None if kind == "none" else aq.QuantizationConfig(kind)
aq.convert(aq.ConversionConfig(source, output, quantization, shards=shards))
print(peak)
"""


def limited(source: Path, output: Path, limit: int, allowed: str, kind: str = "int8", size: str = "256MB") -> int:
    """Convert into a folder under RLIMIT_DATA, in a process of its own; gives the most anonymous memory in use.

    Args:
        source, output: What is converted, and into which folder.
        limit: The limit that the system enforces, in bytes.
        allowed: What the conversion is told.
        kind: The quant_type, or "none" for a source as it is.
        size: The size of a file.
    """
    if sys.platform != "linux":
        pytest.skip("RLIMIT_DATA counts what is mapped on Linux only")
    # Arrow's own allocator asks for a gigabyte at once, which it then uses little of.
    environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system"}
    arguments = [sys.executable, "-c", LIMITED, str(source), str(output), str(limit), allowed, kind, size]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split()[-1])
