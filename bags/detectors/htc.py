"""Hybrid Task Cascade (Chen et al. 2019): a cascade whose mask branches follow the box branches.

It differs from Cascade R-CNN with masks in three ways:

* Each stage learns masks on the boxes that its own regression has moved (interleaved execution).
* Each mask head also sees the features of the previous mask head (mask information flow).
* A semantic branch sees the whole image; its features are added to those of every box and mask.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from bags.detectors.cascade import CascadeRoIHeads
from bags.detectors.conventions import Conventions
from bags.detectors.roi_heads import RoIHeads, Samples

UNLABELLED = 255  # in label maps: pixels that the semantic loss leaves out
IGNORED = -100  # ... in the loss, because 255 can also be the label of a painted category
SEMANTIC_WEIGHT = 0.2


def conv_relu(width: int, kernel: int) -> Conv2dNormActivation:
    """A convolution that keeps width and size, then ReLU, without normalisation."""
    return Conv2dNormActivation(width, width, kernel, norm_layer=None)


class SemanticBranch(nn.Module):
    """Feature pyramid -> labels of all pixels, and features for the boxes, at the level whose stride is nearest to 8.

    width, strides  of the pyramid's levels
    classes         labels are 0 .. classes-1
    padding         label of the batch's padding; 255 is ignored
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
        """Compute (features [B, width, H, W], logits [B, classes, H, W]) from levels [B, width, H_l, W_l]."""
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
        """Mean cross entropy over the labelled pixels, times 0.2. logits [B, classes, H, W].

        A target's `semantic` [H, W] holds labels 0 .. classes-1, or 255 for none. Without it, the map is painted from
        the masks (see `painted`).
        """
        height, width = logits.shape[-2:]
        batch = torch.full(
            (len(targets), height * self.stride, width * self.stride), self.padding, device=logits.device
        )
        for image, target in zip(batch, targets, strict=True):
            if "semantic" in target:
                labels = target["semantic"].long()
                labels = labels.masked_fill(labels == UNLABELLED, IGNORED)
            else:
                labels = painted(target["masks"], target["labels"])
            image[: labels.shape[0], : labels.shape[1]] = labels[: image.shape[0], : image.shape[1]]
        goals = batch[:, :: self.stride, :: self.stride]
        pixels = logits.float().permute(0, 2, 3, 1).flatten(0, 2)  # GPUs would add up maps in a random order
        total = F.cross_entropy(pixels, goals.flatten(), ignore_index=IGNORED, reduction="sum")
        return SEMANTIC_WEIGHT * total / (goals != IGNORED).sum().clamp(min=1)


def painted(masks: Tensor, labels: Tensor) -> Tensor:
    """Paint masks [K, H, W] with labels [K] in 1..C: int64 [H, W], the smallest object's label, 0 for no object."""
    result = torch.zeros(masks.shape[1:], dtype=torch.long, device=masks.device)
    for k in masks.flatten(1).sum(1).argsort(descending=True, stable=True).tolist():
        result = torch.where(masks[k] > 0, labels[k], result)  # an index would make a GPU find the pixels first
    return result


class FusedRoIAlign(nn.Module):
    """RoI features of the pyramid plus those of the semantic branch (`features["semantic"]`), at the same side."""

    def __init__(self, pyramid: nn.Module, semantic: nn.Module):
        super().__init__()
        self.pyramid, self.semantic = pyramid, semantic

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Pool boxes [R_i, 4] per image: [R, width, side, side]."""
        pooled = self.pyramid(features, boxes, image_shapes)
        context = self.semantic(features, boxes, image_shapes)
        return pooled + F.avg_pool2d(context, context.shape[-1] // pooled.shape[-1])  # 14 x 14 -> 7 x 7, or itself


class HTCRoIHeads(CascadeRoIHeads):
    """The stages of a Hybrid Task Cascade; called like `RoIHeads`. Training needs masks."""

    def __init__(self, stages: Sequence[RoIHeads], loss_weights: Sequence[float], width: int, semantic: SemanticBranch):
        super().__init__(stages, loss_weights)
        self.semantic = semantic
        self.mask_flow = nn.ModuleList(conv_relu(width, 1) for _ in range(len(stages) - 1))

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """See `CascadeRoIHeads.forward`; there is one more loss, loss_semantic."""
        context, logits = self.semantic(features)
        detections, losses = super().forward({**features, "semantic": context}, proposals, image_shapes, targets)
        if self.training:
            assert targets is not None
            losses["loss_semantic"] = self.semantic.loss(logits, targets)
        return detections, losses

    def with_context(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The maps that boxes are pooled from: the pyramid's and the semantic branch's."""
        return features if "semantic" in features else {**features, "semantic": self.semantic(features)[0]}

    def _mask_samples(
        self, stage: RoIHeads, samples: Samples, moved: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> Samples:
        """Draw samples again from the boxes that the stage has moved, with the stage's threshold."""
        return stage.sample(moved, targets)

    def _mask_features(self, pooled: Tensor, stages: Sequence[int]) -> list[Tensor]:
        """As in the cascade; from the second on, each head also sees the output of the previous head."""
        outputs: list[Tensor] = []
        for number in range(max(stages) + 1):
            inputs = pooled + self.mask_flow[number - 1](outputs[-1]) if outputs else pooled
            outputs.append(self.box_stages[number].mask_head(inputs))
        return [outputs[number] for number in stages]


def fuse_semantic(
    pool: nn.Module, conventions: Conventions, sampling_ratio: int, semantic: SemanticBranch
) -> FusedRoIAlign:
    """Add the semantic branch's features, pooled at 14 x 14, to a pyramid's RoI pooling."""
    return FusedRoIAlign(pool, conventions.roi_align(["semantic"], 14, sampling_ratio, (semantic.stride,)))
