"""The optimisation step: in parts, on ranks, in other precisions; what stops it, and what it goes on from."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, read_lines, run_ranks, start_script, write_configs
from steps import agree_on_samples, pieces, train_some
from torchvision.models.detection.roi_heads import project_masks_on_boxes

import bags
from bags.assembly.models import load_detector
from bags.config.load import override_config
from bags.core.errors import Stopped, UserError
from bags.core.precision import PRECISIONS
from bags.detectors.backbones import FrozenBatchNorm
from bags.detectors.conventions import mask_targets
from bags.engine import train as engine
from bags.engine.checkpoint import load_checkpoint, save_checkpoint
from bags.engine.metrics import PHASES, Clock, Monitor
from bags.engine.optim import build_optimizer, learning_rate, rate_notes, set_trained_part, train_mode

CPU = torch.device("cpu")
STEPS = ROOT / "tests/steps.py"
FRAMEWORKS = ("faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn", "htc")


def tiny(tmp_path, glyphs, *overrides):
    """The configuration `softmax` of tiny glyphs."""
    configs = write_configs(tmp_path / "configs", glyphs)
    return bags.load_config(configs / "softmax.yaml", [f"output={tmp_path / 'runs'}", *overrides])


def differences(a, b):
    """Largest difference of two state dicts."""
    assert a.keys() == b.keys()
    return max(float((a[key].double() - b[key].double()).abs().max()) for key in a)


# --------------------------------------------------------------------------- one step, whichever way


@pytest.mark.slow
def test_two_ranks_and_two_parts_take_the_steps_of_the_whole(tmp_path, glyphs, monkeypatch):
    """24 steps with the same proposals: a batch of 4, in 2 parts, and by 2 ranks with 2 images each and train.ema."""
    config = tiny(tmp_path, glyphs, "train.epochs=4", "train.lr=0.02")
    agree_on_samples(monkeypatch.setattr)
    whole = train_some(config)
    parts = train_some(override_config(config, ["train.accumulate=2", "name=parts"]))
    assert differences(whole["start"], whole["end"]) > 0.01
    assert differences(whole["end"], parts["end"]) < 1e-5
    averaged = train_some(override_config(config, ["train.ema=0.7", "name=averaged"]))
    assert differences(whole["end"], averaged["end"]) > 1e-3
    keys = [f"output={tmp_path / 'two'}", "train.epochs=4", "train.lr=0.02", "train.ema=0.7"]
    for done in run_ranks(2, STEPS, tmp_path / "configs/softmax.yaml", tmp_path / "two.pth", *keys):
        assert done.returncode == 0, done.stderr
    ranks = torch.load(tmp_path / "two.pth", weights_only=True)
    assert differences(averaged["end"], ranks["end"]) < 1e-5
    assert ranks["equal"], "both ranks hold the same weights"


def test_impossible_parts_are_refused(tmp_path, glyphs):
    with pytest.raises(UserError, match="train.accumulate: expected a divisor of train.batch_size=4"):
        tiny(tmp_path, glyphs, "train.accumulate=3")
    with pytest.raises(UserError, match="data.max_bad_images: expected 0 or more"):
        tiny(tmp_path, glyphs, "data.max_bad_images=-1")


def test_scaled_learning_rate_by_hand(tmp_path, glyphs, capsys):
    config = tiny(tmp_path, glyphs, "train.lr=0.02", "train.batch_size=4", "train.warmup_iterations=0")
    assert learning_rate(config.train, 5, 0.5) == 0.02
    config = override_config(config, ["train.scale_lr=true"])
    assert learning_rate(config.train, 5, 0.5) == pytest.approx(0.005)
    train_some(config)
    assert "lr 0.005 for 4 images a step: train.lr=0.02 is that of 16" in capsys.readouterr().err
    config = override_config(config, ["train.scale_lr=false"])
    for epochs, milestones, notes in ((2, "[1.5, 9]", 0), (2, "[2]", 1), (2, "[]", 0)):
        given = override_config(config, [f"train.epochs={epochs}", f"train.milestones={milestones}"])
        assert sum("the rate never falls" in note for note in rate_notes(given.train)) == notes


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_trained_parameter_gets_a_gradient(tmp_path, glyphs, framework):
    """What DDP demands, with and without objects; and losses in float32 whatever the rest is in."""
    config = tiny(tmp_path, glyphs, f"detector.framework={framework}", "classifier.name=group_softmax")
    detector, loader = pieces(config)
    images, targets = next(iter(loader))
    empty = [
        {k: v[:0] if isinstance(v, torch.Tensor) and k != "semantic" else v for k, v in t.items()} for t in targets
    ]
    for part in ("all", "cls"):
        set_trained_part(detector, part)
        train_mode(detector)
        for shown in (targets, empty):
            detector.zero_grad(set_to_none=True)
            sum(detector(images, shown).values()).backward()
            missing = [n for n, p in detector.named_parameters() if p.requires_grad and p.grad is None]
            assert not missing, (part, missing)
            assert all(p.grad is None or p.grad.isfinite().all() for p in detector.parameters())
    losses = {}
    for precision, dtype in PRECISIONS.items():
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype, enabled=precision != "fp32"):
            losses[precision] = detector(images, targets)
        assert all(value.dtype == torch.float32 for value in losses[precision].values()), precision
    for precision in ("bf16", "fp16"):
        found, expected = (sum(losses[p].values()).item() for p in (precision, "fp32"))
        assert found == pytest.approx(expected, rel=0.2) and found != expected


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_detection_in_other_precisions(tmp_path, glyphs, framework):
    """Everything is float32, and near what fp32 detects; a precision of fp32 leaves the caller's autocast as it is."""
    shape = ["detector.roi.class_agnostic=true"] if framework != "faster_rcnn" else []
    detector, loader = pieces(tiny(tmp_path, glyphs, f"detector.framework={framework}", *shape))
    images, _ = next(iter(loader))
    found = {}
    with torch.inference_mode():
        detector.eval()
        for detector.precision in PRECISIONS:
            found[detector.precision] = detector(images)
        with torch.autocast("cpu", torch.bfloat16):
            detector.precision = "fp32"
            outer = detector(images)
    for precision, detections in found.items():
        for one, expected in zip(detections, found["fp32"], strict=True):
            assert all(v.dtype == torch.float32 for k, v in one.items() if k in ("boxes", "scores", "masks"))
            best, others = one["scores"][:10], expected["scores"][:10]
            assert torch.allclose(best, others, rtol=0.1) and torch.equal(best, others) == (precision == "fp32")
    assert all(torch.equal(a["scores"], b["scores"]) for a, b in zip(outer, found["bf16"], strict=True))


