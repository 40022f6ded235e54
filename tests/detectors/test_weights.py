"""Weights in and out: torchvision's detectors, and every layout of the paper's released models."""

import contextlib
import dataclasses
import json
import math
import pickle
import re

import pytest
import torch
from conftest import ROOT, run_script
from torchvision.models import get_model
from torchvision.models.detection import (
    FasterRCNN_ResNet50_FPN_Weights,
    fasterrcnn_mobilenet_v3_large_fpn,
    fasterrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn,
)
from torchvision.ops import FrozenBatchNorm2d

import bags
from bags.assembly.initialise import initialise
from bags.assembly.models import Undrawn, build_detector, build_undrawn, load_detector
from bags.classifiers import classifier_settings
from bags.config.load import config_to_dict
from bags.data.checks import what_does_not_train, why_nothing_trains
from bags.data.statistics import CategoryStats
from bags.detectors.weights import describe, fold_batch_norm_eps, read_state, select_labels, to_torchvision, translate
from bags.engine.checkpoint import save_checkpoint
from bags.engine.optim import train_mode
from bags.jobs import import_weights

CATEGORIES = [
    {"id": i, "name": f"thing {i}", "instance_count": n, "image_count": n // 2 + 1, "frequency": "c"}
    for i, n in ((1, 5), (3, 2000), (4, 60))
]
SIZES = "detector.rpn.anchor_sizes=[[32,64,128,256,512],[32,64,128,256,512],[32,64,128,256,512]]"


def freeze_batch_norm(module):
    """As torchvision's pretrained detectors have it; with statistics that are not 0 and 1."""
    for name, child in module.named_children():
        if isinstance(child, torch.nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features)
            frozen.running_mean.normal_(std=0.1), frozen.running_var.uniform_(0.5, 1.5)
            setattr(module, name, frozen)
        else:
            freeze_batch_norm(child)


def write(folder, name, text):
    (folder / name).write_text(text)
    return folder / name


@pytest.fixture
def categories(tmp_path):
    return write(tmp_path, "categories.json", json.dumps(CATEGORIES))


def batch(masks=False):
    boxes = torch.tensor([[4.0, 4, 60, 80], [20, 10, 90, 60]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 3])}
    if masks:
        target["masks"] = torch.zeros(2, 96, 128, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(target["masks"], boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
    return [torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(0))], [target]


# --------------------------------------------------------------------------- torchvision


@pytest.mark.parametrize(
    "builder, framework, backbone",
    [
        (maskrcnn_resnet50_fpn, "mask_rcnn", "resnet50"),
        (fasterrcnn_mobilenet_v3_large_fpn, "faster_rcnn", "mobilenet_v3_large"),
    ],
)
@pytest.mark.slow
def test_torchvisions_detector_comes_in_and_goes_out(tmp_path, categories, builder, framework, backbone):
    """Same weights: equal losses from the same seeds, equal detections; and the way back gives the same file."""
    torch.manual_seed(0)
    limits = {"min_size": 96, "max_size": 160, "box_score_thresh": 0.05, "box_detections_per_img": 30}
    if builder is fasterrcnn_mobilenet_v3_large_fpn:
        limits |= {"rpn_pre_nms_top_n_test": 1000, "rpn_post_nms_top_n_test": 1000, "rpn_score_thresh": 0.0}
    peer = builder(weights=None, weights_backbone=None, num_classes=4, **limits)
    freeze_batch_norm(peer)
    with torch.no_grad():
        peer.roi_heads.box_predictor.cls_score.weight.mul_(20)
    counters = {"backbone.body.bn1.num_batches_tracked": torch.tensor(7)}
    torch.save({**peer.state_dict(), **counters}, tmp_path / "theirs.pth")
    settings = f"framework: {framework}, backbone: {backbone}, frozen_batch_norm: true, min_size: 96, max_size: 160"
    test = "test: {score_threshold: 0.05, max_detections: 30}"
    config = write(tmp_path, "c.yaml", f"detector: {{{settings}}}\n{test}\ndevice: cpu")
    extra = [SIZES] if backbone.startswith("mobilenet") else []
    files = ("--annotations", categories, "--output", tmp_path / "ours.pth")
    done = run_script("import_weights", tmp_path / "theirs.pth", config, *extra, *files)
    assert done.returncode == 0, done.stderr
    assert "conventions: torchvision, by the names of the tensors\n" in done.stdout
    assert "taken: " in done.stdout and "a counter that frozen batch normalisation does not have" in done.stdout
    ours, meta = load_detector(tmp_path / "ours.pth")
    assert meta["config"].detector.conventions == "torchvision" and meta["counts"] == [5, 2000, 60]
    images, targets = batch(framework == "mask_rcnn")
    peer.train()
    train_mode(ours)
    losses = []
    for model in (peer, ours):
        torch.manual_seed(1)
        losses.append(model(images, targets))
    assert losses[0].keys() == losses[1].keys()
    for key, value in losses[0].items():
        assert losses[1][key].item() == pytest.approx(value.item(), abs=1e-5, rel=1e-5), key
    with torch.no_grad():
        [expected], [found] = peer.eval()(images), ours.eval()(images)
    assert len(expected["boxes"]) >= 5
    for key, value in expected.items():
        assert torch.allclose(found[key], value, atol=1e-5), key

    done = run_script("import_weights", "--export", tmp_path / "ours.pth", "--output", tmp_path / "back.pth")
    assert done.returncode == 0 and f"detection.{builder.__name__}(" in done.stdout, done.stderr
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    with Undrawn():
        again = builder(weights=None, weights_backbone=None, num_classes=4)
    again.load_state_dict(back)
    assert all(torch.equal(v, peer.state_dict()[k]) for k, v in back.items())


def test_labels_that_coco_does_not_use_are_left_out(tmp_path):
    """torchvision's models have labels by category id: rows 0, 1, 3, 4 of 6 become labels 0 to 3."""
    torch.manual_seed(0)
    peer = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=6)
    state = translate(peer.state_dict(), "x").state
    chosen = select_labels(state, [0, 1, 3, 4])
    rows = [0, 1, 3, 4]
    assert torch.equal(
        chosen["roi_heads.classifier.linear.weight"], peer.roi_heads.box_predictor.cls_score.weight[rows]
    )
    boxes = peer.roi_heads.box_predictor.bbox_pred.bias.view(6, 4)[rows].flatten()
    assert torch.equal(chosen["roi_heads.box_regressor.bias"], boxes)
    masks = peer.roi_heads.mask_predictor.mask_fcn_logits.weight[rows]
    assert torch.equal(chosen["roi_heads.mask_predictor.mask_fcn_logits.weight"], masks)


