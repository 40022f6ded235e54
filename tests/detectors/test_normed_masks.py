"""The normalised mask predictor against a slow loop; where its weights may go."""

import pytest
import torch
from torch import nn

import bags
from bags.assembly.initialise import _check_same_images
from bags.assembly.models import build_detector
from bags.config.sections import DetectorConfig, RoIConfig
from bags.core.errors import UserError
from bags.data.statistics import CategoryStats
from bags.detectors.roi_heads import NormedConv

STATS = CategoryStats((1, 2, 3), ("a", "b", "c"), (500, 50, 5), (300, 40, 5))


def test_logits_are_cosines():
    """20 * <x, w> / ((|x| + 1e-6) (|w| + 1e-6)) + b at each pixel; gradients, too. A pixel of zeros gives the bias."""
    torch.manual_seed(0)
    layer = NormedConv.of(nn.Conv2d(5, 3, 1)).double()
    features = torch.randn(2, 5, 4, 6, dtype=torch.double)
    features[0, :, 1, 2] = 0
    features.requires_grad_(True)
    slow = torch.zeros(2, 3, 4, 6, dtype=torch.double)
    for n in range(2):
        for y in range(4):
            for x in range(6):
                for k in range(3):
                    a, w = features[n, :, y, x].tolist(), layer.weight[k, :, 0, 0].tolist()
                    norms = [sum(v * v for v in vector) ** 0.5 + 1e-6 for vector in (a, w)]
                    slow[n, k, y, x] = 20 * sum(p * q for p, q in zip(a, w, strict=True)) / (norms[0] * norms[1])
                    slow[n, k, y, x] += layer.bias[k].item()
    assert torch.allclose(layer(features), slow, atol=1e-12)
    assert torch.equal(layer(features)[0, :, 1, 2], layer.bias)
    layer(features).square().sum().backward()
    assert features.grad.isfinite().all() and layer.weight.grad.isfinite().all()
    away = torch.randn(1, 5, 2, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (away,))
    assert torch.allclose(layer(7 * away), layer(away), atol=1e-4), "the length of the features does not matter"


@pytest.mark.parametrize("framework", ["mask_rcnn", "cascade_mask_rcnn", "htc"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_detector_with_normed_masks(tmp_path, framework, shared):
    """It begins like one without, it trains, and the logits of single labels are those of the whole layer."""
    path = tmp_path / "c.yaml"
    path.write_text("detector: {backbone: small, fpn_channels: 16, min_size: 64, max_size: 64}\ndevice: cpu")
    keys = ["detector.rpn.anchor_sizes=[[16],[32]]", "detector.rpn.train_proposals=20", "detector.roi.fc=16"]
    keys += [f"detector.framework={framework}", "detector.roi.class_agnostic=true"]
    keys += [f"detector.roi.class_agnostic_masks={str(shared).lower()}"]
    states = []
    for normed in ("false", "true"):
        torch.manual_seed(0)
        detector = build_detector(bags.load_config(path, [*keys, f"detector.roi.normed_masks={normed}"]), STATS)
        states.append(detector.state_dict())
    assert states[0].keys() == states[1].keys(), "both start from the same weights"
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    heads = detector.roi_heads.box_stages[-1]
    hidden, labels = torch.randn(5, 16, 14, 14), torch.tensor([1, 3, 2, 1, 3])
    every = heads.mask_predictor(hidden)
    rows = torch.zeros_like(labels) if shared else labels
    assert torch.allclose(heads.mask_logits(hidden, labels), every[torch.arange(5), rows], atol=1e-4)
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[0, 4:40, 4:30] = 1
    target = {"boxes": torch.tensor([[4.0, 4, 30, 40]]), "labels": torch.tensor([1]), "masks": mask}
    losses = detector.train()([torch.rand(3, 64, 64)], [target])
    sum(losses.values()).backward()
    weight = heads.mask_predictor.mask_fcn_logits.weight
    assert weight.grad.isfinite().all() and weight.grad.abs().max() > 0


def test_frozen_masks_stay_what_they_were(tmp_path):
    plain, normed = (
        DetectorConfig(framework="mask_rcnn", roi=RoIConfig(normed_masks=normed)) for normed in (False, True)
    )
    _check_same_images(normed, normed, tmp_path)
    with pytest.raises(UserError, match=r"detector\.roi\.normed_masks=True, now it is False: .* needs the same"):
        _check_same_images(normed, plain, tmp_path)
