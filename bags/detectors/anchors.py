"""Anchors in float32 at least, and at fixed strides."""

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList


class PreciseAnchors(AnchorGenerator):
    """torchvision's anchors, in float32 where autocast makes feature maps half precision.

    Proposals have the type of their anchors, and from 512 on bfloat16 counts in steps of 4 pixels.
    """

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        """Move the anchors of a cell to a device, as `dtype` or float32."""
        super().set_cell_anchors(torch.promote_types(dtype, torch.float32), device)


class FixedStrideAnchors(PreciseAnchors):
    """torchvision's anchors, centred on multiples of each level's stride. strides: one per level, in pixels.

    torchvision derives strides from the sizes of image and feature map, rounded down. At a side of 800 its P6 gets 61
    instead of 64, and its anchors drift by up to 36 pixels across the image.
    """

    def __init__(
        self, sizes: tuple[tuple[int, ...], ...], aspect_ratios: tuple[tuple[float, ...], ...], strides: tuple[int, ...]
    ) -> None:
        super().__init__(sizes, aspect_ratios)
        self.strides = strides

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Anchors [N, 4] of each image, x1, y1, x2, y2 in pixels of the padded batch, level after level."""
        device, dtype = feature_maps[0].device, feature_maps[0].dtype
        strides = [[torch.full((), stride, dtype=torch.int64, device=device)] * 2 for stride in self.strides]
        self.set_cell_anchors(dtype, device)
        levels = self.grid_anchors([maps.shape[-2:] for maps in feature_maps], strides)
        return [torch.cat(levels)] * len(image_list.image_sizes)
