"""A run put to use: evaluated by either framework, and shown pictures."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import jax_impl.evaluate
import jax_impl.predict
import torch_ref.evaluate
from spec import conversion, datasets, recipe, weights
from spec.datasets.sizes import known_size
from spec.errors import DataError
from spec.inference import evaluation, images, prediction
from spec.recipe import Data, Recipe
from spec.run import run_reader
from spec_tests.assertions import assert_within
from spec_tests.commands import call, changed, made_run
from spec_tests.conftest import FRAMEWORKS, idx_bytes
from spec_tests.tolerances import chain_bound

EVALUATE = {"jax": jax_impl.evaluate.main, "torch": torch_ref.evaluate.main}
DIGITS = Data(name="digits", test_fraction=0.2, seed=0)
GREY = images.Target(shape=(28, 28, 1), black=0, white=255, dtype=np.dtype(np.uint8), light_background=False)
MADE_UP = {"name": "map_style", "path": "spec_tests.conftest:MadeUpImages", "test_fraction": 0.2, "seed": 0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Return a short run of the digits by each framework."""
    folder = tmp_path_factory.mktemp("runs")
    for framework, main in FRAMEWORKS.items():
        ended = call(main, "--recipe", "digits", "--epochs", 4, "--quiet", "--out", folder / framework)
        assert ended.status == 0, ended.err
    return {framework: folder / framework for framework in FRAMEWORKS}


@pytest.fixture
def run(runs, tmp_path) -> Path:
    """Return a copy of JAX's run, to be damaged."""
    return Path(shutil.copytree(runs["jax"], tmp_path / "run"))


def logits_of(run: Path, inputs: np.ndarray) -> np.ndarray:
    """Return the digits network's logits by NumPy, float64."""
    state = {name: array.astype(np.float64) for name, array in run_reader.read(run).found.items()}
    flat = inputs.reshape(len(inputs), -1)
    hidden = np.maximum(flat @ state["linear1.weight"].T + state["linear1.bias"], 0)
    return hidden @ state["linear2.weight"].T + state["linear2.bias"]


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits)
    return powers / powers.sum(axis=1, keepdims=True)


# Evaluation


@pytest.mark.parametrize("framework", EVALUATE)
@pytest.mark.parametrize("trained_by", EVALUATE)
def test_either_framework_evaluates_either_ones_run_and_says_that_it_is_the_runs_own(
    trained_by, framework, runs, tmp_path
):
    ended = call(EVALUATE[framework], runs[trained_by], "--json", tmp_path / "figures.json")
    assert ended.status == 0, ended.err
    report = json.loads((tmp_path / "figures.json").read_text())
    summary = json.loads((runs[trained_by] / "summary.json").read_text())
    assert report["summary"] == {"loss": summary["test_loss"], "accuracy": summary["test_accuracy"]}
    assert report["accuracy"] == summary["test_accuracy"]
    assert (report["made_by"], report["framework"], report["examples"]) == (trained_by, framework, 359)
    if framework == trained_by:
        assert (report["equal"], report["loss"]) == ("bit for bit", summary["test_loss"])
        assert "equal to the run's own summary.json, bit for bit" in ended.out
    else:
        assert report["equal"] in ("bit for bit", "but for rounding")
        assert "equal to the run's own summary.json" in ended.out
    lines = [line.split() for line in ended.out.splitlines()[-10:]]
    assert lines == [
        [row["name"], str(row["examples"]), str(row["right"]), f"{row['accuracy']:.4f}"] for row in report["classes"]
    ]


