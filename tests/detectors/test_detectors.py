"""RoI heads and postprocessing against torchvision's own."""

import contextlib
import functools
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.detection import _utils, roi_heads
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, fasterrcnn_mobilenet_v3_large_fpn
from torchvision.models.detection.mask_rcnn import maskrcnn_resnet50_fpn
from torchvision.ops import box_iou, clip_boxes_to_image, nms

import bags
from bags.assembly.loaders import build_train_loader, build_val_dataset
from bags.assembly.models import build_detector, load_detector
from bags.classifiers.base import BoxFeatures
from bags.classifiers.focal import SigmoidFocalSettings
from bags.classifiers.group_softmax import GroupSoftmaxSettings
from bags.classifiers.ncm import NearestClassMeanSettings
from bags.classifiers.reweighted_softmax import ReweightedSoftmaxSettings, class_weights
from bags.classifiers.tau_norm import TauNormSettings
from bags.config.load import override_config
from bags.core.tensor_files import check_finite
from bags.data.statistics import CategoryStats
from bags.detectors import postprocess
from bags.detectors.postprocess import _suppress, select_detections
from bags.detectors.roi_heads import RoIHeads, box_loss
from bags.engine.optim import build_optimizer, epoch_at, learning_rate, set_trained_part, train_mode
from bags.jobs.score import predict_and_evaluate

TORCHVISION = {  # the settings of torchvision's own heads
    "fg_iou_thresh": 0.5,
    "bg_iou_thresh": 0.5,
    "batch_size_per_image": 512,
    "positive_fraction": 0.25,
    "bbox_reg_weights": None,
    "score_thresh": 0.05,
    "nms_thresh": 0.5,
    "detections_per_img": 100,
}
STATS = CategoryStats((1, 2, 3), ("a", "b", "c"), (500, 50, 5), (300, 40, 5))


def random_proposals(count, seed):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * 80
    return torch.cat([corners, corners + 2 + torch.rand(count, 2, generator=generator) * 40], 1)


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("threshold, keep", [(0.0, 300), (0.0, 20), (0.05, 300), (0.9, 300)])
def test_select_detections_equals_torchvision(agnostic, threshold, keep):
    """Distinct scores: the same boxes, scores and labels, bit for bit, as suppressing everything at once."""
    torch.manual_seed(3)
    proposals, logits = random_proposals(60, 0), torch.randn(60, 41) * 2
    deltas = torch.randn(60, 4) if agnostic else torch.randn(60, 4 * 41)
    full = deltas.repeat(1, 41) if agnostic else deltas
    peer = roi_heads.RoIHeads(None, None, None, 0.5, 0.5, 8, 0.5, None, threshold, 0.5, keep)
    boxes, scores, labels = (x[0] for x in peer.postprocess_detections(logits, full, [proposals], [(100, 120)]))
    ours = select_detections(
        logits.softmax(1), deltas, proposals, (100, 120), _utils.BoxCoder((10, 10, 5, 5)), threshold, 0.5, keep
    )
    assert torch.equal(ours[1], scores) and torch.equal(ours[2], labels) and torch.equal(ours[0], boxes)


def stable_nms(boxes, scores, labels, threshold):
    """torchvision's suppression category by category, its final sort made stable."""
    kept = torch.zeros(len(scores), dtype=torch.bool)
    for label in labels.unique():
        own = torch.where(labels == label)[0]
        kept[own[nms(boxes[own], scores[own], threshold)]] = True
    kept = torch.where(kept)[0]
    return kept[scores[kept].argsort(descending=True, stable=True)]


