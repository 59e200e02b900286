"""The benchmark of quality on a CPU: its rows, its models, and that it runs to the table."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from benchmarks import quality, quality_table
from benchmarks.quality_models import NAMES, Shape, dense_layers, matching_window
from benchmarks.quality_rows import Mixture, example_lengths, training_rows
from models.config import HybridConfig
from s2_jax import local_stride, token_window
from train.prepare import PrepareConfig, prepare
from train.shards import open_shards

TINY = (
    "--platform cpu --steps 2 --batch-size 2 --length 256 --shape.num-layers 2 --shape.width 32"
    " --shape.num-heads 2 --shape.mlp-width 32 --shape.dtype float32 --shape.block-size 16"
    " --shape.local-blocks 1 --shape.vert-stride 2 --shape.dense-every 2 --mixture.share 0.5"
    " --mixture.shortest 200 --evaluation.lengths 256 300 --evaluation.batches 1"
    " --evaluation.batch-size 2 --evaluation.depths 2 --evaluation.samples 1 --log-every 1"
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Documents of a thousand words, one in twenty held out."""
    folder = tmp_path_factory.mktemp("quality")
    (folder / "text").mkdir()
    rng = np.random.default_rng(0)
    for number in range(40):
        words = rng.choice(["all", "work", "and", "no", "play"], 1000)
        (folder / "text" / f"{number}.txt").write_text(" ".join(words))
    prepare(PrepareConfig(source=str(folder / "text"), out=folder / "shards"))
    return folder / "shards"


@pytest.fixture
def run(shards, tmp_path):
    """The result of a line of options, and where it is."""

    def run(name, line):
        out = tmp_path / name
        with jax.numpy_dtype_promotion("standard"):  # Optax relies on it
            quality.main([*f"{TINY} {line}".split(), "--data", str(shards), "--out", str(out)])
        return json.loads(out.read_text()), out

    return run


# Rows.


def rows_of(shards, seed=0, mixture=None):
    return training_rows(
        open_shards(shards), steps=4, batch_size=3, length=511, seed=seed,
        mixture=mixture or Mixture(share=0.5, shortest=200, growing=0.5),
    )  # fmt: skip


def test_rows_depend_on_the_seed_alone(shards):
    one, same, other = rows_of(shards), rows_of(shards), rows_of(shards, seed=1)
    for name, values in one.items():
        np.testing.assert_array_equal(values, same[name])
    assert (one["tokens"] != other["tokens"]).any()


def test_retrieval_rows_hold_their_answers(shards):
    rows = rows_of(shards, mixture=Mixture(share=1.0, shortest=200, growing=0.0))
    examples = 0
    for tokens, ids in zip(rows["tokens"].reshape(-1, 512), rows["segment_ids"].reshape(-1, 512)):
        for number in range(1, ids.max() + 1):
            text = bytes(tokens[ids == number].astype(np.uint8).tolist()).decode()
            assert text.count(text[-8:]) == 2  # a space and seven digits: hidden, and answered
            assert text[-7:].isdigit()
            examples += 1
    assert examples > 12  # rows


