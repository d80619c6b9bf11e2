"""Build the native library where a wheel is built, and tag the wheel for its platform; hatchling runs this."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeLibrary(BuildHookInterface):
    """The hook: what a wheel takes to be built, and the library in it.

    An editable install has the library in the folder of the sources. A wheel without one, since it was not wanted
    (AQ_JAX_NATIVE=no), cannot be built, or is for a machine that has no kernels, is for any platform.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scratch: str | None = None
        sys.path.insert(0, self.root)  # these sources, and no aq_jax that is installed
        self.build = importlib.import_module("aq_jax.native.build")
        self.recipe = importlib.import_module("aq_jax.native.recipe")
        self.toolchain = importlib.import_module("aq_jax.native.toolchain")

    def dependencies(self) -> list[str]:
        """List what is to be installed to build: ziglang, where no compiler works."""
        return ["ziglang"] if self.toolchain.needs_ziglang(self.toolchain.chosen_target()) else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the library, and tell hatchling of it."""
        build, toolchain, recipe = self.build, self.toolchain, self.recipe
        target = toolchain.chosen_target()
        if version == "editable" and target.triple:
            raise toolchain.BuildError(f"{toolchain.TARGET} is for wheels: an editable install is for this machine")
        self.scratch = tempfile.mkdtemp(prefix="aq_jax_wheel_")
        kept = not target.triple and toolchain.wanted() != "no" and os.access(recipe.FOLDER, os.W_OK)
        in_place = version == "editable" or kept
        folder = recipe.FOLDER if in_place else Path(self.scratch)
        library = build.build_or_note(target, folder)
        if version == "editable":
            return
        made = [folder / recipe.WHY_NOT] if library is None else [library, *build.licenses(folder)]
        for path in made:
            if path.exists():
                build_data["force_include"][str(path)] = f"aq_jax/native/{path.relative_to(folder)}"
        if library is not None:
            build_data["pure_python"] = False
            build_data["tag"] = target.wheel_tag

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was built for this wheel alone."""
        if self.scratch is not None:
            shutil.rmtree(self.scratch, ignore_errors=True)
