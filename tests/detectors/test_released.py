"""The released code's conventions against its own numbers, and against slow second versions.

`box_ops.json` holds part of those numbers; the full set is used where it is at hand. They are in the
released code's coordinates and become continuous by adding 1 to the last two. Tolerance: 1e-4 pixels.
Exceptions: decoded boxes that lie beyond 1000 pixels, where float32 itself is coarser (relative 2e-7).
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import REFERENCE, needs_reference
from torch import nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import box_iou, nms

from bags.detectors import released
from bags.detectors.masks import paste
from bags.detectors.released_pixels import crops

INCLUSIVE = torch.tensor([0.0, 0, 1, 1], dtype=torch.float64)
PIXELS = {"rtol": 2e-7, "atol": 1e-4}
STRIDES, SIZES = (4, 8, 16, 32, 64), ((32,), (64,), (128,), (256,), (512,))
RATIOS = ((0.5, 1.0, 2.0),)


@pytest.fixture(scope="module", params=["compact", pytest.param("all", marks=needs_reference)])
def theirs(request):
    """name -> array of the released code's numbers; floats in double precision."""
    if request.param == "all":
        data = dict(np.load(REFERENCE / "box_ops.npz"))
        data |= {name.replace("out", "least"): data[name][-1, 4] for name in data if name.startswith("nms_out")}
    else:
        data = json.loads(Path(__file__).with_name("box_ops.json").read_text())
    arrays = {name: torch.as_tensor(np.asarray(value)) for name, value in data.items()}
    return {name: value.double() if value.is_floating_point() else value for name, value in arrays.items()}


def continuous(boxes):
    return boxes.double() + INCLUSIVE


def close(ours, expected, **tolerance):
    assert ours.shape == expected.shape
    assert torch.allclose(ours.double(), expected.double(), **(tolerance or PIXELS))


# --------------------------------------------------------------------------- the authors' numbers


def test_overlaps_and_flip_need_nothing(theirs):
    """The mapping makes them torchvision's."""
    rows, columns = theirs["iou"].shape
    rois, gt = continuous(theirs["rois"]), continuous(theirs["gt"])
    close(box_iou(rois[:rows], gt[:columns]), theirs["iou"], atol=1e-6)
    close(torch.stack([800 - rois[:, 2], rois[:, 1], 800 - rois[:, 0], rois[:, 3]], 1), continuous(theirs["flip_w800"]))


@pytest.mark.parametrize("stage", range(4))
def test_encoding(theirs, stage):
    """In pixels: a delta times its std and the region's side."""
    coder, rois = released.ReleasedBoxCoder(tuple(1 / theirs[f"std{stage}"])), continuous(theirs["rois"])
    (deltas,) = coder.encode([continuous(theirs["gt"])], [rois])
    pixels = theirs[f"std{stage}"] * (rois[:, 2:] - rois[:, :2]).repeat(1, 2)
    close(deltas * pixels, theirs[f"delta_std{stage}"] * pixels)


def test_decoding_and_clipping(theirs):
    coder = released.ReleasedBoxCoder((10.0, 10.0, 5.0, 5.0))
    rois = continuous(theirs["rois"])
    boxes = coder.decode(theirs["decode_delta"], [rois])
    assert boxes.shape == (len(rois), 1, 4)
    close(boxes[:, 0], continuous(theirs["decode_std1_noclip"]))
    clipped = released.clip_boxes(boxes, (600, 800))
    close(clipped[:, 0], continuous(theirs["decode_std1_clip_600x800"]))
    close(coder.decode_single(theirs["decode_delta"].repeat(1, 3), rois), boxes[:, 0].repeat(1, 3))


