"""The commands, run as a user runs them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import yaml
from conftest import ROOT, read_lines, run_script, write_configs
from PIL import Image

from bags.analysis.paper import PAPER

ROWS = ("softmax", "softmax_retrained", "bags")


@pytest.fixture(scope="module")
def job(glyphs, tmp_path_factory):
    """The three rows, trained once: (configs folder, output folder, process)."""
    folder = tmp_path_factory.mktemp("job")
    configs = write_configs(folder / "configs", glyphs)
    done = run_script("train", configs, f"output={folder / 'runs'}")
    assert done.returncode == 0, done.stderr
    return configs, folder / "runs", done


def metrics(runs, row):
    return json.loads((runs / "tiny" / row / "metrics.json").read_text())


def test_train_shows_the_comparison(job):
    _, runs, done = job
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["softmax", "bags", "softmax_retrained"]
    assert "mAP" in lines[0] and "APr" in lines[0] and "AP4" in lines[0]
    assert "rank correlation" in done.stdout
    for name in ("weight_norms.png", "predictions.png"):
        assert Image.open(runs / "tiny" / "figures" / name).size[0] > 500


def test_run_folder(job):
    _, runs, _ = job
    folder = runs / "tiny" / "bags"
    names = {p.name for p in folder.iterdir()}
    assert {"config.yaml", "environment.json", "log.jsonl", "last.pth", "predictions.json", "metrics.json"} <= names
    log = read_lines(folder / "log.jsonl")
    assert {"iteration", "epoch", "lr", "loss", "loss_group0", "loss_group1", "loss_box_reg"} <= log[-1].keys()
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


def test_finished_rows_are_not_run_again(job):
    configs, runs, first = job
    before = {r: (runs / "tiny" / r / "last.pth").stat().st_mtime_ns for r in ROWS}
    again = run_script("train", configs, f"output={runs}")
    assert again.returncode == 0 and again.stdout.count("complete, not run again") == 3
    assert before == {r: (runs / "tiny" / r / "last.pth").stat().st_mtime_ns for r in ROWS}
    table = [line for line in first.stdout.splitlines() if line.startswith("|")]
    assert [line for line in again.stdout.splitlines() if line.startswith("|")] == table


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


@pytest.mark.parametrize("after", ["softmax/log.jsonl", "softmax/last.pth", "bags/last.pth"])
def test_a_killed_job_ends_with_the_same_numbers(job, tmp_path, after):
    """SIGKILL when a file appears, then the same command again: equal metrics and weights."""
    configs, runs, _ = job
    command = [sys.executable, str(ROOT / "scripts/train.py"), str(configs), f"output={tmp_path}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (tmp_path / "tiny" / after).exists() and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "tiny" / "softmax_retrained" / "metrics.json").exists(), "killed too late to test anything"
    done = run_script("train", configs, f"output={tmp_path}")
    assert done.returncode == 0, done.stderr
    for row in ROWS:
        assert metrics(tmp_path, row) == metrics(runs, row)
        states = [torch.load(r / "tiny" / row / "last.pth", weights_only=True)["model"] for r in (runs, tmp_path)]
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
        steps = [[line["iteration"] for line in read_lines(r / "tiny" / row / "log.jsonl")] for r in (runs, tmp_path)]
        assert steps[0] == steps[1]


def test_two_ranks(job, tmp_path):
    """torchrun with gloo: runs to the end, every image predicted once, losses close to one rank's."""
    configs, runs, _ = job
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "scripts/train.py"), str(configs), f"output={tmp_path}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sum(line.startswith("| bags") for line in done.stdout.splitlines()) == 1
    one, two = (read_lines(r / "tiny" / "softmax" / "log.jsonl") for r in (runs, tmp_path))
    assert [line["iteration"] for line in one] == [line["iteration"] for line in two]
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=0.3)
    assert json.loads((tmp_path / "tiny/softmax/environment.json").read_text())["ranks"] == 2
    found = {e["image_id"] for e in json.loads((tmp_path / "tiny/softmax/predictions.json").read_text())}
    expected = {e["image_id"] for e in json.loads((runs / "tiny/softmax/predictions.json").read_text())}
    assert found == expected
    assert not list((tmp_path / "tiny").glob("*/predictions.json.rank*"))
    done = run_script("evaluate", tmp_path / "tiny/softmax/last.pth", "--json")  # both ranks had the saved weights
    assert json.loads(done.stdout) == pytest.approx(metrics(tmp_path, "softmax"))