def test_short_examples_come_with_copies(shards):
    mixture = Mixture(share=1.0, shortest=100, growing=1.0, copies=0.5)
    rows = rows_of(shards, mixture=mixture)
    texts = [
        tokens[ids == number]
        for tokens, ids in zip(*(rows[name].reshape(-1, 512) for name in rows))
        for number in range(1, ids.max() + 1)
    ]
    halves = [-(-len(text) // 2) for text in texts]
    copies = [bool((a[n:] == a[: len(a) - n]).all()) for a, n in zip(texts, halves)]
    asked = [bytes(a[-7:].astype(np.uint8).tolist()).isdigit() for a in texts]
    assert 0.3 < np.mean(copies) < 0.7
    assert [not copy for copy in copies] == asked


def test_text_rows_hold_no_question(shards):
    rows = rows_of(shards, mixture=Mixture(share=0.0))
    assert (rows["segment_ids"] == 1).all()
    assert b"pass key" not in rows["tokens"].astype(np.uint8).tobytes()


def test_examples_grow_to_whole_rows():
    mixture = Mixture(shortest=128, growing=0.5, whole=0.25)
    assert [mixture.longest(done, 2048) for done in (0, 0.25, 0.5, 1)] == [128, 512, 2048, 2048]
    assert Mixture(growing=0).longest(0, 2048) == 2048
    rng = np.random.default_rng(0)
    early = [example_lengths(2049, 128, mixture, rng) for _ in range(100)]
    late = [example_lengths(2049, 2049, mixture, rng) for _ in range(1000)]
    assert {tuple(lengths) for lengths in early} == {(*[128] * 15, 129)}
    assert {sum(lengths) for lengths in late} == {2049}
    assert min(map(min, late)) >= 128
    assert 200 < sum(len(lengths) == 1 for lengths in late) < 400


# Models.


def test_models_differ_in_attention_alone():
    shape = Shape()
    configs = {name: shape.config(name, vocab_size=8192, length=2048) for name in NAMES}
    alike = {dataclasses.replace(c, attention=HybridConfig()) for c in configs.values()}
    assert len(alike) == 1
    assert len({config.attention for config in configs.values()}) == len(NAMES)
    assert {name: dense_layers(config) for name, config in configs.items()} == {
        "dense": [1, 2, 3, 4, 5, 6], "hybrid": [4], "s2": [], "homogeneous": [], "window": [],
    }  # fmt: skip
    with pytest.raises(ValueError, match="dense_first=0 and dense_every=0 must make some"):
        Shape(dense_every=0).config("hybrid", vocab_size=256, length=64)


def test_the_window_sees_as_much_as_the_pattern():
    heads, length = 4, 256
    pattern = local_stride(2, 4, block_size=16)
    at = np.arange(length)

    def seen(pattern, window):
        blocks = pattern.block_mask_at(num_heads=heads, q_blocks=16, kv_blocks=16)
        tokens = blocks.repeat(16, axis=1).repeat(16, axis=2) & (at[:, None] >= at)
        return (tokens & (at[:, None] - at < window)).sum() / heads

    window = matching_window(pattern, heads, length)
    assert 32 < window < 256
    wanted = seen(pattern, length)
    assert seen(token_window(window, block_size=16), window) == pytest.approx(wanted, abs=length)


def test_models_begin_with_the_same_parameters(shards):
    settings = quality.Settings(shape=Shape(2, 32, 2, 32, dense_every=2), length=256)
    with jax.numpy_dtype_promotion("standard"):
        one, other = (
            quality.make_state(
                settings.shape.config(name, vocab_size=256, length=256),
                quality.make_optimizer(settings.optimizer, 2),
            )(jax.random.key(0)).params
            for name in ("dense", "window")
        )
    jax.tree.map(np.testing.assert_array_equal, one, other)


# Results.


def test_results_are_put_together(run, capsys, tmp_path):
    first, one = run("a.json", "--models dense --seeds 0 1")
    second, other = run("b.json", "--models s2")
    assert not first["failed"]
    assert [(row["model"], row["seed"]) for row in first["rows"]] == [("dense", 0), ("dense", 1)]
    for row in first["rows"] + second["rows"]:
        assert row["error"] is None
        assert [step for step, _ in row["curve"]] == [1, 2]
        assert 4 < row["loss"] < math.log(256) + 1
        assert [(e["length"], e["rope_base"]) for e in row["evaluations"]] == [
            (256, 1e4), (300, 1e4), (300, 4e4),
        ]  # fmt: skip
    assert "less than 90%: the comparison says nothing" in capsys.readouterr().out
    quality_table.main([str(one), str(other), "--plots", str(tmp_path / "plots")])
    printed = capsys.readouterr().out
    lines = [line.split()[:3] for line in printed.splitlines()[1:3]]
    assert lines == [["256", "dense", "2"], ["256", "s2", "1"]]
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        "loss.png", "passkey.png", "recall.png",
    }  # fmt: skip
    with pytest.raises(SystemExit, match="more than one result of dense, seed 0"):
        quality_table.main([str(one), str(one)])
    assert quality_table.merge([first, second])["notes"] == []
    elsewhere = quality_table.merge([first, second | {"commit": "other"}])
    assert elsewhere["notes"] == ["results of several commit are put together"]
    with pytest.raises(ValueError, match="the results differ in steps"):
        quality_table.merge([first, second | {"settings": second["settings"] | {"steps": 3}}])


def test_questions_that_do_not_fit_are_found_before_training(run):
    with pytest.raises(ValueError, match="length=20 must be from"):
        run("a.json", "--models dense --evaluation.lengths 256 20")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "wrong.json is not JSON"),
        ("[]", "wrong.json is not a result of benchmarks.quality"),
        ('{"rows": []}', "wrong.json is not a result of benchmarks.quality"),
    ],
)
def test_files_that_are_no_results(text, message, tmp_path):
    (tmp_path / "wrong.json").write_text(text)
    with pytest.raises(SystemExit, match=message):
        quality_table.main([str(tmp_path / "wrong.json")])


def test_what_passes_is_said():
    one = {"length": 8, "rope_base": 1e4, "passkey": {"accuracy": [0.9, 1.0]}}
    row = {"model": "dense", "seed": 0, "error": None, "evaluations": [one]}
    data = {"settings": {"length": 8, "shape": {"rope_base": 1e4}}, "rows": [row]}
    assert quality_table.verdict(data).endswith(
        "95% of the passkeys at the trained length of 8 tokens, at least 90%: the comparison counts"
    )
    none = quality_table.verdict(data | {"rows": []})
    assert none.startswith("no dense model at 8 tokens: the comparison says nothing")


def test_a_loss_that_is_not_finite_ends_a_cell():
    curve, waiting = [(3, 1.0)], [np.float32(1), np.float32(np.nan), np.float32(2)]
    with pytest.raises(FloatingPointError, match="loss=nan at step=5"):
        quality._point(curve, waiting, 2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seeds": ()}, r"seeds=\(\) must name at least one, each once"),
        ({"seeds": (1, 1)}, r"seeds=\(1, 1\) must name at least one, each once"),
        ({"seeds": (-1,)}, r"seeds=\(-1,\) must not be negative"),
        ({"data_seed": -1}, "data_seed=-1 must not be negative"),
        ({"evaluation": quality.Evaluation(long_rope_bases=(0.5,))}, "rope_base=0.5"),
        ({"steps": 0}, "steps=0 must be positive"),
        ({"length": 32}, "shortest=48 must be at most length=32"),
    ],
    ids=str,
)
def test_settings_that_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        quality.Settings(**wrong)
