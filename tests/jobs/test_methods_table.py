"""`make table TABLE=methods`, as a user runs it, on tiny data."""

import math
import shutil

import pytest
import torch
from conftest import metrics, read_lines, run_script, write_configs, write_dataset

import bags
from bags.analysis.paper import METHODS
from bags.analysis.run_files import read_seconds
from bags.classifiers.group_softmax import GroupSoftmaxSettings
from bags.data.statistics import CategoryStats
from bags.engine.metrics import Stopwatch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def table(job, glyphs, tmp_path_factory):
    """The rows of the table on the tiny dataset: (dataset, runs, process)."""
    _, runs, _ = job
    folder = tmp_path_factory.mktemp("methods")
    dataset = write_dataset(folder, glyphs)
    shutil.copytree(runs, folder / "runs")
    done = run_script("tables", "--paper", "methods", dataset, f"output={folder / 'runs'}")
    assert done.returncode == 0, done.stderr
    return dataset, folder / "runs", done


def test_every_method_has_a_row_of_its_own(table):
    """Numbers are those of the runs; what was published stands below the rows that it belongs to."""
    _, runs, done = table
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"]
    titles = [line[0] for line in lines[2:]]
    expected = []
    for row in METHODS.rows:
        expected += [row.title, *([f"{METHODS.source} {row.title}"] if row.published else [])]
    assert titles == expected
    header = lines[0]
    ours = {line[0]: dict(zip(header, line, strict=True)) for line in lines[2:]}
    for row in METHODS.rows:
        assert ours[row.title]["mAP"] == f"{100 * metrics(runs, row.config)['AP']:.2f}"
    published = ours[f"{METHODS.source} BAGS"]
    shown = " ".join(published[column] for column in ("mAP", "AP1", "APr", "APc", "APf", "seconds"))
    assert shown == "23.10 - 13.10 22.50 28.20 -"
    calibrated = {"NorCal", "logit adjustment of the scores", "FRACAL", "LogN", "nearest neighbours"}
    trained = {row.title for row in METHODS.rows} - calibrated - {"FRACAL of the sigmoids"}
    assert all((ours[title]["seconds"] != "-") == (title in trained) for title in ours if "published" not in title)
    states = [torch.load(runs / "tiny" / r.config / "last.pth", weights_only=True)["model"] for r in METHODS.rows]
    stages = [s["roi_heads.classifier.linear.weight"] for s in states]
    # Every tiny category is rare, so DropLoss drops nothing that EQL does not.
    kept = {
        "softmax",
        "norcal",
        "logit_adjustment_scores",
        "simcal",
        "disalign",
        "fracal",
        "knn",
        "logit_normalisation",
    }
    alike = [kept, {"eql", "drop_loss"}, {"sigmoid", "fracal_sigmoid"}]
    for row, weight in zip(METHODS.rows, stages, strict=True):
        same = {o.config for o, w in zip(METHODS.rows, stages, strict=True) if torch.equal(w, weight)}
        assert same == next((group for group in alike if row.config in group), {row.config})
    base = states[0]
    for row, state in zip(METHODS.rows, states, strict=True):  # the classifier alone was trained
        frozen = all(torch.equal(v, state[k]) for k, v in base.items() if "classifier" not in k)
        assert frozen != (row.config.endswith("_all") or row.config == "rfs")
    two = next(s for r, s in zip(METHODS.rows, states, strict=True) if r.config == "simcal")
    start = next(s for r, s in zip(METHODS.rows, states, strict=True) if r.config == "softmax_balanced")
    assert not torch.equal(two["roi_heads.classifier.calibrated.weight"], start["roi_heads.classifier.linear.weight"])


def test_rows_that_the_dataset_leaves_out(table, glyphs, tmp_path):
    _, runs, _ = table
    kept = ("softmax", "norcal", "softmax_retrained", "bags", "seesaw")
    left_out = [row.config for row in METHODS.rows if row.config not in kept]
    dataset = write_dataset(tmp_path, glyphs, left_out=left_out)
    done = run_script("tables", "--paper", "methods", dataset, f"output={runs}")
    assert done.returncode == 0, done.stderr
    titles = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line[:1] == "|"][2:]
    assert [title for title in titles if "published" not in title] == [
        "softmax",
        "NorCal",
        "softmax, retrained",
        "BAGS",
        "Seesaw",
    ]
    for wrong, words in (([tmp_path / "base"], "expected one dataset"), ([dataset, dataset], "expected one dataset")):
        done = run_script("tables", "--paper", "4", *wrong, f"output={runs}")
        assert done.returncode == 2 and words in done.stderr, done.stderr


def test_seconds_are_of_the_own_steps(table):
    """They grow along the log, and are less than the pass that many rows shared took."""
    _, runs, _ = table
    log = [line["seconds"] for line in read_lines(runs / "tiny/eql/log.jsonl")]
    assert log == sorted(log) and log[0] > 0 and read_seconds(runs / "tiny/eql") == log[-1]
    assert math.isnan(read_seconds(runs / "tiny/norcal"))
    clock = Stopwatch()
    with clock:
        sum(range(10**5))
    first = clock.seconds()
    with clock:
        pass
    assert 0 < first <= clock.seconds()


def test_methods_combine_with_other_samplers_and_the_whole_detector():
    """Names of methods are overrides: no key of the replaced one stays."""
    for name in ("eql", "eql_v2", "seesaw", "federated", "drop_loss", "class_balanced_sigmoid", "balanced_sigmoid"):
        overrides = [f"classifier.name={name}", "sampler.name=repeat_factor", "sampler.threshold=0.05"]
        config = bags.load_config("glyphs-100/softmax", overrides)
        assert config.classifier.name == name and config.train.part == "all"
        assert bags.load_config("glyphs-100/bags", [f"classifier.name={name}"]).is_cached


