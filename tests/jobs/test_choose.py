"""`choose` as users run it, on tiny data: what is trained, chosen, resumed, refused and left for other commands."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import metrics, read_lines, run_script, start_script, write_dataset
from PIL import Image

import bags
from bags.analysis.choice import read_choice
from bags.analysis.report import Findings
from bags.analysis.run_results import read_run
from bags.analysis.tables import render_choice
from bags.assembly import mixtures
from bags.engine.checkpoint import load_checkpoint
from bags.evaluation import detection_ap
from bags.evaluation.truth import read_truth
from bags.jobs import choose
from bags.jobs.evaluate import evaluate_checkpoint
from bags.jobs.pool import ADAMW_RATE, POOLS, pool_rows
from bags.jobs.report import gather_labels

ROWS = ("bags", "bags classifier.others_ratio=1", "softmax_retrained x2 adamw", "norcal classifier.gamma=0.3")
NAMES = [
    "softmax_retrained",
    "baseline",
    "bags",
    "bags,others_ratio=1",
    "softmax_retrained,x2,adamw",
    "norcal,gamma=0.3",
]
SETTINGS = ("--folds", "3", "--draws", "100")


@pytest.fixture(scope="module")
def chosen(glyphs, tmp_path_factory):
    """(dataset, runs, what was printed): one choice from nothing."""
    folder = tmp_path_factory.mktemp("choose")
    dataset, runs = write_dataset(folder, glyphs), folder / "runs"
    done = run_script("choose", dataset, f"output={runs}", "--rows", *ROWS, *SETTINGS)
    assert done.returncode == 0, done.stderr
    return dataset, runs, done.stdout


def copied(chosen, folder, *rows):
    """The dataset, and its finished runs (or those of some rows) in another folder."""
    for row in rows or [path.name for path in (chosen[1] / "tiny").iterdir()]:
        shutil.copytree(chosen[1] / "tiny" / row, folder / "runs/tiny" / row)
    return chosen[0], folder / "runs"


def choice(runs):
    return json.loads((runs / "tiny/choose/choose.json").read_text())


def again(dataset, runs, rows=ROWS, **settings):
    """The choice of the fixture in this process."""
    return bags.choose(dataset, [f"output={runs}"], rows, **{"folds": 3, "draws": 100} | settings)


def variant(dataset, folder, change):
    """A copy of the dataset's folder of configurations whose validation annotations are changed: the dataset's path."""
    root = shutil.copytree(Path(bags.load_config(dataset / "softmax").data.root), folder / "data")
    content = json.loads((root / "val.json").read_text())
    change(content)
    (root / "val.json").write_text(json.dumps(content))
    for index in root.glob("*.index"):
        shutil.rmtree(index)
    return write_dataset(folder / "configs", root)


# --------------------------------------------------------------------------- the choice


def test_everything_is_made_from_nothing(chosen):
    """The baseline is trained, rows in the order given; their numbers are those of metrics.json of their runs."""
    _, runs, printed = chosen
    content = choice(runs)
    assert list(content["rows"]) == NAMES and content["images"] == 8 and content["control"] == NAMES[0]
    for row in NAMES:
        scored = metrics(runs, row)
        found = content["rows"][row]["numbers"]
        assert {k: v for k, v in found.items() if v is not None} == pytest.approx(
            {k: scored[k] for k, v in found.items() if v is not None}, abs=1e-12
        )
    assert (runs / "tiny/softmax/last.pth").exists() and (runs / "tiny/choose/last.pth").exists()
    assert all(abs(sum(content[key].values()) - 1) < 1e-12 for key in ("mixture", "chosen"))
    table = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("|")][2:]
    assert sorted(table[:6]) == sorted(NAMES) and table[6:] == ["chosen, on the same images", "chosen, on others"]
    gain, low, high = content["honest"]["gain"]["AP"]
    assert (
        f"mAP is {100 * gain:+.1f} (95 %: {100 * low:+.1f} to {100 * high:+.1f}) against softmax_retrained" in printed
    )
    assert content["better_than_control"] == (low > 0) and (low > 0) == ("cannot tell" not in printed)


def test_the_value_of_a_mixture(chosen, tmp_path):
    """Of three rows on all images, it is the mAP of the row `average` with these members, made by another command."""
    dataset, runs, _ = chosen
    shutil.copytree(runs / "tiny", tmp_path / "runs/tiny", ignore=shutil.ignore_patterns("choose"))
    given = ["classifier.of=[row:softmax_retrained,row:baseline,row:bags]", "classifier.weights=[]"]
    bags.train(dataset / "average", [f"output={tmp_path / 'runs'}", *given])
    again(dataset, tmp_path / "runs", ["bags"])
    lines = read_lines(tmp_path / "runs/tiny/choose/mixtures.jsonl")[1:]
    of_all = next(line["values"][-1] for line in lines if line["shares"] == [1 / 3] * 3)
    assert of_all == pytest.approx(metrics(tmp_path / "runs", "average")["AP"], abs=1e-9)


def test_the_same_again_runs_nothing(chosen):
    dataset, runs, printed = chosen
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file() and path.name != ".lock"}
    done = run_script("choose", dataset, f"output={runs}", "--rows", *ROWS, *SETTINGS)
    assert done.returncode == 0 and done.stdout.count("complete, not run again") == 8
    assert done.stdout[done.stdout.index("| row") :] == printed[printed.index("| row") :]
    done = run_script("choose", dataset, f"output={runs}", "--rows", *ROWS, *SETTINGS, "--json")
    assert json.loads(done.stdout) == choice(runs)
    assert before == {p: p.stat().st_mtime_ns for p in runs.rglob("*") if p.is_file() and p.name != ".lock"}


def test_killed_among_the_mixtures(chosen, tmp_path):
    """Mixtures end in the middle of a line, and choose.json is damaged: what is known is not computed again."""
    dataset, runs = copied(chosen, tmp_path)
    expected, folder = choice(runs), runs / "tiny/choose"
    whole = (folder / "mixtures.jsonl").read_text().splitlines(keepends=True)
    kept = [*whole[:4], whole[4].replace("0.", "0.0", 1).replace("[", "[7.5, ")]  # of other rows: never looked up
    (folder / "mixtures.jsonl").write_text("".join(kept) + '{"shares": [1.0], "values": [NaN]}\n' + whole[5][:30])
    (folder / "choose.json").write_text(json.dumps(expected | {"mixture": {}}))
    (folder / "last.pth").unlink()
    found = again(dataset, runs)
    assert {k: v for k, v in found.items() if k not in ("command", "environment")} == {
        k: v for k, v in expected.items() if k not in ("command", "environment")
    }
    lines = (folder / "mixtures.jsonl").read_text().splitlines(keepends=True)
    assert lines[:4] == whole[:4] and set(whole[4:]) <= set(lines) and (folder / "last.pth").exists()
    assert json.loads((folder / "choose.json").read_text()) == found


def test_the_baseline_as_a_row(chosen, tmp_path):
    """It scores as the row `softmax`, the choice is compared with it too, and it may be what is recommended."""
    dataset, runs = copied(chosen, tmp_path)
    content = again(dataset, runs, [])
    found, scored = content["rows"]["baseline"]["numbers"], metrics(runs, "softmax")
    assert found["AP"] == pytest.approx(scored["AP"], abs=1e-12)
    assert set(content["over_baseline"]) == {"baseline"}
    assert content["instead"] in (None, "softmax_retrained", "baseline")
    difference = content["honest"]["numbers"]["AP"] - found["AP"]
    assert content["over_baseline"]["baseline"]["AP"][0] == pytest.approx(difference, abs=1e-12)
    printed = render_choice(content)
    assert " against softmax_retrained and " in printed and " against baseline." in printed
    kept = {None: "choose", "baseline": "softmax"}.get(content["instead"], content["instead"])
    expected = load_checkpoint(runs / f"tiny/{kept}/last.pth")["model"]
    recommended = bags.load_detector(runs / "tiny/choose/last.pth")[0].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in recommended.items())
    assert content["chosen"] == ({content["instead"]: 1.0} if content["instead"] else content["mixture"])
    given = content | {"over_baseline": {"baseline": {"AP": [0.01, -0.01, 0.03]}}, "instead": "baseline"}
    sentences = {
        "cannot tell it from baseline, which is recommended": {"mixture": {"softmax_retrained": 1.0}},
        "No other choice is better: baseline is recommended": {"mixture": {"baseline": 1.0}},
        "+1.0 (95 %: -1.0 to +3.0) against baseline.": {"instead": None},
    }
    for words, change in sentences.items():
        (runs / "tiny/choose/choose.json").write_text(json.dumps(given | change))
        printed = render_choice(read_choice(runs / "tiny/choose/choose.json"))
        assert words in printed and ("recommended" in printed) == ("instead" not in change)


def test_another_pool_is_another_choice(chosen, tmp_path):
    """A row that equals the control gains nothing: control or baseline is recommended, as a plain softmax."""
    dataset, runs = copied(chosen, tmp_path)
    (runs / "tiny/choose/report.html").write_text("of the older choice")
    content = again(dataset, runs, ["softmax_retrained train.log_every=3"])
    assert list(content["rows"]) == ["softmax_retrained", "baseline", "softmax_retrained,log_every=3"]
    assert content["rows"]["softmax_retrained,log_every=3"]["gain"]["AP"] == [0, 0, 0]
    assert list(content["chosen"]) in (["softmax_retrained"], ["baseline"]) and not content["better_than_control"]
    assert not (runs / "tiny/choose/report.html").exists()
    kept = "softmax" if "baseline" in content["chosen"] else "softmax_retrained"
    states = [load_checkpoint(runs / f"tiny/{row}/last.pth")["model"] for row in ("choose", kept)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert isinstance(bags.load_detector(runs / "tiny/choose/last.pth")[0].roi_heads.classifier, bags.Softmax)
    done = run_script("import_weights", "--export", runs / "tiny/choose/last.pth", "--output", tmp_path / "x.pth")
    assert "error: choose: torchvision has no faster_rcnn with small" in done.stderr  # the classifier is no reason


def test_a_single_row(chosen, tmp_path):
    """With one member the best row is chosen, from the mixtures that are known, and each fold's best row without it."""
    dataset, runs = copied(chosen, tmp_path)
    before, known = choice(runs), (runs / "tiny/choose/mixtures.jsonl").read_text()
    content = again(dataset, runs, members=1)
    assert content["members"] == 1 and before["members"] == len(before["rows"])
    best = max(content["rows"], key=lambda row: content["rows"][row]["numbers"]["AP"])
    assert content["mixture"] == {best: 1.0} and [len(without) for without in content["without_fold"]] == [1, 1, 1]
    assert content["optimistic"] == {key: content["rows"][best][key] for key in ("numbers", "gain")}
    assert content["rows"] == before["rows"]
    assert (runs / "tiny/choose/mixtures.jsonl").read_text() == known
    assert again(dataset, runs, members=1) == content
    assert f"Best of {len(before['rows'])} rows: {best}." in render_choice(content | {"instead": None})
    for number in (1.5, True, 0):
        with pytest.raises(bags.UserError, match=f"--members {number}: expected a whole number of 1 or more"):
            again(dataset, runs, members=number)


