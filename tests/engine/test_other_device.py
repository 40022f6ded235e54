"""Where nothing runs on a GPU: a simulated device finds mixed tensors, other numbers, and what would wait."""

import copy
import shutil

import numpy as np
import pytest
import torch
import torchvision
from later_methods import everyone
from other_device import OTHER, OtherTensor, move, other_device
from steps import pieces

import bags
from bags.classifiers.base import BoxFeatures
from bags.engine.checkpoint import load_checkpoint
from bags.engine.optim import train_mode
from bags.jobs.train import run

COUNTS = [5, 50, 500, 5000, 7, 70, 700, 7000]


def test_the_device_is_one():
    """It computes, in place and backwards too; it refuses to be mixed; it counts what is waited for."""
    layer, twin = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(5, 3)
    with other_device() as waits:
        moved = x.to(OTHER)
        assert isinstance(moved, OtherTensor) and moved.device == OTHER and moved.cpu().equal(x)
        waits.clear()
        loss = move(twin)(moved)[:, torch.arange(3)].relu().sum() * torch.tensor(2.0)
        loss.backward()
        twin.weight.data[0] = 0
        moved += torch.ones(3, device=OTHER)
        assert not waits
        for mixed in (
            lambda: moved + x,
            lambda: torch.cat([moved, x]),
            lambda: x[moved.long()[0]],
            lambda: moved.index_select(0, torch.tensor([1])),
        ):
            with pytest.raises(RuntimeError, match="beside those of the device"):
                mixed()
        with pytest.raises(TypeError, match="has no NumPy array"):
            np.asarray(moved)
        assert loss.item() > 0 and moved[moved > 0].cpu().min() > 0 and waits.total() == 3
        kept = torchvision.ops.nms(torch.tensor([[0.0, 0, 1, 1]] * 2, device=OTHER), moved[:2, 0], 0.5)
        assert isinstance(kept, OtherTensor) and kept.tolist() in ([0], [1])
    (layer(x)[:, :3].relu().sum() * 2).backward()
    assert twin.weight.grad.inner.equal(layer.weight.grad) and not twin.weight.inner[0].any()


def all_classifiers():
    return everyone() | {
        "softmax": bags.Softmax(6, 8),
        "reweighted_softmax": bags.ReweightedSoftmax(6, bags.class_weights(COUNTS, "inverse")),
        "sigmoid_focal": bags.SigmoidFocal(6, 8),
        "group_softmax": bags.GroupSoftmax(6, bags.assign_groups(COUNTS)),
        "knn": bags.NearestNeighbours(6, 8, 3),
        "ncm": bags.NearestClassMean(6, 8, 6),
        "tau_norm": bags.TauNorm(6, 8),
        "norcal": bags.NorCal(6, COUNTS),
    }


def test_counts_on_the_device():
    with other_device():
        counts = torch.tensor(COUNTS).to(OTHER)
        assert bags.assign_groups(counts) == bags.assign_groups(COUNTS)
        assert torch.equal(bags.class_weights(counts, "inverse"), bags.class_weights(COUNTS, "inverse"))
        assert torch.equal(bags.ACSL(6, counts).bands, bags.ACSL(6, COUNTS).bands)


@pytest.mark.parametrize("name", all_classifiers())
def test_classifiers_on_the_device(name):
    """Loss, gradients and scores are the CPU's; the loss waits for nothing."""
    torch.manual_seed(0)
    ours = all_classifiers()[name]
    theirs = copy.deepcopy(ours)
    fc, labels = torch.randn(40, 6), torch.randint(0, 9, (40,))
    found = []
    with other_device() as waits:
        for classifier, device in ((ours, "cpu"), (move(theirs), OTHER)):
            torch.manual_seed(1)
            if name in ("knn", "ncm"):
                classifier.fit([(BoxFeatures(fc.to(device), fc.to(device)), labels.to(device))])
            logits = classifier(BoxFeatures(fc.to(device), fc.to(device)))
            results = [classifier.probs(logits)]
            if any(parameter.requires_grad for parameter in classifier.parameters()):
                waits.clear()
                losses = classifier.loss(logits, labels.to(device))
                sum(losses.values()).backward()
                assert not waits, name
                results += [*losses.values(), *(p.grad for p in classifier.parameters() if p.requires_grad)]
            found.append([result.detach().cpu() for result in results])
    for own, other in zip(*found, strict=True):
        assert torch.allclose(own, other, rtol=1e-5, atol=1e-7)


def test_a_training_step_and_detections_on_the_device(job):
    """Of the detector with the most parts: the CPU's losses and detections; a GPU is seldom waited for."""
    configs, _, _ = job
    keys = ["detector.framework=htc", "classifier.name=group_softmax", "classifier.boundaries=[5, 15]"]
    detector, loader = pieces(bags.load_config(configs / "softmax.yaml", keys))
    theirs = copy.deepcopy(detector)
    images, targets = next(iter(loader))
    found = []
    with other_device() as waits:
        for model, device in ((detector, "cpu"), (move(theirs), OTHER)):
            train_mode(model)
            own = [
                {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in target.items()} for target in targets
            ]
            torch.manual_seed(0)
            shown = [image.to(device) for image in images]
            waits.clear()
            losses = model(shown, own)
            sum(losses.values()).backward()
            if (
                device == OTHER
            ):  # ours: twice in a stage for each image, once in a stage, once for an image's semantic map
                own_waits = sum(count for line, count in waits.items() if not line.startswith("torchvision"))
                assert 0 < own_waits <= 2 * 3 * len(images) + 3 + len(images), waits
            with torch.inference_mode():
                seen = model.eval()(shown)
            values = [*losses.values(), *(p.grad for p in model.parameters() if p.grad is not None)]
            found.append([value.detach().cpu() for value in [*values, *(d[k] for d in seen for k in sorted(d))]])
    assert sum(len(value) for value in found[0] if value.dtype == torch.long) > 0, "there are detections"
    for own, other in zip(*found, strict=True):
        assert torch.allclose(own, other, rtol=1e-4, atol=1e-6)


def test_rows_on_the_device(job, tmp_path):
    """From the script's `run` on: features are stored, rows learn from them and are scored: the CPU's weights."""
    configs, runs, _ = job
    shutil.copytree(runs / "tiny/softmax", tmp_path / "tiny/softmax", ignore=shutil.ignore_patterns("*.features"))
    rows = [bags.load_config(configs / f"{row}.yaml", [f"output={tmp_path}"]) for row in ("bags", "softmax_retrained")]
    with other_device():
        run(rows, OTHER)
    for row in rows:
        weights = [load_checkpoint(root / "tiny" / row.name / "last.pth")["model"] for root in (runs, tmp_path)]
        assert all(torch.allclose(own, weights[1][name], atol=1e-5) for name, own in weights[0].items())
