"""One framework in a process of its own: `python -m benchmarks.attention_worker JOB RESULT`.

JOB is JSON: {"framework", "repeats", "cases"}; RESULT becomes JSON: {"error", "rows"}. It is
written after every case, so that a crash loses one.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.cases import FRAMEWORKS, MODES, Case, Measurement, Mode, Name, row_of


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def measure_case(module: Any, name: Name, case: Case, repeats: int) -> dict[str, Any]:
    measured: dict[Mode, Measurement] = {}
    error = None
    for mode in MODES:
        try:
            measured[mode] = module.measure(name, case, mode, repeats)
        except Exception as failure:  # a peer may fail in any way, and the result says how
            error = f"{mode}: {first_line(failure)}"
            break
    return row_of(name, case, measured, error)


def results(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The result so far, after the start and after every case."""
    name: Name = job["framework"]
    rows: list[dict[str, Any]] = []
    try:
        module = importlib.import_module(FRAMEWORKS[name].module)
        for package in FRAMEWORKS[name].packages:
            importlib.import_module(package)
    except Exception as failure:  # likewise: an installation may be broken in any way
        yield {"error": first_line(failure), "rows": rows}
        return
    yield {"error": None, "rows": rows}
    for fields in job["cases"]:
        rows.append(measure_case(module, name, Case(**fields), job["repeats"]))
        yield {"error": None, "rows": rows}


def main() -> None:
    job_path, result_path = map(Path, sys.argv[1:])
    for result in results(json.loads(job_path.read_text())):
        result_path.write_text(json.dumps(result))
        for row in result["rows"][-1:]:
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