def test_a_model_of_coco_is_not_one_of_other_categories(tmp_path, categories):
    """91 labels in a file are COCO's 80 categories, and nothing else."""
    peer = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    torch.save(peer.state_dict(), tmp_path / "w.pth")
    config = write(tmp_path, "c.yaml", "detector: {frozen_batch_norm: true}")
    arguments = [tmp_path / "w.pth", config, "--annotations", categories, "--output", tmp_path / "o.pth"]
    done = run_script("import_weights", *arguments)
    assert done.returncode == 2 and "this file knows 90 categories" in done.stderr
    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    known = [
        {"id": i, "name": n, "instance_count": 1, "image_count": 1} for i, n in enumerate(names) if i and n != "N/A"
    ]
    categories.write_text(json.dumps(known))
    done = run_script("import_weights", *arguments)
    assert done.returncode == 0 and "left out: 10 labels without a category (90 in the file)" in done.stdout, (
        done.stderr
    )


BAD_LISTS = {
    "[]": "expected categories",
    '[{"id": 1, "name": "a"}]': "a list of categories with id, name, instance_count",
    "[3]": "a list of categories with id",
    '[{"id": 1, "name": "a", "instance_count": -1, "image_count": 1}]': "whole numbers",
    '[{"id": 1, "name": "a", "instance_count": true, "image_count": 1}]': "whole numbers",
    '[{"id": 1, "name": null, "instance_count": 1, "image_count": 1}]': "names as text",
    '[{"id": 1, "name": "a", "instance_count": 1, "image_count": 1}, {"id": 1, "name": "b", "instance_count": 1, '
    '"image_count": 1}]': "the same id",
}


@pytest.mark.parametrize("content", BAD_LISTS)
def test_bad_lists_of_categories(tmp_path, content):
    (tmp_path / "categories.json").write_text(content)
    config = bags.load_config(write(tmp_path, "c.yaml", "detector: {frozen_batch_norm: true}"))
    with pytest.raises(bags.UserError, match=re.escape(BAD_LISTS[content])):
        import_weights.read_stats(config, tmp_path / "categories.json", [])


def test_what_would_be_lost_is_refused(tmp_path, categories):
    """Nothing that exists is overwritten; odd options are named."""
    config = released_config(tmp_path, "faster_rcnn")
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "there.pth").write_text("precious")
    start = [tmp_path / "x.pth", config, "--annotations", categories]
    cases = [
        ([*start, "--output", tmp_path / "folder.pth"], "exists already"),
        ([*start, "--output", tmp_path / "there.pth"], "exists already"),
        (["--export", tmp_path / "there.pth", "--output", tmp_path / "there.pth"], "exists already"),
        ([*start, "--output", tmp_path / "o.bin"], "ends in .pth"),
        ([*start, "--output", tmp_path / "o.pth", "--eps", "nan"], "--eps nan"),
        (["--export", tmp_path / "there.pth", "--output", tmp_path / "o.pth", "--eps", "0"], "--export takes"),
        ([tmp_path / "x.pth", "--output", tmp_path / "o.pth"], "the configuration that describes them"),
    ]
    for arguments, text in cases:
        done = run_script("import_weights", *arguments)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and text in done.stderr, (arguments, done.stderr)
    assert (tmp_path / "there.pth").read_text() == "precious" and not list(tmp_path.glob("*.tmp"))


