"""The tools of several checks: made-up images, small configurations, draws that agree, differences of numbers."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from scripts.benchmarks.measuring import coco_object
from scripts.gpu_checks.running import Place

if TYPE_CHECKING:
    from bags.config.sections import Config
    from bags.data.statistics import CategoryStats

SIDE = 64  # pixels of the small images
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255))  # of the categories
FRAMEWORKS = ("faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn", "htc")
FEW_FRAMEWORKS = ("faster_rcnn", "htc")  # without a GPU
SMALL = {
    "detector": {
        "backbone": "small",
        "fpn_channels": 16,
        "min_size": SIDE,
        "max_size": SIDE,
        "rpn": {"anchor_sizes": [[16], [32]], "batch_size": 32, "train_proposals": 40, "test_proposals": 30},
        "roi": {"batch_size": 16, "sampling_ratio": 1, "fc": 32, "class_agnostic": True},
    },
    "train": {
        "epochs": 2,
        "batch_size": 4,
        "lr": 0.01,
        "warmup_iterations": 3,
        "milestones": [1.5],
        "log_every": 2,
        "checkpoint_every": 4,
    },
    "test": {"batch_size": 4, "max_detections": 30, "figures": False},
}


def make_images(folder: Path, number: int) -> Path:
    """Write images of coloured rectangles on noise, with boxes and polygons; the colour is the category.

    Category c is rarer than those before it. `train.json` serves as training and validation set.
    """
    generator = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    shares = np.array([2.0**-c for c in range(len(COLOURS))])
    images: list[dict] = []
    annotations: list[dict] = []
    for k in range(1, number + 1):
        pixels = generator.integers(90, 130, (SIDE, SIDE, 3), np.uint8)
        for corner in generator.permutation([(2, 2), (2, 34), (34, 2), (34, 34)])[:3].tolist():
            category = int(generator.choice(len(COLOURS), p=shares / shares.sum()))
            width, height = generator.integers(16, 28, 2).tolist()
            x, y = corner
            pixels[y : y + height, x : x + width] = COLOURS[category]
            entry = coco_object(len(annotations) + 1, k, category + 1, [x, y, width, height])
            entry["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
            annotations.append(entry)
        Image.fromarray(pixels).save(folder / "images" / f"{k}.png")
        images.append({"id": k, "file_name": f"{k}.png", "height": SIDE, "width": SIDE})
    categories = [{"id": c + 1, "name": str(c + 1)} for c in range(len(COLOURS))]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "train.json").write_text(json.dumps(content))
    return folder


def small_config(place: Place, *overrides: str, images: int = 16) -> "Config":
    """The configuration of a small detector, and its images, which are made once."""
    from bags.config.load import config_from_dict, override_config

    data = place.folder / "data"
    if not data.exists():
        make_images(data, images)
    tree: dict[str, Any] = {**SMALL, "name": "softmax", "device": place.device, "output": str(place.folder / "runs")}
    tree["data"] = {
        "name": "small",
        "root": str(data),
        "val": "train.json",
        "train_images": "images",
        "val_images": "images",
        "workers": 0,
    }
    return override_config(config_from_dict(tree), list(overrides))


def pieces(config: "Config", sharp: bool = True) -> tuple[nn.Module, Any, "CategoryStats"]:
    """Detector on the CPU with random weights, training loader, statistics. sharp: see `sharpen`."""
    from bags.assembly.loaders import build_train_loader, open_index
    from bags.assembly.models import build_detector
    from bags.data.statistics import CategoryStats

    index = open_index(config, "train")
    stats = CategoryStats.from_index(index)
    torch.manual_seed(config.seed)
    detector = build_detector(config, stats)
    if sharp:
        sharpen(detector)
    return detector, build_train_loader(config, index, stats), stats


@torch.no_grad()
def sharpen(detector: nn.Module) -> None:
    """Spread the scores of a new detector, whose proposals would otherwise be equal up to rounding."""
    heads: Any = detector
    heads.rpn.head.cls_logits.weight *= 30
    for stage in heads.roi_heads.box_stages:
        for parameter in stage.classifier.parameters():
            if parameter.ndim > 1:
                parameter *= 30


def batch_of(config: "Config", loader: Any, device: str, dtype: torch.dtype) -> tuple[list[Tensor], list[dict]]:
    """The first batch of an epoch, in the given precision."""
    from bags.engine.train import to_device

    loader.batch_sampler.start(0)
    images, targets = next(iter(loader))
    targets = [{k: v.to(dtype) if k == "boxes" else v for k, v in target.items()} for target in targets]
    return to_device([image.to(dtype) for image in images], targets, torch.device(device))


@contextlib.contextmanager
def agreeing_draws(seed: int) -> Iterator[None]:
    """Draw random numbers on the CPU and then move them: both devices see the same ones."""
    originals = {name: getattr(torch, name) for name in ("rand", "randperm", "rand_like")}

    def moved(function: Callable) -> Callable:
        """Make the replacement of a function that takes a device."""

        def draw(*arguments: Any, device: Any = None, **options: Any) -> Tensor:
            """Draw on the CPU unless a generator is given."""
            return function(*arguments, **options).to(device or "cpu")

        return draw

    def like(values: Tensor, **options: Any) -> Tensor:
        """Draw numbers of the shape and type of others."""
        return originals["rand"](values.shape, **{"dtype": values.dtype, **options}).to(values.device)

    torch.manual_seed(seed)
    names: dict[str, Any] = vars(torch)
    names.update(rand=moved(originals["rand"]), randperm=moved(originals["randperm"]), rand_like=like)
    try:
        yield
    finally:
        names.update(originals)


def full_fp32() -> None:
    """Switch TF32 off: products have all bits of float32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def synchronise(place: Place) -> None:
    """Wait for the GPU."""
    if place.is_gpu:
        torch.cuda.synchronize()


def timed(place: Place, function: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each call, the GPU waited for; one more call before them is not measured."""
    seconds = []
    for repeat in range(repeats + 1):
        synchronise(place)
        began = time.perf_counter()
        function()
        synchronise(place)
        if repeat:
            seconds.append(time.perf_counter() - began)
    return seconds


def peak_gb(place: Place) -> float | None:
    """Most GPU memory in tensors since `reset_peak`, in GB; None without a GPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if place.is_gpu else None


def reset_peak(place: Place) -> None:
    """Measure `peak_gb` anew."""
    if place.is_gpu:
        synchronise(place)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def relative(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Length of the difference of all numbers over the length of `ours`; infinite where one is not finite."""
    total, apart = 0.0, 0.0
    for own, other in zip(ours, theirs, strict=True):
        own, other = own.detach().double().cpu(), other.detach().double().cpu()
        if own.shape != other.shape:
            return float("inf")
        total += float((own**2).sum())
        apart += float(((own - other) ** 2).sum())
    share = (apart / max(total, 1e-60)) ** 0.5
    return share if np.isfinite(share) else float("inf")
