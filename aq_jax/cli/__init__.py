"""The command line: what is parsed is run, and whatever stops it is said in one line."""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from aq_jax.cli.compilecache import remove_truncated, use_compile_cache
from aq_jax.cli.parser import make_parser
from aq_jax.cli.terminal import BAD_INPUT, DONE, INTERRUPTED, fail, interrupt, interrupted, one_line
from aq_jax.errors import AqError


def run() -> NoReturn:
    """The program: `main`, and out."""
    status = main()
    if status == INTERRUPTED:
        # A computation may still be running; it would crash an interpreter that takes itself down around it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Status: 0 done, 1 the answer is no, 2 bad input, 130 interrupted."""
    args = make_parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names are any text, terminals are not
    interrupted.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)  # so that nothing is left behind half-written
    switches = [name for name in os.environ if name.startswith("JAX_")]  # the user's own, before we set any
    try:
        cache = use_compile_cache()
        if cache is not None and args.computes:
            remove_truncated(cache)
        status = args.run(args)
        sys.stdout.flush()  # here, where a reader that has gone can be minded
        return status
    except KeyboardInterrupt:
        return fail("interrupted; nothing was left half-written", INTERRUPTED)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (AqError, OSError, ImportError) as error:
        return fail(one_line(error), BAD_INPUT)
    except MemoryError:
        return fail("out of memory", BAD_INPUT)
    except Exception as error:
        # Whatever JAX's own switches make of us or of JAX is no traceback; without them it would be a mistake of ours.
        if not (set_ := _suspects(switches, error)):
            raise
        text = (str(error).strip().splitlines() or [""])[0]
        return fail(f"{type(error).__name__}: {text}; with {', '.join(set_)} set: try without", BAD_INPUT)


def _suspects(switches: list[str], error: BaseException) -> list[str]:
    """Variables of JAX that may have caused an error: where JAX did not raise it, those of its cache are above it."""
    frames = traceback.walk_tb(error.__traceback__)
    if any(str(frame.f_globals.get("__name__")).partition(".")[0] in ("jax", "jaxlib") for frame, _ in frames):
        return switches
    return [name for name in switches if "_CACHE_" not in name]
