"""Run `make demo-llm`: SmolLM2 as its GGUF has it, at 8 and at 4 bits without data; one table, and an answer."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

from aq_jax.cli import use_compile_cache
from aq_jax.errors import AqError

SOURCE, FOLDER = "build/gguf/smollm2.gguf", Path("build/demo_llm")
QUESTION = "What is the capital of France, and what is it known for?"
STORY = "Once upon a time, in a small village by the sea, there lived"
HEADER = ("weights", "MB", "bits", "convert s", "load s", "tokens/s", "KL", "same top")
WINDOWS, WINDOW, TOKENS = 8, 128, 64


def main() -> int:
    """Print the table and the answer of the first model; return 2 if there is no model."""
    use_compile_cache()
    try:
        rows = [HEADER, *measure()]
    except (AqError, FileNotFoundError) as error:
        print(f"demo-llm: {error}", file=sys.stderr)
        return 2
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    for row in rows:
        print(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
        )
    print(
        f"\nKL (nats a token) and same top: beside the file's own weights, {WINDOWS} windows of Python's manual."
        "\nCalibrated in minutes, fewer bits keep more: configs/smollm2_tcq3.toml, docs/language_models.md.\n"
    )
    print(f"> {QUESTION}\n{answer()}\n\nGo on: .venv/bin/aq-jax chat {FOLDER}/own.parquet")
    return 0


def measure() -> list[tuple[str, ...]]:
    """Convert, load and run each; return the rows of the table."""
    import aq_jax as aq
    from aq_jax.calibration.text import read_text
    from aq_jax.nn import Generator
    from aq_jax.validate.data import HeldOut
    from aq_jax.validate.outputs import GeneratorJudge

    policies = {
        "own": None,
        "int8": aq.QuantizationConfig("int8"),
        "int4": aq.QuantizationConfig(
            "int4", group_size=96, symmetric=False, rotate=True,
            overrides=(aq.Override("embed_tokens", "int8", per_channel=True, symmetric=True, rotate=False),),
        ),
    }  # fmt: skip
    names = {"own": "as the GGUF has them", "int8": "int8", "int4": "int4, groups of 96, rotated"}
    text = read_text(aq.CalibrationConfig(sentences=WINDOWS, joined=True, max_tokens=WINDOW))
    rows, judge = [], None
    for name, policy in policies.items():
        path = FOLDER / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        config = aq.ConversionConfig(SOURCE, str(path), policy)
        config = config if policy is None else dataclasses.replace(config, requantize=True)
        start = time.perf_counter()
        aq.convert(config)
        converted = time.perf_counter() - start
        start = time.perf_counter()
        model = aq.load_model(path, "float32" if policy else None)
        assert isinstance(model, Generator)
        loaded = time.perf_counter() - start
        judge = judge or GeneratorJudge(model, HeldOut(text, 0, None), WINDOW)
        found = judge.outputs(model)
        ids = model.tokenizer.encode(STORY).ids
        speed = []
        for _ in range(2):  # the first compiles
            start = time.perf_counter()
            made = len(model.generate_ids(ids, TOKENS))
            speed.append(made / (time.perf_counter() - start))
        params = sum(_params(path))
        size = path.stat().st_size
        rows.append((
            names[name], f"{size / 1e6:.1f}", f"{8 * size / params:.2f}", f"{converted:.1f}", f"{loaded:.1f}",
            f"{speed[-1]:.0f}", f"{found['kl']['mean']:.4f}", f"{found['same_top']['rate']:.3f}",
        ))  # fmt: skip
    return rows


def _params(path: Path) -> list[int]:
    from aq_jax.store.inspection import inspect_table

    return [layer.params for layer in inspect_table(path).layers]


def answer() -> str:
    """Answer the question by the weights that the file has."""
    import aq_jax as aq
    from aq_jax.nn import Generator

    model = aq.load_model(FOLDER / "own.parquet")
    assert isinstance(model, Generator)
    return model.generate(messages=[{"role": "user", "content": QUESTION}], max_tokens=TOKENS)


if __name__ == "__main__":
    sys.exit(main())
