"""A torchvision detector's proposals in memory: collected from batches of images, and classifiers trained from them.

Shape shorthand: R proposals of an image, D numbers in a feature, K objects of an image, C categories. Label 0 is the
background.
"""

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bags.classifiers.base import BoxFeatures, ProposalClassifier
from bags.config.sections import TrainConfig
from bags.core.distributed import seed_rank
from bags.core.files import write_text
from bags.core.progress import Progress
from bags.core.settings import need
from bags.detectors.from_features import StoredProposals, proposals_to_store, training_pool
from bags.detectors.torchvision_private import BalancedPositiveNegativeSampler
from bags.engine.optim import build_optimizer, learning_rate
from bags.evaluation.truth import Truth, read_truth

APART = 1_000_003  # factor between the seeds of two calls, each of which needs many


class LabelledProposals(NamedTuple):
    """The proposals of one training image that a step may draw from."""

    fc: Tensor  # [R, D] float16; float32 where that cannot hold a number
    labels: Tensor  # [R] in 0..C


class ValidationImages(NamedTuple):
    """The validation images, as detection and scoring need them."""

    batches: list[tuple[list[StoredProposals], list[int]]]  # images, and the rank of each from 1
    truth: Truth  # by COCO's protocol; label c is category c


class Trained(NamedTuple):
    """A classifier that is trained, and how."""

    name: str
    classifier: ProposalClassifier
    config: TrainConfig


def training_proposals(
    detector: Any, batches: Iterable, categories: int, negatives: int, seed: int
) -> list[LabelledProposals]:
    """Collect the pool of each training image (see `from_features.training_pool`), without crowd regions.

    detector: balanced, in evaluation mode. Raises ValueError for batches that cannot be used.
    """
    proposals: list[LabelledProposals] = []
    for images, targets in checked_batches("train", batches, categories, _device(detector)):
        kept = [target["iscrowd"] == 0 for target in targets]
        targets = [{key: t[key][rows] for key in ("boxes", "labels")} for t, rows in zip(targets, kept, strict=True)]
        seeds = [APART * seed + len(proposals) + k for k in range(len(images))]
        for pool in training_pool(detector, images, targets, negatives, seeds):
            half = pool.fc[:, 0].half()
            fc = half if half.isfinite().all() else pool.fc[:, 0].float().clone()
            proposals.append(LabelledProposals(fc.cpu(), pool.labels[:, 0].cpu()))
    need(any(bool((p.labels > 0).any()) for p in proposals), "train", "images with objects, got none")
    return proposals


def validation_proposals(detector: Any, batches: Iterable, categories: int) -> ValidationImages:
    """Collect all that detection in the validation images needs, and the ground truth.

    detector: balanced, in evaluation mode. Raises ValueError for batches that cannot be used.
    """
    stored: list[tuple[list[StoredProposals], list[int]]] = []
    objects: list[dict] = []
    sizes: list[dict] = []
    for images, targets in checked_batches("validation", batches, categories, _device(detector)):
        ranks = [len(sizes) + k + 1 for k in range(len(images))]
        stored.append(([found.to(torch.device("cpu")) for found in proposals_to_store(detector, images)], ranks))
        for image, target, rank in zip(images, targets, ranks, strict=True):
            sizes.append({"id": rank, "height": image.shape[-2], "width": image.shape[-1]})
            corners = target["boxes"].double().cpu()
            columns = (
                torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1),
                target["labels"],
                target["iscrowd"],
            )
            for box, label, crowd in zip(*(column.tolist() for column in columns), strict=True):
                entry = {"image_id": rank, "category_id": label, "bbox": box, "iscrowd": int(crowd)}
                objects.append({"id": len(objects) + 1, **entry})
    need(any(not entry["iscrowd"] for entry in objects), "validation", "images with objects, got none")
    names = [{"id": label, "name": str(label)} for label in range(1, categories + 1)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "validation.json")
        write_text(path, json.dumps({"images": sizes, "annotations": objects, "categories": names}))
        return ValidationImages(stored, read_truth(path))


def checked_batches(
    name: str, batches: Iterable, categories: int, device: torch.device
) -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]]:
    """Yield the batches of an argument on a device, with a progress bar; targets hold boxes, labels and iscrowd.

    Raises ValueError, which names the argument and the batch, for one that is not as torchvision takes it.
    """
    need(isinstance(batches, Iterable), name, "an iterable of batches (images, targets)", type(batches).__name__)
    number = -1
    for number, batch in enumerate(Progress(batches, desc=f"{name}: features", unit="batch")):
        where = f"{name}: batch {number}"
        need(isinstance(batch, tuple | list) and len(batch) == 2, where, "(images, targets)", type(batch).__name__)
        images, targets = map(list, batch)
        need(0 < len(images) == len(targets), where, "images, with a target for each", (len(images), len(targets)))
        for k, image in enumerate(images):
            usable = isinstance(image, Tensor) and image.ndim == 3 and image.is_floating_point()
            shown = (tuple(image.shape), image.dtype) if isinstance(image, Tensor) else type(image).__name__
            need(usable, f"{where}: images[{k}]", "a tensor [3, H, W] of floating-point numbers", shown)
            need(bool(image.isfinite().all()), f"{where}: images[{k}]", "finite numbers")
        checked = [_checked_target(f"{where}: targets[{k}]", one, categories) for k, one in enumerate(targets)]
        moved = [{key: value.to(device) for key, value in target.items()} for target in checked]
        yield [image.to(device) for image in images], moved
    need(number >= 0, name, "one batch or more, got none")


