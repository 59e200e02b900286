"""The attention benchmark without a GPU: suites, JAX's own measuring, arithmetic, pictures."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import s2_jax
from benchmarks import attention, plots, report
from benchmarks.attention import Settings
from benchmarks.cases import FRAMEWORKS, GROUP_SECONDS, MODES, Case
from benchmarks.jax_attention import Session
from benchmarks.rows import row_of, shares
from benchmarks.suites import SUITES, Item, memory_class, plan
from benchmarks.timing import calls_of_group, kernel_seconds, traced_seconds
from tests.benchmark_case import GPU, TINY

# Suites.


def test_main_is_a_grid_in_which_dense_frameworks_run_once_a_length():
    cells = plan(("main",), (), ("s2_jax", "flash2"))
    lengths = [cell[0].case.length for cell in cells]
    assert lengths == [131072 >> i for i in range(7) for _ in range(3)]
    names = [[item.framework for item in cell] for cell in cells[:3]]
    assert names == [["flash2", "s2_jax"], ["s2_jax"], ["s2_jax"]]


def test_a_case_of_two_suites_is_measured_once():
    groups = plan(("main", "paper"), (131072,), ("s2_jax",))
    suites = {
        (i.case.heads, i.case.local_blocks, i.case.stride): i.suites for g in groups for i in g
    }
    assert suites == {
        (32, 8, 16): ["main", "paper"],
        (32, 8, 32): ["main", "paper"],
        (32, 16, 8): ["main"],
        (64, 8, 64): ["paper"],
    }


def test_batches_hold_as_many_tokens_as_one_long_row():
    groups = plan(("batch",), (), ("s2_jax",))
    assert {i.case.batch * i.case.length for g in groups for i in g} == {32768}


def test_small_blocks_see_as_many_tokens_as_large_ones():
    cells = plan(("small_blocks",), (), ("s2_jax",))
    flops = {item.case.block_size: item.case.flops for cell in cells for item in cell}
    assert set(flops) == {16, 32, 64}
    assert max(flops.values()) / min(flops.values()) < 1.01


def test_packed_documents_need_what_they_need_as_rows():
    cases = [i.case for g in plan(("packed",), (), ("jax_triton",)) for i in g]
    documents = next(case for case in cases if case.documents > 1)
    rows = next(case for case in cases if case.batch == documents.documents)
    assert documents.flops == rows.flops
    assert {case.length for case in cases} == {131072, 131071, 32768, 2048}
    assert next(c for c in cases if c.padded).valid_lengths == [8192, 16384, 24576, 32768]


def test_the_longest_is_only_for_s2_jax():
    cells = plan(tuple(SUITES), (), tuple(FRAMEWORKS)[:-1])
    assert [i.framework for c in cells for i in c if i.case.length == 1 << 20] == ["s2_jax"]


def test_cells_come_as_asked_for_but_shapes_and_memory_classes_stay_together():
    cells = plan(("paper", "gqa", "main"), (8192, 131072), ("s2_jax", "flash2"))
    shapes = [(c[0].case.length, c[0].case.heads, c[0].case.kv_heads) for c in cells]
    assert shapes == [
        *[(131072, 32, 32)] * 3, (8192, 32, 8), (131072, 32, 8), *[(8192, 32, 32)] * 3,
        (131072, 64, 64),
    ]  # fmt: skip
    assert [memory_class(cell) for cell in cells] == [8 << 30] * 8 + [16 << 30]


def test_what_is_asked_for_twice_joins_the_shape_that_is_there():
    cells = plan(("gqa", "paper", "main"), (131072,), ("s2_jax",))
    found = [(c[0].case.heads, c[0].case.kv_heads, c[0].case.stride, c[0].suites) for c in cells]
    assert found == [
        (32, 8, 16, ["gqa"]), (32, 32, 16, ["paper", "main"]), (32, 32, 32, ["paper", "main"]),
        (32, 32, 8, ["main"]), (64, 64, 64, ["paper"]),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        TINY,
        Case(1000, heads=8, kv_heads=2, head_dim=32, local_blocks=3, stride=8),
        Case(997, heads=6, kv_heads=6, head_dim=32, local_blocks=1, stride=5, block_size=16),
    ],
    ids=["tiny", "grouped", "odd"],
)
def test_operations_are_the_patterns_own(case):
    numbers = (case.heads, case.length, case.length, case.kv_heads)
    assert case.flops == case.pattern.flops(*numbers, head_dim=case.head_dim)
    dense = s2_jax.dense(block_size=64).flops(*numbers, head_dim=case.head_dim)
    assert case.theoretical_speedup == dense / case.flops


# The measuring code of JAX, on the CPU.


@pytest.mark.parametrize("change", [{"documents": 4}, {"padded": True, "batch": 3}], ids=str)
def test_masked_cases_run(change):
    case = dataclasses.replace(TINY, **change)
    session = Session("reference")
    session.prepare(case)
    times = session.round(case)
    assert all(times[mode]["seconds"] > 0 for mode in MODES)
    session.clear()


def test_results_that_are_not_finite_are_an_error():
    session = Session("reference")
    session.prepare(TINY)
    session.round(TINY)
    (shape, (inputs, *rest)) = session._inputs
    session._inputs = shape, ((inputs[0] * np.nan, *inputs[1:]), *rest)
    session._programs[TINY]["forward"].result()._checked = False
    with pytest.raises(FloatingPointError):
        session.round(TINY)


def test_cases_compiled_ahead_are_ready_and_one_that_fails_says_so_later():
    session, other = Session("reference"), dataclasses.replace(TINY, length=64)
    dense = TINY.shape
    session.compile([dense, TINY, other], seconds=60)
    before = session.phases.take()
    facts = session.prepare(TINY)
    after = session.phases.take()
    assert {"trace", "lower", "compile"} <= set(before)
    assert set(after) == {"compile"}
    assert all(facts[mode]["compile_s"] > 0 for mode in MODES)
    session.clear()
    session.prepare(other)
    assert set(session.phases.take()) == {"compile"}
    session.round(other)
    assert set(session.phases.take()) == {"arrays", "check", "warm-up", "timing"}
    with pytest.raises(ValueError, match="a dense case has no pattern"):
        session.prepare(dense)


def test_what_does_not_come_within_the_seconds_is_compiled_when_asked_for():
    session = Session("reference")
    session.compile([TINY], seconds=-1)
    assert session.prepare(TINY)["forward"]["compile_s"] > 0
    assert session.phases.take()["trace"] > 0


@pytest.mark.parametrize(
    ("ms", "calls"), [(22, 12), (60, 5), (200, 2), (300, 1), (1500, 1)], ids=str
)
def test_a_group_takes_a_quarter_of_a_second_and_a_longer_call_is_one(ms, calls):
    assert calls_of_group(ms / 1e3, GROUP_SECONDS) == calls


def line(name, *spans):
    events = [SimpleNamespace(start_ns=a, duration_ns=b - a) for a, b in spans]
    return SimpleNamespace(name=name, events=events)


def test_a_traced_call_lasts_from_its_first_kernel_to_its_last():
    host = SimpleNamespace(name="/host:CPU", lines=[line("Stream of words", (0, 900))])
    streams = [
        line("Stream #7(Compute)", (10, 20), (30, 50), (70, 90)),
        line("Stream #9", (80, 95)),
    ]
    gpu = SimpleNamespace(name="/device:GPU:0", lines=[*streams, line("XLA Modules", (0, 99))])
    assert traced_seconds([host, gpu], calls=2) == pytest.approx((40 + 25) / 2 * 1e-9)
    assert traced_seconds([host, gpu], calls=3) == pytest.approx((10 + 20 + 25) / 3 * 1e-9)
    assert traced_seconds([host, gpu], calls=5) is None
    assert traced_seconds([host], calls=1) is None


def test_kernels_are_summed_by_name():
    events = [
        SimpleNamespace(name=name, start_ns=a, duration_ns=b)
        for name, a, b in (("copy", 0, 10), ("attend", 10, 30), ("copy", 50, 10))
    ]
    stream = SimpleNamespace(name="Stream #7(Compute)", events=events)
    gpu = SimpleNamespace(name="/device:GPU:0", lines=[stream])
    found = kernel_seconds([gpu], calls=2)
    assert list(found) == ["attend", "copy"]
    assert list(found.values()) == pytest.approx([15e-9, 10e-9])


# Rows, text and pictures.


def item(name, case, forward, train, size=None):
    rounds = [
        {mode: {"seconds": ms / 1e3, "clock": "cuda-events"} for mode, ms in zip(MODES, pair)}
        for pair in zip(forward, train)
    ]
    facts = {mode: {"bytes": size} for mode in MODES} if size else {}
    return Item(name, case, ["main"], facts, rounds)


def test_the_arithmetic_of_a_row():
    case = Case(1024, batch=2, heads=4, kv_heads=2, head_dim=64, local_blocks=4, stride=8)
    row = row_of(item("s2_jax", case, (3.0, 1.0, 2.0), (7.0, 9.0, 8.0), size=2**22))
    assert (row["forward_ms"], row["forward_min_ms"], row["forward_max_ms"]) == (2.0, 1.0, 3.0)
    assert row["backward_ms"] == 6.0
    flops = 2 * case.pattern.flops(4, 1024, 1024, 2, head_dim=64)
    assert row["forward_tflops"] == pytest.approx(flops / 2e-3 / 1e12)
    assert row["backward_tflops"] == pytest.approx(2.5 * flops / 6e-3 / 1e12)
    assert row["train_tflops"] == pytest.approx(3.5 * flops / 8e-3 / 1e12)
    size = 2 * 1024 * 64 * 2 * (4 + 2 + 2 + 4)  # batch, tokens, numbers, bytes, heads
    assert row["forward_gb_s"] == pytest.approx(size / 2e-3 / 1e9)
    assert row["forward_memory_ratio"] == pytest.approx(2**22 / size)
    assert row["train_memory_ratio"] == pytest.approx(2**22 / size / 2)


def paper_rows():
    """At the paper's length FlashAttention-2 takes 280 ms, and s2_jax what gives its shares."""
    rows = []
    for heads, stride in ((32, 16), (32, 32), (64, 64)):
        case = Case(131072, heads=heads, kv_heads=heads, local_blocks=8, stride=stride)
        rows.append(row_of(item("flash2", case.shape, (280.0,), (1000.0,))))
        ms = 280 / (0.5 * case.theoretical_speedup)
        rows.append(row_of(item("s2_jax", case, (ms,), (3 * ms,))))
    return [{"suite": "main"} | row for row in rows]


