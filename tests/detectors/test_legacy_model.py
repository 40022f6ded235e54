"""Whole detectors under the released conventions, against `legacy_model`: the same weights, images and objects.

Everything is in float64, so that both agree to rounding. Losses are computed from all anchors and proposals,
as draws cannot be compared; those that ours takes in float32 agree to that.
"""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from legacy_model import LegacyDetector
from test_weights import released_shapes

import bags
from bags.assembly.models import load_detector
from bags.engine.checkpoint import write_checkpoint
from bags.engine.optim import train_mode
from bags.jobs import import_weights

pytestmark = pytest.mark.slow

FRAMEWORKS = ("faster_rcnn", "mask_rcnn", "cascade_rcnn", "htc")
COUNTS = (5, 2000, 60, 7, 150)  # training instances of the labels 1 to 5 ...
SIZES = {"channels": 64, "fc": 128}  # every layer is there, but the heads are smaller than released
BOUNDARIES, GROUPS = "[10, 100]", ((1, 4), (3,), (2, 5))  # ... and how they are grouped
CATEGORIES = [
    {"id": 10 * i, "name": f"thing {i}", "instance_count": n, "image_count": n} for i, n in enumerate(COUNTS, start=1)
]
MIN_SIZE, MAX_SIZE = 96, 160  # the images below have these sizes already
INCLUSIVE = torch.tensor([0.0, 0, 1, 1], dtype=torch.float64)  # continuous minus released coordinates


class Calibrating(LegacyDetector):
    """Sets each layer, when it is first used, so that its outputs vary; those of random weights hardly do."""

    spreads = {"rpn_cls": 2.0, "rpn_reg": 0.35, "fc_cls": 1.0, "conv_logits": 2.0}

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.done = set()

    def layer(self, operation, x, name, *arguments):
        return self.adjusted(super().layer(operation, x, name, *arguments), name)

    def batch_norm(self, x, name):
        self.state[f"{name}.running_mean"], self.state[f"{name}.running_var"] = x.mean((0, 2, 3)), x.var((0, 2, 3))
        return super().batch_norm(x, name)

    def adjusted(self, y, name):
        """Outputs [N, channels, ...] of a layer with a bias, with mean 0 in each channel and one spread in all."""
        if name in self.done or f"{name}.bias" not in self.state:
            return y
        self.done.add(name)
        mean = y.transpose(0, 1).flatten(1).mean(1)
        centred = y - mean.reshape(-1, *[1] * (y.dim() - 2))
        factor = self.spreads.get(name.split(".")[-1], 1.0) / centred.std()
        self.state[f"{name}.weight"] *= factor
        self.state[f"{name}.bias"] = (self.state[f"{name}.bias"] - mean) * factor
        return centred * factor


