"""Drawing a token: which ones can be drawn, and what settings are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import Sampling


def drawn(sampling: Sampling, logits: list[float], count: int = 400) -> set[int]:
    keys = jax.random.split(jax.random.key(0), count)
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    return set(np.asarray(sampling.draw(keys, rows)).tolist())


def test_which_tokens_can_be_drawn():
    logits = np.log([0.4, 0.3, 0.2, 0.1]).tolist()
    assert drawn(Sampling(), logits) == {0, 1, 2, 3}
    assert drawn(Sampling(temperature=0.0), logits) == {0}
    assert drawn(Sampling(temperature=0.01), logits) == {0}
    assert drawn(Sampling(top_k=2), logits) == {0, 1}
    assert drawn(Sampling(top_k=9), logits) == {0, 1, 2, 3}
    assert drawn(Sampling(top_p=0.39), logits) == {0}
    assert drawn(Sampling(top_p=0.69), logits) == {0, 1}
    assert drawn(Sampling(top_p=0.71), logits) == {0, 1, 2}
    assert drawn(Sampling(top_k=2, top_p=0.5), logits) == {0}


@pytest.mark.parametrize(
    "change", [{"temperature": -1.0}, {"temperature": np.inf}, {"top_k": 0}, {"top_p": 0.0}]
)
def test_a_sampling_refuses(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Sampling(**change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"top_k": True}, TypeError, "top_k=True must be an integer"),
        ({"top_k": 2.0}, TypeError, "top_k=2.0 must be an integer"),
        ({"top_k": "2"}, TypeError, "top_k='2' must be an integer"),
        ({"temperature": "1"}, TypeError, "temperature='1' must be a number"),
        ({"temperature": None}, TypeError, "temperature=None must be a number"),
        ({"temperature": True}, TypeError, "temperature=True must be a number"),
        ({"temperature": np.nan}, ValueError, "temperature=nan must be 0, or 1e-6 or more"),
        ({"top_p": "1"}, TypeError, "top_p='1' must be a number"),
        ({"top_p": None}, TypeError, "top_p=None must be a number"),
        ({"top_p": np.nan}, ValueError, "top_p=nan must be above 0 and at most 1"),
    ],
    ids=str,
)
def test_a_sampling_names_what_is_no_number(change, error, message):
    with pytest.raises(error, match=message):
        Sampling(**change)


def test_a_sampling_takes_numbers_of_numpy():
    logits = np.log([0.4, 0.3, 0.2, 0.1]).tolist()
    chosen = Sampling(temperature=np.float32(1), top_k=np.int64(2), top_p=np.float64(0.5))
    assert drawn(chosen, logits) == {0}
