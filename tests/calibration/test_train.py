"""Training of a small encoder, from a config to a table: better, the same again, resumable, and as good as it says."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bert_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_llama

import aq_jax as aq
from aq_jax import CalibrationConfig, ConfigError, IntegrityError, TrainingConfig
from aq_jax.calibration import train as training
from aq_jax.calibration.checkpoints import Checkpoints
from aq_jax.calibration.distill import distillation_loss
from aq_jax.calibration.solve import TrainingRequest, draw_texts
from aq_jax.calibration.text import read_text
from aq_jax.calibration.train import ShuffledBatches
from aq_jax.config.schema import load_config
from aq_jax.nn.sentences import SentenceSettings
from aq_jax.quantizers import gptq
from aq_jax.store.inspection import inspect_table

MODEL = {**bert_oracle.CONFIG, "num_hidden_layers": 1, "intermediate_size": 32, "max_position_embeddings": 16}
CONFIG = """
source = "model"
output = "trained.parquet"
calibration.text = "text.txt"
calibration.sentences = 40
[quantization]
quant_type = "int2"
group_size = 16
symmetric = false
solver = "gptq"
rotate = true
[train]
steps = 40
minutes = 0
held_out = 30
batch_tokens = 128
[[override]]
pattern = "word_embeddings|output.dense"
quant_type = "tcq2"
symmetric = true
per_channel = true
[[override]]
pattern = "position|token_type"
quant_type = "int8"
symmetric = true
solver = "absmax"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of one layer, text, and a config."""
    out = tmp_path_factory.mktemp("train")
    bert_oracle.write_source(out / "model", MODEL)
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice([w for w in bert_oracle.WORDS if len(w) > 1], 4)) for _ in range(300)]  # one shape
    (out / "text.txt").write_text("\n".join(lines))
    (out / "c.toml").write_text(CONFIG)
    return out


@pytest.fixture(autouse=True)
def there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


CALIBRATED: dict[str, Any] = {}


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[str, Any]:
    """The record of the run that others are compared with; it leaves the weights that it began with in CALIBRATED."""

    def watched(model: Any, quantized: Any, solved: Any, *args: Any) -> Any:
        CALIBRATED.update(solved)
        return training.train(model, quantized, solved, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("aq_jax.calibration.solve.train", watched)
        done = aq.convert(load_config("c.toml"))
    assert done.training is not None
    return dict(done.training)


def cosines(path: str, lines: tuple[str, ...]) -> np.ndarray:
    """Between what the table gives and what the float model does, of each line."""
    ids = [bert_oracle.tokenizer().encode(line).ids for line in lines]
    wanted = bert_oracle.embed(bert_oracle.weights(MODEL), ids, MODEL)
    return np.sum(np.asarray(aq.load_model(path, activations="float32").encode(lines)) * wanted, axis=1)


def test_a_table_is_as_good_as_training_said_and_better_than_before(trained: dict[str, Any]) -> None:
    assert trained["steps"] == 40
    assert trained["stopped"] == "its last step"
    assert trained["cosine"] > trained["cosine_before"] + 0.005
    assert trained["resumed_at"] == 0
    config = load_config("c.toml")
    _, held, taught = draw_texts(config.calibration, TrainingRequest(config.train or TrainingConfig(), Path()))
    assert trained["held_out"] == len(held.lines) == 30
    assert trained["texts"] == len(taught.lines)
    assert trained["text"] == taught.record()
    assert not set(held.lines) & set(taught.lines)
    assert cosines("trained.parquet", held.lines).mean() == pytest.approx(trained["cosine"], abs=2e-5)
    table = inspect_table("trained.parquet")
    assert table.config["training"] == trained
    kinds = {layer.name: layer.quant_type for layer in table.layers}
    assert sorted(kinds.values()).count("tcq2") == 3
    assert not Path("trained.parquet.training").exists()
    with aq.WeightLoader("trained.parquet") as loader:
        assert {loader.describe(name).solver for name, kind in kinds.items() if kind in ("int2h", "tcq2")} == {
            "trained"
        }
        name = "encoder.layer.0.attention.output.LayerNorm.weight"
        assert np.abs(loader.get_layer(name, "numpy") - bert_oracle.weights(MODEL)[name]).max() > 1e-4
        words, calibrated = loader.get_quantized("embeddings.word_embeddings.weight"), CALIBRATED["word.embedding"]
    np.testing.assert_array_equal(words.codes, calibrated.codes)
    read = {i for text in (*taught.lines, *held.lines) for i in bert_oracle.tokenizer().encode(text).ids}
    moved = np.flatnonzero((np.asarray(words.scale) != calibrated.scale)[:, 0])
    assert len(moved) > len(read) / 2
    assert set(moved.tolist()) <= read


@pytest.mark.slow
def test_the_same_seed_gives_the_same_file_interrupted_or_not(
    trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = aq.load("trained.parquet", packed=True)
    config = load_config("c.toml", ("output=again.parquet",))
    step, calls = training.Distiller.step, []

    def stops(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 25:
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(training.Distiller, "step", stops)
        with pytest.raises(KeyboardInterrupt):
            aq.convert(config)
    assert not Path("again.parquet").exists()
    assert Path("again.parquet.training").is_dir()
    done = aq.convert(config)
    assert done.training is not None
    assert done.training["resumed_at"] == 24
    assert done.training["curve"] == trained["curve"]
    assert not Path("again.parquet.training").exists()
    again = aq.load("again.parquet", packed=True)
    assert whole.keys() == again.keys()
    for name, value in whole.items():
        for before, after in zip(jax.tree.leaves(value), jax.tree.leaves(again[name]), strict=True):
            np.testing.assert_array_equal(before, after)
    other = aq.convert(load_config("c.toml", ("output=other.parquet", "calibration.seed=1"))).training
    assert other is not None
    assert other["curve"] != trained["curve"]


@pytest.mark.slow
def test_scales_norms_and_biases_alone_make_it_better(monkeypatch: pytest.MonkeyPatch) -> None:
    text = CONFIG.replace("int2", "tcq2").replace("group_size = 16\nsymmetric = false", "symmetric = true")
    Path("rows.toml").write_text(text)
    monkeypatch.setattr("aq_jax.calibration.distill.init_latent", None)  # is not called
    found = aq.convert(load_config("rows.toml", ("output=rows.parquet",))).training
    assert found is not None
    assert found["cosine"] > found["cosine_before"] + 0.002
    _, held, _ = draw_texts(CalibrationConfig("text.txt", 40), TrainingRequest(TrainingConfig(held_out=30), Path()))
    assert cosines("rows.parquet", held.lines).mean() == pytest.approx(found["cosine"], abs=2e-5)


@pytest.mark.slow
def test_it_ends_sooner_when_nothing_gets_better_and_keeps_the_best(trained: dict[str, Any]) -> None:
    sets = ("output=worse.parquet", "train.learning_rate=1", "train.patience=2", "train.steps=100")
    config = load_config("c.toml", sets)
    found = aq.convert(config).training
    assert found is not None
    assert found["stopped"] == "2 evaluations without an improvement, and then its last step"
    assert found["steps"] < 50
    assert found["cosine"] >= found["cosine_before"] == trained["cosine_before"]
    _, held, _ = draw_texts(config.calibration, TrainingRequest(config.train or TrainingConfig(), Path()))
    assert cosines("worse.parquet", held.lines).mean() == pytest.approx(found["cosine"], abs=2e-5)


@pytest.mark.slow
def test_it_stops_in_time(run: Any) -> None:
    sets = ("output=short.parquet", "train.minutes=0.01", "train.steps=1000000")
    status, out, err = run("convert", "c.toml", *(a for each in sets for a in ("--set", each)))
    assert (status, err) == (0, "")
    assert "until its 0.01 minutes; cosine 0." in out
    found = inspect_table("short.parquet").config["training"]
    assert 0.6 <= found["seconds"] < 30
    assert 0 < found["steps"] < 1000000


def test_a_training_of_something_else_is_not_gone_on_with(run: Any, tmp_path: Path) -> None:
    with Checkpoints(Path("left.parquet.training"), {"text": "another"}) as store:
        store.save(1, [np.ones(3)], {})
    status, out, err = run("convert", "c.toml", "--set", "output=left.parquet")
    assert (status, out) == (2, "")
    assert "left.parquet.training: holds the training {'text': 'another'}" in err
    assert "remove the folder to start over" in err
    assert not Path("left.parquet").exists()


STATE = {"w": np.arange(1000.0, dtype=np.float32), "codes": np.arange(6, dtype=np.uint8).reshape(2, 3)}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Checkpoints]:
    with Checkpoints(tmp_path / "run", {"seed": 0}) as found:
        yield found


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # what Orbax leaves of a failed load
def test_a_damaged_checkpoint_is_refused(store: Checkpoints) -> None:
    assert store.load(STATE) is None
    store.save(1, STATE, {})
    store.save(2, STATE, {"seconds": 1.5})
    step, found, notes = store.load(STATE) or (0, STATE, {})
    assert (step, notes) == (2, {"seconds": 1.5})
    np.testing.assert_array_equal(found["w"], STATE["w"])
    good = {file: file.read_bytes() for file in store.folder.rglob("*") if file.is_file() and file.name != "lock"}
    data = max(good, key=lambda file: len(good[file]))
    caught = []
    for at in range(8, len(good[data]), 97):
        flipped = bytearray(good[data])
        flipped[at] ^= 4
        data.write_bytes(flipped)
        caught.append(refused(store))
    assert sum(caught) > len(caught) / 2  # others change nothing that is read
    data.write_bytes(good[data])
    for file, content in good.items():
        for end in (0, len(content) // 2):
            file.write_bytes(content[:end])
            refused(store)
        file.write_bytes(content)
    assert not refused(store)
    next(store.folder.rglob("_CHECKPOINT_METADATA")).write_text("{}")
    assert refused(store)
    gc.collect()  # here, not in another test


def refused(store: Checkpoints) -> bool:
    """Whether loading ends in the one error that it may end in; what is loaded is right."""
    try:
        found = store.load(STATE)
    except IntegrityError as error:
        assert "remove the folder to start over" in str(error)  # noqa: PT017
        return True
    if found is not None:
        np.testing.assert_array_equal(found[1]["w"], STATE["w"])
        np.testing.assert_array_equal(found[1]["codes"], STATE["codes"])
    return False


def test_a_folder_belongs_to_one_training(store: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another process trains here"):
        Checkpoints(store.folder, {"seed": 0}).__enter__()
    (tmp_path / "own").mkdir()
    with pytest.raises(ConfigError, match="already exists and holds no training"):
        Checkpoints(tmp_path / "own", {}).__enter__()
    with Checkpoints(tmp_path / "empty", {}):
        pass
    assert not (tmp_path / "empty").exists()


def test_a_checkpoint_that_cannot_be_written_does_not_end_a_training(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise ValueError("RESOURCE_EXHAUSTED: no space left")

    monkeypatch.setattr("orbax.checkpoint.v1.training.Checkpointer.save", full)
    sets = ("output=full.parquet", "train.steps=4", "calibration.max_tokens=20")
    status, out, err = run("convert", "c.toml", *(a for each in sets for a in ("--set", each)))
    assert (status, err) == (0, "")
    assert "the checkpoint of step 4 cannot be written: RESOURCE_EXHAUSTED: no space left" in out
    assert "calibration.max_tokens = 20: the model takes 16 tokens; lines are cut there" in out
    made = inspect_table("full.parquet").config
    assert (made["training"]["steps"], made["calibration"]["max_tokens"], made["calibration"]["joined"]) == (
        4,
        20,
        False,
    )
    assert not Path("full.parquet.training").exists()


@pytest.mark.parametrize("output", ["model.pq", "model"])
def test_what_could_not_be_written_is_said_before_anything_is_run(run: Any, output: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aq_jax.calibration.solve.solve_model", None)  # is not called
        status, out, err = run("convert", "c.toml", "--set", f"output={output}")
    assert (status, out) == (2, "")
    assert output in err
    assert not Path(f"{output}.training").exists()


@pytest.mark.parametrize("count", [2, 9, 90, 130, 400])
def test_lines_to_judge_by_are_in_nothing_else(tmp_path: Path, count: int) -> None:
    (tmp_path / "t.txt").write_text("\n".join(f"line {n}" for n in range(count)))
    calibration = CalibrationConfig(str(tmp_path / "t.txt"), sentences=80)
    calibrated, held, taught = (
        set(text.lines) for text in draw_texts(calibration, TrainingRequest(TrainingConfig(), Path()))
    )
    assert held
    assert taught >= calibrated
    assert not held & taught
    assert len(held | taught) == count
    # Those on which a plan was made, and is judged, come after those of the calibration.
    drawn_lines = read_text(dataclasses.replace(calibration, sentences=1000)).lines
    reserved = set(drawn_lines[80:110])
    again = [set(text.lines) for text in draw_texts(calibration, TrainingRequest(TrainingConfig(), Path(), 30))]
    assert not any(lines & reserved for lines in again)
    assert len(again[1] | again[2]) == count - len(reserved)


@pytest.mark.slow
def test_a_weight_that_cannot_be_solved_is_trained_around_as_it_will_be_stored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    solve = gptq.gptq_tiled

    def unsound(w: Any, *args: Any, **more: Any) -> Any:
        q = solve(w, *args, **more)
        return dataclasses.replace(q, scale=np.full_like(q.scale, 2.0**127)) if w.shape == (32, 32) else q

    monkeypatch.setattr(gptq, "gptq_tiled", unsound)
    done = aq.convert(config := load_config("c.toml", ("output=fallback.parquet", "train.steps=4")))
    assert any("need scales that float32 cannot hold; quantized by mse" in note for note in done.notes)
    assert done.training is not None
    _, held, _ = draw_texts(config.calibration, TrainingRequest(config.train or TrainingConfig(), Path()))
    assert cosines("fallback.parquet", held.lines).mean() == pytest.approx(done.training["cosine"], abs=2e-5)


def test_batches_have_few_shapes_and_every_text_is_in_every_epoch() -> None:
    rng = np.random.default_rng(0)
    ids = [list(map(int, rng.integers(5, 99, n))) for n in rng.integers(3, 60, 500)]
    texts = ShuffledBatches(ids, 256, seed=3)
    count = next(n for n in range(1, 999) if sum((texts.batch(i)[1] > 0).sum() for i in range(n)) == len(ids))
    for epoch in range(2):
        batches = [texts.batch(epoch * count + i) for i in range(count)]
        seen = [list(row[:n]) for padded, lengths in batches for row, n in zip(padded, lengths, strict=True) if n]
        assert sorted(seen) == sorted(ids)
        assert len({padded.shape for padded, _ in batches}) <= training.BATCH_SHAPES
        assert all(padded.size <= 256 for padded, _ in batches)
    # Any batch at any time; another seed or epoch has another order.
    np.testing.assert_array_equal(texts.batch(7)[0], ShuffledBatches(ids, 256, seed=3).batch(7)[0])
    assert any((texts.batch(i)[0].shape != ShuffledBatches(ids, 256, seed=4).batch(i)[0].shape) for i in range(count))


def test_the_loss_is_zero_where_nothing_differs_and_empty_texts_do_not_count() -> None:
    rng = np.random.default_rng(0)
    goal = [jnp.asarray(rng.normal(size=(4, 5, 8)), jnp.float32) for _ in range(2)]
    lengths = jnp.array([5, 3, 1, 0])
    assert abs(float(distillation_loss(goal, goal, lengths, SentenceSettings()))) < 1e-6
    masked = [h.at[3].add(7.0).at[2, 1:].add(7.0) for h in goal]
    assert abs(float(distillation_loss(masked, goal, lengths, SentenceSettings()))) < 1e-6
    moved = [h.at[0].add(0.1) for h in goal]
    e, g = (np.asarray(h[-1]) for h in (moved, goal))
    mask = np.arange(5) < np.asarray(lengths)[:, None]
    unit = [np.stack([(x[i][mask[i]]).mean(0) for i in range(3)]) for x in (e, g)]
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in unit]
    hidden = np.mean(
        [
            (((np.asarray(a) - np.asarray(b)) * mask[..., None]) ** 2).sum()
            / ((np.asarray(b) * mask[..., None]) ** 2).sum()
            for a, b in zip(moved, goal, strict=True)
        ]
    )
    among = ((unit[0] @ unit[0].T - unit[1] @ unit[1].T) ** 2).mean()
    wanted = (1 - (unit[0] * unit[1]).sum(1)).mean() + hidden + among
    assert float(distillation_loss(moved, goal, lengths, SentenceSettings())) == pytest.approx(wanted, rel=1e-4)


# What is set -> the error.
REFUSED = [
    ("train.steps=0", "steps = 0: wanted 1 to"),
    ("train.minutes=-1", "minutes = -1: wanted 0 to"),
    ("train.minutes=nan", "minutes = nan: wanted 0 to"),
    ("train.learning_rate=2", "learning_rate = 2: wanted 1e-06 to 1"),
    ("train.patience=21", "patience = 21: wanted 1 to 20"),
    ("train.step=1", "unknown key 'step'; known are steps, minutes"),
    ("train=3", "wanted a table of keys, found 3"),
    ("quantization.solver=mse", "[train]: found no tensor whose weights are trained; wanted quantization.solver"),
    ("calibration.text=one.txt", "lines left for the training: 1; wanted two or more, to train on and to judge by"),
]


@pytest.mark.parametrize(("assignment", "text"), REFUSED, ids=[a for a, _ in REFUSED])
def test_what_cannot_be_is_refused(run: Any, assignment: str, text: str) -> None:
    Path("one.txt").write_text("the cat\n\nthe cat\n")
    status, out, err = run("convert", "c.toml", "--set", assignment, "--set", "output=refused.parquet")
    assert (status, out) == (2, "")
    assert err.startswith("aq-jax: ")
    assert text in err
    assert not Path("refused.parquet").exists()


def test_a_language_model_is_refused(run: Any, tmp_path: Path) -> None:
    aq.dequantize_file(small_llama.make(tmp_path), tmp_path / "hf")
    sets = (f"source={tmp_path}/hf", f"output={tmp_path}/m.parquet", "calibration.text=text.txt")
    status, out, err = run("convert", "c.toml", *(a for each in sets for a in ("--set", each)))
    assert (status, out) == (2, "")
    assert "[train]: the model is a llama; wanted an encoder: bert" in err


def test_codes_that_it_cannot_train_are_refused_before_anything_is_run(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aq_jax.calibration.row_scales.is_trainable", lambda code: code.uniform)
    monkeypatch.setattr("aq_jax.calibration.solve.calibrate", None)  # is not called
    status, out, err = run("convert", "c.toml", "--set", "output=refused.parquet")
    assert (status, out) == (2, "")
    assert ".weight: training needs evenly spaced levels, or one scale a row, which tcq2 does not have" in err
    assert not Path("refused.parquet").exists()


def test_training_needs_calibrated_weights() -> None:
    with pytest.raises(ConfigError, match=r"\[train\]: found no \[quantization\]"):
        aq.ConversionConfig("a", "b.parquet", train=TrainingConfig())
