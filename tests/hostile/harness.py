"""Runs cases in children, and says which did not end as they should."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hostile.case import Case, Expect, write_pack
from hostile.child import MEMORY

CHILD = Path(__file__).parent / "child.py"
MOST_CRASHES = 5
ALLOWED: dict[Expect, tuple[str, ...]] = {
    "refused": ("refused",),
    "either": ("refused", "same"),
    "same": ("same",),
    "any": ("refused", "same", "changed"),
}


@dataclass(frozen=True)
class Result:
    """What came of one case."""

    name: str
    expect: Expect
    result: str
    text: str = ""
    seconds: float = 0.0
    memory: int = 0

    @property
    def wrong(self) -> bool:
        return self.result not in ALLOWED[self.expect] or self.memory > MEMORY


def run(cases: Iterable[Case], folder: Path) -> list[Result]:
    """Every case, in as few children as crashes allow: after each, a new child goes on with the next case."""
    pack = folder / "pack"
    told = write_pack(pack, cases)
    results: list[Result] = []
    crashes = 0
    while len(results) < len(told):
        command = [sys.executable, str(CHILD), str(pack), str(folder / "case"), str(len(results))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        for line in done.stdout.splitlines():
            said = json.loads(line)
            name, expect = told[said.pop("number")]
            results.append(Result(name, expect, **said))
        if len(results) == len(told):
            break
        crashes += 1
        results.append(Result(*told[len(results)], _ending(done.returncode), done.stderr[-1000:]))
        if crashes == MOST_CRASHES:
            results += [Result(*each, "not reached") for each in told[len(results) :]]
    return results


def _ending(status: int) -> str:
    if -status in (signal.SIGPROF, signal.SIGALRM):
        return "timeout"
    return f"crash: {signal.Signals(-status).name}" if status < 0 else f"crash: exit {status}"


def check(results: list[Result]) -> Counter[str]:
    """How many ended how; fails with the first of those that ended otherwise than they should."""
    wrong = [each for each in results if each.wrong]
    shown = "\n".join(f"{each.name}: {each.result}: {each.text}" for each in wrong[:20])
    assert not wrong, f"{len(wrong)} of {len(results)} cases, such as\n{shown}"
    return Counter(each.result for each in results)
