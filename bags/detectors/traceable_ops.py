"""Operations of a detector without constants of the traced image: resizing, suppression and RoI pooling.

A trace records operations of tensors and keeps every Python number as a constant. Sizes and counts are therefore
tensors here, and no branch depends on them. All functions also work without tracing, which tests rely on.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import MultiScaleRoIAlign, batched_nms, roi_align

from bags.core.errors import UserError
from bags.detectors.htc import FusedRoIAlign
from bags.detectors.released import ReleasedRoIAlign


def length(values: Tensor, dimension: int = 0) -> Tensor:
    """The size of a dimension as an int64 tensor without dimensions."""
    return torch._shape_as_tensor(values)[dimension]


def _numbers(end: Tensor) -> Tensor:
    """0 to end - 1, int64, for an `end` without dimensions."""
    return torch.arange(cast(Any, end))


def sigmoid(logits: Tensor) -> Tensor:
    """Sigmoids whose order is that of the logits; ONNX Runtime's own operator gives all below -18 the same value."""
    return 1 / (1 + (-logits).exp())


def best(scores: Tensor, number: int) -> Tensor:
    """Indices of the `number` highest of [N] scores, by falling score; of all where N is smaller."""
    return scores.topk(cast(Any, length(scores).clamp(max=number))).indices


def resize(image: Tensor, size: Tensor) -> Tensor:
    """Resize [3, H, W] bilinearly to `size` [2] (height, width), as `F.interpolate` does without aligned corners."""
    for dimension in (1, 2):
        old = length(image, dimension)
        new = size[dimension - 1]
        scale = (old.float() / new.float()).double()  # the position is rounded once, as by a fused operation
        source = (_numbers(new).double() + 0.5).mul(scale).sub(0.5).float()
        source = source.clamp(min=0)
        low = source.floor()
        shape = (1, -1, 1) if dimension == 1 else (1, 1, -1)
        share = (source - low).reshape(shape)
        first = low.long().minimum(old - 1)
        second = (first + 1).minimum(old - 1)
        image = image.index_select(dimension, first) * (1 - share) + image.index_select(dimension, second) * share
    return image


def resize_levels(image: Tensor, size: Tensor) -> Tensor:
    """Resize [3, H, W] in 0..1 to `size` [2] in whole levels, as `released_pixels.resize_image` does."""
    levels = (image * 255).round().long()
    top, bottom, *down = _taps(length(image, 1), size[0], clamp_weights=False)
    left, right, *across = _taps(length(image, 2), size[1], clamp_weights=True)
    lines = levels.index_select(2, left) * across[0] + levels.index_select(2, right) * across[1]
    upper, lower = lines.index_select(1, top), lines.index_select(1, bottom)
    parts = [
        _shifted(weight[:, None] * _shifted(line, 4), 16) for weight, line in zip(down, (upper, lower), strict=True)
    ]
    resized = _shifted(parts[0] + parts[1] + 2, 2).float() / 255
    unchanged = ((size[0] == length(image, 1)) & (size[1] == length(image, 2))).float()  # keeps values between levels
    lost = (image - levels.float() / 255).index_select(1, top).index_select(2, left)
    return resized + unchanged * lost


def _shifted(values: Tensor, bits: int) -> Tensor:
    """`values >> bits` as a division, because ONNX shifts only unsigned numbers."""
    return torch.div(values, 2**bits, rounding_mode="floor")