@pytest.mark.parametrize("classifier", ["softmax", "reweighted_softmax", "sigmoid_focal", "group_softmax"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_classifiers_lose_in_float32(tmp_path, glyphs, classifier, dtype):
    """From the same half-precision logits the loss is that of their float32 values, bit for bit."""
    detector, _ = pieces(tiny(tmp_path, glyphs, f"classifier.name={classifier}"))
    [own] = detector.classifiers()
    features = torch.randn(40, 32)
    labels = torch.randint(0, 9, (40,))
    with torch.autocast("cpu", dtype):
        logits = own(bags.classifiers.base.BoxFeatures(features, features))
        assert logits.dtype == dtype
        torch.manual_seed(0)
        half = own.loss(logits, labels)
    torch.manual_seed(0)
    full = own.loss(logits.float(), labels)
    assert all(half[name].dtype == torch.float32 and torch.equal(half[name], full[name]) for name in full)


def test_a_compiled_backbone_is_the_same_detector(tmp_path, glyphs, monkeypatch):
    """torch.compile without code generation: the graph is captured, the names of the weights stay."""
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: plain(self, backend="eager"))
    config = tiny(tmp_path, glyphs)
    eager, compiled = train_some(config), train_some(override_config(config, ["train.compile=true", "name=compiled"]))
    assert compiled["graphs"] > eager["graphs"] == 0
    assert differences(eager["end"], compiled["end"]) < 1e-5


# --------------------------------------------------------------------------- stopping and going on


def test_stopped_by_a_signal_and_resumed_with_the_scaler(job, tmp_path, glyphs):
    """SIGTERM in the middle of an epoch: the step is finished and saved; the end is that of an undisturbed run."""
    keys = ["train.precision=fp16", "train.checkpoint_every=100"]
    keys += ["train.part=head", f"detector.init_from={job[1] / 'tiny/softmax/last.pth'}"]  # fp16 convolutions are slow
    undisturbed = train_some(tiny(tmp_path, glyphs, *keys, "name=whole"))
    config = tiny(tmp_path, glyphs, *keys)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Stopped, match="stopped by SIGTERM after iteration 5 of 12, which is saved"):
        train_some(config, at_batch={4: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    saved = bags.engine.checkpoint.load_latest(config.run_folder)
    assert saved["iteration"] == 5 and saved["scaler"]["_growth_tracker"] > 0
    with pytest.raises(Stopped, match="stopped by SIGINT after iteration 9 of 12"):
        train_some(config, at_batch={3: lambda: os.kill(os.getpid(), signal.SIGINT)})
    resumed = train_some(config)
    assert differences(undisturbed["end"], resumed["end"]) == 0
    saved, whole = (bags.engine.checkpoint.load_latest(tmp_path / "runs/tiny" / n) for n in ("softmax", "whole"))
    assert saved["scaler"] == whole["scaler"]


def poisoned(monkeypatch, iterations, spoil=lambda model: None):
    """Makes loss_objectness NaN in some iterations."""
    plain = engine.optimisation_step

    def step(run, images, targets, iteration, *rest):
        """The real step, on losses of which one is spoiled."""
        module, forward = run.loss_module, run.loss_module.forward
        if iteration in iterations:
            spoil(run.model)
            module.forward = lambda *given: {
                **(own := forward(*given)),
                "loss_objectness": own["loss_objectness"] * np.nan,
            }
        try:
            return plain(run, images, targets, iteration, *rest)
        finally:
            module.forward = forward

    monkeypatch.setattr(engine, "optimisation_step", step)


def test_a_loss_that_is_not_finite_stops_with_a_repro(tmp_path, glyphs, monkeypatch):
    config = tiny(tmp_path, glyphs, "train.checkpoint_every=2")
    poisoned(monkeypatch, {5})
    with pytest.raises(UserError) as error:
        train_some(config)
    text, file = str(error.value), config.run_folder / "nonfinite.rank0.pth"
    assert "iteration 6: loss_objectness is not finite (images " in text and "train.nonfinite=skip" in text
    assert str(file) in text and "lower train.lr" in text
    detector, _ = load_detector(file)  # a checkpoint like any other, with the batch
    content = torch.load(file, weights_only=True)
    assert np.isnan(content["losses"]["loss_objectness"]) and content["iteration"] == 5
    assert all(f"{target['image_id']}" in text for target in content["targets"])
    monkeypatch.undo()
    torch.manual_seed(0)
    assert all(v.isfinite() for v in train_mode_losses(detector, content).values())  # it was the test's NaN
    train_some(config)  # the run goes on from iteration 4, and over the place
    assert bags.engine.checkpoint.load_latest(config.run_folder)["iteration"] == 12


def train_mode_losses(detector, content):
    train_mode(detector)
    return detector(content["images"], content["targets"])


def test_steps_that_are_not_finite_are_left_out(tmp_path, glyphs, monkeypatch, capsys):
    config = tiny(tmp_path, glyphs, "train.nonfinite=skip", "train.log_every=1", "train.momentum=0")
    poisoned(monkeypatch, {3, 4})
    result = train_some(config)
    assert capsys.readouterr().err.count("loss_objectness is not finite") == 2
    assert all(value.isfinite().all() for value in result["end"].values())
    log = read_lines(config.run_folder / "log.jsonl")
    assert [line["iteration"] for line in log if line["loss"] is None] == [3, 4] and len(log) == 12
    monkeypatch.setattr(engine, "MOST_SKIPPED", 2)
    poisoned(monkeypatch, set(range(12)))
    with pytest.raises(UserError, match="iteration 3: .*2 steps in a row were left out"):
        train_some(tiny(tmp_path, glyphs, "train.nonfinite=skip", "name=all"))
    monkeypatch.undo()
    poisoned(monkeypatch, {2}, lambda model: model.backbone.stem[1].running_var.fill_(np.nan))
    with pytest.raises(UserError, match="weights or statistics are not finite either"):
        train_some(tiny(tmp_path, glyphs, "train.nonfinite=skip", "name=lost"))


def test_a_gpu_that_waits_is_told_of(tmp_path, glyphs, capsys):
    """Phases are laps of the clock; the log has their seconds for an iteration."""
    config = dataclasses.replace(tiny(tmp_path, glyphs).train, log_every=4)

    class Fake(Clock):
        def read(self):
            return {"data": 2.0, "forward": 3.0, "backward": 2.0, "step": 1.0}

    clock = Fake(CPU)
    with Monitor(tmp_path, "run", config, 0, 8, clock) as monitor:
        for iteration in range(8):
            clock.on_gpu = iteration > 4
            monitor.step(iteration, 0.0, {"loss_a": torch.tensor(1.0)}, 0.1)
    assert capsys.readouterr().err.count("the GPU waits for data 25% of the time: raise data.workers") == 1
    first = read_lines(tmp_path / "log.jsonl")[0]
    assert [first[f"{phase}_s"] for phase in ("data", "forward", "backward", "step")] == [0.5, 0.75, 0.5, 0.25]
    clock = Clock(CPU)
    clock.lap("data")
    clock.lap("step")
    clock.lap("data")
    seconds = clock.read()
    assert seconds["data"] > 0 and seconds["step"] > 0 and seconds["forward"] == 0 and sum(clock.read().values()) == 0
    time.sleep(0.05)  # a checkpoint
    clock.leave_out()
    clock.lap("data")
    assert set(clock.read()) == set(PHASES) and sum(seconds.values()) < 0.05


@pytest.mark.parametrize("conventions", ["standard", "torchvision", "released"])
def test_boxes_are_not_rounded_in_half_precision(tmp_path, glyphs, conventions):
    """Proposals, goals and moved boxes are float32 under autocast: bfloat16 counts in fours from 512 pixels on."""
    keys = [f"detector.conventions={conventions}", "detector.framework=cascade_mask_rcnn"]
    detector, loader = pieces(tiny(tmp_path, glyphs, *keys, "detector.min_size=800", "detector.max_size=800"))
    images, targets = next(iter(loader))
    seen = []
    detector.rpn.register_forward_hook(lambda *call: seen.append(call[2][0][0]))
    detector.rpn.anchor_generator.register_forward_hook(lambda *call: seen.append(call[2][0]))
    first, stages = detector.roi_heads.box_stages[0], detector.roi_heads.box_stages
    for stage in stages[:2]:
        moved = stage.refine
        stage.refine = lambda *given, plain=moved: (found := plain(*given), seen.append(found[0]))[0]
    drawn, goals = first.sample, []
    first.sample = lambda *given: (found := drawn(*given), goals.append(found.goals[0][found.labels[0] > 0]))[0]
    objects = []
    detector.transform.register_forward_hook(lambda *call: objects.append(call[2][1][0]["boxes"]))
    with torch.autocast("cpu", torch.bfloat16):
        detector.train()(images[:1], targets[:1])
    assert len(seen) == 4 and all(boxes.dtype == torch.float32 and len(boxes) for boxes in seen)
    assert all((goal == objects[0]).all(1).any() for goal in goals[0]) and len(goals[0])


def test_mask_targets_are_torchvisions():
    masks, boxes = torch.rand(3, 40, 50).round(), torch.rand(5, 4) * 20
    boxes[:, 2:] += boxes[:, :2] + 1
    matched = torch.tensor([0, 2, 1, 1, 0])
    assert mask_targets(masks, boxes, matched, 28).equal(project_masks_on_boxes(masks, boxes, matched, 28))


def test_fused_kernels(tmp_path, glyphs, monkeypatch):
    """On a GPU, but for SGD in fp16, whose first momenta an overflow leaves unwritten; a checkpoint brings none."""
    detector, _ = pieces(tiny(tmp_path, glyphs))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    for optimizer, precision, fused in (
        ("sgd", "fp32", True),
        ("sgd", "bf16", True),
        ("sgd", "fp16", None),
        ("adamw", "fp16", True),
    ):
        config = tiny(tmp_path, glyphs, f"train.optimizer={optimizer}", f"train.precision={precision}").train
        assert build_optimizer(detector, config).param_groups[0]["fused"] is fused
    monkeypatch.undo()
    config = tiny(tmp_path, glyphs, "train.optimizer=adamw", "train.epochs=1")
    train_some(config)
    saved = load_checkpoint(config.run_folder / "last.pth")
    saved["optimizer"]["param_groups"][0]["fused"] = True
    saved["iteration"] -= 1
    save_checkpoint(config.run_folder / "last.pth", saved)
    run = train_some(config)["run"]
    assert run.optimizer.param_groups[0]["fused"] is None and run.done == saved["iteration"]


def test_frozen_statistics_keep_half_precision():
    """What torchvision's makes of float32, and close to it, in the input's type, of bfloat16."""
    norm, plain = FrozenBatchNorm(4), torchvision.ops.FrozenBatchNorm2d(4)
    state = {name: torch.rand(4) + 0.5 for name in norm.state_dict()}
    norm.load_state_dict(state)
    plain.load_state_dict(state)
    x = torch.randn(2, 4, 5, 6)
    assert norm(x).equal(plain(x))
    for dtype in (torch.bfloat16, torch.float16):
        half = norm(x.to(dtype))
        assert half.dtype == dtype and torch.allclose(half.float(), plain(x.to(dtype)), rtol=0.01, atol=0.02)


@pytest.mark.slow
def test_a_run_through_the_script_stops_with_its_own_code(tmp_path, glyphs):
    """SIGTERM to torchrun and its whole group: both ranks finish the step, rank 0 saves; one rank goes on, over the
    same images. Loader processes leave the signal to their rank."""
    configs = write_configs(tmp_path / "configs", glyphs)
    arguments = [str(configs / "softmax.yaml"), f"output={tmp_path}", "train.epochs=20", "data.workers=2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "scripts/train.py"), *arguments]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    log = tmp_path / "tiny/softmax/log.jsonl"
    while not (log.exists() and log.stat().st_size) and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    error = process.communicate(timeout=100)[1]
    assert error.count("stopped by SIGTERM after iteration") == 1, error[-3000:]
    reached = torch.load(tmp_path / "tiny/softmax/last.pth", weights_only=True)["iteration"]
    assert 2 <= reached < 120 and f"after iteration {reached} of 120" in error
    process = start_script("train", *arguments)
    while log.read_text().count("\n") <= reached // 2 + 1 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    done = process.wait(100)
    assert done.returncode == 75 and "the same command goes on" in done.stderr and "Traceback" not in done.stderr
    steps = [line["iteration"] for line in read_lines(log)]
    assert steps == list(range(1, steps[-1] + 1, 2)) and steps[-1] > reached
    environment = json.loads((Path(tmp_path) / "tiny/softmax/environment.json").read_text())
    assert environment["ranks"] == 2 and [start["ranks"] for start in environment["resumed"]] == [1]
