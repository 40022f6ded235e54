"""The row `average`: rows in order, one checkpoint of all members, and what cannot be averaged."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY, metrics, run_ranks, run_script

import bags
from bags.analysis.run_results import about, read_run
from bags.assembly.loaders import open_index
from bags.config.load import config_to_dict, load_config, load_rows
from bags.data.statistics import CategoryStats
from bags.engine.checkpoint import load_checkpoint, write_checkpoint
from bags.jobs.train import run_jobs

MEMBERS = ("softmax_retrained", "bags")


def write_row(configs, name, **classifier):
    """A row of an average beside the rows of `job`; keys of the classifier."""
    row = {"base": "_base.yaml", "detector": {"init_from": "row:softmax"}, "train": {"part": "none"}}
    classifier = {"name": "average", "of": [f"row:{member}" for member in MEMBERS], **classifier}
    (configs / f"{name}.yaml").write_text(yaml.safe_dump({**row, "classifier": classifier}))
    return configs / f"{name}.yaml"


def copied(job, folder):
    """(configs, runs): the three trained rows of `job` in another folder, with the row `average`."""
    configs, runs = (shutil.copytree(path, folder / path.name) for path in job[:2])
    write_row(configs, "average", weights=[1, 2])
    return configs, runs


@pytest.fixture(scope="module")
def averaged(job, tmp_path_factory):
    """(configs, runs) with the row `average` run once."""
    configs, runs = copied(job, tmp_path_factory.mktemp("averaged"))
    bags.train(configs / "average.yaml", [f"output={runs}"])
    return configs, runs


def changed(file, change):
    """Write a checkpoint again, after a function has changed its content."""
    content = load_checkpoint(file)
    change(content)
    write_checkpoint(file, {key: value for key, value in content.items() if key != "format"})


def box_features(count=5, width=32):
    torch.manual_seed(0)
    return bags.BoxFeatures(torch.rand(count, 16, 7, 7), torch.rand(count, width))


# --------------------------------------------------------------------------- order


def test_rows_are_run_before_their_average(job, tmp_path):
    """Whatever the order of the files: `average` is the first of them."""
    configs, _ = copied(job, tmp_path)
    write_row(configs, "a", of=["row:average", "row:bags"])
    names = [config.name for config in load_rows([configs], [])]
    assert names[0] == "softmax" and names[-2:] == ["average", "a"] and set(names[1:3]) == set(MEMBERS)


def test_missing_members_are_added_to_chosen_methods():
    names = [config.name for config in load_rows([Path("glyphs-100")], [], None, ["average", "seesaw"])]
    assert set(names) == {"average", "seesaw", "softmax", "softmax_retrained", "reweight_cls", "bags_cosine"}
    assert names.index("average") > max(names.index(n) for n in ("softmax_retrained", "reweight_cls", "bags_cosine"))


def test_averages_of_each_other_are_refused(job, tmp_path):
    configs, _ = copied(job, tmp_path)
    write_row(configs, "average", of=["row:a"])
    write_row(configs, "a", of=["row:average"])
    with pytest.raises(bags.UserError, match="start from each other in a circle: a, average$"):
        load_rows([configs], [])


# --------------------------------------------------------------------------- the row


def test_the_checkpoint_is_the_mean_of_its_members(averaged):
    configs, runs = averaged
    files = [runs / "tiny" / row / "last.pth" for row in (*MEMBERS, "average")]
    first, second, average = (bags.load_detector(file)[0].roi_heads.classifier for file in files)
    seen = box_features()
    expected = first.probs(first(seen)) / 3 + second.probs(second(seen)) * 2 / 3
    torch.testing.assert_close(average.probs(average(seen)), expected)
    states = [load_checkpoint(file)["model"] for file in files]
    for name, value in states[-1].items():
        if "classifier" not in name:
            assert torch.equal(value, states[0][name])
    assert set(metrics(runs, "average")) == set(metrics(runs, "bags"))
    described = about(read_run(runs / "tiny/average"))
    assert described["classifier"] == "average, of=('row:softmax_retrained', 'row:bags'), weights=(1.0, 2.0)"


def test_a_complete_average_is_not_run_again(averaged):
    configs, runs = averaged
    done = run_script("train", configs, f"output={runs}")
    assert done.returncode == 0 and done.stdout.count("complete, not run again") == 4, done.stderr


def test_an_average_needs_its_members_no_more(averaged, glyphs, tmp_path):
    """Their folders are removed: the run is complete, predicts, is scored to the same numbers and reported."""
    configs, runs = averaged
    shutil.copytree(runs / "tiny/average", tmp_path / "runs/tiny/average")
    run = tmp_path / "runs/tiny/average"
    for command in (
        ["train", configs / "average.yaml", f"output={tmp_path / 'runs'}"],
        ["predict", run / "last.pth", glyphs / "val", "--output", tmp_path / "drawn"],
        ["report", run],
    ):
        done = run_script(*command)
        assert done.returncode == 0, done.stderr
        assert command[0] != "train" or "complete, not run again" in done.stdout
    assert "row:softmax_retrained" in (run / "report.html").read_text()
    done = run_script("evaluate", run / "last.pth", "--output", tmp_path / "scored")
    assert done.returncode == 0, done.stderr
    again = yaml.safe_load((tmp_path / "scored/metrics.json").read_text())
    assert again["AP"] == pytest.approx(metrics(runs, "average")["AP"], abs=1e-12)
    done = run_script("import_weights", "--export", run / "last.pth", "--output", tmp_path / "x.pth")
    assert done.returncode == 2 and "its classifier is average; torchvision's is a softmax" in done.stderr


def test_the_resolved_file_runs_again(averaged, tmp_path):
    """`config.yaml` of the run holds the members' settings, which are read from the runs all the same."""
    configs, runs = averaged
    resolved = load_config(runs / "tiny/average/config.yaml")
    assert [member.name for member in resolved.classifier.members] == ["softmax", "group_softmax"]
    shutil.copytree(runs, tmp_path / "runs")
    (tmp_path / "average.yaml").write_text((runs / "tiny/average/config.yaml").read_text())
    bags.train(tmp_path / "average.yaml", [f"output={tmp_path / 'runs'}", "name=again"])
    assert metrics(tmp_path / "runs", "again")["AP"] == metrics(runs, "average")["AP"]


