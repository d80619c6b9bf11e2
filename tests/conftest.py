"""Shared by all tests: types and shapes are checked while they run, and dtypes never widen by themselves."""

from __future__ import annotations

import sys
from pathlib import Path

import jaxtyping

# Before anything imports these packages: their signatures are then checked on every call and every trace.
# (The solvers themselves take a protocol, which cannot be checked, and arrays without shapes.)
CHECKED = ["aq_jax.core", "aq_jax.solvers.apply", "aq_jax.solvers.measure", "aq_jax.solvers.tiles"]
jaxtyping.install_import_hook(CHECKED, "beartype.beartype")
# `import oracle` works from every folder of tests.
sys.path.insert(0, str(Path(__file__).parent))
