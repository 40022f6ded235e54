"""Image and boxes -> network input. Resizing and normalisation are the detector's own first step."""

import torch
from torchvision.transforms import v2


def training_transform(flip: float) -> v2.Transform:
    """(PIL image, target) -> (float [3, H, W] RGB in 0..1, target), mirrored with probability `flip`."""
    steps = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    if flip > 0:
        steps.insert(1, v2.RandomHorizontalFlip(flip))
    return v2.Compose(steps)