@pytest.mark.parametrize("framework", EVALUATE)
@pytest.mark.parametrize("split", ["test", "train"])
def test_the_figures_are_those_of_the_split_by_class(split, framework, runs, tmp_path):
    ended = call(EVALUATE[framework], runs["jax"], "--split", split, "--json", tmp_path / "figures.json")
    assert ended.status == 0, ended.err
    report = json.loads((tmp_path / "figures.json").read_text())
    inputs, labels = getattr(datasets.load(DIGITS), split)
    logits = logits_of(runs["jax"], inputs / 16)
    losses, right = -np.log(softmax(logits)[np.arange(len(labels)), labels]), logits.argmax(axis=1) == labels
    bound = chain_bound(conversion.leaves_of(recipe.load("digits")), len(labels), np.float32)
    assert_within({"loss": np.float32(report["loss"])}, {"loss": losses.mean()}, bound=bound, item=split)
    assert report["accuracy"] == right.mean()
    for index, row in enumerate(report["classes"]):
        of_class = labels == index
        counts = int(of_class.sum()), int(right[of_class].sum())
        assert (row["name"], row["examples"], row["right"]) == (str(index), *counts)
        assert row["accuracy"] == counts[1] / counts[0]
    if split == "train":
        assert (report["equal"], report["summary"]) == (None, None)
        assert "nothing to compare: the training figures" in ended.out


def test_a_run_with_batchnorm_on_bytes_evaluates_to_its_own_figures_bit_for_bit(tmp_path):
    flags = [part for name, value in MADE_UP.items() for part in (f"--data.{name.replace('_', '-')}", value)]
    flags += ["--recipe", "mlp128-batchnorm", "--epochs", 1, "--batch-size", 60, "--quiet", "--out", tmp_path / "run"]
    assert call(FRAMEWORKS["jax"], *flags).status == 0
    ended = call(jax_impl.evaluate.main, tmp_path / "run")
    assert ended.status == 0, ended.err
    assert "test split, 52 examples" in ended.out
    assert "bit for bit" in ended.out


def test_other_weights_are_said_not_to_be_the_runs_own(run):
    state = dict(run_reader.read(run).found)
    state["linear2.bias"] = state["linear2.bias"] + np.float32(1) * np.arange(10, dtype=np.float32)
    with_weights(run, weights.to_safetensors(state))
    ended = call(jax_impl.evaluate.main, run)
    assert ended.status == 1
    assert "NOT equal to the run's own summary.json, which says loss " in ended.out


@pytest.mark.parametrize("framework", EVALUATE)
def test_weights_without_a_summary_have_nothing_to_be_compared_with(framework, tmp_path):
    made_run(tmp_path / "run", recipe.load("digits"))
    ended = call(EVALUATE[framework], tmp_path / "run", "--json", tmp_path / "figures.json")
    assert ended.status == 0, ended.err
    assert "nothing to compare: the run has no summary.json with test figures" in ended.out
    inputs, labels = datasets.load(DIGITS).test
    right = logits_of(tmp_path / "run", inputs / 16).argmax(axis=1) == labels
    assert json.loads((tmp_path / "figures.json").read_text())["accuracy"] == right.mean()


@pytest.mark.parametrize(
    ("precision", "loss", "accuracy", "equal"),
    [
        ("float32", 0.5, 0.75, "bit for bit"),
        ("float32", 0.5 * (1 + 2**-17), 0.75, "but for rounding"),
        ("float32", 0.5 * (1 + 2**-16), 0.75, "no"),
        ("float32", 0.5, 0.7499, "but for rounding"),
        ("float32", 0.5, 0.7498, "no"),
        ("float64", 0.5 * (1 + 2**-30), 0.75, "but for rounding"),
        ("float64", 0.5 * (1 + 2**-29), 0.75, "no"),
        ("float64", 0.5, 0.7499, "no"),
        ("bfloat16", 0.5 * (1 - 2**-7), 0.755, "but for rounding"),
        ("bfloat16", 0.5 * (1 - 2**-6), 0.75, "no"),
        ("bfloat16", 0.5, 0.7399, "no"),
        ("float32", None, None, None),
        ("float32", "0.5", 0.75, None),
    ],
)
def test_equal_means_bits_or_rounding_and_no_more_of_it_than_the_precision_has(precision, loss, accuracy, equal):
    report, rounding = {"split": "test", "loss": 0.5, "accuracy": 0.75, "examples": 10_000}, evaluation.ROUNDING
    summary = {"test_loss": loss, "test_accuracy": accuracy}
    assert evaluation.comparison(report, summary, rounding[precision])["equal"] == equal
    assert evaluation.comparison(report | {"split": "train"}, summary, rounding[precision])["equal"] is None
    assert evaluation.comparison(report, None, rounding[precision])["equal"] is None


