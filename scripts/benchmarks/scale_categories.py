"""Seconds and memory against the number of categories: COCO's 80, LVIS's 1,203, V3Det's 13,204, and 21,000."""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.benchmarks.measuring import coco_object, cost, growth, in_process, peak

if TYPE_CHECKING:
    from torch import Tensor

    from bags.classifiers.base import BoxFeatures
    from bags.classifiers.group_softmax import GroupSoftmax

SIZES = (80, 1203, 13204, 21000)
IMAGES, SIDE, OBJECTS = 1100, 96, 20  # of the whole jobs: 22,000 objects, so that each category has one


def scale_categories(arguments: argparse.Namespace) -> list[dict]:
    """Parts of a job at LVIS's settings and, with --full, whole jobs of a small detector on 1,100 small images.

    Memory is what the process's peak rises by. The exponent is of the growth from the second size on: 1 is linear.
    """
    parts: dict[str, Callable] = {
        "loss of BAGS, 512 proposals": loss,
        "step of the classifier stage, 2,048 proposals": stage_step,
        "detections of an image, 1,000 proposals": detections,
        "scoring 500 images, 150,000 detections": scoring,
    }
    table = []
    for what, part in parts.items():
        table += lines(what, [in_process(part, size, arguments.repeats) for size in SIZES])
    if arguments.full:
        jobs = [in_process(whole_job, size) for size in SIZES]
        for what in jobs[0]:
            table += lines(what, [job[what] for job in jobs])
    return table


def lines(what: str, found: list[dict]) -> list[dict]:
    """Two lines of the table: seconds, and MB."""
    return [growth(f"{what}, {unit}", SIZES, [one[key] for one in found]) for unit, key in (("s", "s"), ("MB", "mb"))]


def loss(categories: int, repeats: int) -> dict:
    """Forward and backward from logits [512, D]."""
    import torch

    torch.manual_seed(0)
    classifier, labels = bags_classifier(categories), drawn_labels(categories, 512)
    width = classifier(features(1)).shape[1]

    def once() -> None:
        """The loss and its gradient."""
        logits = torch.randn(512, width, requires_grad=True)
        torch.stack(list(classifier.loss(logits, labels).values())).sum().backward()

    return cost(once, repeats)


def stage_step(categories: int, repeats: int) -> dict:
    """Forward, loss, backward and SGD, from the stored features of four images."""
    import torch

    torch.manual_seed(0)
    classifier = bags_classifier(categories)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.01, momentum=0.9)
    proposals, labels = features(2048), drawn_labels(categories, 2048)

    def once() -> None:
        """One step."""
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(classifier.loss(classifier(proposals), labels).values())).sum().backward()
        optimizer.step()

    return cost(once, repeats)


def detections(categories: int, repeats: int) -> dict:
    """From scores and box deltas of each category to 300 detections, at threshold 0."""
    import torch
    from torchvision.models.detection._utils import BoxCoder

    from bags.detectors.postprocess import select_detections

    torch.manual_seed(0)
    logits = torch.randn(1000, categories + 1) * 3
    logits[:, 0] += 10
    corners = torch.rand(1000, 2) * torch.tensor([1000.0, 600.0])
    proposals = torch.cat([corners, corners + 10 + torch.rand(1000, 2) * 200], 1)
    deltas = torch.randn(1000, 4 * (categories + 1)) * 0.5
    scores, coder = logits.softmax(1), BoxCoder((10.0, 10.0, 5.0, 5.0))
    return cost(lambda: select_detections(scores, deltas, proposals, (800, 1333), coder, 0.0, 0.5, 300), repeats)


