"""Bad input is named, with the value, before anything is compiled: docs/errors.md, run."""

import builtins
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import s2_jax
import s2_jax.linen

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "errors.md").read_text()
SETUP = re.search(r"```python\n(.*?)```", PAGE, flags=re.DOTALL).group(1)
ROW = re.compile(r"\| (?P<what>.+) \| `(?P<call>.+)` \| (?P<error>\w+) \| `(?P<message>.+)` \|")
COMPILED = []
# How jnp.asarray and array[None] put an argument in place, before its values are known.
PLUMBING = ("jit(stage)", "jit(broadcast_in_dim)", "jit(convert_element_type)")


def remember(event, duration, *, fun_name="", **details):
    if event.endswith("backend_compile_duration") and fun_name not in PLUMBING:
        COMPILED.append(fun_name)


jax.monitoring.register_event_duration_secs_listener(remember)


def table():
    """(what, call, error, message) of every row; a row that does not read as one fails."""
    lines = [line for line in PAGE.splitlines() if line.startswith("|")]
    heads = ("| what is wrong |", "| --- |")
    rows = [ROW.fullmatch(line) or line for line in lines if not line.startswith(heads)]
    assert not [row for row in rows if isinstance(row, str)]
    return [tuple(cell.replace(r"\|", "|") for cell in row.groups()) for row in rows]


TABLE = table()


@pytest.fixture(autouse=True)
def on_the_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.fixture(name="names", scope="module")
def documented_names():
    """What the page defines for its calls, pasted."""
    names = {}
    with jax.default_device(jax.devices("cpu")[0]):
        exec(compile(SETUP, "docs/errors.md", "exec"), names)
    return names


@pytest.fixture(name="linen_names", scope="module")
def the_same_with_linen(names):
    """The calls of modules, with the one of Linen."""

    def layer(**changes):
        settings = {
            "in_features": 32, "num_heads": 4, "pattern": names["PATTERN"], "rope_base": 1e4,
        }  # fmt: skip
        module = s2_jax.linen.S2Attention(**(settings | changes))
        x = jax.ShapeDtypeStruct((2, 40, 32), jnp.float32)
        variables = jax.eval_shape(module.init, jax.random.key(0), x)
        return lambda *args, **options: module.apply(variables, *args, **options)

    with jax.default_device(jax.devices("cpu")[0]):
        layers = {"LAYER": layer(), "SPLIT_LAYER": layer(head_axis="heads")}
    return names | layers | {"layer": layer}


def check(call, error, message, names):
    COMPILED.clear()
    with pytest.raises(Exception) as caught:
        eval(call, dict(names))
    assert type(caught.value) is getattr(builtins, error), caught.value
    pattern = ".+".join(re.escape(part) for part in message.split("…"))
    assert re.fullmatch(pattern, str(caught.value), flags=re.DOTALL), caught.value
    assert not COMPILED


@pytest.mark.parametrize(("what", "call", "error", "message"), TABLE)
def test_row(what, call, error, message, names):
    check(call, error, message, names)


OF_MODULES = [row[1:] for row in TABLE if "LAYER(" in row[1] or row[1].startswith("layer(")]


@pytest.mark.parametrize(("call", "error", "message"), OF_MODULES)
def test_linen_modules_say_the_same(call, error, message, linen_names):
    check(call, error, message, linen_names)


def test_the_table_names_every_call_once():
    calls = [call for _, call, _, _ in TABLE]
    assert len(calls) == len(set(calls)) > 250
    assert len(OF_MODULES) > 40


def test_a_good_call_is_taken(names):
    """The table's calls differ from this one by what they name and by nothing else."""
    COMPILED.clear()
    out, lse = names["call"](return_lse=True)
    assert out.shape == (2, 40, 4, 8)
    assert np.isfinite(out).all()
    assert np.isfinite(lse).all()
    assert COMPILED
    attended = names["ATTEND"](names["QUERY"], *[names["KEY"]] * 2)
    decoded = [names["step"](cache=names[cache])[0] for cache in ("CACHE", "ROWS")]
    combined = names["combine_partials"](names["OUTS"], names["LSES"])
    for good in (attended, names["LAYER"](names["X"]), *decoded, *combined):
        assert np.isfinite(good).all()


def test_the_reference_serves_what_the_kernels_do_not_where_nothing_is_asked_for(names):
    wide = {"query": names["ones"](2, 40, 4, 288), "key": names["ones"](2, 40, 2, 288)}
    chosen, reference = (names["call"](**wide, implementation=i) for i in (None, "reference"))
    np.testing.assert_array_equal(chosen, reference)


def test_float64_is_for_the_reference(names):
    cast = names["cast"]
    with jax.enable_x64(True):
        out = cast("float64")
        assert out.dtype == np.float64
        np.testing.assert_array_equal(out, cast("float64", implementation="reference"))
    np.testing.assert_allclose(out, cast("float32"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("number", [np.float32(0.5), np.array(0.5), jnp.bfloat16(0.5), 0.5])
def test_numbers_of_any_library_are_taken(number, names):
    query, key = names["QUERY"], names["KEY"]
    options = {"scale": number, "logits_soft_cap": number}
    expected = names["call"](scale=0.5, logits_soft_cap=0.5)
    np.testing.assert_array_equal(names["call"](**options), expected)
    adapter = s2_jax.attention_fn(names["PATTERN"], **options)
    assert hash(adapter) == hash(
        s2_jax.attention_fn(names["PATTERN"], scale=0.5, logits_soft_cap=0.5)
    )
    np.testing.assert_array_equal(adapter(query, key, key), expected)
