"""Every kernel that the heuristics can pick, compiled by the official Triton; needs no GPU."""

import pytest

from benchmarks.resource_cases import cases
from benchmarks.resources import SHARED_LIMITS, faults
from pallas_kernels.official import measure

# Ampere and Hopper in CI; the others where they are asked for.
ALWAYS = (80, 90)


def picks():
    for capability in SHARED_LIMITS:
        mark = pytest.mark.compile if capability in ALWAYS else pytest.mark.compile_full
        for case in cases(capability):
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