def test_names_of_torchvisions_older_files():
    """The files of 2019 and 2020 name these four differently; torchvision's own loader renames them."""
    old = {
        "backbone.fpn.inner_blocks.2.weight": "backbone.fpn.inner_blocks.2.0.weight",
        "backbone.fpn.layer_blocks.0.bias": "backbone.fpn.layer_blocks.0.0.bias",
        "rpn.head.conv.weight": "rpn.head.conv.0.0.weight",
        "roi_heads.mask_head.mask_fcn4.bias": "roi_heads.mask_head.3.0.bias",
        "roi_heads.box_predictor.cls_score.weight": "roi_heads.classifier.linear.weight",
    }
    assert list(translate(dict.fromkeys(old, torch.zeros(1)), "x").state) == list(old.values())
    new = get_model("maskrcnn_resnet50_fpn", weights=None, weights_backbone=None).state_dict()
    names = translate(new, "x").state
    assert set(old.values()) <= set(names) and len(names) == len(new) - sum("tracked" in key for key in new)


def test_batch_normalisation_without_eps():
    """Frozen statistics shifted so that our eps gives what eps 0 gave."""
    theirs, ours = FrozenBatchNorm2d(4, eps=0.0), FrozenBatchNorm2d(4, eps=1e-5)
    theirs.running_var.copy_(torch.tensor([1e-4, 0.01, 1.0, 3.0]))
    ours.load_state_dict(fold_batch_norm_eps(theirs.state_dict(), 0.0))
    images = torch.randn(1, 4, 5, 5)
    assert torch.allclose(ours(images), theirs(images), rtol=1e-5)


def test_what_torchvision_cannot_hold(tmp_path):
    states = {"group_softmax": "outputs; torchvision's softmax has 4", "ncm": "one linear layer"}
    for name, text in states.items():
        path = write(
            tmp_path, f"{name}.yaml", f"classifier: {{name: {name}}}\ntrain: {{part: none}}\ndetector: {{init_from: x}}"
        )
        stats = CategoryStats((1, 2, 3), ("a", "b", "c"), (500, 50, 5), (300, 40, 5))
        config = bags.load_config(path)
        with pytest.raises(ValueError, match=text):
            to_torchvision(build_detector(config, stats).state_dict(), 3)


def test_a_shared_mask_goes_out_once_for_each_label():
    layer = "roi_heads.mask_predictor.mask_fcn_logits."
    state = {f"{layer}weight": torch.randn(1, 5, 1, 1), f"{layer}bias": torch.randn(1)}
    out = to_torchvision({"backbone.body.conv1.weight": torch.zeros(1), **state}, 3)
    assert out[f"{layer}weight"].shape == (4, 5, 1, 1) and out[f"{layer}bias"].shape == (4,)
    assert all((out[key] == value).all() for key, value in state.items())


# --------------------------------------------------------------------------- the paper's released models


