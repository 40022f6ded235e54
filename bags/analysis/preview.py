"""Pictures of training batches: images as the detector gets them, with boxes, names and masks."""

import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from bags.core.files import replacing

COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")  # by label
LONGEST = 480  # pixels of the longer side of an image in the picture
SMALLEST_ENLARGED = 240  # smaller images are enlarged by a whole number, so that names can be read
HEADING, FONT, GAP = 20, 12, 4  # pixels


def save_preview(path: Path, images: Sequence[Tensor], targets: Sequence[dict], names: Sequence[str]) -> None:
    """Write a PNG of training images in rows, each below a heading of its id and size.

    images: float [3, H, W] RGB in 0..1. targets: boxes [K, 4] in pixels, labels [K] in 1..C, image_id, and optionally
    masks [K, H, W]. names: of the labels 1..C.
    """
    columns = min(4, math.ceil(math.sqrt(len(images))))
    tiles = list(_tiles(images, targets, names))
    width, height = (max(tile.size[side] for tile in tiles) + GAP for side in (0, 1))
    page = Image.new("RGB", (columns * width - GAP, math.ceil(len(tiles) / columns) * height - GAP), "white")
    for number, tile in enumerate(tiles):
        page.paste(tile, (number % columns * width, number // columns * height))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, "wb") as file:
        page.save(file, format="png")


def _tiles(images: Sequence[Tensor], targets: Sequence[dict], names: Sequence[str]) -> Iterator[Image.Image]:
    """Each image with its objects, below its heading."""
    font = font_manager.findfont("DejaVu Sans")
    heading = ImageFont.truetype(font, FONT)
    for image, target in zip(images, targets, strict=True):
        drawing = F.to_pil_image(_draw(image, target, names, font))
        tile = Image.new("RGB", (max(drawing.width, LONGEST // 2), drawing.height + HEADING), "white")
        tile.paste(drawing, (0, HEADING))
        height, width = image.shape[-2:]
        text = f"image {target['image_id']}: {width} x {height}, {len(target['labels'])} objects"
        ImageDraw.Draw(tile).text((2, 2), text, "black", heading)
        yield tile


def _draw(image: Tensor, target: dict, names: Sequence[str], font: str) -> Tensor:
    """An image [3, H, W] in 0..1 with its objects, uint8 [3, h, w], resized to a size that can be looked at."""
    longest = max(image.shape[-2:])
    scale = LONGEST / longest if longest > LONGEST else max(1, SMALLEST_ENLARGED * 2 // longest)
    size = [max(1, round(side * scale)) for side in image.shape[-2:]]
    drawing = F.to_dtype(F.resize(image, size).clamp(0, 1), torch.uint8, scale=True)
    labels = target["labels"].tolist()
    if not labels:
        return drawing
    colours = [COLOURS[label % len(COLOURS)] for label in labels]
    if "masks" in target:
        masks = F.resize(target["masks"], size, F.InterpolationMode.NEAREST).bool()
        drawing = draw_segmentation_masks(drawing, masks, alpha=0.4, colors=colours)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph")
        boxes = target["boxes"] * scale
        texts = [names[label - 1] for label in labels]
        fonts: dict = {"font": font, "font_size": FONT, "label_colors": "white", "label_background_colors": colours}
        return draw_bounding_boxes(drawing, boxes, texts, colours, width=2, fill_labels=True, **fonts)
