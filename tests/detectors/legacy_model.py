"""The detectors of the paper's released code (mmdet 1.0), written a second time: plainly, and in its coordinates.

Everywhere in this file a box x1, y1, x2, y2 includes its last column and row: its width is x2 - x1 + 1.
Nothing of `bags` is used, and weights have the names of the released files.

Left out: resizing (images are taken as they are), the drawing of samples (all are taken), the resizing of
masks (an object's mask has one value everywhere, so that any crop of it has too) and their pasting.

Shape shorthand: R boxes, C categories, L = C + 1 box regressions per box, or 1 where categories share it.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

STRIDES = (4, 8, 16, 32, 64)
BLOCKS = (3, 4, 6, 3)  # ResNet-50
PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
RPN_DEVIATIONS = (1.0, 1.0, 1.0, 1.0)
STAGE_DEVIATIONS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
STAGE_IOUS, STAGE_WEIGHTS = (0.5, 0.6, 0.7), (1.0, 0.5, 0.25)
BACKGROUND, NEITHER = -1, -2  # in place of a matched object


def box_sides(boxes: Tensor) -> Tensor:
    """Widths and heights [..., 2] of boxes [..., 4]."""
    return boxes[..., 2:] - boxes[..., :2] + 1


def overlaps(first: Tensor, second: Tensor) -> Tensor:
    """IoU [N, M] of boxes [N, 4] and [M, 4]."""
    left_top = torch.maximum(first[:, None, :2], second[None, :, :2])
    right_bottom = torch.minimum(first[:, None, 2:], second[None, :, 2:])
    common = (right_bottom - left_top + 1).clamp(min=0).prod(-1)
    areas = box_sides(first).prod(1)[:, None] + box_sides(second).prod(1)[None]
    return common / (areas - common)


def suppress(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Indices of the boxes that greedy suppression keeps, by falling score."""
    order = scores.argsort(descending=True, stable=True)
    conflicts = overlaps(boxes[order], boxes[order]) > threshold
    alive, kept = torch.ones(len(order), dtype=torch.bool), []
    for candidate in range(len(order)):
        if alive[candidate]:
            kept.append(candidate)
            alive &= ~conflicts[candidate]
    return order[torch.tensor(kept, dtype=torch.long)]


def make_anchors(height: int, width: int, stride: int) -> Tensor:
    """Anchors [height * width * 3, 4] of a feature map; corners are whole pixels."""
    tall = torch.tensor([0.5, 1.0, 2.0]).sqrt()
    half_widths, half_heights = (stride * 8 / tall - 1) / 2, (stride * 8 * tall - 1) / 2
    centre = (stride - 1) / 2
    corners = (centre - half_widths, centre - half_heights, centre + half_widths, centre + half_heights)
    base = torch.stack(corners, dim=1).round().double()
    y, x = torch.meshgrid(torch.arange(height) * stride, torch.arange(width) * stride, indexing="ij")
    return (torch.stack([x, y, x, y], dim=-1)[:, :, None] + base).reshape(-1, 4)