def _taps(old: Tensor, new: Tensor, clamp_weights: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`released_pixels._taps` of one side of `old` pixels: two indices and their weights in 2048ths, [new] each."""
    scale = 1 / (new.double() / old.double())
    at = ((_numbers(new) + 0.5) * scale - 0.5).float()
    low = at.floor().long()
    part = at - low
    if clamp_weights:
        part = torch.where((low < 0) | (low >= old - 1), torch.zeros_like(part), part)
    first, second = ((share * 2048).round().long() for share in (1 - part, part))
    return low.clamp(min=0).minimum(old - 1), (low + 1).clamp(min=0).minimum(old - 1), first, second


class Suppress(torch.autograd.Function):
    """Greedy suppression within every (set of boxes, class), which becomes ONNX's NonMaxSuppression.

    boxes [B, N, 4] x1, y1, x2, y2; scores [B, G, N]. Candidates score above `score_threshold`; at most `most` of each
    (set, class) are kept. The result is [S, 3] int64: set, class, box.
    """

    @staticmethod
    def forward(
        ctx: Any, boxes: Tensor, scores: Tensor, most: int, iou_threshold: float, score_threshold: float
    ) -> Tensor:
        """Suppress with torchvision's `batched_nms`; the order of the result is another one than ONNX's."""
        candidates = (scores > score_threshold).nonzero()
        sets, classes, rows = candidates.unbind(1)
        groups = sets * scores.shape[1] + classes
        kept = batched_nms(boxes[sets, rows], scores[sets, classes, rows], groups, iou_threshold)
        kept = kept[groups[kept].argsort(stable=True)]
        first = torch.searchsorted(groups[kept], groups[kept])
        return candidates[kept[torch.arange(len(kept)) - first < most]]

    @staticmethod
    def symbolic(g: Any, boxes: Any, scores: Any, most: int, iou_threshold: float, score_threshold: float) -> Any:
        """The same as an operator of ONNX."""
        numbers = [
            g.op("Constant", value_t=torch.tensor([most], dtype=torch.long)),
            g.op("Constant", value_t=torch.tensor([iou_threshold], dtype=torch.float)),
            g.op("Constant", value_t=torch.tensor([score_threshold], dtype=torch.float)),
        ]
        selected = g.op("NonMaxSuppression", boxes, scores, *numbers)
        selected.setType(scores.type().with_dtype(torch.long).with_sizes([None, 3]))
        return selected


def suppress(boxes: Tensor, scores: Tensor, most: int, iou_threshold: float, score_threshold: float) -> Tensor:
    """See `Suppress`."""
    return Suppress.apply(boxes, scores, most, float(iou_threshold), float(score_threshold))


def pool(pooling: nn.Module, features: dict[str, Tensor], boxes: Tensor) -> Tensor:
    """Pool boxes [R, 4] of the only image of a batch: [R, channels, side, side].

    `pooling` must have been called once, because torchvision's finds the strides of its maps in the first call.
    Raises UserError for a pooling that is not known here.
    """
    if isinstance(pooling, FusedRoIAlign):
        sides = [cast(Any, part).output_size[0] for part in (pooling.pyramid, pooling.semantic)]
        pooled, context = (pool(part, features, boxes) for part in (pooling.pyramid, pooling.semantic))
        return pooled + F.avg_pool2d(context, sides[1] // sides[0])  # 14 x 14 -> 7 x 7, or itself
    if not isinstance(pooling, MultiScaleRoIAlign) or type(pooling) not in (MultiScaleRoIAlign, ReleasedRoIAlign):
        raise UserError(f"export: RoI pooling by {type(pooling).__name__} cannot be exported, only torchvision's")
    maps = [value for name, value in features.items() if name in pooling.featmap_names]
    if isinstance(pooling, ReleasedRoIAlign):
        scales = [1 / stride for stride in pooling.strides]
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:].maximum(boxes[:, :2])], dim=1)
        side = (boxes[:, 2] - boxes[:, 0]).mul(boxes[:, 3] - boxes[:, 1]).sqrt()
        levels = torch.log2(side / (14 * pooling.strides[0]) + 1e-6).floor().clamp(0, len(maps) - 1).long()
    else:
        scales = cast(Any, pooling.scales)
        levels = cast(Any, pooling.map_levels)([boxes]) if len(maps) > 1 else torch.zeros_like(boxes[:, 0]).long()
    shifts = [1 / scale / 2 if isinstance(pooling, ReleasedRoIAlign) else 0.0 for scale in scales]
    rois = F.pad(boxes, (1, 0))  # image 0
    rows, parts = [], []
    for level, (level_map, scale, shift) in enumerate(zip(maps, scales, shifts, strict=True)):
        rows.append((levels == level).nonzero().squeeze(1))
        regions = rois.index_select(0, rows[-1]) + torch.tensor([0, *[shift] * 4])
        size, samples, aligned = pooling.output_size, pooling.sampling_ratio, isinstance(pooling, ReleasedRoIAlign)
        parts.append(roi_align(level_map, regions, size, scale, samples, aligned))
    return torch.cat(parts).index_select(0, torch.cat(rows).argsort())


def paste(masks: Tensor, corners: Tensor, size: Tensor) -> Tensor:
    """Put masks [K, M, M] into images of `size` [2] (height, width): [K, 1, height, width], 0 outside their boxes.

    corners [K, 4] int64: x1, y1 and the last column and row. The values are those of `masks.paste` of `masks.crops`.
    """
    across = _hat(corners[:, 0], corners[:, 2], size[1], masks.shape[-1])
    down = _hat(corners[:, 1], corners[:, 3], size[0], masks.shape[-1])
    return (down @ masks @ across.transpose(1, 2))[:, None]


def _hat(first: Tensor, last: Tensor, number: Tensor, side: int) -> Tensor:
    """Weights [K, number, side] of the pixels of a mask of `side` in those of an image, between `first` and `last`."""
    width = (last - first + 1).clamp(min=1)[:, None]
    at = _numbers(number)[None] - first[:, None]
    source = ((at + 0.5) * (torch.tensor(float(side)) / width) - 0.5).clamp(0, side - 1)
    weights = (1 - (source[..., None] - torch.arange(side)).abs()).clamp(min=0)
    return weights * ((at >= 0) & (at < width)).float()[..., None]
