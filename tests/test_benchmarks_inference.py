"""The benchmarks of decoding, inference and training without a GPU: that they run, and their text.

What they measure on a CPU means nothing.
"""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import s2_jax
from benchmarks import (
    decode,
    decode_cells,
    decode_table,
    filled_caches,
    inference,
    inference_cells,
    jax_timing,
    report,
    sdpa,
    serving,
    throughput,
    timing,
)
from benchmarks.programs import Program, compile_all
from benchmarks.record import Record
from models.presets import PRESETS
from s2_jax import ContiguousCache, EvictingCache

PATTERN = "--local-blocks 1 --vert-stride 2 --block-size 16"
COMMON = f"{PATTERN} --platform cpu --rounds 1"
DECODE = f"{COMMON} --length 64 --heads 4 --kv-heads 2 --head-dim 16 --copy-bytes 4096"
INFERENCE = f"{COMMON} --preset tiny --vocab-size 32 --copy-bytes 4096 --steps 2"
THROUGHPUT = f"{COMMON} --presets tiny --vocab-size 32 --lengths 32 --tokens 64"


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """A benchmark's result and what it printed, from a line of options; few calls, no profiler."""
    tiny = dataclasses.replace(
        PRESETS["demo"], num_layers=2, width=32, num_heads=2, num_kv_heads=2, mlp_width=32
    )
    monkeypatch.setitem(PRESETS, "tiny", tiny)
    monkeypatch.setattr(timing, "GROUP_SECONDS", 1e-6)
    monkeypatch.setattr(jax_timing, "traced", lambda run, calls: TRACE)

    def run(module, line):
        out = tmp_path / "out.json"
        module.main([*line.split(), "--out", str(out)])
        result = json.loads(out.read_text())
        assert not result["failed"]
        assert {"gpu", "device_kind", "versions", "commit", "settings", "seconds"} <= set(result)
        return result, capsys.readouterr().out

    return run


TRACE = {"seconds": 20e-6, "kernels": {"s2_attention_decode": 12e-6, "fusion": 3e-6}}


# Decoding.


def test_decode_times_every_cache_and_names_what_cannot_run(run):
    result, printed = run(decode, f"{DECODE} --batches 1 --launchers reference")
    rows = {(row["cache"], row["way"]): row for row in result["rows"]}
    assert set(rows) == {
        ("contiguous-dense", "reference"), ("contiguous-dense", "jax cuDNN"),
        ("contiguous-s2", "reference"), ("evicting-s2", "reference"),
    }  # fmt: skip
    assert "RuntimeError" in rows["contiguous-dense", "jax cuDNN"]["error"]
    row = rows["evicting-s2", "reference"]
    assert row["error"] is None
    assert (row["us"], row["kernel_us"], row["busy_us"]) == pytest.approx((20, 12, 15))
    assert row["decode_us"] - row["kernel_us"] == pytest.approx(row["combine_us"])
    assert row["lists_us"] == row["append_us"] == pytest.approx(20)
    assert row["share"] == pytest.approx(row["bound_us"] / row["us"])
    assert row["over_us"] == pytest.approx(row["us"] - row["bound_us"])
    assert row["temp_bytes"] >= 0 < row["needed_bytes"]
    assert row["copies"] == 16
    # Dense: 4 blocks of 16 tokens, keys and values, 16 numbers of 2 bytes, 2 heads.
    assert rows["contiguous-dense", "reference"]["visible_bytes"] == 4 * 16 * 2 * 16 * 2 * 2
    # One head sees blocks 1 and 3, the other one 0, 2 and 3.
    assert row["visible_bytes"] == 5 * 16 * 2 * 16 * 2
    assert rows["contiguous-s2", "reference"]["visible_bytes"] == row["visible_bytes"]
    assert result["bandwidth"]["copy_gb_s"] > 0 < result["bandwidth"]["read_gb_s"]
    assert result["peers"]["torch"] in ("not installed: torch", "ok")
    assert "within 15 us of the bound, 1 x 4/2 reference: yes" in printed


