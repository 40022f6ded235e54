"""Settings: each key's default and range stand once, and every way to a value meets the same check."""

import ast
import dataclasses
import inspect
import math
import typing
from typing import Annotated, Literal

import pytest
import yaml
from conftest import ROOT

import bags
from bags.classifiers import CLASSIFIERS, classifier_settings
from bags.config import sections
from bags.config.load import config_from_dict, config_to_dict, result_settings
from bags.core.settings import NO_RESULT, Range, Settings, marks

SAMPLERS = typing.get_args(sections.SamplerConfig)
SECTIONS = [
    *(kind for kind in vars(sections).values() if isinstance(kind, type) and issubclass(kind, Settings)),
    *classifier_settings().values(),
]
TRAINING = bags.CategoryStats((1, 2), ("a", "b"), (5, 50), (5, 40))


def numbers_in(kind) -> bool:
    """Whether a type holds numbers, in lists too."""
    return kind in (int, float) or any(map(numbers_in, typing.get_args(kind)))


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_number_states_its_range(section):
    """Category ids may be any numbers: they are looked up."""
    for name, kind in typing.get_type_hints(section).items():
        has_range = any(isinstance(mark, Range) for mark in marks(section)[name])
        assert has_range == (numbers_in(kind) and name != "groups"), name


@dataclasses.dataclass(frozen=True)
class Example(Settings):
    """A field of each kind."""

    half_open: Annotated[float, Range(ge=0, lt=1)] = 0.5
    inside: Annotated[float, Range(gt=0, lt=1)] = 0.5
    share: Annotated[float, Range(gt=0, le=1)] = 1
    closed: Annotated[int, Range(ge=1, le=4)] = 2
    natural: Annotated[int, Range(ge=0)] = 0
    positive: Annotated[float, Range(gt=0)] = 1
    edges: Annotated[tuple[int, ...], Range(gt=0, empty=False, rising=True)] = (1, 2)
    colour: Annotated[tuple[float, ...], Range(ge=0, le=255, items=3)] = (1, 2, 3)
    sizes: Annotated[tuple[tuple[int, ...], ...], Range(gt=0)] = ((1,), (2,))
    ratio: Annotated[float | Literal["n", "all"], Range(ge=0)] = 8
    every: Annotated[int | None, Range(ge=1)] = None
    choice: Literal["a", "b"] = "a"
    kept: bool | Literal["part"] = False
    file: str | None = None
    text: str = "x"


@pytest.mark.parametrize(
    "values, words",
    [
        ({"half_open": [1, 2, -0.1, math.nan, math.inf, "x", None]}, "0 <= half_open < 1"),
        ({"inside": [0, 1]}, "between 0 and 1"),
        ({"share": [0, 1.1]}, "above 0, to 1"),
        ({"closed": [0, 5]}, "1 to 4"),
        ({"natural": [-1, math.inf, 2**63, 10**400, -(10**400)]}, "0 or more"),
        ({"positive": [0, math.inf, -math.inf]}, "above 0"),
        ({"edges": [(), (0, 1), (2, 2), (3, 2), (1, 2**63)]}, "one or more rising numbers above 0"),
        ({"colour": [(), (1, 2), (1, 2, 256), (1, 2, math.nan)]}, "3 numbers of 0 to 255"),
        ({"sizes": [((1,), (0,))]}, "numbers above 0"),
        ({"ratio": [-1, "some", None]}, "0 or more, or one of 'n', 'all'"),
        ({"every": [0, "x"]}, "1 or more, or null"),
        ({"choice": ["c", None, 1]}, "one of 'a', 'b'"),
        ({"kept": ["all"]}, "'part'"),
        ({"text": [None]}, ""),
    ],
)
def test_what_a_range_refuses(values, words):
    [(name, refused)] = values.items()
    for value in refused:
        with pytest.raises(ValueError) as error:
            Example(**{name: value})
        assert str(error.value).startswith(f"{name}: expected {words}"), error.value
        assert ", got " in str(error.value) and len(str(error.value)) < 400