def test_an_average_of_averages(averaged, tmp_path):
    configs, runs = (shutil.copytree(folder, tmp_path / folder.name) for folder in averaged)
    row = write_row(configs, "outer", of=["row:average", "row:bags"], weights=[3, 1])
    bags.train(row, [f"output={runs}"])
    files = [runs / "tiny" / name / "last.pth" for name in (*MEMBERS, "outer")]
    first, second, outer = (bags.load_detector(file)[0].roi_heads.classifier for file in files)
    seen = box_features()
    expected = 0.25 * first.probs(first(seen)) + 0.75 * second.probs(second(seen))
    torch.testing.assert_close(outer.probs(outer(seen)), expected)


def test_what_loce_remembers_for_training_is_not_kept(averaged, tmp_path):
    """The average of an earlier version, which has it, is complete, loads, and can itself be averaged."""
    configs, runs = (shutil.copytree(folder, tmp_path / folder.name) for folder in averaged)
    row = yaml.safe_load((configs / "bags.yaml").read_text()) | {"classifier": {"name": "loce", "queue": 4}}
    (configs / "loce.yaml").write_text(yaml.safe_dump(row))
    bags.train(configs / "loce.yaml", [f"output={runs}"])
    row = write_row(configs, "mean", of=["row:loce", "row:bags"])
    bags.train(row, [f"output={runs}"])
    loce, group, mean = (runs / "tiny" / name / "last.pth" for name in ("loce", "bags", "mean"))
    prefix = "roi_heads.classifier."
    memory = load_checkpoint(loce)["model"][f"{prefix}memory"]
    assert memory.shape == (TINY.categories * 4 + 1, 32) and memory.any()
    assert load_checkpoint(mean)["model"][f"{prefix}members.0.memory"].shape == (1, 32)

    def as_before(content):
        content["model"][f"{prefix}members.0.memory"] = memory
        content["config"]["classifier"]["members"][0]["queue"] = 4

    seen = box_features()
    for change in (lambda content: None, as_before):
        changed(mean, change)
        first, second, average = (bags.load_detector(file)[0].roi_heads.classifier for file in (loce, group, mean))
        expected = (first.probs(first(seen)) + second.probs(second(seen))) / 2
        torch.testing.assert_close(average.probs(average(seen)), expected)
        done = run_script("train", row, f"output={runs}")
        assert done.returncode == 0 and done.stdout.count("complete, not run again") >= 1, done.stderr
        before = metrics(runs, "mean")
        (mean.parent / "metrics.json").unlink()
        bags.train(row, [f"output={runs}"])  # only scored again
        assert metrics(runs, "mean") == before
        changed(mean, change)
        outer = write_row(configs, f"outer_{change.__name__.strip('<>')}", of=["row:mean", "row:softmax_retrained"])
        bags.train(outer, [f"output={runs}"])
        saved = load_checkpoint(runs / "tiny" / outer.stem / "last.pth")["model"]
        assert saved[f"{prefix}members.0.members.0.memory"].shape == (1, 32)


