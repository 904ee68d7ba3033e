"""Recipes: what ships is complete and right, and every mistake is refused with the value, the rule and the mend."""

from __future__ import annotations

import dataclasses
import json
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spec import batches, params, recipe
from spec.datasets.sizes import known_size
from spec.errors import RecipeError, UserError

NAMES = recipe.recipe_names()

# From the lessons: parameters counted by hand, steps of an epoch, examples in the last batch.
LESSONS = {
    "softmax-regression": (784 * 10 + 10, 235, 96),
    "sigmoid-mlp": (784 * 13 + 13 + 13 * 8 + 8 + 8 * 10 + 10, 483, 124),
    "mlp128": (784 * 128 + 128 * 10, 468, 128),
    "mlp128-plain": (784 * 128 + 128 * 10, 469, 96),
    "mlp128-batchnorm": (784 * 128 + 128 * 10 + 2, 469, 96),
    "mnist-mlp256": (784 * 256 + 256 + 256 * 256 + 256 + 2570, 938, 32),
    "mnist-mlp256-logits": (784 * 256 + 256 + 256 * 256 + 256 + 2570, 938, 32),
    "mlp512": (784 * 512 + 512 + 512 * 512 + 512 + 5130, 938, 32),
    "mnist-mlp512": (784 * 512 + 512 + 512 * 512 + 512 + 5130, 938, 32),
    "deep-mlp": (803_840 + 1_049_600 + 524_800 + 262_656 + 5_130, 938, 32),
    "cnn": (320 + 64 + 18_496 + 128 + 73_856 + 256 + 590_336 + 1_024 + 262_656 + 1_024 + 5_130, 938, 32),
    "synthetic-3class": (20 * 13 + 13 + 13 * 8 + 8 + 8 * 3 + 3, 1, 500),
    "synthetic-50k": (20 * 13 + 13 + 13 * 8 + 8 + 8 * 3 + 3, 13, 2_000),
    "breast-cancer": (30 * 16 + 16 + 16 + 1, 114, 4),
    "digits": (64 * 64 + 64 + 640 + 10, 45, 30),
}


def test_every_lesson_has_its_recipe_and_only_those_of_the_users_own_data_are_of_unknown_size():
    assert set(NAMES) == {*LESSONS, "csv", "map-style"}


@pytest.mark.parametrize("name", LESSONS)
def test_parameters_steps_and_last_batch_are_the_lessons(name):
    parameters, steps, last = LESSONS[name]
    loaded = recipe.load(name)
    size = known_size(loaded.data)
    leaves = params.leaves(loaded.model, size.input_shape, params.num_outputs(loaded, size.num_classes))
    counts = batches.count(loaded, size.num_train)
    assert params.num_parameters(leaves) == parameters
    assert counts.steps_per_epoch == steps
    assert counts.batch_sizes()[-1] == last


@pytest.mark.parametrize("name", NAMES)
def test_reading_what_was_written_gives_the_same_recipe(name):
    loaded = recipe.load(name)
    assert recipe.parse(json.loads(json.dumps(recipe.to_mapping(loaded))), source=name) == loaded
    assert loaded.name == name


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_with_any_field_left_out_is_refused_naming_it(name):
    mapping = recipe.to_mapping(recipe.load(name))
    mapping.pop("expected", None)
    paths = [(key,) for key in mapping] + [
        (key, field) for key in mapping if isinstance(mapping[key], dict) for field in mapping[key]
    ]
    for path in paths:
        broken = json.loads(json.dumps(mapping))
        owner = broken[path[0]] if len(path) == 2 else broken
        del owner[path[-1]]
        with pytest.raises(RecipeError, match=rf"{'.'.join(path)}\b"):
            recipe.parse(broken, source=name)