@pytest.mark.parametrize("seed", range(200))
def test_random_cases_with_ties_equal_torchvision(seed, monkeypatch):
    """torchvision's own `postprocess_detections`, its final sort stable: bit for bit."""
    generator = torch.Generator().manual_seed(seed)
    rows, labels, levels = (
        int(torch.randint(low, high, (), generator=generator)) for low, high in ((1, 120), (2, 50), (1, 40))
    )
    agnostic, keep = seed % 2 == 0, (1, 20, 300)[seed % 3]
    threshold = (0.0, 0.01, 0.05)[seed // 3 % 3]
    proposals = random_proposals(rows, seed).round() if seed % 5 else random_proposals(rows, seed)
    logits = torch.randint(-levels, levels + 1, (rows, labels), generator=generator) / 4
    logits[: rows // 2] = logits[:1]  # whole rows alike
    deltas = torch.randn(rows, 4 if agnostic else 4 * labels, generator=generator)
    peer = roi_heads.RoIHeads(None, None, None, 0.5, 0.5, 8, 0.5, None, threshold, 0.5, keep)
    monkeypatch.setattr(roi_heads.box_ops, "batched_nms", stable_nms)
    full = deltas.repeat(1, labels) if agnostic else deltas
    theirs = [found[0] for found in peer.postprocess_detections(logits, full, [proposals], [(100, 120)])]
    coder = _utils.BoxCoder((10, 10, 5, 5))
    ours = select_detections(logits.softmax(1), deltas, proposals, (100, 120), coder, threshold, 0.5, keep)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("threshold", [0.3, 0.5, 1 / 3, 0.6])
def test_categories_with_few_and_many_candidates_are_suppressed_as_each_alone(threshold):
    """Boxes on a coarse grid: overlaps at the threshold itself, empty boxes, equal scores."""
    generator = torch.Generator().manual_seed(0)
    for number, categories in [(0, 1), (1, 1), (30, 30), (200, 3), (200, 8), (300, 12), (400, 100)] * 5:
        corner = torch.randint(0, 6, (number, 2), generator=generator)
        boxes = torch.cat([corner, corner + torch.randint(0, 7, (number, 2), generator=generator)], 1).float()
        scores = torch.randint(0, 50, (number,), generator=generator) / 50
        labels = torch.randint(0, categories, (number,), generator=generator)
        groups = [torch.where(labels == label)[0] for label in range(categories)]
        alone = torch.cat([own[nms(boxes[own], scores[own], threshold)] for own in groups])
        kept = _suppress(boxes, scores, labels, threshold)
        assert kept.tolist() == sorted(alone.tolist(), key=lambda k: (-scores[k], k))


@pytest.mark.parametrize("limit, agnostic_nms", [(0, True), (2, False), (2, True), (1, True)])
@pytest.mark.parametrize("shared", [False, True])
def test_limits_of_a_category_and_suppression_across_them(limit, agnostic_nms, shared, monkeypatch):
    """Equal to a loop over all candidates, however few are looked at together."""
    monkeypatch.setattr(postprocess, "TIER", 16)
    torch.manual_seed(5)
    proposals, scores = random_proposals(40, 3), torch.rand(40, 13)
    deltas = torch.randn(40, 4 if shared else 4 * 13)
    coder = _utils.BoxCoder((10, 10, 5, 5))
    boxes = coder.decode(deltas.repeat(1, 13) if shared else deltas, [proposals])
    boxes = clip_boxes_to_image(boxes.flatten(0, 1), (100, 120)).view(40, 13, 4)
    kept, shown = [], []
    for score, row, label in sorted(((scores[r, c], r, c) for r in range(40) for c in range(1, 13)), reverse=True):
        box = boxes[row, label][None]
        rivals = [b for b, own in kept if agnostic_nms or own == label]
        if rivals and box_iou(box, torch.cat(rivals)).max() > 0.5:
            continue
        kept.append((box, label))
        if not limit or sum(own == label for _, _, own in shown) < limit:
            shown.append((box, score, label))
    for number in (3, 15, 500):
        found = select_detections(
            *(scores, deltas, proposals, (100, 120), coder, 0.0, 0.5, number),
            max_per_category=limit,
            agnostic_nms=agnostic_nms,
        )
        assert found[2].tolist() == [label for _, _, label in shown[:number]]
        assert torch.equal(found[0], torch.cat([box for box, _, _ in shown[:number]]))


def test_exact_at_a_large_vocabulary():
    """1230 categories: equal to a loop of per-category suppression over every candidate."""
    torch.manual_seed(0)
    proposals, scores, deltas = random_proposals(40, 1) * 8, torch.rand(40, 1231), torch.randn(40, 4)
    coder = _utils.BoxCoder((10, 10, 5, 5))
    boxes = clip_boxes_to_image(coder.decode_single(deltas, proposals), (1000, 1000))
    kept = [(scores[i, c].item(), i, c) for c in range(1, 1231) for i in nms(boxes, scores[:, c], 0.5).tolist()]
    best = sorted(kept, reverse=True)[:100]
    found = select_detections(scores, deltas, proposals, (1000, 1000), coder, 0.0, 0.5, 100)
    assert found[1].tolist() == [score for score, _, _ in best]
    assert found[2].tolist() == [label for _, _, label in best]
    assert torch.equal(found[0], boxes[[row for _, row, _ in best]])


def test_no_proposals_give_no_detections():
    empty = select_detections(
        torch.zeros(0, 5), torch.zeros(0, 20), torch.zeros(0, 4), (10, 10), _utils.BoxCoder((10, 10, 5, 5)), 0.0, 0.5, 9
    )
    assert [len(x) for x in empty] == [0, 0, 0]


def test_box_loss_by_hand():
    """|error| 0.5 on one coordinate of one positive: 0.125 / 2 proposals; the background does not count."""
    targets = torch.zeros(2, 4)
    shared = torch.tensor([[0.5, 0, 0, 0], [9.0, 9, 9, 9]])
    assert box_loss(shared, torch.tensor([3, 0]), targets).item() == pytest.approx(0.0625)
    own = torch.full((2, 16), 7.0)
    own[0, 12:] = shared[0]
    assert box_loss(own, torch.tensor([3, 0]), targets).item() == pytest.approx(0.0625)
    assert box_loss(shared[:0], torch.zeros(0, dtype=torch.long), targets[:0]) == 0


def test_softmax_detector_predicts_as_torchvisions():
    """The same weights in torchvision's RoIHeads and in ours, around our Softmax, give equal detections."""
    torch.manual_seed(0)
    peer = fasterrcnn_mobilenet_v3_large_fpn(
        weights=None, weights_backbone=None, min_size=64, max_size=96, num_classes=4
    )
    peer.roi_heads.box_predictor = FastRCNNPredictor(1024, 4)
    theirs, classifier = peer.roi_heads, bags.Softmax(1024, 3)
    classifier.linear.load_state_dict(theirs.box_predictor.cls_score.state_dict())
    ours = RoIHeads(
        theirs.box_roi_pool,
        theirs.box_head,
        classifier,
        theirs.box_predictor.bbox_pred,
        **TORCHVISION,
    )
    peer.eval()
    image = [torch.rand(3, 64, 80)]
    expected = peer(image)[0]
    peer.roi_heads = ours.eval()
    found = peer(image)[0]
    assert len(expected["boxes"]) > 0
    for key in expected:
        assert torch.equal(found[key], expected[key]), key


def tiny_config(folder, *overrides):
    path = folder / "c.yaml"
    path.write_text("detector: {backbone: small, fpn_channels: 16, min_size: 64, max_size: 64}\ndevice: cpu")
    sizes = ["detector.rpn.anchor_sizes=[[16],[32]]", "detector.rpn.train_proposals=20", "detector.roi.fc=16"]
    return bags.load_config(path, [*sizes, "detector.roi.batch_size=8", "data.flip=0", *overrides])


CLASSIFIERS = ["softmax", "group_softmax", "reweighted_softmax", "sigmoid_focal"]


@pytest.mark.parametrize("classifier, backbone", [*((c, "small") for c in CLASSIFIERS), ("group_softmax", "resnet18")])
def test_only_the_classifier_gets_gradients_with_part_cls(tmp_path, classifier, backbone):
    levels = {"small": "[[16],[32]]", "resnet18": "[[8],[16],[32],[64],[128]]"}[backbone]
    config = tiny_config(
        tmp_path,
        f"classifier.name={classifier}",
        f"detector.backbone={backbone}",
        f"detector.rpn.anchor_sizes={levels}",
    )
    detector = build_detector(config, STATS)
    set_trained_part(detector, "cls")
    train_mode(detector)
    before = {k: v.clone() for k, v in detector.state_dict().items()}
    target = {"boxes": torch.tensor([[4.0, 4, 30, 40], [20, 10, 60, 60]]), "labels": torch.tensor([1, 3])}
    losses = detector([torch.rand(3, 64, 64)], [target])
    assert {"loss_box_reg", "loss_objectness", "loss_rpn_box_reg"} < losses.keys()
    sum(losses.values()).backward()
    trained = {name for name, p in detector.named_parameters() if p.grad is not None}
    assert trained == {"roi_heads.classifier.linear.weight", "roi_heads.classifier.linear.bias"}
    assert all(torch.equal(v, before[k]) for k, v in detector.state_dict().items()), "frozen statistics moved"


def test_every_key_of_a_classifier_reaches_it():
    stats = CategoryStats((1, 2, 3), ("a", "b", "c"), (500, 50, 5), (300, 40, 5))
    build = lambda settings: settings.build(6, 8, stats)  # noqa: E731
    grouped = build(
        GroupSoftmaxSettings(boundaries=(10,), others_ratio="n", group_weights=(1.0, 2.0, 3.0), reweight=True)
    )
    assert grouped.groups.sizes == (1, 2) and grouped.others_ratio == "n"
    assert grouped.group_weights.tolist() == [1, 2, 3]
    assert grouped.class_weights.tolist() == pytest.approx([1, 2 / 11, 20 / 11, 1])
    assert not build(GroupSoftmaxSettings(others=False)).others
    assert not build(GroupSoftmaxSettings(background_group=False)).background_group
    tau = build(TauNormSettings(tau=0.5, select="foreground_tail", background=False, tail_below=51))
    assert (tau.tau, tau.select, tau.background) == (0.5, "foreground_tail", False)
    assert tau.is_tail.tolist() == [False, False, True, True]
    focal = build(SigmoidFocalSettings(gamma=1, alpha=0.5))
    assert (focal.gamma, focal.alpha) == (1, 0.5)
    assert [build(NearestClassMeanSettings(features=f)).means.shape[1] for f in ("fc", "conv")] == [6, 8]
    weights = build(ReweightedSoftmaxSettings(weighting="inverse")).class_weights
    assert weights.tolist() == class_weights(stats.instance_counts, "inverse").tolist()


def test_samplers_by_configuration(tmp_path):
    """Shapes are kept apart; the tail sampler sees its images alone; the repeat factors are those of the threshold."""
    sizes = [(40, 30), (30, 40), (50, 30), (30, 30)]
    images = [{"id": i, "file_name": f"{i}.png", "width": w, "height": h} for i, (w, h) in enumerate(sizes)]
    boxes = [(0, 1), (1, 1), (2, 1), (3, 2)]
    annotations = [
        {"id": k, "image_id": i, "category_id": c, "bbox": [0, 0, 9, 9]} for k, (i, c) in enumerate(boxes, 1)
    ]
    categories = [{"id": c, "name": str(c)} for c in (1, 2)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "train.json").write_text(json.dumps(content))
    index = bags.AnnotationIndex.open(tmp_path / "train.json")
    stats = CategoryStats.from_index(index)

    def sampler(*overrides):
        config = tiny_config(tmp_path, f"data.root={tmp_path}", "data.workers=0", "train.batch_size=2", *overrides)
        return build_train_loader(config, index, stats).batch_sampler

    assert sampler().wide.tolist() == [True, False, True, False]
    assert not sampler("data.aspect_batches=false").wide.any()
    assert sampler("sampler.name=tail_only", "sampler.below=3").size == 1
    factors = sampler("sampler.name=repeat_factor", "sampler.threshold=1").factors
    assert factors.tolist() == pytest.approx([(4 / 3) ** 0.5] * 3 + [2])
    released = sampler("sampler.name=repeat_factor", "sampler.threshold=1", "sampler.released=true").factors
    assert released.tolist() == [3, 3, 3, 3]
    with pytest.raises(bags.UserError, match="sampler.below=1"):
        sampler("sampler.name=tail_only", "sampler.below=1")


def test_proposals_are_judged_in_the_pixels_of_the_original_image(tmp_path):
    """A wide image, resized by the detector: all proposals on its only object count as its label."""
    Image.new("RGB", (120, 40)).save(tmp_path / "wide.png")
    content = {
        "images": [{"id": 1, "file_name": "wide.png", "width": 120, "height": 40}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 2, "bbox": [60, 10, 50, 20], "area": 1000}],
        "categories": [{"id": c, "name": str(c)} for c in (1, 2, 3)],
    }
    (tmp_path / "val.json").write_text(json.dumps(content))
    config = tiny_config(tmp_path, f"data.root={tmp_path}", "data.workers=0", "test.batch_size=1")
    detector = build_detector(config, STATS).eval()
    scale = min(64 / 40, 64 / 120)
    near = torch.tensor([[61.0, 11, 109, 29], [10, 0, 30, 40]]) * scale

    def forward(features, proposals, image_shapes, targets):
        none = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.long)}
        return [{**none, "proposals": near, "proposal_labels": torch.tensor([2, 0])}], {}

    detector.roi_heads.forward = forward
    found, _ = predict_and_evaluate(
        detector, config, STATS, build_val_dataset(config), tmp_path / "p.json", torch.device("cpu")
    )
    assert (found["ACC"], found["ACC2"], found["ACCbg"]) == (1, 1, 1)