def decode(boxes: Tensor, deltas: Tensor, deviations: Sequence[float], size: tuple[int, int]) -> Tensor:
    """Boxes [R, 4] moved by deltas [R, 4 * L], within an image of `size` (height, width): [R, L, 4]."""
    deltas, limit = deltas.unflatten(1, (-1, 4)) * deltas.new_tensor(deviations), abs(math.log(16 / 1000))
    sides, centres = box_sides(boxes)[:, None], (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
    centres, halves = centres + sides * deltas[..., :2], sides * deltas[..., 2:].clamp(-limit, limit).exp() / 2
    corners = torch.cat([centres - halves + 0.5, centres + halves - 0.5], dim=-1)
    return corners.clamp(min=0).minimum(corners.new_tensor([size[1] - 1, size[0] - 1] * 2))


def encode(boxes: Tensor, objects: Tensor, deviations: Sequence[float]) -> Tensor:
    """Deltas [R, 4] that move boxes [R, 4] onto objects [R, 4]."""
    moves = (objects[:, :2] + objects[:, 2:] - boxes[:, :2] - boxes[:, 2:]) / 2 / box_sides(boxes)
    return torch.cat([moves, (box_sides(objects) / box_sides(boxes)).log()], dim=1) / boxes.new_tensor(deviations)


def assign(boxes: Tensor, objects: Tensor, positive: float, negative: float) -> Tensor:
    """The object of each box, by position, or BACKGROUND or NEITHER: [R].

    A box goes to its best object from IoU `positive`, and is background below `negative`. Then each object,
    in turn, takes the boxes that overlap it most, if they do so by `negative` at least.
    """
    if len(objects) == 0:  # the released code never trains on such an image
        return torch.full((len(boxes),), BACKGROUND)
    iou = overlaps(objects, boxes)
    best, best_object = iou.max(dim=0)
    assigned = torch.full((len(boxes),), NEITHER)
    assigned[best < negative] = BACKGROUND
    assigned[best >= positive] = best_object[best >= positive]
    for number, own in enumerate(iou):
        if own.max() >= negative:
            assigned[own == own.max()] = number
    return assigned


def axis_weights(start: Tensor, length: Tensor, bins: int, cells: int) -> Tensor:
    """[R, bins, cells]: how much each cell of a map counts in each bin, along one axis.

    A bin is the mean of two points, each interpolated between the two nearest cells. start and length [R] in cells.
    """
    steps = (torch.arange(2 * bins).to(start) + 0.5) / (2 * bins)
    points = start[:, None] + steps * length[:, None]
    inside = (points >= -1) & (points <= cells)
    distance = (points.clamp(0, cells - 1)[..., None] - torch.arange(cells)).abs()
    return ((1 - distance).clamp(min=0) * inside[..., None]).unflatten(1, (bins, 2)).mean(2)


def roi_align(feature_map: Tensor, boxes: Tensor, stride: int, side: int) -> Tensor:
    """A map [channels, H, W] pooled in boxes [R, 4]: [R, channels, side, side]."""
    starts, lengths = boxes[:, :2] / stride, box_sides(boxes).clamp(min=0) / stride
    columns = axis_weights(starts[:, 0], lengths[:, 0], side, feature_map.shape[2])
    rows = axis_weights(starts[:, 1], lengths[:, 1], side, feature_map.shape[1])
    return torch.einsum("rph,chw,rqw->rcpq", rows, feature_map, columns)


class LegacyDetector:
    """Faster, Mask and Cascade R-CNN and HTC on ResNet-50, from a released state dict.

    groups: the labels of each group of a group softmax; None: a plain softmax. proposals: how many there are
    in testing and in training. detections: the score that they exceed, and how many there are at most.

    Maps of a batch [B, ...] are a dict: pyramid, a list of levels; rpn, for each of them scores (logits)
    [B, 3, H, W] and deltas [B, 12, H, W]; for HTC semantic_logits and semantic, features at stride 8.
    """

    def __init__(self, state: dict[str, Tensor], framework: str, groups, proposals, detections):
        self.state, self.groups, self.detections = state, groups, detections
        self.test_proposals, self.train_proposals = proposals
        self.is_cascade, self.is_htc = framework in ("cascade_rcnn", "htc"), framework == "htc"
        self.has_masks, self.stage_names = (
            framework in ("mask_rcnn", "htc"),
            ("0.", "1.", "2.") if self.is_cascade else ("",),
        )
        self.widths = [2, *(1 + len(labels) for labels in groups or ())]  # background and foreground; others and labels

    def layer(self, operation: Callable[..., Tensor], x: Tensor, name: str, *arguments) -> Tensor:
        """A convolution or linear layer with the released weights of that name."""
        return operation(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"), *arguments)

    def batch_norm(self, x: Tensor, name: str) -> Tensor:
        """With the statistics of the file."""
        return F.batch_norm(x, *(self.state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")))

    def backbone(self, x: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] -> maps of strides 4, 8, 16, 32."""
        x = F.relu(self.batch_norm(self.layer(F.conv2d, x, "backbone.conv1", 2, 3), "backbone.bn1"))
        x, maps = F.max_pool2d(x, 3, 2, 1), []
        for layer, blocks in enumerate(BLOCKS, start=1):
            for block in range(blocks):
                prefix, stride = f"backbone.layer{layer}.{block}.", 2 if block == 0 and layer > 1 else 1
                inner = F.relu(self.batch_norm(self.layer(F.conv2d, x, f"{prefix}conv1"), f"{prefix}bn1"))
                inner = self.layer(F.conv2d, inner, f"{prefix}conv2", stride, 1)
                inner = F.relu(self.batch_norm(inner, f"{prefix}bn2"))
                inner = self.batch_norm(self.layer(F.conv2d, inner, f"{prefix}conv3"), f"{prefix}bn3")
                if block == 0:
                    x = self.batch_norm(
                        self.layer(F.conv2d, x, f"{prefix}downsample.0", stride), f"{prefix}downsample.1"
                    )
                x = F.relu(x + inner)
            maps.append(x)
        return maps

    def neck(self, maps: list[Tensor]) -> list[Tensor]:
        """Feature pyramid of five levels."""
        levels = [self.layer(F.conv2d, x, f"neck.lateral_convs.{i}.conv") for i, x in enumerate(maps)]
        for i in (3, 2, 1):
            levels[i - 1] = levels[i - 1] + F.interpolate(levels[i], scale_factor=2, mode="nearest")
        levels = [self.layer(F.conv2d, x, f"neck.fpn_convs.{i}.conv", 1, 1) for i, x in enumerate(levels)]
        return [*levels, levels[-1][:, :, ::2, ::2]]

    def semantic_branch(self, pyramid: list[Tensor]) -> dict[str, Tensor]:
        """Logits and features at stride 8."""
        size, fused = pyramid[1].shape[-2:], 0
        for i, level in enumerate(pyramid):
            resized = level if i == 1 else F.interpolate(level, size=size, mode="bilinear", align_corners=True)
            fused = fused + F.relu(self.layer(F.conv2d, resized, f"semantic_head.lateral_convs.{i}.conv"))
        for i in range(4):
            fused = F.relu(self.layer(F.conv2d, fused, f"semantic_head.convs.{i}.conv", 1, 1))
        features = F.relu(self.layer(F.conv2d, fused, "semantic_head.conv_embedding.conv"))
        return {"semantic_logits": self.layer(F.conv2d, fused, "semantic_head.conv_logits"), "semantic": features}

    def see(self, images: list[Tensor]) -> dict:
        """Images [3, H, W] in levels 0..255, each padded to multiples of 32 and then to the largest -> maps."""
        height, width = (max(-(-image.shape[axis] // 32) * 32 for image in images) for axis in (1, 2))
        batch = images[0].new_zeros(len(images), 3, height, width)
        mean, std = (images[0].new_tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
        for padded, image in zip(batch, images, strict=True):
            padded[:, : image.shape[1], : image.shape[2]] = (image - mean) / std
        pyramid, rpn = self.neck(self.backbone(batch)), []
        for level in pyramid:
            hidden = F.relu(self.layer(F.conv2d, level, "rpn_head.rpn_conv", 1, 1))
            rpn.append([self.layer(F.conv2d, hidden, f"rpn_head.{name}") for name in ("rpn_cls", "rpn_reg")])
        return {"pyramid": pyramid, "rpn": rpn, **(self.semantic_branch(pyramid) if self.is_htc else {})}

    def anchor_outputs(self, maps: dict, image: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Per level: anchors [N, 4], logits [N] and deltas [N, 4] of one image."""
        outputs = []
        for (scores, deltas), stride in zip(maps["rpn"], STRIDES, strict=True):
            anchors = make_anchors(*scores.shape[-2:], stride).to(scores)
            scores, deltas = (values[image].permute(1, 2, 0) for values in (scores, deltas))
            outputs.append((anchors, scores.flatten(), deltas.reshape(-1, 4)))
        return outputs

    def proposals(self, maps: dict, image: int, size: tuple[int, int], number: int) -> Tensor:
        """The `number` best of each level, suppressed level by level; of the rest the `number` best [R, 4]."""
        boxes, scores = [], []
        for anchors, logits, deltas in self.anchor_outputs(maps, image):
            best = logits.sigmoid().topk(min(number, len(logits)))
            moved = decode(anchors[best.indices], deltas[best.indices], RPN_DEVIATIONS, size)[:, 0]
            kept = suppress(moved, best.values, 0.7)
            boxes.append(moved[kept]), scores.append(best.values[kept])
        best = torch.cat(scores).argsort(descending=True, stable=True)[:number]
        return torch.cat(boxes)[best]

    def pooled(self, maps: dict, image: int, boxes: Tensor, side: int) -> Tensor:
        """[R, channels, side, side]: from the level of a box's size, and from the semantic branch."""
        levels = (box_sides(boxes).prod(1).sqrt() / 56 + 1e-6).log2().floor().clamp(0, 3)
        result = boxes.new_zeros(len(boxes), maps["pyramid"][0].shape[1], side, side)
        for i, stride in enumerate(STRIDES[:4]):
            result[levels == i] = roi_align(maps["pyramid"][i][image], boxes[levels == i], stride, side)
        if self.is_htc:
            result += F.adaptive_avg_pool2d(roi_align(maps["semantic"][image], boxes, 8, 14), side)
        return result

    def box_head(self, pooled: Tensor, stage_name: str) -> tuple[Tensor, Tensor]:
        """(logits, deltas [R, 4 * L])."""
        prefix, hidden = f"bbox_head.{stage_name}", pooled.flatten(1)
        for i in range(2):
            hidden = F.relu(self.layer(F.linear, hidden, f"{prefix}shared_fcs.{i}"))
        return self.layer(F.linear, hidden, f"{prefix}fc_cls"), self.layer(F.linear, hidden, f"{prefix}fc_reg")

    def mask_features(self, pooled: Tensor, stage_names: Sequence[str]) -> list[Tensor]:
        """Outputs [R, 256, 14, 14] of the mask heads; each sees the output of the one before it."""
        outputs = []
        for name in stage_names:
            prefix, hidden = f"mask_head.{name}", pooled
            if outputs:
                hidden = hidden + F.relu(self.layer(F.conv2d, outputs[-1], f"{prefix}conv_res.conv"))
            for i in range(4):
                hidden = F.relu(self.layer(F.conv2d, hidden, f"{prefix}convs.{i}.conv", 1, 1))
            outputs.append(hidden)
        return outputs

    def mask_logits(self, features: Tensor, stage_name: str, labels: Tensor) -> Tensor:
        """[R, 28, 28] of each box's own label."""
        hidden = F.relu(self.layer(F.conv_transpose2d, features, f"mask_head.{stage_name}upsample", 2))
        return self.layer(F.conv2d, hidden, f"mask_head.{stage_name}conv_logits")[torch.arange(len(labels)), labels]

    def scores(self, logits: Tensor) -> Tensor:
        """[R, C + 1], the background's first."""
        if self.groups is None:
            return logits.softmax(1)
        parts = [part.softmax(1) for part in logits.split(self.widths, 1)]
        result = logits.new_zeros(len(logits), 1 + sum(map(len, self.groups)))
        result[:, 0] = parts[0][:, 0]
        for labels, part in zip(self.groups, parts[1:], strict=True):
            result[:, list(labels)] = parts[0][:, 1:] * part[:, 1:]
        return result

    def detect(self, maps: dict, image: int, size: tuple[int, int]) -> dict[str, Tensor]:
        """Proposals [R, 4]; boxes, scores and labels by falling score; masks [K, 28, 28] in 0..1."""
        proposals = boxes = self.proposals(maps, image, size, self.test_proposals)
        logits = []
        for stage, name in enumerate(self.stage_names):
            own, deltas = self.box_head(self.pooled(maps, image, boxes, 7), name)
            logits.append(own)
            candidates = decode(boxes, deltas, STAGE_DEVIATIONS[stage], size)
            boxes = candidates[:, 0]
        scores, found = self.scores(sum(logits) / len(logits)), []
        for label in range(1, scores.shape[1]):
            likely = scores[:, label] > self.detections[0]
            boxes, own = candidates[likely, label if candidates.shape[1] > 1 else 0], scores[likely, label]
            kept = suppress(boxes, own, 0.5)
            found.append((boxes[kept], own[kept], torch.full_like(kept, label)))
        boxes, scores, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        best = scores.argsort(descending=True, stable=True)[: self.detections[1]]
        result = {"proposals": proposals, "boxes": boxes[best], "scores": scores[best], "labels": labels[best]}
        if self.has_masks:
            features = self.mask_features(self.pooled(maps, image, result["boxes"], 14), self.stage_names)
            pairs = zip(features, self.stage_names, strict=True)
            masks = [self.mask_logits(*pair, result["labels"]).sigmoid() for pair in pairs]
            result["masks"] = sum(masks) / len(masks)
        return result

    def sample(self, proposals: Tensor, target: dict[str, Tensor], stage: int) -> dict[str, Tensor]:
        """Matched proposals and objects' own boxes: boxes and labels [R], foreground first; its deltas and masks."""
        objects, iou = target["boxes"], STAGE_IOUS[stage]
        boxes = torch.cat([objects, proposals])
        matched = torch.cat([torch.arange(len(objects)), assign(proposals, objects, iou, iou)])
        chosen, rest = torch.where(matched >= 0)[0], torch.where(matched == BACKGROUND)[0]
        order, matched = torch.cat([chosen, rest]), matched[chosen]
        labels = torch.cat([target["labels"][matched], torch.zeros_like(rest)])
        deltas = encode(boxes[chosen], objects[matched], STAGE_DEVIATIONS[stage])
        own = {"boxes": boxes[order], "labels": labels, "deltas": deltas, "masks": target["mask_values"][matched]}
        return {**own, "is_object": order < len(objects)}

    def classifier_losses(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Cross entropy; with groups that of each. A group without foreground has loss 0; others train all the rest."""
        if self.groups is None:
            return {"loss_classifier": F.cross_entropy(logits, labels)}
        parts = logits.split(self.widths, 1)
        losses = {"loss_group0": F.cross_entropy(parts[0], (labels > 0).long())}
        for number, (members, part) in enumerate(zip(self.groups, parts[1:], strict=True), start=1):
            goals = sum((labels == label) * column for column, label in enumerate(members, start=1))
            losses[f"loss_group{number}"] = F.cross_entropy(part, goals) * bool(goals.any())
        return losses

    def rpn_losses(self, maps: dict, sizes: list[tuple[int, int]], targets: list[dict]) -> dict[str, Tensor]:
        """Over the anchors inside each image, divided by their number; no positive (negative) ones count as one."""
        score_loss = box_loss = number = 0
        for image, ((height, width), target) in enumerate(zip(sizes, targets, strict=True)):
            levels = zip(*self.anchor_outputs(maps, image), strict=True)
            anchors, logits, deltas = (torch.cat(parts) for parts in levels)
            inside = (anchors[:, :2] >= 0).all(1) & (anchors[:, 2] < width) & (anchors[:, 3] < height)
            anchors, logits, deltas = anchors[inside], logits[inside], deltas[inside]
            matched = assign(anchors, target["boxes"], 0.7, 0.3)
            positive, used = matched >= 0, matched != NEITHER
            goals = positive[used].to(logits)
            score_loss += F.binary_cross_entropy_with_logits(logits[used], goals, reduction="sum")
            goals = encode(anchors[positive], target["boxes"][matched[positive]], RPN_DEVIATIONS)
            box_loss += F.smooth_l1_loss(deltas[positive], goals, reduction="sum", beta=1 / 9)
            number += max(int(positive.sum()), 1) + max(int((matched == BACKGROUND).sum()), 1)
        return {"loss_objectness": score_loss / number, "loss_rpn_box_reg": box_loss / number}

    def losses(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """All losses, weighted. A target holds boxes [K, 4], labels [K], mask_values [K] and semantic [H, W]."""
        maps, sizes = self.see(images), [tuple(image.shape[1:]) for image in images]
        losses = self.rpn_losses(maps, sizes, targets)
        proposals = [self.proposals(maps, i, size, self.train_proposals) for i, size in enumerate(sizes)]
        for stage, name in enumerate(self.stage_names):
            samples = [self.sample(*pair, stage) for pair in zip(proposals, targets, strict=True)]
            pooled = torch.cat([self.pooled(maps, i, own["boxes"], 7) for i, own in enumerate(samples)])
            logits, deltas = self.box_head(pooled, name)
            labels, goals = torch.cat([own["labels"] for own in samples]), torch.cat([own["deltas"] for own in samples])
            foreground = torch.where(labels > 0)[0]
            moves = deltas.unflatten(1, (-1, 4))[foreground, 0 if self.is_cascade else labels[foreground]]
            box_loss = F.smooth_l1_loss(moves, goals, reduction="sum") / len(labels)
            stage_losses = {**self.classifier_losses(logits, labels), "loss_box_reg": box_loss}
            if self.is_cascade:
                moves = deltas.split([len(own["boxes"]) for own in samples])
                deviations = [STAGE_DEVIATIONS[stage]] * len(samples)
                moved = [
                    decode(own["boxes"], *rest) for own, *rest in zip(samples, moves, deviations, sizes, strict=True)
                ]
                proposals = [boxes[~own["is_object"], 0] for own, boxes in zip(samples, moved, strict=True)]
            if self.is_htc:  # masks are learnt on the boxes that the stage has moved
                samples = [self.sample(*pair, stage) for pair in zip(proposals, targets, strict=True)]
            if self.has_masks:
                stage_losses["loss_mask"] = self.mask_loss(maps, samples, self.stage_names[: stage + 1])
            ending, weight = (f"_{stage + 1}", STAGE_WEIGHTS[stage]) if self.is_cascade else ("", 1)
            losses |= {f"{name}{ending}": weight * value for name, value in stage_losses.items()}
        if self.is_htc:
            goals = torch.zeros_like(maps["semantic_logits"][:, 0], dtype=torch.long)  # padding has label 0
            for goal, target in zip(goals, targets, strict=True):
                labels = target["semantic"][::8, ::8]
                goal[: labels.shape[0], : labels.shape[1]] = labels
            losses["loss_semantic"] = 0.2 * F.cross_entropy(maps["semantic_logits"], goals, ignore_index=255)
        return losses

    def mask_loss(self, maps: dict, samples: list[dict], stage_names: Sequence[str]) -> Tensor:
        """Mean binary cross entropy over the foreground's masks."""
        pooled = torch.cat([self.pooled(maps, i, own["boxes"][own["labels"] > 0], 14) for i, own in enumerate(samples)])
        labels = torch.cat([own["labels"][own["labels"] > 0] for own in samples])
        logits = self.mask_logits(self.mask_features(pooled, stage_names)[-1], stage_names[-1], labels)
        goals = torch.cat([own["masks"] for own in samples])[:, None, None].expand_as(logits)
        return F.binary_cross_entropy_with_logits(logits, goals.to(logits))
