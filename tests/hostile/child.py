"""Reads hostile cases under a limit of memory and time, and prints what came of each as a line of JSON.

    python tests/hostile/child.py PACK FOLDER FIRST

It is a process of its own so that a crash is seen, and told from a refusal, by whoever started it.
"""

from __future__ import annotations

import json
import resource
import shutil
import signal
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":  # as a program it is found by its path alone
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from hostile.case import Case, Kind, read_pack

from aq_jax.config.schema import load_plan
from aq_jax.converters import open_source
from aq_jax.converters.checkpoint import open_checkpoint
from aq_jax.converters.schemes import open_folder
from aq_jax.errors import AqError, ConfigError, FormatError, IntegrityError
from aq_jax.quantizers.lookup import read_conversion
from aq_jax.store import decode, open_table
from aq_jax.store.folders import Folder
from aq_jax.store.verify import verify_table

MEMORY = 300 << 20
"""Bytes over what the process has when everything is imported."""
SECONDS = 2
"""Of the processor for one case: a busy machine must not make a test fail."""
WALL_SECONDS = 30
"""Of the clock for one case, should it wait instead of compute."""
LONGEST_TEXT = 3000


def table(path: Path) -> Any:
    """Everything that a table says, its tensors decoded."""
    with open_table(path) as found:
        head = (found.version, found.names, sorted(found.aliases.items()), found.metadata and found.metadata.raw)
        statistics = [(info.solver, info.cosine, info.rel_mse, info.quant_type) for info in found.infos]
        tensors = []
        for name in found.names:
            array = decode(found.read_tensor(name), path)
            tensors.append((name, array.dtype.name, array.shape, array.tobytes()))
    return head, statistics, tensors


def checkpoint(path: Path) -> Any:
    """The tensors of a folder of safetensors."""
    with open_checkpoint(path) as found:
        arrays = [(name, found.read(name)) for name in found.shapes]
        return [(name, a.dtype.name, a.shape, a.tobytes()) for name, a in arrays], sorted(found.aliases.items())


def quantized(path: Path) -> Any:
    """The tensors of a folder that another program quantized, as they are packed, and as values."""
    with open_folder(path, packed=True) as found, open_folder(path, packed=False) as dense:
        for name in found.shapes:
            found.read(name)
        return [(name, np.asarray(dense.read(name)).tobytes()) for name in dense.shapes]


def config(path: Path) -> Any:
    """A conversion's TOML file, or a plan's, as far as `convert` looks at it before it reads anything."""
    if path.name.startswith("plan"):
        return load_plan(path)
    return read_conversion(path)


def verdict(path: Path) -> Any:
    """What `verify_table` says, which must be what a loader would."""
    found = verify_table(path)
    try:
        with open_table(path) as opened:
            names, rows = opened.names, len(opened.infos)
            for name in names:
                decode(opened.read_tensor(name), path)
    except AqError as error:
        if not found.problems:
            raise AssertionError(f"nothing is wrong, but a loader says: {error}") from error
        raise FormatError("; ".join(problem.problem for problem in found.problems)[:1000]) from None
    if (found.good, found.rows, found.problems) != (names, rows, ()):
        raise AssertionError(f"a loader reads it, but: {found}"[:1000])
    return found


def gguf(path: Path) -> Any:
    """The tensors of a GGUF file, and the files that are rebuilt from its fields."""
    with open_source(path) as found:
        arrays = [(name, found.read(name)) for name in found.shapes]
        beside = found.side_files(Folder(path.parent / "out"))
        files = [(name, beside.origin.read(name)) for name in beside.names] if beside.origin else []
        return [(name, a.dtype.name, a.shape, a.tobytes()) for name, a in arrays], sorted(found.aliases.items()), files


READERS = {
    "table": table, "checkpoint": checkpoint, "quantized": quantized, "config": config, "verify": verdict, "gguf": gguf,
}  # fmt: skip
REFUSALS = {
    "table": (FormatError, IntegrityError),
    "checkpoint": (FormatError,),
    "quantized": (FormatError,),
    "config": (ConfigError,),
    "verify": (FormatError,),
    "gguf": (FormatError,),
}


def outcome(case: Case, path: Path, wanted: Any) -> tuple[str, str]:
    """What came of a case in a word, and the text of its error."""
    try:
        found = READERS[case.kind](path)
    except AqError as error:
        return refusal(error, case.kind, path), str(error)
    except Exception as error:
        return f"another error: {type(error).__name__}", str(error)
    return "same" if found == wanted else "changed", ""


def refusal(error: AqError, kind: Kind, path: Path) -> str:
    """`refused`, if it was refused as it should be."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):  # refused by the limit alone
            return "out of memory"
        cause = cause.__cause__ or cause.__context__
    if not isinstance(error, REFUSALS[kind]):
        return f"refused as {type(error).__name__}"
    if str(path) not in str(error):
        return "refused without its name"
    if len(str(error)) > LONGEST_TEXT:
        return f"refused with {len(str(error))} characters"
    return "refused"


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) << 10
    raise KeyError(key)


def main(pack: Path, folder: Path, first: int) -> None:
    good: dict[tuple[Kind, str], Any] = {}
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = status("VmData") + MEMORY
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    before = status("VmRSS")
    for number, case in islice(enumerate(read_pack(pack)), first, None):
        if case.good and (case.kind, case.good) not in good:
            good[case.kind, case.good] = READERS[case.kind](Path(case.good))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        path = case.write(folder)
        started = time.process_time()
        # Either signal ends the process, wherever it is.
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
        result, text = outcome(case, path, good.get((case.kind, case.good)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        line = {"number": number, "result": result, "text": text[:500], "seconds": time.process_time() - started}
        print(json.dumps(line | {"memory": status("VmHWM") - before}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