@pytest.mark.parametrize("what", ["weights", "settings"])
def test_a_member_that_was_trained_anew_is_noticed(averaged, tmp_path, what):
    """Also where only the settings of its scores have changed, as those of tau_norm: the weights are the same."""
    configs, runs = (shutil.copytree(folder, tmp_path / folder.name) for folder in averaged)

    def change(content):
        """Another bias, or other temperatures."""
        if what == "weights":
            content["model"]["roi_heads.classifier.linear.bias"] += 1
        else:
            content["config"]["classifier"]["temperatures"] = [0.5, 1, 1, 1]

    changed(runs / "tiny/bags/last.pth", change)
    with pytest.raises(bags.UserError) as error:
        bags.train(configs / "average.yaml", [f"output={runs}"])
    words = "weights" if what == "weights" else "classifiers"
    assert f"average: this run started from other {words} than" in str(error.value)
    assert "tiny/bags/last.pth hold now: remove the folder, or set output= to keep both" in str(error.value)


def test_a_sweep_over_the_weights_shares_a_pass(averaged, tmp_path):
    """Rows of one pass; all weight on one member is that member's row."""
    configs, runs = (shutil.copytree(folder, tmp_path / folder.name) for folder in averaged)
    values = ["[1,1]", "[1,0]", "[0,1]"]
    done = run_script("sweep", configs / "average.yaml", f"output={runs}", "--over", "classifier.weights", *values)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("features: 100%") <= 1
    names = [f"average,weights={value}" for value in values]
    for name, member in zip(names[1:], MEMBERS, strict=True):
        assert metrics(runs, name)["AP"] == pytest.approx(metrics(runs, member)["AP"], abs=1e-9)
    whole = [load_config(runs / "tiny" / name / "config.yaml").classifier.weights for name in names]
    assert whole == [(1, 1), (1, 0), (0, 1)]


def test_averages_of_rows_that_are_still_to_be_run_wait(averaged, tmp_path):
    """An average and an average of it could share a pass, but the second needs the first one's checkpoint."""
    configs, runs = (shutil.copytree(folder, tmp_path / folder.name) for folder in averaged)
    rows = [write_row(configs, "b"), write_row(configs, "c", of=["row:b"]), write_row(configs, "d", weights=[1, 3])]
    run_jobs([load_rows(rows, [f"output={runs}"])], lambda folders: None)
    assert metrics(runs, "b")["AP"] == pytest.approx(metrics(runs, "c")["AP"], abs=1e-9)


@pytest.mark.slow
def test_two_ranks_predict_the_same(averaged, tmp_path):
    configs, runs = (shutil.copytree(folder, tmp_path / folder.name) for folder in averaged)
    for done in run_ranks(2, "train", configs / "average.yaml", f"output={runs}", "name=ranks"):
        assert done.returncode == 0, done.stderr
    assert metrics(runs, "ranks")["AP"] == pytest.approx(metrics(runs, "average")["AP"], abs=1e-9)


# --------------------------------------------------------------------------- frameworks


