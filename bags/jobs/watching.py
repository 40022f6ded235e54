"""What a run shows while it is trained: pictures of validation images, and numbers for TensorBoard."""

import re
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from bags.analysis.examples import TRUTH, judged
from bags.config.sections import Config
from bags.core.errors import UnreadableImage
from bags.data.dataset import DetectionDataset
from bags.data.statistics import CategoryStats
from bags.detectors.faster_rcnn import FasterRCNN
from bags.engine.board import Board
from bags.engine.predict import results_entries

IMAGES, BOXES = 4, 8  # shown images, and the best detections of each
SHOWN = re.compile(r"(mask_)?(AP|AR|ACC)(\d+|[rcfsml]|bg|_tail|_head|_fixed)?|(mask_)?AP(50|75)")


def picture_file(folder: Path, epoch: int) -> Path:
    """The drawing of a run after so many epochs."""
    return folder / f"figures/after_epoch_{epoch}.png"


def draw_validation(
    detector: FasterRCNN,
    dataset: DetectionDataset,
    stats: CategoryStats,
    path: Path,
    epoch: int,
    device: torch.device,
) -> bool:
    """Draw a few validation images with their objects, and with the best detections of each; whether it was done.

    The images have objects and are spread evenly over the validation set. No random numbers are drawn, and every
    module is left in the mode that it was in. What cannot be read or written is a warning.
    """
    from bags.analysis.plots import plot_predictions

    positions = np.unique(dataset.index.owners[~dataset.index.crowd])
    positions = positions[np.linspace(0, len(positions) - 1, min(IMAGES, len(positions))).round().astype(int)]
    name_of = dict(zip(stats.category_ids, stats.names, strict=True))
    images, truths, drawings = [], [], []
    modes = [(module, module.training) for module in detector.modules()]
    detector.eval()
    try:
        for position in positions.tolist():
            image, target = dataset.read(position)
            names = [stats.names[label - 1] for label in target["labels"].tolist()]
            truth = {"boxes": target["boxes"].numpy(), "names": names}
            with torch.inference_mode():
                detection = detector([dataset[position][0].to(device)])[0]
            best = detection["scores"].argsort(descending=True, stable=True)[:BOXES]
            kept = {key: detection[key][best] for key in ("boxes", "labels", "scores")}
            entries = results_entries(target["image_id"], kept, stats.category_ids)
            drawings.append(judged(entries, truth, name_of, least=0))
            images.append(image)
            truths.append(truth | {"colours": [TRUTH] * len(names)})
        title = f"after epoch {epoch}"
        caption = f"the {BOXES} best detections of each image; green: right, red: wrong"
        plot_predictions(path, images, {"annotated": truths, title: drawings}, caption)
    except (UnreadableImage, OSError) as error:
        print(f"warning: no picture after epoch {epoch}: {error}", file=sys.stderr)
        return False
    finally:
        for module, mode in modes:
            module.training = mode
    return True


def validation_tags(metrics: Mapping[str, float]) -> dict[str, float]:
    """Numbers of a validation by tag: AP of the bins and of the frequency groups, AR, accuracy of proposals."""
    return {f"validation/{name}": value for name, value in metrics.items() if SHOWN.fullmatch(name)}


def to_board(config: Config, epoch: int, metrics: Mapping[str, float], picture: Path | None) -> None:
    """Write a validation after so many epochs to TensorBoard's files, where the configuration asks for them."""
    if config.train.tensorboard:
        with Board(config.run_folder / "tensorboard/validation", epoch) as board:
            board.numbers(epoch, validation_tags(metrics))
            if picture:
                board.picture(epoch, "validation/examples", picture)
