"""Features as whole numbers of eight bits: a quarter of float32, with the range of each row kept beside them.

A row is 8 + D bytes: its lowest number and the step between two neighbours, both float32, and D numbers in 0..255.
The error is at most half a step, so at most 1/510 of a row's range.
"""

import torch
from torch import Tensor

RANGE = 8  # bytes of the lowest number and of the step


def encode(features: Tensor) -> Tensor:
    """Map finite features [..., D] of any floating type to uint8 [..., 8 + D]. Numbers of a constant row stay exact."""
    features = features.float()
    low = features.amin(-1, keepdim=True)
    step = (features.amax(-1, keepdim=True) - low) / 255
    numbers = ((features - low) / step.where(step > 0, 1)).round().to(torch.uint8)
    return torch.cat([torch.cat([low, step], -1).view(torch.uint8), numbers], -1)


def decode(rows: Tensor) -> Tensor:
    """Map uint8 [..., 8 + D] to float32 [..., D]."""
    low, step = rows[..., :RANGE].clone(memory_format=torch.contiguous_format).view(torch.float32).split(1, -1)
    return rows[..., RANGE:].float().mul_(step).add_(low)