def made(tmp_path, glyphs, averaged, framework):
    """A detector with random weights and two members of it as checkpoints; the row of their average."""
    tree = yaml.safe_load((averaged[0] / "_base.yaml").read_text())
    tree["detector"]["framework"] = framework
    (tmp_path / "_base.yaml").write_text(yaml.safe_dump(tree))
    config = load_config(tmp_path / "_base.yaml")
    stats = CategoryStats.from_index(open_index(config, "train"))
    torch.manual_seed(0)
    base = bags.build_detector(config, stats).state_dict()
    for name in ("softmax", "group_softmax", "seesaw"):
        member = load_config(tmp_path / "_base.yaml", [f"classifier.name={name}"])
        detector = bags.build_detector(member, stats)
        state = {key: value for key, value in base.items() if "classifier." not in key}
        new = {key: 5 * torch.randn(value.shape) for key, value in detector.state_dict().items() if "linear" in key}
        content = {"config": config_to_dict(member), "stats": stats.to_dict()}
        write_checkpoint(tmp_path / f"{name}.pth", {**content, "model": {**detector.state_dict(), **state, **new}})
    files = [str(tmp_path / f"{name}.pth") for name in ("softmax", "group_softmax", "seesaw")]
    return files, write_row(tmp_path, "average", of=files, weights=[1, 2, 3])


@pytest.mark.parametrize("framework", ["cascade_rcnn", "mask_rcnn"])
def test_other_frameworks(averaged, glyphs, tmp_path, framework):
    """In each stage stands an average; its scores are the mean of those that the members give in all stages."""
    files, row = made(tmp_path, glyphs, averaged, framework)
    overrides = [f"output={tmp_path / 'runs'}", f"detector.init_from={files[0]}"]
    bags.train(row, overrides)
    average, *members = (bags.load_detector(file)[0] for file in (tmp_path / "runs/tiny/average/last.pth", *files))
    stages = len(average.roi_heads.box_stages)
    assert stages == (3 if framework == "cascade_rcnn" else 1)
    seen = []
    for detector in (average, *members):
        detections = []
        last = detector.roi_heads.box_stages[-1]
        last.detect = lambda scores, *_, into=detections: into.append(scores)
        features = [([torch.zeros(5, 4)], box_features()) for _ in range(stages)]
        detector.roi_heads.stage_detections(features, [(64, 64)])
        seen += detections
    expected = sum(weight / 6 * scores for weight, scores in zip((1, 2, 3), seen[1:], strict=True))
    torch.testing.assert_close(seen[0], expected)
    if framework == "mask_rcnn":
        assert "mask_AP" in metrics(tmp_path / "runs", "average")


# --------------------------------------------------------------------------- what is refused


def test_a_user_is_told_what_cannot_be_averaged(averaged, tmp_path):
    """Through the script: exit code 2, one line."""
    configs, runs = averaged
    row, out = configs / "average.yaml", f"output={runs}"
    shutil.copy(runs / "tiny/bags/last.pth", tmp_path / "damaged.pth")
    with open(tmp_path / "damaged.pth", "r+b") as file:
        file.seek(3000)
        file.write(b"damaged")
    cases = [
        (["classifier.of=[]", "classifier.weights=[]"], "average.yaml: classifier.of: expected one run or more"),
        (["classifier.of=[row:bags,row:bags]"], "classifier.of: expected each run once"),
        (["classifier.weights=[1]"], "classifier.weights: expected none, or one for each of the 2 runs, got [1.0]"),
        (["classifier.of=[row:average,row:bags]"], "classifier.of: expected row:NAME of another row"),
        (["name=x", "classifier.of=[row:bags,row:none]"], "tiny/none: no finished run; run the row none first"),
        (["name=x", f"classifier.of=[row:bags,{tmp_path}/damaged.pth]"], "damaged.pth: damaged"),
        (["train.part=cls"], "train.part: expected none: average trains nothing"),
    ]
    for overrides, words in cases:
        done = run_script("train", row, out, *overrides)
        last_line = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 2 and last_line.startswith("error: ") and words in last_line, done.stderr
        assert "Traceback" not in done.stderr


