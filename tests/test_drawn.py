"""Drawn calls: patterns x shapes x tiles x dtypes x what is hidden, against the dense oracle.

pytest tests/test_drawn.py --hypothesis-profile=deep      # 2560 calls instead of 160
pytest -m gpu tests/test_drawn.py --hypothesis-profile=gpu  # 320 for each launcher
"""

import pytest
from hypothesis import given

from tests.calls import check
from tests.draws import call_families


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_drawn_calls_agree_with_the_oracle(kernels, block_size):
    several = []

    @given(call_families(block_size))
    def drawn(family):
        several.append(family[0].spans_several_tiles)
        for call in family:
            check(call, kernels)

    drawn()
    assert sum(several) >= len(several) / 2
