"""Define the commands and their arguments."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import aq_jax
from aq_jax.cli.commands import (
    GENERATION_HELP,
    SHARDS_HELP,
    SORT_KEYS,
    run_chat,
    run_convert,
    run_dequantize,
    run_embed,
    run_generate,
    run_inspect,
    run_quantize,
    run_rank,
    run_validate,
    run_verify,
)
from aq_jax.cli.compilecache import FOLDER_VARIABLE
from aq_jax.cli.terminal import print_line
from aq_jax.config import widths
from aq_jax.errors import ConfigError

ACTIVATIONS_HELP = "what layers round their inputs to: float32, bfloat16 or int8 (default: int8 for int8 weights)"


class _Version(argparse.Action):
    """The action that prints the version and the native kernels' state; as JSON, with the tables that there are."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        if values not in ([], ["--json"]):
            parser.error(f"--version {' '.join(values)}: wanted --version, or --version --json")
        from aq_jax.native import probe

        try:
            native = probe()
        except ConfigError as error:
            parser.error(str(error))
        if not values:
            print_line(f"aq-jax {aq_jax.__version__}")
            print_line(f"native kernels: {native.isa if native.available else f'none: {native.reason}'}")
        else:
            from aq_jax.codes import CODES
            from aq_jax.converters import FORMATS
            from aq_jax.nn.models import FAMILIES
            from aq_jax.ops import KERNELS
            from aq_jax.quantizers import QUANTIZERS

            tables = {"codes": CODES, "quantizers": QUANTIZERS, "families": FAMILIES, "formats": FORMATS}
            found: dict[str, Any] = {"aq_jax": aq_jax.__version__} | {what: list(each) for what, each in tables.items()}
            found["kernels"] = {operation: list(entries) for operation, entries in KERNELS.items()}
            found["native"] = {"available": native.available} | dataclasses.asdict(native)
            print_line(json.dumps(found))
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aq-jax",
        description="Quantize model weights and keep them in Arrow tables.",
        epilog=f"Compiled programs are kept in the user's cache folder; {FOLDER_VARIABLE}=FOLDER moves it, "
        f"{FOLDER_VARIABLE}=off turns it off. Exit status: 0 done, 1 the answer is no, 2 bad input.",
    )
    parser.add_argument(
        "--version", action=_Version, nargs=argparse.REMAINDER, metavar="--json",
        help="show the version and exit; with --json also which codes, quantizers, kernels, families and formats",
    )  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(run=run, computes=run not in (run_inspect, run_verify))
        sub.add_argument("--json", action="store_true", help="print a JSON report")
        return sub

    sub = command("convert", run_convert, "do what a TOML config says: weights of any known format become a table")
    sub.add_argument("config", metavar="CONFIG.toml")
    sub.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="such as quantization.group_size=64"
    )
    sub.add_argument("--dry-run", action="store_true", help="say what would be written, and how large; write nothing")
    for key, text in SHARDS_HELP.items():
        sub.add_argument(f"--{key.replace('_', '-')}", metavar=key.upper(), help=f"of a folder of shards: {text}")

    sub = command("quantize", run_quantize, "quantize plain weights, such as a table, into a table")
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
    sub.add_argument("--solver", help="absmax, minmax, mse, viterbi, or gptq, which runs the model that lies beside IN")
    sub.add_argument("--text", default="", metavar="FILE", help="for gptq: a sentence a line, like those to come")
    sub.add_argument("--rotate", action="store_true", help="spread outliers by Hadamard rotation")
    sub.add_argument("--keep", action="append", default=[], metavar="TEXT", help="keep tensors so named in float16")
    sub.add_argument("--on-nonfinite", default="error", metavar="error|keep", help="refuse bad tensors, or keep them")
    sub.add_argument("--compression", default="none", metavar="none|zstd", help="of the weights (.parquet only)")
    sub.add_argument("--requantize", action="store_true", help="quantize again what is quantized already")

    sub = command(
        "dequantize",
        run_dequantize,
        "turn a table, or weights of any format, into plain ones: a V1 table, or a folder of safetensors",
    )
    sub.add_argument("input", metavar="IN")
    sub.add_argument("output", metavar="OUT", help="NAME.parquet, NAME.arrow, or a folder")

    sub = command("inspect", run_inspect, "list what a table, or other weights, hold, without reading them")
    sub.add_argument("file", metavar="FILE")
    sub.add_argument("--sort", choices=SORT_KEYS, help="by this column instead of the table's order")
    sub.add_argument("--reverse", action="store_true", help="largest first")

    sub = command("verify", run_verify, "compare every row of a table with its digest")
    sub.add_argument("file", metavar="FILE")

    sub = command(
        "validate",
        run_validate,
        "convert a model as a TOML config's cases say, and judge each by its thresholds",
    )
    sub.add_argument("config", metavar="CONFIG.toml")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as sentences=100")

    sub = command("embed", run_embed, "embed the lines of a text file with an encoder, such as MiniLM")
    sub.add_argument("model", metavar="MODEL", help="a table with config.json and tokenizer files beside it")
    sub.add_argument("--input", required=True, metavar="FILE", help="one text a line; - reads the standard input")
    sub.add_argument("--output", required=True, metavar="OUT", help="NAME.npy, or NAME.parquet with the texts")
    sub.add_argument("--prompt-name", metavar="NAME", help="put the model's prompt of this name before each text")
    sub.add_argument("--prompt", metavar="TEXT", help="put this before each text")
    sub.add_argument("--precision", default="float32", metavar="TYPE", help="float32, int8, uint8, binary or ubinary")
    sub.add_argument("--truncate-dim", type=int, metavar="N", help="keep the first N numbers of each embedding")
    sub.add_argument("--activations", metavar="TYPE", help=ACTIVATIONS_HELP)

    sub = command("rank", run_rank, "rank the lines of a text file for a query with a sequence classifier of pairs")
    sub.add_argument("model", metavar="MODEL", help="a table with config.json and tokenizer files beside it")
    sub.add_argument("query", metavar="QUERY")
    sub.add_argument("--input", required=True, metavar="FILE", help="one text a line; - reads the standard input")
    sub.add_argument("--top-k", type=int, metavar="N", help="only the best N")
    sub.add_argument("--activations", metavar="TYPE", help=ACTIVATIONS_HELP)

    sub = command("generate", run_generate, "continue a prompt with a language model")
    sub.add_argument("model", metavar="MODEL", help="a table with config.json and tokenizer files beside it")
    sub.add_argument("prompt", metavar="PROMPT")
    sub.add_argument(
        "--max-tokens", type=int, default=128, metavar="N", help="at most so many new tokens (default 128)"
    )
    _add_generation(sub)

    sub = command("chat", run_chat, "chat with a language model: each line of the standard input is a message")
    sub.add_argument("model", metavar="MODEL", help="a table with config.json and tokenizer files beside it")
    sub.add_argument("--system", metavar="TEXT", help="say first what the model is to be")
    sub.add_argument(
        "--max-tokens", type=int, default=512, metavar="N", help="at most so many tokens an answer (default 512)"
    )
    _add_generation(sub)
    return parser


def _add_generation(sub: argparse.ArgumentParser) -> None:
    for name, (kind, metavar, text) in GENERATION_HELP.items():
        how = "append" if name == "stop" else "store"
        sub.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text, action=how)
    sub.add_argument("--activations", metavar="TYPE", help=ACTIVATIONS_HELP)
