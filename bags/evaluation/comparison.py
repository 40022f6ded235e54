"""Two results files on the same ground truth: what changed, where, and how sure that is.

The interval is a paired bootstrap: images are drawn with replacement, the same ones for both files, and both are
scored on each draw. A draw is a weight for each image (how often it was drawn), and AP is computed from weighted
counts: the same number as from a dataset in which images are repeated.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bags.core.errors import UserError
from bags.core.progress import Progress
from bags.data.statistics import training_of
from bags.evaluation.detection_ap import default_limit, match
from bags.evaluation.results_file import Results, read_results
from bags.evaluation.truth import LARGEST_AREA, NEGATIVE, PARTIAL, Truth, read_truth

RECALLS = np.linspace(0, 1, 101)
IOUS = 10  # thresholds 0.5, 0.55, ..., 0.95
AT_ONCE = 2_000_000  # numbers of one array: draws are taken in parts where a category has many detections


class Detections(NamedTuple):
    """One category's detections in one results file, best first. D detections, T IoU thresholds."""

    image: np.ndarray  # int64 [D] position of the image
    hit: np.ndarray  # bool [T, D] matched to an object that counts
    counted: np.ndarray  # bool [T, D] not to be ignored
    score: np.ndarray  # float64 [D]


class Comparison(NamedTuple):
    """Numbers in 0..1; a difference is the second file's minus the first's."""

    first: dict[str, float]
    second: dict[str, float]
    intervals: dict[str, tuple[float, float]]  # of the difference, 95 %; NaN where no draw has such a category
    rows: list[dict]  # id, name, training_instances, first, second, difference of each category with ground truth


def compare(
    annotations: str | Path | Truth,
    first: str | Path | Results,
    second: str | Path | Results,
    iou_type: str = "bbox",
    draws: int = 1000,
    seed: int = 0,
    instance_counts: Sequence[int] | None = None,
    image_counts: Sequence[int] | None = None,
    boundaries: Sequence[int] = (10, 100, 1000),
    max_detections: int | None = None,
) -> Comparison:
    """AP AP50 AP75 and the means of sets of categories of two results files, and how they differ.

    draws: of the bootstrap; 0 gives no intervals. The other settings are those of `detection_ap.score`. A category
    without an object in a draw does not enter that draw's means. Raises UserError for files that cannot be used.
    """
    if draws < 0:
        raise UserError(f"draws={draws}: expected 0 or more")
    truth = annotations if isinstance(annotations, Truth) else read_truth(annotations)
    files: list[list[Detections | None]] = []
    objects: list[np.ndarray] = []
    names: list[str] = []
    for source in (first, second):
        results = source if isinstance(source, Results) else read_results(source, truth)
        names.append(results.path.name)
        file, objects = matched(truth, results, iou_type, max_detections)  # the objects of any file are the same
        files.append(file)
    training = training_of({"categories": truth.category_counts()}, instance_counts, image_counts, boundaries)
    sets = {"AP": np.ones(len(truth.names), bool), **training.sets()}

    whole = [ap_of(file, objects, np.ones((1, len(truth.image_ids)))) for file in files]
    numbers = [{name: float(values[0]) for name, values in means(ap, sets).items()} for ap in whole]
    images = len(truth.image_ids)
    weights = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), draws)
    weights = weights.astype(np.int16)
    intervals = {}
    if draws:
        drawn = [ap_of(file, objects, weights, f"bootstrap, {name}") for file, name in zip(files, names, strict=True)]
        before, after = (means(ap, sets) for ap in drawn)
        intervals = {name: interval(after[name] - before[name]) for name in before}
    rows = []
    for k, key in enumerate(truth.category_ids.tolist()):
        a, b = (float(ap[0, :, k].mean()) for ap in whole)
        counts = {} if training.instances is None else {"training_instances": training.instances[k]}
        if a == a:
            rows.append({"id": key, "name": truth.names[k], **counts, "first": a, "second": b, "difference": b - a})
    return Comparison(numbers[0], numbers[1], intervals, rows)


