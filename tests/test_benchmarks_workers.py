"""The attention benchmark's parent and its workers: order, failures, budget, what is kept."""

import dataclasses
import json

import pytest

from benchmarks import attention, attention_cells, report, workers
from benchmarks.attention import Settings, run
from benchmarks.attention_cells import Taken, environments_of, expected_seconds, work
from benchmarks.cases import FRAMEWORKS, MODES, Case
from benchmarks.suites import SUITES, Item, Suite
from benchmarks.workers import Pool, Timeouts
from tests.benchmark_case import GPU, TINY
from tests.fake_framework import CRASHES, CRASHES_LATER, FULL, HANGS, SLOW, UNSUPPORTED


def patterns(*strides):
    return [dataclasses.replace(TINY, stride=stride) for stride in strides]


@pytest.fixture
def measure(monkeypatch, tmp_path):
    """Runs fakes on given cases: returns the result, and what they were asked, in order."""

    def measured(cases, frameworks, timeouts=None, **settings):
        for name in frameworks:
            packages = ("no_such_package_anywhere",) if name == "flex" else ()
            fake = dataclasses.replace(
                FRAMEWORKS[name], module="tests.fake_framework", packages=packages
            )
            monkeypatch.setitem(FRAMEWORKS, name, fake)
        monkeypatch.setitem(SUITES, "main", Suite(frameworks, (96,), lambda n: cases))
        monkeypatch.setattr(report, "gpu_clock", lambda: 1980)
        monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
        (tmp_path / "log").write_text("")
        out = tmp_path / "out" / "result.json"
        chosen = Settings(("main",), frameworks=frameworks, out=out, **settings)
        result = run(chosen, GPU, timeouts)
        assert json.loads(out.read_text()) == json.loads(json.dumps(result))
        return result, (tmp_path / "log").read_text().splitlines()

    return measured


def errors(result, name="s2_jax"):
    return {row["stride"]: row["error"] for row in result["rows"] if row["framework"] == name}


def test_rounds_visit_the_frameworks_in_turn_after_all_have_prepared(measure):
    _, log = measure(patterns(16, 32), ("s2_jax", "flash2", "dkernel"), rounds=3)
    first, second = log[:-8], log[-8:]
    frameworks = ["flash2 96 None", "s2_jax 96 16", "dkernel 96 16"]
    assert sorted(first[:-9]) == sorted(
        ["compile flash2 96 None", "compile s2_jax 96 16 32", "compile dkernel 96 16 32"]
        + [f"prepare {one}" for one in frameworks]
    )
    assert first[-9:] == [f"round {one}" for one in frameworks] * 3
    frameworks = ["s2_jax 96 32", "dkernel 96 32"]
    assert sorted(second[:2]) == sorted(f"prepare {one}" for one in frameworks)
    assert second[2:] == [f"round {one}" for one in frameworks] * 3


def test_a_worker_that_crashes_or_fills_the_memory_loses_that_case_alone(measure):
    cases = patterns(16, CRASHES, FULL, UNSUPPORTED)
    result, _ = measure(cases, ("s2_jax", "dkernel"), rounds=2)
    assert errors(result) == {
        16: None,
        CRASHES: "prepare: exit code 11: Segmentation fault, or so",
        FULL: "prepare: MemoryError: RESOURCE_EXHAUSTED: Out of memory",
        UNSUPPORTED: "not supported: this stride",
    }
    assert set(errors(result, "dkernel").values()) == {None}
    times = {(r["framework"], r["stride"]): r["forward_ms"] for r in result["rows"]}
    assert times["s2_jax", 16] == 1.0
    assert times["s2_jax", CRASHES] is None
    assert times["dkernel", CRASHES] == 1.0
    assert result["frameworks"] == {"s2_jax": "ok", "dkernel": "ok"}


def test_one_that_hangs_is_stopped_and_one_that_ends_between_rounds_is_started_again(measure):
    cases = patterns(16, HANGS, CRASHES_LATER)
    short = Timeouts(ready=30, prepare=3)
    result, log = measure(cases, ("s2_jax",), short, rounds=2)
    found = errors(result)
    assert found[16] is None
    assert found[HANGS] == "prepare: no answer within 3 s"
    assert found[CRASHES_LATER].startswith("round: exit code 12")
    assert log.count("round s2_jax 96 16") == 2


