"""Results file + ground truth -> average precision, overall and by training frequency.

The protocol follows from the annotation file: LVIS (federated, Gupta et al. 2019) where images carry
`neg_category_ids`, COCO otherwise. Matching and accumulation are hotcoco's, whose precision arrays
equal those of the official `lvis` and `pycocotools`.
"""

import contextlib
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hotcoco
import numpy as np

from bags.data.packing import POLYGON_LIMIT, is_box, is_number, read_annotations, read_json, unique_ids
from bags.data.statistics import Training, training_of
from bags.errors import UserError
from bags.evaluation import official
from bags.files import open_regular, read_bytes

ENGINES = ("hotcoco", "lvis", "pycocotools")
FIXED = 10_000  # detections of a category in AP_fixed


class Scores(NamedTuple):
    """What `score` finds in one results file."""

    numbers: dict[str, float]  # by name, in 0..1
    rows: list[dict]  # one for each category: id, name, training_instances, training_images, frequency, bin, AP, AP50
    curves: dict[str, np.ndarray]  # AP, AP1, ... -> mean precision [IoU 0.5 and 0.75, recall 0, 0.01, ..., 1]
    has_masks: bool  # whether every object of the ground truth has a segmentation: only then can masks be scored


def evaluate(
    annotations: str | Path,
    predictions: str | Path,
    iou_type: str = "bbox",
    instance_counts: Sequence[int] | None = None,
    image_counts: Sequence[int] | None = None,
    boundaries: Sequence[int] = (10, 100, 1000),
    max_detections: int | None = None,
    engine: str = "hotcoco",
    fixed: bool = False,
) -> dict[str, float]:
    """AP AP50 AP75 APs APm APl AR, APr APc APf, AP1 AP2 ..., AP_tail AP_head, AP_fixed: floats in 0..1.

    annotations: a COCO or LVIS JSON file; predictions: a results file, a list of {image_id, category_id,
    bbox, score}, for iou_type "segm" with a segmentation (RLE). The other settings are those of `score`; AP_fixed
    is there with `fixed` alone, APr to AP_head where training counts are known. Raises UserError for a file that
    cannot be used.
    """
    return score(
        annotations, predictions, iou_type, instance_counts, image_counts, boundaries, max_detections, engine, fixed
    ).numbers


def score(
    annotations: str | Path,
    predictions: str | Path,
    iou_type: str = "bbox",
    instance_counts: Sequence[int] | None = None,
    image_counts: Sequence[int] | None = None,
    boundaries: Sequence[int] = (10, 100, 1000),
    max_detections: int | None = None,
    engine: str = "hotcoco",
    fixed: bool = False,
) -> Scores:
    """Numbers, a row for each category, and precision-recall curves.

    instance_counts   [C] training boxes per category by ascending id; default: the file's
                      `instance_count`. Bin n holds boundaries[n-2] <= count < boundaries[n-1].
    image_counts      [C] training images per category, for APr APc APf; default: the file's
                      `frequency`, else `image_count`
    max_detections    per image; default 300 (LVIS) or 100 (COCO)
    engine            hotcoco, or the official lvis or pycocotools, whose numbers are the same
    fixed             also AP_fixed (Dave et al. 2021): the best 10,000 detections of each category over the
                      whole file, however many an image has

    AP_tail is the mean over the categories of the lower half of the bins (the paper: fewer than 100
    instances), AP_head over the others. A number that no category of the ground truth enters is
    NaN. Raises UserError for a file that cannot be used.
    """
    annotations, predictions = Path(annotations), Path(predictions)
    if engine not in ENGINES:
        raise UserError(f"engine {engine}: expected one of {', '.join(ENGINES)}")
    content, lvis = checked_truth(annotations, iou_type)
    limit = max_detections or (300 if lvis else 100)
    if engine != "hotcoco" and any(annotation["id"] == 0 for annotation in content["annotations"]):
        raise UserError(f"{annotations}: annotation id 0, which {engine} takes for no object: number from 1")
    with _engine_errors(annotations, predictions):
        truth = hotcoco.COCO(str(annotations))
        found = _detections(truth, predictions, content, iou_type)
        if engine == "hotcoco":
            precision, recall = _match(truth, found, iou_type, lvis, limit)
        else:
            entries = _checked_entries(read_json(predictions), predictions, content, iou_type)
            precision, recall = official.match(engine, annotations, entries, iou_type, lvis, limit)
        best = _fixed(truth, found, predictions, iou_type, lvis, limit, precision) if fixed else None
    training = training_of(content, instance_counts, image_counts, boundaries)
    sets = training.sets()
    results = _summary(precision, recall, sets)
    if best is not None:
        results["AP_fixed"] = _mean(per_category_ap(best[..., 0]))
    everything = np.ones(precision.shape[2], bool)
    curves = {
        name: _mean_curve(precision[[0, 5]][:, :, chosen, 0]) for name, chosen in {"AP": everything, **sets}.items()
    }
    return Scores(results, _rows(content, training, precision), curves, _without_mask(content) is None)