def test_a_sweep_of_tiles_starts_with_the_heuristics(run, monkeypatch):
    for name, some in {"PROGRAMS": (4,), "KEYS": (16,), "WARPS": (4,), "STAGES": (2,)}.items():
        monkeypatch.setattr(decode_cells, f"_{name}", some)
    line = f"{DECODE} --batches 2 --launchers interpret --caches evicting-s2 --sweep"
    result, printed = run(decode, line)
    tiles = [row["tile"] for row in result["sweep"]]
    assert tiles[0] == {"keys": 64, "programs": 256, "num_warps": 2, "num_stages": 3}
    assert {"keys": 16, "programs": 4, "num_warps": 2, "num_stages": 3} in tiles
    assert tiles[-1]["num_stages"] == 2
    assert all(row["error"] is None for row in result["sweep"])
    assert "tiles, 2 x 4/2 evicting-s2; the heuristic's: 12.0 us, keys 64" in printed


def test_batches_of_contiguous_caches_are_cut_to_what_fits():
    settings = decode.Settings()
    shapes = settings.shapes(80 << 30)
    found = {(s.kind, s.kv_heads, s.batch) for s in shapes}
    assert found == {
        *(("evicting", n, batch) for n in (8, 32) for batch in (1, 32, 64)),
        *(("contiguous", 8, batch) for batch in (1, 32, 64)),
        *(("contiguous", 32, batch) for batch in (1, 16)),
    }
    sizes = [shape.full_bytes for shape in shapes if shape.kind == "contiguous"]
    assert sizes == sorted(sizes, reverse=True)


def test_the_answers_of_a_result():
    row = {"cache": "evicting-s2", "heads": 32, "kv_heads": 8, "way": "triton", "kernel_share": 0.9}
    rows = [
        row | {"batch": 32, "us": 100.0, "share": 0.79},
        row | {"batch": 1, "us": 30.0, "over_us": 14.0, "kernel_us": 20.0, "bound_us": 16.0},
        row | {"batch": 64, "us": None},
    ]
    assert list(decode_table.answers({"rows": rows})) == [
        "80% of the copy's speed, 32 x 32/8 triton: no, 79% (the kernel alone: 90%)",
        "within 15 us of the bound, 1 x 32/8 triton: yes, 14.0 us (the kernel alone: 4.00)",
    ]


@pytest.mark.parametrize("kind", [ContiguousCache, EvictingCache])
def test_a_filled_cache_is_one_that_tokens_came_to(kind):
    pattern = s2_jax.local_stride(2, 3, block_size=16)

    def make():
        sizes = {"batch": 2, "max_length": 96, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
        return kind.create(pattern, dtype="float32", **sizes)

    table = filled_caches.table_after(make, 70)
    query, key = (jnp.ones((2, 70, n, 8)) for n in (4, 2))
    attend = functools.partial(s2_jax.cached_attention, first=True, implementation="reference")
    _, cache = jax.jit(attend)(query, key, key, make())
    jax.tree.map(np.testing.assert_array_equal, table, cache.table)


# PyTorch's side.


def test_backends_that_fail_lose_themselves_alone(tmp_path, monkeypatch):
    worker = dataclasses.replace(sdpa.WORKER, packages=(), module="tests.fake_sdpa")
    monkeypatch.setattr(sdpa, "WORKER", worker)
    shape = sdpa.SdpaCase("FLASH_ATTENTION", 1, 4, 2, 16, 1, 64)
    status, found = sdpa.measure_sdpa([shape], sdpa.BACKENDS, 2, tmp_path / "log")
    assert status == "ok"
    assert [one["error"] for one in found.values()] == [
        None, "prepare: exit code 11", "not supported: grouped heads",
    ]  # fmt: skip
    assert found[shape]["ms"] == pytest.approx(2)


def test_without_pytorch_there_is_nothing_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sdpa, "WORKER", dataclasses.replace(sdpa.WORKER, packages=("no_such",)))
    shape = sdpa.SdpaCase("FLASH_ATTENTION", 1, 4, 2, 16, 1, 64)
    found = sdpa.measure_sdpa([shape], sdpa.BACKENDS, 2, tmp_path / "log")
    assert found == ("not installed: torch", {})


# Inference.