def test_anchors(theirs):
    anchors = released.ReleasedAnchors(SIZES, RATIOS * 5, STRIDES)
    for stride, cell in zip(STRIDES, anchors.cell_anchors, strict=True):
        assert torch.equal(cell.double(), continuous(theirs[f"base_anchors_stride{stride}"]))
    anchors = released.ReleasedAnchors(((128,),), RATIOS, (16,))
    images = ImageList(torch.zeros(2, 3, 48, 32), [(48, 32), (40, 30)])
    grids = anchors(images, [torch.zeros(2, 1, 3, 2, dtype=torch.float16)])
    assert len(grids) == 2 and grids[0].dtype == torch.float32
    assert torch.equal(grids[0].double(), continuous(theirs["grid_anchors_stride16_3x2"]))


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7])
def test_region_assignment(theirs, threshold):
    overlaps = box_iou(continuous(theirs["assign_gt"]), continuous(theirs["assign_props"]))
    matches = released.ReleasedMatcher(threshold, threshold)(overlaps)
    assert torch.equal(matches, theirs[f"assign_gt_inds_{threshold}"] - 1)
    labels = torch.where(matches >= 0, theirs["assign_gt_labels"][matches.clamp(min=0)], 0)
    assert torch.equal(labels, theirs[f"assign_labels_{threshold}"])


def test_anchor_assignment(theirs):
    overlaps = box_iou(continuous(theirs["assign_gt"]), continuous(theirs["assign_props"]))
    matches = released.ReleasedMatcher(0.7, 0.3, allow_low_quality_matches=True)(overlaps)
    expected = theirs["assign_rpn_gt_inds"]
    assert torch.equal(matches, torch.where(expected < 0, -2, expected - 1))


@pytest.mark.parametrize("name", ["0.0_300", "0.001_300", "0.05_100"])
def test_suppression_needs_nothing(theirs, name):
    """torchvision's on continuous boxes, per category. Some boxes are inside out, and stay in."""
    scores, boxes = theirs["nms_scores"], continuous(theirs["nms_boxes"].unflatten(1, (-1, 4)))
    found = []
    for label in range(1, scores.shape[1]):
        rows = torch.where(scores[:, label] > float(name.split("_")[0]))[0]
        rows = rows[nms(boxes[rows, label], scores[rows, label], 0.5)]
        rows = rows[scores[rows, label] >= theirs[f"nms_least_{name}"] - 1e-9]
        found.append(torch.cat([boxes[rows, label], scores[rows, label, None], 0 * rows[:, None] + label - 1], 1))
    found = torch.cat(found)
    found = found[found[:, 4].argsort(descending=True, stable=True)]
    expected = theirs[f"nms_out_{name}"]
    assert torch.equal(found[:, 5].long(), theirs[f"nms_lab_{name}"])
    close(found[:, :4], continuous(expected[:, :4]))
    close(found[:, 4], expected[:, 4], atol=1e-7)


def test_levels(theirs):
    """Each level holds its own number, so the pooled value tells the level; twice the strides, twice the sides."""
    boxes = continuous(theirs["lvl_rois"][:, 1:])
    for factor in (1, 2):
        maps = {str(i): torch.full((1, 1, 256 >> i, 256 >> i), float(i), dtype=torch.float64) for i in range(4)}
        align = released.ReleasedRoIAlign(["0", "1", "2", "3"], 1, 2, [s * factor for s in (4, 8, 16, 32)])
        pooled = align(maps, [boxes * factor], [(1024 * factor,) * 2])
        assert torch.equal(pooled.flatten(), theirs["lvl"].double())
    just_below = torch.tensor([[0, 0, 112, 112]], dtype=torch.float64) * (1 - 1e-7)
    assert align(maps, [just_below * factor], [(1024 * factor,) * 2]).item() == 1


def test_roi_align(theirs):
    """The fourth region is smaller than a cell."""
    features, expected = theirs["ra_feat"][None], theirs["ra_out_kernel_emulated"]
    boxes = [continuous(theirs["ra_rois"][:, 1:])]
    align = released.ReleasedRoIAlign(["a"], 7, 2, (4,))
    close(align({"b": features[..., :3], "a": features}, boxes, [(80, 96)]), expected, atol=2e-6)
    close(align({"a": features.float()}, [boxes[0].float()], [(77, 91)]), expected, atol=2e-5)