def _checked_target(where: str, target: Any, categories: int) -> dict[str, Tensor]:
    """The boxes [K, 4], labels [K] and iscrowd [K] of an image. Raises ValueError, beginning with `where`."""
    need(isinstance(target, Mapping), where, "a dict with boxes and labels", type(target).__name__)
    for key in ("boxes", "labels"):
        need(isinstance(target.get(key), Tensor), where, f"a tensor {key}", type(target.get(key)).__name__)
    boxes, labels = target["boxes"], target["labels"]
    number = len(labels)
    need(
        labels.shape == (number,) and not labels.is_floating_point(), f"{where}['labels']", "whole numbers [K]", labels
    )
    need(
        boxes.shape == (number, 4) or not (number or boxes.numel()), f"{where}['boxes']", f"[{number}, 4]", boxes.shape
    )
    boxes = boxes.float().reshape(-1, 4)
    outside = labels[(labels < 1) | (labels > categories)].tolist()
    need(not outside, f"{where}['labels']", f"1 to {categories} (0 is the background)", *outside[:1])
    usable = boxes.isfinite().all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    for k in torch.where(~usable)[0].tolist():
        need(False, f"{where}['boxes'][{k}]", "finite numbers with x1 < x2 and y1 < y2", boxes[k].tolist())
    crowd = torch.as_tensor(target.get("iscrowd", torch.zeros_like(labels)))
    need(crowd.shape == labels.shape, f"{where}['iscrowd']", f"[{number}]", tuple(crowd.shape))
    return {"boxes": boxes, "labels": labels.long(), "iscrowd": crowd.to(labels.device).long()}


@torch.enable_grad()
def train_together(
    rows: Sequence[Trained],
    proposals: Sequence[LabelledProposals],
    sampler: BalancedPositiveNegativeSampler,
    seed: int,
    device: torch.device,
) -> None:
    """Train classifiers of equal epochs and batch size with the same batches; each as if it were trained alone.

    sampler: draws the proposals of each image, in each epoch anew. Uses torch's global generators. Raises ValueError,
    naming the row, for weights that are no longer finite.
    """
    epochs, batch_size = rows[0].config.epochs, rows[0].config.batch_size
    steps = -(-len(proposals) // batch_size)
    optimizers = [build_optimizer(row.classifier.train(), row.config) for row in rows]
    bar = Progress(total=epochs * steps, desc=f"train {', '.join(row.name for row in rows)}", unit="step")
    for iteration in range(epochs * steps):
        epoch, step = divmod(iteration, steps)
        order = torch.randperm(len(proposals), generator=torch.Generator().manual_seed(APART * seed + epoch))
        seed_rank(APART * seed + iteration, device)
        chosen = order[step * batch_size : (step + 1) * batch_size].tolist()
        features, labels = _draw([proposals[k] for k in chosen], sampler, device)
        for row, optimizer in zip(rows, optimizers, strict=True):
            seed_rank(APART * seed + iteration, device)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(row.config, iteration, iteration / steps)
            optimizer.zero_grad(set_to_none=True)
            losses = row.classifier.loss(row.classifier(features), labels)
            torch.stack(list(losses.values())).sum().backward()
            nn.utils.clip_grad_norm_(row.classifier.parameters(), row.config.clip_norm)
            optimizer.step()
            if step == steps - 1 and not all(p.isfinite().all() for p in row.classifier.parameters()):
                raise ValueError(f"rows[{row.name!r}]: its weights are not finite after epoch {epoch + 1}: lower lr")
        bar.update()
    bar.close()


def _draw(
    images: Sequence[LabelledProposals], sampler: BalancedPositiveNegativeSampler, device: torch.device
) -> tuple[BoxFeatures, Tensor]:
    """Features and labels [R] of the proposals that a step sees of its images."""
    fc, labels = [], []
    for image in images:
        (positive,), (negative,) = sampler([image.labels])
        drawn = torch.where(positive | negative)[0]
        fc.append(image.fc[drawn].to(device).float())
        labels.append(image.labels[drawn].to(device))
    features = torch.cat(fc)
    return BoxFeatures(features.new_zeros(len(features), 0), features), torch.cat(labels)


def _device(detector: nn.Module) -> torch.device:
    return next(detector.parameters()).device
