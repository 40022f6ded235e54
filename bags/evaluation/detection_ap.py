"""Results file + ground truth -> average precision, overall and by training frequency.

The protocol follows from the annotation file: LVIS (federated, Gupta et al. 2019) where images carry
`neg_category_ids`, COCO otherwise. Matching and accumulation are hotcoco's, whose precision arrays
equal those of the official `lvis` and `pycocotools`.
"""

import contextlib
import functools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hotcoco
import numpy as np

from bags.core.errors import UserError
from bags.data.statistics import Training, training_of
from bags.evaluation import official
from bags.evaluation.results_file import Results, read_results
from bags.evaluation.truth import Truth, read_truth

ENGINES = ("hotcoco", "lvis", "pycocotools")
FIXED = 10_000  # detections of a category in AP_fixed
FEW = 20  # a lower number of detections is hardly a limit for an image
TIES = 0.01  # share of tied scores from which they are mentioned


class Scores(NamedTuple):
    """Scores of one results file."""

    numbers: dict[str, float]  # by name, in 0..1
    rows: list[dict]  # one for each category: id, name, training_instances, training_images, frequency, bin, AP, AP50
    curves: dict[str, np.ndarray]  # AP, AP1, ... -> mean precision [IoU 0.5 and 0.75, recall 0, 0.01, ..., 1]
    has_masks: bool  # whether every object of the ground truth has a segmentation: only then can masks be scored
    notes: list[str]  # sentences for the user: repaired entries, ties, why masks or AP are missing


def evaluate(
    annotations: str | Path | Truth,
    predictions: str | Path | Results,
    iou_type: str = "bbox",
    instance_counts: Sequence[int] | None = None,
    image_counts: Sequence[int] | None = None,
    boundaries: Sequence[int] = (10, 100, 1000),
    max_detections: int | None = None,
    engine: str = "hotcoco",
    fixed: bool = False,
) -> dict[str, float]:
    """AP AP50 AP75 APs APm APl AR, APr APc APf, AP1 AP2 ..., AP_tail AP_head, AP_fixed: floats in 0..1.

    annotations: a COCO or LVIS JSON file, or the result of `read_truth`; predictions: a results file, which is a
    list of {image_id, category_id, bbox, score}, for iou_type "segm" with a segmentation (RLE), or the result of
    `read_results`. The other settings are those of `score`; AP_fixed is there only with `fixed`, APr to AP_head
    where training counts are known. Raises UserError for a file that cannot be used.
    """
    return score(
        annotations, predictions, iou_type, instance_counts, image_counts, boundaries, max_detections, engine, fixed
    ).numbers


