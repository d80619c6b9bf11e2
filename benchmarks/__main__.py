"""Run `make bench`: each suite in a process of its own; a Markdown table, and JSON.

A suite has one core, NAME@2 two, and all of them where JAX computes on an accelerator.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import machine, report
from benchmarks.timing import Result, Skipped

# glibc returns larger blocks to the system when they are freed, so that the page faults of each new use would be
# measured. With these settings, all contenders keep their memory.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 40), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
# Not for suites that count memory, and not for loading, which a process does once, into new memory.
DEFAULT_MALLOC = ("memory", "scale", "load")
VARIABLES = """environment variables:
  AQ_JAX_CALIBRATED  for the suite accuracy: calibrated tables of MiniLM, and the texts (.txt) on which they were
                     calibrated, but for Python's manual; divided as PATH is. Nothing is judged by what they have seen.
                     A full run calibrates fourteen more, in a quarter of an hour
  AQ_JAX_STORIES     for the suites stories and decode: a folder with stories260K.bin, tok512.bin and stories.txt, whose
                     stories <|endoftext|> divides
  AQ_JAX_LANGUAGE    for the suites language and generation: a folder with smollm2.gguf or gemma3.gguf, or both (as
                     `make gguf` fetches them). The suite language wants two texts there, too, that share no line:
                     calibration.txt and judged.txt
  AQ_JAX_GGML        llama.cpp's libggml-base, built from its sources, for blocks that its Python package cannot write
  MALLOC_...         of glibc: as they are set. Where they are not, all contenders keep the memory that they free, but
                     in the suites memory, scale and load
"""


def make_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    from benchmarks.suites import SUITES

    raw = argparse.RawDescriptionHelpFormatter
    questions = "suites:\n" + "".join(f"  {name:<19}{question}\n" for name, (_, question) in SUITES.items())
    epilog = f"{questions}\n{VARIABLES}"
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__, epilog=epilog, formatter_class=raw)
    parser.add_argument("names", nargs="*", metavar="name", help="suites, of those below; default all")
    parser.add_argument("--suite", choices=("quick", "full"), default="full", help="4 minutes, or 30; default full")
    parser.add_argument("--record", action="store_true", help="keep the results, to compare later ones with")
    parser.add_argument("--output", default="build/bench.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--all-cores", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the suites that were asked for, or all of a kind; 1 if one of them failed."""
    from benchmarks.suites import QUICK, SUITES

    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.child:
        return run_suite(args.child, args.suite == "full", args.all_cores)
    unknown = set(args.names) - set(SUITES)
    if unknown:
        parser.error(f"no suite {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}")
    found = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "cpu": machine.processor(),
        **({"accelerator": device} if (device := machine.accelerator()) else {}),
        "cores": machine.cores(),
        "python": platform.python_version(),
        "suite": args.suite,
        "malloc": " ".join(f"{name}={os.environ.get(name, value)}" for name, value in MALLOC.items()),
        "versions": machine.versions(),
        "results": [],
        "skipped": [],
    }
    device = report.device(found)
    last = report.last_of(device, found["cores"])
    print(f"{device}, {found['cores']} cores, Python {found['python']}; one core, or as the rows say; medians")
    print("since: " + (f"the figures of {last['date']}" if last else "nothing recorded of this processor") + "\n")
    print(report.HEADER, flush=True)
    failed = []
    for name in args.names or (SUITES if args.suite == "full" else QUICK):
        start = time.monotonic()
        if not run_child(name, args.suite, found, last):
            failed.append(name)
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(report.text(found))
    if args.record and not failed:
        print(f"\nrecorded: {report.record(found)}; now: python -m benchmarks.docs")
    if failed:
        print(f"failed, and nothing recorded: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run_child(name: str, kind: str, found: dict, last: dict | None) -> bool:
    """Run one suite in a process of its own; print its lines as they come, and put them into `found`."""
    command = [sys.executable, "-m", "benchmarks", "--child", name, "--suite", kind]
    command += ["--all-cores"] * ("accelerator" in found)  # where they compile, and start programs
    variables = dict(os.environ) if name in DEFAULT_MALLOC else MALLOC | os.environ
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if not line.startswith("{"):
                print(line, end="", file=sys.stderr)  # printed by a library
                continue
            said = json.loads(line)
            if "reason" in said:
                found["skipped"].append({"suite": name, **said})
                print(report.skipped_row(said), flush=True)
                continue
            result = report.entry(name, Result(**said))
            found["results"].append(result)
            change = report.changes({"results": [result]}, last).get(report.key(result), "")
            print(report.row(result, change), flush=True)
    if child.returncode:
        print(f"{name}: ended with status {child.returncode}", file=sys.stderr)
    return child.returncode == 0


def run_suite(name: str, full: bool, all_cores: bool = False) -> int:
    """Run one suite on as many cores as its name says, with as many threads in every library that has a pool."""
    cores = machine.cores() if all_cores else int(name.rpartition("@")[2]) if "@" in name else 1
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[-cores:]))
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = str(cores)
    from benchmarks.suites import load_suite

    for line in load_suite(name)(full):
        assert isinstance(line, Result | Skipped)
        print(json.dumps(dataclasses.asdict(line)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