def test_groups_of_equal_instances_from_a_configuration():
    """`equal_groups` replaces the boundaries; more of them than distinct counts is one clear error."""
    stats = CategoryStats((1, 2, 3), ("a", "b", "c"), (500, 50, 450), (9, 9, 9))
    classifier = GroupSoftmaxSettings(equal_groups=2, temperatures="learned").build(4, 0, stats)
    assert classifier.groups.boundaries == (500,) and len(classifier.log_factors) == 3
    with pytest.raises(bags.UserError, match="classifier.equal_groups: expected 1 to 3"):
        GroupSoftmaxSettings(equal_groups=4).build(4, 0, stats)


def test_groups_that_were_given():
    """By category ids, here not their labels: each in one list. Weights are exchanged within equal groups alone."""
    stats = CategoryStats((7, 8, 3), ("a", "b", "c"), (500, 50, 450), (9, 9, 9))
    config = GroupSoftmaxSettings(groups=((3, 7), (8,)))
    groups = config.build(4, 0, stats).groups
    assert groups.sizes == (2, 1) and groups.group_of == (0, 1, 0) and groups.members(0) == [1, 3]
    by_count = GroupSoftmaxSettings(boundaries=(100,))
    assert config.columns(stats) == GroupSoftmaxSettings(groups=((7, 3), (8,))).columns(stats)
    assert config.columns(stats) != by_count.columns(stats)
    assert by_count.columns(stats) == GroupSoftmaxSettings(groups=((8,), (3, 7))).columns(stats)
    for given, message in {
        ((3, 7),): r"classifier.groups: .* no group has category 8",
        ((3, 7), (8, 9, 10)): r"there is no category 9 \(and 1 more\)",
        ((3, 7), (8, 3)): "more than one place has category 3",
    }.items():
        with pytest.raises(bags.UserError, match=message):
            GroupSoftmaxSettings(groups=given).build(4, 0, stats)


def test_impossible_groups_are_refused_before_anything_is_trained(glyphs, tmp_path):
    """They need the categories, so that no configuration alone can be wrong."""
    configs = write_configs(tmp_path / "configs", glyphs)
    for setting, message in {
        "classifier.equal_groups=500": "classifier.equal_groups: expected 1 to",
        "classifier.groups=[[1], [999]]": "in one list: there is no category 999",
    }.items():
        key, _, value = setting.partition("=")
        row = configs / "bags.yaml"
        row.write_text(f"base: _base.yaml\nclassifier: {{name: group_softmax, {key.split('.')[1]}: {value}}}\n")
        done = run_script("train", configs / "softmax.yaml", row, f"output={tmp_path}")
        assert done.returncode == 2 and message in done.stderr
        assert not list(tmp_path.glob("**/log.jsonl"))
        done = run_script("prepare_data", "check", row)
        assert done.returncode == 2 and message in done.stderr


def test_names_of_swept_rows_fit_into_a_folder():
    """Short values as they are; long ones, which groups can be, by a digest of their own."""
    from bags.jobs.sweep import row_name

    assert row_name("bags", ("classifier.others_ratio=2", "train.lr=0.1")) == "bags,others_ratio=2,lr=0.1"
    names = {row_name("bags", (f"classifier.groups={[list(range(300)), [last]]}",)) for last in (300, 301)}
    assert len(names) == 2 and all(len(name) < 100 and name.startswith("bags,groups=[[0, 1, 2") for name in names)


@pytest.mark.parametrize(
    "override, message",
    [
        ("classifier={name: eql, prior: 0}", "classifier.prior: expected between 0 and 1"),
        ("classifier={name: drop_loss, tail_images: -1}", "classifier.tail_images: expected 0 or more"),
        ("classifier={name: eql_v2, gamma: -1}", "classifier.gamma: expected 0 or more"),
        ("classifier={name: seesaw, p: .inf}", "classifier.p: "),
        ("classifier={name: federated, number: 0}", "classifier.number: expected 1 or more"),
        ("classifier={name: logit_adjustment, tau: -1}", "classifier.tau: expected 0 or more"),
        ("classifier={name: acsl, threshold: 1}", "classifier.threshold: expected between 0 and 1"),
        ("classifier={name: class_balanced_sigmoid, beta: 1}", "classifier.beta: expected 0 <= beta < 1"),
        ("classifier={name: logit_adjustment, adjust: both}", "classifier.adjust"),
        ("classifier={name: seesaw, gamma: 1}", "classifier.gamma"),
        ("classifier={name: group_softmax, scale: -1}", "classifier.scale"),
        ("classifier={name: group_softmax, equal_groups: -1}", "classifier.equal_groups"),
        ("classifier={name: group_softmax, groups: []}", "classifier.groups: expected one list"),
        ("classifier={name: group_softmax, groups: [[1]], equal_groups: 2}", "classifier.groups: expected only one"),
        ("classifier={name: group_softmax, groups: [[1]], temperatures: [1]}", "temperatures: expected learned, or 2"),
        ("classifier={name: group_softmax, temperatures: [1, 2]}", "classifier.temperatures: expected learned, or 5"),
        ("classifier={name: group_softmax, temperatures: warm}", "classifier.temperatures"),
        ("classifier={name: simcal}", "train.part: expected cls: simcal keeps the softmax"),
        ("sampler={name: class_balanced}", "train.features: expected cached"),
    ],
)
def test_impossible_settings(override, message):
    with pytest.raises(bags.UserError, match=message):
        bags.load_config("glyphs-100/softmax", [override])
