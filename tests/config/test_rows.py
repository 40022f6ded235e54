"""Rows: a dataset and a method composed into one configuration, and YAML files of one's own."""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT

import bags
from bags.analysis.paper import METHODS, PAPER
from bags.cli.arguments import for_this_machine
from bags.config.load import config_to_dict
from bags.config.rows import compose, find_dataset, methods_of, rows_of, summary

DATASETS = sorted(path.stem for path in (ROOT / "configs/datasets").glob("*.yaml"))


def write(folder: Path, name: str, **values) -> Path:
    """A YAML file below a folder."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def configs(tmp_path):
    """A dataset with two methods of its own, in folders as the shipped ones are."""
    write(
        tmp_path,
        "datasets/birds.yaml",
        data={"name": "birds", "root": "/birds"},
        train={"epochs": 5, "lr": 0.3},
        rows=["plain", "groups"],
        classifier_stage={"train": {"epochs": 2}},
        methods={"groups": {"train": {"lr": 0.5}}, "fine": {"train": {"lr": 0.7}}},
    )
    write(tmp_path, "methods/plain.yaml", classifier={"name": "softmax"})
    groups = {"name": "group_softmax", "boundaries": [5]}
    write(
        tmp_path,
        "methods/groups.yaml",
        base="plain",
        classifier=groups,
        train={"part": "cls"},
        detector={"init_from": "row:plain"},
    )
    write(tmp_path, "methods/fine.yaml", base="groups", train={"lr": 0.6})
    return tmp_path


def test_layers_are_laid_in_order(configs):
    """Dataset, classifier stage, then each method of the chain followed by the dataset's changes to it."""
    plain = bags.load_config(configs / "birds/plain")
    assert (plain.name, plain.data.root, plain.train.epochs, plain.train.lr) == ("plain", "/birds", 5, 0.3)
    groups = bags.load_config(configs / "birds/groups")
    assert (groups.train.epochs, groups.train.lr, groups.train.part) == (2, 0.5, "cls")
    fine = bags.load_config(configs / "birds/fine")
    assert (fine.train.epochs, fine.train.lr, fine.classifier) == (2, 0.7, groups.classifier)
    assert bags.load_config(configs / "birds/fine", ["train.lr=0.1"]).train.lr == 0.1
    files = [configs / "datasets/birds.yaml", configs / "methods/fine.yaml"]
    assert list(compose(configs / "birds/fine").files) == files


def test_what_a_path_stands_for(configs, tmp_path):
    birds = configs / "birds"
    assert rows_of(birds) == [birds / "plain", birds / "groups"]
    assert rows_of(birds, ["seesaw"]) == [birds / "seesaw"]  # a packaged method
    assert rows_of(birds / "fine") == [birds / "fine"]
    file = write(tmp_path, "mine/row.yaml", seed=3)
    write(tmp_path, "mine/_base.yaml", seed=4)
    assert rows_of(file) == rows_of(file.parent) == [file]
    assert bags.load_config(file).seed == 3
    methods = methods_of(find_dataset(birds))
    assert summary(methods["seesaw"]).startswith("Seesaw loss") and not summary(methods["fine"])