def changed_most(rows: list[dict], most: int) -> tuple[list[dict], list[dict]]:
    """Of a comparison's rows at most `most` that gained and that lost most, the largest change first."""
    ordered = sorted(rows, key=lambda row: row["difference"])
    gained = [row for row in ordered[::-1][:most] if row["difference"] > 0]
    return gained, [row for row in ordered[:most] if row["difference"] < 0]


class Matches(NamedTuple):
    """A results file matched with the ground truth."""

    file: list[Detections | None]  # of each category; None for one without detections
    objects: list[np.ndarray]  # of each category int64 [K, 2]: images with objects of it that count, and how many


def matched(
    truth: Truth, results: Results, iou_type: str = "bbox", max_detections: int | None = None, most: int | None = None
) -> Matches:
    """Match detections with objects, as the engine does.

    Only where an image holds objects of a category is there something to match, so only that is given to the engine,
    whose answer is a kilobyte for each detection. Elsewhere all detections are false; in LVIS they count if the
    category is listed as absent from the image, and are ignored if nothing is known about it.
    max_detections: of an image, by default the protocol's; most: of a category in all images together.
    """
    if iou_type == "segm":
        truth.check_masks()
        results.check_masks(truth)
    images = {image["id"]: k for k, image in enumerate(truth.content["images"])}  # in the file's order
    held = _numbers({(entry["image_id"], entry["category_id"]) for entry in truth.content["annotations"]}, truth)
    results = results.take(_within_limits(truth, results, held, max_detections or default_limit(truth), most))
    pairs = results.images * (len(truth.names) + 1) + results.categories
    hit, counted = np.zeros((IOUS, len(results)), bool), np.ones((IOUS, len(results)), bool)
    counted[:, results.boxes[:, 2:].prod(1) > LARGEST_AREA] = False  # ignored unless matched
    partial = {(image["id"], key) for image in truth.content["images"] for key in image.get(PARTIAL, ())}
    counted[:, np.isin(pairs, _numbers(partial, truth))] = False
    rows = np.flatnonzero(np.isin(pairs, held))
    entries = match(truth, results.take(rows), iou_type, max_detections)
    rows = rows[np.argsort(pairs[rows], kind="stable")]
    starts = dict(zip(*np.unique(pairs[rows], return_index=True), strict=True))
    objects: list[list] = [[] for _ in truth.names]
    for entry in entries:
        image, category = entry["image_rank"], entry["category_rank"]
        number = len(entry["gtIgnore"]) - sum(entry["gtIgnore"])
        if number:
            objects[category - 1].append((images[image], number))
        if len(entry["dtScores"]):
            start = starts[image * (len(truth.names) + 1) + category]
            own = rows[start : start + len(entry["dtScores"])]
            ignored = np.array(entry["dtIgnore"], bool)
            hit[:, own], counted[:, own] = np.array(entry["dtMatched"], bool) & ~ignored, ~ignored
    places = np.zeros(len(images) + 1, np.int64)
    places[list(images)] = list(images.values())
    order = np.argsort(results.categories, kind="stable")
    bounds = np.searchsorted(results.categories[order], np.arange(1, len(truth.names) + 2))
    file: list[Detections | None] = []
    for first, last in itertools.pairwise(bounds.tolist()):
        own = order[first:last]
        of_category = Detections(places[results.images[own]], hit[:, own], counted[:, own], results.scores[own])
        file.append(of_category if len(own) else None)
    return Matches(file, [np.array(numbers, np.int64).reshape(-1, 2) for numbers in objects])


def _numbers(pairs: set[tuple[int, int]], truth: Truth) -> np.ndarray:
    """One number for each pair of an image and a category."""
    return np.array([image * (len(truth.names) + 1) + category for image, category in pairs], np.int64)