def test_more_members_than_rows(chosen):
    """No mean has more members than there are rows: the choice is the same and is not made again."""
    dataset, runs, _ = chosen
    written = (runs / "tiny/choose/choose.json").stat().st_mtime_ns
    assert again(dataset, runs, members=99) == choice(runs) and choice(runs)["members"] == len(choice(runs)["rows"])
    assert (runs / "tiny/choose/choose.json").stat().st_mtime_ns == written


def test_other_pictures_are_not_those_of_an_older_choice(chosen, tmp_path):
    """Nothing that was found out about mixtures is used again."""
    dataset, runs = copied(chosen, tmp_path)
    data = shutil.copytree(bags.load_config(dataset / "bags").data.root, tmp_path / "data")
    for file in (data / "val").iterdir():
        Image.new("RGB", Image.open(file).size).save(file)
    given = [f"output={runs}", f"data.root={data}"]
    with pytest.raises(bags.UserError, match=r"softmax: images in .* have changed since this run was scored"):
        bags.choose(dataset, given, ROWS, folds=3, draws=100)
    for numbers in runs.glob("tiny/*/metrics.json"):
        numbers.unlink()
    with pytest.raises(bags.UserError, match="holds proposal features of other images: remove the folder"):
        bags.choose(dataset, given, ROWS, folds=3, draws=100)
    shutil.rmtree(runs / "tiny/softmax/last.features/val")
    content = bags.choose(dataset, given, ROWS, folds=3, draws=100)
    shutil.rmtree(runs / "tiny/choose")
    fresh = bags.choose(dataset, given, ROWS, folds=3, draws=100)
    names = ("rows", "optimistic", "honest", "mixture", "without_fold")
    assert [content[name] for name in names] == [fresh[name] for name in names]
    assert content["optimistic"] != choice(chosen[1])["optimistic"]