def test_a_framework_that_hangs_twice_is_given_up(measure):
    cases = [dataclasses.replace(TINY, local_blocks=n, stride=HANGS) for n in (1, 2)]
    short = Timeouts(ready=30, prepare=1)
    result, _ = measure([*cases, *patterns(16)], ("s2_jax",), short, rounds=1)
    gone = "given up, it hung 2 times: no answer within 1 s"
    assert result["frameworks"]["s2_jax"] == gone
    assert errors(result)[16] == gone


def test_what_is_absent_or_broken_is_said_and_has_no_rows(measure):
    result, _ = measure(patterns(16), ("s2_jax", "tokamax", "flex"), rounds=1)
    assert result["frameworks"] == {
        "s2_jax": "ok",
        "tokamax": "not usable: ImportError: no such GPU library",
        "flex": "not installed: no_such_package_anywhere",
    }
    assert {row["framework"] for row in result["rows"]} == {"s2_jax"}


def test_another_shape_lets_the_first_one_go(measure):
    longer = dataclasses.replace(TINY, length=192)
    _, log = measure([TINY, longer], ("s2_jax",), rounds=1)
    assert log == [
        "compile s2_jax 96 3 3", "prepare s2_jax 96 3", "round s2_jax 96 3", "clear s2_jax",
        "prepare s2_jax 192 3", "round s2_jax 192 3",
    ]  # fmt: skip


def test_a_run_that_is_killed_keeps_what_it_has(measure, monkeypatch, tmp_path, capsys):
    """In the second round of the second cell: the first cell, and that one's first round."""
    rounds = []
    ask = Pool.ask

    def killed(self, name, **request):
        if request["do"] == "round":
            rounds.append(request["case"]["stride"])
        if rounds == [16, 16, 32, 32]:
            raise KeyboardInterrupt
        return ask(self, name, **request)

    monkeypatch.setattr(Pool, "ask", killed)
    with pytest.raises(KeyboardInterrupt):
        measure(patterns(16, 32, 48), ("s2_jax",), rounds=2)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [(r["stride"], r["forward_ms"], r["forward_rounds"]) for r in result["rows"]] == [
        (16, 1.0, 2), (32, 1.0, 1),
    ]  # fmt: skip
    assert "(2, 16) of 16: s2_jax 1.00, 4.00 ms" in capsys.readouterr().out


def test_phases_are_counted_for_every_framework(measure):
    result, _ = measure(patterns(16, 32), ("s2_jax", "dkernel"), rounds=3)
    assert set(result["phases"]) == {"s2_jax", "dkernel"}
    for seconds in result["phases"].values():
        assert seconds.pop("start") > 0
        assert seconds == {"layout": 2 * 0.5, "timing": 6 * 0.25}
    *_, head, first, second = report.tables(result).splitlines()
    assert head.split() == ["seconds", "layout", "timing", "waited"]
    assert first.split()[:3] == ["s2_jax", "1.0", "1.5"]
    assert second.split()[:3] == ["dkernel", "1.0", "1.5"]


@pytest.mark.parametrize(
    ("length", "seconds"), [(256, 3 + 10), (1000, 3 + 10), (60, 3 + 2)], ids=str
)
def test_the_next_cell_takes_what_the_one_most_like_it_took(length, seconds):
    """The first cell's preparing, in which all starts, does not count."""

    def cell(length):
        return [Item("s2_jax", dataclasses.replace(TINY, length=length))]

    taken = [
        Taken(work(cell(n)), prepare_s, rounds_s)
        for n, prepare_s, rounds_s in ((256, 60, 10), (64, 2, 2), (128, 4, 5))
    ]
    assert expected_seconds(cell(length), taken) == seconds
    assert expected_seconds(cell(length), taken[:1]) == 0


