"""The commands that run models: embed, generate and chat. And the files that embeddings are written to."""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bert_oracle
import duckdb
import numpy as np
import pytest
import small_bert
import small_llama
from helpers import Run, listing

import aq_jax as aq
from aq_jax.cli import chat
from aq_jax.cli.terminal import escape_lines
from aq_jax.errors import ConfigError
from aq_jax.nn.generator import Generator
from aq_jax.store.embeddings import write_embeddings

# Every call of a command compiles its model's programs, most of them once more.
# What a model computes is tested elsewhere: one layer is a model.
CONFIG = {**bert_oracle.CONFIG, "num_hidden_layers": 1}
TEXTS = ["a b c", "", "c b", "\N{SNOWMAN} d"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_bert.make(tmp_path_factory.mktemp("bert"), "int8", CONFIG, "m.arrow")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama.make(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def expected(bert: Path) -> np.ndarray:
    return np.asarray(aq.load_model(bert).encode(TEXTS))  # pyright: ignore[reportAttributeAccessIssue]


def test_embed_writes_an_array(run: Run, bert: Path, expected: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("\r\n".join(TEXTS) + "\n")
    status, out, err = run("embed", bert, "--input", tmp_path / "in.txt", "--output", tmp_path / "e.npy")
    assert (status, err) == (0, "")
    assert "e.npy: 4 embeddings of 32 numbers" in out
    found = np.load(tmp_path / "e.npy")
    assert found.dtype == np.float32
    assert np.array_equal(found, expected)


def test_embed_reads_the_standard_input_and_writes_parquet(
    run: Run, bert: Path, expected: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(TEXTS).encode())))
    path = tmp_path / "e.parquet"
    status, out, _ = run("embed", bert, "--input", "-", "--output", path, "--json")
    report = json.loads(out)
    assert (status, report["texts"], report["width"], report["compiles"]) == (0, 4, 32, 1)
    with duckdb.connect() as connection:
        rows = connection.execute(f"SELECT text, embedding FROM '{path}'").fetchall()
    assert [text for text, _ in rows] == TEXTS
    assert np.array_equal(np.array([e for _, e in rows], np.float32), expected)


def test_embed_puts_a_prompt_before_each_text(run: Run, bert: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("\n".join(TEXTS))
    bert_oracle.write_json(bert.parent / "config_sentence_transformers.json", {"prompts": {"q": "the red "}})
    found = []
    try:
        for how in (["--prompt-name", "q"], ["--prompt", "the red "]):
            assert run("embed", bert, "--input", tmp_path / "in.txt", "--output", tmp_path / "e.npy", *how)[0] == 0
            found.append(np.load(tmp_path / "e.npy"))
        status, _, err = run(
            "embed", bert, "--input", tmp_path / "in.txt", "--output", tmp_path / "e.npy", "--prompt-name", "x"
        )
    finally:
        (bert.parent / "config_sentence_transformers.json").unlink()
    wanted = np.asarray(aq.load_model(bert).encode([f"the red {text}" for text in TEXTS]))  # type: ignore[union-attr]
    assert np.array_equal(found[0], wanted)
    assert np.array_equal(found[1], wanted)
    assert (status, "prompt_name is 'x'; the model has 'query', 'document', 'q'" in err) == (2, True)


def test_embed_of_nothing_is_an_empty_array(run: Run, bert: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("")
    for name in ("e.npy", "e.parquet"):
        assert run("embed", bert, "--input", tmp_path / "in.txt", "--output", tmp_path / name)[0] == 0
    assert np.load(tmp_path / "e.npy").shape == (0, 32)


def test_embed_notes_what_it_cut(run: Run, bert: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("a " * 1000 + "\nb\n")
    status, _, err = run("embed", bert, "--input", tmp_path / "in.txt", "--output", tmp_path / "e.npy")
    assert status == 0
    assert err.startswith("aq-jax: 1 of 2 texts are longer than ")


@pytest.mark.parametrize(
    ("content", "options", "text"),
    [
        (b"a\nb\xff\n", ("--output", "e.npy"), "in.txt: line 2 is not UTF-8"),
        (b"a\n", ("--output", "e.csv"), "e.csv: wanted a name that ends in .npy or .parquet"),
        (b"a\n", ("--output", "e.npy", "--activations", "int4"), "activations = 'int4': wanted one of float32"),
        (None, ("--output", "e.npy"), "in.txt: No such file"),
    ],
)
def test_embed_refuses(
    run: Run, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    content: bytes | None, options: tuple[str, ...], text: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "in.txt").write_bytes(content)
    before = listing(tmp_path)
    status, out, err = run("embed", bert, "--input", "in.txt", *options)
    assert (status, out) == (2, "")
    assert err.startswith("aq-jax: ")
    assert text in err
    assert listing(tmp_path) == before


def test_models_of_the_other_kind_are_refused(run: Run, bert: Path, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("a\n")
    status, _, err = run("embed", llama, "--input", tmp_path / "in.txt", "--output", tmp_path / "e.npy")
    assert status == 2
    assert "holds a language model" in err
    status, _, err = run("generate", bert, "a")
    assert status == 2
    assert "holds an encoder" in err


def test_generate_prints_prompt_and_continuation(run: Run, llama: Path) -> None:
    model = aq.load_model(llama)
    text = model.generate("on", 12)  # pyright: ignore[reportAttributeAccessIssue]
    status, out, err = run("generate", llama, "on", "--max-tokens", "12", "--json")
    assert (status, err, json.loads(out)) == (0, "", {"prompt": "on", "text": text})
    status, out, _ = run("generate", llama, "on", "--max-tokens", "12", "--temperature", "0")
    assert status == 0
    assert out.startswith("on")
    assert all(c.isprintable() or c == "\n" for c in out)  # nothing that steers a terminal


def test_generate_refuses_numbers_out_of_range(run: Run, llama: Path) -> None:
    for options, text in (
        (("--max-tokens", "0"), "max_tokens = 0"),
        (("--temperature", "-1"), "temperature = -1.0"),
        (("--temperature", "nan"), "temperature = nan"),
        (("--top-p", "0"), "top_p = 0.0"),
        (("--top-k", "-1"), "top_k = -1"),
        (("--stop", ""), "stop has ''"),
        (("--cache", "int4"), "cache = 'int4'"),
    ):
        status, out, err = run("generate", llama, "on", *options)
        assert (status, out) == (2, "")
        assert text in err


def test_embed_never_replaces_its_model_its_input_or_a_table(run: Run, bert: Path, tmp_path: Path) -> None:
    aq.save(tmp_path / "m.parquet", {"w": np.ones(2, np.float32)})
    (tmp_path / "other.parquet").write_bytes((tmp_path / "m.parquet").read_bytes())
    (tmp_path / "model.npy").symlink_to(bert)
    (tmp_path / "in.npy").write_text("a\n")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for model, output, text in (
        (tmp_path / "m.parquet", "m.parquet", "m.parquet that is read"),
        (bert, "model.npy", "m.arrow that is read"),
        (bert, "in.npy", "in.npy that is read"),
        (bert, "other.parquet", "already exists and holds no embeddings"),
    ):
        status, _, err = run("embed", model, "--input", tmp_path / "in.npy", "--output", tmp_path / output)
        assert (status, text in err) == (2, True), err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "e.parquet"
    write_embeddings(path, ["a"], np.ones((1, 2), np.float32))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"\w"):
        write_embeddings(path, ["a", "b"], np.ones((1, 2), np.float32))
    assert path.read_bytes() == before
    assert listing(tmp_path) == ["e.parquet"]
    with pytest.raises(ConfigError, match=r"e\.csv: wanted a name that ends in \.npy or \.parquet"):
        write_embeddings(tmp_path / "e.csv", [], np.ones((0, 2), np.float32))


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    return lambda data: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    table = small_llama.make(tmp_path_factory.mktemp("talker"), seed=1)
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    (table.parent / "chat_template.jinja").write_text(template)
    return table


def test_chat_answers_each_line_and_keeps_what_was_said(
    run: Run, talker: Path, lines: Callable[[bytes], None], capsys: pytest.CaptureFixture[str]
) -> None:
    model = aq.load_model(talker)
    said: list[dict[str, str]] = [{"role": "system", "content": "ab"}]
    for text in ("the", "an \N{SNOWMAN}"):
        said.append({"role": "user", "content": text})
        answer = model.generate(messages=said, max_tokens=6)  # pyright: ignore[reportAttributeAccessIssue]
        said.append({"role": "assistant", "content": answer})
    lines("the\r\n\n  an \N{SNOWMAN}".encode())
    status, out, err = run("chat", talker, "--system", "ab", "--max-tokens", "6", "--json")
    assert (status, err, [json.loads(line) for line in out.splitlines()]) == (0, "", said[2::2])
    lines(b"the\n")
    status, out, _ = run("chat", talker, "--system", "ab", "--max-tokens", "6", "--stop", "\N{SNOWMAN}")
    assert (status, out) == (0, escape_lines(said[2]["content"]) + "\n")


def test_an_interrupt_ends_an_answer_and_not_the_chat(
    run: Run, talker: Path, lines: Callable[[bytes], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stream(self: Any, messages: list[dict[str, str]], **_: Any) -> Iterator[str]:
        yield f"{len(messages)} "
        signal.raise_signal(signal.SIGINT)
        yield "never"

    monkeypatch.setattr(Generator, "stream", stream)
    lines(b"a\nb\n")
    assert run("chat", talker)[:2] == (0, "1 \n3 \n")


def test_a_chat_that_grows_too_long_forgets_its_beginning(
    run: Run, talker: Path, lines: Callable[[bytes], None]
) -> None:
    lines(b"\n".join([b"b" * 50] * 3))
    status, out, err = run("chat", talker, "--max-tokens", "4")
    assert (status, out.count("\n")) == (0, 3)
    assert "the conversation is too long for the model: it forgets 'bbb" in err
    lines(b"\n".join([b"a", b"b" * 100]))
    status, out, err = run("chat", talker, "--max-tokens", "4")
    assert (status, out.count("\n")) == (2, 1)
    assert "forgets" not in err  # which would not help


def test_on_a_terminal_a_message_that_is_too_long_does_not_end_the_chat(
    run: Run, talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = iter(["b" * 100, "a"])

    def type_in(_: str) -> str:
        if (text := next(typed, None)) is None:
            raise EOFError
        return text

    monkeypatch.setattr(chat, "on_terminal", lambda: True)
    monkeypatch.setattr("builtins.input", type_in)
    status, out, err = run("chat", talker, "--max-tokens", "4", "--json")
    assert (status, json.loads(out.splitlines()[0])["role"]) == (0, "assistant")
    assert "aq-jax: generate: the messages have" in err


def test_chat_refuses_what_it_cannot_do(
    run: Run, llama: Path, bert: Path, talker: Path, lines: Callable[[bytes], None]
) -> None:
    for model, data, text in (
        (llama, b"a\n", "has no chat template beside it"), (bert, b"a\n", "holds an encoder"),
        (talker, b"\xff\n", "-: line 1 is not UTF-8"),
    ):  # fmt: skip
        lines(data)
        status, out, err = run("chat", model)
        assert (status, out) == (2, "")
        assert text in err
    lines(b"")
    assert run("chat", talker) == (0, "", "")
