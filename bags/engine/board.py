"""Numbers and pictures of a run for TensorBoard, where train.tensorboard asks for them."""

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from bags.core.errors import UserError
from bags.core.files import naming

FLUSHED = 10  # seconds until what is written can be seen


def need_tensorboard() -> None:
    """Raise UserError where the package tensorboard is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "train.tensorboard=true: the package tensorboard is missing: pip install tensorboard, or leave the key out"
        )


class Board:
    """The event files in a folder, for one process.

    first_step: the step of the first event; those of an earlier process from there on are replaced.
    """

    def __init__(self, folder: Path, first_step: int):
        need_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        with naming(folder):
            self.writer = SummaryWriter(str(folder), purge_step=first_step, flush_secs=FLUSHED)

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def numbers(self, step: int, numbers: Mapping[str, float | None]) -> None:
        """Add numbers by tag; a tag such as `loss/sum` has its group first. None and NaN are left out."""
        for tag, number in numbers.items():
            if number is not None and not math.isnan(number):
                self.writer.add_scalar(tag, number, step)

    def picture(self, step: int, tag: str, path: Path) -> None:
        """Add an image file."""
        with Image.open(path) as image:
            self.writer.add_image(tag, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Write what is left."""
        with naming(self.folder):
            self.writer.close()


def training_tags(logged: Mapping[str, object]) -> dict[str, float | None]:
    """The numbers of a line of log.jsonl by tag: losses, learning rate, speed."""
    tags: dict[str, float | None] = {}
    for key, value in logged.items():
        if key.startswith("loss") and isinstance(value, int | float | None):
            tags[f"loss/{key.removeprefix('loss_') if key != 'loss' else 'sum'}"] = value
        elif key in ("lr", "images_per_s") and isinstance(value, int | float | None):
            tags[f"training/{key}"] = value
    return tags
