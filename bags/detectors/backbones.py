"""Images -> feature pyramid."""

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FeaturePyramidNetwork


class SmallFPN(nn.Module):
    """A four-stage CNN with a feature pyramid, for small images and CPUs.

    [B, 3, H, W] -> {"0": [B, channels, H/4, W/4], "1": .../8, "2": .../16}, the first `levels` of them;
    H and W divide by 16.
    """

    def __init__(self, channels: int = 64, levels: int = 3):
        super().__init__()
        self.out_channels, self.levels = channels, levels
        widths = (32, 64, 128, 192)
        self.stem = _conv(3, widths[0], stride=2)
        self.stages = nn.ModuleList(
            [
                _conv(widths[0], widths[1], stride=2),
                nn.Sequential(_conv(widths[1], widths[2], stride=2), _conv(widths[2], widths[2])),
                nn.Sequential(_conv(widths[2], widths[3], stride=2), _conv(widths[3], widths[3])),
            ]
        )
        self.fpn = FeaturePyramidNetwork(list(widths[1:]), channels)
        for unused in range(levels, len(self.stages)):  # these levels only feed the ones below them
            self.fpn.layer_blocks[unused] = nn.Identity()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """See the class."""
        features, maps = self.stem(images), {}
        for level, stage in enumerate(self.stages):
            features = stage(features)
            maps[str(level)] = features
        pyramid = self.fpn(maps)
        return {level: pyramid[level] for level in list(pyramid)[: self.levels]}


def _conv(width_in: int, width: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width_in, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
    )


def resnet_fpn(name: str, channels: int) -> nn.Module:
    """torchvision's ResNet with a pyramid at strides 4..64, from scratch: nothing frozen, batch norm trained."""
    backbone = resnet_fpn_backbone(
        backbone_name=name, weights=None, trainable_layers=5, norm_layer=torch.nn.BatchNorm2d
    )
    if channels != backbone.out_channels:
        widths = [block.in_channels for block in (m[0] for m in backbone.fpn.inner_blocks)]
        extra = torchvision.ops.feature_pyramid_network.LastLevelMaxPool()
        backbone.fpn = FeaturePyramidNetwork(widths, channels, extra)
        backbone.out_channels = channels
    return backbone
