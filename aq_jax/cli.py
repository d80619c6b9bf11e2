"""The command line: parse, build a config, call a job, print what it says. jax is imported by the jobs that compute."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import aq_jax
from aq_jax import jobs
from aq_jax.compilecache import FOLDER_VARIABLE, remove_truncated, use_compile_cache
from aq_jax.config import CalibrationConfig, QuantizationConfig, widths
from aq_jax.errors import AqError, ConfigError

if TYPE_CHECKING:
    from aq_jax.conversion.dry_run import Planned
    from aq_jax.pipeline import Progress, Written

DONE, NO, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
SHOWN = 20
"""Errors and names that `verify` lists."""
_interrupted = threading.Event()
ACTIVATIONS_HELP = "what layers round their inputs to: float32, bfloat16 or int8 (default: int8 for int8 weights)"
SHARDS_HELP = {
    "max_memory": "what all processes may take together, such as 1.5GB (default: a quarter of the machine)",
    "workers": "processes at most (default: one a core, as long as they fit in the memory)",
    "engine": "local (default), or ray, on a Ray cluster",
}
# Column of `inspect` -> what it sorts by.
SORT_KEYS: dict[str, Callable[[jobs.Layer], Any]] = {
    "name": lambda layer: layer.name,
    "shape": lambda layer: layer.shape,
    "type": lambda layer: layer.quant_type,
    "params": lambda layer: layer.params,
    "bits": lambda layer: layer.bits,
    "bytes": lambda layer: layer.bytes,
    "cosine": lambda layer: 2.0 if layer.cosine is None else layer.cosine,
    "error": lambda layer: -1.0 if layer.rel_mse is None else layer.rel_mse,
}


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
    args = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names are any text, terminals are not
    _interrupted.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)  # so that nothing is left behind half-written
    switches = [name for name in os.environ if name.startswith("JAX_")]  # the user's own, before we set any
    try:
        cache = use_compile_cache()
        if cache is not None and args.computes:
            remove_truncated(cache)
        status = args.run(args)
        sys.stdout.flush()  # here, where a reader that has gone can be minded
        return status
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was left half-written", INTERRUPTED)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (AqError, OSError, ImportError) as error:
        return _fail(_one_line(error), BAD_INPUT)
    except MemoryError:
        return _fail("out of memory", BAD_INPUT)
    except Exception as error:
        # Whatever JAX's own switches make of us or of JAX is no traceback; without them it would be a mistake of ours.
        if not (set_ := _suspects(switches, error)):
            raise
        text = (str(error).strip().splitlines() or [""])[0]
        return _fail(f"{type(error).__name__}: {text}; with {', '.join(set_)} set: try without", BAD_INPUT)


def _suspects(switches: list[str], error: BaseException) -> list[str]:
    """Variables of JAX that may have caused an error: where JAX did not raise it, those of its cache are above it."""
    frames = traceback.walk_tb(error.__traceback__)
    if any(str(frame.f_globals.get("__name__")).partition(".")[0] in ("jax", "jaxlib") for frame, _ in frames):
        return switches
    return [name for name in switches if "_CACHE_" not in name]


class _Version(argparse.Action):
    """Print the version, as JSON with what is there beside it."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        if values not in ([], ["--json"]):
            parser.error(f"--version {' '.join(values)}: wanted --version, or --version --json")
        if not values:
            _say(f"aq-jax {aq_jax.__version__}")
        else:
            from aq_jax.codes import CODES
            from aq_jax.ops import KERNELS

            kernels = {operation: list(entries) for operation, entries in KERNELS.items()}
            _say(json.dumps({"aq_jax": aq_jax.__version__, "codes": list(CODES), "kernels": kernels}))
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aq-jax",
        description="Quantize model weights and keep them in Arrow tables.",
        epilog=f"Compiled programs are kept in the user's cache folder; {FOLDER_VARIABLE}=FOLDER moves it, "
        f"{FOLDER_VARIABLE}=off turns it off. Exit status: 0 done, 1 the answer is no, 2 bad input.",
    )
    parser.add_argument(
        "--version", action=_Version, nargs=argparse.REMAINDER, metavar="--json",
        help="show the version and exit; with --json also which codes and kernels there are",
    )  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(run=run, computes=run not in (_inspect, _verify))
        sub.add_argument("--json", action="store_true", help="print a JSON report")
        return sub

    sub = command("convert", _convert, "do what a TOML config says: weights of any known format become a table")
    sub.add_argument("config", metavar="CONFIG.toml")
    sub.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="such as quantization.group_size=64"
    )
    sub.add_argument("--dry-run", action="store_true", help="say what would be written, and how large; write nothing")
    for key, text in SHARDS_HELP.items():
        sub.add_argument(f"--{key.replace('_', '-')}", metavar=key.upper(), help=f"of a folder of shards: {text}")

    sub = command("quantize", _quantize, "quantize plain weights, such as a table, into a table")
    sub.add_argument("input", metavar="IN")
    sub.add_argument("output", metavar="OUT")
    sub.add_argument(
        "--quant-type", default="int8", metavar="TYPE", help=f"{', '.join(widths())} or fp16 (default int8)"
    )
    grids = sub.add_mutually_exclusive_group()
    grids.add_argument("--per-channel", action="store_true", default=None, help="one grid for each row of axis 0")
    grids.add_argument("--per-tensor", dest="per_channel", action="store_false", help="one grid for each tensor")
    grids.add_argument("--group-size", type=int, default=0, metavar="N", help="one grid for every N elements")
    sub.add_argument("--asymmetric", action="store_true", help="a zero point for each grid")
    sub.add_argument("--solver", help="absmax, minmax, mse, or gptq, which runs the model that lies beside IN")
    sub.add_argument("--text", default="", metavar="FILE", help="for gptq: a sentence a line, like those to come")
    sub.add_argument("--rotate", action="store_true", help="spread outliers by Hadamard rotation")
    sub.add_argument("--keep", action="append", default=[], metavar="TEXT", help="keep tensors so named in float16")
    sub.add_argument("--on-nonfinite", default="error", metavar="error|keep", help="refuse bad tensors, or keep them")
    sub.add_argument("--compression", default="none", metavar="none|zstd", help="of the weights (.parquet only)")

    sub = command("dequantize", _dequantize, "turn a table into plain weights: a V1 table, or a folder of safetensors")
    sub.add_argument("input", metavar="IN")
    sub.add_argument("output", metavar="OUT", help="NAME.parquet, NAME.arrow, or a folder")

    sub = command("inspect", _inspect, "list what a table holds, without reading the weights")
    sub.add_argument("file", metavar="FILE")
    sub.add_argument("--sort", choices=SORT_KEYS, help="by this column instead of the table's order")
    sub.add_argument("--reverse", action="store_true", help="largest first")

    sub = command("verify", _verify, "compare every row of a table with its digest")
    sub.add_argument("file", metavar="FILE")

    sub = command(
        "validate", _validate, "convert a model as a TOML config's cases say, and judge each by its thresholds"
    )
    sub.add_argument("config", metavar="CONFIG.toml")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as sentences=100")

    sub = command("embed", _embed, "embed the lines of a text file with an encoder, such as MiniLM")
    sub.add_argument("model", metavar="MODEL", help="a table with config.json and tokenizer files beside it")
    sub.add_argument("--input", required=True, metavar="FILE", help="one text a line; - reads the standard input")
    sub.add_argument("--output", required=True, metavar="OUT", help="NAME.npy, or NAME.parquet with the texts")
    sub.add_argument("--prompt-name", metavar="NAME", help="put the model's prompt of this name before each text")
    sub.add_argument("--prompt", metavar="TEXT", help="put this before each text")
    sub.add_argument("--activations", metavar="TYPE", help=ACTIVATIONS_HELP)

    sub = command("generate", _generate, "continue a prompt with a language model")
    sub.add_argument("model", metavar="MODEL", help="a table with config.json and tokenizer files beside it")
    sub.add_argument("prompt", metavar="PROMPT")
    sub.add_argument(
        "--max-tokens", type=int, default=128, metavar="N", help="at most so many new tokens (default 128)"
    )
    sub.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest (default)")
    sub.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest, together P")
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default 0)")
    sub.add_argument("--activations", metavar="TYPE", help=ACTIVATIONS_HELP)
    return parser


