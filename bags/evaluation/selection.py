"""Which rows to average, and how much that gains on images that were not used to choose.

The rows are ordered by their score, and the m best are averaged with equal weights; m is chosen, too. (This is the
start that Caruana et al. 2004 give their greedy selection. The greedy steps after it raised the score on the images
that they saw and not on others: docs/results/choosing.md.)

The estimate is cross-fitted. The images are divided into folds. For each fold the whole procedure chooses without that
fold's images, and detects in them with what it has chosen. The detections of all folds together give one AP, and no
image has helped to choose the detections that are made in it. Scores of different mixtures are not on one scale (a mean
of several is never as sure as one of them), so a detection counts by its place among all detections of its mixture and
category, for which no label is needed.

Detections in an image do not depend on what else is chosen, and AP on a part of the images is a weighted AP on all. So
each mixture is detected with and matched once, for all folds.

Shape shorthand: P rows, I images, V selections (one without each fold, and one of all images), C categories.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from bags.evaluation.comparison import Detections, ap_of, interval, matched, means
from bags.evaluation.results_file import Results
from bags.evaluation.truth import Truth

Mixture = tuple[float, ...]  # [P] shares of the rows, of sum 1; 0 for a row that is not in it
File = list[Detections | None]  # the matched detections of each category
MOST_MEMBERS = 12
MEMORY = 2e9  # bytes of matched detections that are kept for their second use


class Validation(NamedTuple):
    """The images that rows are chosen with, and what counts there."""

    objects: list[np.ndarray]  # see `comparison.Matches`
    images: int
    sets: dict[str, np.ndarray]  # name of a mean -> the categories that enter it, bool [C]
    metric: str  # a key of `sets`, AP50 or AP75


class Estimate(NamedTuple):
    """Numbers of one row, or of a choice: name -> value in 0..1, NaN where no category enters it."""

    values: dict[str, float]
    draws: dict[str, np.ndarray]  # [draws] of the bootstrap over images, the same images for every estimate

    def gain(self, other: "Estimate", name: str) -> tuple[float, float, float]:
        """How much higher a number is than another's: the difference, and the ends of its 95 % interval."""
        return (self.values[name] - other.values[name], *interval(self.draws[name] - other.draws[name]))

    def gains(self, other: "Estimate") -> dict[str, tuple[float, float, float]]:
        """`gain` of each number."""
        return {name: self.gain(other, name) for name in self.values}


class Choice(NamedTuple):
    """What was chosen, and the numbers to judge it by."""

    mixture: Mixture  # chosen with all images
    without: list[Mixture]  # chosen without each fold
    rows: list[Estimate]  # of the P rows
    optimistic: Estimate  # of the mixture, on the images that it was chosen with
    honest: Estimate  # cross-fitted

    def is_better(self, name: str) -> bool:
        """Whether the honest estimate of a number is above the control's, and so is its whole interval."""
        gain, low, _ = self.honest.gain(self.rows[0], name)
        return gain > 0 and low > 0


class MatchedMixtures:
    """The matched detections of mixtures; those that were made last are kept."""

    def __init__(
        self,
        results: Callable[[Mixture], Results],
        truth: Truth,
        max_detections: int | None = None,
        most: int | None = None,
    ):
        """results: the detections of a mixture; max_detections, most: as `comparison.matched` takes them."""
        self.results, self.truth, self.limits = results, truth, (max_detections, most)
        self.kept: dict[Mixture, File] = {}

    def objects(self, rows: int) -> list[np.ndarray]:
        """The objects of the validation images; see `comparison.Matches`."""
        return matched(self.truth, self.results(single(0, rows)), "bbox", *self.limits).objects

    def __call__(self, mixture: Mixture) -> File:
        if mixture not in self.kept:
            file = matched(self.truth, self.results(mixture), "bbox", *self.limits).file
            size = sum(array.nbytes for detections in file if detections for array in detections)
            while self.kept and (len(self.kept) + 1) * size > MEMORY:
                del self.kept[next(iter(self.kept))]
            self.kept[mixture] = file
        return self.kept[mixture]