def _within_limits(truth: Truth, results: Results, held: np.ndarray, limit: int, most: int | None) -> np.ndarray:
    """Rows that the protocol looks at: the best of each image (LVIS) or of each image and category (COCO).

    In LVIS these are only categories that are known to be in the image, or not to be.
    """
    pairs = results.images * (len(truth.names) + 1) + results.categories
    kept = _rank_within(results.images if truth.lvis else pairs) < limit
    if most is not None:
        kept &= _rank_within(np.where(kept, results.categories, 0)) < most
    if truth.lvis:
        absent = {(image["id"], key) for image in truth.content["images"] for key in image[NEGATIVE]}
        kept &= np.isin(pairs, held) | np.isin(pairs, _numbers(absent, truth))
    return np.flatnonzero(kept)


def _rank_within(groups: np.ndarray) -> np.ndarray:
    """The place, from 0, of each member [D] among those of its group."""
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    ranks = np.empty(len(groups), np.int64)
    ranks[order] = np.arange(len(groups)) - np.repeat(starts, np.diff([*starts, len(groups)]))
    return ranks


def ap_of(
    file: list[Detections | None], objects: list[np.ndarray], weights: np.ndarray, title: str | None = None
) -> np.ndarray:
    """AP [draws, T, C] with images weighted by `weights` [draws, I]; NaN where a draw has no object.

    objects: see `Matches`. title: of the progress bar; None shows none.
    """
    result = np.full((len(weights), IOUS, len(file)), np.nan)
    for label, detections in enumerate(Progress(file, desc=title, unit="category", disable=title is None)):
        where, numbers = objects[label].T
        totals = weights[:, where] @ numbers  # [draws]
        present = np.flatnonzero(totals > 0)
        if detections is None or not detections.hit.any():
            result[present, :, label] = 0
            continue
        step = max(1, AT_ONCE // len(detections.image))
        for part in np.array_split(present, -(-len(present) // step)) if len(present) else ():
            of_detections = weights[np.ix_(part, detections.image)].astype(np.float64)
            for t in range(IOUS):
                result[part, t, label] = _weighted_ap(
                    of_detections, detections.hit[t], detections.counted[t], totals[part]
                )
    return result


def _weighted_ap(weights: np.ndarray, hit: np.ndarray, counted: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """AP [draws] of one category at one IoU. weights: [draws, D] of the detections' images; totals: [draws] objects.

    Only precision at hits matters: between two hits it falls.
    """
    hits = np.flatnonzero(hit)
    if not len(hits):
        return np.zeros(len(weights))
    right = np.cumsum(weights[:, hits], 1)
    all_so_far = np.cumsum(weights * counted, 1)[:, hits]
    precision = right / (all_so_far + np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]  # the best at this recall or a higher one
    reached = np.searchsorted(RECALLS, right / totals[:, None], side="right")  # recalls of the 101 up to each hit
    return (precision * np.diff(reached, axis=1, prepend=0)).sum(1) / len(RECALLS)


def means(ap: np.ndarray, sets: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """AP [draws, 10, C] -> means [draws] over thresholds and sets of categories; AP50, AP75 over all."""
    by_category = ap.mean(1)
    found = {name: _mean(by_category[:, chosen]) for name, chosen in sets.items()}
    single = {"AP50": 0, "AP75": 5}
    return {"AP": found.pop("AP"), **{name: _mean(ap[:, t]) for name, t in single.items()}, **found}


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean of each row's numbers; NaN where there are none."""
    known = ~np.isnan(values)
    return np.where(known.any(1), np.where(known, values, 0).sum(1) / np.maximum(known.sum(1), 1), np.nan)


def interval(differences: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of the draws that have a difference."""
    known = differences[~np.isnan(differences)]
    return tuple(np.percentile(known, [2.5, 97.5]).tolist()) if len(known) else (np.nan, np.nan)