CHANGES = {
    "was trained on another detector than .* (roi_heads.box_head.fc6.bias differs)": (
        lambda c: c["model"]["roi_heads.box_head.fc6.bias"].add_(1)
    ),
    "was trained on another detector than .* (rpn.head.cls_logits.bias differs)": (
        lambda c: c["model"].pop("rpn.head.cls_logits.bias")
    ),
    "not those of its own classifier (roi_heads.classifier.linear.bias is missing)": (
        lambda c: c["model"].pop("roi_heads.classifier.linear.bias")
    ),
    "not those of its own classifier (roi_heads.classifier.x is not expected)": (
        lambda c: c["model"].update({"roi_heads.classifier.x": torch.ones(1)})
    ),
    "(roi_heads.classifier.linear.bias has another type)": (
        lambda c: c["model"].update({"roi_heads.classifier.linear.bias": torch.ones(3, dtype=torch.int64)})
    ),
    "size mismatch for roi_heads.classifier.members.0.linear.bias: .*Size([3])": (
        lambda c: c["model"].update({"roi_heads.classifier.linear.bias": torch.ones(3)})
    ),
    "roi_heads.classifier.linear.bias holds numbers that are not finite": (
        lambda c: c["model"]["roi_heads.classifier.linear.bias"].fill_(torch.nan)
    ),
    "was trained on other annotations than .*train.json": (
        lambda c: c["stats"].update(image_counts=[count + 1 for count in c["stats"]["image_counts"]])
    ),
    "has 8 categories, not the 8 of": lambda c: c["stats"].update(names=list("abcdefgh")),
    "classifier.groups: expected each category id in one list": (
        lambda c: c["config"].update(classifier={"name": "group_softmax", "groups": [[1, 2]]})
    ),
    "was trained with detector.image_mean": lambda c: c["config"]["detector"].update(image_mean=[0, 0, 0]),
    "its classifier ncm needs pooled features": (
        lambda c: (c["config"]["train"].update(part="none"), c["config"].update(classifier={"name": "ncm"}))
    ),
    "its classifier average has no classifier.members": (
        lambda c: (
            c["config"]["train"].update(part="none"),
            c["config"].update(classifier={"name": "average", "of": ["a"]}),
        )
    ),
}


@pytest.mark.parametrize("words", CHANGES)
def test_members_that_do_not_fit(averaged, tmp_path, words):
    configs, runs = averaged
    file = tmp_path / "member.pth"
    shutil.copy(runs / "tiny/bags/last.pth", file)
    changed(file, CHANGES[words])
    with pytest.raises(bags.UserError) as error:
        bags.train(configs / "average.yaml", [f"output={runs}", "name=x", f"classifier.of=[{file},row:bags]"])
    first, _, last = words.partition(".*")
    assert str(error.value).startswith(f"{file}: ") and first in str(error.value) and last in str(error.value)
    assert "\n" not in str(error.value) and not (runs / "tiny/x/last.pth").exists()


def test_an_average_without_members_cannot_be_loaded(averaged, tmp_path):
    file = shutil.copy(averaged[1] / "tiny/average/last.pth", tmp_path / "last.pth")
    changed(file, lambda content: content["config"]["classifier"].pop("members"))
    with pytest.raises(bags.UserError, match=r"last.pth: config: classifier.members: expected the settings"):
        bags.load_detector(file)


def test_an_average_counts_all_its_layers(averaged, tmp_path):
    """A file that names more members than it can hold is refused before they are made."""
    file = shutil.copy(averaged[1] / "tiny/average/last.pth", tmp_path / "last.pth")
    many = {"of": [str(n) for n in range(99)], "weights": [], "members": [{"name": "softmax"}] * 99}

    def change(content):
        """A wide box head and many members."""
        content["config"]["classifier"].update(many)
        content["stats"] = {
            "category_ids": list(range(20000)),
            "names": ["x"] * 20000,
            "instance_counts": [1] * 20000,
            "image_counts": [1] * 20000,
        }

    changed(file, change)
    with pytest.raises(
        bags.UserError, match="holds fewer weights than its own configuration and 20000 categories need"
    ):
        bags.load_detector(file)