def test_mask_detector_agrees_with_torchvisions(tmp_path):
    """The same weights in torchvision's Mask R-CNN heads and in ours: equal losses and masks."""
    torch.manual_seed(0)
    peer = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, min_size=64, max_size=96, num_classes=4)
    theirs, classifier = peer.roi_heads, bags.Softmax(1024, 3)
    classifier.linear.load_state_dict(theirs.box_predictor.cls_score.state_dict())
    ours = RoIHeads(
        theirs.box_roi_pool,
        theirs.box_head,
        classifier,
        theirs.box_predictor.bbox_pred,
        **TORCHVISION,
        mask_roi_pool=theirs.mask_roi_pool,
        mask_head=theirs.mask_head,
        mask_predictor=theirs.mask_predictor,
    )
    masks = torch.zeros(2, 64, 80, dtype=torch.uint8)
    masks[0, 4:40, 4:30], masks[1, 10:60, 20:60] = 1, 1
    boxes = torch.tensor([[4.0, 4, 30, 40], [20, 10, 60, 60]])
    image, target = [torch.rand(3, 64, 80)], [{"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": masks}]
    results = []
    for mode in (True, False):  # both in training first, which moves the statistics of batch normalisation
        for heads in (theirs, ours):
            peer.roi_heads = heads
            torch.manual_seed(3)
            results.append(peer.train(mode)(image, target))
    expected, losses, [detected], [own] = results
    assert losses["loss_mask"].item() == pytest.approx(expected["loss_mask"].item(), rel=1e-5)
    assert losses["loss_classifier"].item() == pytest.approx(expected["loss_classifier"].item(), rel=1e-5)
    for key in ("boxes", "scores", "labels", "masks"):
        assert torch.allclose(own[key], detected[key], atol=1e-5), key