def test_what_a_range_allows():
    assert Example(edges=[5], ratio="n", every=3, kept="part", file="f", choice="b", colour=[0, 255, 1.5]).every == 3
    assert Example(half_open=0, share=1, closed=4, natural=2**62, positive=1e300, kept=True).closed == 4


@pytest.mark.parametrize("name", sorted(CLASSIFIERS.keys() - {"Average"}))  # which is made of others
def test_defaults_and_ranges_stand_in_the_settings_only(name):
    """The arguments of a constructor have the defaults of the settings, and meet the check of a YAML file."""
    classifier = getattr(bags, name)
    [settings] = [kind for kind in classifier_settings().values() if kind.__name__ == f"{name}Settings"]
    assert type(settings().build(4, 4, TRAINING)) is classifier
    parameters = inspect.signature(classifier).parameters
    needed = {"num_categories": 2, "counts": (5, 50), "image_counts": (5, 50), "width": 4}
    needed |= {"groups": bags.assign_groups([5, 50], (10,)), "class_weights": [1.0, 1, 1]}
    needed = {key: value for key, value in needed.items() if key in parameters}
    for field in dataclasses.fields(settings):
        if field.name not in parameters or field.name in needed:
            continue
        assert parameters[field.name].default == field.default
        if type(field.default) is not bool:
            wrong = [math.nan] if field.default is None else math.nan
            with pytest.raises(ValueError) as library:
                classifier(4, **needed, **{field.name: wrong})
            tree = {"classifier": {"name": settings.name, field.name: wrong}}
            with pytest.raises(bags.UserError) as file:
                config_from_dict(tree, "row.yaml")
            assert str(library.value).startswith(f"{field.name}: expected ")
            assert str(file.value).startswith(f"row.yaml: classifier.{field.name}: expected ")


def test_every_classifier_is_listed():
    """A file with settings that the list forgets would be a classifier that nobody can choose."""
    listed = [f"{name}Settings" for name in CLASSIFIERS]
    defined = {
        node.name
        for path in (ROOT / "bags/classifiers").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and any("Settings" in ast.unparse(base) for base in node.bases)
    }
    assert defined - {"ClassifierSettings", "SigmoidLayerSettings"} == set(listed)
    assert [kind.__name__ for kind in classifier_settings().values()] == listed


def test_keys_that_change_no_result():
    """They are marked at their fields; `result_settings` leaves them out and keeps all others."""
    config = sections.Config(train=sections.TrainConfig(checkpoint_every=7))
    everything, kept = dict(leaves(config_to_dict(config))), dict(leaves(result_settings(config)))
    left_out = {
        "output",
        "device",
        "data.workers",
        "data.max_bad_images",
        "data.max_pixels",
        "store.folder",
        "test.batch_size",
        "test.figures",
    }
    left_out |= {
        f"train.{key}"
        for key in ("log_every", "checkpoint_every", "nonfinite", "dead", "evaluate_every", "tensorboard")
    }
    assert everything.keys() - kept.keys() == left_out
    assert all(everything[key] == value for key, value in kept.items())
    assert yaml.safe_load(yaml.safe_dump(result_settings(config))) == result_settings(config)
    assert NO_RESULT in marks(sections.StoreConfig)["folder"]
    ours, other = (sections.TrainConfig(log_every=n, epochs=n) for n in (1, 2))
    trees = [result_settings(dataclasses.replace(config, train=train)) for train in (ours, other)]
    assert {key for key, value in leaves(trees[0]) if dict(leaves(trees[1]))[key] != value} == {"train.epochs"}


def leaves(tree: dict, prefix: str = ""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_values_of_a_checkpoint_are_checked():
    with pytest.raises(
        bags.UserError, match=r"last\.pth: config: detector\.rpn\.batch_size: expected 1 or more, got 0"
    ):
        config_from_dict({"detector": {"rpn": {"batch_size": 0}}}, "last.pth: config")
    with pytest.raises(bags.UserError, match="detector.roi.class_agnostic: expected true"):
        config_from_dict({"detector": {"framework": "htc"}})