def test_a_dataset_of_ones_own(tmp_path, monkeypatch):
    """A file that builds on a packaged dataset inherits its rows; one that builds on a row is a row."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "birds.yaml", base="custom", data={"name": "birds", "root": "/birds"})
    write(tmp_path, "more.yaml", base="birds.yaml", train={"lr": 0.25})
    write(tmp_path, "row.yaml", base="glyphs-100/bags", train={"lr": 0.1})
    assert [row.name for row in rows_of(Path("birds.yaml"))] == ["softmax", "softmax_retrained", "bags"]
    config = bags.load_config("more/bags")
    assert (config.data.name, config.train.lr, config.classifier.name) == ("birds", 0.25, "group_softmax")
    row, bagged = bags.load_config("row.yaml"), bags.load_config("glyphs-100/bags")
    changed = dataclasses.replace(bagged, name="row", train=dataclasses.replace(bagged.train, lr=0.1))
    assert row == changed


REFUSED = {
    "birds/nothing": "nothing is no method; known: ",
    "birds/plan": "plan is no method; did you mean plain?",
    "bird": "no such dataset, DATASET/METHOD, folder or file",
    "glyphs-10/bags": "did you mean glyphs-100?",
    "datasets/birds.yml": "no such dataset",
    "datasets/bird.yaml": r"no such configuration file; did you mean .*datasets/birds\.yaml\?",
    "birds/circle": "its `base` leads back to itself",
    "birds/number": "base: expected the name of a method, got 3",
    "empty": "expected a folder of YAML files",
    "no_rows": "rows: expected one method or more",
    "odd_rows": "rows: expected a list of methods, got 'plain'",
    "odd_methods": "methods.plain: expected a section of keys, got 3",
    "typed": r"typed.yaml: methods: plian is no method; did you mean plain\?",
    "orphan": r"orphan.yaml: base: .*bird.yaml: no such configuration file; did you mean .*birds.yaml\?",
    "birds/orphan": r"methods/orphan.yaml: base: plian is no method; did you mean plain\?",
    "nameless": "nameless.yaml: methods: expected names of methods, got 2",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(configs, name):
    write(configs, "methods/circle.yaml", base="circle")
    write(configs, "methods/number.yaml", base=3)
    write(configs, "datasets/no_rows.yaml", rows=[])
    write(configs, "datasets/odd_rows.yaml", rows="plain")
    write(configs, "datasets/odd_methods.yaml", rows=["plain"], methods={"plain": 3})
    write(configs, "datasets/typed.yaml", rows=["plain"], methods={"plian": {"train": {"epochs": 2}}})
    write(configs, "datasets/nameless.yaml", rows=["plain"], methods={2: {"train": {"epochs": 2}}})
    write(configs, "datasets/orphan.yaml", base="bird.yaml", rows=["plain"])
    write(configs, "methods/orphan.yaml", base="plian")
    (configs / "empty").mkdir()
    with pytest.raises(bags.UserError, match=REFUSED[name]):
        for row in rows_of(configs / name):
            bags.load_config(row)


def test_a_dataset_is_no_row(configs):
    with pytest.raises(bags.UserError, match=r"birds.yaml: is a dataset; one of its rows is .*birds/plain"):
        bags.load_config(configs / "datasets/birds.yaml")
    with pytest.raises(bags.UserError, match="is no dataset, so it takes no methods"):
        rows_of(write(configs, "row.yaml", seed=1), ["plain"])


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_method_composes_with_every_dataset(dataset):
    """Every shipped row resolves, and to the same values from its saved file."""
    found = find_dataset(Path(dataset))
    for method in methods_of(found):
        config = bags.load_config(f"{dataset}/{method}")
        assert (config.name, config.data.name) == (method, "mine" if "custom" in dataset else dataset)
        other = method.removesuffix("_bags").removesuffix("_retrained").removeprefix("fracal_")
        assert config.init_row in (None, "softmax", other)
    assert set(found.rows) | set(found.left_out) | set(found.methods) <= set(methods_of(found))


def test_another_dataset_without_a_gpu(tmp_path, monkeypatch, capsys):
    """A dataset or its row is replaced where there is no GPU, unless a device is named or the file is a user's."""
    paths = [Path("configs/custom"), Path("custom/bags"), Path("glyphs-100/bags")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    others = [Path("configs/custom_cpu"), Path("custom_cpu/bags"), Path("glyphs-100/bags")]
    assert for_this_machine(paths, ["data.root=x"]) == others
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith(
        "configs/custom: torch sees no GPU here, so configs/custom_cpu takes"
    )
    assert for_this_machine(paths, ["device=cpu"]) == paths
    own = [write(tmp_path, "own.yaml", base="custom", data={"name": "own"}), tmp_path / "own/bags"]
    assert for_this_machine(own, []) == own and capsys.readouterr().err == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert for_this_machine(paths, []) == paths
    wrong = write(tmp_path, "wrong.yaml", rows=["bags"], without_gpu=["x"])
    with pytest.raises(bags.UserError, match="wrong.yaml: without_gpu: expected the name of a dataset"):
        find_dataset(wrong)


def test_every_row_of_a_table_is_a_method():
    known = methods_of(find_dataset(Path("glyphs-100")))
    for table in (*PAPER.values(), METHODS):
        for row in table.rows:
            assert row.config in known
            assert len(row.published) in (0, len(table.published_columns or table.columns))


def test_methods_are_short_and_say_what_they_are():
    for path in (ROOT / "configs/methods").glob("*.yaml"):
        lines = path.read_text().splitlines()
        assert len(lines) <= 8 and lines[0].startswith("# "), path


def test_rows_resolve_as_the_first_edition_did():
    """Values of four rows, written down from the first edition's files."""
    rfs = config_to_dict(bags.load_config("muscima/rfs"))
    assert rfs["sampler"] == {"name": "repeat_factor", "threshold": 0.05, "released": False}
    assert rfs["train"]["epochs"] == 4 and rfs["train"]["lr"] == 0.1
    htc = bags.load_config("lvis_v1/htc_dcn_bags")
    assert htc.data.train_semantic == "stuffthingmaps" and htc.data.short_sides == (400, 1400)
    assert (htc.detector.backbone, htc.train.epochs, htc.train.lr) == ("resnext101_64x4d", 12, 0.005)
    assert (htc.test.score_threshold, htc.test.max_detections) == (0.001, 300)
    simcal = bags.load_config("glyphs-1230/simcal")
    assert simcal.classifier.below == 100 and simcal.train.lr == 0.2 and simcal.detector.roi.fc == 512
    assert bags.load_config("coco/bags").classifier.boundaries == (20, 400, 8000)
