"""Hostile TOML: refused by name, or read; never a crash, never much time or memory."""

from __future__ import annotations

from pathlib import Path

from hostile import configs, harness


def test_configs_and_patterns_that_lie(tmp_path: Path) -> None:
    harness.check(harness.run([*configs.cases(), *configs.patterns()], tmp_path))