def test_inference_times_prompts_and_generation(run, monkeypatch):
    fa2 = timing.summary([{"seconds": 1.0, "clock": "cuda-events"}]) | {"error": None}
    row = {"part": "attention", "batch": 1, "way": "torch FA2", "length": 64}
    monkeypatch.setattr(inference, "fa2_rows", lambda *_: ("ok", [row | fa2]))
    line = "--models s2 dense --lengths 16 64 --decode-length 64 --batches 1 --memory-gb 4.99e-5"
    result, printed = run(inference, f"{INFERENCE} {line} --dense-implementation kernels")
    rows = {(r["part"], r.get("model"), r["way"], r["length"]): r for r in result["rows"]}
    ways = ("torch FA2", "dense", "dense, no lengths", "s2", "s2, no lengths")
    assert {key[2] for key in rows if key[0] == "attention"} == set(ways)
    sparse, dense = (rows["prefill", name, "model", 64] for name in ("s2", "dense"))
    assert sparse["with_fa2_ms"] == sparse["ms"]
    alone = rows["attention", None, "dense", 64]["ms"]
    assert dense["with_fa2_ms"] == pytest.approx(dense["ms"] + 2 * (1000 - alone))
    assert sparse["dense_over_it"] == pytest.approx(dense["ms"] / sparse["ms"])
    # What does not fit 49.9 KB: the cache beside a long prompt, and a dense one of 64 tokens.
    assert {r["length"]: r["cached"] for r in result["rows"] if r["part"] == "prefill"} == {
        16: True, 64: False,
    }  # fmt: skip
    assert {key[1::2]: r["error"] for key, r in rows.items() if key[0] == "decode"} == {
        ("s2", 64): None, ("dense", 64): "does not fit: 0.0 GB of 0.0", ("dense", 48): None,
    }  # fmt: skip
    row = rows["decode", "s2", "model", 64]
    assert row["tokens_s"] == pytest.approx(1e3 / row["ms"])
    assert row["share"] == pytest.approx(row["bound_ms"] / row["ms"])
    assert row["compile_s"] > 0 < row["needed_bytes"]
    assert row["kernels_ms"]["s2_attention_decode"] == pytest.approx(12e-3 / 2)  # of two steps
    assert "decode dense model, 1 x 64 tokens: does not fit" in printed


def test_what_a_step_reads():
    config = dataclasses.replace(
        inference.Settings(block_size=16, local_blocks=1, vert_stride=2).config("dense"),
        num_layers=1, width=32, num_heads=2, num_kv_heads=2, mlp_width=48, vocab_size=40,
        dense_implementation=None,
    )  # fmt: skip
    served = serving.Served.of(config)
    norms, layer, head = 3 * 32, 4 * 32 * 32 + 3 * 32 * 48, 32 * 40
    assert served.weight_bytes == 4 * norms + 2 * (layer + 2 * head)
    cache = filled_caches.filled_model(config, 2, 64, 30)
    assert cache.length.tolist() == [30, 30]
    seen = 2 * 32 * 2 * 32 * 2  # sequences, tokens in two blocks, keys and values, width, bytes
    assert served.read_bytes(cache) == 4 * norms + 2 * (layer + head + 2 * 32) + seen


def test_a_7b_model_and_what_of_it_fits_80_gb():
    settings = inference.Settings()
    asked = inference_cells.Asked((32768, 131072), 131072, (1, 4), largest=True)
    served = serving.Served.of(settings.config("s2"))
    assert {str(x.dtype) for x in jax.tree.leaves(served.shapes) if x.ndim > 1} == {"bfloat16"}
    cells = {
        name: inference_cells.plan(
            dataclasses.replace(served, config=settings.config(name)), asked, int(79e9)
        )
        for name in ("s2", "dense")
    }
    batches = [c.batch for c in cells["s2"] if c.part == "decode" and c.why_not is None]
    assert batches == [1, 4, 13]
    assert [c.cached for c in cells["dense"] if c.part == "prefill"] == [True, False]
    decoded = [c for c in cells["dense"] if c.part == "decode"]
    assert [c.why_not for c in decoded[:2]] == [
        "does not fit: 82.2 GB of 79.0", "does not fit: 288.4 GB of 79.0",
    ]  # fmt: skip
    assert (decoded[2].batch, decoded[2].length) == (1, 114688)


# Training.


def test_throughput_compares_with_the_dense_model(run):
    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it
        result, printed = run(
            throughput, f"{THROUGHPUT} --models dense s2 --dense-implementation kernels"
        )
    dense, sparse = result["rows"]
    assert (dense["batch"], dense["model"], sparse["model"]) == (2, "dense", "s2")
    assert sparse["dense_over_it"] == pytest.approx(dense["ms"] / sparse["ms"])
    for row in result["rows"]:
        assert row["tokens_s"] == pytest.approx(64e3 / row["ms"])
        assert row["tflops"] > 0
        assert row["mfu"] is None
        assert row["needed_bytes"] > row["temp_bytes"] > 0
    assert f"{sparse['dense_over_it']:.2f}x" in printed


