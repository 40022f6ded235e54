"""Simple Copy-Paste (Ghiasi et al., CVPR 2021): objects of one training image, pasted into another."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from bags.data.dataset import OF_OBJECTS, DetectionDataset

STREAM = 2**31  # added to an image's seed, which is below it, so that pasting has random numbers of its own
CHANCE = 0.5  # of each object to be pasted


class CopyPaste(Dataset):
    """A dataset whose images get objects of other ones, as its own transform has left both.

    dataset      with masks; its items are those of `DetectionDataset`
    probability  0..1, that an image gets any
    masks        whether the targets keep their masks, or only boxes follow from them

    The other image is drawn from all of the dataset with equal chances, and each of its objects is pasted with a chance
    of a half. Everything is drawn from the image's seed alone. It may be the same image, with other augmentation.
    """

    def __init__(self, dataset: DetectionDataset, probability: float, masks: bool = True):
        self.dataset, self.probability, self.masks = dataset, probability, masks
        self.max_bad = dataset.max_bad

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, dict]:
        """`key` is a position, or (position, seed); everything drawn depends only on the seed."""
        seed = key[1] if isinstance(key, tuple) else 0
        image, target = self.dataset[key]
        generator = torch.Generator().manual_seed(STREAM + seed)
        if float(torch.rand((), generator=generator)) < self.probability:
            other = int(torch.randint(len(self), (), generator=generator))
            other_seed = int(torch.randint(STREAM, (), generator=generator))
            source, source_target = self.dataset[other, other_seed]
            chosen = torch.rand(len(source_target["labels"]), generator=generator) < CHANCE
            unread = [*target.get("unread", ()), *source_target.get("unread", ())]
            image, target = paste(image, target, source, source_target, chosen)
            target |= {"unread": unread} if unread else {}
        if not self.masks:
            target.pop("masks")
        return image, target


def paste(image: Tensor, target: dict, source: Tensor, source_target: dict, chosen: Tensor) -> tuple[Tensor, dict]:
    """Paste the `chosen` objects [K2] (bool) of a source into an image: (image, target), all of them new.

    Images are float [3, H, W] and [3, H2, W2]; both have their upper left corner at the same place, and what of the
    source is outside the image is cut off. Targets hold boxes [K, 4] (x1, y1, x2, y2 in pixels), labels [K] in 1..C and
    masks uint8 [K, H, W] in {0, 1}, and may hold semantic uint8 [H, W].

    An object without a visible pixel is removed; where pixels are hidden or cut off, the mask loses them and the box
    becomes that of the mask. The pasted objects keep their masks, also where they overlap each other. (Ghiasi et al.
    2021, section 3: I1 * alpha + I2 * (1 - alpha), without smoothing of alpha.)
    """
    size = image.shape[-2:]
    pasted = {key: source_target[key][chosen & _visible(source_target["masks"])] for key in OF_OBJECTS}
    whole = pasted["masks"]
    pasted["masks"] = _fitted(whole, size)
    pasted = _follow(pasted, pasted["masks"].flatten(1).sum(1) < whole.flatten(1).sum(1))
    alpha = pasted["masks"].bool().any(0)
    left = target["masks"] * ~alpha
    hidden = _follow({**{key: target[key] for key in OF_OBJECTS}, "masks": left}, _visible(target["masks"] * alpha))
    result = target | {key: torch.cat([hidden[key], pasted[key]]) for key in OF_OBJECTS}
    if "semantic" in target:
        result["semantic"] = torch.where(alpha, _fitted(source_target["semantic"], size), target["semantic"])
    return torch.where(alpha, _fitted(source, size), image), result


def _fitted(maps: Tensor, size: torch.Size) -> Tensor:
    """Maps [..., H2, W2] cut off and padded with 0 to a size (height, width), at the lower and right ends."""
    height, width = size
    missing = max(0, width - maps.shape[-1]), max(0, height - maps.shape[-2])
    return torch.nn.functional.pad(maps[..., :height, :width], (0, missing[0], 0, missing[1]))


def _follow(objects: dict, changed: Tensor) -> dict:
    """Objects with a mask; the boxes of those that have `changed` [K] (bool) become those of their masks [K, H, W]."""
    boxes, masks = objects["boxes"].clone(), objects["masks"]
    for k in torch.where(changed)[0].tolist():
        rows, columns = torch.where(masks[k].any(1))[0], torch.where(masks[k].any(0))[0]
        if len(rows):
            corners = [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
            boxes[k] = torch.tensor(corners, dtype=boxes.dtype)
    visible = _visible(masks) | ~changed
    return {"boxes": boxes[visible], "labels": objects["labels"][visible], "masks": masks[visible]}


def _visible(masks: Tensor) -> Tensor:
    """Which masks [K, H, W] have a pixel, bool [K]."""
    return masks.bool().flatten(1).any(1)
