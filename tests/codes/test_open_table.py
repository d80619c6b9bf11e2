"""The table of codes is open: one entry, made outside the package, is enough."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path


def test_codes_of_ones_own_go_everywhere(tmp_path: Path) -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    torch = ["torch"] if sys.modules.get("torch", 0) is not None and importlib.util.find_spec("torch") else []
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("open_table.py")), str(tmp_path), *torch],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