def random_image(height, width, seed):
    """[3, height, width] float64 in whole levels 0..255: patches with noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 16 + 2, width // 16 + 2, generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bilinear")[0] * 205
    return (smooth + 50 * torch.rand(3, height, width, generator=generator)).floor().double()


def random_target(height, width, seed, number, crowded=False):
    """Objects at quarters of a pixel, in released coordinates; `crowded`: one more in the place of another."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor([width, height])
    sides = (0.2 + 0.5 * torch.rand(number, 2, generator=generator)) * size
    corners = torch.rand(number, 2, generator=generator) * (size - sides)
    boxes = (torch.cat([corners, corners + sides - 1], dim=1) * 4).floor().double() / 4
    labels = torch.randint(1, 6, (number,), generator=generator)
    if crowded:
        beside = boxes[:1] + torch.tensor([0.0, 0, -2, -1.5])
        boxes, labels = torch.cat([boxes, beside, boxes[:1]]), torch.cat([labels, labels[:1], labels[:1] % 5 + 1])
    semantic = torch.randint(0, 183, (height // 7 + 1, width // 7 + 1), generator=generator)
    semantic = semantic.repeat_interleave(7, 0).repeat_interleave(7, 1)[:height, :width].clone()
    semantic[height // 2 : height // 2 + 20, 10:60] = 255
    values = (torch.arange(len(boxes)) + 1) % 2
    return {"boxes": boxes, "labels": labels, "mask_values": values, "semantic": semantic}


def as_ours(target, image):
    """The target of `random_target` as the package's detectors take it."""
    masks = target["mask_values"][:, None, None].expand(-1, *image.shape[1:]).to(torch.uint8)
    boxes, semantic = target["boxes"] + INCLUSIVE, target["semantic"].to(torch.uint8)
    return {"boxes": boxes, "labels": target["labels"], "masks": masks, "semantic": semantic}


def random_state(framework, logits):
    """A released state dict, not calibrated."""
    torch.manual_seed(0)
    state = {}
    for key, shape in released_shapes(framework, "resnet50", logits, 1 + len(COUNTS), **SIZES).items():
        if len(shape) > 1:
            state[key] = torch.randn(shape) / math.sqrt(math.prod(shape[1:]))
        elif not key.endswith("tracked"):
            state[key] = 0.8 + 0.4 * torch.rand(shape) if key.endswith("weight") else 0.1 * torch.randn(shape)
    return state


@pytest.fixture(scope="module", params=FRAMEWORKS)
def pair(request, tmp_path_factory):
    """Both detectors of one framework (`ours`, `legacy`), from one released file."""
    framework, folder = request.param, tmp_path_factory.mktemp("legacy")
    grouped, cascade, masks = framework != "faster_rcnn", framework in ("cascade_rcnn", "htc"), "mask" in framework
    limits = {"test_proposals": 40, "train_proposals": 30}
    detections = 10 if masks or framework == "htc" else 300
    settings = (framework, GROUPS if grouped else None, tuple(limits.values()), (0.01, detections))
    state = random_state(framework, 2 + len(GROUPS) + len(COUNTS) if grouped else 1 + len(COUNTS))
    with torch.no_grad():
        calibrating = Calibrating(state, *settings)
        calibrating.detect(calibrating.see([random_image(96, 141, seed=1).float()]), 0, (96, 141))
    content = {
        "data": {"flip": 0} | ({"train_semantic": "maps"} if framework == "htc" else {}),
        "detector": {
            "framework": framework,
            "frozen_batch_norm": True,
            "fpn_channels": SIZES["channels"],
            "min_size": MIN_SIZE,
            "max_size": MAX_SIZE,
            "rpn": {"batch_size": 1_000_000, **limits},
            "roi": {"batch_size": 1_000_000, "class_agnostic": cascade, "fc": SIZES["fc"]},
        },
        "test": {"score_threshold": 0.01, "max_detections": detections},
        "device": "cpu",
    }
    if grouped:
        content["classifier"] = {"name": "group_softmax", "boundaries": json.loads(BOUNDARIES), "others_ratio": "n"}
    files = [folder / name for name in ("released.pth", "ours.pth", "config.yaml", "categories.json")]
    torch.save({"meta": {"epoch": 12}, "state_dict": state}, files[0])
    files[2].write_text(json.dumps(content)), files[3].write_text(json.dumps(CATEGORIES))
    checkpoint, _ = import_weights.import_weights(str(files[0]), bags.load_config(files[2]), files[3], None)
    write_checkpoint(files[1], checkpoint)
    ours, meta = load_detector(files[1])
    assert meta["config"].detector.conventions == "released"
    for file in files:
        file.unlink()
    legacy = LegacyDetector({key: value.double() for key, value in state.items()}, *settings)
    return SimpleNamespace(framework=framework, ours=ours.double(), legacy=legacy)


@torch.no_grad()
def test_detections_are_equal(pair):
    """Proposals, boxes, scores, labels and mask probabilities, of images of two sizes in a batch."""
    images, seen = [random_image(96, 141, seed=1), random_image(113, 96, seed=2)], {}
    hooks = [
        pair.ours.rpn.register_forward_hook(lambda module, inputs, outputs: seen.update(proposals=outputs[0])),
        pair.ours.roi_heads.register_forward_hook(
            lambda module, inputs, outputs: seen.update(detections=[dict(found) for found in outputs[0]])
        ),
    ]
    detections = pair.ours.eval()([image / 255 for image in images])
    for hook in hooks:
        hook.remove()
    maps = pair.legacy.see(images)
    for i, (image, found) in enumerate(zip(images, detections, strict=True)):
        expected = pair.legacy.detect(maps, i, tuple(image.shape[1:]))
        assert len(expected["proposals"]) == 40 and len(expected["boxes"]) >= 10
        assert expected["scores"].std() > 0.001
        torch.testing.assert_close(seen["proposals"][i] - INCLUSIVE, expected["proposals"], atol=1e-6, rtol=0)
        assert torch.equal(found["labels"], expected["labels"])
        torch.testing.assert_close(found["boxes"] - INCLUSIVE, expected["boxes"], atol=1e-6, rtol=0)
        torch.testing.assert_close(found["scores"], expected["scores"], atol=1e-9, rtol=0)
        assert ("masks" in expected) == ("masks" in found)
        if "masks" in expected:
            masks = seen["detections"][i]["masks"][:, 0]
            torch.testing.assert_close(masks, expected["masks"], atol=1e-9, rtol=0)
            assert masks.std() > 0.1
    assert len(torch.cat([found["labels"] for found in detections]).unique()) >= 2


@pytest.mark.parametrize("case", ["crowded", "without objects"])
@torch.no_grad()
def test_losses_are_equal(pair, case):
    """Of two images of different sizes: one with objects in the same place, or one without any."""
    sizes = [(96, 141), (113, 96)]
    images = [random_image(*size, seed=3 + i) for i, size in enumerate(sizes)]
    numbers = (2, 2) if case == "crowded" else (0, 2)
    targets = [random_target(*size, 5 + i, numbers[i], case == "crowded" and i == 0) for i, size in enumerate(sizes)]
    train_mode(pair.ours)
    goals = [as_ours(target, image) for target, image in zip(targets, images, strict=True)]
    found, expected = pair.ours([image / 255 for image in images], goals), pair.legacy.losses(images, targets)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value > 0 or "loss_group" in name
        assert found[name].item() == pytest.approx(value.item(), rel=1e-6), name
