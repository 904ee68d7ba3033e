"""`python -m jax_impl.plot`: pictures of the run's own numbers, files that open, and runs that cannot be drawn."""

from __future__ import annotations

import colorsys
import itertools
import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from jax_impl import evaluate, plot
from spec import params, recipe
from spec.datasets import Split
from spec.datasets.sizes import known_size
from spec.plots import command, confusion, filters, predictions, style, terminal
from spec.plots.curves import Curve, learning_curves
from spec.run import metrics
from spec.run.run_directory import METRICS, WEIGHTS
from spec_tests.commands import call
from spec_tests.conftest import Ended

NAMES = ("shirt", "coat", "bag")
PICTURES = ("curves", "confusion", "classes", "network", "first_layer", "predictions", "mistakes")


def epoch(number: int, loss: float, *, tested: bool = True) -> dict[str, float | None]:
    test = {"test_loss": loss + 0.5, "test_accuracy": 0.5 + 0.1 * number} if tested else dict.fromkeys(TESTED)
    return {"epoch": number, "train_loss": loss, "train_accuracy": 0.1 * number, **test}


INSTALLED = style.CHINESE  # as it is before a test takes them away
TESTED = ("test_loss", "test_accuracy")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two short runs of the digits, of either framework, and a binary one without a test split."""
    import jax_impl.train
    import torch_ref.train

    folder = tmp_path_factory.mktemp("runs")
    for main, name, *more in (
        (jax_impl.train.main, "jax", "--recipe", "digits"),
        (torch_ref.train.main, "torch", "--recipe", "digits"),
        (jax_impl.train.main, "binary", "--recipe", "breast-cancer"),
    ):
        ended = call(main, *more, "--epochs", "2", "--checkpoint-every", "never", "--quiet", "--out", folder / name)
        assert ended.status == 0, ended.err
    return folder


@pytest.fixture
def run(runs, tmp_path) -> Path:
    return Path(shutil.copytree(runs / "jax", tmp_path / "run"))


def drawn(*arguments: object) -> Ended:
    return call(plot.main, *arguments)


def test_curves_are_the_figures_of_each_epoch_and_of_single_batches():
    lines = [
        {"step": 1, "examples_seen": 5, "examples": 20, "batch_loss": 3.0},
        {"step": 2, "examples_seen": 15, "examples": 20, "batch_loss": None},
    ]
    curve = Curve(label="a", planned=2, epochs=[epoch(1, 2.0), epoch(2, 1.0)], progress=lines)
    loss, accuracy = learning_curves([curve]).axes
    found = {line.get_label(): line.get_xydata().tolist() for line in (*loss.lines, *accuracy.lines[:0])}
    assert found == {
        "train: a": [[1, 2.0], [2, 1.0]],
        "test: a": [[1, 2.5], [2, 1.5]],
        "single batches": [[0.5, 3.0]],
    }
    assert [line.get_ydata().tolist() for line in accuracy.lines] == [[0.1, 0.2], [0.6, 0.7]]


def test_a_split_without_figures_has_no_curve_and_a_step_without_one_a_gap():
    epochs = [epoch(1, 2.0, tested=False), epoch(2, 1.0, tested=False) | {"train_loss": None}]
    (line,) = learning_curves([Curve(label="a", planned=2, epochs=epochs)]).axes[0].lines
    assert np.array_equal(line.get_ydata(), [2.0, np.nan], equal_nan=True)


def test_several_runs_differ_in_colour_and_in_marker_and_splits_in_dashes():
    curves = [Curve(label=name, planned=1, epochs=[epoch(1, 1.0)]) for name in "ab"]
    lines = learning_curves(curves).axes[0].lines
    looks = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines]
    assert looks == [
        (style.BLUE, "o", "--"),
        (style.BLUE, "o", "-"),
        (style.VERMILION, "s", "--"),
        (style.VERMILION, "s", "-"),
    ]


def test_of_runs_that_are_equal_each_shows_under_the_next():
    curves = [Curve(label=name, planned=2, epochs=[epoch(1, 1.0), epoch(2, 0.5)]) for name in "abc"]
    for axes in learning_curves(curves).axes:
        by_run = [axes.lines[2 * run : 2 * run + 2] for run in range(3)]
        for below, above in itertools.pairwise(by_run):
            for under, over in zip(below, above, strict=True):  # of each split; what is drawn later lies on top
                assert np.array_equal(under.get_xydata(), over.get_xydata())
                assert under.get_linewidth() > over.get_linewidth() + 1
                assert under.get_markersize() > over.get_markersize() + 1
    (alone, _) = learning_curves(curves[:1]).axes[0].lines
    assert (alone.get_linewidth(), alone.get_markersize()) == (1.5, 5)


def drawn_inside(picture: Figure) -> bool:
    """Say whether all that is drawn of a figure is within its edges."""
    for _ in style.FORMATS:  # each is drawn, and may lie elsewhere the second time
        FigureCanvasAgg(picture).draw()
        box, (width, height) = picture.get_tightbbox(), picture.get_size_inches()
        if min(box.x0, box.y0) < 0 or box.x1 > width or box.y1 > height:
            return False
    return True


def test_what_is_outside_a_figure_is_noticed():
    picture = style.figure(2, 2)
    picture.text(0.9, 0.5, "too long for this place")
    assert not drawn_inside(picture)


@pytest.mark.parametrize("number", [1, 2, 10, 30])
def test_the_legend_of_many_runs_with_long_names_is_within_the_figure_and_leaves_the_curves_room(number):
    name = "mnist-mlp256-logits, torch, seed 0 (experiments/of/the/last/month/at/night/mnist-mlp256-logits-{})"
    curves = [Curve(label=name.format(index), planned=1, epochs=[epoch(1, 1.0)]) for index in range(number)]
    picture = learning_curves(curves)
    assert drawn_inside(picture)
    assert all(axes.get_window_extent().height > 2.5 * style.DPI for axes in picture.axes)
    (legend,) = picture.legends
    assert len(legend.get_texts()) == (number + 2 if number > 1 else 2)


def test_batches_stand_where_they_were_taken_in_a_run_that_was_given_more_epochs():
    lines = [
        {"step": 1, "examples_seen": 5, "examples": 10, "batch_loss": 3.0},
        {"step": 3, "examples_seen": 15, "examples": 20, "batch_loss": 2.0},
    ]
    loss = learning_curves([Curve(label="a", planned=2, epochs=[epoch(1, 2.0)], progress=lines)]).axes[0]
    assert loss.lines[-1].get_xydata().tolist() == [[0.5, 3.0], [1.5, 2.0]]


def test_the_axis_is_of_all_epochs_that_the_run_is_to_have():
    picture = learning_curves([Curve(label="a", planned=8, epochs=[epoch(1, 1.0)])])
    assert [axes.get_xlim() for axes in picture.axes] == [(0, 8 * 1.04)] * 2


def test_a_run_whose_first_epoch_has_not_ended_says_so_and_whose_it_is():
    lines = [{"step": 1, "examples_seen": 5, "examples": 20, "batch_loss": 3.0}]
    picture = learning_curves([Curve(label="a", planned=2, epochs=[], progress=lines)])
    assert [[text.get_text() for text in axes.texts] for axes in picture.axes] == [[], ["no epoch has ended yet"]]
    assert [text.get_text() for text in picture.legends[0].get_texts()] == ["single batches: a"]


@pytest.mark.parametrize(("losses", "scale"), [((900.0, 1.0), "linear"), ((1e19, 1e6), "log")])
def test_losses_of_a_run_that_diverged_are_by_powers_of_ten(losses, scale):
    epochs = [epoch(number, loss) for number, loss in enumerate(losses, start=1)]
    loss, accuracy = learning_curves([Curve(label="a", planned=2, epochs=epochs)]).axes
    assert (loss.get_yscale(), accuracy.get_yscale()) == (scale, "linear")


def test_one_epoch_is_on_an_axis_of_whole_numbers():
    picture = learning_curves([Curve(label="a", planned=1, epochs=[epoch(1, 1.0)])])
    for axes in picture.axes:
        lowest, highest = axes.get_xlim()
        assert [place for place in axes.get_xticks() if lowest <= place <= highest] == [0, 1]


@pytest.mark.parametrize("number", [2, 10, 20, 60])
def test_the_pictures_of_classes_have_room_for_their_titles_and_names(number):
    names = [f"a class of examples with a long name, number {index}" for index in range(number)]
    title = "breast-cancer, trained by torch: accuracy 0.9859 on 10,000 training examples"
    matrix = np.eye(number, dtype=int)
    matrix[0, -1] = 1
    for draw in (confusion.confusion, confusion.classes):
        picture = draw(matrix, names, title=title)
        assert drawn_inside(picture), draw.__name__
        assert len(picture.axes[0].get_yticklabels()) <= confusion.MOST_NAMED
        assert picture.get_suptitle().replace("\n", " ").startswith(title)


def test_captions_do_not_lie_over_one_another():
    chances = np.tile([1.0, 0.0], (20, 1))
    names = ("a class of a long name", "another, longer one still")
    picture = predictions.grid(np.zeros((20, 4, 4, 1)), np.ones(20, int), names, chances, title="a title")
    assert drawn_inside(picture)
    boxes = [axes.title.get_window_extent() for axes in picture.axes]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes[:10]))
    frames = [axes.get_window_extent() for axes in picture.axes]
    assert all(below.y1 < above.y0 for above, below in zip(frames[:10], boxes[10:], strict=True))


def test_a_dollar_in_a_name_is_a_dollar(tmp_path):
    picture = confusion.confusion(np.eye(2, dtype=int), ["$5 to $10", "$\\oops$"])
    style.save(picture, tmp_path, "classes", ["svg"])
    assert "$5 to $10 $\\oops$" in words(tmp_path / "classes.svg")


def test_no_two_runs_of_49_look_the_same():
    looks = {tuple(style.look(index).values()) for index in range(49)}
    assert len(looks) == 49
    assert len({style.look(index)["marker"] for index in range(7)}) == 7  # told apart in grey print too


def test_right_and_wrong_differ_in_lightness_and_not_by_red_against_green():
    def lightness(colour: str) -> float:
        return colorsys.rgb_to_hls(*(int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)))[1]

    assert abs(lightness(style.RIGHT) - lightness(style.WRONG)) > 0.05
    blue, red = (int(style.RIGHT[5:], 16), int(style.WRONG[5:], 16))
    assert blue - red > 100  # the blue channel is what the red-green blind see


def test_the_matrix_is_by_rows_and_a_class_without_examples_is_left_white():
    matrix = confusion.counts(np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 0, 1, 0, 0]), 3)
    assert matrix.tolist() == [[3, 1, 0], [2, 0, 0], [0, 0, 0]]
    axes = confusion.confusion(matrix, NAMES).axes[0]
    assert [text.get_text() for text in axes.texts] == ["75.0", "25.0", "", "100.0", "", "", "", "", ""]
    dark, light = axes.images[0].cmap([1.0, 0.25])[:, :3].sum(axis=1)
    assert dark < 1.5 < light
    colours = {text.get_text(): text.get_color() for text in axes.texts}
    assert (colours["100.0"], colours["75.0"], colours["25.0"]) == ("white", "white", "black")
    assert np.isnan(axes.images[0].get_array().filled(np.nan)[2]).all()
    assert [label.get_text() for label in axes.get_yticklabels()] == list(NAMES)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")


def test_precision_recall_and_f1_are_those_of_the_matrix():
    found = confusion.by_class(np.array([[3, 1, 0], [2, 4, 0], [0, 0, 0]]))
    assert found["precision"].tolist()[:2] == [3 / 5, 4 / 5]
    assert found["recall"].tolist()[:2] == [3 / 4, 4 / 6]
    assert found["F1"].tolist()[:2] == [6 / 9, 8 / 11]
    assert all(np.isnan(found[name][2]) for name in ("precision", "recall", "F1"))
    assert confusion.rows(np.array([[3, 1], [0, 0]]), NAMES[:2]) == [
        ("shirt", "4", "3", "1.0000", "0.7500", "0.8571"),
        ("coat", "0", "0", "0.0000", "-", "0.0000"),
    ]


def test_each_class_has_its_three_figures_on_a_line_from_precision_to_recall():
    axes = confusion.classes(np.array([[3, 1], [2, 4]]), NAMES[:2]).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["coat", "shirt"]  # from below
    assert {line.get_label(): line.get_xydata().tolist() for line in axes.lines} == {
        "precision": [[4 / 5, 0], [3 / 5, 1]],
        "recall": [[4 / 6, 0], [3 / 4, 1]],
        "F1": [[8 / 11, 0], [6 / 9, 1]],
    }
    (joined,) = axes.collections
    assert [path.vertices.tolist() for path in joined.get_paths()] == [
        [[4 / 5, 0], [4 / 6, 0]],
        [[3 / 5, 1], [3 / 4, 1]],
    ]


def test_the_class_that_is_worst_is_at_the_top():
    axes = confusion.classes(np.array([[9, 1, 0], [0, 10, 0], [5, 0, 5]]), NAMES).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()][::-1] == ["bag", "shirt", "coat"]


def test_a_grid_marks_what_is_wrong_by_a_cross_a_colour_and_a_thick_frame():
    images = np.arange(2 * 4 * 4).reshape(2, 4, 4, 1)
    chances = np.array([[0.25, 0.75, 0], [0.9, 0.1, 0]])
    right, wrong, *empty = predictions.grid(images, np.array([1, 2]), NAMES, chances).axes
    assert (right.get_title(), wrong.get_title()) == ("✓ coat 75.0%", "✗ shirt 90.0%\nis bag")
    assert right.title.get_color() == style.RIGHT
    assert wrong.title.get_color() == style.WRONG
    assert wrong.spines["top"].get_linewidth() > right.spines["top"].get_linewidth()
    shown = right.images[0]
    assert shown.get_array()[[0, -1], [0, -1]].tolist() == [0, 1]
    assert shown.to_rgba([[0.0, 1.0]])[0, :, 0].tolist() == [1, 0]  # ink on paper
    assert not any(axes.axison for axes in empty)


def test_the_most_certain_mistakes_are_the_surest_of_all_not_the_first():
    taken = np.array([0.6, 0.9, 0.7, 0.8, 0.99])  # for class 0, of which only the last is
    found = predictions.most_certain_mistakes(np.stack([taken, 1 - taken], 1), np.array([1, 1, 1, 1, 0]), number=2)
    assert found.tolist() == [1, 3]


def test_without_probabilities_a_grid_shows_labels_alone():
    assert predictions.grid(np.zeros((1, 4, 4, 3)), np.array([2]), NAMES).axes[0].get_title() == "bag"


@pytest.mark.parametrize("name", ["mlp128", "cnn", "breast-cancer"])
def test_the_first_layer_is_drawn_in_the_layout_of_the_images(name):
    of = recipe.load(name)
    shape = (30,) if name == "breast-cancer" else (28, 28, 1)
    leaves = params.leaves(of.model, shape, 10)
    leaf = leaves[0]
    weight = np.random.default_rng(0).normal(size=leaf.shape)
    (image,) = filters.first_layer(leaves, {leaf.name: weight}).axes[0].images
    shown = image.get_array().filled(np.nan)
    unit = {"mlp128": lambda: weight[1].reshape(28, 28), "cnn": lambda: weight[1, 0], "breast-cancer": lambda: None}[
        name
    ]()
    if unit is None:
        assert np.array_equal(shown, weight)
    else:
        side = len(unit)
        assert np.array_equal(shown[:side, side + 1 : 2 * side + 1], unit)
        assert np.isnan(shown[:side, side]).all()
        gap = image.to_rgba(np.ma.masked_invalid(shown))[0, side]
        assert gap.tolist() == [0.8, 0.8, 0.8, 1]  # grey, which no weight is
    lowest, highest = image.get_clim()
    assert lowest == -highest == -np.nanmax(np.abs(shown))
    negative, zero, positive = image.to_rgba([[lowest, 0.0, highest]])[0, :, :3]
    assert negative[0] > negative[2] + 0.2  # red
    assert positive[2] > positive[0] + 0.2  # blue: not the green that the red-green blind take for red
    assert positive[2] > positive[1] + 0.1
    assert zero.min() > 0.95


def test_every_picture_of_a_run_opens_and_its_svg_has_its_words(run):
    ended = drawn(run)
    assert (ended.status, ended.err) == (0, "")
    for name in PICTURES:
        with Image.open(run / "plots" / f"{name}.png") as image:
            assert image.size[0] > 500
            assert len(np.unique(np.asarray(image.convert("L")))) > 10, name  # it is not blank
        ElementTree.parse(run / "plots" / f"{name}.svg")
        assert str(run / "plots" / f"{name}.svg") in ended.out
    assert ">predicted<" in (run / "plots" / "confusion.svg").read_text("utf-8").replace(" ", "")
    examples = [line.split() for line in ended.out.splitlines() if line[:2] in {f"{digit} " for digit in range(10)}]
    summary = json.loads((run / "summary.json").read_text())
    right, total = (sum(int(row[place]) for row in examples) for place in (2, 1))
    assert right / total == summary["test_accuracy"]


def test_the_same_run_gives_the_same_bytes(run, tmp_path):
    for folder in ("one", "two"):
        assert drawn(run, "--out", tmp_path / folder).status == 0
    for name in PICTURES:
        for kind in style.FORMATS:
            file = f"{name}.{kind}"
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_several_runs_share_their_curves_and_have_the_rest_for_themselves(runs, tmp_path):
    ended = drawn(runs / "jax", runs / "torch", "--out", tmp_path / "out", "--format", "png")
    assert ended.status == 0, ended.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["curves.png", "jax", "torch"]
    assert (tmp_path / "out" / "torch" / "mistakes.png").exists()
    found = [[of["test_accuracy"] for of in metrics.read(runs / name).epochs] for name in ("jax", "torch")]
    most = max(abs(one - other) for one, other in zip(*found, strict=True))
    assert f"test accuracies part by {most:.4f} at most" in ended.out


def test_runs_part_by_the_widest_of_the_epochs_that_all_have():
    def curve(*accuracies: float | None) -> Curve:
        epochs = [epoch(number, 1.0) | {"test_accuracy": of} for number, of in enumerate(accuracies, start=1)]
        return Curve(label="", planned=4, epochs=epochs)

    three = [curve(0.5, 0.25, 0.75), curve(0.5, 0.5, 0.75, 1.0), curve(0.625, 0.625, 0.75, 0.0)]
    assert command.parting(three) == "test accuracies part by 0.3750 at most, after epoch 2 of 3"
    assert command.parting(three[1:]) == "test accuracies part by 1.0000 at most, after epoch 4 of 4"
    for nothing in (curve(), curve(0.5, None, 0.5)):
        assert command.parting([three[0], nothing]) == "the runs have no epoch with a test accuracy in common"


def test_runs_whose_folders_have_one_name_do_not_overwrite_each_others_pictures(runs, tmp_path):
    for place, name in (("one", "jax"), ("two", "torch")):
        shutil.copytree(runs / name, tmp_path / place / "run")
    given = (tmp_path / "one" / "run", tmp_path / "two" / "run")
    ended = drawn(*given, "--out", tmp_path / "out", "--format", "svg")
    assert ended.status == 0, ended.err
    for folder, framework in (("run", "jax"), ("run-2", "torch")):
        assert f"trained by {framework}" in words(tmp_path / "out" / folder / "confusion.svg")


def words(svg: Path) -> str:
    texts = [element for element in ElementTree.parse(svg).iter() if element.tag.endswith("}text")]
    return " ".join(" ".join(text.itertext()) for text in texts)


def test_every_picture_says_who_trained_the_run_and_the_figures_of_which_split_they_are(runs, tmp_path):
    for split, said in (("test", "359 test examples"), ("train", "1,438 training examples")):
        folder = tmp_path / split
        assert drawn(runs / "torch", "--split", split, "--out", folder, "--format", "svg").status == 0
        for name in set(PICTURES) - {"curves", "network"}:
            assert "digits, trained by torch" in words(folder / f"{name}.svg"), name
        assert said in words(folder / "confusion.svg")
        assert said in words(folder / "classes.svg")


def test_a_binary_table_without_a_test_split_is_asked_about_what_it_was_trained_on(runs, tmp_path):
    ended = drawn(runs / "binary", "--out", tmp_path)
    assert ended.status == 0, ended.err
    assert "its network is asked about the training split" in ended.out
    assert "its examples are no images, so there are no grids of them" in ended.out
    right = sum(int(line.split()[2]) for line in ended.out.splitlines() if line.startswith(("malignant", "benign")))
    assert call(evaluate.main, runs / "binary", "--split", "train", "--json", tmp_path / "figures.json").status == 0
    assert right / 569 == json.loads((tmp_path / "figures.json").read_text())["accuracy"]
    assert not (tmp_path / "mistakes.png").exists()
    assert drawn(runs / "binary", "--split", "test", "--out", tmp_path).status == 2


class Kept(command.Album):
    """Keeps the pictures of a run by their names, and writes none."""

    def __init__(self, run: Path) -> None:
        super().__init__(command.Flags(runs=(run,)))
        self.pictures: dict[str, Figure] = {}

    def add(self, folder: Path, name: str, picture: Figure) -> None:
        """Keep one."""
        self.pictures[name] = picture


def test_single_batches_are_drawn_where_they_were_taken_between_the_start_and_the_last_epoch(run):
    of, album = metrics.read(run), Kept(run)
    command.draw_curves(album, [of])
    found = {line.get_label(): line.get_xdata().tolist() for line in album.pictures["curves"].axes[0].lines}
    taken = [line["step"] / of.epochs[0]["step"] for line in of.progress]
    assert found["single batches"] == pytest.approx(taken, abs=1 / of.epochs[0]["step"])  # a last batch is smaller
    assert found["single batches"][-1] == of.epochs[-1]["epoch"] == 2


def test_the_captions_of_the_mistakes_stand_over_their_own_images(run, capsys):
    of, album = metrics.read(run), Kept(run)
    images = np.eye(64)[:40].reshape(40, 8, 8, 1)  # the k-th is black at its k-th pixel
    labels = np.zeros(40, int)
    logits = 9 * np.eye(10)[labels]
    sureness = {35: 3.0, 5: 1.0, 31: 2.0}
    for index, logit in sureness.items():
        logits[index] = logit * np.eye(10)[index % 10]
    about = command.Asked("test", Split(images, labels), tuple("abcdefghij"), known_size(of.recipe.data))
    state = {"linear1.weight": np.ones((64, 64))}
    command.draw_predictions(album, of, about, state, logits)
    for name, expected in (("mistakes", [35, 31, 5]), ("predictions", range(30))):
        shown = [axes for axes in album.pictures[name].axes if axes.images]
        assert [int(axes.images[0].get_array().argmax()) for axes in shown] == list(expected)
        taken = ["abcdefghij"[index % 10 if index in sureness else 0] for index in expected]
        assert [axes.get_title().split()[1] for axes in shown] == taken
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["a", "40", "37"]


def test_an_unfinished_run_has_its_curves_and_a_line_says_what_is_left_out(run):
    (run / WEIGHTS).unlink()
    (run / "summary.json").unlink()
    with (run / METRICS).open("a") as file:
        file.write('{"event": "progress", "epo')
    ended = drawn(run)
    assert ended.status == 0
    assert f"{run} has no weights.safetensors (it is unfinished): its curves are all there is to draw" in ended.out
    assert "the last line of its metrics.jsonl was cut short, and is left out" in ended.out
    assert {path.stem for path in (run / "plots").iterdir()} == {"curves"}


def test_a_finished_run_whose_metrics_end_early_says_so(run):
    lines = (run / METRICS).read_text().splitlines(keepends=True)
    last = next(index for index, line in enumerate(lines) if '"event": "epoch"' in line)
    (run / METRICS).write_text("".join(lines[: last + 1]))
    ended = drawn(run, "--format", "png")
    assert ended.status == 0
    epochs = json.loads((run / "config.json").read_text())["recipe"]["epochs"]
    assert epochs > 1
    assert f"its weights are of epoch {epochs}, its metrics.jsonl ends with epoch 1, and so do its curves" in ended.out


def test_a_framework_that_is_no_word_is_unknown(run):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"framework": ["jax"]}))
    ended = drawn(run, "--format", "svg")
    assert ended.status == 0, ended.err
    assert "trained by unknown" in words(run / "plots" / "confusion.svg")


def test_chinese_has_a_font_where_one_is_installed_and_a_line_where_none_is(tmp_path, monkeypatch, capsys):
    def said(fonts: tuple[str, ...]) -> tuple[bytes, str]:
        monkeypatch.setattr(style, "CHINESE", fonts)
        picture = style.figure(2, 1)
        picture.suptitle("中文 a")
        (path,) = style.save(picture, tmp_path, "名", ["png"])
        return path.read_bytes(), capsys.readouterr().out

    boxes, line = said(())
    assert line == "名: no font here has 中 文; install one (Noto Sans CJK), or open the SVG elsewhere\n"
    there = {font.name for font in font_manager.fontManager.ttflist} & set(INSTALLED)
    if not there:
        pytest.skip("no font for Chinese is installed")
    letters, line = said(tuple(there))
    assert line == ""
    assert letters != boxes


def line(run: Path, text: str) -> None:
    (run / METRICS).write_text(text + "\n")


DAMAGES = {
    "no metrics": (lambda run: (run / METRICS).unlink(), "has no metrics.jsonl, where its figures would be"),
    "nothing recorded": (
        lambda run: (run / METRICS).write_text(""),
        "is finished, and its metrics.jsonl holds nothing",
    ),
    "cut in its first line": (
        lambda run: (run / METRICS).write_text('{"ev'),
        "is finished, and its metrics.jsonl holds",
    ),
    "no JSON": (lambda run: line(run, "{]"), "metrics.jsonl, line 1: that is no JSON"),
    "no table": (lambda run: line(run, "[1]"), "line 1: that is no event of this version"),
    "another event": (lambda run: line(run, '{"event": "dream"}'), "line 1: that is no event of this version"),
    "a field less": (lambda run: line(run, '{"event": "epoch", "epoch": 1}'), "line 1: the event has no train_loss"),
    "a word for a number": (
        lambda run: line(run, json.dumps({"event": "epoch", **epoch(1, 1.0), "test_loss": "low"})),
        "line 1: the event says test_loss 'low', no finite number",
    ),
    "no number": (
        lambda run: line(run, json.dumps({"event": "epoch", **epoch(1, float("nan"))})),
        "line 1: the event says train_loss nan, no finite number",
    ),
    "a number without end": (
        lambda run: line(run, json.dumps({"event": "epoch", **epoch(1, 1.0), "test_loss": 10**400})),
        "000, no finite number",
    ),
    "examples of none": (
        lambda run: line(run, '{"event": "progress", "step": 1, "examples_seen": 1, "examples": 0, "batch_loss": 1}'),
        "line 1: the event says examples 0, no whole number from 1",
    ),
    "no epoch": (
        lambda run: line(run, json.dumps({"event": "epoch", **epoch(1, 1.0), "epoch": None})),
        "line 1: the event says epoch None, no whole number from 1",
    ),
    "an epoch twice": (
        lambda run: line(run, "\n".join([json.dumps({"event": "epoch", **epoch(1, 1.0)})] * 2)),
        "line 2: epoch 1 where epoch 2 should be; put back a good copy",
    ),
    "more epochs than there are": (
        lambda run: line(run, "\n".join(json.dumps({"event": "epoch", **epoch(n, 1.0)}) for n in range(1, 9))),
        "line 3: epoch 3 of a run of 2; put back a good copy",
    ),
    "more examples than there are": (
        lambda run: line(run, '{"event": "progress", "step": 1, "examples_seen": 9, "examples": 8, "batch_loss": 1}'),
        "line 1: 9 examples seen of 8; put back a good copy",
    ),
    "an empty config": (
        lambda run: (run / "config.json").write_text(""),
        "config.json cannot be read: Expecting value: line 1 column 1 (char 0); put back a good copy",
    ),
    "a folder of runs": (
        lambda run: shutil.move(shutil.copytree(run, run.with_name("seed-0")), shutil.rmtree(run) or run / "seed-0"),
        "is no run, but holds",
    ),
    "no config": (lambda run: (run / "config.json").unlink(), "is no run directory: it has no config.json"),
    "a config of another version": (
        lambda run: (run / "config.json").write_text('{"recipe": {"name": "x", "unheard": 1}}'),
        "config.json",
    ),
    "damaged weights": (lambda run: (run / WEIGHTS).write_bytes(b"0" * 99), "is damaged: its sha256 is"),
    "no directory": (shutil.rmtree, "does not exist; name a run's directory"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_that_cannot_be_drawn_is_refused_with_a_line(damage, run):
    change, said = DAMAGES[damage]
    change(run)
    ended = drawn(run)
    assert ended.status == 2
    assert ended.err.startswith("error: ")
    assert said in ended.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no run is named"),
        (["RUN", "RUN"], "is named twice"),
        (["RUN", "--data-dir", "nowhere"], "digits reads no idx files"),
        (["RUN", "--format", "gif"], "gif"),
        (["RUN", "--out", "FILE/x"], "cannot be written"),
    ],
)
def test_flags_that_cannot_be_followed_are_refused(arguments, said, run, tmp_path):
    (tmp_path / "file").write_text("")
    places = {"RUN": str(run), "FILE/x": str(tmp_path / "file" / "x")}
    ended = drawn(*(places.get(argument, argument) for argument in arguments))
    assert ended.status == 2
    assert said in ended.err


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(style, "write_atomic", full)
    with pytest.raises(command.UserError, match=r"curves.png cannot be written \(No space left on device\)"):
        style.save(style.figure(2, 2), tmp_path, "curves")
    assert list(tmp_path.iterdir()) == []


def test_in_a_terminal_that_shows_no_pictures_all_are_written_and_that_is_said(run):
    ended = drawn(run, "--show", "--format", "png")
    assert ended.status == 2
    assert ended.err.startswith("error: --show: this is no terminal that shows pictures")
    assert len(ended.err.splitlines()) == 1
    assert {path.name for path in (run / "plots").iterdir()} == {f"{name}.png" for name in PICTURES}


def test_in_a_terminal_that_can_every_picture_is_shown(run, monkeypatch):
    shown = []
    monkeypatch.setattr(terminal, "show", lambda path: shown.append(path.name) or path.exists())
    assert drawn(run, "--show", "--format", "svg").status == 0
    assert shown == [f"{name}.png" for name in PICTURES]


def test_what_a_terminal_is_sent_holds_the_file():
    import base64
    import re

    png = bytes(range(256)) * 40
    pieces = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", terminal.encoded(png, "kitty"))
    assert base64.b64decode("".join(piece for _, piece in pieces)) == png
    assert [control for control, _ in pieces] == ["a=T,f=100,m=1", *["m=1"] * (len(pieces) - 2), "m=0"]
    assert all(len(piece) <= terminal.CHUNK for _, piece in pieces)
    (whole,) = re.findall(r"\x1b\]1337;File=inline=1;size=10240:(.*)\a", terminal.encoded(png, "iterm"))
    assert base64.b64decode(whole) == png


def test_a_run_that_is_replaced_loses_its_pictures(run, trainer_command):
    assert drawn(run).status == 0
    ended = trainer_command("--recipe", "digits", "--epochs", "1", "--quiet", "--overwrite", "--out", run)
    assert ended.status == 0, ended.err
    assert not (run / "plots").exists()