def test_a_start_that_the_choice_would_replace(chosen, tmp_path):
    dataset, runs = copied(chosen, tmp_path, "choose")
    start = runs / "tiny/choose/last.pth"
    with pytest.raises(bags.UserError, match=r"choose/last\.pth: is in the folder that choose writes: set output="):
        again_from = [f"output={runs}", f"detector.init_from={start}"]
        bags.choose(dataset, again_from, ["bags"], folds=3, draws=100)
    assert start.exists()


def test_a_choice_that_fails_keeps_the_older_one(chosen, tmp_path, monkeypatch):
    dataset, runs = copied(chosen, tmp_path)

    def fail(*_):
        raise bags.UserError("no memory")

    monkeypatch.setattr("bags.jobs.choose._select", fail)
    with pytest.raises(bags.UserError, match="no memory"):
        again(dataset, runs, metric="AP50")
    assert choice(runs) == choice(chosen[1]) and (runs / "tiny/choose/last.pth").exists()


def test_other_commands_use_what_was_chosen(chosen, tmp_path, glyphs):
    dataset, runs = copied(chosen, tmp_path, "choose", "softmax")
    run = runs / "tiny/choose"
    for command in (
        ["predict", run / "last.pth", glyphs / "val", "--output", tmp_path / "drawn"],
        ["evaluate", run / "last.pth", "--output", tmp_path / "scored"],
    ):
        done = run_script(*command)
        assert done.returncode == 0, done.stderr
    scored = json.loads((tmp_path / "scored/metrics.json").read_text())
    assert scored["AP"] == pytest.approx(metrics(runs, "choose")["AP"], abs=1e-12)


