"""Features as whole numbers of eight or four bits, with the range of each row kept beside them.

A row of D features is its lowest number and the step between two neighbours, both float32, and then the numbers:
D bytes in 0..255 (`uint8`), or D / 2 bytes, rounded up, of two numbers in 0..15 each, the first one in the lower
half (`uint4`). The error is at most half a step, which is 1/510 or 1/30 of a row's range.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

BITS = {"uint8": 8, "uint4": 4}
RANGE = 8  # bytes of the lowest number and of the step


def row_bytes(kind: str, width: int) -> int:
    """Bytes of a row of `width` features; kind is one of BITS."""
    return RANGE + (width * BITS[kind] + 7) // 8


def encode(features: Tensor, kind: str) -> Tensor:
    """Map finite features [..., D] of any floating type to uint8 [..., row_bytes]; kind is one of BITS.

    The lowest and the highest number of a row, and all of a constant row, stay exact up to the rounding of float32.
    """
    features = features.float()
    low = features.amin(-1, keepdim=True)
    step = (features.amax(-1, keepdim=True) - low) / (2 ** BITS[kind] - 1)
    numbers = ((features - low) / step.where(step > 0, 1)).round().to(torch.uint8)
    if kind == "uint4":
        first, second = pad(numbers, (0, numbers.shape[-1] % 2)).unflatten(-1, (-1, 2)).unbind(-1)
        numbers = first | second << 4
    return torch.cat([torch.cat([low, step], -1).view(torch.uint8), numbers], -1)


def decode(rows: Tensor, kind: str, width: int) -> Tensor:
    """Map uint8 [..., row_bytes] to float32 [..., width]; kind is one of BITS."""
    low, step = rows[..., :RANGE].clone(memory_format=torch.contiguous_format).view(torch.float32).split(1, -1)
    numbers = rows[..., RANGE:]
    if kind == "uint4":
        numbers = torch.stack([numbers & 15, numbers >> 4], -1).flatten(-2)[..., :width]
    return numbers.float().mul_(step).add_(low)


class StoredRows(NamedTuple):
    """Features of N rows and S stages in one tensor, as they are or rounded."""

    data: Tensor  # [N, S, width] of the type `kind`, or uint8 [N, S, row_bytes]
    kind: str  # "float16", "float32" or one of BITS
    width: int

    def take(self, numbers: Tensor, stage: int) -> Tensor:
        """Features [R, width] of rows (int64 [R]), float32 where they are rounded, else of their type."""
        rows = self.data[numbers, stage]
        return decode(rows, self.kind, self.width) if self.kind in BITS else rows