def bottlenecks(blocks, groups, base, deformable=()):
    """Names and shapes of the released ResNet or ResNeXt, as documented."""
    shapes = {"conv1.weight": (64, 3, 7, 7), **norm("bn1", 64)}
    width_in = 64
    for layer, number in enumerate(blocks, start=1):
        out = 256 * 2 ** (layer - 1)
        width = 64 * 2 ** (layer - 1) if groups == 1 else groups * base * 2 ** (layer - 1)
        for block in range(number):
            name = f"layer{layer}.{block}"
            shapes |= {f"{name}.conv1.weight": (width, width_in, 1, 1), **norm(f"{name}.bn1", width)}
            shapes |= {f"{name}.conv2.weight": (width, width // groups, 3, 3), **norm(f"{name}.bn2", width)}
            shapes |= {f"{name}.conv3.weight": (out, width, 1, 1), **norm(f"{name}.bn3", out)}
            if layer in deformable:
                shapes |= pair(f"{name}.conv2_offset", (18, width, 3, 3))
            if block == 0:
                shapes |= {f"{name}.downsample.0.weight": (out, width_in, 1, 1), **norm(f"{name}.downsample.1", out)}
            width_in = out
    return {f"backbone.{key}": shape for key, shape in shapes.items()}


def norm(name, width):
    parts = {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}
    return parts | {f"{name}.num_batches_tracked": ()}


def pair(name, shape, outputs=None):
    return {f"{name}.weight": shape, f"{name}.bias": (outputs or shape[0],)}


def released_shapes(framework, backbone, logits, labels, deformable=(), channels=256, fc=1024):
    """Every name and shape of a released checkpoint, from the documentation of its layout.

    channels, fc: of the pyramid and its heads, and of the classifiers' inputs, where they are smaller than released.
    """
    blocks, groups = {"resnet50": ([3, 4, 6, 3], 1), "resnext101_64x4d": ([3, 4, 23, 3], 64)}[backbone]
    shapes = bottlenecks(blocks, groups, 4, deformable)
    for i, width in enumerate((256, 512, 1024, 2048)):
        shapes |= pair(f"neck.lateral_convs.{i}.conv", (channels, width, 1, 1))
        shapes |= pair(f"neck.fpn_convs.{i}.conv", (channels, channels, 3, 3))
    shapes |= pair("rpn_head.rpn_conv", (channels, channels, 3, 3)) | pair("rpn_head.rpn_cls", (3, channels, 1, 1))
    shapes |= pair("rpn_head.rpn_reg", (12, channels, 1, 1))
    cascaded = framework in ("cascade_rcnn", "htc")
    for stage in ("0.", "1.", "2.") if cascaded else ("",):
        shapes |= pair(f"bbox_head.{stage}shared_fcs.0", (fc, 49 * channels))
        shapes |= pair(f"bbox_head.{stage}shared_fcs.1", (fc, fc))
        shapes |= pair(f"bbox_head.{stage}fc_cls", (logits, fc))
        shapes |= pair(f"bbox_head.{stage}fc_reg", (4 if cascaded else 4 * labels, fc))
        if framework in ("mask_rcnn", "htc"):
            for i in range(4):
                shapes |= pair(f"mask_head.{stage}convs.{i}.conv", (channels, channels, 3, 3))
            shapes |= pair(f"mask_head.{stage}upsample", (channels, channels, 2, 2))
            shapes |= pair(f"mask_head.{stage}conv_logits", (labels, channels, 1, 1))
        if framework == "htc":
            shapes |= pair(f"mask_head.{stage}conv_res.conv", (channels, channels, 1, 1))
    if framework == "htc":
        for i in range(5):
            shapes |= pair(f"semantic_head.lateral_convs.{i}.conv", (channels, channels, 1, 1))
        for i in range(4):
            shapes |= pair(f"semantic_head.convs.{i}.conv", (channels, channels, 3, 3))
        shapes |= pair("semantic_head.conv_embedding.conv", (channels, channels, 1, 1))
        shapes |= pair("semantic_head.conv_logits", (183, channels, 1, 1))
    return shapes


LAYOUTS = [
    ("softmax", "faster_rcnn", "resnet50", 1231, ()),
    ("bags", "faster_rcnn", "resnet50", 1236, ()),
    ("bags_2_groups", "faster_rcnn", "resnet50", 1234, ()),
    ("bags_8_groups", "faster_rcnn", "resnet50", 1240, ()),
    ("reweight_cls", "faster_rcnn", "resnet50", 1231, ()),
    ("focal", "faster_rcnn", "resnet50", 1231, ()),
    ("rfs", "faster_rcnn", "resnet50", 1231, ()),
    ("large", "faster_rcnn", "resnext101_64x4d", 1231, ()),
    ("large_bags", "faster_rcnn", "resnext101_64x4d", 1236, ()),
    ("cascade", "cascade_rcnn", "resnext101_64x4d", 1231, ()),
    ("cascade_bags", "cascade_rcnn", "resnext101_64x4d", 1236, ()),
    ("mask", "mask_rcnn", "resnet50", 1231, ()),
    ("mask_bags", "mask_rcnn", "resnet50", 1236, ()),
    ("htc", "htc", "resnext101_64x4d", 1231, ()),
    ("htc_bags", "htc", "resnext101_64x4d", 1236, ()),
    ("htc_dcn", "htc", "resnext101_64x4d", 1231, (2, 3, 4)),
    ("htc_dcn_bags", "htc", "resnext101_64x4d", 1236, (2, 3, 4)),
]


@pytest.mark.parametrize("row, framework, backbone, logits, deformable", LAYOUTS)
def test_every_released_layout_fits_its_row(monkeypatch, row, framework, backbone, logits, deformable):
    """No name is missing, none is left over, every shape is right: full size, without the numbers."""
    shapes = released_shapes(framework, backbone, logits, 1231, deformable)
    documented = {
        ("faster_rcnn", "resnet50"): 295,
        ("mask_rcnn", "resnet50"): 307,
        ("faster_rcnn", "resnext101_64x4d"): 550,
    }
    tensors = sum(not key.endswith("tracked") for key in shapes)
    assert tensors == documented.get((framework, backbone), tensors)

    def with_memory(build):  # groups are made of numbers
        def on_cpu(*arguments):
            with torch.device("cpu"):
                return build(*arguments)

        return on_cpu

    for kind in classifier_settings().values():
        monkeypatch.setattr(kind, "build", with_memory(kind.build))
    with torch.device("meta"):
        translated = translate({key: torch.empty(shape) for key, shape in shapes.items()}, "file")
        config = bags.load_config(ROOT / "configs/lvis_v0.5" / row, ["detector.conventions=released"])
        numbers = tuple(range(1, 1231))
        stats = CategoryStats(numbers, tuple(map(str, numbers)), numbers, numbers)
        detector = build_detector(config, stats)
    assert translated.origin == "released"
    found = describe(translated.state)
    expected = {"framework": framework, "backbone": backbone, "deformable_stages": deformable, "logits": logits}
    assert found == expected
    wanted = {key: tuple(value.shape) for key, value in detector.state_dict().items() if not key.endswith("tracked")}
    assert {key: tuple(value.shape) for key, value in translated.state.items()} == wanted
    unused = [key for key in translated.skipped if not key.endswith("tracked")]
    assert unused == (
        ["mask_head.0.conv_res.conv.weight", "mask_head.0.conv_res.conv.bias"] if framework == "htc" else []
    )


SMALL = {"channels": 32, "fc": 64}  # the heads of a released file are most of it


def released_file(path, framework, backbone="resnet50", logits=4, labels=4, sizes=SMALL, **content):
    torch.manual_seed(0)
    shapes = released_shapes(framework, backbone, logits, labels, **sizes)
    state = {
        key: torch.zeros((), dtype=torch.long)
        if key.endswith("tracked")
        else torch.randn(shape) / math.sqrt(math.prod(shape[1:]) or 1)
        for key, shape in shapes.items()
    }
    state |= {key: value.abs() + 0.5 for key, value in state.items() if key.endswith("running_var")}
    optimizer = {"state": {}, "param_groups": [{"lr": 0.01, "params": [0, 1]}]}
    torch.save(
        {"meta": {"epoch": 12, "CLASSES": ("a", "b")}, "state_dict": state, "optimizer": optimizer, **content}, path
    )
    return state


def released_config(folder, framework, *lines, sizes=SMALL):
    anchors = "rpn: {anchor_sizes: [[32],[64],[128],[256],[512]]}"
    roi = f"{{fc: {sizes['fc']}, class_agnostic: {str(framework in ('cascade_rcnn', 'htc')).lower()}}}"
    limits = f"frozen_batch_norm: true, min_size: 128, max_size: 160, fpn_channels: {sizes['channels']}"
    detector = f"detector: {{framework: {framework}, {limits}, roi: {roi}, {anchors}}}"
    semantic = ["data: {train_semantic: maps}"] if framework == "htc" else []
    return write(folder, "c.yaml", "\n".join([detector, *semantic, "device: cpu", *lines]))


@pytest.mark.parametrize("framework", ["faster_rcnn", "mask_rcnn", "cascade_rcnn", "htc"])
@pytest.mark.slow
def test_a_released_file_becomes_a_checkpoint(tmp_path, categories, framework):
    """With groups; the tensors are where they belong, and the detector detects under the released conventions."""
    sizes = {"channels": 256, "fc": 1024} if framework == "faster_rcnn" else SMALL
    state = released_file(tmp_path / "released.pth", framework, logits=8, sizes=sizes)
    group = "classifier: {name: group_softmax, boundaries: [10, 100]}"
    config = released_config(
        tmp_path, framework, group, "test: {score_threshold: 0.001, max_detections: 20}", sizes=sizes
    )
    files = ("--annotations", categories, "--output", tmp_path / "deep/ours.pth")
    done = run_script("import_weights", tmp_path / "released.pth", config, *files)
    assert done.returncode == 0, done.stderr
    assert "conventions: released, by the names of the tensors\n" in done.stdout
    assert "groups: 3, of 1, 1, 1 categories, divided at 10, 100 training instances\n" in done.stdout
    assert "taken: " in done.stdout and ("never used" in done.stdout) == (framework == "htc")
    detector, meta = load_detector(tmp_path / "deep/ours.pth")
    assert meta["config"].detector.conventions == "released"
    assert [c["id"] for c in meta["categories"]] == [1, 3, 4]
    last = detector.classifiers()[-1]
    assert last.groups.group_of == (0, 2, 1)
    stage = "2." if framework in ("cascade_rcnn", "htc") else ""
    assert torch.equal(last.linear.weight, state[f"bbox_head.{stage}fc_cls.weight"])
    assert torch.equal(detector.backbone.body.layer3[5].conv2.weight, state["backbone.layer3.5.conv2.weight"])
    with torch.no_grad():
        [found] = detector([torch.rand(3, 100, 140)])
    assert len(found["boxes"]) == 20 and found["boxes"].isfinite().all()
    assert ("masks" in found) == (framework in ("mask_rcnn", "htc"))


REFUSED = {
    "another framework": (
        {"framework": "mask_rcnn"},
        [],
        "its detector has framework mask_rcnn, the configuration faster_rcnn",
    ),
    "another backbone": ({}, ["detector.backbone=resnet101"], "has backbone resnet50, the configuration resnet101"),
    "another classifier": (
        {},
        ["classifier.name=group_softmax"],
        "r.pth: this file holds a softmax: use classifier.name=softmax, or a row without groups",
    ),
    "four groups": (
        {"logits": 9},
        [],
        "holds a group softmax of 4 groups: use classifier.name=group_softmax and 3 numbers in classifier.boundaries",
    ),
    "other groups": (
        {"logits": 7},
        ["classifier.name=group_softmax"],
        "holds a group softmax of 2 groups: use classifier.name=group_softmax and 1 numbers in classifier.boundaries",
    ),
    "no such head": ({"logits": 3}, [], "has 3 logits, which fits no softmax and no group softmax of 3 categories"),
    "other categories": (
        {"labels": 9, "logits": 9},
        [],
        "this file knows 8 categories, the annotations 3: name the annotations that it was trained with",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_file_is_not(tmp_path, categories, case):
    content, overrides, text = REFUSED[case]
    released_file(tmp_path / "r.pth", **{"framework": "faster_rcnn", **content})
    config = released_config(tmp_path, "faster_rcnn")
    files = ("--annotations", categories, "--output", tmp_path / "o.pth")
    done = run_script("import_weights", tmp_path / "r.pth", config, *overrides, *files)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert text in done.stderr and not (tmp_path / "o.pth").exists()


def test_missing_annotations_name_the_option(tmp_path):
    released_file(tmp_path / "r.pth", "faster_rcnn")
    config = released_config(tmp_path, "faster_rcnn")
    done = run_script("import_weights", tmp_path / "r.pth", config, "--output", tmp_path / "o.pth")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "train.json: no such file; categories and their training counts come from it: --annotations" in done.stderr


class Malice:
    def __reduce__(self):
        return (print, ("code from a file was run",))


@pytest.mark.slow
def test_bad_files(tmp_path, categories):
    config = released_config(tmp_path, "faster_rcnn")
    state = released_file(tmp_path / "good.pth", "faster_rcnn")
    whole = (tmp_path / "good.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    (tmp_path / "flipped.pth").write_bytes(flipped)
    (tmp_path / "text.pth").write_text("hello")
    torch.save({"state_dict": state, "meta": Malice()}, tmp_path / "code.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps({"state_dict": Malice()}))
    torch.save({"state_dict": {"a": 1}}, tmp_path / "numbers.pth")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "foreign.pth")
    torch.save({**state, "rpn_head.rpn_cls.bias": torch.full((3,), math.nan)}, tmp_path / "nan.pth")
    torch.save({k: v for k, v in state.items() if k != "neck.fpn_convs.3.conv.bias"}, tmp_path / "missing.pth")
    torch.save({**state, "bbox_head.extra.weight": torch.zeros(2)}, tmp_path / "extra.pth")
    words = {
        "cut": "damaged",
        "flipped": "damaged",
        "text": "not a file of weights",
        "code": "more than tensors",
        "pickle": "more than tensors",
        "numbers": "no state dict",
        "foreign": "first tensor is weight",
        "nan": "rpn_head.rpn_cls.bias holds numbers that are not finite",
        "missing": "backbone.fpn.layer_blocks.3.0.bias is missing (1 such)",
        "extra": "bbox_head.extra.weight is not expected (1 such)",
        "absent": "no such file",
    }
    for name, text in words.items():
        arguments = [tmp_path / f"{name}.pth", config, "--annotations", categories, "--output", tmp_path / "o.pth"]
        done = run_script("import_weights", *arguments)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, (name, done.stderr)
        assert text in done.stderr and "was run" not in done.stdout, (name, done.stderr)
        assert not (tmp_path / "o.pth").exists()


def test_a_file_from_before_torch_1_6(tmp_path):
    torch.save({"state_dict": {"a": torch.arange(3)}}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert read_state(tmp_path / "old.pth")["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("row", ["softmax", "htc_dcn_bags", "cascade_bags"])
def test_what_a_state_dict_fills_is_not_drawn(row):
    """The drawn weights aside, the detector is the same, and the random numbers that follow are."""
    stats = CategoryStats((1, 3, 4), ("a", "b", "c"), (5, 2000, 60), (3, 1001, 31))
    backbone = ["detector.backbone=resnet50"] if row == "softmax" else ["detector.backbone=resnet18"]
    backbone += ["detector.deformable_stages=[]"]
    config = bags.load_config(ROOT / "configs/lvis_v0.5" / row, [*backbone, "detector.roi.fc=16"])
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    undrawn = build_undrawn(config, stats)
    assert torch.equal(torch.rand(1), expected)
    drawn = build_detector(config, stats)
    buffers = dict(drawn.named_buffers())
    assert undrawn.state_dict().keys() == drawn.state_dict().keys() and buffers
    assert all(torch.equal(value, buffers[name]) for name, value in undrawn.named_buffers())


# --------------------------------------------------------------------------- starting from other categories


@pytest.mark.parametrize("theirs, ours", [("true", "true"), ("true", "statistics"), ("statistics", "true")])
def test_training_starts_from_a_detector_of_other_categories(tmp_path, glyphs, theirs, ours):
    """Everything is taken but what depends on categories, whichever way batch normalisation is frozen."""
    detector = (
        f"{{framework: mask_rcnn, backbone: resnet18, fpn_channels: 16, roi: {{fc: 16}}, frozen_batch_norm: {theirs}}}"
    )
    config = bags.load_config(write(tmp_path, "c.yaml", f"detector: {detector}\ndevice: cpu"))
    others = CategoryStats((7, 8), ("x", "y"), (0, 0), (0, 0))
    torch.manual_seed(1)
    source = build_detector(config, others)
    content = {"config": config_to_dict(config), "stats": others.to_dict(), "model": source.state_dict()}
    save_checkpoint(tmp_path / "coco.pth", content)
    index = bags.AnnotationIndex.open(glyphs / "train.json")
    stats = CategoryStats.from_index(index)
    keys = [f"detector.init_from={tmp_path / 'coco.pth'}"]
    plain = bags.load_config(tmp_path / "c.yaml", keys)
    with pytest.raises(bags.UserError, match="other_categories"):
        initialise(build_detector(plain, stats), plain, index, stats)
    keys += ["detector.other_categories=true", f"detector.frozen_batch_norm={ours}"]
    transfer = bags.load_config(tmp_path / "c.yaml", keys)
    detector = build_detector(transfer, stats)
    new = initialise(detector, transfer, index, stats)
    dependent = ("classifier.linear", "box_regressor", "mask_fcn_logits")
    assert all(any(part in name for part in dependent) for name in new) and len(new) == 6
    for name, value in detector.state_dict().items():
        taken = source.state_dict().get(name)
        assert name in new or name.endswith("num_batches_tracked") or torch.equal(value, taken)


def test_deformable_stages_start_from_a_detector_without_them(tmp_path, glyphs):
    """Their offsets start as 0, so that both detectors find the same; the other way round is refused."""
    detector = "{backbone: resnet18, fpn_channels: 16, roi: {fc: 16}}"
    write(tmp_path, "c.yaml", f"detector: {detector}\ndevice: cpu")
    index = bags.AnnotationIndex.open(glyphs / "train.json")
    stats = CategoryStats.from_index(index)
    deformable = "detector.deformable_stages=[3, 4]"
    images = [torch.rand(3, 64, 96)]
    for name, keys, others in (("plain", [], [deformable]), ("deformable", [deformable], [])):
        config = bags.load_config(tmp_path / "c.yaml", keys)
        torch.manual_seed(1)
        source = build_detector(config, stats).eval()
        content = {"config": config_to_dict(config), "stats": stats.to_dict(), "model": source.state_dict()}
        save_checkpoint(tmp_path / f"{name}.pth", content)
        ours = bags.load_config(tmp_path / "c.yaml", [f"detector.init_from={tmp_path / name}.pth", *others])
        torch.manual_seed(2)
        model = build_detector(ours, stats).eval()
        if name == "deformable":
            with pytest.raises(bags.UserError, match="offsets.weight does not fit"):
                initialise(model, ours, index, stats)
            continue
        new = initialise(model, ours, index, stats)
        assert len(new) == 8 and all(".offsets." in n for n in new)  # 2 tensors, 2 blocks, 2 stages
        for level, found in model.backbone(images[0][None]).items():
            assert torch.allclose(found, source.backbone(images[0][None])[level], atol=1e-5)


@pytest.mark.parametrize(
    "saved, works", [("softmax", True), ("sigmoid_focal", True), ("acsl", False), ("iif", False), ("sigmoid", False)]
)
@pytest.mark.parametrize("ours", ["softmax", "norcal", "tau_norm", "simcal"])
def test_only_a_softmax_is_calibrated_as_one(tmp_path, glyphs, saved, works, ours):
    """Layers of equal shape are not enough: of another classifier, a softmax's reading of its layer means nothing."""
    detector = "{backbone: resnet18, fpn_channels: 16, roi: {fc: 16}}"
    write(tmp_path, "c.yaml", f"detector: {detector}\ndevice: cpu\nclassifier: {{name: {saved}}}")
    index = bags.AnnotationIndex.open(glyphs / "train.json")
    stats = CategoryStats.from_index(index)
    config = bags.load_config(tmp_path / "c.yaml")
    content = {"config": config_to_dict(config), "stats": stats.to_dict()}
    save_checkpoint(tmp_path / "c.pth", content | {"model": build_detector(config, stats).state_dict()})
    part = "cls" if ours == "simcal" else "none"
    keys = [f"detector.init_from={tmp_path / 'c.pth'}", f"classifier={{name: {ours}}}", f"train.part={part}"]
    config = bags.load_config(tmp_path / "c.yaml", keys)
    with contextlib.nullcontext() if works else pytest.raises(bags.UserError, match=f"{saved} are of another kind"):
        initialise(build_detector(config, stats), config, index, stats)


def test_torchvisions_own_weights_need_no_annotations(monkeypatch, tmp_path):
    """COCO_V1 without COCO at hand: the 80 categories come with the weights, whose eps was 0."""
    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    torch.manual_seed(0)
    peer = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    asked = []
    fetch = lambda model, name: asked.append((model, name)) or (peer.state_dict(), names)  # noqa: E731
    monkeypatch.setattr(import_weights, "fetch_state", fetch)
    config = bags.load_config(ROOT / "configs/coco/softmax", [f"data.root={tmp_path}"])
    content, lines = import_weights.import_weights("COCO_V1", config, None, None)
    assert asked == [("fasterrcnn_resnet50_fpn", "COCO_V1")]
    ids, known = content["stats"]["category_ids"], content["stats"]["names"]
    assert (len(ids), ids[-1], known[0], known[-1]) == (80, 90, "person", "toothbrush")
    assert "left out: 10 labels without a category (90 in the file)" in lines
    assert any("eps 0, ours 1e-5" in line for line in lines)
    weight = content["model"]["roi_heads.classifier.linear.weight"]
    assert torch.equal(weight, peer.roi_heads.box_predictor.cls_score.weight[[0, *ids]])
    monkeypatch.undo()
    with pytest.raises(bags.UserError, match="COCO_V9: expected a .pth file, or one of .*COCO_V1"):
        import_weights.import_weights("COCO_V9", config, None, None)


@pytest.mark.parametrize(
    "change", [[], ["detector.framework=mask_rcnn"], ["detector.conventions=released", "train.part=head"]]
)
def test_what_would_be_dropped_or_seen_otherwise_is_refused(tmp_path, glyphs, change):
    """HTC's weights in a detector without its semantic branch; frozen parts under other conventions."""
    small = "backbone: small, fpn_channels: 16, rpn: {anchor_sizes: [[16], [32]]}, roi: {class_agnostic: true, fc: 16}"
    index = bags.AnnotationIndex.open(glyphs / "train.json")
    stats = CategoryStats.from_index(index)
    config = bags.load_config(write(tmp_path, "c.yaml", f"detector: {{framework: htc, {small}}}\ndevice: cpu"))
    source = build_detector(config, stats)
    content = {"config": config_to_dict(config), "stats": stats.to_dict(), "model": source.state_dict()}
    save_checkpoint(tmp_path / "htc.pth", content)
    keys = [f"detector.init_from={tmp_path / 'htc.pth'}", *change]
    if not change:
        keys.append("detector.framework=cascade_mask_rcnn")
    ours = bags.load_config(tmp_path / "c.yaml", keys)
    text = "conventions=standard, now it is released" if "train.part=head" in change else "does not fit"
    with pytest.raises(bags.UserError, match=text):
        initialise(build_detector(ours, stats), ours, index, stats)


def test_masks_are_learnt_from_masks(tmp_path, glyphs):
    content = json.loads((glyphs / "train.json").read_text())
    for number in (1, len(content["annotations"])):
        for annotation in content["annotations"][:number]:
            annotation.pop("segmentation", None)
        (tmp_path / f"{number}.json").write_text(json.dumps(content))
        index = bags.AnnotationIndex.open(tmp_path / f"{number}.json")
        index = dataclasses.replace(index, for_masks=True)
        words = what_does_not_train(index)
        assert f"{number} of {len(content['annotations'])} objects are not trained on" in words
        assert f"{number} have no segmentation, which masks need" in words
        assert ("none of" in (why_nothing_trains(index) or "")) == (number > 1)