def score(
    annotations: str | Path | Truth,
    predictions: str | Path | Results,
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
    if engine not in ENGINES:
        raise UserError(f"engine {engine}: expected one of {', '.join(ENGINES)}")
    truth, results, limit = _inputs(annotations, predictions, iou_type, max_detections)
    with _engine_errors(truth, results):
        engine_truth = _engine_truth(truth, iou_type)
        if engine == "hotcoco":
            precision, recall = _match(engine_truth, results, iou_type, truth.lvis, limit)
        else:
            precision, recall = official.match(engine, truth, results, iou_type, limit)
        best = _fixed(engine_truth, results, iou_type, truth.lvis, limit, precision) if fixed else None
    training = training_of({"categories": truth.category_counts()}, instance_counts, image_counts, boundaries)
    sets = training.sets()
    numbers = _summary(precision, recall, sets)
    if best is not None:
        numbers["AP_fixed"] = _mean(per_category_ap(best[..., 0]))
    everything = np.ones(precision.shape[2], bool)
    curves = {
        name: _mean_curve(precision[[0, 5]][:, :, chosen, 0]) for name, chosen in {"AP": everything, **sets}.items()
    }
    notes = notes_of(truth, results, iou_type, engine, instance_counts is None or image_counts is None)
    if fixed:
        notes += _cut_off(results)
    return Scores(numbers, _rows(truth, training, precision), curves, truth.lacks_masks() is None, notes)


def match(
    annotations: str | Path | Truth,
    predictions: str | Path | Results,
    iou_type: str = "bbox",
    max_detections: int | None = None,
) -> list[dict]:
    """Matches of each image and category.

    An entry holds image_id, category_id, their ranks from 1 on (image_rank, category_rank), dtScores [D] (falling),
    dtMatched and dtIgnore [10 IoUs][D] and gtIgnore [G],
    as pycocotools' evalImgs do, of objects of any size. Raises UserError for a file that cannot be used.
    """
    truth, results, limit = _inputs(annotations, predictions, iou_type, max_detections)
    with _engine_errors(truth, results):
        evaluation = _evaluation(_engine_truth(truth, iou_type), results, iou_type, truth.lvis, limit)
        evaluation.params.area_rng, evaluation.params.area_rng_lbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        entries = [entry for entry in evaluation.eval_imgs if entry is not None]
    image_ids, category_ids = truth.image_ids.tolist(), truth.category_ids.tolist()
    for entry in entries:
        entry["image_rank"], entry["category_rank"] = entry["image_id"], entry["category_id"]
        entry["image_id"] = image_ids[entry["image_id"] - 1]
        entry["category_id"] = category_ids[entry["category_id"] - 1]
    return entries


def error_kinds(
    annotations: str | Path | Truth, predictions: str | Path | Results, max_detections: int | None = None
) -> dict[str, float]:
    """AP50 in 0..1, and what it would gain without each kind of error (TIDE, Bolya et al. 2020, section 2).

    Keys: AP50; Cls (on an object, other category), Loc (right category, IoU 0.1 to 0.5), Both, Dupe (a second detection
    of an object), Bkg (on no object), Miss (an object without a detection); FP and FN for all of them. Empty for LVIS:
    a detection on no object says nothing in an image where only some categories are annotated.
    Raises UserError for a file that cannot be used.
    """
    truth, results, limit = _inputs(annotations, predictions, "bbox", max_detections)
    if truth.lvis:
        return {}
    with _engine_errors(truth, results):
        evaluation = _evaluation(_engine_truth(truth, "bbox"), results, "bbox", truth.lvis, limit)
        evaluation.evaluate()
        errors = evaluation.tide_errors()
    return {"AP50": errors["ap_base"], **errors["delta_ap"]}


def _inputs(
    annotations: str | Path | Truth, predictions: str | Path | Results, iou_type: str, max_detections: int | None
) -> tuple[Truth, Results, int]:
    """Both files, checked for `iou_type`, and the number of detections per image."""
    truth = annotations if isinstance(annotations, Truth) else read_truth(annotations)
    results = predictions if isinstance(predictions, Results) else read_results(predictions, truth)
    if iou_type == "segm":
        truth.check_masks()
        results.check_masks(truth)
    return truth, results, max_detections or default_limit(truth)


def default_limit(truth: Truth) -> int:
    """Detections of an image that the protocol looks at: 300 in LVIS, 100 in COCO."""
    return 300 if truth.lvis else 100


def notes_of(
    truth: Truth, results: Results, iou_type: str = "bbox", engine: str = "hotcoco", own_counts: bool = False
) -> list[str]:
    """Sentences for the user about what the numbers do not show.

    own_counts: the training counts are those in the annotation file.
    """
    notes = [*truth.notes, *results.notes, *(truth.count_notes if own_counts else ())]
    if results.tied >= TIES:
        notes.append(
            f"{results.path}: {results.tied:.0%} of the detections share their score with another of their category. "
            "They are ordered by image and box; other orders can give another AP"
        )
    if iou_type == "bbox" and results.masks is not None and (reason := truth.lacks_masks() or results.lacks_masks()):
        notes.append(f"{reason}: only boxes are scored")
    crowd = sum(annotation["iscrowd"] for annotation in truth.content["annotations"])
    if engine == "lvis" and crowd:
        notes.append(f"{truth.path}: {crowd} crowd regions, which the official lvis takes for objects")
    return notes


def _cut_off(results: Results) -> list[str]:
    """A sentence about a file whose images hold a limited number of detections, which AP_fixed should not know."""
    counts = np.bincount(results.images)[1:]
    most, held = int(counts.max(initial=0)), int(np.count_nonzero(counts))
    full = int(np.count_nonzero(counts == most))
    if most < FEW or full < 2 or full < np.count_nonzero((counts < most) & (counts > 0.9 * most)):
        return []
    return [
        f"{results.path}: no image holds more than {most} detections, and {full} of {held} hold as many. If others "
        "were cut off, AP_fixed misses them: test.max_detections says how many an image keeps"
    ]


@contextlib.contextmanager
def _engine_errors(truth: Truth, results: Results) -> Iterator[None]:
    """Turn errors of the engine into a UserError that names both files."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{truth.path}: with {results.path}: cannot be evaluated ({error})") from None


def _rows(truth: Truth, training: Training, precision: np.ndarray) -> list[dict]:
    columns = {
        "id": truth.category_ids.tolist(),
        "name": truth.names,
        "training_instances": training.instances,
        "training_images": training.images,
        "frequency": training.letters,
        "bin": None if training.bins is None else (training.bins + 1).tolist(),
        "AP": per_category_ap(precision[..., 0]).tolist(),
        "AP50": per_category_ap(precision[:1, ..., 0]).tolist(),
    }
    known = {key: values for key, values in columns.items() if values is not None}
    return [dict(zip(known, row, strict=True)) for row in zip(*known.values(), strict=True)]


def per_category_ap(precision: np.ndarray) -> np.ndarray:
    """AP of each category, [C], from precision [thresholds, recalls, C]; NaN without ground truth."""
    valid = precision > -1
    total = np.where(valid, precision, 0).sum((0, 1))
    return np.where(valid.any((0, 1)), total / np.maximum(valid.sum((0, 1)), 1), np.nan)


@functools.lru_cache(maxsize=1)  # many results are matched with the same truth, whose identity is the key
def _engine_truth(truth: Truth, iou_type: str) -> hotcoco.COCO:
    with _quiet():
        return hotcoco.COCO(truth.engine_content(iou_type == "segm"))


def _engine_results(engine_truth: hotcoco.COCO, results: Results, iou_type: str) -> hotcoco.COCO:
    """The detections as the engine holds them. It makes the boxes of those that are masks only."""
    masks = results.masks if iou_type == "segm" else None
    columns = [results.images, *results.boxes.T, results.scores, results.categories]
    with _quiet():
        if np.isnan(results.boxes).any():
            return engine_truth.load_res(results.entries(masks is not None))
        return engine_truth.load_res(np.column_stack(columns), segmentation=masks)


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


def _evaluation(
    engine_truth: hotcoco.COCO, results: Results, iou_type: Any, lvis: bool, limit: int
) -> hotcoco.COCOeval:
    detections = _engine_results(engine_truth, results, iou_type)
    if lvis:  # over all categories; ties stay in canonical order
        detections = detections.cap_detections_per_image(limit)
    evaluation = hotcoco.COCOeval(engine_truth, detections, iou_type, lvis_style=lvis)
    evaluation.params.max_dets = [limit]
    return evaluation


def _match(
    engine_truth: hotcoco.COCO, results: Results, iou_type: str, lvis: bool, limit: int
) -> tuple[np.ndarray, np.ndarray]:
    """(precision [10, 101, C, areas], recall [10, C, areas]) at `limit` detections per image."""
    evaluation = _evaluation(engine_truth, results, iou_type, lvis, limit)
    evaluation.evaluate()
    evaluation.accumulate()
    numbers = evaluation.eval
    assert numbers is not None  # as `accumulate` leaves it
    return numbers["precision"][..., -1], numbers["recall"][..., -1]


def _fixed(
    engine_truth: hotcoco.COCO, results: Results, iou_type: str, lvis: bool, limit: int, precision: np.ndarray
) -> np.ndarray:
    """Precision where each category keeps its best `FIXED` detections, and images keep all of theirs."""
    most = int(np.bincount(results.images).max(initial=0))
    crowded = np.flatnonzero(np.bincount(results.categories) > FIXED)
    if most <= limit and not len(crowded):
        return precision
    kept = np.ones(len(results), bool)
    for category in crowded:
        kept[np.flatnonzero(results.categories == category)[FIXED:]] = False
    return _match(engine_truth, results.take(np.flatnonzero(kept)), iou_type, lvis, max(most, 1))[0]


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


def _mean_curve(precision: np.ndarray) -> np.ndarray:
    """Precision [T, 101, C] of some categories -> its mean [T, 101] over those with ground truth; NaN without any."""
    valid = precision > -1
    total = np.where(valid, precision, 0).sum(2)
    return np.where(valid.any(2), total / np.maximum(valid.sum(2), 1), np.nan)


def _summary(precision: np.ndarray, recall: np.ndarray, sets: dict[str, np.ndarray]) -> dict[str, float]:
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