@pytest.mark.parametrize(("metric", "most"), [("AP1", 90), ("AP_fixed", 90), ("AP_fixed", 12)])
def test_a_metric(chosen, tmp_path, monkeypatch, metric, most):
    """What is chosen has the highest value of it among the rows, or is a mean with a higher one.

    AP_fixed is that of a file in which images keep all detections, and categories `most`, chosen image by image.
    """
    for module, name, few in ((choose, "FIXED", most), (detection_ap, "FIXED", most), (mixtures, "AT_ONCE", 50)):
        monkeypatch.setattr(module, name, few)
    dataset, runs = copied(chosen, tmp_path)
    content = again(dataset, runs, ROWS[:1], metric=metric)
    values = [row["numbers"][metric] for row in content["rows"].values()]
    assert content["optimistic"]["numbers"][metric] >= max(values) and content["metric"] == metric
    truth, row = Path(bags.load_config(dataset / "bags").data.root) / "val.json", runs / "tiny/bags"
    counts, predictions = load_checkpoint(row / "last.pth")["stats"]["instance_counts"], row / "predictions.json"
    limited = bags.evaluate(truth, predictions, instance_counts=counts, fixed=True)[metric]
    evaluate_checkpoint(row / "last.pth", ["test.max_detections=1000000"], tmp_path / "all")
    expected = bags.evaluate(truth, tmp_path / "all/predictions.json", instance_counts=counts, fixed=True)[metric]
    expected = limited if metric == "AP1" else expected
    assert content["rows"]["bags"]["numbers"][metric] == pytest.approx(expected, abs=1e-12)
    assert (metric == "AP_fixed" and most == 90) == (expected != limited)