def _convert(args: argparse.Namespace) -> int:
    from aq_jax.quantizers.lookup import read_conversion

    given = {key: getattr(args, key) for key in SHARDS_HELP}
    sets = [f"shards.{key}={value}" for key, value in given.items() if value is not None]
    config = read_conversion(args.config, (*args.set, *sets))
    if args.dry_run:
        record = None
        if config.allocate:
            with _progress_bar(args.json) as progress:
                found = jobs.allocate(config, progress)
            record, config = found.record(), dataclasses.replace(config, allocate=None, quantization=found.config)
        return _print_plan(config.output, jobs.plan(config), args.json, record)
    with _progress_bar(args.json, "bytes" if config.in_shards else "parts") as progress:
        done = jobs.convert(config, progress)
    return _print_written(done, args.json)


def _quantize(args: argparse.Namespace) -> int:
    config = QuantizationConfig(
        quant_type=args.quant_type,
        per_channel=args.per_channel,
        group_size=args.group_size,
        symmetric=not args.asymmetric,
        solver=args.solver,
        rotate=args.rotate,
        mixed_precision_layers=tuple(args.keep),
        on_nonfinite=args.on_nonfinite,
    )
    _check_compression(args.compression)
    with _progress_bar(args.json) as progress:
        done = jobs.quantize_file(
            args.input, args.output, config,
            calibration=CalibrationConfig(text=args.text), compression=args.compression, progress=progress,
        )  # fmt: skip
    return _print_written(done, args.json)