def test_a_cell_that_likely_does_not_fit_is_not_begun(measure, monkeypatch):
    monkeypatch.setattr(
        attention, "expected_seconds", lambda cell, taken: 1e9 * (cell[0].case.stride == 32)
    )
    result, log = measure(patterns(16, 32, 48), ("s2_jax",), rounds=1)
    assert [row["stride"] for row in result["rows"]] == [16, 48]
    assert result["not_measured"] == ["1 x 96 tokens, 2 x 16, (2, 32) of 16"]
    assert not any(line in log for line in ("prepare s2_jax 96 32", "round s2_jax 96 32"))


def test_inputs_go_where_the_first_cell_of_the_next_shape_is_left_out(measure, monkeypatch):
    cells = [TINY, *(dataclasses.replace(TINY, length=192, stride=n) for n in (32, 3))]
    monkeypatch.setattr(
        attention, "expected_seconds", lambda cell, taken: 1e9 * (cell[0].case.stride == 32)
    )
    _, log = measure(cells, ("s2_jax",), rounds=1)
    assert log.index("clear s2_jax") < log.index("prepare s2_jax 192 3")


def test_no_answer_is_awaited_far_beyond_the_budget(measure, monkeypatch):
    monkeypatch.setattr(workers, "_LEAST_TIMEOUT", 0.5)
    result, _ = measure(patterns(HANGS, 16), ("s2_jax", "dkernel"), rounds=1, budget_s=4)
    assert errors(result)[HANGS].startswith("prepare: no answer within ")
    assert errors(result, "dkernel") == {HANGS: None}
    assert result["not_measured"] == ["1 x 96 tokens, 2 x 16, (2, 16) of 16"]


def test_a_spent_budget_drops_rounds_then_cells(measure):
    longer = [dataclasses.replace(TINY, length=192, stride=SLOW), TINY]
    result, log = measure(longer, ("s2_jax",), rounds=9, budget_s=0.5)
    assert [line for line in log if line.startswith("round")] == [f"round s2_jax 192 {SLOW}"] * 2
    assert result["not_measured"] == ["1 x 96 tokens, 2 x 16, (2, 3) of 16"]
    assert "not measured, the budget was spent: 1 x 96 tokens" in report.tables(result)


def test_large_shapes_keep_no_inputs(measure, monkeypatch):
    monkeypatch.setattr(attention_cells, "LARGE_BYTES", TINY.io_bytes("train"))
    _, log = measure([TINY], ("s2_jax", "dkernel"), rounds=1)
    assert [line.split()[:2] for line in log[-4:]] == [
        ["round", "s2_jax"], ["forget", "s2_jax"], ["round", "dkernel"], ["forget", "dkernel"],
    ]  # fmt: skip


def test_large_shapes_cap_the_memory_of_jax_alone():
    """By power of two, from 8 GiB on: few start the workers anew."""
    cases = [Case(131072), Case(8192), Case(131072, heads=64, kv_heads=64), Case(1 << 20)]
    found = [environments_of([Item("s2_jax", case)], GPU, "") for case in cases]
    fractions = [float(one["s2_jax"]["XLA_PYTHON_CLIENT_MEM_FRACTION"]) for one in found]
    limits = [(1.3 * size + 2) * 1024 / 80000 for size in (8, 8, 16)]
    assert fractions == pytest.approx([*limits, 0.95], abs=1e-3)
    assert all(one["dkernel"] == found[0]["dkernel"] for one in found)


def test_the_jax_worker_measures_the_reference(measure, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    framework = FRAMEWORKS["reference"]
    monkeypatch.setattr(dataclasses, "replace", lambda one, **_: one)  # no fake
    result, _ = measure([TINY], ("reference",), rounds=2)
    assert FRAMEWORKS["reference"] is framework
    (row,) = result["rows"]
    assert row["error"] is None
    for mode in MODES:
        assert row[f"{mode}_rounds"] == 2
        assert row[f"{mode}_min_ms"] <= row[f"{mode}_ms"] <= row[f"{mode}_max_ms"]
        assert row[f"{mode}_clock"] == "wall"
        assert row[f"{mode}_memory_ratio"] >= 1 - 1 / 8  # train returns no output
        assert row[f"{mode}_compile_s"] > 0
        assert row[f"{mode}_trace_lower_s"] > 0
    assert row["train_ms"] > row["forward_ms"]
