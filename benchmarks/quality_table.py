"""`python -m benchmarks.quality_table RESULT...`: what results of `benchmarks.quality` say in text.

Several are put together, for example of processes that took some of the cells each.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from benchmarks.quality_models import NAMES
from benchmarks.report import lined_up, number

NEEDED = 0.9
"""Share of the passkeys that the dense model has to find where it was trained."""
_SAME = ("gpu", "device_kind", "platform", "commit", "versions")  # or the table says otherwise
_OWN = ("models", "seeds", "budget_s", "out", "data", "platform")  # what results may differ in


@dataclasses.dataclass(frozen=True)
class Settings:
    """Prints the table of a result, or of several together, also of one cut short."""

    results: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """JSON that `python -m benchmarks.quality` wrote."""
    plots: Path | None = None
    """Folder for pictures: the loss by position, and what is found by depth."""


def merge(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first result, with the cells of all.

    Raises:
      ValueError: there is none, they have other settings or text, or the same cell.
    """
    if not results:
        raise ValueError("name at least one result")
    first = results[0]
    for other in results[1:]:
        differing = [
            name
            for name in (first["settings"] | other["settings"])
            if name not in _OWN and first["settings"].get(name) != other["settings"].get(name)
        ]
        if differing or first["text"] != other["text"]:
            raise ValueError(f"the results differ in {', '.join(differing) or 'text'}")
    rows = [row for result in results for row in result["rows"]]
    cells = [(row["model"], row["seed"]) for row in rows]
    if twice := sorted({cell for cell in cells if cells.count(cell) > 1}):
        raise ValueError(f"there is more than one result of {twice[0][0]}, seed {twice[0][1]}")
    together = {
        name: [what for result in results for what in result[name]]
        for name in ("failed", "not_measured")
    }
    unlike = [
        name for name in _SAME if any(other.get(name) != first.get(name) for other in results)
    ]
    notes = [f"results of several {', '.join(unlike)} are put together"] if unlike else []
    return first | together | {"rows": rows, "notes": [*first["notes"], *notes]}


def read(path: Path) -> dict[str, Any]:
    """Raises ValueError if the file is no result of `benchmarks.quality`; OSError."""
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    needed = {"settings", "rows", "text", "failed", "not_measured", "notes"}
    if not isinstance(data, dict) or not needed <= data.keys():
        raise ValueError(f"{path} is not a result of benchmarks.quality")
    return data


def by_model(data: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The cells of each model that ran to their end, a cell a seed."""
    rows = [row for row in data["rows"] if not row["error"]]
    found = {name: [row for row in rows if row["model"] == name] for name in NAMES}
    return {name: cells for name, cells in found.items() if cells}


def evaluations(data: dict[str, Any]) -> dict[tuple[int, float], str]:
    """Length and rope base of each, and what it is called, for example "8192, base 40000"."""
    trained = data["settings"]["shape"]["rope_base"]
    return {
        (one["length"], one["rope_base"]): str(one["length"])
        + (f", base {one['rope_base']:.0f}" if one["rope_base"] != trained else "")
        for cells in by_model(data).values()
        for cell in cells
        for one in cell["evaluations"]
    }


def evaluation(cell: dict[str, Any], of: tuple[int, float]) -> dict[str, Any]:
    return next(e for e in cell["evaluations"] if (e["length"], e["rope_base"]) == of)


def accuracy(one: dict[str, Any], task: str) -> float:
    """Over all depths."""
    return float(np.mean(one[task]["accuracy"]))


def verdict(data: dict[str, Any]) -> str:
    """Whether dense models retrieve at all: if they do not, nobody else need."""
    settings = data["settings"]
    of = settings["length"], settings["shape"]["rope_base"]
    cells = by_model(data).get("dense", [])
    if not cells or of not in evaluations(data):
        return f"no dense model at {of[0]} tokens: the comparison says nothing about retrieval"
    found = float(np.mean([accuracy(evaluation(cell, of), "passkey") for cell in cells]))
    said = f"dense finds {found:.0%} of the passkeys at the trained length of {of[0]} tokens"
    if found >= NEEDED:
        return f"{said}, at least {NEEDED:.0%}: the comparison counts"
    return f"{said}, less than {NEEDED:.0%}: the comparison says nothing about retrieval"


def table(data: dict[str, Any]) -> str:
    """A line a model, for every length that it is evaluated at."""
    settings, shape = data["settings"], data["settings"]["shape"]
    rows = data["rows"]
    dense = next((row["dense_layers"] for row in rows if row["model"] == "hybrid"), None)
    window = next((row["window"] for row in rows if row["model"] == "window"), None)
    layers = ", ".join(map(str, dense or []))
    legend = (
        f"{shape['num_layers']} layers of {shape['width']}, {settings['steps']} steps of"
        f" {settings['batch_size']} x {settings['length']} tokens,"
        f" {settings['mixture']['share']:.0%} of the rows retrieval. Means over seeds, with least"
        f" and most. S2 is local_stride({shape['local_blocks']}, {shape['vert_stride']}) in blocks"
        f" of {shape['block_size']}, homogeneous where all heads share columns"
        + (f"; dense in the hybrid: layer {layers} of {shape['num_layers']}" if dense else "")
        + (f"; the window has {window} tokens" if window else "")
        + ". bits: a token of text held out; passkey, recall: answered, over all depths; density:"
        " blocks computed at the trained length, dense being 1."
    )
    failures = [f"{r['model']}, seed {r['seed']}: {r['error']}" for r in rows if r["error"]]
    notes = data.get("notes", [])
    return "\n".join([lined_up(_lines(data)), legend, *failures, *notes, verdict(data)])


def _lines(data: dict[str, Any]) -> Iterator[list[str]]:
    yield [
        "tokens",
        "model",
        "seeds",
        "bits",
        "passkey",
        "recall",
        "train loss",
        "density",
        "tok/s",
    ]
    for of, name in evaluations(data).items():
        for model, cells in by_model(data).items():
            ones = [evaluation(cell, of) for cell in cells]
            found = ([accuracy(one, task) for one in ones] for task in ("passkey", "recall"))
            yield [
                name,
                model,
                str(len(cells)),
                _mean([one["loss"]["mean"] for one in ones], "{:.3f}".format),
                *(_mean(shares, "{:.0%}".format) for shares in found),
                _mean([cell["loss"] for cell in cells], "{:.3f}".format),
                f"{cells[0]['density']:.3f}",
                number(float(np.mean([cell["tokens_s"] for cell in cells]))),
            ]


def _mean(values: list[float], text: Callable[[float], str]) -> str:
    """With the least and the most, of several."""
    of_all = text(float(np.mean(values)))
    spread = f" ({text(min(values))}-{text(max(values))})"
    return of_all + (spread if len(values) > 1 else "")


def main(arguments: Sequence[str] | None = None) -> None:
    settings = tyro.cli(Settings, prog="python -m benchmarks.quality_table", args=arguments)
    try:
        data = merge([read(path) for path in settings.results])
        if settings.plots is not None and not by_model(data):
            raise ValueError("no model ran to its end: there is nothing to draw")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(table(data))
    if settings.plots is not None:
        from benchmarks.quality_plots import save  # Matplotlib takes a while to load

        save(data, settings.plots)


if __name__ == "__main__":
    main()
