"""Validation loss in bits per byte."""

from __future__ import annotations

import math
from typing import Any

from jaxtyping import UInt8
from numpy import ndarray

from train.parallel import Program


def bits_per_byte(
    program: Program, params: Any, batches: UInt8[ndarray, "batches batch seq_len+1"]
) -> float:
    """Mean over the batches; `params` as placed by the program."""
    losses = [program.eval_step(params, batch) for batch in batches]
    return sum(float(loss) for loss in losses) / len(losses) / math.log(2)
