"""`make bench`: each suite in a process of its own, on one core (NAME@2: on two); a Markdown table, and JSON."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

RECORDED = (
    "jax", "jaxlib", "flax", "numpy", "pyarrow", "safetensors", "torch", "torchao", "optimum-quanto", "transformers",
    "onnxruntime", "onnx",
)  # fmt: skip


def main() -> int:
    """Run the suites that were asked for, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suite", nargs="*", help="names of suites; default all")
    parser.add_argument("--output", default="build/bench.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return run_suite(args.child)
    from benchmarks.suites import SUITES

    unknown = set(args.suite) - set(SUITES)
    if unknown:
        parser.error(f"no suite {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}")
    report = {"machine": machine(), "versions": versions(), "results": []}
    print(f"{report['machine']}; one core, or as the rows say; medians\n")
    print("| what | measured | at least | goal | |\n|---|---|---|---|---|", flush=True)
    for name in args.suite or SUITES:
        child = subprocess.run(
            [sys.executable, "-m", "benchmarks", "--child", name], stdout=subprocess.PIPE, text=True, check=True
        )
        for line in child.stdout.splitlines():
            if not line.startswith("{"):
                print(line)
                continue
            result = json.loads(line)
            report["results"].append(result)
            figure = f"{result['value']:.4g} {result['unit']}".strip()
            print(
                f"| {result['what']} | {figure} | {result['least']} | {result['goal']} | {result['note']} |", flush=True
            )
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1))
    return 0


def run_suite(name: str) -> int:
    """One suite, on as many cores as its name ends in, with as many threads in every library that has a pool."""
    cores = int(name.rpartition("@")[2]) if "@" in name else 1
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[-cores:]))
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = str(cores)
    from benchmarks.suites import SUITES

    for result in SUITES[name]():
        print(json.dumps(dataclasses.asdict(result)), flush=True)
    return 0


def machine() -> str:
    """The processor's name, and how many cores this process may use."""
    info = Path("/proc/cpuinfo")
    names = (
        [x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")]
        if info.exists()
        else []
    )
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def versions() -> dict[str, str]:
    """Of what takes part, as far as it is installed."""
    found = {}
    for name in RECORDED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
