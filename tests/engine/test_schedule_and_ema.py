"""The cosine schedule against its formula, and the average of the weights against a slow loop."""

import json
import math
import os
import signal

import pytest
import torch
from conftest import write_configs
from steps import train_some
from torch import nn

import bags
from bags.assembly.loaders import build_val_dataset
from bags.core.errors import Stopped
from bags.engine.checkpoint import load_checkpoint
from bags.engine.ema import MovingAverage
from bags.engine.optim import learning_rate


def tiny(tmp_path, glyphs, *overrides):
    """The configuration `softmax` of tiny glyphs."""
    configs = write_configs(tmp_path / "configs", glyphs)
    return bags.load_config(configs / "softmax.yaml", [f"output={tmp_path / 'runs'}", *overrides])


def equal(first, second):
    """Whether two state dicts are the same, bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_cosine_by_its_formula(tmp_path, glyphs):
    keys = ["train.schedule=cosine", "train.epochs=4", "train.lr=0.2", "train.warmup_iterations=10"]
    config = tiny(tmp_path, glyphs, *keys, "train.warmup_factor=0.5").train
    by_hand = {0: 0.2, 1: 0.1 * (1 + math.sqrt(0.5)), 2: 0.1, 3: 0.1 * (1 - math.sqrt(0.5)), 4: 0.0}
    for epoch, rate in by_hand.items():
        assert learning_rate(config, 100, epoch) == pytest.approx(rate, abs=1e-12)
    assert learning_rate(config, 0, 0) == pytest.approx(0.1)
    assert learning_rate(config, 5, 1) == pytest.approx(0.75 * by_hand[1])
    rates = [learning_rate(config, 100, epoch / 50) for epoch in range(200)]
    assert rates == sorted(rates, reverse=True) and rates[-1] > 0, "no step, whatever the milestones"


def test_the_average_against_a_slow_loop(tmp_path, glyphs, monkeypatch):
    """Every step is trained as without it; the result is the average, in the model and in the checkpoint."""
    seen, update = [], MovingAverage.update

    def watched(self, step):
        """Keeps the weights of each step."""
        seen.append({name: value.clone() for name, value in self.model.state_dict().items()})
        update(self, step)

    monkeypatch.setattr(MovingAverage, "update", watched)
    plain = train_some(tiny(tmp_path, glyphs, "name=plain"))
    config = tiny(tmp_path, glyphs, "train.ema=0.5")
    result = train_some(config)
    assert equal(plain["end"], seen[-1])
    average = {name: value.double() for name, value in result["start"].items()}
    for step, weights in enumerate(seen):
        decay = min(0.5, (1 + step) / (10 + step))
        for name, value in weights.items():
            whole = not value.is_floating_point()
            average[name] = value if whole else decay * average[name] + (1 - decay) * value.double()
    for name, value in result["end"].items():
        assert torch.allclose(value.double(), average[name].double(), atol=1e-6), name
    assert not torch.allclose(result["end"]["rpn.head.cls_logits.weight"], seen[-1]["rpn.head.cls_logits.weight"])
    saved = load_checkpoint(config.run_folder / "last.pth")
    assert equal(saved["model"], result["end"])
    buffers = {name for name, _ in result["run"].model.named_buffers()}
    changed = {name for name, value in plain["end"].items() if not torch.equal(value, plain["start"][name])}
    assert changed <= saved["unaveraged"].keys() and buffers <= saved["unaveraged"].keys()
    assert all(torch.equal(value, plain["end"][name]) for name, value in saved["unaveraged"].items())
    assert "unaveraged" not in load_checkpoint(tmp_path / "runs/tiny/plain/last.pth")
    again = train_some(config)  # a finished run
    assert equal(again["end"], result["end"])


def test_resumed_bit_for_bit(tmp_path, glyphs):
    keys = ["train.ema=0.9", "train.schedule=cosine", "train.checkpoint_every=100"]
    undisturbed = train_some(tiny(tmp_path, glyphs, *keys, "name=whole"))
    config = tiny(tmp_path, glyphs, *keys)
    with pytest.raises(Stopped):
        train_some(config, at_batch={4: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    assert load_checkpoint(config.run_folder / "last.pth")["iteration"] == 5
    assert equal(train_some(config)["end"], undisturbed["end"])
    saved, whole = (load_checkpoint(tmp_path / "runs/tiny" / name / "last.pth") for name in ("softmax", "whole"))
    assert equal(saved["model"], whole["model"]) and equal(saved["unaveraged"], whole["unaveraged"])
    rates = [
        [json.loads(line)["lr"] for line in (tmp_path / "runs/tiny" / name / "log.jsonl").read_text().splitlines()]
        for name in ("softmax", "whole")
    ]
    assert rates[0][-1] == rates[1][-1]


def test_a_model_has_the_averages_for_a_while():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    average = MovingAverage(model, 0.9)
    assert not any(name.startswith("2.") for name in average.averages)
    with torch.no_grad():
        model[0].weight.add_(1)
    model(torch.randn(8, 3))
    average.update(1000)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with average.in_model():
        inside = {name: value.clone() for name, value in model.state_dict().items()}
    assert equal(model.state_dict(), before)
    assert torch.allclose(inside["0.weight"], before["0.weight"] - 0.9) and inside["1.num_batches_tracked"] == 1
    assert torch.allclose(inside["1.running_mean"], 0.1 * before["1.running_mean"])
    assert torch.equal(inside["2.weight"], before["2.weight"])


def test_the_classifier_stage_is_averaged_and_scored(job, tmp_path):
    """From stored features: the frozen part stays, the weights below the average are those of the row without it."""
    configs, output = job[0], job[1]
    keys = [f"detector.init_from={output / 'tiny/softmax/last.pth'}", f"output={tmp_path / 'runs'}", "train.ema=0.8"]
    [folder] = bags.train(configs / "bags.yaml", [*keys, f"store.folder={tmp_path / 'store'}"])["bags"]
    plain, averaged = (load_checkpoint(path / "last.pth") for path in (output / "tiny/bags", folder))
    for name, value in averaged["unaveraged"].items():
        assert torch.equal(value, plain["model"][name]), name
    for name, value in averaged["model"].items():
        assert torch.equal(value, plain["model"][name]) == ("classifier." not in name), name
    detector, meta = bags.load_detector(folder / "last.pth")
    assert equal(detector.state_dict(), averaged["model"])
    entries = json.loads((folder / "predictions.json").read_text())
    dataset = build_val_dataset(meta["config"])
    image, target = dataset[0]
    with torch.inference_mode():
        scores = sorted(detector([image])[0]["scores"].tolist())
    predicted = sorted(entry["score"] for entry in entries if entry["image_id"] == target["image_id"])
    assert predicted == pytest.approx(scores, abs=1e-5), "predicted with the averages"
    unaveraged = json.loads((output / "tiny/bags/predictions.json").read_text())
    assert [entry["score"] for entry in entries] != [entry["score"] for entry in unaveraged]