@pytest.mark.parametrize("framework", ["mask_rcnn", "cascade_mask_rcnn", "htc"])
def test_one_mask_for_all_categories_equals_equal_masks_of_each(tmp_path, framework):
    """As a predictor for each label whose rows are all that one: equal losses, equal masks."""
    data = [f"detector.framework={framework}", "detector.roi.class_agnostic=true", "test.score_threshold=0"]
    torch.manual_seed(0)
    shared = build_detector(tiny_config(tmp_path, *data, "detector.roi.class_agnostic_masks=true"), STATS)
    for_each = build_detector(tiny_config(tmp_path, *data), STATS)
    state = shared.state_dict()
    for key in [key for key in state if "mask_fcn_logits" in key]:
        state[key] = state[key].repeat(STATS.num_categories + 1, *[1] * (state[key].dim() - 1))
    for_each.load_state_dict(state)
    linear = [stage.mask_predictor.mask_fcn_logits for stage in shared.roi_heads.box_stages]
    assert {layer.out_channels for layer in linear} == {1} and not set(linear) & set(shared.category_layers())
    masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
    masks[0, 4:40, 4:30], masks[1, 10:60, 20:60] = 1, 1
    boxes = torch.tensor([[4.0, 4, 30, 40], [20, 10, 60, 60]])
    image, target = [torch.rand(3, 64, 64)], [{"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": masks}]
    results = []
    for mode in (True, False):
        for detector in (shared, for_each):
            torch.manual_seed(3)
            with torch.no_grad():
                results.append(detector.train(mode)(image, target))
    losses, expected, [found], [wanted] = results
    assert losses.keys() == expected.keys() and any("mask" in key for key in losses)
    for key, value in expected.items():
        assert losses[key].item() == pytest.approx(value.item(), rel=1e-5), key
    assert len(found["masks"]) > 3
    for key in ("boxes", "labels", "masks"):
        assert torch.allclose(found[key], wanted[key], atol=1e-5), key


