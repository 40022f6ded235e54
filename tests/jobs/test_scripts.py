"""The commands, run as a user runs them."""

import csv
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, ROWS, killed_and_repeated, metrics, read_lines, run_ranks, run_script
from PIL import Image
from pycocotools import mask as coco_mask

import bags
from bags.analysis.results import render_page
from bags.analysis.run_files import read_scored_on
from bags.cli.arguments import split_arguments
from bags.config.load import load_rows
from bags.engine.checkpoint import keep_best, load_checkpoint


def test_train_shows_the_comparison(job):
    _, runs, printed = job
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["softmax", "bags", "softmax_retrained"]
    assert "mAP" in lines[0] and "APr" in lines[0] and "AP4" in lines[0]
    assert "rank correlation" in printed
    for name in ("weight_norms.png", "predictions.png"):
        assert Image.open(runs / "tiny" / "figures" / name).size[0] > 500


def test_norms_of_several_datasets(job, glyphs, tmp_path):
    """A run, an annotation file and a list of categories beside each other (Figure 1)."""
    _, runs, _ = job
    (tmp_path / "published.json").write_text(json.dumps([{"instance_count": n} for n in (9, 0, 4)]))
    paths = [runs / "tiny" / "softmax", glyphs / "val.json", tmp_path / "published.json"]
    done = run_script("tables", "--norms", tmp_path / "x.png", *paths)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"]
    weight = load_checkpoint(paths[0] / "last.pth")["model"]["roi_heads.classifier.linear.weight"].double()
    norms = weight.square().sum(1).sqrt()[1:].numpy()
    assert rows[2][0] == "tiny, softmax" and rows[2][1] == str(len(norms))
    expected = [norms.mean(), norms.std() / norms.mean(), norms.max() / norms.min()]
    assert [float(cell) for cell in rows[2][3:6]] == pytest.approx(expected, abs=0.006)
    assert rows[3][0] == "val" and rows[3][3:] == ["-"] * 4
    assert rows[4] == ["published", "3", "0 to 9", "-", "-", "-", "-"]
    assert Image.open(tmp_path / "x.png").size[0] > 500
    (tmp_path / "published.json").write_text('[{"instance_count": -1}]')
    for given, words in ((["x.jpg", paths[1]], "x.jpg: expected"), (["x.png", paths[2]], "published.json: expected a")):
        done = run_script("tables", "--norms", tmp_path / given[0], given[1])
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_run_folder(job, glyphs):
    _, runs, _ = job
    folder = runs / "tiny" / "bags"
    names = {p.name for p in folder.iterdir()}
    assert {"config.yaml", "environment.json", "log.jsonl", "last.pth", "predictions.json", "metrics.json"} <= names
    assert read_scored_on(folder) == hashlib.sha256((glyphs / "val.json").read_bytes()).hexdigest()
    log = read_lines(folder / "log.jsonl")
    assert {"iteration", "epoch", "lr", "loss", "loss_group0", "loss_group1"} <= log[-1].keys()
    environment = json.loads((folder / "environment.json").read_text())
    assert torch.__version__.startswith(environment["packages"]["torch"]) and environment["ranks"] == 1
    assert yaml.safe_load((folder / "config.yaml").read_text())["classifier"]["boundaries"] == [5, 15]


def test_only_the_classifier_differs_between_rows(job):
    _, runs, _ = job
    states = {r: torch.load(runs / "tiny" / r / "last.pth", weights_only=True)["model"] for r in ROWS}
    for row in ROWS[1:]:
        for key, value in states["softmax"].items():
            if "classifier" not in key:
                assert torch.equal(value, states[row][key]), key
    key = "roi_heads.classifier.linear.weight"
    assert not torch.equal(states["softmax"][key], states["softmax_retrained"][key])


def test_finished_rows_are_not_run_again(job, glyphs, tmp_path):
    configs, runs, printed = job
    before = {r: (runs / "tiny" / r / "last.pth").stat().st_mtime_ns for r in ROWS}
    again = run_script("train", configs, f"output={runs}", "train.nonfinite=skip", "data.max_bad_images=3")
    assert again.returncode == 0 and again.stdout.count("complete, not run again") == 3
    assert before == {r: (runs / "tiny" / r / "last.pth").stat().st_mtime_ns for r in ROWS}
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert [line for line in again.stdout.splitlines() if line.startswith("|")] == table
    again = run_script("train", configs / "softmax.yaml", f"output={runs}", "store.features=uint8")  # it reads no store
    assert again.returncode == 0 and "complete, not run again" in again.stdout, again.stderr
    again = run_script("train", configs / "bags.yaml", f"output={runs}", "store.features=uint8")
    assert again.returncode == 2 and "store.features=float16" in again.stderr
    moved = shutil.copytree(glyphs, tmp_path / "moved")  # a row trained in another place is still that row
    again = run_script("train", configs, f"output={runs}", f"data.root={moved}")
    assert again.returncode == 0 and again.stdout.count("complete, not run again") == 3, again.stderr


