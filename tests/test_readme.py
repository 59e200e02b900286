"""The README's examples, as a newcomer would paste them."""

import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize(
    "example", EXAMPLES, ids=["call", "linen", "nnx", "pretrained", "packed", "tokens", "inference"]
)
def test_example_runs(example, monkeypatch):
    monkeypatch.chdir(ROOT)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        names = {}
        exec(compile(example, "README.md", "exec"), names)
    result = next(names[name] for name in ("y", "out", "gradient") if name in names)
    assert jax.numpy.isfinite(result).all()