def test_part_head_trains_the_box_branch(tmp_path):
    detector = build_detector(tiny_config(tmp_path), STATS)
    set_trained_part(detector, "head")
    trained = {name.split(".")[1] for name, p in detector.named_parameters() if p.requires_grad}
    assert trained == {"box_head", "classifier", "box_regressor"}
    assert all(name.startswith("roi_heads.") for name, p in detector.named_parameters() if p.requires_grad)
    held = {
        id(p) for group in build_optimizer(detector, tiny_config(tmp_path).train).param_groups for p in group["params"]
    }
    assert held == {id(p) for p in detector.parameters() if p.requires_grad}
    set_trained_part(detector, "none")
    assert not any(p.requires_grad for p in detector.parameters())


def test_training_proposals_are_what_the_loss_sees(tmp_path):
    detector = build_detector(tiny_config(tmp_path), STATS)
    train_mode(detector)
    seen = {}
    classifier = detector.roi_heads.classifier
    classifier.register_forward_hook(lambda module, inputs, output: seen.update(features=inputs[0]))
    plain_loss = classifier.loss
    classifier.loss = lambda logits, labels: seen.update(labels=labels) or plain_loss(logits, labels)
    batch = [torch.rand(3, 64, 64)], [{"boxes": torch.tensor([[4.0, 4, 30, 40]]), "labels": torch.tensor([2])}]
    set_trained_part(detector, "cls")
    train_mode(detector)
    torch.manual_seed(5)
    detector(*batch)
    torch.manual_seed(5)
    [(owner, features, labels)] = detector.training_proposals(*batch)
    assert owner is classifier and torch.equal(labels, seen["labels"]) and 2 in labels
    assert torch.equal(features.fc, seen["features"].fc) and torch.equal(features.pooled, seen["features"].pooled)


