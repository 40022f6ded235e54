"""Cascade R-CNN and HTC against slow versions: one box at a time, from the papers' descriptions."""

import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import roi_align

import bags
from bags.assembly.models import build_detector
from bags.data.statistics import CategoryStats
from bags.detectors.htc import SemanticBranch, painted

STATS = CategoryStats((1, 2, 3), ("a", "b", "c"), (500, 50, 5), (300, 40, 5))
OBJECTS = torch.tensor([[4.0, 4, 30, 40], [20, 10, 60, 60], [50, 5, 78, 30]])
LABELS = torch.tensor([1, 3, 2])
SHAPES = [(64, 80)]
DEVIATIONS = [(0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067)]


def cascade(tmp_path, framework, *overrides):
    """A detector that samples every proposal, so that nothing is left to chance."""
    (tmp_path / "c.yaml").write_text("detector: {backbone: small, fpn_channels: 16, min_size: 64, max_size: 80}")
    detector = [f"framework={framework}", "rpn.anchor_sizes=[[16],[32]]", "roi.fc=16", "roi.class_agnostic=true"]
    sampled = ["roi.batch_size=100000", "roi.positive_fraction=0.5"]
    keys = [f"detector.{key}" for key in detector + sampled]
    torch.manual_seed(0)
    return build_detector(bags.load_config(tmp_path / "c.yaml", ["device=cpu", *keys, *overrides]), STATS)


