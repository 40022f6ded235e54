"""Results file + ground truth -> average precision, overall and by training frequency.

The protocol follows from the annotation file: LVIS (federated, Gupta et al. 2019) where images carry
`neg_category_ids`, COCO otherwise. Matching and accumulation are hotcoco's, whose precision arrays
equal those of the official `lvis` and `pycocotools`.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import hotcoco
import numpy as np

from bags.data.packing import is_box, read_annotations, read_json, unique_ids
from bags.data.statistics import frequency, instance_bin
from bags.errors import UserError


def evaluate(
    annotations: str | Path,
    predictions: str | Path,
    iou_type: str = "bbox",
    instance_counts: Sequence[int] | None = None,
    image_counts: Sequence[int] | None = None,
    boundaries: Sequence[int] = (10, 100, 1000),
    max_detections: int | None = None,
) -> dict[str, float]:
    """AP AP50 AP75 APs APm APl AR, APr APc APf, AP1 AP2 ..., AP_tail AP_head: floats in 0..1.

    annotations       a COCO or LVIS JSON file
    predictions       a results file: list of {image_id, category_id, bbox, score}
    instance_counts   [C] training boxes per category by ascending id; default: the file's
                      `instance_count`. Bin n holds boundaries[n-2] <= count < boundaries[n-1].
    image_counts      [C] training images per category, for APr APc APf; default: the file's
                      `frequency`, else `image_count`
    max_detections    per image; default 300 (LVIS) or 100 (COCO)

    AP_tail is the mean over the categories of the lower half of the bins (the paper: fewer than 100
    instances), AP_head over the others. A number that no category of the ground truth enters is
    NaN. Raises UserError for a file that cannot be used.
    """
    annotations, predictions = Path(annotations), Path(predictions)
    content, lvis = _checked_truth(annotations)
    entries = _checked_entries(read_json(predictions), predictions, content)
    bare = next((k for k, entry in enumerate(entries) if iou_type == "segm" and "segmentation" not in entry), None)
    if bare is not None:
        raise UserError(f"{predictions}: detection {bare}: no segmentation: these are results of boxes")
    limit = max_detections or (300 if lvis else 100)
    try:
        precision, recall = _match(annotations, entries, iou_type, lvis, limit)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{annotations}: with {predictions}: cannot be evaluated ({error})") from None

    categories = sorted(content["categories"], key=lambda c: c["id"])
    letters, bins = _strata(categories, instance_counts, image_counts, boundaries)
    results = _summary(precision, recall, letters, bins, len(boundaries) + 1)
    return results


def _checked_truth(path: Path) -> tuple[dict, bool]:
    """The ground truth, and whether it is LVIS's. Raises UserError for what the engine would stumble over."""
    content = read_annotations(path)
    if not content["annotations"]:
        raise UserError(f"{path}: `annotations` is empty: nothing to evaluate against")
    for kind in ("images", "annotations", "categories"):
        unique_ids(path, kind, content[kind])
    for annotation in content["annotations"]:
        if not is_box(annotation.get("bbox")):
            raise UserError(f"{path}: annotation {annotation['id']}: bbox: expected [x, y, width, height]")
    for category in content["categories"]:
        if type(category.get("instance_count", 0)) is not int or category.get("frequency", "r") not in ("r", "c", "f"):
            raise UserError(f"{path}: category {category['id']}: instance_count or frequency (r, c, f) is wrong")
    federated = ["neg_category_ids" in image for image in content["images"]]
    if any(federated) != all(federated):
        image = content["images"][federated.index(False)]["id"]
        raise UserError(f"{path}: image {image}: no neg_category_ids, which other images have: LVIS or COCO?")
    return content, all(federated)


def per_category_ap(precision: np.ndarray) -> np.ndarray:
    """AP of each category, [C], from precision [thresholds, recalls, C]; NaN without ground truth."""
    valid = precision > -1
    total = np.where(valid, precision, 0).sum((0, 1))
    return np.where(valid.any((0, 1)), total / np.maximum(valid.sum((0, 1)), 1), np.nan)


def _match(path: Path, entries: list[dict], iou_type: str, lvis: bool, limit: int):
    """(precision [10, 101, C, areas], recall [10, C, areas]) at `limit` detections per image."""
    truth = hotcoco.COCO(str(path))
    engine = hotcoco.COCOeval(truth, truth.load_res(entries), iou_type, lvis_style=lvis)
    engine.params.max_dets = [limit] if lvis else [1, 10, limit]
    engine.evaluate()
    engine.accumulate()
    return engine.eval["precision"][..., -1], engine.eval["recall"][..., -1]


def _strata(categories, instance_counts, image_counts, boundaries):
    """(letters r/c/f [C], bins [C]); None where the counts are not known."""
    for name, counts in (("instance_counts", instance_counts), ("image_counts", image_counts)):
        if counts is not None and len(counts) != len(categories):
            raise UserError(f"{name}: {len(counts)} numbers for {len(categories)} categories of the ground truth")
    if instance_counts is None and all("instance_count" in c for c in categories):
        instance_counts = [c["instance_count"] for c in categories]
    letters = None
    if image_counts is not None:
        letters = frequency(image_counts)
    elif all("frequency" in c for c in categories):
        letters = np.array([c["frequency"] for c in categories])
    elif all("image_count" in c for c in categories):
        letters = frequency([c["image_count"] for c in categories])
    return letters, None if instance_counts is None else instance_bin(instance_counts, boundaries)


def _summary(precision, recall, letters, bins, num_bins: int) -> dict[str, float]:
    ap = per_category_ap(precision[..., 0])

    def mean(values: np.ndarray) -> float:
        values = values[~np.isnan(values)]
        return float(values.mean()) if len(values) else math.nan

    results = {
        "AP": mean(ap),
        "AP50": mean(per_category_ap(precision[:1, ..., 0])),
        "AP75": mean(per_category_ap(precision[5:6, ..., 0])),
    }
    for area, name in enumerate("sml", start=1):
        results[f"AP{name}"] = mean(per_category_ap(precision[..., area]))
    results["AR"] = mean(np.where((recall[..., 0] > -1).all(0), recall[..., 0].mean(0), np.nan))
    if letters is not None:
        results |= {f"AP{letter}": mean(ap[letters == letter]) for letter in "rcf"}
    if bins is not None:
        results |= {f"AP{n + 1}": mean(ap[bins == n]) for n in range(num_bins)}
        results["AP_tail"] = mean(ap[bins < num_bins // 2])
        results["AP_head"] = mean(ap[bins >= num_bins // 2])
    return results


def _checked_entries(entries: object, path: Path, content: dict) -> list[dict]:
    if not isinstance(entries, list):
        raise UserError(f"{path}: expected a list of detections, found a {type(entries).__name__}")
    images = {image["id"] for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    for k, entry in enumerate(entries):
        where = f"{path}: detection {k}"
        try:
            image, category, score, box = entry["image_id"], entry["category_id"], entry["score"], entry.get("bbox")
            known = image in images, category in categories
            finite = math.isfinite(score) and all(math.isfinite(v) for v in box or ())
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise UserError(f"{where}: a field is missing or of a wrong type ({error!r})") from None
        if not (is_box(box) or (box is None and "segmentation" in entry)):
            raise UserError(f"{where}: bbox: expected [x, y, width, height], got {box}")
        if not known[0]:
            raise UserError(f"{where}: image_id {image} is not in the ground truth; is this its results file?")
        if not known[1]:
            raise UserError(f"{where}: category_id {category} is not in the ground truth")
        if not finite:
            raise UserError(f"{where}: a score or box coordinate is not a finite number")
    return entries