def _dequantize(args: argparse.Namespace) -> int:
    with _progress_bar(args.json) as progress:
        done = jobs.dequantize_file(args.input, args.output, progress=progress)
    if args.json or Path(done.path) == Path(args.output):
        return _print_written(done, args.json)
    for note in done.notes:
        _say(f"note: {_clean(note)}")
    _say(f"{_clean(done.path)}: written")
    return DONE


def _inspect(args: argparse.Namespace) -> int:
    found = jobs.inspect_table(args.file)
    layers = sorted(found.layers, key=SORT_KEYS[args.sort]) if args.sort else list(found.layers)
    if args.reverse:
        layers.reverse()
    if args.json:
        report = dataclasses.asdict(dataclasses.replace(found, layers=tuple(layers)))
        _say(json.dumps(report | {"params": found.params}))
        return DONE
    rows = [
        (layer.name, _shape(layer.shape), layer.quant_type, f"{layer.params:,}", f"{layer.bits:.2f}",
         f"{layer.bytes:,}", _number(layer.cosine, "{:.5f}"), _number(layer.rel_mse, "{:.2e}"))
        for layer in layers
    ]  # fmt: skip
    total = sum(layer.bytes for layer in layers)
    bits = f"{8 * total / found.params:.2f}" if found.params else ""
    footer = (f"{len(layers)} tensors", "", "", f"{found.params:,}", bits, f"{total:,}", "", "")
    _table(("name", "shape", "type", "params", "bits", "bytes", "cosine", "error"), rows, footer)
    if found.aliases:
        _say("tied: " + ", ".join(f"{_clean(a)} = {_clean(b)}" for a, b in found.aliases.items()))
    _say(f"schema V{found.version}, {found.file_bytes:,} bytes on disk")
    return DONE


def _verify(args: argparse.Namespace) -> int:
    verdict = jobs.verify_table(args.file)
    if args.json:
        _say(json.dumps(dataclasses.asdict(verdict) | {"ok": verdict.ok}))
        return DONE if verdict.ok else NO
    for error in verdict.errors[:SHOWN]:
        _say(_clean(error))
    if (more := len(verdict.errors) - SHOWN) > 0:
        _say(f"and {more} more: --json lists all")
    unchecked = f", {verdict.unchecked} of them without a digest to check" if verdict.unchecked else ""
    rows = f"{verdict.rows} good rows{unchecked}"
    damaged = verdict.damaged
    if verdict.ok:
        _say(f"{_clean(args.file)}: whole; {rows}")
    elif not verdict.good and not damaged:
        _say(f"{_clean(args.file)}: damaged; no tensor of it can be read")
    else:
        names = ", ".join(damaged[:SHOWN]) + (f" and {len(damaged) - SHOWN} more" if len(damaged) > SHOWN else "")
        tensors = f"{len(verdict.good)} of {len(verdict.good) + len(damaged)} tensors are whole ({rows})"
        _say(f"{_clean(args.file)}: damaged; {tensors}" + (f"; damaged: {_clean(names)}" if names else ""))
    return DONE if verdict.ok else NO