def inputs(seed=0):
    """Pyramid levels at strides 4 and 8, and proposals of which many overlap the objects."""
    generator = torch.Generator().manual_seed(seed)
    features = {str(i): torch.randn(1, 16, 64 // s, 80 // s, generator=generator) for i, s in enumerate((4, 8))}
    near = OBJECTS.repeat(8, 1) + torch.randn(24, 4, generator=generator) * 2
    corners = torch.rand(10, 2, generator=generator) * 40
    far = torch.cat([corners, corners + 4 + torch.rand(10, 2, generator=generator) * 20], 1)
    return features, torch.cat([near, far]).clamp(min=0).clamp(max=64)


def iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def encode(box, goal, deviations):
    w, h = box[2] - box[0], box[3] - box[1]
    gw, gh = goal[2] - goal[0], goal[3] - goal[1]
    shift = ((goal[0] + gw / 2 - box[0] - w / 2) / w, (goal[1] + gh / 2 - box[1] - h / 2) / h)
    return [d / s for d, s in zip((*shift, math.log(gw / w), math.log(gh / h)), deviations, strict=True)]


def decode(box, deltas, deviations):
    dx, dy, dw, dh = (d * s for d, s in zip(deltas, deviations, strict=True))
    w, h = box[2] - box[0], box[3] - box[1]
    x, y = box[0] + w / 2 + dx * w, box[1] + h / 2 + dy * h
    w, h = w * math.exp(dw), h * math.exp(dh)
    moved = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
    return [min(max(v, 0), limit) for v, limit in zip(moved, (80, 64, 80, 64), strict=True)]


def decode_all(boxes, regression, deviations):
    return [decode(box, deltas, deviations) for box, deltas in zip(boxes, regression.tolist(), strict=True)]


def match(boxes, threshold):
    """Label and object of each box; label 0 is the background."""
    found = []
    for box in boxes:
        overlaps = [iou(box, goal) for goal in OBJECTS.tolist()]
        best = max(range(3), key=overlaps.__getitem__)
        found.append((LABELS[best].item() if overlaps[best] >= threshold else 0, best))
    return found


def slow_stages(heads, features, proposals):
    """Yields per stage: boxes, matches, logits, regression, boxes that go on."""
    boxes = proposals.tolist()
    for stage, threshold, deviations in zip(heads.stages, (0.5, 0.6, 0.7), DEVIATIONS, strict=True):
        number = len(boxes)
        boxes = boxes + OBJECTS.tolist()
        seen = stage.box_features(features, [torch.tensor(boxes)], SHAPES)
        regression = stage.box_regressor(seen.fc)
        moved = decode_all(boxes, regression, deviations)
        yield boxes, match(boxes, threshold), stage.classifier(seen), regression, moved[:number]
        boxes = moved[:number]


@pytest.mark.parametrize("framework", ["cascade_rcnn", "cascade_mask_rcnn", "htc"])
def test_losses_equal_a_loop_over_boxes(tmp_path, framework):
    heads = cascade(tmp_path, framework).roi_heads.train()
    with torch.no_grad():
        for stage in heads.stages:  # large enough to move boxes across thresholds
            stage.box_regressor.weight.normal_(std=0.5)
    features, proposals = inputs()
    masks = torch.zeros(3, 64, 80, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, OBJECTS.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    target = {"boxes": OBJECTS, "labels": LABELS, "masks": masks}
    losses = heads(dict(features), [proposals], SHAPES, [target])[1]
    if framework == "htc":
        features = {**features, "semantic": heads.semantic(features)[0]}
    weights, seen = (1, 0.5, 0.25), []
    with torch.no_grad():
        stages = list(slow_stages(heads, features, proposals))
    for number, (boxes, matches, logits, regression, _) in enumerate(stages, start=1):
        labels = [label for label, _ in matches]
        expected = sum(-row.log_softmax(0)[label] for row, label in zip(logits, labels, strict=True)) / len(boxes)
        assert losses[f"loss_classifier_{number}"].item() == pytest.approx(
            weights[number - 1] * expected.item(), rel=1e-4
        )
        total = 0.0
        for box, (label, best), row in zip(boxes, matches, regression.tolist(), strict=True):
            if label:
                goal = encode(box, OBJECTS[best].tolist(), DEVIATIONS[number - 1])
                total += sum(0.5 * d * d if (d := abs(a - b)) < 1 else d - 0.5 for a, b in zip(row, goal, strict=True))
        assert losses[f"loss_box_reg_{number}"].item() == pytest.approx(
            weights[number - 1] * total / len(boxes), rel=1e-3
        )
        seen.append(sum(label > 0 for label in labels))
    assert len(set(seen)) > 1  # matching was done anew


@pytest.mark.parametrize("framework", ["cascade_mask_rcnn", "htc"])
def test_what_masks_are_trained_on(tmp_path, framework):
    """Cascade: the boxes that a stage's box branch sees. HTC: those boxes moved, matched again, objects among them."""
    heads = cascade(tmp_path, framework).roi_heads.train()
    features, proposals = inputs()
    shown = []
    for stage in heads.stages:
        stage.mask_loss = lambda features, samples, targets: shown.append(samples) or features.sum()
    target = {"boxes": OBJECTS, "labels": LABELS, "masks": torch.zeros(3, 64, 80, dtype=torch.uint8)}
    heads(dict(features), [proposals], SHAPES, [target])
    if framework == "htc":
        features = {**features, "semantic": heads.semantic(features)[0]}
    with torch.no_grad():
        stages = list(slow_stages(heads, features, proposals))
    for samples, threshold, (boxes, _, _, _, moved) in zip(shown, (0.5, 0.6, 0.7), stages, strict=True):
        trained = moved + OBJECTS.tolist() if framework == "htc" else boxes
        positive = [(b, m) for b, m in zip(trained, match(trained, threshold), strict=True) if m[0]]
        assert torch.allclose(samples.boxes[0], torch.tensor([b for b, _ in positive]), atol=1e-3)
        assert samples.labels[0].tolist() == [label for _, (label, _) in positive]
        assert samples.matched[0].tolist() == [best for _, (_, best) in positive]


@pytest.mark.parametrize("framework", ["cascade_mask_rcnn", "htc"])
def test_detections_by_hand(tmp_path, framework):
    """Scores from the mean of the logits, boxes from the last stage, masks from the mean of the probabilities."""
    heads = cascade(tmp_path, framework, "test.nms_threshold=1").roi_heads.eval()
    features, proposals = inputs()
    with torch.no_grad():
        for stage in heads.stages:
            stage.classifier.linear.weight.normal_(std=0.5)  # scores apart from each other
    [detection], losses = heads(dict(features), [proposals], SHAPES)
    assert not losses
    if framework == "htc":
        features = {**features, "semantic": heads.semantic(features)[0]}
    boxes, logits = proposals.tolist(), []
    with torch.no_grad():
        for stage, deviations in zip(heads.stages, DEVIATIONS, strict=True):
            seen = stage.box_features(features, [torch.tensor(boxes)], SHAPES)
            logits.append(stage.classifier(seen))
            boxes = [
                decode(b, d, deviations) for b, d in zip(boxes, stage.box_regressor(seen.fc).tolist(), strict=True)
            ]
        scores = (sum(logits) / 3).softmax(1)[:, 1:]
        order = scores.flatten().argsort(descending=True)
        assert torch.allclose(detection["scores"], scores.flatten()[order], atol=1e-6)
        assert torch.equal(detection["labels"], order % 3 + 1)
        assert torch.allclose(detection["boxes"], torch.tensor(boxes)[order // 3], atol=1e-3)
        pooled = heads.stages[0].mask_roi_pool(features, [detection["boxes"]], SHAPES)
        outputs = [stage.mask_head(pooled) for stage in heads.stages]
        if framework == "htc":
            first = outputs[0]
            second = heads.stages[1].mask_head(pooled + F.relu(heads.mask_flow[0][0](first)))
            outputs = [first, second, heads.stages[2].mask_head(pooled + F.relu(heads.mask_flow[1][0](second)))]
        every = [s.mask_predictor(o).sigmoid() for s, o in zip(heads.stages, outputs, strict=True)]
        rows = torch.arange(len(pooled))
        expected = sum(e[rows, detection["labels"]] for e in every) / 3
    assert torch.allclose(detection["masks"][:, 0], expected, atol=1e-5)


def test_a_cascade_judges_the_proposals_of_its_last_stage(tmp_path):
    heads = cascade(tmp_path, "cascade_rcnn").roi_heads.eval()
    features, proposals = inputs()
    heads.report_proposals = True
    [detection], _ = heads(features, [proposals], SHAPES)
    boxes = proposals.tolist()
    for stage, deviations in zip(heads.stages[:2], DEVIATIONS[:2], strict=True):
        seen = stage.box_features(features, [torch.tensor(boxes)], SHAPES)
        boxes = decode_all(boxes, stage.box_regressor(seen.fc), deviations)
    assert torch.allclose(detection["proposals"], torch.tensor(boxes), atol=1e-3) and len(
        detection["proposal_labels"]
    ) == len(boxes)


def test_training_proposals_of_each_stage(tmp_path):
    """With the same draws, what the losses see: three classifiers, each with its own labels."""
    heads = cascade(tmp_path, "htc").roi_heads.train()
    features, proposals = inputs()
    target = {"boxes": OBJECTS, "labels": LABELS, "masks": torch.zeros(3, 64, 80, dtype=torch.uint8)}
    shown = heads.training_proposals(dict(features), [proposals], SHAPES, [target])
    assert [owner for owner, _, _ in shown] == [stage.classifier for stage in heads.stages]
    fused = {**features, "semantic": heads.semantic(features)[0]}
    with torch.no_grad():
        stages = list(slow_stages(heads, fused, proposals))
        for (owner, seen, labels), (_, matches, logits, _, _) in zip(shown, stages, strict=True):
            assert labels.tolist() == [label for label, _ in matches]
            assert torch.allclose(owner(seen), logits, atol=1e-4)


def test_masks_flow_backwards_through_all_heads(tmp_path):
    """The third mask loss trains the convolutions of all three heads, but only its own predictor."""
    heads = cascade(tmp_path, "htc").roi_heads.train()
    [features] = heads._mask_features(torch.randn(2, 16, 14, 14), [2])
    heads.stages[2].mask_logits(features, torch.tensor([1, 3])).sum().backward()
    for number, stage in enumerate(heads.stages):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in stage.mask_head.parameters())
        assert (stage.mask_predictor.conv5_mask.weight.grad is not None) == (number == 2)
    assert all(flow[0].weight.grad is not None for flow in heads.mask_flow)


# --------------------------------------------------------------------------- the semantic branch


def test_semantic_branch_by_hand():
    torch.manual_seed(0)
    branch = SemanticBranch(8, (4, 8, 16), 5, 255)
    assert (branch.level, branch.stride) == (1, 8)
    levels = {str(i): torch.randn(1, 8, 64 // s, 48 // s) for i, s in enumerate((4, 8, 16))}
    fused = sum(
        F.relu(lateral[0](F.interpolate(level, size=(8, 6), mode="bilinear", align_corners=True)))
        for lateral, level in zip(branch.lateral, levels.values(), strict=True)
    )
    for convolution in branch.convs:
        fused = F.relu(convolution[0](fused))
    features, logits = branch(levels)
    assert torch.allclose(features, F.relu(branch.embedding[0](fused)), atol=1e-5)
    assert torch.allclose(logits, branch.logits(fused), atol=1e-5) and logits.shape == (1, 5, 8, 6)


def test_semantic_loss_by_hand():
    """Cells at stride 8 take the label of their first pixel; 255 does not count, nor does padding."""
    branch = SemanticBranch(8, (4, 8), 3, 255)
    labels = torch.full((16, 20), 2, dtype=torch.uint8)
    labels[0, 0], labels[8, 8] = 1, 255
    logits = torch.randn(1, 3, 2, 4)
    expected = [
        -logits[0, :, y, x].log_softmax(0)[c] for y, x, c in ((0, 0, 1), (0, 1, 2), (0, 2, 2), (1, 0, 2), (1, 2, 2))
    ]
    loss = branch.loss(logits, [{"semantic": labels}])
    assert loss.item() == pytest.approx(0.2 * sum(expected).item() / 5, rel=1e-5)
    padded = SemanticBranch(8, (4, 8), 3, 0).loss(logits, [{"semantic": labels}])
    expected += [-logits[0, :, y, 3].log_softmax(0)[0] for y in (0, 1)]
    assert padded.item() == pytest.approx(0.2 * sum(expected).item() / 7, rel=1e-5)
    nothing = branch.loss(logits, [{"semantic": torch.full((16, 20), 255, dtype=torch.uint8)}])
    assert nothing.item() == 0


def test_painted_masks():
    """The smaller object lies on top, in whatever order they come."""
    masks = torch.zeros(3, 4, 5, dtype=torch.uint8)
    masks[0, 1:3, 1:3], masks[1, :3, :4], masks[2, 3, 4] = 1, 1, 1
    expected = [[7, 7, 7, 7, 0], [7, 2, 2, 7, 0], [7, 2, 2, 7, 0], [0, 0, 0, 0, 9]]
    assert painted(masks, torch.tensor([2, 7, 9])).tolist() == expected
    assert painted(masks[[1, 2, 0]], torch.tensor([7, 9, 2])).tolist() == expected
    assert painted(masks[:0], LABELS[:0]).tolist() == [[0] * 5] * 4


def test_semantic_features_are_added_to_boxes_and_masks(tmp_path):
    heads = cascade(tmp_path, "htc").roi_heads
    features, proposals = inputs()
    context = torch.randn(1, 16, 8, 10)
    plain = heads.stages[0].box_roi_pool.pyramid(features, [proposals], SHAPES)
    fused = heads.stages[0].box_roi_pool({**features, "semantic": context}, [proposals], SHAPES)
    extra = roi_align(context, [proposals], 14, 1 / 8, 2)
    assert torch.allclose(fused - plain, F.avg_pool2d(extra, 2), atol=1e-5)
    plain = heads.stages[0].mask_roi_pool.pyramid(features, [proposals], SHAPES)
    fused = heads.stages[0].mask_roi_pool({**features, "semantic": context}, [proposals], SHAPES)
    assert torch.allclose(fused - plain, extra, atol=1e-5)


def test_released_objects_stand_for_themselves(tmp_path):
    """Two objects in one place: each one's own box keeps its label; standard matching gives both boxes to the first."""
    boxes, labels = torch.tensor([[4.0, 4, 30, 40]] * 2), torch.tensor([1, 3])
    targets = [{"boxes": boxes, "labels": labels}]
    for conventions, expected in (("standard", [1, 1, 1]), ("released", [3, 1, 3])):
        heads = cascade(tmp_path, "faster_rcnn", f"detector.conventions={conventions}").roi_heads
        samples = heads.sample([torch.tensor([[5.0, 4, 30, 40]])], targets)
        assert samples.labels[0].tolist() == expected
        assert samples.is_object[0].tolist() == [False, True, True]
        assert torch.equal(samples.goals[0][1:], samples.boxes[0][1:])
    assert samples.matched[0].tolist() == [1, 0, 1]


def test_painted_category_255_is_learnt():
    """255 means "no label" in label maps alone."""
    branch = SemanticBranch(8, (4, 8), 300, 255)
    logits, masks = torch.zeros(1, 300, 1, 1), torch.ones(1, 8, 8, dtype=torch.uint8)
    loss = branch.loss(logits, [{"masks": masks, "labels": torch.tensor([255])}])
    assert loss.item() == pytest.approx(0.2 * math.log(300))
    assert branch.loss(logits, [{"semantic": masks[0] * 255}]).item() == 0