@pytest.mark.parametrize("most", [1, 7, 40])
def test_the_best_of_each_category(chosen, tmp_path, monkeypatch, most):
    """Dropping low scores between images leaves the detections that all together have, down to the last one's score."""
    dataset, runs = copied(chosen, tmp_path)
    overrides = [f"output={runs}", "test.batch_size=2"]
    rows = pool_rows(dataset, overrides, ROWS[:1])
    config = choose._average(dataset, overrides, rows, [1.0] * len(rows))
    truth = read_truth(Path(config.data.root) / "val.json")
    monkeypatch.setattr(mixtures, "AT_ONCE", 0)
    few = mixtures.Mixtures(config, truth, torch.device("cpu"), most)((0.5,) * len(rows))
    everything = replace(config, test=replace(config.test, max_detections=10**6))
    found = mixtures.Mixtures(everything, truth, torch.device("cpu"))((0.5,) * len(rows))
    best = np.zeros(len(found), bool)
    for category in range(1, len(truth.names) + 1):
        own = np.flatnonzero(found.categories == category)
        best[own] = found.scores[own] >= found.scores[own[:most]].min(initial=1)
    assert 0 < best.sum() == len(few) < len(found)
    for name in ("images", "categories", "boxes", "scores"):
        assert np.array_equal(getattr(few, name), getattr(found, name)[best])


def test_a_test_set_is_scored_once(chosen, tmp_path, glyphs):
    """The control's numbers are those that `evaluate` gives; the second time nothing is detected."""
    dataset, runs = copied(chosen, tmp_path)
    val = json.loads((glyphs / "val.json").read_text())
    kept = {image["id"] for image in val["images"][:6]}
    val |= {"images": val["images"][:6], "annotations": [a for a in val["annotations"] if a["image_id"] in kept]}
    (tmp_path / "test.json").write_text(json.dumps(val))
    images = tmp_path / "test images"
    shutil.copytree(glyphs / "val", images / "val")
    command = ["choose", dataset, f"output={runs}", "--rows", *ROWS, *SETTINGS, "--test", tmp_path / "test.json"]
    for where in ([], ["--test-images", images]):
        done = run_script(*command, *where)
        assert done.returncode == 2 and "6 of its images are in data.val too, first: " in done.stderr, done.stderr
    for file in images.glob("val/*"):
        picture = Image.open(file)
        picture.putpixel((0, 0), (255, 0, 0))
        picture.save(file)
    done = run_script(*command, "--test-images", images)
    assert done.returncode == 0 and f"On {tmp_path / 'test.json'}: mAP" in done.stdout, done.stderr
    content = choice(runs)["test"]
    given = [f"data.val={tmp_path / 'test.json'}", f"data.val_images={images}", "--output", tmp_path / "scored"]
    assert run_script("evaluate", runs / "tiny/softmax_retrained/last.pth", *given).returncode == 0
    assert content["control"]["AP"] == json.loads((tmp_path / "scored/metrics.json").read_text())["AP"]
    assert content["gain"]["AP"][0] == pytest.approx(content["chosen"]["AP"] - content["control"]["AP"])
    shutil.rmtree(runs / "tiny/choose/test")
    images = images.rename(tmp_path / "elsewhere")
    done = run_script(*command, "--test-images", images)
    assert done.returncode == 0 and "was scored already" in done.stderr and choice(runs)["test"] == content
    assert not (runs / "tiny/choose/test").exists()
    for file in images.glob("val/*"):
        Image.new("RGB", Image.open(file).size).save(file)
    done = run_script(*command, "--test-images", images)
    assert done.returncode == 0 and "was scored already" not in done.stderr
    assert choice(runs)["test"]["images"] != content["images"] and choice(runs)["test"]["control"]["AP"] == 0


# --------------------------------------------------------------------------- data


def test_federated_validation_without_some_categories(chosen, tmp_path):
    """LVIS's lists, a category without objects, and ids that are not in the order of the file."""

    def change(content):
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] != 2]
        content["images"].reverse()
        for image in content["images"]:
            held = {a["category_id"] for a in content["annotations"] if a["image_id"] == image["id"]}
            image["neg_category_ids"] = sorted({c["id"] for c in content["categories"]} - held)[:2]
            image["not_exhaustive_category_ids"] = sorted(held)[:1]

    dataset = variant(chosen[0], tmp_path, change)
    content = again(dataset, tmp_path / "runs", ["bags"])
    for row in ("softmax_retrained", "bags"):
        found = content["rows"][row]["numbers"]
        assert found["AP"] == pytest.approx(metrics(tmp_path / "runs", row)["AP"], abs=1e-12)