def changed(**changes: object) -> dict:
    mapping = recipe.to_mapping(recipe.load("mlp128"))
    for path, value in changes.items():
        *sections, field = path.split("__")
        owner = mapping
        for section in sections:
            owner = owner[section]
        owner[field] = value
    return mapping


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epochs": 0}, "epochs 0: must be greater than or equal to 1"),
        ({"epochs": 2.5}, "epochs 2.5: "),
        ({"epochs": True}, "epochs True: "),
        ({"epochs": "5"}, "epochs '5': "),
        ({"epochs": 10**12}, "epochs 1000000000000: "),
        ({"batch_size": -1}, "batch_size -1: "),
        ({"seed": 2**32}, "seed 4294967296: "),
        ({"precision": "float16"}, "precision 'float16': must be 'float32', 'float64' or 'bfloat16'"),
        ({"optimizer__learning_rate": float("nan")}, "optimizer.learning_rate nan: must be a finite number"),
        ({"optimizer__learning_rate": float("inf")}, "optimizer.learning_rate inf: "),
        ({"optimizer__learning_rate": 0.0}, "optimizer.learning_rate 0.0: must be greater than 0"),
        ({"optimizer__learning_rate": 1e300}, "optimizer.learning_rate 1e\\+300: "),
        ({"optimizer__momentum": 1.0}, "optimizer.momentum 1.0: must be less than 1"),
        ({"optimizer__weight_decay": -0.1}, "optimizer.weight_decay -0.1: "),
        ({"optimizer__learing_rate": 1.0}, "optimizer.learing_rate is not a field \\(did you mean 'learning_rate'"),
        ({"batchsize": 3}, "batchsize is not a field \\(did you mean 'batch_size'"),
        ({"data__name": "fashon"}, "data.name 'fashon': must be 'fashion_mnist', "),
        ({"data": 3}, "data 3: "),
        ({"name": "../up"}, "name '../up': "),
        ({"model__hidden_sizes": [0]}, "model.hidden_sizes.0 0: "),
        ({"model__hidden_sizes": [128, 64]}, "model.activations has 1 names for 2 hidden_sizes"),
        ({"model__channels": [8]}, "model.channels \\(8,\\) is not used by mlp; leave it out"),
        ({"optimizer__nesterov": True, "optimizer__momentum": 0.0}, "nesterov true needs momentum above 0"),
        ({"optimizer__dampening": 0.5, "optimizer__momentum": 0.0}, "dampening 0.5 has no effect at momentum 0"),
        ({"optimizer__name": "adam"}, "optimizer.betas is missing: adam needs it"),
        ({"optimizer__name": "adam"}, "optimizer.momentum 0.8 is not used by adam; leave it out"),
        ({"schedule__name": "step"}, "schedule.gamma is missing: step needs it"),
        ({"schedule": {"name": "cosine", "final_learning_rate": 0.2}}, "final_learning_rate 0.2 is above"),
        ({"init__weight": "normal"}, "init.std None: a normal weight or bias needs it"),
        ({"init__std": 0.1}, "init.std 0.1: "),
        ({"model__batchnorm_statistics": "local"}, "batchnorm_statistics local: BatchNorm needs it, .* nothing else"),
        ({"model__input_batchnorm": True}, "model.batchnorm_statistics None: BatchNorm needs it, global or local"),
        ({"model__batchnorm_statistics": "shard"}, "batchnorm_statistics 'shard': must be 'global' or 'local'"),
        (
            {"loss": {"name": "binary_cross_entropy", "reduction": "mean", "label_smoothing": 0.1}},
            "label_smoothing 0.1",
        ),
    ],
)
def test_a_broken_rule_is_refused_with_the_value_and_the_rule(changes, said):
    with pytest.raises(RecipeError, match=said) as caught:
        recipe.parse(changed(**changes), source="test")
    assert len(str(caught.value).splitlines()) <= 8


def test_an_unknown_recipe_is_refused_with_the_nearest_name():
    with pytest.raises(RecipeError, match="no recipe has the name 'mpl128' \\(did you mean 'mlp128'\\?\\)"):
        recipe.load("mpl128")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("name = ", "cannot be read"),
        ("\x00", "cannot be read"),
        ("a = 1\na = 2", "cannot be read"),
        ("", "name is missing"),
    ],
)
def test_a_broken_recipe_file_is_refused_naming_it(tmp_path, content, said):
    path = tmp_path / "mine.toml"
    path.write_text(content)
    with pytest.raises(RecipeError, match=f"mine.toml.*{said}" if said == "cannot be read" else said):
        recipe.load(str(path))


@pytest.mark.parametrize("name", ["missing.toml", "runs/nowhere/config.json", "."])
def test_a_recipe_file_that_is_not_there_is_refused(name):
    with pytest.raises(RecipeError):
        recipe.load(name)


def test_binary_cross_entropy_needs_two_classes():
    loaded = recipe.load("breast-cancer")
    assert params.num_outputs(loaded, 2) == 1
    with pytest.raises(RecipeError, match="needs 2 classes; breast_cancer has 3"):
        params.num_outputs(loaded, 3)


def test_a_network_of_over_a_hundred_million_parameters_is_refused():
    loaded = recipe.load("mlp128")
    model = dataclasses.replace(loaded.model, hidden_sizes=(65_536, 65_536), activations=("relu", "relu"))
    with pytest.raises(RecipeError, match=r"4,347,002,880 parameters; the limit is 100,000,000"):
        params.leaves(model, (28, 28, 1), 10)


def test_a_cnn_on_a_table_or_on_tiny_images_is_refused():
    model = recipe.load("cnn").model
    for shape in [(30,), (4, 4, 1)]:
        with pytest.raises(RecipeError, match="needs images of at least 8x8"):
            params.leaves(model, shape, 10)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
FIELDS = sorted(recipe.to_mapping(recipe.load("mlp128")))
OPTIMIZER_FIELDS = sorted(field.name for field in dataclasses.fields(recipe.Optimizer))


@given(st.sampled_from(FIELDS), JSON)
def test_any_value_in_any_field_gives_a_recipe_or_a_short_refusal(field, value):
    assert len(refusal(changed(**{field: value})).splitlines()) <= 10


@given(st.sampled_from(OPTIMIZER_FIELDS), JSON)
def test_any_value_in_any_optimizer_field_gives_a_recipe_or_a_short_refusal(field, value):
    assert len(refusal(changed(**{f"optimizer__{field}": value})).splitlines()) <= 10


def refusal(mapping: dict) -> str:
    """Return what the refusal says, or nothing if there is none; any other error is a failure."""
    try:
        recipe.parse(mapping, source="any")
    except UserError as error:
        return str(error)
    return ""


@given(st.text(max_size=200))
def test_any_text_as_a_recipe_file_gives_a_recipe_or_a_refusal(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("any") / "any.toml"
    path.write_text(text, "utf-8", errors="surrogatepass")
    with pytest.raises(RecipeError):
        recipe.load(str(path))


def test_shipped_recipes_are_plain_toml_without_anything_hidden():
    for name in NAMES:
        text = (recipe.RECIPES / f"{name}.toml").read_text("utf-8")
        assert recipe.to_mapping(recipe.load(name)) == tomllib.loads(text)