def _validate(args: argparse.Namespace) -> int:
    from aq_jax.evaluate.config import load_validation
    from aq_jax.evaluate.report import case_table, failed_table, verdict

    config = load_validation(args.config, tuple(args.set))
    with _notes(), _progress_bar(args.json) as progress:
        report = jobs.validate(config, progress)
    if args.json:
        _say(json.dumps(report))
        return DONE if report["ok"] else NO
    for header, rows in (case_table(report), failed_table(report)):
        if rows:
            _table(header, rows)
            _say("")
    _say(f"{verdict(report)}; see {_clean(str(Path(config.folder, 'report.html')))}")
    return DONE if report["ok"] else NO


def _embed(args: argparse.Namespace) -> int:
    texts = _read_lines(args.input)
    with _notes(), _progress_bar(args.json, "texts") as progress:
        done = jobs.embed(
            args.model, texts, args.output, args.activations, progress, prompt_name=args.prompt_name, prompt=args.prompt
        )
    if args.json:
        _say(json.dumps(dataclasses.asdict(done)))
        return DONE
    speed = f", {done.texts / done.seconds['encode']:.0f} a second" if done.texts else ""
    times = ", ".join(f"{what} {seconds:.2f} s" for what, seconds in done.seconds.items())
    _say(f"{_clean(done.path)}: {done.texts} embeddings of {done.width} numbers{speed} ({times})")
    return DONE


def _generate(args: argparse.Namespace) -> int:
    with _notes():
        text = jobs.generate(
            args.model, args.prompt, args.max_tokens,
            temperature=args.temperature, top_p=args.top_p, seed=args.seed, activations=args.activations,
        )  # fmt: skip
    _say(json.dumps({"prompt": args.prompt, "text": text}) if args.json else _clean_lines(args.prompt + text))
    return DONE


def _read_lines(name: str) -> list[str]:
    """One text a line; a last line that is empty is none."""
    data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{name}: line {line} is no UTF-8; wanted one text a line, in UTF-8") from None
    return [line.removesuffix("\r") for line in (lines[:-1] if not lines[-1] else lines)]


