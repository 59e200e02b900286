"""What a picture shows, read back from the figure."""

import builtins
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

import s2_jax
from s2_jax.plotting import plot_pattern

PATTERN = s2_jax.local_stride(1, 2, block_size=16)
AFTER, HIDDEN, VISIBLE = 0, 1, 2


def panels(figure):
    return [axes for axes in figure.axes if axes.get_title()]


def values(panel):
    return panel.collections[0].get_array()


def titles(figure):
    return [panel.get_title() for panel in panels(figure)]


def test_one_panel_a_head_and_one_for_all():
    figure = plot_pattern(PATTERN, num_heads=2, length=61)
    assert isinstance(figure, Figure)
    assert titles(figure) == [
        "head 0\n80% of blocks",
        "head 1\n60% of blocks",
        "all 2 heads\n100% of blocks",
    ]


def test_blocks_are_visible_hidden_or_after_the_query():
    head_0, head_1, together = panels(plot_pattern(PATTERN, num_heads=2, length=48))
    np.testing.assert_array_equal(
        values(head_0),
        [[VISIBLE, AFTER, AFTER], [VISIBLE, VISIBLE, AFTER], [VISIBLE, HIDDEN, VISIBLE]],
    )
    np.testing.assert_array_equal(
        values(head_1),
        [[VISIBLE, AFTER, AFTER], [HIDDEN, VISIBLE, AFTER], [HIDDEN, VISIBLE, VISIBLE]],
    )
    count = values(together)
    np.testing.assert_array_equal(count.filled(-1), [[2, -1, -1], [1, 2, -1], [1, 1, 2]])


def test_block_0_0_is_at_the_top_left():
    panel = panels(plot_pattern(PATTERN, num_heads=2, length=80, kv_length=112))[0]
    assert panel.get_xlim() == (0, 7)
    assert panel.get_ylim() == (5, 0)


def test_nothing_is_after_the_query_of_a_bidirectional_pattern():
    pattern = s2_jax.local(1, block_size=16, causal=False)
    head, together = panels(plot_pattern(pattern, num_heads=1, length=32, kv_length=48))
    np.testing.assert_array_equal(
        values(head), [[VISIBLE, HIDDEN, HIDDEN], [HIDDEN, VISIBLE, HIDDEN]]
    )
    assert not np.ma.getmaskarray(values(together)).any()


def test_heads_to_draw():
    figure = plot_pattern(PATTERN, num_heads=11, num_kv_heads=11, length=80, heads=[7, 2])
    assert [title.split("\n")[0] for title in titles(figure)] == [
        "head 7",
        "head 2",
        "all 11 heads",
    ]


def test_at_most_eight_heads_by_default():
    assert len(panels(plot_pattern(PATTERN, num_heads=11, length=80))) == 8 + 1


def test_grouped_heads():
    mesh = [
        values(panel)
        for panel in panels(plot_pattern(PATTERN, num_heads=4, num_kv_heads=2, length=80))
    ]
    np.testing.assert_array_equal(mesh[0], mesh[1])
    np.testing.assert_array_equal(mesh[2], mesh[3])
    assert (mesh[0] != mesh[2]).any()


def test_saves_without_pyplot_or_display(tmp_path):
    plot_pattern(PATTERN, num_heads=3, length=80).savefig(tmp_path / "heads.png")
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"heads": [2]}, r"heads=\(2,\)", id="no such head"),
        pytest.param({"heads": []}, r"heads=\(\)", id="no heads"),
        pytest.param({"length": 0}, "length=0", id="no queries"),
        pytest.param({"kv_length": 0}, "kv_length=0", id="no keys"),
        pytest.param({"num_kv_heads": 3}, "num_kv_heads=3", id="groups"),
    ],
)
def test_bad_calls(options, message):
    with pytest.raises(ValueError, match=message):
        plot_pattern(PATTERN, **{"num_heads": 2, "length": 80, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": 3}, "pattern must be a pattern, got int"),
        ({"num_heads": 2.0}, "num_heads=2.0 must be an integer"),
        ({"num_heads": True}, "num_heads=True must be an integer"),
        ({"length": "80"}, "length='80' must be an integer"),
        ({"heads": ["a"]}, "heads='a' must be an integer"),
    ],
)
def test_what_is_no_number(options, message):
    with pytest.raises(TypeError, match=message):
        plot_pattern(**{"pattern": PATTERN, "num_heads": 2, "length": 80, **options})


def test_names_the_extra_where_matplotlib_is_missing(monkeypatch):
    real_import = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match=r"s2-jax\[plot\]"):
        plot_pattern(PATTERN, num_heads=2, length=80)
