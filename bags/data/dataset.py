"""Index and image folder -> (image, target)."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from bags.data.index import AnnotationIndex
from bags.data.transforms import training_transform
from bags.errors import UserError


class DetectionDataset(Dataset):
    """Items are (image, target).

    image   float32 [3, H, W], RGB in 0..1
    target  boxes float32 [K, 4] (x1, y1, x2, y2 pixels, inside the image, at least 1e-3 wide and
            high), labels int64 [K] in 1..C, image_id int. Crowd regions are left out.
    """

    def __init__(self, index: AnnotationIndex, image_folder: str | Path, flip: float = 0.0):
        self.index = index
        self.folder = Path(image_folder)
        self.transform = training_transform(flip)
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such image folder; set data.root or data.*_images")

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, dict]:
        """`key` is a position, or (position, seed); augmentation depends on the seed alone."""
        position, seed = key if isinstance(key, tuple) else (key, 0)
        image, target = self.read(position)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            image, target = self.transform(image, target)
        return image.as_subclass(Tensor), {**target, "boxes": target["boxes"].as_subclass(Tensor)}

    def read(self, position: int) -> tuple[Image.Image, dict]:
        """The RGB image and its target, before any transform."""
        image = self._image(position)
        return image, self._target(position, image.size)

    def _target(self, position: int, size: tuple[int, int]) -> dict:
        where = slice(*self.index.starts[position : position + 2])
        width, height = size
        boxes = np.clip(self.index.boxes[where], 0, np.array([width, height, width, height], np.float32))
        kept = ~self.index.crowd[where] & (boxes[:, 2:] - boxes[:, :2] >= 1e-3).all(1)
        return {
            "boxes": tv_tensors.BoundingBoxes(
                torch.from_numpy(boxes[kept]), format="XYXY", canvas_size=(height, width)
            ),
            "labels": torch.from_numpy(self.index.labels[where][kept]),
            "image_id": int(self.index.image_ids[position]),
        }

    def _image(self, position: int) -> Image.Image:
        path = inside(self.folder, self.index.file_name(position))
        image = read_image(path)
        height, width = self.index.image_sizes[position]
        if image.size != (width, height):
            raise UserError(
                f"{path}: {image.width} x {image.height} pixels, but {self.index.path.name} says "
                f"{width} x {height} for image {self.index.image_ids[position]}"
            )
        return image


def inside(folder: Path, name: str) -> Path:
    """The path of `name` below `folder`; a name that leads out of it raises UserError."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"file name '{name}' leads out of the image folder {folder}")
    return path


def read_image(path: Path) -> Image.Image:
    """An RGB image; a missing, truncated or foreign file raises UserError that names it."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path}: no such image") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable image ({error})") from None


def collate(items: list[tuple[Tensor, dict]]) -> tuple[list[Tensor], list[dict]]:
    """A batch as torchvision's detectors take it: images of any sizes, targets."""
    images, targets = zip(*items, strict=True)
    return list(images), list(targets)
