"""The drawing of a network: a column a layer, its size and names beneath, nothing clipped, nothing over another."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Polygon

from spec import recipe
from spec.datasets.sizes import Size, known_size
from spec.layers import layers
from spec.plots.network import FILL, network, stages
from spec.recipe import Recipe
from spec_tests.commands import changed
from spec_tests.tolerances import SOLVED

NO_FILE = Size(num_train=20, num_test=5, input_shape=(7,), input_dtype=np.dtype(np.float64), num_classes=3)
WIDE = Size(num_train=20, num_test=5, input_shape=(224, 160, 3), input_dtype=np.dtype(np.uint8), num_classes=4)


def drawn(of: Recipe, size: Size | None = None) -> Figure:
    return network(layers(of, size or known_size(of.data) or NO_FILE))


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts if text.get_text()]


def circles(figure: Figure) -> dict[float, list[Circle]]:
    """Return the units drawn by the place of their column, from left to right."""
    columns: dict[float, list[Circle]] = {}
    for patch in figure.axes[0].patches:
        if isinstance(patch, Circle):
            columns.setdefault(round(patch.center[0], 6), []).append(patch)
    return dict(sorted(columns.items()))


def num_lines(figure: Figure) -> list[int]:
    return [len(one.get_segments()) for one in figure.axes[0].collections if isinstance(one, LineCollection)]


def dotted(figure: Figure) -> list[float]:
    return [float(line.get_xdata()[0]) for line in figure.axes[0].lines]


def test_a_perceptron_is_columns_of_units_all_joined_to_all():
    figure = drawn(recipe.load("mlp128"))
    columns = circles(figure)
    assert [len(units) for units in columns.values()] == [12, 12, 10]
    assert num_lines(figure) == [12 * 12, 12 * 10]
    assert dotted(figure) == list(columns)[:2]
    assert texts(figure) == ["784", "input\n28x28x1 flattened", "128", "linear1\nrelu", "10", "linear2"]


def test_few_units_are_all_drawn_without_dots():
    figure = drawn(changed("breast-cancer", model={"hidden_sizes": [12]}))
    assert [len(units) for units in circles(figure).values()] == [12, 12, 1]
    assert len(dotted(figure)) == 1
    more = drawn(changed("breast-cancer", model={"hidden_sizes": [13]}))
    assert [len(units) for units in circles(more).values()] == [12, 12, 1]
    assert len(dotted(more)) == 2


def test_the_cnn_is_blocks_then_units_with_an_arrow_into_each_but_the_last_two():
    figure = drawn(recipe.load("cnn"))
    blocks = [patch for patch in figure.axes[0].patches if isinstance(patch, Polygon)]
    fronts = [np.ptp(patch.get_xy()[:, 1]) for patch in blocks[::3]]
    assert len(blocks) == 4 * 3
    assert np.array(fronts) / fronts[0] == pytest.approx([1, 14 / 28, 7 / 28, 3 / 28], rel=SOLVED)
    thickness = [np.ptp(patch.get_xy()[:, 0]) for patch in blocks[::3]]
    assert thickness == sorted(thickness)
    assert [len(units) for units in circles(figure).values()] == [12, 12, 10]
    assert num_lines(figure) == [12 * 12, 12 * 10]
    assert sum(text.arrow_patch is not None for text in figure.axes[0].texts if hasattr(text, "arrow_patch")) == 4
    assert texts(figure)[:4] == ["28x28x1", "input", "14x14x32", "conv1 3x3\nBatchNorm\nrelu\nmax-pool 2x2"]
    assert texts(figure)[6:10] == [
        "3x3x128",
        "conv3 3x3\nBatchNorm\nrelu\nmax-pool 2x2\nflatten: 1152",
        "512",
        "linear1\nBatchNorm\nrelu\ndropout 0.4",
    ]


@pytest.mark.parametrize("name", recipe.recipe_names())
def test_every_layer_is_named_once(name):
    of = recipe.load(name)
    listed = layers(of, known_size(of.data) or NO_FILE)
    written = [line for stage in stages(listed) for line in stage.lines]
    named = [layer.name for layer in listed if layer.flops is not None]
    assert [line.split()[0] for line in written if line.startswith(("linear", "conv"))] == named
    others = [layer.kind for layer in listed if layer.flops is None and layer.kind not in ("input", "flatten")]
    assert sorted(line for line in written if line in others) == sorted(others)


@pytest.mark.parametrize(
    ("of", "size"),
    [
        *((recipe.load(name), None) for name in recipe.recipe_names()),
        (recipe.load("cnn"), WIDE),
        (recipe.load("mlp128"), WIDE),
    ],
    ids=[*recipe.recipe_names(), "wide-cnn", "wide-mlp"],
)
def test_nothing_is_clipped_and_no_text_is_over_another(of, size):
    figure = drawn(of, size)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text()]
    boxes += [patch.get_window_extent() for patch in figure.axes[0].patches if isinstance(patch, Circle | Polygon)]
    for box in boxes:
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
    written = boxes[: len(texts(figure))]
    assert not [pair for pair in itertools.combinations(written, 2) if pair[0].overlaps(pair[1])]


def test_the_kinds_are_told_apart_in_grey_print():
    shades = sorted(np.dot(to_rgb(colour), (0.299, 0.587, 0.114)) for role, colour in FILL.items() if role != "conv")
    assert min(np.diff(shades)) > 0.1  # a convolution is a block, and so is its input, which comes first


def test_pyplot_is_not_needed(monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    drawn(recipe.load("softmax-regression"))
    assert "matplotlib.pyplot" not in sys.modules
