"""What a user gets wrong: one line on stderr that names it, exit code 2, never a traceback."""

import contextlib
import json
import os
import re
import shutil

import pytest
import torch
from conftest import metrics, run_script

import bags
from bags.analysis.run_files import write_scored_on
from bags.config.load import load_config
from bags.engine.predict import predict
from bags.jobs.folders import check_comparable, check_scored_alike, is_complete
from bags.jobs.report import gather, read_runs
from bags.jobs.tables import compare, weight_norms


@pytest.mark.slow
def test_a_row_whose_baseline_was_trained_anew_is_refused(job, tmp_path):
    configs, runs, _ = job
    shutil.copytree(runs / "tiny", tmp_path / "tiny")
    shutil.rmtree(tmp_path / "tiny/softmax")
    for args, code in ((["softmax.yaml", "seed=0"], 0), (["bags.yaml"], 0)):  # the same weights again
        done = run_script("train", configs / args[0], f"output={tmp_path}", *args[1:])
        assert done.returncode == code, done.stderr
    assert "complete, not run again" in done.stdout
    shutil.rmtree(tmp_path / "tiny/softmax")
    assert run_script("train", configs / "softmax.yaml", f"output={tmp_path}", "seed=1").returncode == 0
    done = run_script("train", configs / "bags.yaml", f"output={tmp_path}")
    assert done.returncode == 2 and "started from other weights than" in done.stderr


def test_other_settings_in_the_same_run_folder_are_refused(job):
    configs, runs, _ = job
    done = run_script("train", configs, f"output={runs}", "train.lr=0.5")
    assert done.returncode == 2 and "trained with train.lr=0.01, now it is 0.5" in done.stderr
    assert "give new ones to one row only (DATASET/METHOD with name=)" in done.stderr


def test_settings_that_change_no_result_leave_a_run_complete(job):
    configs, runs, _ = job
    keys = ["data.workers=1", "data.max_bad_images=2", "device=cpu", "test.batch_size=2", "train.log_every=3"]
    keys += ["train.checkpoint_every=9", "train.nonfinite=skip", "train.evaluate_every=1"]
    done = run_script("train", configs, f"output={runs}", *keys)
    assert done.returncode == 0 and done.stdout.count("complete, not run again") == 3, done.stderr


def test_changed_annotations_under_a_complete_run_are_refused(job, glyphs, tmp_path):
    configs, runs, _ = job
    shutil.copytree(runs / "tiny", tmp_path / "tiny")
    data = shutil.copytree(glyphs, tmp_path / "data")
    shutil.copytree(configs, tmp_path / "configs")
    for run in (tmp_path / "tiny").glob("*/config.yaml"):
        run.write_text(run.read_text().replace(str(glyphs), str(data)))
    command = ["train", tmp_path / "configs", f"output={tmp_path}", f"data.root={data}"]
    edit(data / "train.json", lambda c: c.update(info={"note": "not trained on"}))
    done = run_script(*command)
    assert done.returncode == 0 and done.stdout.count("complete") == 3, done.stderr
    edit(data / "train.json", lambda c: c["annotations"][0].update(bbox=[1, 2, 30, 40]))  # the counts stay
    done = run_script(*command)
    assert done.returncode == 2 and "train.json has changed since this run was trained" in done.stderr


def test_numbers_of_changed_annotations_are_refused(moved):
    """By train, tables and report; older runs, which do not say what they were scored on, are taken as they are."""
    configs, overrides, rows, data = moved
    edit(data / "val.json", lambda content: content["annotations"].pop())
    words = (
        r"val.json has changed since this run was scored: remove metrics.json and give the training command again: o"
    )
    with pytest.raises(bags.UserError, match=f"bags: .*{words}"):
        bags.train(configs / "bags.yaml", overrides)
    with pytest.raises(bags.UserError, match=words):
        gather(read_runs([rows / "bags"], [f"data.root={data}"]), draws=0)
    write_scored_on(rows / "bags", data / "val.json", bags.AnnotationIndex.open(data / "val.json").sha256, "")
    for compared in (read_runs, check_scored_alike):
        with pytest.raises(
            bags.UserError, match="bags: was scored on other annotations than .*softmax: for the older re"
        ):
            compared([rows / "softmax", rows / "bags"], *([[]] if compared is read_runs else []))
    (rows / "softmax/scored_on.json").unlink()
    assert is_complete(rows / "softmax", load_config(configs / "softmax.yaml", overrides))
    check_scored_alike([rows / "softmax", rows / "bags"])


