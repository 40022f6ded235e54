"""Backbones, their weights, and anchors."""

import pytest
import torch
import torchvision
from conftest import OUTSIDE
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

import bags
from bags.data.images import read_image
from bags.detectors.anchors import FixedStrideAnchors, PreciseAnchors
from bags.detectors.backbones import STRIDES, DeformableConv, build_backbone, load_backbone_weights
from bags.engine.optim import set_trained_part, train_mode

WEIGHTS = OUTSIDE / "data/weights"
NAMES = ["small", "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large"]


@pytest.mark.parametrize("name", NAMES)
def test_levels_have_the_strides_that_the_backbone_says(name):
    backbone = build_backbone(name, 16, 3, True, 0).eval()
    maps = backbone(torch.zeros(1, 3, 128, 256))
    sizes = [(128 // s, 256 // s) for s in backbone.strides]
    assert [tuple(m.shape[-2:]) for m in maps.values()] == sizes
    assert all(m.shape[1] == backbone.out_channels == 16 for m in maps.values())
    assert set(backbone.roi_levels) == set(maps) - {"pool"}


@pytest.mark.parametrize("frozen_batch_norm", [True, False])
def test_frozen_stages_and_batch_norm(frozen_batch_norm):
    """Stage 1 freezes conv1, bn1 and layer1; frozen batch norm has no parameters and keeps its statistics."""
    backbone = build_backbone("resnet18", 16, 0, frozen_batch_norm, 1)
    frozen = {name.split(".")[0] for name, p in backbone.body.named_parameters() if not p.requires_grad}
    assert frozen == ({"conv1", "layer1"} if frozen_batch_norm else {"conv1", "bn1", "layer1"})
    norms = [m for m in backbone.body.modules() if isinstance(m, torchvision.ops.FrozenBatchNorm2d)]
    assert len(norms) == (20 if frozen_batch_norm else 0) and all(norm.eps == 1e-5 for norm in norms)
    train_mode(backbone)
    stem = {k: v.clone() for k, v in backbone.state_dict().items() if k.startswith(("body.bn1", "body.layer1"))}
    backbone(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(value, backbone.state_dict()[key]) for key, value in stem.items())


def detector(tmp_path, *overrides):
    (tmp_path / "c.yaml").write_text("device: cpu")
    small = ["detector.fpn_channels=16", "detector.roi.fc=16", "detector.min_size=64", "detector.max_size=64"]
    config = bags.load_config(tmp_path / "c.yaml", [*small, *overrides])
    stats = bags.CategoryStats((1, 2), ("a", "b"), (5, 6), (5, 6))
    return bags.build_detector(config, stats)


def test_frozen_stages_stay_frozen_in_part_all(tmp_path):
    model = detector(tmp_path, "detector.backbone=resnet18", "detector.frozen_stages=2")
    set_trained_part(model, "all")
    still = {name.split(".")[2] for name, p in model.named_parameters() if not p.requires_grad}
    assert still == {"conv1", "bn1", "layer1", "layer2"}


SIZES = {"mobilenet_v3_large": "[[32],[64],[128]]", "resnet18": "[[8],[16],[32],[64],[128]]"}


@pytest.mark.parametrize("name, sizes", SIZES.items())
def test_a_step_and_a_prediction(tmp_path, name, sizes):
    model = detector(tmp_path, f"detector.backbone={name}", f"detector.rpn.anchor_sizes={sizes}")
    target = {"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([1])}
    losses = model.train()([torch.rand(3, 64, 80)] * 2, [target] * 2)
    assert sum(losses.values()).isfinite()
    assert model.eval()([torch.rand(3, 64, 80)])[0].keys() == {"boxes", "scores", "labels"}


# --------------------------------------------------------------------------- anchors


def test_anchors_lie_on_their_strides():
    """At a side of 800 torchvision's P6 anchors have stride 61; ours 64, and equal torchvision's elsewhere."""
    sizes, ratios = tuple((8 * s,) for s in STRIDES["resnet"]), ((0.5, 1.0, 2.0),) * 5
    images = ImageList(torch.zeros(2, 3, 800, 1088), [(800, 1066)] * 2)
    maps = [torch.zeros(2, 1, -(-800 // s), -(-1088 // s)) for s in STRIDES["resnet"]]
    ours = FixedStrideAnchors(sizes, ratios, STRIDES["resnet"])(images, maps)
    theirs = AnchorGenerator(sizes, ratios)(images, maps)
    counts = [3 * m.shape[-2] * m.shape[-1] for m in maps]
    assert len(ours) == 2 and torch.equal(ours[0], ours[1])
    for stride, own, a, b in zip(STRIDES["resnet"], maps, ours[0].split(counts), theirs[0].split(counts), strict=True):
        centres = (a[:, :2] + a[:, 2:]).reshape(-1, 3, 2)[:, 1] / 2  # of ratio 1
        assert centres[1].tolist() == [stride, 0] and centres[own.shape[-1]].tolist() == [0, stride]
        assert torch.equal(a, b) == (stride < 64)
    whole = ImageList(torch.zeros(1, 3, 128, 192), [(128, 192)])
    maps = [torch.zeros(1, 1, 128 // s, 192 // s) for s in STRIDES["resnet"]]
    ours, theirs = FixedStrideAnchors(sizes, ratios, STRIDES["resnet"]), AnchorGenerator(sizes, ratios)
    assert torch.equal(ours(whole, maps)[0], theirs(whole, maps)[0])


def test_strides_are_a_choice(tmp_path):
    assert type(detector(tmp_path).rpn.anchor_generator) is FixedStrideAnchors
    assert type(detector(tmp_path, "detector.conventions=torchvision").rpn.anchor_generator) is PreciseAnchors
    assert PreciseAnchors.forward is AnchorGenerator.forward


# --------------------------------------------------------------------------- weights


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_weights_of_torchvisions_classifier(tmp_path, name):
    torch.manual_seed(1)
    classifier = torchvision.models.get_model(name, weights=None).eval()
    torch.save(classifier.state_dict(), tmp_path / "w.pth")
    backbone = build_backbone(name, 16, 0, True, 1).eval()
    load_backbone_weights(backbone, name, str(tmp_path / "w.pth"))
    images = torch.rand(1, 3, 64, 64)
    if name == "resnet18":
        expected = images
        for part in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            expected = getattr(classifier, part)(expected)
    else:
        expected = classifier.features(images)
    found = list(backbone.body(images).values())[-1]
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_weights_of_another_framework(tmp_path):
    """A checkpoint's body is loaded, and none of its pyramid; deformable convolutions take the plain ones' weights."""
    source = build_backbone("resnet18", 16, 0, False, 0)
    model = {f"backbone.{name}": value for name, value in source.state_dict().items()}
    torch.save({"model": model | {"rpn.head.bias": torch.zeros(3)}, "iteration": 5}, tmp_path / "last.pth")
    backbone = build_backbone("resnet18", 16, 0, False, 0, [4])
    load_backbone_weights(backbone, "resnet18", str(tmp_path / "last.pth"))
    loaded = backbone.body.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in source.body.state_dict().items())
    assert not torch.equal(backbone.fpn.inner_blocks[0][0].weight, source.fpn.inner_blocks[0][0].weight)


def test_foreign_weights_are_refused(tmp_path):
    backbone = build_backbone("resnet18", 16, 0, True, 0)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    other = {"layer1.0.conv1.weight": torch.zeros(1)}
    torch.save(torchvision.models.resnet34(weights=None).state_dict() | other, tmp_path / "a.pth")
    torch.save({"state": 1}, tmp_path / "b.pth")
    (tmp_path / "c.pth").write_text("hello")
    whole = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(whole | {"conv1.weight": whole["conv1.weight"] * float("nan")}, tmp_path / "e.pth")
    words = {
        "e": "conv1.weight holds numbers that are not finite",
        "a": "layer1.0.conv1.weight is missing",
        "b": "no state dict in there",
        "c": "not a file of",
        "d": "no such file",
    }
    for name, text in words.items():
        with pytest.raises(bags.UserError, match=text):
            load_backbone_weights(backbone, "resnet18", str(tmp_path / f"{name}.pth"))
    with pytest.raises(bags.UserError, match="one of: IMAGENET1K_V1"):
        load_backbone_weights(backbone, "resnet18", "IMAGENET")
    assert all(torch.equal(value, backbone.state_dict()[key]) for key, value in before.items())


@pytest.mark.skipif(not WEIGHTS.is_dir(), reason="no real weights here")
def test_real_weights_see_more_than_random_ones(tmp_path):
    """Real features separate two photographs' crops better from each other than from their mirror images."""
    photos = sorted((OUTSIDE / "data/coco_mini_480/val2017").glob("*.jpg"))[:6]
    model = detector(
        tmp_path,
        "detector.backbone=mobilenet_v2",
        "detector.rpn.anchor_sizes=[[32],[64],[128]]",
        "detector.frozen_batch_norm=true",
        "detector.image_mean=[0.5, 0.5, 0.5]",
        "detector.image_std=[0.5, 0.5, 0.5]",
    ).eval()
    file = WEIGHTS / "mobilenet_v2_imagenet_keras_int8dequant.pth"
    load_backbone_weights(model.backbone, "mobilenet_v2", str(file))

    def features(image):
        batch = model.transform([image])[0].tensors
        return torch.nn.functional.normalize(list(model.backbone.body(batch).values())[-1].mean((2, 3)), dim=1)

    with torch.no_grad():
        images = [torchvision.transforms.functional.to_tensor(read_image(p).resize((224, 224))) for p in photos]
        plain, mirrored = (torch.cat([features(f(i)) for i in images]) for f in (lambda i: i, lambda i: i.flip(2)))
    similarity = plain @ mirrored.T
    assert (similarity.argmax(1) == torch.arange(len(photos))).all()


# --------------------------------------------------------------------------- deformable stages


def test_deformable_convolution_starts_as_the_plain_one():
    torch.manual_seed(0)
    plain = torch.nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2, bias=False)
    deformable, images = DeformableConv(plain), torch.randn(2, 8, 9, 11)
    assert torch.allclose(deformable(images), plain(images), atol=1e-5)
    torch.nn.init.constant_(deformable.offsets.bias, 1.0)  # every tap one pixel down and to the right
    shifted = torch.nn.functional.pad(images, (0, 1, 0, 1))[:, :, 1:, 1:]
    inside = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    assert torch.allclose(deformable(images)[inside], plain(shifted)[inside], atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert deformable(images).isfinite().all()


def test_deformable_stages_are_those_that_were_asked_for(tmp_path):
    model = detector(
        tmp_path, "detector.backbone=resnet50", "detector.deformable_stages=[3, 4]", "detector.frozen_stages=3"
    )
    found = {n.split(".")[2] for n, m in model.named_modules() if isinstance(m, DeformableConv)}
    assert found == {"layer3", "layer4"}
    offsets = {n: p for n, p in model.named_parameters() if ".offsets." in n}
    assert len(offsets) == 2 * (6 + 3) and all(p.requires_grad == ("layer4" in n) for n, p in offsets.items())
    state = torchvision.models.resnet50(weights=None).state_dict()
    torch.save(state, tmp_path / "w.pth")
    load_backbone_weights(model.backbone, "resnet50", str(tmp_path / "w.pth"))
    assert torch.equal(model.backbone.body.layer4[2].conv2.weight, state["layer4.2.conv2.weight"])


def test_fixed_statistics_train_their_affine_parameters(tmp_path):
    model = detector(
        tmp_path, "detector.backbone=resnet18", "detector.frozen_batch_norm=statistics", "detector.frozen_stages=1"
    )
    set_trained_part(model, "all")
    train_mode(model)
    before = {k: v.clone() for k, v in model.backbone.state_dict().items() if "running" in k}
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(model.backbone(images)["0"], model.backbone(images)["0"])
    list(model.backbone(images).values())[0].sum().backward()
    norms = {n: p for n, p in model.backbone.body.named_parameters() if "bn" in n}
    assert all((p.grad is not None) == n.startswith(("layer2", "layer3", "layer4")) for n, p in norms.items())
    assert all(torch.equal(v, model.backbone.state_dict()[k]) for k, v in before.items())
