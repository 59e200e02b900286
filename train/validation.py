"""Validation loss in bits per byte."""

from __future__ import annotations

import math
from typing import Any

from train.batches import Batches
from train.parallel import Program


def bits_per_byte(program: Program, params: Any, data: Batches) -> float:
    """Mean over the tokens of all validation batches; `params` as placed by the program."""
    number = len(data.validation["tokens"])
    results = [
        program.eval_step(params, {name: x[i] for name, x in data.validation.items()})
        for i in range(number)
    ]
    losses, weights = (sum(map(float, column)) for column in zip(*results))
    return losses / weights / math.log(2) / data.bytes_per_token