def test_map_back(theirs):
    """800 * 500 pixels came from 500 * 313 at a scale of 1.6."""
    transform = transform_of(500, 800).eval()
    rois = continuous(theirs["rois"])
    (result,) = transform.postprocess([{"boxes": rois}], [(501, 800)], [(313, 500)])
    assert transform._scale((313, 500), 500) == pytest.approx(500 / 313)
    transform.min_size = (10**6,)  # the longer side decides: 800 / 500
    (result,) = transform.postprocess([{"boxes": rois}], [(501, 800)], [(313, 500)])
    close(result["boxes"], continuous(theirs["map_back_s1.6"]))


# --------------------------------------------------------------------------- boxes and matching


def test_anchors_of_other_levels_by_hand():
    """Strides 4, 8 and sizes 16, 32: around 2 and 4, (row, column, ratio)."""
    anchors = released.ReleasedAnchors(((16,), (32,)), RATIOS * 2, (4, 8))
    maps = [torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 1, 1)]
    (boxes,) = anchors(ImageList(torch.zeros(1, 3, 8, 12), [(8, 12)]), maps)
    assert boxes.shape == (21, 4)
    assert boxes[1].tolist() == [-6, -6, 10, 10] and boxes[19].tolist() == [-12, -12, 20, 20]
    # width 22.627: 1.5 -+ 10.814 -> -9, 12; height 11.314: 1.5 -+ 5.157 -> -4, 7
    assert boxes[0].tolist() == [-9, -4, 13, 8]
    assert boxes[3].tolist() == [-5, -4, 17, 8] and boxes[9].tolist() == [-9, 0, 13, 12]


def test_log_sizes_are_held_on_both_sides():
    coder = released.ReleasedBoxCoder((10.0, 10.0, 5.0, 5.0))
    boxes = coder.decode_single(torch.tensor([[0, 0, -100, 100.0]]), torch.tensor([[0, 0, 1000, 16.0]]))
    assert torch.allclose(boxes, torch.tensor([[500 - 8, 8 - 500.0, 500 + 8, 8 + 500]]), atol=1e-3)
    half = coder.decode_single(torch.zeros(1, 4, dtype=torch.float16), torch.tensor([[1000.25, 0, 1003.5, 7]]))
    assert half.tolist() == [[1000.25, 0, 1003.5, 7]]
    assert coder.decode(torch.zeros(0, 8), [torch.zeros(0, 4)]).shape[0] == 0


def test_clipped_boxes_keep_a_pixel_at_the_border():
    boxes = torch.tensor([[[-9, -9, -3, -2], [50, 60, 70, 80], [1, 2, 3, 4.0]]])
    clipped = released.clip_boxes(boxes, (20, 30))
    assert clipped.tolist() == [[[0, 0, 1, 1], [29, 19, 30, 20], [1, 2, 3, 4]]]
    assert released.clip_boxes(boxes[:, :0], (20, 30)).shape == (1, 0, 4)


def slow_matches(overlaps, high, low):
    """Plain loops over boxes and objects."""
    objects, number = overlaps.shape
    matches = [-2] * number
    for box in range(number):
        best = max(range(objects), key=lambda i: (overlaps[i, box], -i))
        if overlaps[best, box] < low:
            matches[box] = -1
        elif overlaps[best, box] >= high:
            matches[box] = best
    for i in range(objects):
        most = max(overlaps[i])
        for box in range(number):
            if most >= low and overlaps[i, box] == most:
                matches[box] = i
    return matches


@pytest.mark.parametrize("high, low", [(0.5, 0.5), (0.7, 0.3)])
def test_matching_equals_plain_loops(high, low):
    """Overlaps in tenths, so that ties and exact thresholds are frequent."""
    matcher, generator = released.ReleasedMatcher(high, low, high > low), np.random.default_rng(0)
    for trial in range(60):
        overlaps = generator.integers(0, 11 if trial % 2 else 5, (1 + trial % 5, 1 + trial % 13)) / 10
        assert matcher(torch.tensor(overlaps)).tolist() == slow_matches(overlaps, high, low)
    assert matcher(torch.zeros(0, 3)).tolist() == [-1, -1, -1] and matcher(torch.zeros(2, 0)).tolist() == []