def test_a_cell_that_cannot_run_is_recorded(run):
    result, printed = run(throughput, f"{THROUGHPUT} --models dense")
    assert 'implementation="cudnn" needs an NVIDIA GPU' in result["rows"][0]["error"]
    assert "tiny dense, 2 x 32: ValueError" in printed


def test_long_rows_and_large_models_recompute():
    settings = throughput.Settings()
    remat = {
        (preset, length): settings.config(preset, length, "s2").remat
        for preset in settings.presets for length in settings.lengths
    }  # fmt: skip
    assert {key for key, kind in remat.items() if kind == "attention"} == {
        ("125m", 131072), ("350m", 131072), *(("1.3b", n) for n in settings.lengths),
    }  # fmt: skip
    full = dataclasses.replace(settings, remat="full")
    assert full.config("125m", 8192, "s2").remat == "full"


# What they share.


def test_programs_that_fail_to_compile_say_why():
    def lower(fails):
        if fails:
            raise MemoryError("RESOURCE_EXHAUSTED: no room")
        return jax.jit(lambda x: x + 1).lower(jnp.ones(4))

    found = compile_all({name: lambda name=name: lower(name == "b") for name in "abc"})
    assert list(found) == ["a", "b", "c"]
    assert found["b"] == "MemoryError: RESOURCE_EXHAUSTED: no room"
    assert isinstance(found["c"], Program)
    assert found["c"].facts["compile_s"] > 0


def test_one_that_fails_in_a_round_leaves_the_others():
    def fails(count):
        raise MemoryError("RESOURCE_EXHAUSTED: no room")

    found = jax_timing.in_turn({"bad": fails, "good": lambda count: None}, 2)
    assert found["bad"]["error"] == "MemoryError: RESOURCE_EXHAUSTED: no room"
    assert found["bad"]["ms"] is None
    assert found["good"]["error"] is None
    assert found["good"]["rounds"] == 2


def test_what_xla_is_told_is_noted(tmp_path, monkeypatch):
    flag = "--xla_gpu_enable_latency_hiding_scheduler=true"
    monkeypatch.setenv("XLA_FLAGS", flag)
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    record = Record(throughput.Settings(platform="cpu", out=tmp_path / "out.json"), 0.0)
    assert record.data["flags"] == {"NCCL_DEBUG": "WARN", "XLA_FLAGS": flag}
    assert f"XLA_FLAGS={flag}" in record.closing()


def test_a_spent_budget_is_noted(tmp_path, capsys):
    settings = throughput.Settings(platform="cpu", out=tmp_path / "out.json", budget_s=1)
    record = Record(settings, -math.inf)
    assert record.spent("all of it")
    assert json.loads(settings.out.read_text())["not_measured"] == ["all of it"]
    assert "not measured, the budget was spent: all of it" in record.closing()


@pytest.mark.parametrize("module", [decode, inference, throughput])
def test_without_a_gpu_they_say_so(module, monkeypatch, capsys):
    monkeypatch.setattr(report, "find_gpu", lambda: None)
    with pytest.raises(SystemExit, match="2"):
        module.main([])
    assert "error: no NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "wrong", "message"),
    [
        (decode.Settings, {"batches": ()}, "batches must name at least one"),
        (decode.Settings, {"kv_heads": (5,)}, r"kv_heads=\(5,\)"),
        (decode.Settings, {"rounds": 0}, "rounds=0 must be positive"),
        (inference.Settings, {"preset": "8b"}, "preset='8b' must be one of demo, 125m"),
        (inference.Settings, {"lengths": (0,)}, r"lengths=\(0,\) must be positive"),
        (inference.Settings, {"steps": 0}, "steps=0 must be positive"),
        (throughput.Settings, {"presets": ("8b",)}, "presets has '8b'"),
        (throughput.Settings, {"models": ()}, "models must name at least one"),
    ],
    ids=str,
)
def test_settings_that_are_refused(settings, wrong, message):
    with pytest.raises(ValueError, match=message):
        settings(**wrong)