@pytest.mark.slow
def test_a_cascade_with_masks(glyphs, tmp_path, monkeypatch):
    dataset = write_dataset(tmp_path, glyphs)
    given = [f"output={tmp_path / 'runs'}", "detector.framework=cascade_mask_rcnn"]
    monkeypatch.setattr(mixtures, "AT_ONCE", 50)
    monkeypatch.setattr(choose, "FIXED", 60)
    fixed = bags.choose(dataset, given, ["bags"], "AP_fixed", folds=3, draws=100)
    assert 0 < fixed["rows"]["bags"]["numbers"]["AP_fixed"] < 1
    content = bags.choose(dataset, given, ["bags"], folds=3, draws=100)
    for row in ("softmax_retrained", "bags"):
        found = content["rows"][row]["numbers"]
        assert found["AP"] == pytest.approx(metrics(tmp_path / "runs", row)["AP"], abs=1e-9)
    detector, _ = bags.load_detector(tmp_path / "runs/tiny/choose/last.pth")
    assert set(detector.eval()([torch.rand(3, 64, 64)])[0]) >= {"boxes", "scores"}


# --------------------------------------------------------------------------- rows


def test_rows_of_a_pool(chosen):
    """xN multiplies the stage's schedule, adamw takes a rate for the width of the features, keys are settings."""
    rows = pool_rows(
        chosen[0], [], ["bags x3", "softmax_retrained adamw x2", "bags_cosine classifier.scale=7", "bags  x3"]
    )
    control, _, longer, adamw, cosine = rows
    assert [row.name for row in rows] == [
        "softmax_retrained",
        "baseline",
        "bags,x3",
        "softmax_retrained,adamw,x2",
        "bags_cosine,scale=7",
    ]
    assert (longer.train.epochs, longer.train.milestones) == (3 * control.train.epochs, (4.5,))
    assert (adamw.train.optimizer, adamw.train.lr) == ("adamw", ADAMW_RATE / 32)
    assert cosine.classifier.scale == 7 and cosine.train == control.train


def test_a_row_in_other_words_is_one_row(chosen):
    """Rows of equal settings would count twice in a mean."""
    rows = pool_rows(
        chosen[0], [], ["bags adamw x2", "bags x2 adamw", "bags", "bags x1", "bags classifier.others_ratio=8"]
    )
    assert [row.name for row in rows] == ["softmax_retrained", "baseline", "bags,adamw,x2", "bags"]


@pytest.mark.parametrize("pool", POOLS)
def test_every_row_of_the_pools_is_one(pool):
    """On the packaged dataset: all have names of their own, and one control."""
    names = [row.name for row in pool_rows(Path("glyphs-100"), [], POOLS[pool])]
    assert len(set(names)) == len(names) == len(POOLS[pool]) + 2 and names[:2] == ["softmax_retrained", "baseline"]


def test_rows_that_need_a_softmax_to_start_from(chosen, tmp_path):
    """Of another classifier's checkpoint they are refused before anything is trained."""
    dataset, runs, _ = chosen
    start = f"detector.init_from={runs / 'tiny/bags/last.pth'}"
    words = "its classifier is group_softmax, but these rows keep the layer of a softmax: simcal, norcal;"
    with pytest.raises(bags.UserError, match=words):
        bags.choose(dataset, [f"output={tmp_path}", start], folds=3, draws=100)
    assert not list(tmp_path.iterdir())
    content = bags.choose(dataset, [f"output={tmp_path}", start], ["bags"], folds=3, draws=100)
    assert list(content["rows"]) == ["softmax_retrained", "bags"] and content["over_baseline"] == {}


# --------------------------------------------------------------------------- mistakes

