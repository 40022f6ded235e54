"""Configuration: what loads, what is refused and how clearly."""

import dataclasses

import pytest
import yaml
from conftest import ROOT

import bags
from bags.analysis.paper import PAPER
from bags.classifiers.group_softmax import GroupSoftmaxSettings
from bags.classifiers.softmax import SoftmaxSettings
from bags.config import config_from_dict, config_to_dict, save_config


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
    assert bags.load_config(path).classifier == SoftmaxSettings()
    path = write(tmp_path, base="_base.yaml", classifier={"boundaries": [5]})
    assert bags.load_config(path).classifier == GroupSoftmaxSettings(boundaries=(5,), others_ratio=2.0)
    config = bags.load_config(path, ["classifier.name=softmax"])
    assert config.classifier == SoftmaxSettings()


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
        ({"train": {"part": "neck"}}, ["train.part", "'cls'"]),
        ({"train": {"part": "cls"}}, ["detector.init_from"]),
        ({"train": 3}, ["train", "section"]),
        ({"classifier": {"name": "group_softmx"}}, ["classifier.name", "did you mean group_softmax"]),
        ({"classifier": "softmax"}, ["classifier: expected a section", "write classifier.name=softmax"]),
        ({"sampler": "bag"}, ["sampler: expected a section of keys, got 'bag'; names: uniform,"]),
        ({"classifier": {"name": "group_softmax", "boundaries": "10,100"}}, ["got '10,100'; write [10,100]"]),
        ({"classifier": {"name": "group_softmax", "group_weights": "1,2e-1"}}, ["or null", "write [1,2e-1]"]),
        ({"train": {"milestones": 5}}, ["got 5; write [5]"]),
        ({"classifier": {"name": "softmax", "others_ratio": 3}}, ["classifier.others_ratio", "unknown key"]),
        ({"classifier": {"name": "group_softmax", "others_ratio": "some"}}, ["others_ratio", "'n'"]),
        ({"classifier": {"name": "group_softmax", "boundaries": [10, 5]}}, ["classifier.boundaries", "rising"]),
        ({"classifier": {"name": "group_softmax", "group_weights": [1, 2]}}, ["classifier.group_weights", "5 numbers"]),
        ({"classifier": {"name": "ncm"}}, ["train.part", "ncm trains nothing"]),
        ({"classifier": {"name": "tau_norm", "tau": -1}}, ["classifier.tau", "0 or more"]),
        ({"classifier": {"name": "reweighted_softmax", "beta": 1}}, ["classifier.beta", "beta < 1"]),
        ({"classifier": {"name": "sigmoid_focal", "alpha": 2}}, ["classifier.alpha", "0 to 1"]),
        ({"sampler": {"name": "repeat_factor", "threshold": 0}}, ["sampler.threshold", "above 0"]),
        ({"sampler": {"name": "repeat_factor", "below": 3}}, ["sampler.below", "unknown key"]),
        ({"train": {"milestones": [3, 2]}}, ["train.milestones", "rising"]),
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


def test_a_schedule_without_milestones():
    assert bags.load_config(ROOT / "configs/glyphs-100/softmax.yaml", ["train.milestones=[]"]).train.milestones == ()


def test_every_shipped_configuration_loads():
    paths = sorted((ROOT / "configs").rglob("[!_]*.yaml"))
    assert paths
    for path in paths:
        own = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        assert len(own) <= 8, f"{path}: a row is at most 8 lines of its own"
        config = bags.load_config(path)
        assert config.name == path.stem


PAPER_FOLDERS = [ROOT / "configs" / name for name in ("glyphs-100", "lvis_v0.5")]


TABLES = [(folder, table) for folder in PAPER_FOLDERS for table in PAPER] + [
    (ROOT / "configs/lvis_v1", table) for table in ("2", "3")
]