def result_of(rows):
    return {
        "gpu": GPU, "frameworks": {"s2_jax": "ok"}, "not_measured": [], "rows": rows,
        "settings": {},
    }  # fmt: skip


def test_the_share_of_the_theoretical_speedup():
    found = shares(paper_rows(), "forward")
    assert set(found) == {1, 3, 5}
    assert list(found.values()) == pytest.approx([0.5] * 3)


def test_tables_name_ratios_failures_and_clocks():
    case = Case(2048, local_blocks=8, stride=16)
    rows = [
        row_of(item("s2_jax", case, (2.0,), (5.0,))),
        row_of(item("flash2", case.shape, (3.0,), (8.0,))),
        row_of(Item("dkernel", case, error="not supported: this")),
        row_of(Item("flex", case, error="round: no answer within 9 s")),
    ]
    rows[0]["forward_clock_why"] = "profiler: none"
    text = report.tables(result_of([{"suite": "main"} | row for row in rows]))
    forward, train = (one for one in text.splitlines() if one.startswith("1 x 2048 tokens"))
    assert forward.split()[-5:] == ["2.00", "3.00", "(1.50x)", "failed", "n/s"]
    assert train.split()[-5:] == ["5.00", "8.00", "(1.60x)", "failed", "n/s"]
    assert "flex on 1 x 2048 tokens, 32 x 128, (8, 16) of 64: round: no answer within 9 s" in text
    assert "s2_jax: profiler: none; wall clock instead" in text


