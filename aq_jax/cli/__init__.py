"""The command line: parse the arguments, run the command, and report whatever stops it in one line."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from aq_jax.cli.compilecache import remove_truncated, use_compile_cache
from aq_jax.cli.parser import make_parser
from aq_jax.cli.terminal import (
    BAD_INPUT,
    DONE,
    INTERRUPTED,
    OUTPUT,
    drop_output,
    error_line,
    fail,
    flush_output,
    handle_interrupt,
    interrupted,
)
from aq_jax.errors import AqError


def run() -> NoReturn:
    """Run `main` as the program, and exit with its status."""
    status = main()
    if status == INTERRUPTED:
        # A computation may still be running; it would crash an interpreter that takes itself down around it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, and return the status: 0 done, 1 the answer is no, 2 bad input, 130 interrupted."""
    if sys.stderr is None:  # closed: there is nowhere to write notes to
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        return fail(f"{OUTPUT}: is closed; wanted it open, or sent to {os.devnull}", BAD_INPUT)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names may hold characters that a terminal cannot show
    interrupted.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle_interrupt)  # so that half-written files are removed
    switches = [name for name in os.environ if name.startswith("JAX_")]  # the user's own, before we set ours
    try:
        args = _parse(argv)
        cache = use_compile_cache()
        if cache is not None and args.computes:
            remove_truncated(cache)
        status = args.run(args)
        flush_output()  # here, where a closed pipe is handled
        return status
    except KeyboardInterrupt:
        return fail("interrupted; nothing was left half-written", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has seen enough
        drop_output()
        return DONE
    except (AqError, OSError, ImportError) as error:
        if isinstance(error, OSError) and error.filename == OUTPUT:
            drop_output()
        return fail(error_line(error), BAD_INPUT)
    except MemoryError:
        return fail("out of memory", BAD_INPUT)
    except Exception as error:
        # An error that a switch of JAX may have caused is reported in a line; any other is a bug of ours.
        if not (suspects := _suspects(switches, error)):
            raise
        text = (str(error).strip().splitlines() or [""])[0]
        return fail(f"{type(error).__name__}: {text}; with {', '.join(suspects)} set: try without", BAD_INPUT)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    try:
        return make_parser().parse_args(argv)
    except SystemExit:  # --help and --version have printed; argparse passes over what it cannot write
        flush_output()
        raise


def _suspects(switches: list[str], error: BaseException) -> list[str]:
    """List the JAX variables that may have caused an error; those of its cache only if JAX raised it."""
    frames = traceback.walk_tb(error.__traceback__)
    if any(str(frame.f_globals.get("__name__")).partition(".")[0] in ("jax", "jaxlib") for frame, _ in frames):
        return switches
    return [name for name in switches if "_CACHE_" not in name]