def match(
    annotations: str | Path, predictions: str | Path, iou_type: str = "bbox", max_detections: int | None = None
) -> tuple[list[dict], dict]:
    """(what the engine found for each image and category, content of the annotation file).

    An entry holds image_id, category_id, dtScores [D] (falling), dtMatched and dtIgnore [10 IoUs][D], gtIgnore [G],
    as pycocotools' evalImgs do, of objects of any size. Raises UserError for a file that cannot be used.
    """
    annotations, predictions = Path(annotations), Path(predictions)
    content, lvis = checked_truth(annotations, iou_type)
    limit = max_detections or (300 if lvis else 100)
    with _engine_errors(annotations, predictions):
        truth = hotcoco.COCO(str(annotations))
        evaluation = _evaluation(truth, _detections(truth, predictions, content, iou_type), iou_type, lvis, limit)
        evaluation.params.area_rng, evaluation.params.area_rng_lbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        return [entry for entry in evaluation.eval_imgs if entry is not None], content


@contextlib.contextmanager
def _engine_errors(annotations: Path, predictions: Path) -> Iterator[None]:
    """What the engine raises becomes a UserError that names both files."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{annotations}: with {predictions}: cannot be evaluated ({error})") from None


def _rows(content: dict, training: Training, precision: np.ndarray) -> list[dict]:
    categories = sorted(content["categories"], key=lambda c: c["id"])
    columns = {
        "id": [c["id"] for c in categories],
        "name": [c.get("name", c["id"]) for c in categories],
        "training_instances": training.instances,
        "training_images": training.images,
        "frequency": training.letters,
        "bin": None if training.bins is None else (training.bins + 1).tolist(),
        "AP": per_category_ap(precision[..., 0]).tolist(),
        "AP50": per_category_ap(precision[:1, ..., 0]).tolist(),
    }
    known = {key: values for key, values in columns.items() if values is not None}
    return [dict(zip(known, row, strict=True)) for row in zip(*known.values(), strict=True)]


def has_masks(predictions: str | Path) -> bool:
    """Whether a results file holds masks, as its beginning shows."""
    try:
        with open_regular(predictions) as file:
            return b'"segmentation"' in file.read(2**20)
    except OSError as error:
        raise UserError(f"{predictions}: cannot be read ({error})") from None


def _without_mask(content: dict) -> dict | None:
    """The first annotation that has no segmentation."""
    return next((annotation for annotation in content["annotations"] if not annotation.get("segmentation")), None)


def checked_truth(path: Path, iou_type: str) -> tuple[dict, bool]:
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
    if iou_type == "segm" and (bare := _without_mask(content)):
        raise UserError(f"{path}: annotation {bare['id']}: no segmentation: masks cannot be scored")
    if iou_type == "segm":
        names = [f"annotation {annotation['id']}" for annotation in content["annotations"]]
        _check_masks(path, names, content["annotations"], content["images"])
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


def _detections(truth: hotcoco.COCO, path: Path, content: dict, iou_type: str) -> hotcoco.COCO:
    """The detections of a results file. Only a file that is not plainly in order is looked at one by one."""
    try:
        data = read_bytes(path)
        with _quiet():
            found = truth.load_res(str(path))
        number = found.stats()["annotation_count"]
        keys = ("image_id", "category_id", "score", "segmentation" if iou_type == "segm" else "bbox")
        plain = (
            data.lstrip()[:1] == b"["
            and all(data.count(f'"{key}"'.encode()) == number for key in keys)
            and b"null" not in data
            and iou_type == "bbox"  # of masks the engine says nothing
            and not found.load_warnings
        )
    except (OSError, KeyError, TypeError, ValueError, RuntimeError):
        plain = False
    if plain:
        return found
    entries = _checked_entries(read_json(path), path, content, iou_type)
    with _quiet():
        return truth.load_res(entries)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the engine writes to stderr by itself: its warnings become errors of ours."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _evaluation(truth: hotcoco.COCO, found: hotcoco.COCO, iou_type: str, lvis: bool, limit: int) -> hotcoco.COCOeval:
    if lvis:  # over all categories, ties in the order of the file
        found = found.cap_detections_per_image(limit)
    evaluation = hotcoco.COCOeval(truth, found, iou_type, lvis_style=lvis)
    evaluation.params.max_dets = [limit] if lvis else [1, 10, limit]
    return evaluation


def _match(truth: hotcoco.COCO, found: hotcoco.COCO, iou_type: str, lvis: bool, limit: int):
    """(precision [10, 101, C, areas], recall [10, C, areas]) at `limit` detections per image."""
    evaluation = _evaluation(truth, found, iou_type, lvis, limit)
    evaluation.evaluate()
    evaluation.accumulate()
    numbers = evaluation.eval
    assert numbers is not None  # as `accumulate` leaves it
    return numbers["precision"][..., -1], numbers["recall"][..., -1]


def _fixed(truth, found, path: Path, iou_type: str, lvis: bool, limit: int, precision: np.ndarray) -> np.ndarray:
    """Precision where each category keeps its best `FIXED` detections, and images all of theirs."""
    most = max((len(found.get_ann_ids(img_ids=[image])) for image in found.get_img_ids()), default=0)
    crowded = any(category["ann_count"] > FIXED for category in found.stats()["per_category"])
    if most <= limit and not crowded:
        return precision
    if crowded:
        entries = read_json(path)
        labels, scores = np.array([e["category_id"] for e in entries]), np.array([e["score"] for e in entries])
        order = np.lexsort((-scores, labels))  # stable: of equal scores the first in the file
        starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
        rank = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
        kept = np.sort(order[rank < FIXED])
        with _quiet():
            found = truth.load_res([entries[k] for k in kept.tolist()])
    return _match(truth, found, iou_type, lvis, max(most, 1))[0]


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


def _mean_curve(precision: np.ndarray) -> np.ndarray:
    """Precision [T, 101, C] of some categories -> its mean [T, 101] over those with ground truth; NaN without any."""
    valid = precision > -1
    total = np.where(valid, precision, 0).sum(2)
    return np.where(valid.any(2), total / np.maximum(valid.sum(2), 1), np.nan)


def _summary(precision, recall, sets: dict[str, np.ndarray]) -> dict[str, float]:
    ap, mean = per_category_ap(precision[..., 0]), _mean
    results = {
        "AP": mean(ap),
        "AP50": mean(per_category_ap(precision[:1, ..., 0])),
        "AP75": mean(per_category_ap(precision[5:6, ..., 0])),
    }
    for area, name in enumerate("sml", start=1):
        results[f"AP{name}"] = mean(per_category_ap(precision[..., area]))
    results["AR"] = mean(np.where((recall[..., 0] > -1).all(0), recall[..., 0].mean(0), np.nan))
    return results | {name: mean(ap[chosen]) for name, chosen in sets.items()}


def _checked_entries(entries: object, path: Path, content: dict, iou_type: str) -> list[dict]:
    """Raises UserError that names the first detection that cannot be used."""
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
        if iou_type == "segm" and "segmentation" not in entry:
            raise UserError(f"{where}: no segmentation: these are results of boxes")
        if not known[0]:
            raise UserError(f"{where}: image_id {image} is not in the ground truth; is this its results file?")
        if not known[1]:
            raise UserError(f"{where}: category_id {category} is not in the ground truth")
        if not finite:
            raise UserError(f"{where}: a score or box coordinate is not a finite number")
    if iou_type == "segm":
        _check_masks(path, [f"detection {k}" for k in range(len(entries))], entries, content["images"])
    return entries


def _check_masks(path: Path, names: list[str], entries: list[dict], images: list[dict]) -> None:
    """Raises UserError that names the first entry whose mask is none of its image: decoders would not notice."""
    sizes = {image["id"]: [image.get("height"), image.get("width")] for image in images}
    for name, entry in zip(names, entries, strict=True):
        value, image = entry["segmentation"], entry.get("image_id")
        size = sizes.get(image) if type(image) is int else None
        if not _is_mask(value, size):
            raise UserError(
                f"{path}: {name}: segmentation: expected polygons, or an RLE of {size or 'its image'} (height, width) "
                "whose counts do not exceed its pixels"
            )


def _is_mask(value: object, size: list[Any] | None) -> bool:
    """Polygons, or an RLE of a size."""
    if isinstance(value, dict):
        counts: Any = value.get("counts")
        if value.get("size") != size or not (size and all(type(side) is int and 0 < side < 2**20 for side in size)):
            return False
        if isinstance(counts, list):
            return all(type(count) is int and count >= 0 for count in counts) and sum(counts) <= math.prod(size)
        try:
            hotcoco.mask.rle_from_string(counts, size[0], size[1])
        except (TypeError, ValueError):
            return False
        return True
    if not isinstance(value, list) or not value:
        return False
    return all(
        isinstance(ring, list) and len(ring) % 2 == 0 and all(is_number(v) and abs(v) < POLYGON_LIMIT for v in ring)
        for ring in value
    )