def test_numbers_of_changed_images_are_refused(moved):
    """A run of which no image is left, or that does not say which it was scored on, is taken as it is."""
    configs, overrides, rows, data = moved
    config = load_config(configs / "bags.yaml", overrides)
    image = next((data / "val").iterdir())
    before = image.read_bytes()
    image.write_bytes(before + b"0")
    with pytest.raises(bags.UserError, match=r"bags: images in .* have changed since this run was scored: remove met"):
        is_complete(rows / "bags", config)
    with pytest.raises(bags.UserError, match=f"images in {data} have changed since this run was scored"):
        compare({"bags": [rows / "bags"]}, root=str(data))
    with pytest.raises(bags.UserError, match="images in .* have changed since this run was scored"):
        gather(read_runs([rows / "bags"], [f"data.root={data}"]), draws=0)
    digest = bags.AnnotationIndex.open(data / "val.json").sha256
    recorded = (rows / "bags/scored_on.json").read_text()
    write_scored_on(rows / "bags", data / "val.json", digest, "0")
    with pytest.raises(bags.UserError, match="bags: was scored on other images than .*softmax: for the older re"):
        check_scored_alike([rows / "softmax", rows / "bags"])
    (rows / "bags/scored_on.json").write_text(recorded)
    image.write_bytes(before)
    assert is_complete(rows / "bags", config)
    image.unlink()
    done = run_script("train", configs / "bags.yaml", *overrides)
    assert done.returncode == 2 and "have changed since this run was scored" in done.stderr
    scored_on = json.loads((rows / "bags/scored_on.json").read_text())
    del scored_on["images"]
    (rows / "softmax/scored_on.json").write_text(json.dumps(scored_on))
    assert is_complete(rows / "softmax", load_config(configs / "softmax.yaml", overrides))
    shutil.rmtree(data / "val")
    assert is_complete(rows / "bags", config)
    (data / "val").mkdir()
    assert is_complete(rows / "bags", config)


def test_runs_of_one_row_differ_only_in_their_seed(moved, tmp_path):
    rows = moved[2]
    other = shutil.copytree(rows, tmp_path / "other/tiny")
    config = other / "bags/config.yaml"
    config.write_text(config.read_text().replace("\nseed: 0", "\nseed: 1").replace("root: ", "root: /elsewhere"))
    check_comparable({"softmax": [rows / "softmax"], "bags": [rows / "bags", other / "bags"]})
    twin = shutil.copytree(rows / "bags", tmp_path / "twin/bags")
    with pytest.raises(
        bags.UserError, match=r"twin/bags: has the seed \(0\) and the start of .*tiny/bags: runs called"
    ):
        check_comparable({"bags": [rows / "bags", other / "bags", twin]})
    seeds = [shutil.copytree(rows / "bags", tmp_path / name / "bags") for name in ("seed0", "seed1")]
    for row, alike in (("softmax", True), ("softmax_x2", False)):  # each seed from a checkpoint of its own
        for folder, start in zip(seeds, ("seed0/softmax/last.pth", f"/seed1/{row}/last.pth"), strict=True):
            text = re.sub("init_from: .*", f"init_from: {start}", (folder / "config.yaml").read_text())
            (folder / "config.yaml").write_text(text)
        with (
            contextlib.nullcontext() if alike else pytest.raises(bags.UserError, match="has detector.init_from=/seed1")
        ):
            check_comparable({"bags": seeds})
    config.write_text(config.read_text().replace("lr: 0.01", "lr: 0.5"))
    with pytest.raises(
        bags.UserError, match=r"other/tiny/bags: has train.lr=0.5, .*tiny/bags has 0.01: runs called bags"
    ):
        check_comparable({"softmax": [rows / "softmax"], "bags": [rows / "bags", other / "bags"]})
    for folder in (rows, other):
        (folder / "bags/choose.json").write_text("{}")
    check_comparable({"softmax": [rows / "softmax"], "bags": [rows / "bags", other / "bags"]})  # a choice of each seed
    with pytest.raises(bags.UserError, match=r"other/tiny/bags: has train.lr=0.5"):
        check_comparable({"bags": [twin, other / "bags"]})  # of which one is no choice
    (twin / "choose.json").write_text("{}")
    with pytest.raises(bags.UserError, match=r"twin/bags: has the seed"):
        check_comparable({"bags": [rows / "bags", other / "bags", twin]})
    config.write_text(config.read_text().replace("  - 1000", "  - 999"))
    with pytest.raises(
        bags.UserError, match=r"other/tiny/bags: scored with test.bins=10,100,999, .*softmax with 10,10"
    ):
        check_comparable({"softmax": [rows / "softmax"], "bags": [other / "bags"]})


