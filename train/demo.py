"""`python -m train.demo`: the kernels against the reference, then a short training run.

Made for two CPU cores and four minutes; on a GPU the same command trains with the GPU kernels.
"""

from __future__ import annotations

import datetime
import sys
import time
from pathlib import Path

from rich.console import Console

from models.presets import PRESETS
from train.agreement import agreement_table, demo_patterns
from train.config import ReportConfig, TrainConfig
from train.loop import prepare, train
from train.stop import Stopped


def demo_config(out: Path) -> TrainConfig:
    """Four layers, the first one dense; the heads of the others share the context out."""
    return TrainConfig(
        out=out,
        steps=260,
        batch_size=4,
        seq_len=512,
        model=PRESETS["demo"],
        report=ReportConfig(log_every=10, eval_every=50, checkpoint_every=100, sample_bytes=200),
    )


def main() -> None:
    console = Console()
    start = time.perf_counter()
    console.rule("the kernels, interpreted, against the reference")
    console.print(agreement_table(demo_patterns()))
    console.rule("training")
    out = Path("runs") / f"demo-{datetime.datetime.now():%Y-%m-%d-%H%M%S}"
    try:
        report = train(prepare(demo_config(out)), console)
    except (FloatingPointError, Stopped) as stop:
        sys.exit(str(stop))
    assert report is not None  # this is the only process
    assert report.entropies is not None  # of plain bytes
    better = report.validation < report.entropies.bigram
    console.print(
        f"the model is {'below' if better else 'NOT below'} H(x_t | x_(t-1)); "
        f"{time.perf_counter() - start:.0f} s in all",
        highlight=False,
    )


if __name__ == "__main__":
    main()
