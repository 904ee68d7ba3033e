"""`--tensorboard`: TensorBoard's own reader finds in the event file what `metrics.jsonl` holds, and nothing else."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorboardX.record_writer
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import spec.errors
from spec import datasets, recipe
from spec.datasets import Dataset, Split
from spec.run.tensorboard import TensorBoard, pictures
from spec_tests import test_r03_resume
from spec_tests.conftest import FRAMEWORKS, made_up_images

stops_after = test_r03_resume.stops_after
FLAGS = test_r03_resume.FLAGS
TAGS = {
    "epoch": [
        ("train_loss", "train_loss"), ("test_loss", "val_loss"),
        ("train_accuracy", "train_accuracy"), ("test_accuracy", "val_accuracy"),
    ],
    "progress": [(name, name) for name in ("batch_loss", "running_loss", "cumulative_train_accuracy")],
}  # fmt: skip
both = pytest.mark.parametrize("framework", FRAMEWORKS)
pytestmark = [
    pytest.mark.usefixtures("compiled_once"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard"),
]


def read(folder: Path) -> EventAccumulator:
    """Return what TensorBoard reads from a folder that holds one event file, all of it."""
    assert [path.name.split(".")[:3] for path in folder.iterdir()] == [["events", "out", "tfevents"]]
    everything = dict.fromkeys(("scalars", "images", "tensors"), 0)
    return EventAccumulator(str(folder), size_guidance=everything).Reload()


def scalars(found: EventAccumulator) -> dict[str, list[tuple[int, float]]]:
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def scalars_of_metrics(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what the charts have to hold: TensorBoard keeps float32."""
    charts: dict[str, list[tuple[int, float]]] = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        for name, tag in TAGS[line["event"]]:
            if line[name] is not None:
                charts.setdefault(tag, []).append((line["step"], float(np.float32(line[name]))))
    return charts


def hyper_parameters(found: EventAccumulator, tag: str) -> HParamsPluginData:
    return HParamsPluginData.FromString(found.summary_metadata[f"_hparams_/{tag}"].plugin_data.content)


@both
def test_every_value_is_that_of_metrics_jsonl_at_its_step(framework, trainer_command, tmp_path):
    run = tmp_path / "run"
    ended = trainer_command(*FLAGS, "--tensorboard", "--out", run, framework=framework)
    assert ended.status == 0, ended.err
    found = scalars(read(run / "tensorboard"))
    assert found == scalars_of_metrics(run)
    assert [len(found[tag]) for tag in ("train_loss", "val_loss", "train_accuracy", "val_accuracy")] == [5] * 4
    assert [step for step, _ in found["batch_loss"]] == [8 * epoch + step for epoch in range(5) for step in (3, 6, 8)]


@both
@pytest.mark.parametrize("steps", [5, 8, 29])
def test_after_a_stop_and_a_resume_the_charts_are_those_of_one_run(
    steps, framework, stops_after, trainer_command, tmp_path
):
    run = tmp_path / "run"
    stops_after(steps)
    assert trainer_command(*FLAGS, "--tensorboard", "--out", run, framework=framework).status == 143
    (first,) = (run / "tensorboard").iterdir()
    assert scalars(read(run / "tensorboard")) == scalars_of_metrics(run)
    stops_after(0)
    ended = trainer_command("--resume", run, "--quiet", framework=framework)  # the run keeps the flag
    assert ended.status == 0, ended.err
    assert not first.exists()
    found = scalars(read(run / "tensorboard"))
    assert found == scalars_of_metrics(run)
    assert [step for step, _ in found["val_loss"]] == [8, 16, 24, 32, 40]