@pytest.mark.parametrize("after", ["softmax/log.jsonl", "bags/last.pth"])
@pytest.mark.slow
def test_a_killed_job_ends_with_the_same_numbers(job, tmp_path, after):
    """SIGKILL when a file appears, then the same command again: equal metrics and weights."""
    configs, runs, _ = job
    places = {"after": tmp_path / "tiny" / after, "unfinished": tmp_path / "tiny/softmax_retrained/metrics.json"}
    killed_and_repeated("train", configs, f"output={tmp_path}", **places)
    for row in ROWS:
        assert metrics(tmp_path, row) == metrics(runs, row)
        states = [torch.load(r / "tiny" / row / "last.pth", weights_only=True)["model"] for r in (runs, tmp_path)]
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
        steps = [[line["iteration"] for line in read_lines(r / "tiny" / row / "log.jsonl")] for r in (runs, tmp_path)]
        assert steps[0] == steps[1]


@pytest.mark.slow
def test_two_ranks(job, tmp_path):
    """With gloo: every image is predicted once, losses are close to one rank's; validated between epochs."""
    configs, runs, _ = job
    ranks = run_ranks(2, "train", configs, f"output={tmp_path}", "train.evaluate_every=1")
    assert [done.returncode for done in ranks] == [0, 0], ranks[0].stderr[-2000:]
    assert sum(line.startswith("| bags") for done in ranks for line in done.stdout.splitlines()) == 1
    one, two = (read_lines(r / "tiny" / "softmax" / "log.jsonl") for r in (runs, tmp_path))
    assert [line["iteration"] for line in one] == [line["iteration"] for line in two]
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=0.3)
    assert json.loads((tmp_path / "tiny/softmax/environment.json").read_text())["ranks"] == 2
    found = {e["image_id"] for e in json.loads((tmp_path / "tiny/softmax/predictions.json").read_text())}
    expected = {e["image_id"] for e in json.loads((runs / "tiny/softmax/predictions.json").read_text())}
    assert found == expected
    assert not list((tmp_path / "tiny").glob("*/*predictions.json.rank*"))
    assert not list((tmp_path / "tiny").glob("*/validation.predictions.json*"))
    for row in ROWS:
        assert [v["epoch"] for v in json.loads((tmp_path / "tiny" / row / "validation.json").read_text())] == [1, 2]
    done = run_script("evaluate", tmp_path / "tiny/softmax/last.pth", "--json")  # both ranks had the saved weights
    assert json.loads(done.stdout) == pytest.approx(metrics(tmp_path, "softmax"))


@pytest.mark.slow
def test_mask_rcnn_by_one_key(job, tmp_path):
    """Boxes and masks are learnt, written, scored and drawn; BAGS starts from it, and moves its classifier alone."""
    configs, runs, _ = job
    arguments = ["detector.framework=mask_rcnn", f"output={tmp_path}"]
    done = run_script("train", configs / "softmax.yaml", configs / "bags.yaml", *arguments)
    assert done.returncode == 0, done.stderr
    assert "mask mAP" in done.stdout
    assert not (tmp_path / "tiny/softmax/figures").exists()  # test.figures is false here
    log = read_lines(tmp_path / "tiny/softmax/log.jsonl")
    assert log[-1]["loss_mask"] < log[0]["loss_mask"]
    entries = json.loads((tmp_path / "tiny/softmax/predictions.json").read_text())
    largest = max(entries, key=lambda entry: coco_mask.area(entry["segmentation"]))
    mask = coco_mask.decode(largest["segmentation"])
    assert mask.shape == (64, 64) and mask.sum() > 20
    x, y, w, h = largest["bbox"]
    rows, columns = mask.nonzero()
    assert x - 2 <= columns.min() and columns.max() <= x + w + 2 and y - 2 <= rows.min() and rows.max() <= y + h + 2
    numbers = metrics(tmp_path, "bags")
    assert {"mask_AP", "mask_AP1", "AP", "ACC"} <= numbers.keys()
    states = [torch.load(tmp_path / "tiny" / r / "last.pth", weights_only=True)["model"] for r in ("softmax", "bags")]
    moved = {key for key, value in states[1].items() if key not in states[0] or not torch.equal(value, states[0][key])}
    assert all("classifier" in key for key in moved)
    done = run_script("evaluate", tmp_path / "tiny/bags/last.pth", "--json", "--output", tmp_path / "again")
    assert json.loads(done.stdout) == pytest.approx(numbers)