def test_seeds_give_mean_and_deviation(job, tmp_path):
    configs, runs, _ = job
    done = run_script("train", configs / "softmax.yaml", "--seeds", "0,1", f"output={tmp_path}")
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith("| softmax"))
    assert "±" in row
    assert metrics(tmp_path / "seed0", "softmax") == metrics(runs, "softmax")
    assert metrics(tmp_path / "seed1", "softmax") != metrics(runs, "softmax")
    table = run_script("tables", tmp_path / "seed0/tiny", tmp_path / "seed1/tiny", "--no-figures")
    assert table.returncode == 0 and row in table.stdout


@pytest.fixture(scope="module")
def paper_job(job, tmp_path_factory):
    """The paper's rows as they are in configs/glyphs-100/paper, on the tiny dataset: (configs, runs, printed)."""
    configs, runs, _ = job
    folder = tmp_path_factory.mktemp("paper")
    shutil.copytree(configs, folder / "configs")
    shutil.copytree(ROOT / "configs/glyphs-100/paper", folder / "configs/paper")
    shutil.copytree(runs, folder / "runs")
    printed = {}
    for table in ("1", "4", "fig4"):
        done = run_script("tables", "--paper", table, folder / "configs", f"output={folder / 'runs'}")
        assert done.returncode == 0, done.stderr
        printed[table] = done.stdout
    return folder / "configs", folder / "runs", printed


def test_tables_of_the_paper_run_what_is_missing(paper_job):
    """Every row is there, from a run of its own; nothing that was complete is run again."""
    _, runs, printed = paper_job
    for table, text in printed.items():
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert [line.split("|")[1].strip() for line in lines[2:]] == [row.title for row in PAPER[table].rows]
        assert "published, LVIS" not in text and ("ACCbg" in text) == (table == "1")
        assert text.count("complete, not run again") >= 2  # softmax and bags
        for row, line in zip(PAPER[table].rows, lines[2:], strict=True):
            value = metrics(runs, row.config)["AP"]
            assert line.split("|")[2].strip() == f"{100 * value:.1f}"
    names = {row.config for table in PAPER.values() for row in table.rows}
    states = [(runs / "tiny" / name / "last.pth").read_bytes() for name in sorted(names)]
    assert len({hash(state) for state in states}) == len(names)


def test_rows_without_training_keep_the_baseline(paper_job):
    _, runs, _ = paper_job
    base = torch.load(runs / "tiny/softmax/last.pth", weights_only=True)["model"]
    for row in ("tau_norm", "tau_norm_select", "ncm_fc", "ncm_conv"):
        state = torch.load(runs / "tiny" / row / "last.pth", weights_only=True)["model"]
        assert all(torch.equal(value, state[key]) for key, value in base.items())
        counts = state.get("roi_heads.classifier.counts")
        assert (counts is None) == row.startswith("tau") and (counts is None or counts.sum() > 10)


def test_whole_detector_rows_start_from_the_baseline(paper_job):
    """Rows trained end to end move every layer; the classifier stage of the focal row moves its own only."""
    _, runs, _ = paper_job
    states = {
        row: torch.load(runs / "tiny" / row / "last.pth", weights_only=True)["model"]
        for row in ("softmax", "softmax_x2", "finetune_tail", "rfs_finetune", "reweight", "focal", "focal_cls")
    }
    for row, state in states.items():
        changed = {key for key, value in states["softmax"].items() if not torch.equal(value, state[key])}
        layer = {"roi_heads.classifier.linear.weight", "roi_heads.classifier.linear.bias"}
        if row == "focal_cls":
            assert changed == layer
        elif row != "softmax":
            assert layer < changed and "backbone.stem.0.weight" in changed


def test_two_ranks_fit_what_one_rank_fits(paper_job, tmp_path):
    """NCM's means do not depend on how the images were split, up to which proposals were sampled."""
    configs, runs, _ = paper_job
    shutil.copytree(runs / "tiny/softmax", tmp_path / "tiny/softmax")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "scripts/train.py"), str(configs / "paper/ncm_fc.yaml"), f"output={tmp_path}"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (
        torch.load(r / "tiny/ncm_fc/last.pth", weights_only=True)["model"]["roi_heads.classifier.means"]
        for r in (runs, tmp_path)
    )
    similarity = torch.nn.functional.cosine_similarity(one, two, dim=1)
    assert similarity.min() > 0.9 and similarity.median() > 0.99