def test_a_checkpoint_of_another_run_is_refused(moved):
    """By train, and by weight_norms, which tables and report call."""
    configs, overrides, rows, _ = moved
    shutil.copy(rows / "bags/last.pth", rows / "softmax_retrained/last.pth")
    words = r"softmax_retrained/last.pth: was trained with name=bags, .*retrained/config.yaml has softmax_retrained"
    with pytest.raises(bags.UserError, match=words):
        bags.train(configs / "softmax_retrained.yaml", overrides)
    with pytest.raises(bags.UserError, match=words):
        weight_norms({"softmax_retrained": [rows / "softmax_retrained"]})


@pytest.fixture
def moved(job, glyphs, tmp_path):
    """A copy of the finished rows and of their dataset: (configs, overrides of the job, folder of the rows, data)."""
    configs, runs, _ = job
    rows, data = shutil.copytree(runs / "tiny", tmp_path / "tiny"), shutil.copytree(glyphs, tmp_path / "data")
    for run in rows.glob("*/config.yaml"):
        run.write_text(run.read_text().replace(str(glyphs), str(data)))
    return configs, [f"output={tmp_path}", f"data.root={data}", "device=cpu"], rows, data


def test_annotations_that_change_during_a_prediction_are_not_scored(moved, monkeypatch):
    configs, overrides, rows, data = moved

    def predict_and_edit(*arguments):
        edit(data / "val.json", lambda content: content["annotations"].pop())
        return predict(*arguments)

    monkeypatch.setattr("bags.jobs.score.predict", predict_and_edit)
    (rows / "softmax/metrics.json").unlink()
    with pytest.raises(bags.UserError, match=r"val.json: has changed while this command was running: give the command"):
        bags.train(configs / "softmax.yaml", overrides)
    assert not (rows / "softmax/metrics.json").exists()