def test_pictures_of_a_result(tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result_of(paper_rows())))
    result = plots.load((path,))
    times = plots.series(result["rows"], "forward", (8, 16))
    assert [tokens for tokens, _ in times["s2_jax"]] == [131072]
    bars = plots.share_bars(result["rows"], "forward")
    assert list(bars["s2_jax"].values()) == pytest.approx([0.5] * 3)
    assert len(plots.draw(result, (8, 16)).axes) == 2
    assert plots.draw_shares(result) is not None


def test_pictures_of_the_committed_results():
    folder = Path(plots.__file__).parent / "results"
    result = plots.load((folder / "h100-attention.json", folder / "h100-attention-flex.json"))
    assert {"s2_jax", "flex", "dkernel"} <= set(plots.series(result["rows"], "train", (8, 16)))
    assert len(plots.share_bars(result["rows"], "forward")["s2_jax"]) == 3


def test_shares_alone_are_drawn_of_the_papers_suite(tmp_path, monkeypatch):
    paper = Path(plots.__file__).parent / "results" / "h200-attention-paper.json"
    monkeypatch.setattr("sys.argv", ["plots", str(paper), "--out", str(tmp_path / "x.png")])
    plots.main()
    assert [path.name for path in tmp_path.iterdir()] == ["x-share.png"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"suites": ()}, "suites must name at least one"),
        ({"frameworks": ()}, "frameworks must name at least one"),
        ({"rounds": 0}, "rounds=0 must be positive"),
        ({"budget_s": float("nan")}, "budget_s=nan must be positive"),
        ({"lengths": (0,)}, r"lengths=\(0,\) must be positive"),
        ({"suites": ("million",), "lengths": (64,)}, "nothing to measure"),
    ],
    ids=str,
)
def test_settings_that_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Settings(**wrong)


def test_a_machine_without_a_gpu_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["attention"])
    monkeypatch.setattr(report, "find_gpu", lambda: None)
    with pytest.raises(SystemExit, match="2"):
        attention.main()
    assert "error: no NVIDIA GPU" in capsys.readouterr().err