# --------------------------------------------------------------------------- RPN


def tiny_rpn(**settings):
    torch.manual_seed(0)
    anchors = released.ReleasedAnchors(((16,), (32,)), RATIOS * 2, (4, 8))
    counts = {"training": 60, "testing": 40}
    common = {"fg_iou_thresh": 0.7, "bg_iou_thresh": 0.3, "batch_size_per_image": 32, "positive_fraction": 0.5}
    common |= {"pre_nms_top_n": counts, "post_nms_top_n": counts, "nms_thresh": 0.7}
    return released.ReleasedRPN(anchors, RPNHead(8, 3), **common | settings)


def rpn_inputs(sizes):
    maps = {"0": torch.randn(len(sizes), 8, 16, 16), "1": torch.randn(len(sizes), 8, 8, 8)}
    return ImageList(torch.zeros(len(sizes), 3, 64, 64), sizes), maps


def test_anchors_across_the_border_take_no_part():
    """The labels that a training step uses, against plain loops over the anchors inside the unpadded image."""
    rpn, sizes = tiny_rpn(), [(50, 61), (64, 64), (40, 44)]
    images, maps = rpn_inputs(sizes)
    first = torch.tensor([[2, 2, 18, 18], [-4, 30, 14, 47], [30, 30, 61, 50.0]])
    targets = [{"boxes": boxes} for boxes in (first, torch.zeros(0, 4), torch.tensor([[20, 10, 30, 40.0]]))]
    seen = {}
    rpn.compute_loss = lambda o, d, labels, deltas: seen.update(labels=labels, deltas=deltas) or (o.sum(), d.sum())
    rpn(images, maps, targets)
    assert all("image_size" not in target for target in targets)
    anchors = rpn.anchor_generator(images, list(maps.values()))
    for i, (height, width) in enumerate(sizes):
        x1, y1, x2, y2 = (anchors[i] - INCLUSIVE).numpy().T  # the released code's corners
        inside = (x1 >= 0) & (y1 >= 0) & (x2 < width) & (y2 < height)
        assert 0 < inside.sum() < len(inside)
        expected, boxes = np.full(len(inside), -1), targets[i]["boxes"]
        if len(boxes):
            matches = np.array(slow_matches(box_iou(boxes, anchors[i][inside]).numpy(), 0.7, 0.3))
            expected[inside] = np.where(matches >= 0, 1, np.where(matches == -1, 0, -1))
            assert (expected == 1).any()
            positive = torch.tensor(np.where(inside)[0][matches >= 0])
            wanted = rpn.box_coder.encode([boxes[matches[matches >= 0]]], [anchors[i][positive]])[0]
            assert torch.equal(seen["deltas"][i][positive], wanted)
        else:
            expected[inside] = 0
        assert seen["labels"][i].tolist() == expected.tolist()


def test_anchor_that_just_fits():
    """Stride 4, size 16, second row and column: 6 - 8 = -2 to 14 is out, 10 - 8 = 2 to 18 fits 18 pixels."""
    rpn = tiny_rpn()
    anchors = [torch.tensor([[-2, 2, 14, 18], [2, 2, 18, 18], [2, 2, 19, 18], [0, 0, 16, 16.0]])]
    labels, _ = rpn.assign_targets_to_anchors(anchors, [{"boxes": torch.zeros(0, 4), "image_size": (18, 18)}])
    assert labels[0].tolist() == [-1, 0, -1, 0]