MISTAKES = [
    (["--metric", "APx"], "--metric APx: expected one of AP, APr"),
    (["--metric", "AP4"], "holds no object of its categories: choose another"),
    (["--pool", "big"], "--pool big: expected one of quick, full"),
    (["--rows", "nonsense"], "nonsense is no method; known:"),
    (["--rows", " "], "after --rows: expected a value, got an empty text"),
    (["--rows", "../bags"], "'../bags': expected a row: METHOD"),
    (["--rows", "bags", "data.root=x"], "expected a row: METHOD [xN] [adamw] [section.key=value]; overrides of all"),
    (["--rows", "bags x0"], "bags x0: x0: expected xN, adamw or section.key=value of classifier, sampler, train"),
    (["--rows", "bags x2 x3"], "bags x2 x3: x3: the number of epochs is given twice: leave one out"),
    (["--rows", "bags data.val=x.json"], "bags data.val=x.json: data.val=x.json: expected xN, adamw or section.key"),
    (["--rows", "bags output=x"], "bags output=x: output=x: expected xN"),
    (["--rows", "bags classifier.nonsense=1"], "classifier.nonsense"),
    (["--rows", "norcal x4"], "norcal x4: x4: norcal trains nothing: leave it out"),
    (["--rows", "average"], "average: expected a row that trains or calibrates only the classifier of softmax"),
    (["--rows", "softmax"], "softmax: expected a row that trains or calibrates only the classifier of softmax"),
    (["--rows", "ncm_fc"], "ncm_fc: expected a row that trains or calibrates only the classifier"),
    (["--folds", "9"], "--folds 9: expected 2 to 8, the images of"),
    (["--folds", "1"], "--folds 1: expected 2 to 8"),
    (["--members", "0"], "--members 0: expected a whole number of 1 or more"),
    (["--draws", "10"], "--draws 10: expected 100 or more"),
    (["test.precision=bf16"], "test.precision=bf16: choose scores in fp32: leave it out"),
    (["--pool", "full", "--rows", "bags"], "--pool and --rows: expected one of them"),
    (["name=x"], "name=x: each row of the pool has its own: leave it out"),
    (["classifier.name=seesaw"], "classifier.name=seesaw: each row of the pool has its own"),
    (["detector.reset_classifier=true"], "detector.reset_classifier=true: each row of the pool has its own"),
    (["--test", "missing.json"], "missing.json"),
    (["--test-images", "."], "--test-images .: expected --test"),
]


@pytest.mark.parametrize("arguments, words", MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_mistakes(chosen, arguments, words):
    dataset, runs, _ = chosen
    done = run_script("choose", dataset, f"output={runs}", *arguments)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: ") and words in last, done.stderr
    assert "Traceback" not in done.stderr


def test_mistakes_in_files(chosen, tmp_path, glyphs):
    """No dataset, one image, a test set that was chosen with, and a folder of somebody else."""
    dataset, runs = copied(chosen, tmp_path)
    with pytest.raises(bags.UserError, match="bags: expected a dataset to choose for"):
        again(dataset / "bags", runs)
    with pytest.raises(bags.UserError, match="--test .*val.json: is data.val itself"):
        again(dataset, runs, test=glyphs / "val.json")
    (tmp_path / "indented.json").write_text(json.dumps(json.loads((glyphs / "val.json").read_text()), indent=3))
    with pytest.raises(bags.UserError, match="--test .*indented.json: is data.val itself"):
        again(dataset, runs, test=tmp_path / "indented.json", test_images=glyphs)
    with pytest.raises(bags.UserError, match="no such folder; --test-images says where the images of"):
        again(dataset, runs, test=glyphs / "val.json", test_images=tmp_path / "none")

    def one_image(content):
        content["images"] = content["images"][:1]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] == content["images"][0]["id"]]

    with pytest.raises(bags.UserError, match="val.json: holds one image: expected two or more"):
        again(variant(dataset, tmp_path / "one", one_image), tmp_path / "one/runs")
    assert not (tmp_path / "one/runs").exists()


@pytest.mark.parametrize("file", ["config.yaml", "notes.txt"])
def test_a_folder_of_that_name_is_not_overwritten(chosen, tmp_path, file):
    dataset, runs = copied(chosen, tmp_path, "softmax", "softmax_retrained", "bags")
    (runs / "tiny/choose").mkdir()
    (runs / "tiny/choose" / file).write_text("mine")
    with pytest.raises(bags.UserError, match="choose: holds files that choose has not written: rename the folder"):
        again(dataset, runs, ["bags"])
    assert (runs / "tiny/choose" / file).read_text() == "mine"


def test_several_ranks_are_refused(chosen):
    done = start_script("choose", chosen[0], f"output={chosen[1]}", WORLD_SIZE="2", RANK="0").wait(60)
    assert done.returncode == 2 and "error: choose runs in one process" in done.stderr


def test_the_report_of_a_choice_finds_the_store_of_the_baseline(chosen):
    """A choice starts from the control, and the control from the baseline, beside which the store is."""
    findings = Findings()
    gather_labels(read_run(chosen[1] / "tiny/choose"), findings)
    assert not findings.notes and findings.compared
