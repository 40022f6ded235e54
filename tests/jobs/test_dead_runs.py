"""A detector whose training diverged is neither scored nor trained on."""

import dataclasses
import shutil

import pytest
import torch
from conftest import run_script, write_configs

import bags
from bags.assembly.models import load_detector
from bags.config.sections import TrainConfig
from bags.detectors.vitals import cause_of_death
from bags.engine.checkpoint import load_checkpoint, save_checkpoint
from bags.engine.metrics import Monitor
from bags.jobs.train import Pass

IMAGES = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(k)) for k in range(3)]


def kill(path, key="roi_heads.box_head.fc7"):
    """Zero weights and very negative biases: no unit of the layer is ever active."""
    content = load_checkpoint(path)
    content["model"][f"{key}.weight"].zero_()
    content["model"][f"{key}.bias"].fill_(-1)
    save_checkpoint(path, content)


def test_cause_of_death(job):
    detector, _ = load_detector(job[1] / "tiny" / "softmax" / "last.pth")
    assert cause_of_death(detector, IMAGES) is None
    with torch.no_grad():
        detector.roi_heads.classifier.linear.weight.zero_()
    assert cause_of_death(detector, IMAGES) == "all proposals of all images get the same scores"
    assert cause_of_death(detector, IMAGES, classifier_is_new=True) is None
    with torch.no_grad():
        detector.roi_heads.box_head.fc7.weight[1:].zero_()
    assert cause_of_death(detector, IMAGES, classifier_is_new=True) is None  # one unit of 32 is alive
    with torch.no_grad():
        detector.roi_heads.box_head.fc7.weight.zero_()
    words = "32 of the 32 units of its box head are the same for all proposals of all images"
    assert cause_of_death(detector, IMAGES, classifier_is_new=True) == words


def test_no_stage_is_trained_on_a_dead_detector(job, tmp_path):
    configs, runs, _ = job
    shutil.copytree(runs / "tiny" / "softmax", tmp_path / "runs/tiny/softmax")
    baseline = tmp_path / "runs/tiny/softmax"
    kill(baseline / "last.pth")
    shutil.rmtree(baseline / "last.features")
    done = run_script("train", configs / "bags.yaml", f"output={tmp_path / 'runs'}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    words = "last.pth: this detector is dead: 32 of the 32 units of its box head are the same for all proposals"
    assert words in done.stderr and "lower train.lr" in done.stderr
    assert not (baseline / "last.features").exists() and not (tmp_path / "runs/tiny/bags/metrics.json").exists()
    done = run_script("train", configs / "bags.yaml", f"output={tmp_path / 'runs'}", "train.dead=ignore")
    assert done.returncode == 0 and (tmp_path / "runs/tiny/bags/metrics.json").exists(), done.stderr


def test_a_dead_run_has_no_numbers(glyphs, tmp_path, monkeypatch, capsys):
    configs = write_configs(tmp_path / "configs", glyphs)
    train = Pass.train

    def train_and_kill(rows):
        """As a rate that is far too high does."""
        train(rows)
        for run in rows.runs:
            kill(run.folder / "last.pth")
            run.model.load_state_dict(load_checkpoint(run.folder / "last.pth")["model"])

    monkeypatch.setattr(Pass, "train", train_and_kill)
    overrides = [f"output={tmp_path / 'runs'}", "train.epochs=1", "train.milestones=[]"]
    with pytest.raises(bags.UserError, match="softmax/last.pth: this detector is dead: 32 of the 32 units"):
        bags.train(configs / "softmax.yaml", overrides)
    assert not (tmp_path / "runs/tiny/softmax/metrics.json").exists()
    assert "next to nothing" not in capsys.readouterr().err
    bags.train(configs / "softmax.yaml", [*overrides, "train.dead=ignore"])
    assert "note: softmax: an AP of 0.00 % means that this detector finds next to nothing" in capsys.readouterr().err
    assert (tmp_path / "runs/tiny/softmax/metrics.json").exists()


def test_a_loss_that_jumps_is_told_of(tmp_path, capsys):
    """Ten times the median of the losses logged before, also where it falls between two lines of the log."""
    config = dataclasses.replace(TrainConfig(), log_every=2)
    losses = [9.0, 8, 7, 6, 5, 4, 3, 2, 70, 2, 2, 19, 2, 2]
    with Monitor(tmp_path, "run", config, 0, len(losses)) as monitor:
        for iteration, loss in enumerate(losses):
            monitor.step(iteration, 0.0, {"loss_a": torch.tensor(loss)}, 0.02)
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(lines) == 1 and "run: iterations 9 to 10: the loss was 70, 14 times what is usual" in lines[0]
    assert "train.lr (now 0.02)" in lines[0]
    with Monitor(tmp_path, "early", config, 0, 4) as monitor:  # before three lines of the log are known
        for iteration, loss in enumerate([9.0, 7, 8000, 6]):
            monitor.step(iteration, 0.0, {"loss_a": torch.tensor(loss)}, 0.02)
    [line] = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "early: iterations 3 to 4: the loss was 8e+03, 889 times that of the first step" in line
