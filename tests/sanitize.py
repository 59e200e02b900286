"""A few small calls, for NVIDIA's checkers to watch; needs a GPU.

    export XLA_PYTHON_CLIENT_ALLOCATOR=platform XLA_FLAGS=--xla_gpu_enable_command_buffer=
    compute-sanitizer --tool memcheck --error-exitcode 1 python -m tests.sanitize
    compute-sanitizer --tool racecheck --error-exitcode 1 python -m tests.sanitize

Every array is an allocation of its own that way, so that no access past its end goes unseen.
Names of calls may follow.
"""

import dataclasses
import sys

import numpy as np

from tests import test_attention, test_masks
from tests.calls import RESULTS

CALLS = {
    "merge-and-gather": test_attention.CALLS["merge-and-gather"],
    "head-dim-80": test_attention.CALLS["head-dim-80"],
    "traced-offset": test_attention.CALLS["traced-offset"],
    "block-mask": test_attention.CALLS["block-mask"],
    "packed": test_masks.CALLS["packed-padded"],
    "lengths": test_masks.CALLS["lengths-traced-offset"],
    "window": test_masks.CALLS["window-gathered"],
    "soft-cap": test_masks.CALLS["soft-cap-bfloat16"],
    "value-dim": test_masks.CALLS["value-dim-smaller"],
}


def main() -> None:
    for name in sys.argv[1:] or CALLS:
        call = CALLS[name]
        for tiles in {call.tiles, None}:
            got = dataclasses.replace(call, tiles=tiles).run("triton")
            assert all(np.isfinite(got[x].astype(np.float32)).all() for x in RESULTS if x != "lse")
        print(f"{name}: forward and backward ran", flush=True)


if __name__ == "__main__":
    main()