def test_reported_proposals(tmp_path):
    detector = build_detector(tiny_config(tmp_path), STATS).eval()
    assert detector([torch.rand(3, 40, 60)])[0].keys() == {"boxes", "scores", "labels"}
    detector.roi_heads.report_proposals = True
    found = detector([torch.rand(3, 40, 60)])[0]
    assert len(found["proposals"]) == len(found["proposal_labels"]) > 0
    assert found["proposals"].min() >= 0 and 50 < found["proposals"][:, 2].max() <= 60
    assert found["proposals"][:, 3].max() <= 40


def test_images_without_objects_train(tmp_path):
    detector = build_detector(tiny_config(tmp_path, "classifier.name=group_softmax"), STATS).train()
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    losses = detector([torch.rand(3, 64, 64)], [empty])
    total = sum(losses.values())
    total.backward()
    assert total.isfinite() and losses["loss_box_reg"] == 0


def test_anchor_levels_must_fit_the_backbone(tmp_path):
    with pytest.raises(bags.UserError, match="anchor_sizes: expected 5 lists"):
        build_detector(tiny_config(tmp_path, "detector.backbone=resnet18"), STATS)


def test_learning_rate_by_hand(tmp_path):
    config = tiny_config(
        tmp_path, "train.lr=1", "train.warmup_iterations=4", "train.warmup_factor=0.5", "train.milestones=[2, 3]"
    ).train
    starts = [0, 10, 20, 32, 40]  # epochs may differ in length
    rates = [learning_rate(config, i, epoch_at(starts, i)) for i in (0, 2, 4, 19, 20, 31, 32)]
    assert rates == pytest.approx([0.5, 0.75, 1, 1, 0.1, 0.1, 0.01])
    assert [epoch_at(starts, i) for i in (0, 5, 10, 26, 40)] == [0, 0.5, 1, 2.5, 4]