@pytest.mark.slow
def test_validation_between_epochs(job, tmp_path):
    """It changes nothing of the run; the best weights are kept, and score what was noted."""
    configs, runs, _ = job
    done = run_script("train", configs, f"output={tmp_path}", "train.evaluate_every=1")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "tiny/softmax"
    assert all(metrics(tmp_path, row) == metrics(runs, row) for row in ROWS)
    assert all((tmp_path / "tiny" / row / "best.pth").exists() for row in ROWS)
    noted = json.loads((folder / "validation.json").read_text())
    assert [entry["epoch"] for entry in noted] == [1, 2] and noted[1] == {"epoch": 2} | metrics(runs, "softmax")
    assert not list(folder.glob("validation.pred*")) and noted[0] != {**noted[1], "epoch": 1}
    best = max(noted, key=lambda entry: entry["AP"])
    done = run_script("evaluate", folder / "best.pth", "--json", "--output", tmp_path / "again")
    assert json.loads(done.stdout)["AP"] == pytest.approx(best["AP"])
    again = run_script("train", configs / "softmax.yaml", f"output={tmp_path}")
    assert again.returncode == 0 and "complete, not run again" in again.stdout


def test_the_best_weights_are_kept(tmp_path):
    """By hand: 0.2, 0.5, 0.5, then a run that was killed repeats its third validation; no AP is no record."""

    def kept():
        return int(load_checkpoint(tmp_path / "best.pth")["model"]["epoch"])

    for epoch, ap, best in ((1, 0.2, 1), (2, 0.5, 2), (3, 0.5, 2), (3, 0.5, 2), (4, None, 2), (5, 0.6, 5)):
        keep_best(
            tmp_path, {"config": {}, "stats": {}, "model": {"epoch": torch.tensor(epoch)}}, {"epoch": epoch, "AP": ap}
        )
        assert kept() == best
    noted = json.loads((tmp_path / "validation.json").read_text())
    assert [(entry["epoch"], entry["AP"]) for entry in noted] == [(1, 0.2), (2, 0.5), (3, 0.5), (4, None), (5, 0.6)]


@pytest.mark.slow
def test_seeds_give_mean_and_deviation(job, tmp_path):
    configs, runs, _ = job
    done = run_script("train", configs / "softmax.yaml", "--seeds", "0,1", "--deterministic", f"output={tmp_path}")
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith("| softmax"))
    assert "±" in row
    assert metrics(tmp_path / "seed0", "softmax") == metrics(runs, "softmax")
    assert json.loads((tmp_path / "seed0/tiny/softmax/environment.json").read_text())["deterministic"]
    assert metrics(tmp_path / "seed1", "softmax") != metrics(runs, "softmax")
    table = run_script("tables", tmp_path / "seed0/tiny", tmp_path / "seed1/tiny", "--no-figures")
    assert table.returncode == 0 and row in table.stdout