def test_a_class_without_examples_has_no_accuracy():
    found = evaluation.figures(np.ones(1), np.zeros(1, int), np.zeros(1, int), ("a", "b"))
    assert found["classes"][1] == {"name": "b", "examples": 0, "right": 0, "accuracy": None}
    evaluation.show(found | {"run": "r", "recipe": "x", "made_by": None, "framework": "f", "device": "d"} | SHOWN)


SHOWN = {"split": "test", "equal": None}


def without(run: Path, *names: str) -> None:
    for name in names:
        (run / name).unlink()


def unfit(run: Path) -> None:
    state = dict(run_reader.read(run).found)
    state = {
        "linear1.weight": state["linear1.weight"].T[:, :5],
        "linear2.weight": state["linear2.weight"].astype("<f8"),
    }
    state |= {"liner2.bias": np.zeros(10, np.float32), "linear1.bias": np.full(64, np.nan, np.float32)}
    with_weights(run, weights.to_safetensors(state))


def with_summary(run: Path, **more: object) -> None:
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | more))


def with_weights(run: Path, content: bytes) -> None:
    """Give the run other weights, and their checksum."""
    (run / "weights.safetensors").write_bytes(content)
    with_summary(run, weights_sha256=run_reader.sha256(content))


def nested(run: Path) -> None:
    for name in ("config.json", "weights.safetensors"):
        (run / "seed-0").mkdir(exist_ok=True)
        (run / name).rename(run / "seed-0" / name)


def without_a_test_split(run: Path) -> None:
    of = changed("digits", data={"test_fraction": 0.0})
    (run / "config.json").write_text(json.dumps({"recipe": recipe.to_mapping(of)}))