def test_classifiers_see_both_features(tmp_path):
    detector = build_detector(tiny_config(tmp_path), STATS)
    seen = []
    detector.roi_heads.classifier.forward = lambda f: seen.append(f) or torch.zeros(len(f.fc), 4)
    detector.eval()([torch.rand(3, 64, 64)])
    assert isinstance(seen[0], BoxFeatures)
    assert seen[0].pooled.shape[1:] == (16, 7, 7) and seen[0].fc.shape[1:] == (16,)


def test_load_detector_refuses_foreign_files(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("code ran",)

    for name, content in {"evil.pth": Evil(), "plain.pth": {"model": {}}, "list.pth": [1]}.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(bags.UserError, match=name):
            load_detector(tmp_path / name)
    (tmp_path / "text.pth").write_text("hello")
    np.save(tmp_path / "array.npy", np.zeros(3))
    for name in ("text.pth", "array.npy", "absent.pth"):
        with pytest.raises(bags.UserError, match=name):
            load_detector(tmp_path / name)


def test_a_prediction_that_was_killed_goes_on(job, tmp_path, monkeypatch):
    """Stopped twice, inside a line: the same file and accuracies; nothing is predicted twice; a new key starts anew."""
    _, runs, _ = job
    detector, meta = load_detector(runs / "tiny/bags/last.pth", overrides=["test.batch_size=2"])
    config, stats = meta["config"], meta["stats"]
    dataset, device = build_val_dataset(config), torch.device("cpu")
    expected, _ = predict_and_evaluate(detector, config, stats, dataset, tmp_path / "whole.json", device)
    forward, seen = detector.forward, []

    def dies_after(calls):
        def limited(images):
            if len(seen) == calls:
                raise KeyboardInterrupt
            seen.append(len(images))
            return forward(images)

        monkeypatch.setattr(detector, "forward", limited)

    share = tmp_path / "p.json.rank0"
    for calls in (1, 3):
        dies_after(calls)
        with pytest.raises(KeyboardInterrupt):
            predict_and_evaluate(detector, config, stats, dataset, tmp_path / "p.json", device)
        assert not (tmp_path / "p.json").exists() and share.exists()
        with share.open("a") as file:  # one image of the batch that was being written
            whole = share.read_text().splitlines()[-1]
            file.write(whole + "\n" + (whole if calls == 1 else '[[[0, 3, 1]], [{"image_'))
    dies_after(None)
    found, _ = predict_and_evaluate(detector, config, stats, dataset, tmp_path / "p.json", device)
    assert (tmp_path / "p.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert {k: v for k, v in found.items() if v == v} == {k: v for k, v in expected.items() if v == v}
    assert sum(seen) == len(dataset) and not share.exists()


def test_a_prediction_of_something_else_starts_anew(job, tmp_path, monkeypatch, glyphs):
    """Other weights, settings of the classifier (which need not be weights) or images; not the same ones."""
    _, runs, _ = job
    root = shutil.copytree(glyphs, tmp_path / "data")
    overrides = ["test.batch_size=2", f"data.root={root}"]
    detector, meta = load_detector(runs / "tiny/bags/last.pth", overrides=overrides)
    config, stats, device = meta["config"], meta["stats"], torch.device("cpu")
    forward, seen = detector.forward, []

    def limited(images, most):
        if len(seen) == most:
            raise KeyboardInterrupt
        seen.append(len(images))
        return forward(images)

    def predicted(config, most=None):
        """Images that are predicted until the batch `most`."""
        seen.clear()
        monkeypatch.setattr(detector, "forward", functools.partial(limited, most=most))
        with contextlib.suppress(KeyboardInterrupt):
            predict_and_evaluate(detector, config, stats, build_val_dataset(config), tmp_path / "p.json", device)
        return sum(seen)

    def change(what):
        if what == "weights":
            with torch.no_grad():
                detector.roi_heads.classifier.linear.bias.add_(1)
        if what == "images":
            image = next((root / "val").iterdir())
            image.write_bytes(image.read_bytes() + b"0")
        return override_config(config, ["classifier.others_ratio=3"]) if what == "settings" else config

    for what in ("nothing", "weights", "settings", "images"):
        assert predicted(config, 2) == 4
        number = len(build_val_dataset(config))
        assert predicted(change(what)) == number - 4 * (what == "nothing"), what


def test_released_images_are_augmented_by_the_detector(tmp_path, glyphs):
    """Mirroring and sizes are the transform's, after and in its own resizing; the dataset leaves images alone."""
    keys = [
        "data.flip=1",
        "data.short_sides=[32, 34]",
        "data.any_short_side=true",
        "data.long_side=99",
        "data.workers=0",
    ]
    released = tiny_config(tmp_path, *keys, f"data.root={glyphs}", "detector.conventions=released")
    index = bags.AnnotationIndex.open(glyphs / "train.json")
    stats = CategoryStats.from_index(index)
    transform = build_detector(released, stats).transform
    assert (transform.flip, transform.training_sides, transform.training_long_side) == (1.0, (32, 33, 34), 99)
    plain = build_train_loader(tiny_config(tmp_path, "data.workers=0", f"data.root={glyphs}"), index, stats).dataset[0]
    own = build_train_loader(released, index, stats).dataset[0]
    assert torch.equal(own[0], plain[0]) and torch.equal(own[1]["boxes"], plain[1]["boxes"])
    batch, targets = transform([own[0]], [own[1]])
    assert batch.image_sizes[0][0] in (32, 33, 34)
    width = batch.image_sizes[0][1]
    scale = width / own[0].shape[2]
    assert torch.allclose(targets[0]["boxes"][:, 0], width - own[1]["boxes"][:, 2] * scale, atol=1.5)
    standard = build_detector(tiny_config(tmp_path, *keys, f"data.root={glyphs}"), stats).transform
    assert not standard.resize_in_training and not hasattr(standard, "flip")


@pytest.mark.parametrize("kind", ["ties", "all equal", "tiny", "few"])
def test_selection_with_scores_that_cannot_be_told_apart(kind):
    """Equal to suppressing every candidate at once, ties in the order of proposal and category."""
    torch.manual_seed(4)
    proposals, deltas = random_proposals(50, 2), torch.randn(50, 4 * 31) * 0.3
    scores = {
        "ties": torch.randint(1, 9, (50, 31)) / 8,
        "all equal": torch.full((50, 31), 0.5),
        "tiny": torch.rand(50, 31) * 1e-35,
        "few": torch.zeros(50, 31).index_put_((torch.arange(5), torch.arange(5) + 1), torch.rand(5)),
    }[kind]
    coder = _utils.BoxCoder((10, 10, 5, 5))
    boxes = clip_boxes_to_image(coder.decode(deltas, [proposals]).flatten(0, 1), (100, 120)).view(50, 31, 4)
    kept = []
    for label in range(1, 31):
        rows = torch.where(scores[:, label] > 0)[0]
        survivors = rows[nms(boxes[rows, label], scores[rows, label], 0.5)]
        kept += [(-scores[row, label].item(), row, label) for row in survivors.tolist()]
    for limit in (1, 7, 10_000):
        found = select_detections(scores, deltas, proposals, (100, 120), coder, 0.0, 0.5, limit)
        best = sorted(kept)[:limit]
        assert found[1].tolist() == [-score for score, _, _ in best]
        assert found[2].tolist() == [label for _, _, label in best]
        assert torch.equal(found[0], torch.stack([boxes[row, label] for _, row, label in best]))


@pytest.mark.parametrize("part, value", [("backbone", 1e38), ("roi_heads.box_regressor", 3e38)])
def test_weights_that_overflow_are_no_silent_empty_result(tmp_path, part, value):
    detector = build_detector(tiny_config(tmp_path), STATS).eval()
    with torch.no_grad():
        for name, weight in detector.named_parameters():
            if name.startswith(part) and weight.ndim > 1:
                weight.fill_(value)
        with pytest.raises(bags.UserError, match="not finite"):
            detector([torch.ones(3, 64, 64)])


def test_weights_that_are_infinite_in_float32_are_refused():
    with pytest.raises(bags.UserError, match="w holds numbers that are not finite"):
        check_finite({"w": torch.full((2,), 1e300, dtype=torch.float64)}, "x.pth")