def test_evaluate_checkpoint_and_results_agree(job, glyphs, tmp_path):
    _, runs, _ = job
    folder = runs / "tiny" / "bags"
    done = run_script("evaluate", folder / "last.pth", "--output", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == pytest.approx(metrics(runs, "bags"))
    done = run_script("evaluate", tmp_path / "predictions.json", "--annotations", glyphs / "val.json", "--json")
    found, expected = json.loads(done.stdout), metrics(runs, "bags")
    assert found["AP"] == found["AP_fixed"] == pytest.approx(expected["AP"])
    folder = tmp_path / "predictions_evaluation"
    assert json.loads((folder / "metrics.json").read_text()) == found
    rows = list(csv.DictReader((folder / "categories.csv").open()))
    assert len(rows) == 8 and rows[0].keys() >= {"id", "name", "AP", "AP50"}
    assert np.mean([float(row["AP"]) for row in rows if row["AP"]]) == pytest.approx(found["AP"])


def test_scoring_in_half_precision(job, tmp_path):
    """evaluate.py's best detection is near that of fp32. Of this detector, which has learnt little, the others vary."""
    _, runs, _ = job
    done = run_script("evaluate", runs / "tiny/bags/last.pth", "--output", tmp_path, "--json", "test.precision=bf16")
    assert done.returncode == 0, done.stderr
    expected = json.loads((runs / "tiny/bags/predictions.json").read_text())
    found = json.loads((tmp_path / "predictions.json").read_text())
    best, others = (max(entries, key=lambda entry: entry["score"]) for entries in (found, expected))
    assert best["category_id"] == others["category_id"] and found != expected
    assert best["score"] == pytest.approx(others["score"], rel=0.05)


def test_results_are_scored_without_torch(job, glyphs, tmp_path):
    """In an environment whose torch cannot be imported; with the bins and the engine that are asked for; masks too."""
    _, runs, _ = job
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    content = json.loads((glyphs / "val.json").read_text())
    for category in content["categories"]:
        category |= {"instance_count": category["id"], "image_count": category["id"]}
    (tmp_path / "val.json").write_text(json.dumps(content))
    entries = json.loads((runs / "tiny/bags/predictions.json").read_text())
    masks = {a["image_id"]: a["segmentation"] for a in content["annotations"]}
    entries = [e | {"segmentation": masks[e["image_id"]]} for e in entries if e["image_id"] in masks]
    (tmp_path / "masks.json").write_text(json.dumps(entries))
    command = [sys.executable, str(ROOT / "scripts/evaluate.py"), "masks.json", "--annotations", "val.json"]
    command += ["--bins", "3,6", "--output", "out"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out/metrics.json").read_text())
    assert {"AP3", "mask_AP", "mask_AP3", "AP_fixed"} <= found.keys() and "AP4" not in found
    rows = list(csv.DictReader((tmp_path / "out/categories.csv").open()))
    assert [row["bin"] for row in rows] == ["1", "1", "2", "2", "2", "3", "3", "3"] and "mask_AP50" in rows[0]


@pytest.mark.slow
def test_checkpoint_is_self_contained(job, glyphs, tmp_path):
    """Predict from the checkpoint alone, in a folder without configuration or dataset."""
    _, runs, _ = job
    shutil.copy(runs / "tiny/bags/last.pth", tmp_path / "model.pth")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (90, 70), "grey").save(tmp_path / "photos/plain.png")
    shutil.copy(glyphs / "val/00000001.jpg", tmp_path / "photos")
    (tmp_path / "photos/broken.jpg").write_bytes(b"no image")
    done = run_script("predict", "model.pth", "photos", "--output", "out", "--score", "0.01", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    assert "broken.jpg: not a readable image" in done.stderr and "2 images (1 more left out)" in done.stdout
    entries = json.loads((tmp_path / "out/predictions.json").read_text())
    categories = {c["id"]: c["name"] for c in json.loads((glyphs / "val.json").read_text())["categories"]}
    assert entries and all(categories[e["category_id"]] == e["category"] for e in entries)
    assert {e["file_name"] for e in entries} <= {"photos/plain.png", "photos/00000001.jpg"}


def documented_jobs():
    """Arguments of the training commands in the README and in docs/: of train.py, and what `make train` hands to it."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        command = r"scripts/train\.py ([^`#&\n\\]*)|`(make train [^`]+)`|^(make train [^#\n]*)"
        for script, inline, line in re.findall(command, page.read_text(), re.M):
            words = dict(w.split("=", 1) for w in shlex.split(inline or line) if w.split("=")[0] in MAKE)
            methods = ["--methods", *words["METHODS"].split()] if "METHODS" in words else []
            arguments = shlex.split(script or f"{words.get('CONFIG', '')} {words.get('ARGS', '')}") + methods
            if arguments and not arguments[0].startswith(("--", "...")):
                yield arguments


MAKE = ("CONFIG", "ARGS", "METHODS")


@pytest.mark.parametrize("arguments", list(documented_jobs()), ids=" ".join)
def test_training_commands_of_the_pages_are_valid(arguments, monkeypatch):
    """Files, keys and values are there and fit each other; weights and data need not be at hand."""
    monkeypatch.chdir(ROOT)
    flags = [place for place, argument in enumerate(arguments) if argument.startswith("--")] + [len(arguments)]
    parts = [arguments[start + 1 : end] for start, end in zip(flags, flags[1:], strict=False)]
    after = dict(zip((arguments[place] for place in flags[:-1]), parts, strict=True))
    methods = [name for name in after.get("--methods", []) if "=" not in name]
    paths, overrides = split_arguments(arguments[: flags[0]])
    overrides += [text for part in parts for text in part if "=" in text and "$(" not in text]
    names = (*map(str, paths), *methods)
    if not any(name.startswith(("mine", "my", "birds", "label_")) for name in names):  # files of the reader's own
        assert load_rows(paths, overrides, None, methods)


def test_a_job_from_python(job, capsys):
    """`bags.train` gives the run folders of each row; here all of them are complete."""
    configs, runs, _ = job
    folders = bags.train(configs, [f"output={runs}"])
    assert folders == {row: [runs / "tiny" / row] for row in ROWS}
    assert capsys.readouterr().out.count("complete, not run again") == 3


def test_the_installed_command(tmp_path):
    """`bags VERB` is the script of that name; an unknown verb is refused."""
    command = tmp_path / "command.py"
    command.write_text("from bags.cli import main; main()")
    for arguments, code, words in (
        (["--help"], 0, "import-weights"),
        (["nonsense"], 2, "usage"),
        (["train", "glyphs-100", "--list"], 0, "table fig4"),
        (["train", "glyphs-10"], 2, "did you mean glyphs-100?"),
    ):
        done = run_script(command, *arguments, cwd=tmp_path)
        assert done.returncode == code and words in done.stdout + done.stderr, done


def test_any_path_in_an_ascii_locale(tmp_path):
    """The process begins anew in UTF-8 mode, and then prints the name as it is."""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, str(ROOT / "scripts/evaluate.py"), "é.json"]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2 and done.stderr.startswith("error: é.json: a results file needs".encode())


def test_an_override_may_be_longer_than_a_path():
    """Groups of a large dataset are."""
    long = f"classifier.groups={[list(range(2000))]}"
    assert split_arguments([str(ROOT), long]) == ([ROOT], [long])


def test_overfit_says_what_failed(glyphs):
    """One epoch is not enough; the script itself is what is tested here."""
    one_epoch = ["train.epochs=1", "train.milestones=[0.5]", "device=cpu", f"data.root={glyphs}", "data.glyphs=null"]
    done = run_script("overfit", "faster_rcnn", "--classifiers", "softmax,bags", *one_epoch)
    assert done.returncode == 1, done.stderr
    for line, classifier in zip(done.stdout.splitlines(), ("softmax", "bags"), strict=True):
        words = rf"faster_rcnn {classifier}: AP50 0\.\d+ after \d+ s \([\d.]+ s a step\), at most [\d.]+ GB: FAILED"
        assert re.fullmatch(words, line), line
    for arguments, words in (
        (["fast_rcnn"], "fast_rcnn: expected one of faster_rcnn, mask_rcnn"),
        (["--classifiers", "bags,softmax"], "--classifiers bags: name softmax before it, as in softmax,bags"),
    ):
        done = run_script("overfit", *arguments)
        assert done.returncode == 2 and words in done.stderr


def test_overfit_takes_a_backbone_and_deformable_stages(glyphs):
    """The row htc_dcn: masks, several sizes, and a backbone that is not small."""
    options = ["train.epochs=1", "train.milestones=[0.5]", "device=cpu", f"data.root={glyphs}", "data.glyphs=null"]
    stages = ["detector.deformable_stages=[4]", "detector.backbone=resnet18", "data.train_semantic=null"]
    done = run_script("overfit", "htc_dcn", "--classifiers", "softmax", *options, *stages)
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("htc_dcn softmax: AP50 0.") and ", mask_AP50 0." in done.stdout


def test_benchmark_of_the_large_models(tmp_path):
    """A GPU of twice the memory holds at least twice the images; half precision keeps less, so that more fit."""
    command = ["benchmark", "large_models", "--rows", "softmax", "--repeats", "1", "--json"]
    done = run_script(*command, "--save", tmp_path / "models.json")
    assert done.returncode == 0, done.stderr
    [case] = json.loads(done.stdout)
    single, half = zip(*(map(int, case[f"{gpu} GB"].split(" / ")) for gpu in (40, 80)), strict=True)
    assert 2 * single[0] <= single[1] and 2 * half[0] <= half[1] and single < half
    assert 0.7 * case["fixed GB"] < case["peak GB"]  # which has all but the buckets of several ranks
    kept = json.loads((tmp_path / "models.json").read_text())
    assert kept["cases"] == [case]
    assert kept["command"] == "python scripts/benchmark.py large_models --rows softmax --repeats 1"
    page = render_page("<!-- models.json -->\n<!-- end -->", tmp_path)
    assert "| Faster R-CNN, R50 | " in page
    done = run_script("benchmark", "large_models", "--rows", "vgg")
    assert done.returncode == 2 and "--rows vgg: expected some of softmax,large," in done.stderr
