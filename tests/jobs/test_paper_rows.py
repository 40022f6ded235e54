"""`make table TABLE=...`: every row of the paper, as a user runs it, on tiny data."""

import json
import math
import shutil

import pytest
import torch
from conftest import metrics, read_lines, run_ranks, run_script, write_dataset

from bags.analysis.paper import PAPER
from bags.engine.checkpoint import load_checkpoint, weights_digest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def paper_job(job, glyphs, tmp_path_factory):
    """The paper's rows on the tiny dataset: (dataset, runs, printed)."""
    _, runs, _ = job
    folder = tmp_path_factory.mktemp("paper")
    dataset = write_dataset(folder, glyphs)
    shutil.copytree(runs, folder / "runs")
    printed = {}
    for table in PAPER:
        done = run_script("tables", "--paper", table, dataset, f"output={folder / 'runs'}")
        assert done.returncode == 0, done.stderr
        printed[table] = done.stdout
    rows = ["cascade_mask", "cascade_mask_bags"]
    done = run_script("train", dataset, f"output={folder / 'runs'}", "--methods", *rows)  # not in the paper
    assert done.returncode == 0, done.stderr
    return dataset, folder / "runs", printed


def test_tables_of_the_paper_run_what_is_missing(paper_job):
    """Every row is there, from a run of its own; nothing that was complete is run again."""
    _, runs, printed = paper_job
    for table, text in printed.items():
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert [line.split("|")[1].strip() for line in lines[2:]] == [row.title for row in PAPER[table].rows]
        assert "published, LVIS" not in text and ("ACCbg" in text) == (table == "1")
        assert (text.count("complete, not run again") >= 2) == (table != "3")  # softmax and bags
        for row, line in zip(PAPER[table].rows, lines[2:], strict=True):
            value = metrics(runs, row.config)["AP"]
            assert line.split("|")[2].strip() == f"{100 * value:.2f}"
    names = {row.config for table in PAPER.values() for row in table.rows}
    trained = sorted(names - {"tau_norm", "tau_norm_select", "ncm_fc", "ncm_conv"})
    digests = {weights_digest(load_checkpoint(runs / "tiny" / name / "last.pth")) for name in trained}
    assert len(digests) == len(trained) > 20


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


@pytest.mark.parametrize("row", ["large", "cascade", "cascade_mask", "mask", "htc", "htc_dcn"])
def test_frameworks_train_and_evaluate(paper_job, row):
    """Every loss and number is there and finite; BAGS moves the classifier of every stage, and nothing else."""
    _, runs, _ = paper_job
    base, bags = (
        torch.load(runs / "tiny" / name / "last.pth", weights_only=True)["model"] for name in (row, f"{row}_bags")
    )
    stages = 3 if row.startswith(("cascade", "htc")) else 1
    changed = {key for key, value in bags.items() if key not in base or not torch.equal(value, base[key])}
    assert len(changed) == 2 * stages and all(".classifier.linear." in key for key in changed)
    step = read_lines(runs / "tiny" / row / "log.jsonl")[-1]
    masks = stages if row in ("cascade_mask", "mask", "htc", "htc_dcn") else 0
    for part, number in (("classifier", stages), ("box_reg", stages), ("mask", masks), ("semantic", "htc" in row)):
        assert sum(name.startswith(f"loss_{part}") for name in step) == number
    for name in (row, f"{row}_bags"):
        assert all(math.isfinite(v) for v in metrics(runs, name).values() if v is not None)
        assert ("mask_AP" in metrics(runs, name)) == (masks > 0)
        entries = json.loads((runs / "tiny" / name / "predictions.json").read_text())
        assert entries and all(("segmentation" in entry) == (masks > 0) for entry in entries)


def test_two_ranks_fit_what_one_rank_fits(paper_job, tmp_path):
    """NCM's means do not depend on how the images were split, up to which proposals were sampled."""
    dataset, runs, _ = paper_job
    shutil.copytree(runs / "tiny/softmax", tmp_path / "tiny/softmax")
    for done in run_ranks(2, "train", dataset / "ncm_fc", f"output={tmp_path}"):
        assert done.returncode == 0, done.stderr
    one, two = (
        torch.load(r / "tiny/ncm_fc/last.pth", weights_only=True)["model"]["roi_heads.classifier.means"]
        for r in (runs, tmp_path)
    )
    similarity = torch.nn.functional.cosine_similarity(one, two, dim=1)
    assert similarity.min() > 0.9 and similarity.median() > 0.99
