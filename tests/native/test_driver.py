"""Run the kernels alone: every access checked, and those for ARM and AVX-512 where there is no such processor."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from aq_jax import native
from aq_jax.native import recipe, toolchain

HERE = recipe.this_machine()
pytestmark = pytest.mark.skipif(bool(HERE.refusal), reason=HERE.refusal)


def test_the_driver_calls_the_kernels_as_they_are_declared(compiler: toolchain.Compiler, driver: Path) -> None:
    """Tell before the slow tests below do."""
    words = ("-std=c++17", "-fsyntax-only", f"-I{recipe.SOURCES}", f"-I{recipe.headers()}", str(driver))
    done = subprocess.run([*compiler.command, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_no_kernel_reads_or_writes_beside_its_arrays(sanitized: Path) -> None:
    done = subprocess.run([sanitized], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == list(native.probe().isas)


@pytest.mark.slow
def test_the_kernels_for_avx512_compute_the_same_of_avx2(widened: Path) -> None:
    """In tiles of another size, of 16 lanes, on any processor; the instructions themselves are not tried."""
    done = subprocess.run([widened], capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stdout) == (0, "avx512vnni\n"), done.stdout + done.stderr


@pytest.mark.slow
def test_the_kernels_for_arm_compute_the_same(emulated: list[str]) -> None:
    done = subprocess.run(emulated, capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stdout) == (0, "neon\n"), done.stdout + done.stderr
