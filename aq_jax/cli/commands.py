"""Run the commands: build a config, call the library, print the result. Only commands that compute import jax."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aq_jax.cli.chat import chat
from aq_jax.cli.models import embed, load_generator, rank
from aq_jax.cli.reports import print_dry_run, print_result
from aq_jax.cli.terminal import (
    DONE,
    NO,
    escape_lines,
    format_number,
    format_shape,
    print_line,
    print_table,
    progress_bar,
    read_input,
    warnings_as_notes,
)
from aq_jax.config import CalibrationConfig, QuantizationConfig
from aq_jax.converters.convert import convert, dequantize_file, dry_run, quantize_file
from aq_jax.converters.inspection import inspect
from aq_jax.errors import ConfigError, FormatError, escape, some_of
from aq_jax.store.inspection import Layer
from aq_jax.store.verify import verify_table

SHOWN = 20
"""The most errors and names that `verify` lists."""
# The column of `inspect` -> its sort key.
SORT_KEYS: dict[str, Callable[[Layer], Any]] = {
    "name": lambda layer: layer.name,
    "shape": lambda layer: layer.shape,
    "type": lambda layer: layer.quant_type,
    "params": lambda layer: layer.params,
    "bits": lambda layer: layer.bits,
    "bytes": lambda layer: layer.bytes,
    "cosine": lambda layer: 2.0 if layer.cosine is None else layer.cosine,
    "error": lambda layer: -1.0 if layer.rel_mse is None else layer.rel_mse,
}
# The options of `generate` and `chat`, with their types.
GENERATION_HELP: dict[str, tuple[type, str, str]] = {
    "temperature": (float, "T", "0 takes the likeliest token (default: the model's own, or 0)"),
    "top_k": (int, "K", "draw among the K likeliest; 0: all"),
    "top_p": (float, "P", "draw among the likeliest that have the probability P together"),
    "min_p": (float, "P", "draw none that has less than P of the likeliest one's probability"),
    "repetition_penalty": (float, "R", "above 1: tokens that were there before are less likely"),
    "seed": (int, "N", "of the draws (default 0)"),
    "stop": (str, "TEXT", "end before this text; may be given several times"),
    "cache": (str, "TYPE", "what keys and values are kept in: float32 (default), bfloat16 or int8"),
}
SHARDS_HELP = {
    "max_memory": "what all processes may take together, such as 1.5GB (default: a quarter of the machine)",
    "workers": "processes at most (default: one a core, as long as they fit in the memory)",
    "engine": "local (default), or ray, on a Ray cluster",
}


def run_convert(args: argparse.Namespace) -> int:
    from aq_jax.quantizers.lookup import read_conversion

    given = {key: getattr(args, key) for key in SHARDS_HELP}
    sets = [f"shards.{key}={value}" for key, value in given.items() if value is not None]
    config = read_conversion(args.config, (*args.set, *sets))
    if args.dry_run:
        with progress_bar(args.json) as progress:
            expected = dry_run(config, progress)
        return print_dry_run(config.output, expected, args.json)
    with progress_bar(args.json, "bytes" if config.in_shards else "parts") as progress:
        done = convert(config, progress)
    return print_result(done, args.json)


def run_quantize(args: argparse.Namespace) -> int:
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
    with progress_bar(args.json) as progress:
        done = quantize_file(
            args.input, args.output, config,
            calibration=CalibrationConfig(text=args.text), compression=args.compression, requantize=args.requantize,
            progress=progress,
        )  # fmt: skip
    return print_result(done, args.json)


def run_dequantize(args: argparse.Namespace) -> int:
    with progress_bar(args.json) as progress:
        done = dequantize_file(args.input, args.output, progress=progress)
    if args.json or Path(done.path) == Path(args.output):
        return print_result(done, args.json)
    for note in done.notes:
        print_line(f"note: {escape(note)}")
    print_line(f"{escape(done.path)}: written")
    return DONE


def run_inspect(args: argparse.Namespace) -> int:
    found = inspect(args.file)
    layers = sorted(found.layers, key=SORT_KEYS[args.sort]) if args.sort else list(found.layers)
    if args.reverse:
        layers.reverse()
    if args.json:
        report = dataclasses.asdict(dataclasses.replace(found, layers=tuple(layers)))
        print_line(json.dumps(report | {"params": found.params}))
        return DONE
    rows = [
        (layer.name, format_shape(layer.shape), layer.quant_type, f"{layer.params:,}", f"{layer.bits:.2f}",
         f"{layer.bytes:,}", format_number(layer.cosine, "{:.5f}"), format_number(layer.rel_mse, "{:.2e}"))
        for layer in layers
    ]  # fmt: skip
    total = sum(layer.bytes for layer in layers)
    bits = f"{8 * total / found.params:.2f}" if found.params else ""
    footer = (f"{len(layers)} tensors", "", "", f"{found.params:,}", bits, f"{total:,}", "", "")
    print_table(("name", "shape", "type", "params", "bits", "bytes", "cosine", "error"), rows, footer)
    if found.aliases:
        print_line("tied: " + ", ".join(f"{escape(a)} = {escape(b)}" for a, b in found.aliases.items()))
    print_line(f"{f'schema V{found.version}' if found.version else found.format}, {found.file_bytes:,} bytes on disk")
    return DONE


def run_verify(args: argparse.Namespace) -> int:
    verdict = verify_table(args.file)
    if args.json:
        print_line(json.dumps(verdict.record()))
        return DONE if verdict.ok else NO
    for error in verdict.errors[:SHOWN]:
        print_line(escape(error))
    if (more := len(verdict.errors) - SHOWN) > 0:
        print_line(f"and {more} more: --json lists all")
    unchecked = f", {verdict.unchecked} of them without a digest to check" if verdict.unchecked else ""
    rows = f"{verdict.rows} good rows{unchecked}"
    damaged = verdict.damaged
    if verdict.ok:
        print_line(f"{escape(args.file)}: whole; {rows}")
    elif not verdict.good and not damaged:
        print_line(f"{escape(args.file)}: damaged; no tensor of it can be read")
    else:
        names = some_of(damaged, SHOWN)
        tensors = f"{len(verdict.good)} of {len(verdict.good) + len(damaged)} tensors are whole ({rows})"
        print_line(f"{escape(args.file)}: damaged; {tensors}" + (f"; damaged: {escape(names)}" if names else ""))
    return DONE if verdict.ok else NO


def run_validate(args: argparse.Namespace) -> int:
    from aq_jax.validate.config import load_validation
    from aq_jax.validate.run import validate
    from aq_jax.validate.tables import case_table, failed_table, verdict

    config = load_validation(args.config, tuple(args.set))
    with warnings_as_notes(), progress_bar(args.json) as progress:
        report = validate(config, progress)
    if args.json:
        print_line(json.dumps(report))
        return DONE if report["ok"] else NO
    for header, rows in (case_table(report), failed_table(report)):
        if rows:
            print_table(header, rows)
            print_line("")
    print_line(f"{verdict(report)}; see {escape(str(Path(config.folder, 'report.html')))}")
    return DONE if report["ok"] else NO


def run_embed(args: argparse.Namespace) -> int:
    texts = _read_lines(args.input)
    with warnings_as_notes(), progress_bar(args.json, "texts") as progress:
        done = embed(
            args.model,
            texts,
            args.output,
            args.activations,
            progress,
            prompt_name=args.prompt_name,
            prompt=args.prompt,
            precision=args.precision,
            truncate_dim=args.truncate_dim,
            inputs=() if args.input == "-" else (args.input,),
        )
    if args.json:
        print_line(json.dumps(dataclasses.asdict(done)))
        return DONE
    speed = f", {done.texts / done.seconds['encode']:.0f} a second" if done.texts else ""
    times = ", ".join(f"{what} {seconds:.2f} s" for what, seconds in done.seconds.items())
    print_line(f"{escape(done.path)}: {done.texts} embeddings of {done.width} numbers{speed} ({times})")
    return DONE


def run_rank(args: argparse.Namespace) -> int:
    texts = _read_lines(args.input)
    with warnings_as_notes(), progress_bar(args.json, "texts") as progress:
        found = rank(args.model, args.query, texts, args.top_k, args.activations, progress)
    if args.json:
        print_line(json.dumps([each._asdict() for each in found]))
    for each in [] if args.json else found:
        print_line(f"{each.score:.6f}  {escape_lines(each.text)}")
    return DONE


def run_generate(args: argparse.Namespace) -> int:
    with warnings_as_notes():
        text = load_generator(args.model, args.activations).generate(args.prompt, args.max_tokens, **_options(args))
    print_line(json.dumps({"prompt": args.prompt, "text": text}) if args.json else escape_lines(args.prompt + text))
    return DONE


def run_chat(args: argparse.Namespace) -> int:
    with warnings_as_notes():
        generator = load_generator(args.model, args.activations)
        if generator.template is None:
            raise FormatError(f"{args.model}: has no chat template beside it; wanted one, as models for chats have")
        chat(generator, args.system, args.max_tokens, _options(args), args.json)
    return DONE


def _options(args: argparse.Namespace) -> Any:
    """Collect the options of a generation that were given; the model has defaults of its own."""
    return {name: value for name in GENERATION_HELP if (value := getattr(args, name)) is not None}


def _read_lines(name: str) -> list[str]:
    """Read one text a line; an empty last line does not count."""
    data = read_input().read() if name == "-" else Path(name).read_bytes()
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{name}: line {line} is not UTF-8; wanted one text a line, in UTF-8") from None
    return [line.removesuffix("\r") for line in (lines[:-1] if not lines[-1] else lines)]


def _check_compression(name: str) -> None:
    if name not in ("none", "zstd"):
        raise ConfigError(f"--compression {name!r}: wanted none or zstd")
