"""Training augmentation: one image with its boxes and masks, changed by torchvision.transforms.v2.

Normalisation, padding, and resizing where none is asked for here, are the detector's own first step.
"""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2


def short_sides(sides: Sequence[int], any_between: bool) -> tuple[int, ...]:
    """The sides to draw from: those given, or every whole number from the first to the last."""
    return tuple(range(sides[0], sides[-1] + 1)) if sides and any_between else tuple(sides)


class _AtLeastOnePixel(v2.Transform):
    """A mixin for torchvision's transforms that draw a size: no side becomes shorter than one pixel."""

    def make_params(self, flat_inputs: list) -> dict:
        """The size to resize to, (height, width)."""
        return {"size": tuple(max(1, side) for side in super().make_params(flat_inputs)["size"])}


class ShortestSize(_AtLeastOnePixel, v2.RandomShortestSize):
    """torchvision's transform, with sides of at least one pixel."""


class Jitter(_AtLeastOnePixel, v2.ScaleJitter):
    """torchvision's transform, with sides of at least one pixel."""


def training_transform(
    flip: float = 0.0, sides: Sequence[int] = (), any_between: bool = False, long_side: int = 1333
) -> v2.Transform:
    """(PIL image, boxes) -> (float [3, H, W] RGB in 0..1, boxes).

    flip: probability of mirroring. sides: one of them, or with `any_between` any whole number from
    the first to the last, becomes the shorter side (to within a pixel), unless that makes the longer
    exceed `long_side`; none: the size stays.
    """
    steps: list[v2.Transform] = [v2.ToImage()]
    if sides:
        steps.append(ShortestSize(list(short_sides(sides, any_between)), long_side))
    if flip > 0:
        steps.append(v2.RandomHorizontalFlip(flip))
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True)])


def jitter_transform(
    scales: Sequence[float], side: int, fill: Sequence[float] = (0.0, 0.0, 0.0), flip: float = 0.0
) -> v2.Transform:
    """Large-scale jitter (Ghiasi et al. 2021): (PIL image, boxes, masks) -> the same in a square of `side` pixels.

    scales: lowest and highest; one between them is drawn, and at scale 1 the longer side of an image has `side` pixels.
    What is larger than the square is cropped and what is smaller is padded, both at a random place. fill: the colour of
    the padding, RGB in 0..1; that of masks is 0. flip: probability of mirroring. Boxes end at the square's border, so a
    box outside has no width or no height.
    """
    colour = [round(255 * min(level, 1.0)) for level in fill]
    steps: list[v2.Transform] = [
        v2.ToImage(),
        Jitter((side, side), (scales[0], scales[-1])),
        v2.RandomCrop(side, pad_if_needed=True, fill={tv_tensors.Image: colour, "others": 0}),
    ]
    if flip > 0:
        steps.append(v2.RandomHorizontalFlip(flip))
    return v2.Compose([*steps, v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)])


def to_input(image: Image.Image) -> Tensor:
    """An RGB image as a detector takes it, float32 [3, H, W] in 0..1; the numbers are those of a validation image."""
    return training_transform()(image).as_subclass(Tensor)
