"""The harness itself: what it would say of a reader that crashes, hangs, or errs in another way."""

from __future__ import annotations

from pathlib import Path

import pytest
from hostile import harness
from hostile.case import Case, Expect

CHILD = """
import json, os, signal, sys, time
first = int(sys.argv[3])
for number in range(first, 4):
    if number == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 2:
        signal.setitimer(signal.ITIMER_PROF, 0.05)
        while True:
            pass
    print(json.dumps({"number": number, "result": "refused", "text": "", "seconds": 0.0, "memory": 0}), flush=True)
"""


def test_a_crash_and_a_timeout_are_told_of_their_own_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setattr(harness, "CHILD", tmp_path / "child.py")
    results = harness.run([Case(f"case {number}", {}) for number in range(4)], tmp_path)
    assert [each.result for each in results] == ["refused", "crash: SIGSEGV", "timeout", "refused"]
    assert [each.name for each in results] == ["case 0", "case 1", "case 2", "case 3"]
    with pytest.raises(AssertionError, match="2 of 4 cases, such as\ncase 1: crash: SIGSEGV: \ncase 2: timeout"):
        harness.check(results)


@pytest.mark.parametrize(
    ("result", "expect", "wrong"),
    [
        ("refused", "refused", False),
        ("same", "refused", True),
        ("changed", "either", True),
        ("same", "either", False),
        ("changed", "any", False),
        ("another error: KeyError", "any", True),
        ("out of memory", "any", True),
        ("timeout", "any", True),
        ("refused", "same", True),
    ],
)
def test_what_is_wrong(result: str, expect: Expect, wrong: bool) -> None:
    assert harness.Result("case", expect, result).wrong is wrong
    assert harness.Result("case", expect, result, memory=harness.MEMORY + 1).wrong
