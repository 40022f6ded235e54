"""Images -> feature pyramid."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision.ops import DeformConv2d, FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from bags.core.errors import UserError
from bags.detectors.weights import need_cache, read_state

STRIDES = {"small": (4, 8, 16), "resnet": (4, 8, 16, 32, 64), "mobilenet": (32, 32, 64)}


class Backbone(nn.Module):
    """The interface of a backbone: images [B, 3, H, W] -> maps [B, out_channels, H_l, W_l], finest first.

    torchvision's backbones get the same attributes in `build_backbone`, but have another base class.
    """

    out_channels: int  # of every map
    strides: Sequence[int]  # of the maps, in pixels
    roi_levels: list[str]  # names of the maps that RoIs are taken from, not of the level that torchvision adds


def build_backbone(
    name: str,
    channels: int,
    levels: int,
    frozen_batch_norm: bool | str,
    frozen_stages: int,
    deformable_stages: Sequence[int] = (),
) -> Backbone:
    """Build an untrained backbone with a feature pyramid.

    name               small, or a ResNet, ResNeXt or MobileNet of torchvision
    channels           width of the pyramid
    levels             of `small`, 2 or 3; other backbones ignore it
    frozen_batch_norm  True: statistics and affine parameters stay as loaded (eps 1e-5); "statistics": only the
                       statistics do, as in the paper's code; `small` has no loaded weights and ignores it
    frozen_stages      the stem and so many of the following stages are not trained; 0: all are trained
    deformable_stages  stages of a ResNet, of 1 to 4, whose 3x3 convolutions are deformable
    """
    if name == "small":
        return SmallFPN(channels, levels)
    kinds = {True: FrozenBatchNorm, False: nn.BatchNorm2d, "statistics": FixedStatistics}
    options = {"backbone_name": name, "weights": None, "norm_layer": kinds[frozen_batch_norm]}
    family = "mobilenet" if name.startswith("mobilenet") else "resnet"
    if family == "mobilenet":
        backbone = mobilenet_backbone(fpn=True, trainable_layers=6 - frozen_stages, **options)
    else:
        backbone = resnet_fpn_backbone(trainable_layers=4 - frozen_stages if frozen_stages else 5, **options)
        for stage in deformable_stages:
            for block in backbone.body[f"layer{stage}"]:
                block.conv2 = DeformableConv(block.conv2)
                block.conv2.requires_grad_(stage > frozen_stages)
    if channels != backbone.out_channels:
        widths = [block[0].in_channels for block in backbone.fpn.inner_blocks]
        backbone.fpn = FeaturePyramidNetwork(widths, channels, LastLevelMaxPool())
        backbone.out_channels = channels
    backbone.strides = STRIDES[family]
    backbone.roi_levels = list(map(str, range(len(backbone.strides) - 1)))
    return backbone


def load_backbone_weights(backbone: Any, name: str, source: str) -> None:
    """Load the weights of torchvision's classification network `name` into a backbone's body.

    source: a name such as IMAGENET1K_V1, whose file is fetched and its hash checked; or a file with a state dict, which
    may be that of a detector of this project.
    Raises UserError for anything that does not hold exactly this backbone's weights.
    """
    if Path(source).suffix in (".pth", ".pt"):
        if not Path(source).exists():
            raise UserError(f"detector.backbone_weights: {source}: no such file")
        state = read_state(source)
    else:
        weights = torchvision.models.get_model_weights(name)
        if source not in weights.__members__:
            known = ", ".join(weights.__members__)
            raise UserError(f"detector.backbone_weights: {source}: expected a .pth file or one of: {known}")
        need_cache(weights[source].url)
        try:
            state = weights[source].get_state_dict(progress=True, check_hash=True)
        except OSError as error:
            raise UserError(
                f"detector.backbone_weights: {source}: {weights[source].url} cannot be fetched ({error}); "
                "name a local .pth file of it, or null to start from random weights"
            ) from None
    state = {key.removeprefix("backbone.body.").removeprefix("features."): value for key, value in state.items()}
    new = backbone.body.state_dict()
    misfits = [key for key, value in new.items() if key not in state or state[key].shape != value.shape]
    misfits = [key for key in misfits if not key.endswith("num_batches_tracked") and ".offsets." not in key]
    if misfits:
        raise UserError(
            f"detector.backbone_weights: {source}: not the weights of {name}: {misfits[0]} is missing or of another "
            "shape"
        )
    backbone.body.load_state_dict({key: state[key] for key in new if key in state}, strict=False)


class FixedStatistics(nn.BatchNorm2d):
    """Batch normalisation whose statistics stay as loaded, while its affine parameters are trained."""

    def train(self, mode: bool = True) -> "FixedStatistics":
        """Stay in evaluation mode."""
        return super().train(False)


class FrozenBatchNorm(torchvision.ops.FrozenBatchNorm2d):
    """torchvision's frozen batch normalisation; under autocast its outputs stay in the half precision of its inputs."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, C, H, W]."""
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class DeformableConv(DeformConv2d):
    """A 3x3 convolution whose nine taps move by learnt offsets (Dai et al. 2017).

    It replaces the second convolution of a residual block and starts equal to it, with offsets of 0.
    """

    def __init__(self, plain: nn.Conv2d):
        """Copy the shape and the weights of `plain`."""
        geometry = {name: getattr(plain, name) for name in ("stride", "padding", "dilation")}
        super().__init__(
            plain.in_channels, plain.out_channels, 3, groups=plain.groups, bias=plain.bias is not None, **geometry
        )
        self.load_state_dict(plain.state_dict())
        self.offsets = nn.Conv2d(plain.in_channels, 18, 3, **geometry)  # (y, x) of each tap, row by row
        for parameter in self.offsets.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor) -> Tensor:
        """Convolve [B, in_channels, H, W] to [B, out_channels, H', W']."""
        offsets = self.offsets(features)
        with torch.autocast(features.device.type, enabled=False):  # not every device supports half precision
            return super().forward(features.to(self.weight.dtype), offsets.to(self.weight.dtype))


class SmallFPN(Backbone):
    """A four-stage CNN with a feature pyramid, for small images and CPUs.

    [B, 3, H, W] -> {"0": [B, channels, H/4, W/4], "1": .../8, "2": .../16}, the first `levels` of them;
    H and W divide by 16.
    """

    def __init__(self, channels: int = 64, levels: int = 3):
        super().__init__()
        self.out_channels, self.levels = channels, levels
        self.strides, self.roi_levels = STRIDES["small"][:levels], list(map(str, range(levels)))
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
        for unused in range(levels, len(self.stages)):  # these levels only feed the finer levels
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
