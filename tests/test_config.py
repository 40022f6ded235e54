"""Configuration: what loads, what is refused and how clearly."""

import pytest
import yaml
from conftest import ROOT

import bags
from bags.config import GroupSoftmaxConfig, SoftmaxConfig, config_from_dict, config_to_dict, save_config


def write(folder, name="row.yaml", **content):
    path = folder / name
    path.write_text(yaml.safe_dump(content))
    return path


def test_resolved_file_loads_back_equal(tmp_path):
    path = write(tmp_path, classifier={"name": "group_softmax", "others_ratio": "n"}, train={"lr": "1e-4"})
    config = bags.load_config(path, ["detector.rpn.anchor_sizes=[[8], [16]]", "seed=3"])
    assert config.name == "row" and config.train.lr == 1e-4 and config.seed == 3
    assert config.detector.rpn.anchor_sizes == ((8,), (16,))
    save_config(config, tmp_path / "config.yaml")
    assert bags.load_config(tmp_path / "config.yaml") == config
    assert config_from_dict(config_to_dict(config)) == config


def test_base_and_overrides(tmp_path):
    write(tmp_path, "_base.yaml", train={"lr": 0.5, "epochs": 3}, data={"name": "d"})
    path = write(tmp_path, base="_base.yaml", train={"epochs": 7})
    config = bags.load_config(path, ["train.lr=1e-4"])
    assert (config.train.lr, config.train.epochs, config.data.name) == (1e-4, 7, "d")


def test_a_new_name_replaces_the_section(tmp_path):
    write(tmp_path, "_base.yaml", classifier={"name": "group_softmax", "others_ratio": 2})
    path = write(tmp_path, base="_base.yaml", classifier={"name": "softmax"})
    assert bags.load_config(path).classifier == SoftmaxConfig()
    path = write(tmp_path, base="_base.yaml", classifier={"boundaries": [5]})
    assert bags.load_config(path).classifier == GroupSoftmaxConfig(boundaries=(5,), others_ratio=2.0)
    config = bags.load_config(path, ["classifier.name=softmax"])
    assert config.classifier == SoftmaxConfig()


@pytest.mark.parametrize(
    "content, words",
    [
        ({"train": {"learning_rate": 1}}, ["row.yaml", "train.learning_rate", "unknown key"]),
        ({"train": {"epoch": 1}}, ["did you mean train.epochs"]),
        ({"trian": {}}, ["did you mean train"]),
        ({"train": {"epochs": "many"}}, ["train.epochs", "whole number", "'many'"]),
        ({"train": {"epochs": True}}, ["train.epochs", "whole number"]),
        ({"train": {"lr": "fast"}}, ["train.lr", "a number"]),
        ({"train": {"lr": 0}}, ["train.lr", "above 0"]),
        ({"train": {"part": "head"}}, ["train.part", "'cls'"]),
        ({"train": {"part": "cls"}}, ["detector.init_from"]),
        ({"train": 3}, ["train", "section"]),
        ({"classifier": {"name": "group_softmx"}}, ["classifier.name", "did you mean group_softmax"]),
        ({"classifier": {"name": "softmax", "others_ratio": 3}}, ["classifier.others_ratio", "unknown key"]),
        ({"classifier": {"name": "group_softmax", "others_ratio": "some"}}, ["others_ratio", "'n'"]),
        ({"classifier": {"name": "group_softmax", "boundaries": [10, 5]}}, ["classifier.boundaries", "rising"]),
        ({"data": {"name": "../up"}}, ["data.name", "folder name"]),
        ({"detector": {"rpn": {"anchor_sizes": [8]}}}, ["anchor_sizes", "a list of"]),
        ({"base": 3}, ["base"]),
        ({"base": "none.yaml"}, ["none.yaml", "no such configuration"]),
        ({"base": "row.yaml"}, ["leads back to itself"]),
    ],
)
def test_refusals_name_file_and_key(tmp_path, content, words):
    with pytest.raises(bags.UserError) as error:
        bags.load_config(write(tmp_path, **content))
    message = str(error.value)
    assert "\n" not in message and str(tmp_path) in message
    for word in words:
        assert word in message


def test_files_that_are_not_configurations(tmp_path):
    write(tmp_path, "softmax.yaml")
    with pytest.raises(bags.UserError, match=r"did you mean .*softmax\.yaml"):
        bags.load_config(tmp_path / "sofmax.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(bags.UserError, match="found list"):
        bags.load_config(tmp_path / "list.yaml")
    (tmp_path / "tag.yaml").write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(bags.UserError, match="not valid YAML"):
        bags.load_config(tmp_path / "tag.yaml")
    with pytest.raises(bags.UserError, match="expected section.key=value"):
        bags.load_config(tmp_path / "softmax.yaml", ["train.lr"])


def test_every_shipped_configuration_loads():
    paths = sorted((ROOT / "configs").rglob("[!_]*.yaml"))
    assert paths
    for path in paths:
        own = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        assert len(own) <= 8, f"{path}: a row is at most 8 lines of its own"
        config = bags.load_config(path)
        assert config.name == path.stem