def test_a_complete_run_with_a_damaged_checkpoint_heals(job, tmp_path):
    configs, runs, _ = job
    shutil.copytree(runs / "tiny", tmp_path / "tiny")
    (tmp_path / "tiny/bags/last.pth").write_bytes(b"torn")
    assert (tmp_path / "tiny/bags/previous.pth").exists()
    done = run_script("train", configs, f"output={tmp_path}")
    assert done.returncode == 0 and done.stdout.count("complete, not run again") == 2, done.stderr
    assert done.stderr.count("going on from previous.pth") == 1
    assert metrics(tmp_path, "bags") == metrics(runs, "bags")


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.slow
def test_bad_input_is_one_line_and_exit_code_2(job, glyphs, tmp_path):
    """What a user gets wrong: a line on stderr that names it, never a traceback."""
    configs, runs, _ = job
    corrupt, empty, other, partial = (
        shutil.copytree(glyphs, tmp_path / n) for n in ("corrupt", "empty", "other", "partial")
    )
    for image in (corrupt / "train").iterdir():
        image.write_bytes(image.read_bytes()[:200])
    (empty / "train.json").write_text("")
    for split in ("train", "val"):
        edit(other / f"{split}.json", lambda c: c["categories"][0].update(name="renamed"))
    edit(partial / "train.json", lambda c: c.update(annotations=[]))
    last = runs / "tiny/softmax/last.pth"
    damaged = tmp_path / "damaged.pth"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    damaged.write_bytes(content)
    for name in ("half", "torn", "unread"):
        shutil.copytree(runs / "tiny", tmp_path / name / "tiny")
    half, torn, unread = tmp_path / "half", tmp_path / "torn", tmp_path / "unread"
    (half / "tiny/softmax/metrics.json").unlink()
    shutil.rmtree(half / "tiny/bags")
    (torn / "tiny/bags/metrics.json").write_text("{")
    (unread / "tiny/bags/predictions.json").write_text('[{"a": 1}]')
    twice = tmp_path / "twice.yaml"
    twice.write_text("train: {lr: 1}\ntrain: {epochs: 2}\n")
    out = f"output={tmp_path / 'out'}"
    softmax, bags_row = configs / "softmax.yaml", configs / "bags.yaml"
    cases = [
        (["train", softmax, "train.epoch=3"], "train.epoch: unknown key; did you mean train.epochs?"),
        (["train", tmp_path / "nothing"], "no such dataset, DATASET/METHOD, folder or file"),
        (["train", softmax, out, "data.root=/nowhere"], "/nowhere/train.json: no such file"),
        (["train", softmax, out, f"data.root={corrupt}"], "not a readable image"),
        (["train", softmax, out, f"data.root={corrupt}", "data.workers=1"], "not a readable image"),
        (["train", softmax, out, f"data.root={empty}"], "train.json: the file is empty"),
        (["train", softmax, out, f"data.root={partial}"], "`annotations` is empty"),
        (["train", bags_row, out, f"data.root={other}", f"detector.init_from={last}"], "'renamed'"),
        (["train", bags_row, out], "tiny/softmax: no finished run"),
        (["train", bags_row, out, "detector.init_from=none.pth"], "none.pth: no such checkpoint"),
        (["train", softmax, "--seeds", "a"], "--seeds a"),
        (["train", softmax, "--seeds", ""], "after --seeds: expected a value, got an empty text"),
        (["train", softmax, "train.epochs", "5"], "train.epochs: write train.epochs=5, without spaces"),
        (["train", softmax, "train.lr", "=", "0.1"], "train.lr: write train.lr=0.1, without spaces"),
        (["train", softmax, "train.lr=", "0.1"], "train.lr: write train.lr=0.1, without spaces"),
        (["train", "train.lr", softmax], "train.lr: write train.lr=VALUE, without spaces"),
        (["train", "seed", "3", softmax], "seed: write seed=3, without spaces"),
        (["train", "data.yaml"], "data.yaml: no such configuration file"),
        (["train", configs / "_base.yaml"], "is a base of other files; its rows are bags.yaml, softmax.yaml"),
        (["evaluate", last, f"data.root={other}"], "'renamed'"),
        (["evaluate", tmp_path / "x.pth"], "no such checkpoint"),
        (["evaluate", last, "train.lr=1"], "data.*, test.* and device only"),
        (["evaluate", glyphs / "val.json"], "needs --annotations"),
        (["predict", last, tmp_path / "none.png"], "none.png: no such image"),
        (["predict", last, configs], "no image in there"),
        (["predict", last, glyphs / "val", "--score", "nan"], "--score nan"),
        (["evaluate", tmp_path / "r.json", "--annotations", glyphs / "val.json", "test.bins=[5]"], "for a checkpoint"),
        (["evaluate", tmp_path / "r.json", "--annotations", glyphs / "val.json", "--bins", "9,3"], "rising numbers"),
        (
            ["evaluate", tmp_path / "r.json", "--annotations", glyphs / "val.json", "--engine", "x"],
            "engine x: expected",
        ),
        (["evaluate", last, "--output", softmax], "softmax.yaml is a file, not a folder"),
        (["evaluate", last, "--output", softmax / "out"], "softmax.yaml is a file, not a folder"),
        (["evaluate", "--compare", last, last, "x=1"], "x=1: --compare takes two results files and options"),
        (["evaluate", "--json"], "or --compare with two results files"),
        (["evaluate", last, "--engine", "lvis"], "--engine is for a results file"),
        (["predict", glyphs / "val.json", glyphs / "val"], "not a checkpoint"),
        (["tables", tmp_path], "no finished run"),
        (["tables", torn / "tiny"], "bags/metrics.json: cannot be read"),
        (["tables", unread / "tiny"], "bags/predictions.json: not this run's results"),
        (["tables", runs / "tiny", "--seeds", "0,1"], "--seeds and section.key=value go with --paper"),
        (["train", bags_row, f"output={half}"], "tiny/softmax: no finished run; run the row softmax first"),
        (["train", configs, softmax, out], "two rows of this job would share it"),
        (["train", bags_row, out, f"detector.init_from={last}", "train.part=none"], "needs trained weights"),
        (["train", twice, out], "key 'train' is given twice"),
        (["train", softmax, out, "data.root=2024-13-45"], "2024-13-45/train.json: no such file"),
        (["train", softmax, out, "classifier={name: [1]}"], "classifier.name: unknown name"),
        (["evaluate", damaged], "damaged.pth: damaged (its checksum differs)"),
        (["evaluate", last, "--annotations", glyphs / "val.json"], "--annotations is for a results file"),
        (["predict", softmax, glyphs / "val"], "softmax.yaml: not a checkpoint"),
        (["prepare_data", "glyphs-100", "--root", configs], "is no glyphs dataset: choose another"),
        (["tables", "--render", softmax], "softmax.yaml: no such page"),
        (["tables", "--render", softmax, "--save", "x.json"], "--render takes only pages"),
        (["prepare_data", "glyphs-100", "--root", tmp_path / "g", "--workers", "-1"], "1 or more processes"),
        (["benchmark", "loss", "--repeats", "0"], "--repeats 0"),
        (
            ["tables", "--paper", "7", configs, "--save", softmax / "x.json"],
            "softmax.yaml is not a folder: exp",
        ),
        (["tables", "--paper", "7", configs], "--paper 7: expected one of 1, 2, 3, 4, fig4"),
        (["tables", "--paper", "4", configs], "expected one dataset"),
        (["prepare_data", "glyphs-100", "--root", glyphs], "not of this preset"),
    ]
    if not torch.cuda.is_available():
        cases.append((["train", softmax, out, "device=cuda"], "torch sees no GPU"))
    for arguments, words in cases:
        done = run_script(*arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        last_line = done.stderr.strip().splitlines()[-1]
        assert last_line.startswith("error: ") and words in last_line, (arguments, done.stderr)
        assert "Traceback" not in done.stderr


def test_outputs_overwrite_nothing_else(job, glyphs, tmp_path):
    """A run, its weights, the inputs of a command and files of another kind stay as they are."""
    configs, runs, _ = job
    run = shutil.copytree(runs / "tiny/bags", tmp_path / "bags")
    images, targets = shutil.copytree(glyphs / "val", tmp_path / "images"), tmp_path / "targets.json"
    truth = shutil.copy(glyphs / "val.json", tmp_path / "val.json")
    targets.write_text('{"1": 1}')
    (tmp_path / "page.md").write_bytes(b"\xff")
    os.mkfifo(tmp_path / "pipe")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    found = run / "predictions.json"
    cases = [
        (["predict", run / "last.pth", images, "--output", run], "is the folder of a run"),
        (["predict", run / "last.pth", images, "--output", images], "is the folder of the images"),
        (["predict", run / "last.pth", images, "--min-size", "9", "--max-size", "8"], "--min-size 9 --max-size 8"),
        (["evaluate", run / "last.pth", "test.max_detections=1", "--output", run], "is the folder of a run"),
        (["evaluate", found, "--annotations", truth, "--output", run], "is the folder of a run"),
        (["evaluate", "--compare", found, found, "--annotations", truth, "--draws", "9" * 9], "expected 0 to 100000"),
        (["report", run, "--output", run / "last.pth"], "exists already, and is no report"),
        (["tables", run.parent, "--save", truth], "exists already, and is not what --save writes"),
        (["benchmark", "loss", "--save", truth], "exists already, and is not what --save writes"),
        (["tables", run.parent, "--save", tmp_path / "pipe"], "pipe: is no regular file"),
        (["report", run, "--output", tmp_path / "pipe"], "exists already, and is no report"),
        (["prepare_data", "coco_lt", "--source", truth, "--targets", targets, "--output", truth], "exists already"),
        (["tables", "--render", tmp_path / "page.md"], "is not UTF-8 text"),
        (["train", configs / "softmax.yaml", "name=figures"], "name: expected another name"),
    ]
    for arguments, words in cases:
        done = run_script(*arguments)
        assert done.returncode == 2 and words in done.stderr.splitlines()[-1], (arguments, done.stderr)
    assert {path: path.read_bytes() for path in before} == before