def test_a_run_that_goes_back_to_a_checkpoint_has_the_charts_from_there_on(trainer_command, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    more = ("--checkpoint-every", "epoch", "--tensorboard")
    assert trainer_command(*FLAGS, *more, "--out", first).status == 0
    before = {path.name: path.read_bytes() for path in (first / "tensorboard").iterdir()}
    flags = ("--resume", first / "checkpoints" / "00000024", "--resume-with-changes", "--learning-rate", "0.001")
    ended = trainer_command(*flags, "--tensorboard", "--quiet", "--out", second)
    assert ended.status == 0, ended.err
    ours, theirs = scalars(read(second / "tensorboard")), scalars(read(first / "tensorboard"))
    assert ours == scalars_of_metrics(second)
    assert ours["val_loss"][:3] == theirs["val_loss"][:3]
    assert ours["val_loss"][3:] != theirs["val_loss"][3:]
    assert {path.name: path.read_bytes() for path in (first / "tensorboard").iterdir()} == before


def test_overwriting_leaves_one_event_file_and_none_without_the_flag(trainer_command, tmp_path):
    run = tmp_path / "run"
    for flags in (["--tensorboard"], ["--tensorboard", "--overwrite", "--seed", "1"]):
        assert trainer_command(*FLAGS, *flags, "--out", run).status == 0
        assert scalars(read(run / "tensorboard")) == scalars_of_metrics(run)
    assert trainer_command(*FLAGS, "--overwrite", "--out", run).status == 0
    assert not (run / "tensorboard").exists()


def test_a_run_without_the_flag_writes_the_same_but_for_the_events(trainer_command, tmp_path):
    with_events, without = tmp_path / "with", tmp_path / "without"
    assert trainer_command(*FLAGS, "--tensorboard", "--out", with_events).status == 0
    assert trainer_command(*FLAGS, "--out", without).status == 0
    names = {path.name for path in with_events.iterdir()}
    assert names - {path.name for path in without.iterdir()} == {"tensorboard"}
    assert test_r03_resume.lines(with_events) == test_r03_resume.lines(without)
    assert (with_events / "weights.safetensors").read_bytes() == (without / "weights.safetensors").read_bytes()


def test_the_recipe_stands_there_as_hyper_parameters_and_the_run_is_finished(trainer_command, tmp_path):
    run = tmp_path / "run"
    assert trainer_command(*FLAGS, "--tensorboard", "--out", run).status == 0
    found = read(run / "tensorboard")
    given = hyper_parameters(found, "session_start_info").session_start_info.hparams
    assert given["batch_size"].number_value == 5
    assert given["model.name"].string_value == "cnn"
    assert given["model.channels"].string_value == "[3, 4]"
    assert given["optimizer.learning_rate"].number_value == recipe.load("cnn").optimizer.learning_rate
    assert given["optimizer.nesterov"].HasField("bool_value")
    assert not {name for name in given if name.split(".")[0] in ("description", "expected", "metrics")}
    experiment = hyper_parameters(found, "experiment").experiment
    assert {info.name for info in experiment.hparam_infos} == set(given)
    assert {info.name.tag for info in experiment.metric_infos} <= set(found.Tags()["scalars"])
    assert hyper_parameters(found, "session_end_info").session_end_info.status == 1  # success


def test_an_event_file_begins_with_its_version_and_a_start_that_makes_a_viewer_forget(tmp_path):
    TensorBoard(tmp_path / "tensorboard", recipe.load("mlp128"), made_up_images(3, 1)).close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    version, start, *others = map(Event.FromString, RawEventFileLoader(str(file)).Load())
    assert version.file_version == "brain.Event:2"
    assert start.session_log.status == SessionLog.START
    assert all(event.WhichOneof("what") == "summary" for event in others)


def test_a_run_that_was_stopped_is_not_called_finished(stops_after, trainer_command, tmp_path):
    run = tmp_path / "run"
    stops_after(9)
    assert trainer_command(*FLAGS, "--tensorboard", "--out", run).status == 143
    assert "_hparams_/session_end_info" not in read(run / "tensorboard").summary_metadata


def test_both_losses_share_a_chart_and_both_accuracies(trainer_command, tmp_path):
    run = tmp_path / "run"
    assert trainer_command(*FLAGS, "--tensorboard", "--out", run).status == 0
    (event,) = read(run / "tensorboard").Tensors("custom_scalars__config__")
    (category,) = Layout.FromString(event.tensor_proto.string_val[0]).category
    charts = {chart.title: list(chart.multiline.tag) for chart in category.chart}
    assert charts == {"loss": ["train_loss", "val_loss"], "accuracy": ["train_accuracy", "val_accuracy"]}


def shown(dataset: Dataset, folder: Path) -> dict[str, np.ndarray]:
    """Return the images that TensorBoard reads of a data set, by their tags, decoded."""
    TensorBoard(folder, recipe.load("mlp128"), dataset).close()
    found = read(folder)
    return {
        tag: np.asarray(Image.open(io.BytesIO(found.Images(tag)[0].encoded_image_string)))
        for tag in found.Tags()["images"]
    }


def test_the_first_images_are_there_pixel_by_pixel_under_their_classes(tmp_path):
    dataset = made_up_images(20, 2)
    images = shown(dataset, tmp_path / "tensorboard")
    assert list(images) == [f"train/{index:02}_{label}" for index, label in enumerate(dataset.train.labels[:16])]
    for image, given in zip(images.values(), dataset.train.inputs[:16], strict=True):
        assert np.array_equal(image, given.repeat(3, axis=-1))  # tensorboardX writes grey as RGB


def test_coloured_images_and_those_that_are_no_bytes_decode(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    labels = np.zeros(3, np.int32)
    coloured = Dataset(name="c", train=Split(colours, labels), test=None, class_names=("a b",))
    assert np.array_equal(shown(coloured, tmp_path / "one")["train/01_a_b"], colours[1])
    grey = np.arange(-4.0, 8.0).reshape(1, 3, 4, 1)
    floats = Dataset(name="g", train=Split(grey, labels[:1]), test=None, class_names=("a",))
    (image,) = shown(floats, tmp_path / "two").values()
    assert np.array_equal(image[..., 0], np.round(np.arange(12) * 255 / 11).reshape(3, 4))


def test_tables_have_no_images():
    assert pictures(datasets.load(recipe.load("breast-cancer").data)) == {}


@both
def test_a_disk_that_is_full_ends_the_run_in_a_line(framework, trainer_command, tmp_path, monkeypatch):
    opened = []

    def full(path: str) -> io.BufferedWriter:
        opened.append(open("/dev/full", "wb"))  # noqa: PTH123, SIM115
        return opened[-1]

    monkeypatch.setattr(tensorboardX.record_writer, "open_file", full)
    ended = trainer_command(*FLAGS, "--tensorboard", "--out", tmp_path / "run", framework=framework)
    assert ended.status == 2
    assert ended.err.count("\n") == 1
    assert ended.err.startswith(f"error: the run directory {tmp_path / 'run'} cannot be written")
    assert os.strerror(errno.ENOSPC) in ended.err
    assert [file.closed for file in opened] == [True]


def test_a_disk_that_is_full_later_ends_the_run_in_a_line_and_leaves_a_checkpoint(
    trainer_command, tmp_path, monkeypatch
):
    flush = tensorboardX.record_writer.RecordWriter.flush
    calls = []

    def refused(self: tensorboardX.record_writer.RecordWriter) -> None:
        calls.append(flush(self))
        if len(calls) == 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tensorboardX.record_writer.RecordWriter, "flush", refused)
    run = tmp_path / "run"
    ended = trainer_command(*FLAGS, "--checkpoint-every", "epoch", "--tensorboard", "--out", run)
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert "No space left" in ended.err
    monkeypatch.undo()
    assert trainer_command("--resume", run, "--quiet").status == 0
    assert scalars(read(run / "tensorboard")) == scalars_of_metrics(run)


def test_a_folder_that_cannot_be_written_is_a_line(trainer_command, tmp_path, monkeypatch):
    def refused(self: Path, **_: object) -> None:
        if self.name == "tensorboard":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        made(self, **_)

    made = Path.mkdir
    monkeypatch.setattr(Path, "mkdir", refused)
    ended = trainer_command(*FLAGS, "--tensorboard", "--out", tmp_path / "run")
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert "Permission denied" in ended.err


@both
def test_without_tensorboardx_the_run_is_refused_before_anything_is_done(
    framework, trainer_command, tmp_path, monkeypatch
):
    find = spec.errors.importlib.util.find_spec
    monkeypatch.setattr(
        spec.errors.importlib.util,
        "find_spec",
        lambda name, *more: None if name == "tensorboardX" else find(name, *more),
    )
    ended = trainer_command(*FLAGS, "--tensorboard", "--out", tmp_path / "run", framework=framework)
    assert ended.status == 2
    assert "tensorboardX is not installed" in ended.err
    assert "'.[tensorboard]'" in ended.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("many", [["--seeds", "2"], ["--sweep", "learning_rate=0.1,0.2"]])
def test_many_runs_at_once_refuse_it(many, trainer_command, tmp_path):
    ended = trainer_command(*FLAGS, *many, "--tensorboard", "--out", tmp_path / "run")
    assert ended.status == 2
    assert "--tensorboard is for one run; --seeds and --sweep write no event files" in ended.err
    assert not (tmp_path / "run").exists()


def test_writing_imports_no_tensorflow(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom spec_tests import conftest\nfrom spec import recipe\n"
        "from spec.run.tensorboard import TensorBoard\n"
        "board = TensorBoard(Path(sys.argv[1]), recipe.load('mlp128'), conftest.made_up_images(3, 1))\n"
        "board.finish()\nboard.close()\n"
        "assert 'tensorboardX' in sys.modules\n"
        "sys.exit([name for name in sys.modules if name.split('.')[0] in ('tensorflow', 'tensorboard')] or 0)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, tmp_path / "tensorboard"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert scalars(read(tmp_path / "tensorboard")) == {}