DAMAGE = {
    "no config": (lambda run: without(run, "config.json"), ["is no run directory: it has no config.json"]),
    "no directory": (shutil.rmtree, ["does not exist; name a run's directory"]),
    "weights removed": (
        lambda run: without(run, "weights.safetensors"),
        ["is finished and has no weights.safetensors: its numbers were not finite, or the file was removed; `"],
    ),
    "unfinished": (
        lambda run: without(run, "weights.safetensors", "summary.json"),
        ["the run is not finished; `", "-m jax_impl.train --resume ", "goes on with it"],
    ),
    "a folder of runs": (nested, ["is no run, but holds ", "seed-0; name one"]),
    "every mismatch": (
        unfit,
        [
            "linear2.bias is missing; it has shape [10]",
            "linear1.weight has shape [64, 5]; it must have [64, 64]",
            "linear2.weight holds float64; it must hold float32",
            "liner2.bias is not one of its arrays (did you mean 'linear2.bias'?)",
            "linear1.bias holds 64 of 64 numbers that are not finite",
        ],
    ),
    "cut weights": (
        lambda run: with_weights(run, (run / "weights.safetensors").read_bytes()[:-1]),
        ["weights.safetensors is damaged, or no safetensors file"],
    ),
    "another checksum": (lambda run: with_summary(run, weights_sha256="0" * 64), ["should be 0000"]),
    "a summary that is none": (lambda run: (run / "summary.json").write_text("[]"), ["holds a list, not a table"]),
    "a broken summary": (lambda run: (run / "summary.json").write_text("{"), ["summary.json cannot be read"]),
    "a broken recipe": (
        lambda run: (run / "config.json").write_text((run / "config.json").read_text().replace("sgd", "sdg")),
        ["optimizer.name 'sdg': must be 'sgd' or 'adam'"],
    ),
    "no test split": (without_a_test_split, ["data.test_fraction is 0); add --split train"]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_that_cannot_be_used_is_refused_with_the_mend(damage, run):
    spoil, said = DAMAGE[damage]
    spoil(run)
    ended = call(jax_impl.evaluate.main, run)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith("error: ")
    assert "Traceback" not in ended.err
    for part in said:
        assert part in ended.err
    assert len(ended.err.splitlines()) <= len(said) + 2


@pytest.mark.parametrize("key", ["summary.json", "config.json"])
def test_a_checksum_is_taken_from_the_summary_or_of_converted_weights_from_the_config(key, run):
    digest = run_reader.sha256((run / "weights.safetensors").read_bytes())
    with_summary(run, weights_sha256=None)
    content = json.loads((run / key).read_text())
    (run / key).write_text(json.dumps(content | {"weights_sha256": digest}))
    assert run_reader.read(run).recipe.name == "digits"
    (run / key).write_text(json.dumps(content | {"weights_sha256": digest[::-1]}))
    with pytest.raises(run_reader.RunDirectoryError, match="is damaged: its sha256 is"):
        run_reader.read(run)


def test_a_file_in_place_of_a_run_or_of_a_figures_folder_is_refused(run, tmp_path):
    for arguments, said in (
        ([run / "config.json"], "is a file; name a run's directory"),
        ([run, "--json", tmp_path], "--json"),
        ([run, "--json", tmp_path / "no" / "x.json"], "its directory does not exist"),
        ([run, "--split", "validation"], "validation"),
        ([], "RUN"),
    ):
        ended = call(jax_impl.evaluate.main, *arguments)
        assert ended.status == 2
        assert said in ended.err
        assert "Traceback" not in ended.err


def test_no_command_imports_a_framework_to_find_a_mistake(tmp_path):
    script = (
        "import runpy, sys\n"
        "for module in ('jax_impl.evaluate', 'jax_impl.predict', 'jax_impl.convert', 'torch_ref.evaluate',\n"
        "               'torch_ref.convert'):\n"
        "    sys.argv = [module, '--help']\n"
        "    try:\n        runpy.run_module(module, run_name='__main__')\n"
        "    except SystemExit as left:\n        assert not left.code, module\n"
        "slow = {'jax', 'flax', 'optax', 'torch', 'sklearn'} & set(sys.modules)\n"
        "sys.exit(f'imported {slow}' if slow else 0)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("usage: python -m ") == 5


# Pictures


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """Return a made-up image, light on dark: grey values 0 and 17 to 255 in steps of 17, so that 4 bits hold them."""
    array = np.zeros((28, 28), np.uint8)
    array[6:22, 9:19] = np.random.default_rng(0).integers(1, 16, (16, 10)) * 17
    return array


def save_palette(path: Path, array: np.ndarray) -> None:
    Image.fromarray(array).convert("P").save(path)


def save_rgba(path: Path, array: np.ndarray) -> None:
    Image.fromarray(np.stack([array] * 3 + [np.full_like(array, 255)], axis=-1)).save(path)


def save_turned(path: Path, array: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to see it"
    Image.fromarray(np.rot90(array)).save(path, exif=exif)


SAVED = {
    "grey.png": lambda path, array: Image.fromarray(array).save(path),
    "inverted.png": lambda path, array: Image.fromarray(255 - array).save(path),
    "grey.bmp": lambda path, array: Image.fromarray(array).save(path),
    "grey.tiff": lambda path, array: Image.fromarray(array).save(path),
    "grey.pgm": lambda path, array: Image.fromarray(array).save(path),
    "rgb.png": lambda path, array: Image.fromarray(array).convert("RGB").save(path),
    "rgb.webp": lambda path, array: Image.fromarray(array).convert("RGB").save(path, lossless=True),
    "rgba.png": save_rgba,
    "palette.gif": save_palette,
    "palette.png": save_palette,
    "grey and alpha.png": lambda path, array: Image.fromarray(array).convert("LA").save(path),
    "deep.png": lambda path, array: Image.fromarray(array.astype(np.uint16) * 257).save(path),
    "deep.tiff": lambda path, array: Image.fromarray(array.astype(np.uint16) * 257).save(path),
    "floats.tiff": lambda path, array: Image.fromarray(array.astype(np.float32) / 255).save(path),
    "turned.png": save_turned,
    "idx3-ubyte": lambda path, array: path.write_bytes(idx_bytes(array[None])),
    "idx3-ubyte.gz": lambda path, array: path.write_bytes(gzip.compress(idx_bytes(array[None]))),
    "inverted-idx3-ubyte": lambda path, array: path.write_bytes(idx_bytes(255 - array[None])),
    "no suffix": lambda path, array: Image.fromarray(array).save(path, format="png"),
}


@pytest.mark.parametrize("name", SAVED)
def test_an_image_of_the_right_size_keeps_every_value_whatever_it_is_saved_as(name, picture, tmp_path):
    SAVED[name](tmp_path / name, picture)
    found, skipped = images.read([tmp_path / name], GREY)
    assert skipped == []
    assert len(found) == 1
    assert found[0].values.dtype == np.uint8
    assert found[0].values.tolist() == picture[..., None].tolist()
    assert ("inverted" in found[0].done) == ("inverted" in name)


def test_black_and_white_is_an_image_too(tmp_path):
    array = np.zeros((28, 28), bool)
    array[10:20, 5] = True
    Image.fromarray(array).save(tmp_path / "bits.png")
    ((_, values, done),) = images.read([tmp_path / "bits.png"], GREY)[0]
    assert (values[..., 0] == 255 * array).all()
    assert done == "28x28 black and white"


def test_inverting_can_be_asked_for_and_forbidden(picture, tmp_path):
    Image.fromarray(picture).save(tmp_path / "dark.png")
    Image.fromarray(255 - picture).save(tmp_path / "light.png")
    both = [tmp_path / "dark.png", tmp_path / "light.png"]
    for invert, wanted in (
        ("auto", [picture, picture]),
        ("yes", [255 - picture, picture]),
        ("no", [picture, 255 - picture]),
    ):
        found, _ = images.read(both, GREY, invert=invert)
        assert [one.values[..., 0].tolist() for one in found] == [array.tolist() for array in wanted]


def test_colours_are_turned_grey_by_their_lightness(tmp_path):
    array = np.zeros((28, 28, 3), np.uint8)
    array[4:8, 4:8], array[10:14, 4:8], array[16:20, 4:8] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    Image.fromarray(array).save(tmp_path / "colours.png")
    ((_, values, done),) = images.read([tmp_path / "colours.png"], GREY)[0]
    assert [values[row, 5, 0] for row in (5, 11, 17, 23)] == [76, 150, 29, 0]  # 0.299, 0.587 and 0.114 of 255
    assert done == "28x28 RGB, turned grey"


@pytest.mark.parametrize(("seen", "inverted"), [(40, True), (220, False)])
def test_what_is_transparent_becomes_what_the_rest_stands_out_from(seen, inverted, tmp_path):
    array = np.zeros((28, 28, 4), np.uint8)
    array[8:20, 8:20] = (seen, seen, seen, 255)
    Image.fromarray(array).save(tmp_path / "logo.png")
    ((_, values, done),) = images.read([tmp_path / "logo.png"], GREY)[0]
    assert values[0, 0, 0] == 0
    assert values[10, 10, 0] == (255 - seen if inverted else seen)
    assert ("put on white" in done, "inverted" in done) == (inverted, inverted)


def test_a_large_image_keeps_its_aspect_and_is_padded_with_its_border(tmp_path):
    array = np.full((100, 200), 30, np.uint8)
    array[30:70, 40:160] = 200
    Image.fromarray(array).save(tmp_path / "wide.png")
    ((_, values, done),) = images.read([tmp_path / "wide.png"], GREY)[0]
    assert done == "200x100 grey, resized to 28x14, padded to 28x28"
    assert set(values[:10].ravel()) == set(values[-10:].ravel()) == {30}
    rows, columns = np.nonzero(values[..., 0] > 115)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (11, 16, 6, 21)
    assert values[13, 14, 0] == 200


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (7, 3), (3, 3), (27, 29), (640, 480)])
def test_every_size_comes_out_as_the_recipe_has_it(size, tmp_path):
    Image.new("L", size, 90).save(tmp_path / "plain.png")
    ((_, values, _),) = images.read([tmp_path / "plain.png"], GREY)[0]
    assert values.shape == (28, 28, 1)
    assert set(values.ravel()) == {90}


def test_no_image_of_the_data_sets_has_a_light_background(fashion_mnist, counted):
    digits = datasets.load(DIGITS)
    for dataset, white in ((fashion_mnist, 255), (digits, 16)):
        for split in (dataset.train, dataset.test):
            assert not any(images.is_light(image / white) for image in split.inputs)
            counted("images whose background was recognised", len(split.inputs))


def test_a_target_is_what_the_data_are():
    of_digits = images.target_of(known_size(DIGITS), datasets.load(DIGITS))
    assert of_digits == images.Target(
        shape=(8, 8, 1), black=0, white=16, dtype=np.dtype(np.float64), light_background=False
    )
    assert images.target_of(known_size(Data(name="fashion_mnist"))) == GREY
    with pytest.raises(DataError, match=r"shape \[30\]; only a run on images"):
        images.target_of(known_size(Data(name="breast_cancer", test_fraction=0.2, seed=0)))


@pytest.mark.parametrize("values", [[[0, 70_000]], [[-1, 5]]])
def test_numbers_that_are_no_16_bit_greys_are_refused(values, tmp_path):
    Image.fromarray(np.array(values, np.int32)).save(tmp_path / "wild.tiff")
    with pytest.raises(DataError, match=r"wild.tiff has values from .*; white is 65535; save it with 8 or 16 bits"):
        images.read([tmp_path / "wild.tiff"], GREY)


@pytest.mark.parametrize("side", [11, 15])
def test_a_decompression_bomb_is_refused_by_pillows_limit(side, tmp_path, monkeypatch):
    Image.new("L", (side, side)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # 121 are over it: a warning; 225 over twice: an error
    with pytest.raises(DataError, match=r"bomb.png has more pixels than the limit of 100; make it smaller"):
        images.read([tmp_path / "bomb.png"], GREY)


@pytest.mark.parametrize("number", [300, pytest.param(10_000, marks=pytest.mark.slow(1))])
def test_a_damaged_image_is_read_or_refused_with_a_line(number, picture, tmp_path, counted):
    generator = np.random.default_rng(0)
    names = [name for name in SAVED if name.rpartition(".")[2] in ("png", "bmp", "tiff", "gif", "webp", "gz", "pgm")]
    good = []
    for name in names:
        SAVED[name](tmp_path / name, picture)
        good.append((tmp_path / name).read_bytes())
    reasons = []
    path = tmp_path / "damaged"
    for turn in range(number):
        content = bytearray(good[turn % len(good)])
        for place in generator.integers(0, len(content), generator.integers(1, 9)):
            content[place] ^= 1 << generator.integers(0, 8)
        path.write_bytes(content[: generator.integers(0, len(content))] if turn % 3 == 0 else content)
        try:
            found, _ = images.read([path], GREY)
        except DataError as error:
            reasons.append(str(error))
        else:
            assert found[0].values.shape == (28, 28, 1)
    assert len(reasons) > number / 10
    assert all(reason.startswith(str(path)) and reason.isprintable() for reason in reasons)
    counted("damaged images", number)


# Prediction


def predicted(run: Path, *arguments: object, file: Path) -> list[dict]:
    ended = call(jax_impl.predict.main, run, *arguments, "--json", file)
    assert ended.status == 0, ended.err
    return json.loads(file.read_text())["images"]


def assert_predicts(rows: list[dict], wanted: np.ndarray, of: Recipe) -> None:
    """Fail unless the rows' probabilities are `wanted` [n, classes], and their top three those classes in order."""
    found = {"probabilities": np.array([row["probabilities"] for row in rows], np.float32)}
    bound = chain_bound(conversion.leaves_of(of), len(wanted), np.float32)
    assert_within(found, {"probabilities": wanted}, bound=bound, item="prediction")
    for row in rows:
        likeliest = np.argsort(row["probabilities"])[::-1][: len(row["top"])]
        assert [one["probability"] for one in row["top"]] == [row["probabilities"][index] for index in likeliest]


def test_pictures_of_digits_get_the_networks_own_probabilities(runs, tmp_path):
    inputs, labels = datasets.load(DIGITS).test
    for index in range(40):
        Image.fromarray((inputs[index, ..., 0] * 255 / 16).astype(np.uint8)).save(tmp_path / f"{index:02}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "folder").mkdir()
    ended = call(jax_impl.predict.main, runs["jax"], tmp_path, "--json", tmp_path / "rows.json")
    assert ended.status == 0, ended.err
    rows = json.loads((tmp_path / "rows.json").read_text())["images"]
    seen = (inputs[:40] * 255 / 16).astype(np.uint8) / 255
    wanted = softmax(logits_of(runs["jax"], seen))
    assert_predicts(rows, wanted, recipe.load("digits"))
    assert [row["image"] for row in rows] == [str(tmp_path / f"{index:02}.png") for index in range(40)]
    assert np.mean([int(row["top"][0]["class"]) for row in rows] == labels[:40]) > 0.85
    out = ended.out.splitlines()
    assert out[0] == f"skipped {tmp_path / 'folder'}: is a folder"
    assert out[1] == f"skipped {tmp_path / 'notes.txt'}: is no image that can be read"
    assert out[2].split() == ["image", "first", "second", "third", "as"]
    assert len(out) == 2 + 1 + 40
    assert out[3].startswith(f"{tmp_path / '00.png'}  {rows[0]['top'][0]['class']} ")
    assert out[3].endswith("  8x8 grey")


def test_a_long_idx_file_is_cut_on_the_screen_and_whole_in_the_file(tmp_path):
    of = changed("mlp128")
    state = made_run(tmp_path / "run", of)
    array = np.random.default_rng(0).integers(0, 256, (300, 28, 28), dtype=np.uint8)
    array[:, [0, -1]] = array[:, :, [0, -1]] = 0
    (tmp_path / "images.gz").write_bytes(gzip.compress(idx_bytes(array)))
    ended = call(jax_impl.predict.main, tmp_path / "run", tmp_path / "images.gz", "--json", tmp_path / "rows.json")
    assert ended.status == 0, ended.err
    rows = json.loads((tmp_path / "rows.json").read_text())["images"]
    assert [row["image"] for row in rows] == [f"{tmp_path / 'images.gz'}[{index}]" for index in range(300)]
    hidden = np.maximum((array / 255).reshape(300, -1) @ state["linear1.weight"].T, 0)
    assert_predicts(rows, softmax(hidden @ state["linear2.weight"].T), of)
    lines = ended.out.splitlines()
    assert len(lines) == 1 + 100 + 2
    assert lines[-2] == "and 200 images more; --json FILE keeps them all"
    counts = [int(part.rsplit(" ", 1)[1]) for part in lines[-1].removeprefix("of all: ").split(", ")]
    assert sum(counts) == 300
    assert "T-shirt/top" in ended.out


class TwoClasses:
    """A map-style data set of colour images, dark on light, with values from -1 to 1."""

    classes = ("left", "right")

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        image = np.full((6, 6, 3), 1.0)
        image[2:4, 1 + 3 * (index % 2)] = -1.0
        return image, index % 2


def test_a_colour_recipe_with_one_logit_gives_the_sigmoid_and_keeps_its_light_background(tmp_path):
    data = {"name": "map_style", "path": "spec_tests.test_predict:TwoClasses"}
    of = changed(
        "digits", data=data, loss={"name": "binary_cross_entropy"}, preprocessing={"divisor": 1.0}, batch_size=4
    )
    state = made_run(tmp_path / "run", of)
    array = np.full((6, 6, 3), 255, np.uint8)
    array[2:4, 4] = (0, 51, 102)
    Image.fromarray(array).save(tmp_path / "light.png")
    Image.fromarray(255 - array).save(tmp_path / "dark.png")
    rows = predicted(tmp_path / "run", tmp_path / "light.png", tmp_path / "dark.png", file=tmp_path / "rows.json")
    assert [row["done"] for row in rows] == ["6x6 RGB", "6x6 RGB, inverted"]
    values = array / 255 * 2 - 1
    columns = values.transpose(2, 0, 1).ravel()  # as torch flattens: channel, row, column
    hidden = np.maximum(columns @ state["linear1.weight"].T + state["linear1.bias"], 0)
    chance = 1 / (1 + np.exp(-(hidden @ state["linear2.weight"][0] + state["linear2.bias"][0])))
    assert_predicts(rows, np.array([[1 - chance, chance]] * 2), of)
    assert {one["class"] for one in rows[0]["top"]} == {"left", "right"}


def test_pictures_are_standardised_by_the_training_split(tmp_path):
    of = changed("digits", preprocessing={"standardize": True})
    made_run(tmp_path / "run", of)
    dataset = datasets.load(DIGITS)
    image = (dataset.test.inputs[3, ..., 0] * 255 / 16).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "digit.png")
    rows = predicted(tmp_path / "run", tmp_path / "digit.png", file=tmp_path / "rows.json")
    train = dataset.train.inputs / 16
    spread = train.std(axis=0)
    inputs = (image[None, ..., None] / 255 - train.mean(axis=0)) / np.where(spread > 0, spread, 1)
    assert_predicts(rows, softmax(logits_of(tmp_path / "run", inputs)), of)


def test_probabilities_do_not_overflow():
    found = prediction.probabilities(np.array([[1000.0, 0.0], [-1000.0, 0.0]]))
    assert found.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert prediction.probabilities(np.array([[-1000.0], [1000.0]])).tolist() == [[1.0, 0.0], [0.0, 1.0]]


def png(path: Path) -> Path:
    Image.new("L", (8, 8)).save(path)
    return path


def test_a_picture_or_run_that_cannot_be_used_is_refused_with_the_mend(runs, tmp_path):
    (tmp_path / "empty folder").mkdir()
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "a.txt").write_text("words")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes(png(tmp_path / "good.png").read_bytes()[:45])
    (tmp_path / "labels-idx1").write_bytes(idx_bytes(np.zeros(3, np.uint8)))
    (tmp_path / "none-idx3").write_bytes(idx_bytes(np.zeros((0, 28, 28), np.uint8)))
    (tmp_path / "short-idx3").write_bytes(idx_bytes(np.zeros((2, 28, 28), np.uint8))[:-1])
    (tmp_path / "broken.gz").write_bytes(gzip.compress(b"\0\0" * 999)[:-12])
    made_run(tmp_path / "table", changed("breast-cancer"))
    run, good = runs["jax"], tmp_path / "good.png"
    mistakes = [
        ([run], "no picture is named; give image files"),
        ([run, tmp_path / "missing.png"], "missing.png is missing; name an image"),
        ([run, good, tmp_path / "empty.png"], "empty.png is no image that can be read; give PNG"),
        ([run, tmp_path / "words" / "a.txt"], "a.txt is no image that can be read; give PNG"),
        ([run, tmp_path / "cut.png"], "cut.png is a damaged image: "),
        ([run, tmp_path / "empty folder"], "empty folder holds no image among 0 files; name a folder that does"),
        ([run, tmp_path / "words"], "words holds no image among 1 files; a.txt, say, is no image"),
        ([run, tmp_path / "labels-idx1"], "labels-idx1 holds labels; name the idx file of the images"),
        ([run, tmp_path / "none-idx3"], "none-idx3 holds no image: its shape is [0, 28, 28]"),
        ([run, tmp_path / "short-idx3"], "short-idx3 has 1,583 bytes; its header says 1,584"),
        ([run, tmp_path / "broken.gz"], "broken.gz cannot be read"),
        ([tmp_path / "table", good], "shape [30]; only a run on images"),
        ([tmp_path, good], "is no run, but holds "),
        ([run, good, "--json", tmp_path], "is a directory; name a file"),
        ([run, good, "--invert", "maybe"], "maybe"),
        ([run, good, "--platform", "abacus"], "abacus"),
    ]  # fmt: skip
    for arguments, said in mistakes:
        ended = call(jax_impl.predict.main, *arguments)
        assert (ended.status, ended.out) == (2, ""), arguments
        assert said in " ".join(ended.err.replace("│", " ").split()), ended.err
        assert "Traceback" not in ended.err
    assert len(mistakes) == 16


def test_a_name_that_would_control_the_terminal_is_shown_escaped(runs, tmp_path):
    ended = call(jax_impl.predict.main, runs["jax"], png(tmp_path / "a\x1b[2Jb.png"))
    assert ended.status == 0, ended.err
    assert "\x1b" not in ended.out
    assert "a\\x1b[2Jb.png" in ended.out
