"""Seconds and memory against the number of images, up to 100,000, as many as LVIS v1 has for training."""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.benchmarks.data import write_lvis_like
from scripts.benchmarks.measuring import cost, growth, in_process, peak

if TYPE_CHECKING:
    from bags.engine.features import FeatureStore

ROWS, WIDTH = 32, 64  # of a stored image: an eighth of the proposals and a sixteenth of the features of R50-FPN at LVIS
FOUND = 20  # detections in an image


def scale_images(arguments: argparse.Namespace) -> list[dict]:
    """1,000, 10,000 and (with --full) 100,000 images with 12.7 objects each, of 1,203 categories.

    Memory is what the process's peak rises by. The exponent is of the growth from the second size on: 1 is linear.
    """
    sizes = (1_000, 10_000, 100_000) if arguments.full else (100, 1_000, 10_000)
    costs: dict[str, list[dict]] = {}
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            path = Path(name, "train.json")
            in_process(write_lvis_like, path, size * 127 // 10)
            for part in (index, sampling, store, scoring):
                for what, one in in_process(part, path).items():
                    costs.setdefault(what, []).append(one)
    units = (("s", "s"), ("MB", "mb"))
    return [
        growth(f"{what}, {unit}", sizes, [one[key] for one in found])
        for what, found in costs.items()
        for unit, key in units
    ]


def index(path: Path) -> dict[str, dict]:
    """The annotations, packed at first and then opened."""
    from bags.data.index import AnnotationIndex

    built = peak(lambda: AnnotationIndex.open(path))
    return {"index: first build": built, "index: open": cost(lambda: AnnotationIndex.open(path), 5)}


def sampling(path: Path) -> dict[str, dict]:
    """Batches of an epoch, all images, and categories in turn."""
    from bags.data.index import AnnotationIndex
    from bags.data.samplers import ClassBalancedSampler, RepeatFactorSampler, repeat_factors

    annotations = AnnotationIndex.open(path)
    samplers: dict[str, Callable] = {
        "repeat factors": lambda: RepeatFactorSampler(repeat_factors(annotations, 0.001), 16, 0),
        "class-balanced": lambda: ClassBalancedSampler(annotations, 16, 0),
    }
    return {
        f"sampler and an epoch's batches: {name}": peak(lambda m=make: list(m())) for name, make in samplers.items()
    }


def store(path: Path) -> dict[str, dict]:
    """Made-up features, written, compared with their checksums, and drawn once from each image."""
    from bags.assembly.stored_samples import TrainingFeatures
    from bags.data.index import AnnotationIndex

    images = len(AnnotationIndex.open(path))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def draw() -> None:
            """16 rows of each image."""
            data = TrainingFeatures(made_up_store(folder, images), 0.0, 16, 0.25, resident=False)
            for position in range(images):
                data[position, position]

        return {
            "store: write": peak(lambda: made_up_store(folder, images)),
            "store: open": peak(lambda: made_up_store(folder, images)),
            "store: open, and an epoch": peak(draw),
        }


def made_up_store(folder: Path, images: int) -> "FeatureStore":
    """A store with the same random features for each image, a quarter of them of objects; written if it is missing."""
    import numpy as np
    import torch

    from bags.engine.features import View, open_store, pool_row
    from bags.engine.shards import Layout, Record

    rows = np.zeros(ROWS, pool_row(1))
    rows["label"][: ROWS // 4] = 1
    features = torch.randn(ROWS, 1, WIDTH, generator=torch.Generator().manual_seed(0)).half()

    def records(_: object, __: object, positions: list[int]) -> "list[Record]":
        """One view of each image."""
        return [Record(features, rows, (position, False)) for position in positions]

    def nothing(plan: list[list[int]]) -> Any:
        """What a loader would give."""
        return ((None, None) for _ in plan)

    layout = Layout("float16", pool_row(1), View, 1, WIDTH)
    return open_store(folder, {"made": "up"}, layout, images, nothing, records, 64, "store")


def scoring(path: Path) -> dict[str, dict]:
    """From annotations and a results file to AP, 20 detections an image around its objects."""
    from bags.data.index import AnnotationIndex
    from bags.evaluation.detection_ap import evaluate

    annotations = AnnotationIndex.open(path)
    results = path.with_name("results.json")
    with results.open("w") as file:
        for image, (first, last) in enumerate(zip(annotations.starts, annotations.starts[1:], strict=False)):
            for k in range(FOUND if last > first else 0):
                x1, y1, x2, y2 = annotations.boxes[first + k % (last - first)].tolist()
                found = {
                    "image_id": int(annotations.image_ids[image]),
                    "category_id": int(annotations.labels[first + k % (last - first)]),
                    "bbox": [x1 + k, y1, x2 - x1, y2 - y1],
                    "score": 1 / (k + 1.5),
                }
                file.write((", " if file.tell() else "[") + json.dumps(found))
        file.write("]")
    return {f"scoring: {FOUND} detections an image": peak(lambda: evaluate(path, results))}
