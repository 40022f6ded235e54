"""Hybrid Task Cascade (Chen et al. 2019): a cascade whose mask branches follow the box branches.

Against Cascade R-CNN with masks: each stage's masks are learnt on the boxes that its own regression
has moved (interleaved execution); each mask head also sees the features of the one before it (mask
information flow); and a semantic branch looks at the whole image, its features added to those of
every box and mask.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from bags.classifiers.base import BoxFeatures, ProposalClassifier
from bags.detectors.cascade import CascadeRoIHeads
from bags.detectors.conventions import Conventions
from bags.detectors.roi_heads import RoIHeads, Samples

UNLABELLED = 255  # in label maps: pixels that the semantic loss leaves out
IGNORED = -100  # ... as the loss knows them; painted categories may well have number 255
SEMANTIC_WEIGHT = 0.2


def conv_relu(width: int, kernel: int) -> Conv2dNormActivation:
    """A convolution that keeps width and size, and ReLU; no normalisation."""
    return Conv2dNormActivation(width, width, kernel, norm_layer=None)


class SemanticBranch(nn.Module):
    """Feature pyramid -> label of every pixel, and features for the boxes, at the stride next to 8.

    width: of the pyramid. strides: of its levels. classes: labels 0 .. classes-1. padding: label of the
    batch's padding.
    """

    def __init__(self, width: int, strides: Sequence[int], classes: int, padding: int):
        super().__init__()
        self.classes, self.padding = classes, IGNORED if padding == UNLABELLED else padding
        self.level = min(range(len(strides)), key=lambda level: abs(strides[level] - 8))
        self.stride = strides[self.level]
        self.lateral = nn.ModuleList(conv_relu(width, 1) for _ in strides)
        self.convs = nn.Sequential(*(conv_relu(width, 3) for _ in range(4)))
        self.embedding = conv_relu(width, 1)
        self.logits = nn.Conv2d(width, classes, 1)

    def forward(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Levels [B, width, H_l, W_l] -> (features [B, width, H, W], logits [B, classes, H, W]) at `stride`."""
        levels = list(features.values())
        size = levels[self.level].shape[-2:]
        fused = torch.zeros((), device=levels[0].device)
        for convolution, level in zip(self.lateral, levels, strict=True):
            if level.shape[-2:] != size:
                level = F.interpolate(level, size=size, mode="bilinear", align_corners=True)
            fused = fused + convolution(level)
        fused = self.convs(fused)
        return self.embedding(fused), self.logits(fused)

    def loss(self, logits: Tensor, targets: list[dict]) -> Tensor:
        """Mean cross entropy over the pixels that are labelled, times 0.2.

        A target's `semantic` [H, W] holds labels 0 .. classes-1, or 255 for none; without it the masks are painted:
        the label of the smallest object at a pixel, 0 where there is none.
        """
        height, width = logits.shape[-2:]
        batch = torch.full(
            (len(targets), height * self.stride, width * self.stride), self.padding, device=logits.device
        )
        for own, target in zip(batch, targets, strict=True):
            if "semantic" in target:
                labels = target["semantic"].long()
                labels = labels.masked_fill(labels == UNLABELLED, IGNORED)
            else:
                labels = painted(target["masks"], target["labels"])
            own[: labels.shape[0], : labels.shape[1]] = labels[: own.shape[0], : own.shape[1]]
        goals = batch[:, :: self.stride, :: self.stride]
        pixels = logits.float().permute(0, 2, 3, 1).flatten(0, 2)  # as maps, GPUs add them up in any order
        total = F.cross_entropy(pixels, goals.flatten(), ignore_index=IGNORED, reduction="sum")
        return SEMANTIC_WEIGHT * total / (goals != IGNORED).sum().clamp(min=1)


def painted(masks: Tensor, labels: Tensor) -> Tensor:
    """Masks [K, H, W] and labels [K] in 1..C -> a label map [H, W] int64: the smallest object's, 0 for none."""
    result = torch.zeros(masks.shape[1:], dtype=torch.long, device=masks.device)
    for k in masks.flatten(1).sum(1).argsort(descending=True, stable=True).tolist():
        result[masks[k] > 0] = labels[k]
    return result


class FusedRoIAlign(nn.Module):
    """RoI features of the pyramid, plus those of the semantic branch (`features["semantic"]`) at the same side."""

    def __init__(self, pyramid: nn.Module, semantic: nn.Module):
        super().__init__()
        self.pyramid, self.semantic = pyramid, semantic

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes) -> Tensor:
        """[all boxes, width, side, side]."""
        pooled = self.pyramid(features, boxes, image_shapes)
        context = self.semantic(features, boxes, image_shapes)
        return pooled + F.avg_pool2d(context, context.shape[-1] // pooled.shape[-1])  # 14 x 14 -> 7 x 7, or itself


class HTCRoIHeads(CascadeRoIHeads):
    """The stages of a Hybrid Task Cascade; called as `RoIHeads`. Training needs masks."""

    def __init__(self, stages: Sequence[RoIHeads], loss_weights: Sequence[float], width: int, semantic: SemanticBranch):
        super().__init__(stages, loss_weights)
        self.semantic = semantic
        self.mask_flow = nn.ModuleList(conv_relu(width, 1) for _ in range(len(stages) - 1))

    def forward(self, features, proposals, image_shapes, targets=None):
        """See `CascadeRoIHeads.forward`; one more loss is loss_semantic."""
        context, logits = self.semantic(features)
        detections, losses = super().forward({**features, "semantic": context}, proposals, image_shapes, targets)
        if self.training:
            losses["loss_semantic"] = self.semantic.loss(logits, targets)
        return detections, losses

    @torch.no_grad()
    def training_proposals(
        self, features, proposals, image_shapes, targets
    ) -> list[tuple[ProposalClassifier, BoxFeatures, Tensor]]:
        """See `CascadeRoIHeads.training_proposals`; leaves out the draws for the masks."""
        return super().training_proposals(self.with_context(features), proposals, image_shapes, targets)

    def stage_features(self, features, proposals, image_shapes) -> list[tuple[list[Tensor], BoxFeatures]]:
        """See `RoIHeads.stage_features`."""
        return super().stage_features(self.with_context(features), proposals, image_shapes)

    def with_context(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The pyramid, and the semantic branch's features beside it."""
        return features if "semantic" in features else {**features, "semantic": self.semantic(features)[0]}

    def _mask_samples(self, stage: RoIHeads, samples: Samples, moved: list[Tensor], targets) -> Samples:
        """Interleaved: drawn anew, with the stage's own threshold, from the boxes that it has moved."""
        return stage.sample(moved, targets)

    def _mask_features(self, pooled: Tensor, stages: Sequence[int]) -> list[Tensor]:
        """Each head sees the RoI features, and from the second on the output of the head before it."""
        outputs: list[Tensor] = []
        for number in range(max(stages) + 1):
            seen = pooled + self.mask_flow[number - 1](outputs[-1]) if outputs else pooled
            outputs.append(self.box_stages[number].mask_head(seen))
        return [outputs[number] for number in stages]


def fuse_semantic(
    pool: nn.Module, conventions: Conventions, sampling_ratio: int, semantic: SemanticBranch
) -> FusedRoIAlign:
    """A pyramid's RoI pooling, with the semantic branch's features added (pooled at 14 x 14)."""
    return FusedRoIAlign(pool, conventions.roi_align(["semantic"], 14, sampling_ratio, (semantic.stride,)))