def scoring(categories: int, repeats: int) -> dict:
    """From a results file to AP; 300 detections an image, 15 of each object."""
    from bags.evaluation.detection_ap import evaluate

    with tempfile.TemporaryDirectory() as name:
        truth, results = Path(name, "truth.json"), Path(name, "results.json")
        content = annotations(categories, 500, 640)
        truth.write_text(json.dumps(content))
        found = [
            {
                "image_id": one["image_id"],
                "category_id": (one["category_id"] + k * k - 1) % categories + 1,
                "bbox": one["bbox"],
                "score": 1 / (k + 1.5),
            }
            for one in content["annotations"]
            for k in range(300 // OBJECTS)
        ]
        results.write_text(json.dumps(found))
        return cost(lambda: evaluate(truth, results), min(repeats, 3))


def whole_job(categories: int) -> dict[str, dict]:
    """Seconds and MB of training, storing, predicting, scoring and choosing, by what was done."""
    import bags
    from bags.core.files import write_text

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw_images(folder, categories)
        write_text(folder / "scale.yaml", DATASET.format(root=folder))
        keys = [f"output={folder / 'runs'}"]
        rows = ("softmax_retrained", "bags", "reweight_cls")
        return {
            "baseline: one epoch, and its AP": peak(lambda: bags.train(folder / "scale.yaml", keys, ["softmax"])),
            "store, BAGS, and its AP": peak(lambda: bags.train(folder / "scale.yaml", keys, ["bags"])),
            f"choose among {len(rows)} rows": peak(lambda: bags.choose(folder / "scale.yaml", keys, rows)),
        }


DATASET = """base: glyphs-100
data: {{name: scale, root: {root}, glyphs: null, train: train.json, val: val.json, train_images: ., val_images: .}}
detector: {{min_size: 96, max_size: 96}}
train: {{epochs: 1}}
rows: [softmax, softmax_retrained, bags]
"""


def draw_images(folder: Path, categories: int) -> None:
    """1,000 images for training and 100 for validation: a rectangle for each object, in a colour of its category."""
    import numpy as np
    from PIL import Image, ImageDraw

    content = annotations(categories, IMAGES, SIDE)
    colours = np.random.default_rng(1).integers(0, 256, (categories + 1, 3)).tolist()
    for image in content["images"]:
        canvas = Image.new("RGB", (SIDE, SIDE), "grey")
        objects = content["annotations"][(image["id"] - 1) * OBJECTS : image["id"] * OBJECTS]
        for one in objects:
            x, y, w, h = one["bbox"]
            ImageDraw.Draw(canvas).rectangle((x, y, x + w, y + h), tuple(colours[one["category_id"]]))
        canvas.save(folder / image["file_name"])
    for name, chosen in (("train", range(1, 1001)), ("val", range(1001, IMAGES + 1))):
        images = [one for one in content["images"] if one["id"] in chosen]
        objects = [one for one in content["annotations"] if one["image_id"] in chosen]
        (folder / f"{name}.json").write_text(json.dumps(content | {"images": images, "annotations": objects}))


def annotations(categories: int, images: int, side: int) -> dict:
    """COCO annotations with 20 objects an image. Half of them follow a tail, half take the categories in turn."""
    import numpy as np

    rng, number = np.random.default_rng(0), images * OBJECTS
    share = 1 / np.arange(1, categories + 1)
    labels = np.where(
        np.arange(number) % 2,
        rng.choice(categories, number, p=share / share.sum()) + 1,
        np.arange(number) // 2 % categories + 1,
    ).tolist()
    sizes = rng.uniform(0.15, 0.35, (number, 2)) * side
    boxes = np.column_stack([rng.uniform(0, 1, (number, 2)) * (side - sizes), sizes]).round(1).tolist()
    return {
        "images": [{"id": k, "width": side, "height": side, "file_name": f"{k}.png"} for k in range(1, images + 1)],
        "categories": [{"id": c, "name": f"c{c}"} for c in range(1, categories + 1)],
        "annotations": [
            coco_object(k + 1, k // OBJECTS + 1, label, box)
            for k, (label, box) in enumerate(zip(labels, boxes, strict=True))
        ],
    }


def bags_classifier(categories: int) -> "GroupSoftmax":
    """BAGS on 1,024 features, with the counts of a tail: 20,000 objects, 10,000, 6,666, ..., 1."""
    import bags

    counts = [max(1, 20_000 // rank) for rank in range(1, categories + 1)]
    return bags.GroupSoftmax(1024, bags.assign_groups(counts), others_ratio=8.0)


def features(proposals: int) -> "BoxFeatures":
    """Random features of a box head."""
    import torch

    import bags

    return bags.BoxFeatures(torch.empty(proposals, 0), torch.randn(proposals, 1024).relu())


def drawn_labels(categories: int, proposals: int) -> "Tensor":
    """Labels [R], three quarters of them background."""
    import torch

    labels = torch.randint(1, categories + 1, (proposals,))
    labels[proposals // 4 :] = 0
    return labels