@pytest.mark.parametrize("folder, table", TABLES, ids=lambda p: getattr(p, "name", p))
def test_every_row_of_the_paper_is_a_short_file(folder, table):
    """Each row loads, has at most 8 lines, its command on top; the numbers match the table's columns."""
    for row in PAPER[table].rows:
        path = folder / f"{row.config}.yaml"
        path = path if path.exists() else folder / "paper" / f"{row.config}.yaml"
        config, lines = bags.load_config(path), path.read_text().splitlines()
        assert len(lines) <= 8 and lines[0].startswith("# ")
        assert f"# make train CONFIG={path.relative_to(ROOT)}" in [line.split(" GPUS=")[0] for line in lines]
        assert any(label in line for line in lines[:2] for label in ("Table", "Figure", "control"))
        assert config.name == row.config and config.data.name == folder.name
        stem = row.config.removesuffix("_bags")
        assert config.init_row in (None, "softmax") if stem == row.config else config.init_row == stem
        assert len(row.published) in (0, len(PAPER[table].columns))


def test_rows_differ_in_what_their_names_say():
    rows = {p.stem: bags.load_config(p) for folder in PAPER_FOLDERS[1:] for p in folder.rglob("[!_]*.yaml")}
    classifiers = {name: config.classifier for name, config in rows.items()}
    ratios = {0: "bags_beta_0", "n": "bags_beta_n", 8: "bags", "all": "bags_beta_all"}
    assert all(classifiers[name].others_ratio == ratio for ratio, name in ratios.items())
    flags = {n: (classifiers[n].background_group, classifiers[n].others) for n in classifiers if n.startswith("groups")}
    assert flags == {"groups": (False, False), "groups_background": (True, False), "groups_others": (False, True)}
    assert len(classifiers["bags_2_groups"].boundaries) == 1 and len(classifiers["bags_8_groups"].boundaries) == 7
    parts = {name: config.train.part for name, config in rows.items()}
    assert {n for n in parts if parts[n] == "none"} == {"ncm_fc", "ncm_conv", "tau_norm", "tau_norm_select"}
    assert {n for n in parts if parts[n] == "all"} == {
        "softmax", "softmax_x2", "finetune_tail", "rfs", "rfs_finetune", "reweight", "focal",
        "large", "cascade", "mask", "htc", "htc_dcn",
    }  # fmt: skip
    frameworks = {name: (c.detector.framework, c.detector.backbone) for name, c in rows.items()}
    x101 = "resnext101_64x4d"
    for suffix in ("", "_bags"):
        assert frameworks[f"large{suffix}"] == ("faster_rcnn", x101)
        assert frameworks[f"cascade{suffix}"] == ("cascade_rcnn", x101)
        assert frameworks[f"mask{suffix}"] == ("mask_rcnn", "resnet50")
        assert frameworks[f"htc{suffix}"] == frameworks[f"htc_dcn{suffix}"] == ("htc", x101)
        assert rows[f"htc_dcn{suffix}"].detector.deformable_stages == (2, 3, 4)
        assert rows[f"htc_dcn{suffix}"].data.short_sides == (400, 1400) and rows[f"htc{suffix}"].data.train_semantic
    tests = {n: (rows[n].test.score_threshold, rows[n].test.max_detections) for n in rows}
    released = {"large": (0, 300), "large_bags": (0.001, 300), "cascade": (0.001, 300), "cascade_bags": (0.001, 300),
                "mask": (0.05, 100), "mask_bags": (0.001, 300), "htc": (0.001, 100), "htc_bags": (0.001, 300),
                "htc_dcn": (0.001, 100), "htc_dcn_bags": (0.001, 300)}  # fmt: skip
    assert {n: tests[n] for n in released} == released
    assert rows["htc_bags"].train.lr == 0.005 and rows["htc"].train.milestones == (16, 19)
    assert rows["rfs"].sampler == rows["rfs_finetune"].sampler and rows["rfs"].init_row is None
    for field in ("data", "detector", "test", "train"):  # the control differs from BAGS in its classifier alone
        same = dataclasses.replace(rows["softmax_retrained"].detector, reset_classifier=False)
        control = dataclasses.replace(rows["softmax_retrained"], detector=same)
        assert getattr(control, field) == getattr(rows["bags"], field)