def test_evaluate_checkpoint_and_results_agree(job, glyphs, tmp_path):
    _, runs, _ = job
    folder = runs / "tiny" / "bags"
    done = run_script("evaluate", folder / "last.pth", "--output", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == pytest.approx(metrics(runs, "bags"))
    done = run_script("evaluate", tmp_path / "predictions.json", "--annotations", glyphs / "val.json", "--json")
    assert json.loads(done.stdout)["AP"] == pytest.approx(metrics(runs, "bags")["AP"])


def test_checkpoint_is_self_contained(job, glyphs, tmp_path):
    """Predict from the checkpoint alone, in a folder without configuration or dataset."""
    _, runs, _ = job
    shutil.copy(runs / "tiny/bags/last.pth", tmp_path / "model.pth")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (90, 70), "grey").save(tmp_path / "photos/plain.png")
    shutil.copy(glyphs / "val/00000001.jpg", tmp_path / "photos")
    done = run_script("predict", "model.pth", "photos", "--output", "out", "--score", "0.01", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    entries = json.loads((tmp_path / "out/predictions.json").read_text())
    categories = {c["id"]: c["name"] for c in json.loads((glyphs / "val.json").read_text())["categories"]}
    assert entries and all(categories[e["category_id"]] == e["category"] for e in entries)
    assert {e["file_name"] for e in entries} <= {"photos/plain.png", "photos/00000001.jpg"}


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


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
    out = f"output={tmp_path / 'out'}"
    softmax, bags_row = configs / "softmax.yaml", configs / "bags.yaml"
    cases = [
        (["train", softmax, "train.epoch=3"], "train.epoch: unknown key; did you mean train.epochs?"),
        (["train", tmp_path / "nothing"], "no such configuration file"),
        (["train", softmax, out, "data.root=/nowhere"], "/nowhere/train.json: no such file"),
        (["train", softmax, out, f"data.root={corrupt}"], "not a readable image"),
        (["train", softmax, out, f"data.root={corrupt}", "data.workers=1"], "not a readable image"),
        (["train", softmax, out, f"data.root={empty}"], "train.json: the file is empty"),
        (["train", softmax, out, f"data.root={partial}"], "`annotations` is empty"),
        (["train", bags_row, out, f"data.root={other}", f"detector.init_from={last}"], "'renamed'"),
        (["train", bags_row, out], "softmax/last.pth: no such checkpoint"),
        (["train", softmax, "--seeds", "a"], "--seeds a"),
        (["evaluate", last, f"data.root={other}"], "'renamed'"),
        (["evaluate", tmp_path / "x.pth"], "no such checkpoint"),
        (["evaluate", last, "train.lr=1"], "data.*, test.* and device only"),
        (["evaluate", glyphs / "val.json"], "needs --annotations"),
        (["predict", last, tmp_path / "none.png"], "none.png: no such image"),
        (["predict", last, configs], "no image in there"),
        (["predict", last, glyphs / "val", "--score", "nan"], "--score nan"),
        (["evaluate", tmp_path / "r.json", "--annotations", glyphs / "val.json", "test.bins=[5]"], "for a checkpoint"),
        (["predict", glyphs / "val.json", glyphs / "val"], "not a checkpoint"),
        (["tables", tmp_path], "no finished run"),
        (["tables", "--paper", "2", configs], "--paper 2: expected one of 1, 4, fig4"),
        (["tables", "--paper", "4", configs], "no groups.yaml there"),
        (["prepare_data", "glyphs-100", "--root", glyphs], "not of this preset"),
    ]
    if not torch.cuda.is_available():
        cases.append((["train", softmax, out, "device=cuda"], "torch sees no GPU"))
    with ThreadPoolExecutor(2) as pool:
        processes = list(pool.map(lambda case: run_script(*case[0]), cases))
    for (arguments, words), done in zip(cases, processes, strict=True):
        assert done.returncode == 2, (arguments, done.stderr)
        last_line = done.stderr.strip().splitlines()[-1]
        assert last_line.startswith("error: ") and words in last_line, (arguments, done.stderr)
        assert "Traceback" not in done.stderr