def choose(
    detect: Callable[[Mixture], File],
    rows: int,
    validation: Validation,
    folds: int = 5,
    draws: int = 500,
    seed: int = 0,
    values: Callable[[Iterable[Mixture], Callable[[Mixture], np.ndarray]], list[np.ndarray]] | None = None,
) -> Choice:
    """Choose a mixture of P rows, and estimate what it is worth.

    Row 0 is the control, which is taken where the metric is not defined on the images of a selection.
    detect  the matched detections of a mixture
    folds   2 to I
    values  calls a function [V] of each mixture, and may show progress or remember what it was; by default a loop
    """
    random = np.random.default_rng(seed)
    fold_of = random.permutation(np.arange(validation.images) % folds)
    selections = np.stack([*(fold_of != fold for fold in range(folds)), np.ones(validation.images, bool)]).astype(int)
    drawn = random.multinomial(validation.images, np.full(validation.images, 1 / validation.images), draws)

    def value(mixture: Mixture) -> np.ndarray:
        """The metric on the images of each selection, [V]; -1 where it is not defined."""
        ap = ap_of(detect(mixture), validation.objects, selections)
        return np.nan_to_num(means(ap, validation.sets)[validation.metric], nan=-1.0)

    def estimate(file: File) -> Estimate:
        """All numbers, on all images and on each draw."""
        ap = ap_of(file, validation.objects, np.concatenate([selections[-1:], drawn]))
        numbers = means(ap, validation.sets)
        return Estimate({k: float(v[0]) for k, v in numbers.items()}, {k: v[1:] for k, v in numbers.items()})

    *without, mixture = best_mixtures(lambda wanted: (values or _each)(wanted, value), rows)
    crossed = merge([(detect(chosen), fold_of == fold) for fold, chosen in enumerate(without)])
    singles = [estimate(detect(single(row, rows))) for row in range(rows)]
    return Choice(mixture, without, singles, estimate(detect(mixture)), estimate(crossed))


def best_mixtures(values: Callable[[list[Mixture]], list[np.ndarray]], rows: int) -> list[Mixture]:
    """Choose for each of V selections: the mean of the m best rows with the highest value.

    values: [V] of each mixture. Of equal rows the earlier one is better, of equal means that of fewer rows.
    """
    alone = np.stack(values([single(row, rows) for row in range(rows)]))  # [P, V]
    order = np.argsort(-alone, axis=0, kind="stable")
    most = min(MOST_MEMBERS, rows)
    means_of = [[_mean_of(order[: m + 1, view], rows) for m in range(most)] for view in range(alone.shape[1])]
    wanted = list(dict.fromkeys(mixture for of_view in means_of for mixture in of_view))
    known = dict(zip(wanted, values(wanted), strict=True))
    return [max(of_view, key=lambda mixture: known[mixture][view]) for view, of_view in enumerate(means_of)]


def single(row: int, rows: int) -> Mixture:
    """The mixture that is one row."""
    return _mean_of(np.array([row]), rows)


def _mean_of(chosen: np.ndarray, rows: int) -> Mixture:
    """Equal shares for some of the rows."""
    return tuple(1 / len(chosen) if row in chosen else 0.0 for row in range(rows))


def _each(mixtures: Iterable[Mixture], value: Callable[[Mixture], np.ndarray]) -> list[np.ndarray]:
    return [value(mixture) for mixture in mixtures]


def merge(parts: Sequence[tuple[File, np.ndarray]]) -> File:
    """One file from several, of which each gives the detections in some images, bool [I].

    They are ordered by their place, from 0, among the detections of their category in all images of their part.
    """
    merged: File = []
    for of_category in zip(*(file for file, _ in parts), strict=True):
        taken = [
            _in_images(detections, images)
            for detections, (_, images) in zip(of_category, parts, strict=True)
            if detections is not None
        ]
        if not taken:
            merged.append(None)
            continue
        image, score = (np.concatenate([getattr(part, key) for part in taken]) for key in ("image", "score"))
        hit, counted = (np.concatenate([getattr(part, key) for part in taken], 1) for key in ("hit", "counted"))
        order = np.lexsort((image, -score))
        merged.append(Detections(image[order], hit[:, order], counted[:, order], score[order]))
    return merged


def _in_images(detections: Detections, images: np.ndarray) -> Detections:
    """One category's detections in some images, bool [I]; their scores are now 0, -1, ... by place in all images."""
    places = np.flatnonzero(images[detections.image])
    image, hit, counted, _ = detections
    return Detections(image[places], hit[:, places], counted[:, places], -places.astype(np.float64))
