"""Every kernel that the heuristics can pick, compiled by the official Triton; needs no GPU.

In CI for Hopper and, without the variants, for Ampere; in blocks of 64, and of all sizes with heads
of 128 in bfloat16. Heads of 80 and 192, with the tiles of 128 and 256, for Hopper in bfloat16.
"""

import pytest

from benchmarks.resource_cases import VARIANTS, cases
from benchmarks.resources import SHARED_LIMITS, faults
from pallas_kernels.official import measure


def always(case, capability):
    plain = case.variant == "ragged" or case.variant not in VARIANTS  # or decoding
    every_block_size = plain and case.head_dim == 128 and case.dtype == "bfloat16"
    padded = case.head_dim in (80, 192) and (capability, case.dtype) != (90, "bfloat16")
    taken = every_block_size or (case.block_size == 64 and not padded)
    return taken and (capability == 90 or (capability == 80 and plain))


def picks():
    for capability in SHARED_LIMITS:
        for case in cases(capability):
            often = always(case, capability)
            mark = pytest.mark.compile if often else pytest.mark.compile_full
            name = f"sm{capability}-{case.variant}-{case.dtype}-{case.head_dim}-{case.block_size}"
            tiles = (case.tile(kernel) for kernel in case.names)
            sizes = "-".join(f"{tile.block_q}x{tile.block_kv}" for tile in tiles)
            yield pytest.param(case, capability, marks=mark, id=f"{name}-{sizes}")


@pytest.mark.parametrize(("case", "capability"), list(picks()))
def test_every_pick_fits(case, capability):
    """No spilled registers, shared memory within the GPU's limit, Hopper's products on Hopper."""
    found = {
        kernel: faults(case, kernel, capability, measure(case.kernels[kernel], capability))
        for kernel in case.names
    }
    assert not any(found.values()), found