@contextmanager
def _notes() -> Iterator[None]:
    """What the library warns of, as notes beside the output."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *rest: _note(str(message))
        yield


def _check_compression(name: str) -> None:
    if name not in ("none", "zstd"):
        raise ConfigError(f"--compression {name!r}: wanted none or zstd")


def _print_written(done: Written, as_json: bool) -> int:
    size = done.bytes
    if as_json:
        _say(json.dumps(dataclasses.asdict(done)))
        return DONE
    if done.allocation:
        _print_allocation(done.allocation)
    if done.training:
        t = done.training
        _say(
            f"trained {t['steps']} steps on {t['texts']} lines, until {t['stopped']}; cosine {t['cosine_before']:.4f} "
            f"before, {t['cosine']:.4f} after, on the {t['held_out']} other lines that the best was chosen by"
        )
    for why in done.kept.values():
        _say(f"kept unquantized: {_clean(why)}")
    for note in done.notes:
        _say(f"note: {_clean(note)}")
    times = ", ".join(f"{what} {seconds:.2f} s" for what, seconds in done.seconds.items())
    ratio = f", {done.source_bytes / size:.2f}x smaller than its {done.source_bytes:,} bytes of weights" if size else ""
    _say(f"{_clean(done.path)}: {len(done.quantized)} tensors quantized, {size:,} bytes{ratio} ({times})")
    return DONE


def _print_allocation(record: Mapping[str, Any]) -> None:
    """Which width each tensor has, and what that costs: predicted, and real where it is known."""
    rows = [
        (t["name"] if t["chosen"] else f"{t['name']} (fixed)", _shape(t["shape"]), t["quant_type"],
         f"{t['bpw']:.3f}", f"{t['error']:.2e}")
        for t in record["tensors"]
    ]  # fmt: skip
    error = f"{1 - record['predicted_cosine']:.2e}"
    _table(
        ("name", "shape", "type", "bits", "error"),
        rows,
        (f"{len(rows)} tensors", "", "", f"{record['bpw']:.3f}", error),
    )
    uniform = ", ".join(
        f"{width} {each['predicted_cosine']:.4f} at {each['bpw']:.2f}" for width, each in record["uniform"].items()
    )
    _say(f"one width for all, predicted cosine at bits a weight: {uniform}")
    said = f"{record['bpw']:.3f} bits a weight; cosine {record['predicted_cosine']:.4f} predicted"
    if "cosine" in record:
        lines = f"{record['sentences']} {'other lines' if record['held_out'] else 'lines of the calibration itself'}"
        said += f", {record['cosine']:.4f} measured on {lines} of the text"
    _say(said)
    if record.get("cosine", 1) < record.get("min_cosine", 0):
        _say(f"note: measured below min_cosine = {record['min_cosine']}: ask for more, or take more text")


def _print_plan(output: str, planned: list[Planned], as_json: bool, allocation: Mapping[str, Any] | None = None) -> int:
    from aq_jax.quantizers.treatment import vectors_note

    total = sum(row.bytes for row in planned)
    kept = [row.name for row in planned if row.vector]
    notes = [vectors_note(kept)] if kept else []
    if as_json:
        listed = [{k: v for k, v in dataclasses.asdict(row).items() if k != "vector"} for row in planned]
        report = {"output": output, "bytes": total, "rows": listed, "notes": notes}
        _say(json.dumps(report | ({"allocation": allocation} if allocation else {})))
        return DONE
    if allocation:
        _print_allocation(allocation)
    rows = [(row.name, _shape(row.shape), row.quant_type, f"{row.bytes:,}") for row in planned]
    _table(("name", "shape", "type", "bytes"), rows, (f"{len(rows)} tensors", "", "", f"{total:,}"))
    for note in notes:
        _say(f"note: {_clean(note)}")
    _say(f"{_clean(output)}: would hold at most {total:,} bytes of tensors; nothing was written")
    return DONE


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]], footer: tuple[str, ...] | None = None) -> None:
    """Aligned columns, numbers to the right; plain text, so that it can be piped."""
    lines = [header, *(tuple(map(_clean, row)) for row in rows), *([footer] if footer else [])]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for n, line in enumerate(lines):
        cells = [c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        if n == 1 or (footer and n == len(lines) - 1):
            _say("-" * (sum(widths) + 2 * len(widths) - 2))
        _say("  ".join(cells).rstrip())


@contextmanager
def _progress_bar(as_json: bool, of: str = "parts") -> Iterator[Progress]:
    """A bar on a terminal, of what is done of all: texts, parts, or tensors and their bytes; nothing elsewhere."""
    if as_json or not sys.stderr.isatty():
        yield _heed_interrupt
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    counts = {
        "texts": (MofNCompleteColumn(),),
        "bytes": (TextColumn("{task.fields[calls]} tensors"), DownloadColumn()),
        "parts": (TaskProgressColumn(),),
    }
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), *counts[of], TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None, calls=0)

        def advance(name: str, size: int, total: int) -> None:
            _heed_interrupt(name, size, total)
            if bar.tasks[0].finished:  # what follows is counted, and timed, anew
                bar.reset(task)
            calls = bar.tasks[0].fields["calls"] + 1
            bar.update(task, description=_clean(name)[-40:], total=total, advance=size, calls=calls)

        yield advance


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _number(value: float | None, how: str) -> str:
    return "" if value is None else how.format(value)


def _clean(text: str) -> str:
    """Names come from files: what would steer a terminal is shown, not sent."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _clean_lines(text: str) -> str:
    return "\n".join(map(_clean, text.split("\n")))


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _say(text: str) -> None:
    print(text)  # noqa: T201


def _fail(text: str, status: int) -> int:
    _note(text)
    return status


def _note(text: str) -> None:
    print(f"aq-jax: {_clean(text)}", file=sys.stderr)  # noqa: T201


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, but not inside JAX's garbage-collection callback, which would drop and report it."""
    _interrupted.set()
    if frame is not None and frame.f_code.co_name == "_xla_gc_callback":
        threading.Timer(0.01, signal.raise_signal, [number]).start()
        return
    raise KeyboardInterrupt


def _heed_interrupt(name: str, size: int, total: int) -> None:
    """Raise an interrupt once more that another callback has swallowed: Python drops what those raise."""
    if _interrupted.is_set():
        raise KeyboardInterrupt


if __name__ == "__main__":
    run()