@pytest.mark.parametrize("sizes", [[(64, 60), (50, 64)], [(8, 8), (64, 64)], [(8, 8), (5, 64)]])
@pytest.mark.parametrize("objects", [0, 2])
def test_training_step_of_the_rpn(sizes, objects):
    """Losses and gradients are finite, also where no anchor lies inside an image, or inside any."""
    rpn = tiny_rpn()
    images, maps = rpn_inputs(sizes)
    targets = [{"boxes": torch.tensor([[2, 2, 7, 7], [1, 0, 8, 4.0]])[:objects]} for _ in sizes]
    proposals, losses = rpn(images, maps, targets)
    sum(losses.values()).backward()
    assert losses.keys() == {"loss_objectness", "loss_rpn_box_reg"}
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in rpn.parameters())
    nothing_inside = all(min(size) <= 8 for size in sizes)
    assert (losses["loss_objectness"] == 0) == nothing_inside
    for boxes, (height, width) in zip(proposals, sizes, strict=True):
        assert 0 < len(boxes) <= 60 and (boxes >= 0).all()
        assert (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()


def test_rpn_under_autocast():
    """Half-precision deltas; proposals keep float32."""
    rpn = tiny_rpn()
    images, maps = rpn_inputs([(64, 60)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        proposals, losses = rpn(images, maps, [{"boxes": torch.tensor([[2, 2, 18, 18.0]])}])
    assert proposals[0].dtype == torch.float32 and all(loss.isfinite() for loss in losses.values())


def test_proposals_equal_plain_steps():
    """Per level: the best, clipped, suppressed; then the best of all levels. Image 2 is small: many 1-pixel boxes."""
    rpn = tiny_rpn().eval()
    nn.init.normal_(rpn.head.bbox_pred.weight, std=0.3)
    images, maps = rpn_inputs([(64, 64), (10, 12)])
    proposals, losses = rpn(images, maps)
    assert losses == {}
    logits, deltas = rpn.head(list(maps.values()))
    anchors = rpn.anchor_generator(images, list(maps.values()))[0].split([16 * 16 * 3, 8 * 8 * 3])
    for i, size in enumerate(images.image_sizes):
        rows = []
        for level in range(2):
            score = logits[level][i].permute(1, 2, 0).flatten().sigmoid()
            delta = deltas[level][i].permute(1, 2, 0).reshape(-1, 4)
            boxes = released.clip_boxes(rpn.box_coder.decode_single(delta, anchors[level]), size)
            best = score.argsort(descending=True)[:40]
            kept = best[nms(boxes[best], score[best], 0.7)]
            rows.append(torch.cat([boxes[kept], score[kept, None]], 1))
        rows = torch.cat(rows)
        assert torch.allclose(proposals[i], rows[rows[:, 4].argsort(descending=True)][:40, :4])


# --------------------------------------------------------------------------- RoIAlign


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_roi_align_keeps_dtype_gradients_and_order(dtype):
    torch.manual_seed(0)
    maps = {str(i): torch.randn(2, 3, 64 >> i, 64 >> i, dtype=dtype, requires_grad=True) for i in range(3)}
    align = released.ReleasedRoIAlign(list(maps), 7, 2, (4, 8, 16))
    boxes = [torch.tensor([[0, 0, 200, 200], [5, 5, 9, 9.0]]), torch.tensor([[10, 20, 150, 140.0]])]
    sizes = [(256, 100), (90, 250)]
    pooled = align(maps, boxes, sizes)
    assert pooled.dtype == dtype and pooled.shape == (3, 3, 7, 7)
    for i, (image, row) in enumerate([(0, 0), (0, 1), (1, 0)]):
        alone = {name: own[image : image + 1] for name, own in maps.items()}
        assert torch.equal(align(alone, [boxes[image][row : row + 1]], [(256, 256)])[0], pooled[i])
    pooled.sum().backward()
    assert all(own.grad.isfinite().all() for own in maps.values())
    empty = align(maps, [torch.zeros(0, 4), torch.zeros(0, 4)], sizes)
    assert empty.shape == (0, 3, 7, 7) and empty.dtype == dtype
    single = released.ReleasedRoIAlign(["1"], 14, 2, (8,))(maps, boxes, sizes)
    assert single.shape == (3, 3, 14, 14) and not torch.equal(single[1], torch.zeros_like(single[1]))


# --------------------------------------------------------------------------- pixels


def transform_of(min_size, max_size, **settings):
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    return released.ReleasedTransform(min_size, max_size, mean, std, **settings)


def taps(position, old, new, clamp):
    """(first index, second index, weight of the second) as float32, in OpenCV's order of operations."""
    at = np.float32((position + 0.5) * (1 / (new / old)) - 0.5)
    low = math.floor(at)
    part = np.float32(at - np.float32(low))
    if clamp and not 0 <= low < old - 1:
        part = np.float32(0)
    return min(max(low, 0), old - 1), min(max(low + 1, 0), old - 1), part


def slow_resize(levels, height, width):
    """[H, W] integers: OpenCV's fixed-point bilinear resizing, pixel by pixel; and the exact values."""
    fixed, exact = np.zeros((height, width), int), np.zeros((height, width))
    for y in range(height):
        top, bottom, down = taps(y, levels.shape[0], height, clamp=False)
        for x in range(width):
            left, right, across = taps(x, levels.shape[1], width, clamp=True)
            part = 0
            for row, share in ((top, np.float32(1) - down), (bottom, down)):
                a, b = int(levels[row, left]), int(levels[row, right])
                line = a * int(np.rint((np.float32(1) - across) * 2048)) + b * int(np.rint(across * 2048))
                part += int(np.rint(share * 2048)) * (line // 16) // 65536
                exact[y, x] += share * (a * (1 - across) + b * across)
            fixed[y, x] = (part + 2) // 4
    return fixed, exact


@pytest.mark.parametrize("old, min_size, max_size", [((23, 31), 40, 60), ((40, 21), 17, 25), ((12, 20), 30, 37)])
def test_images_are_resized_in_whole_levels(old, min_size, max_size):
    levels = np.random.default_rng(0).integers(0, 256, (3, *old))
    levels[0, 5:] = 255
    image = torch.tensor(levels / 255, dtype=torch.float32)
    transform = transform_of(min_size, max_size).eval()
    scale = min(max_size / max(old), min_size / min(old))
    new = tuple(int(side * scale + 0.5) for side in old)
    resized, _ = transform.resize(image)
    assert tuple(resized.shape) == (3, *new)
    for ours, plane in zip((resized * 255).numpy(), levels, strict=True):
        fixed, exact = slow_resize(plane, *new)
        assert np.abs(ours - fixed).max() < 1e-3
        assert np.abs(ours - exact).max() <= 1.01  # what the fixed-point arithmetic may lose
    batch, _ = transform([image])
    assert batch.image_sizes == [new] and batch.tensors.shape[-1] % 32 == 0
    height, width = new
    assert torch.allclose(batch.tensors[0, :, :height, :width], transform.normalize(resized))
    assert (batch.tensors[0, :, height:] == 0).all() and (batch.tensors[0, :, :, width:] == 0).all()


def test_images_of_the_right_size_stay_as_they_are():
    image = torch.rand(3, 20, 30)
    resized, _ = transform_of(20, 90).eval().resize(image)
    assert torch.equal(resized, image)


def test_targets_are_resized():
    """13 * 20 pixels at a scale of 2.3: boxes in released coordinates, masks and labels nearest."""
    transform = transform_of((23, 46), 46).eval()
    generator = np.random.default_rng(0)
    masks, labels = generator.integers(0, 2, (2, 13, 20)), generator.integers(0, 99, (13, 20))
    target = {"boxes": torch.tensor([[1, 2, 5, 9], [3, 4, 20, 13.0]]), "labels": torch.tensor([7, 8])}
    target |= {"masks": torch.tensor(masks, dtype=torch.uint8), "semantic": torch.tensor(labels)}
    image, resized = transform.resize(torch.zeros(3, 13, 20), dict(target))
    assert image.shape == (3, 30, 46)  # 29.9 and 46
    expected = [[2.3, 4.6, 4 * 2.3 + 1, 8 * 2.3 + 1], [6.9, 9.2, 19 * 2.3 + 1, 12 * 2.3 + 1]]
    close(resized["boxes"], torch.tensor(expected), atol=1e-5)
    rows, columns = [min(math.floor(y * 13 / 30), 12) for y in range(30)], [math.floor(x * 20 / 46) for x in range(46)]
    assert resized["masks"].dtype == torch.uint8 and resized["semantic"].dtype == torch.int64
    assert (resized["masks"].numpy() == masks[:, rows][:, :, columns]).all()
    assert (resized["semantic"].numpy() == labels[rows][:, columns]).all()
    assert torch.equal(resized["labels"], target["labels"])
    small = transform_of(4, 90).eval().resize(torch.zeros(3, 13, 20), {"boxes": torch.tensor([[19.5, 0, 20, 13]])})[1]
    assert small["boxes"][0, 2] >= 1 and (small["boxes"][0] <= torch.tensor([5, 3, 6, 4])).all()
    empty = transform([torch.zeros(3, 13, 20)], [{"boxes": torch.zeros(0, 4), "masks": torch.zeros(0, 13, 20)}])[1][0]
    assert empty["boxes"].shape == (0, 4) and empty["masks"].shape == (0, 30, 46)


def test_training_draws_a_size_or_leaves_all_alone():
    image, target = torch.rand(3, 13, 20), {"boxes": torch.tensor([[1, 2, 5, 9.0]])}
    torch.manual_seed(0)
    transform = transform_of((13, 26), 99)
    assert {transform.resize(image, target)[0].shape[-2] for _ in range(20)} == {13, 26}
    transform.training_sides, transform.training_long_side = (26, 52), 60
    assert {transform.resize(image, target)[0].shape[-2:] for _ in range(20)} == {(26, 40), (39, 60)}
    transform.training_sides, transform.training_long_side = (), 0
    transform.min_size, transform.max_size = (39,), 40
    assert transform.resize(image)[0].shape[-1] == 40
    transform = transform_of(26, 99)
    transform.resize_in_training = False
    left, same = transform.resize(image, target)
    assert torch.equal(left, image) and same is target
    batch, _ = transform([image], [target])
    assert torch.allclose(batch.tensors[0, :, :13, :20], transform.normalize(image))


def test_images_are_mirrored_once_they_are_resized():
    """Boxes, masks and label maps are the mirror images of what they are without mirroring, to the pixel."""
    masks = torch.zeros(1, 13, 20, dtype=torch.uint8)
    masks[0, 3:9, 2:7] = 1
    target = {"boxes": torch.tensor([[2, 3, 7, 9.0]]), "masks": masks, "semantic": torch.arange(260).view(13, 20)}
    image, transform = torch.rand(3, 13, 20), transform_of(37, 99)
    plain, expected = transform.resize(image, target)
    transform.flip = 1.0
    mirrored, found = transform.resize(image, target)
    assert torch.equal(mirrored, plain.flip(-1)) and plain.shape[-1] == 57
    x1, y1, x2, y2 = expected["boxes"][0].tolist()
    assert torch.allclose(found["boxes"], torch.tensor([[57 - x2, y1, 57 - x1, y2]]))
    for key in ("masks", "semantic"):
        assert torch.equal(found[key], expected[key].flip(-1))
    assert torch.equal(transform.eval().resize(image, target)[0], plain)


def test_losses_count_an_image_without_positives_as_having_one():
    """Three images: 2 and 3 anchors drawn, 0 and 4, 0 and 0; divided by 5 + 5 + 2 instead of 9."""
    rpn = released.ReleasedRPN(None, None, 0.7, 0.3, 8, 0.5, {}, {}, 0.7)
    plain = RegionProposalNetwork(None, None, 0.7, 0.3, 8, 0.5, {}, {}, 0.7)
    labels = [torch.tensor([1.0, 1, 0, 0, 0]), torch.tensor([0.0] * 4 + [-1]), torch.full((5,), -1.0)]
    logits, deltas = torch.randn(15, 1), torch.randn(15, 4)
    goals = list(torch.randn(3, 5, 4))
    for ours, theirs in zip(
        rpn.compute_loss(logits, deltas, labels, goals), plain.compute_loss(logits, deltas, labels, goals), strict=True
    ):
        assert ours.item() == pytest.approx(theirs.item() * 9 / 12)


def test_resized_boxes_and_masks_come_back():
    torch.manual_seed(0)
    transform = transform_of(37, 90).eval()
    boxes = torch.tensor([[1, 2, 5, 9], [3, 4, 20, 13.0], [0, 0, 1, 1]])
    batch, targets = transform([torch.rand(3, 13, 20)], [{"boxes": boxes}])
    detections = [{"boxes": targets[0]["boxes"], "masks": torch.rand(3, 1, 28, 28), "scores": torch.rand(3)}]
    (result,) = transform.postprocess(detections, batch.image_sizes, [(13, 20)])
    assert result["boxes"].dtype == torch.float32 and torch.allclose(result["boxes"], boxes, atol=1e-5)
    assert result["masks"].shape == (3, 1, 13, 20) and (result["masks"][2].flatten()[1:] == 0).all()


def slow_paste(mask, corners, height, width):
    x1, y1, x2, y2 = (int(value) for value in corners)
    own = max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1)
    canvas, exact = np.zeros((height, width)), np.zeros(own)
    for y in range(own[0]):
        top, bottom, down = taps(y, len(mask), own[0], clamp=False)
        for x in range(own[1]):
            left, right, across = taps(x, len(mask), own[1], clamp=True)
            lines = [mask[row, left] * (1 - across) + mask[row, right] * across for row in (top, bottom)]
            exact[y, x] = lines[0] * (1 - down) + lines[1] * down
            if 0 <= y1 + y < height and 0 <= x1 + x < width:
                canvas[y1 + y, x1 + x] = exact[y, x]
    return canvas


def pasted_at(masks, corners, size):
    return paste(crops(masks, corners, size), len(masks), size, masks.float())


def test_pasted_masks_equal_plain_loops():
    """Fractions are cut off; partly or wholly outside; inside out gives one pixel; larger and smaller than 28."""
    corners = [[3.9, 2.2, 20.99, 30], [-5.5, -7, 12, 9], [30, 25, 55, 60], [9, 9, 7, 3], [50, 50, 60, 60], [0, 0, 0, 0]]
    corners += [[-60, 0, -50, 9], [0, 0, 39, 34]]
    masks = np.random.default_rng(0).random((len(corners), 28, 28))
    pasted = pasted_at(torch.tensor(masks)[:, None], torch.tensor(corners, dtype=torch.float64), (35, 40))
    assert pasted.dtype == torch.float32 and pasted.shape == (len(corners), 1, 35, 40)
    for ours, mask, own in zip(pasted[:, 0].numpy(), masks, corners, strict=True):
        assert np.abs(ours - slow_paste(mask, own, 35, 40)).max() < 1e-5
    assert pasted_at(torch.zeros(0, 1, 28, 28), torch.zeros(0, 4), (5, 6)).shape == (0, 1, 5, 6)


@pytest.mark.parametrize("M", [28, 7])
def test_mask_targets_equal_plain_loops(M):
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 2, (3, 7, 9))
    masks = coarse.repeat(6, 1).repeat(5, 2)  # [3, 42, 45], blobs
    masks[2] = generator.integers(0, 2, masks[2].shape)
    corners = generator.uniform(0, 30, (12, 4))
    corners[:, 2:] += corners[:, :2] + 1  # some beyond the image
    corners[:4] = [[0, 0, 44, 41], [3.7, 4.2, 3.8, 4.3], [5, 5, 32, 32], [9, 9, 64, 40]]
    objects = generator.integers(0, 3, 12)
    boxes = torch.tensor(corners) + INCLUSIVE
    ours = released.mask_targets(torch.tensor(masks, dtype=torch.uint8), boxes, torch.tensor(objects), M)
    assert ours.shape == (12, M, M) and ours.dtype == boxes.dtype
    for target, (x1, y1, x2, y2), own in zip(ours.numpy(), corners.astype(int), objects, strict=True):
        crop = masks[own][y1 : y1 + max(y2 - y1 + 1, 1), x1 : x1 + max(x2 - x1 + 1, 1)]
        fixed, exact = slow_resize(crop, M, M)
        assert (target == fixed).all()
        assert (target[exact < 0.499] == 0).all() and (target[exact > 0.999] == 1).all()
    none = released.mask_targets(torch.zeros(0, 9, 9, dtype=torch.uint8), torch.zeros(0, 4), torch.zeros(0).long(), M)
    assert none.shape == (0, M, M)
