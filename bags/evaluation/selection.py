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

Shape shorthand: P rows, I images, V selections (one without each fold, and one of all images), G groups of images,
C categories.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from bags.evaluation.comparison import Detections, Matches, ap_of, interval, matched, means
from bags.evaluation.results_file import Results
from bags.evaluation.truth import Truth

Mixture = tuple[float, ...]  # [P] shares of the rows, of sum 1; 0 for a row that is not in it
File = list[Detections | None]  # the matched detections of each category
MEMBERS = 12  # most rows in a mean
GROUPS = 50  # of images, which the jackknife leaves out; all images if they are fewer
NORMAL = 1.959964  # the 97.5 % quantile of the normal distribution
MEMORY = 2e9  # bytes of matched detections that are kept for their second use


class Validation(NamedTuple):
    """The images that rows are chosen with, and what counts there."""

    objects: list[np.ndarray]  # see `comparison.Matches`
    images: int
    sets: dict[str, np.ndarray]  # name of a mean -> the categories that enter it, bool [C]
    metric: str  # a key of `sets`, AP50 or AP75
    order: np.ndarray  # int [I], ascending in the order in which images come that hold detections of equal scores
    most: int | None = None  # detections of a category that count in all images together


class Estimate(NamedTuple):
    """Numbers of one row, or of a choice: name -> value in 0..1, NaN where no category enters it."""

    values: dict[str, float]
    draws: dict[str, np.ndarray]  # [draws] of the bootstrap over images, the same images for every estimate
    without: dict[str, np.ndarray]  # [G] without each group of images, the same groups for every estimate
    reach: float  # ends of an interval of 95 % in standard errors

    def gain(self, other: "Estimate", name: str) -> tuple[float, float, float]:
        """How much higher a number is than another's: the difference, and the ends of its 95 % interval.

        The interval joins two. One is the middle 95 % of the bootstrap. It is too narrow where categories have one or
        two objects: a draw often leaves such a category out, and otherwise repeats its AP. The other is `reach` times
        the jackknife's standard error, from leaving out each group of images. For a row `reach` is the quantile of
        Student's t; for a choice it is longer, see `reach_of_folds`. The ends are NaN where one group holds all objects
        that enter the number, since nothing then says how much it varies.
        """
        difference = self.values[name] - other.values[name]
        low, high = interval(self.draws[name] - other.draws[name])
        half = self.reach * float(_error(self.without[name] - other.without[name]))
        return difference, float(np.minimum(low, difference - half)), float(np.maximum(high, difference + half))

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

    def is_better(self, name: str, row: int = 0) -> bool:
        """Whether the honest estimate of a number is above a row's (the control's), and so is its whole interval."""
        gain, low, _ = self.honest.gain(self.rows[row], name)
        return gain > 0 and low > 0

    def instead(self, name: str, simple: Sequence[int]) -> int | None:
        """The best of some simple rows, if the mixture may be no better than it; None if the mixture is better.

        simple: the control, and the baseline if it is a row. Of equal ones the first is taken.
        """
        best = max(simple, key=lambda row: np.nan_to_num(self.rows[row].values[name], nan=-1.0))
        return None if self.is_better(name, best) else best


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
        return self._match(single(0, rows)).objects

    def __call__(self, mixture: Mixture) -> File:
        return self.kept[mixture] if mixture in self.kept else self._match(mixture).file

    def _match(self, mixture: Mixture) -> Matches:
        found = matched(self.truth, self.results(mixture), "bbox", *self.limits)
        size = sum(array.nbytes for detections in found.file if detections for array in detections)
        while self.kept and (len(self.kept) + 1) * size > MEMORY:
            del self.kept[next(iter(self.kept))]
        self.kept[mixture] = found.file
        return found


def choose(
    detect: Callable[[Mixture], File],
    rows: int,
    validation: Validation,
    folds: int = 5,
    draws: int = 500,
    seed: int = 0,
    members: int = MEMBERS,
    values: Callable[[Iterable[Mixture], Callable[[Mixture], np.ndarray]], list[np.ndarray]] | None = None,
) -> Choice:
    """Choose a mixture of P rows, and estimate what it is worth.

    Row 0 is the control, which is taken where the metric is not defined on the images of a selection.
    detect  the matched detections of a mixture
    folds   2 to I
    members most rows in a mean; 1 chooses a single row
    values  calls a function [V] of each mixture, and may show progress or remember what it was; by default a loop
    """
    random = np.random.default_rng(seed)
    fold_of, group_of = _parts(random.permutation(validation.images), folds)
    everything = np.ones((1, validation.images), int)
    selections = np.concatenate([fold_of != np.arange(folds)[:, None], everything]).astype(int)  # [V, I]
    drawn = random.multinomial(validation.images, np.full(validation.images, 1 / validation.images), draws)
    left_out = (group_of != np.unique(group_of)[:, None]).astype(int)  # [G, I]

    def value(mixture: Mixture) -> np.ndarray:
        """The metric on the images of each selection, [V]; -1 where it is not defined."""
        file = detect(mixture)
        if mixture in alone:  # now, as its detections may not be kept
            found[mixture] = estimate(file, usual)
        ap = ap_of(file, validation.objects, selections)
        return np.nan_to_num(means(ap, validation.sets)[validation.metric], nan=-1.0)

    def estimate(file: File, reach: float) -> Estimate:
        """All numbers: on all images, on each draw and without each group."""
        ap = ap_of(file, validation.objects, np.concatenate([everything, drawn, left_out]))
        numbers = means(ap, validation.sets)
        values = {name: float(array[0]) for name, array in numbers.items()}
        of_draws = {name: array[1 : 1 + draws] for name, array in numbers.items()}
        without_groups = {name: array[1 + draws :] for name, array in numbers.items()}
        return Estimate(values, of_draws, without_groups, reach)

    usual = student(len(left_out) - 1)
    alone, found = [single(row, rows) for row in range(rows)], dict[Mixture, Estimate]()
    *without, mixture = best_mixtures(lambda wanted: (values or _each)(wanted, value), rows, members)
    parts = [(detect(chosen), fold_of == fold) for fold, chosen in enumerate(without)]
    crossed = merge(parts, validation.order, validation.most)
    singles = [found[row] if row in found else estimate(detect(row), usual) for row in alone]
    honest = estimate(crossed, usual * reach_of_folds(folds) / NORMAL)
    return Choice(mixture, without, singles, estimate(detect(mixture), usual), honest)


def _parts(places: np.ndarray, folds: int) -> tuple[np.ndarray, np.ndarray]:
    """The fold and the group of images, int [I]. A fold consists of groups, and group g is in fold g % folds.

    places: of the images in a random order. With 3 folds and 2 groups in each, places 0..6 are in folds 0 1 2 0 1 2 0
    and in groups 0 1 2 3 4 5 0.
    """
    fold = places % folds
    return fold, fold + folds * (places // folds % max(1, GROUPS // folds))


def _error(without: np.ndarray) -> np.ndarray:
    """The jackknife's standard error of a number, from its values [..., G] without each group of images."""
    return np.sqrt(without.shape[-1] - 1) * without.std(-1)


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t (Abramowitz and Stegun 1964, 26.7.5; 2.571 for 5 degrees of freedom)."""
    z = NORMAL
    terms = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return sum(term / freedom**power for power, term in enumerate(terms))


def reach_of_folds(folds: int, rows: int = 16, draws: int = 20000) -> float:
    """How many standard errors a cross-fitted gain is from 0, at most, in 95 % of worlds where all rows are equal.

    A fold's choice is independent of that fold, but not of the others: a row that is lucky in most images is chosen for
    all folds, and is lucky in all. So the gain varies more than that of a fixed row: 2.1 standard errors with two
    folds, 2.5 with five and 2.8 with ten, instead of 1.96. This simulates it with independent normal gains of the rows
    in each fold. Rows that are correlated, or of which some vary more, have a smaller number or nearly the same.
    """
    random = np.random.default_rng(0)
    luck = random.standard_normal((max(100, min(draws, 10**7 // (rows * folds))), folds, rows))
    chosen = (luck.sum(1, keepdims=True) - luck).argmax(2)  # [draws, folds], by the other folds; row 0 is the control
    gain = np.take_along_axis(luck, chosen[..., None], 2)[..., 0] - luck[..., 0]
    error = np.sqrt(2 * (chosen > 0).sum(1))
    return float(np.percentile(np.abs(gain.sum(1)) / np.maximum(error, 1), 95))


def best_mixtures(
    values: Callable[[list[Mixture]], list[np.ndarray]], rows: int, members: int = MEMBERS
) -> list[Mixture]:
    """Choose for each of V selections: the mean of the m best rows, m up to `members`, with the highest value.

    values: [V] of each mixture. Of equal rows the earlier one is better, of equal means that of fewer rows.
    """
    alone = [single(row, rows) for row in range(rows)]
    known = dict(zip(alone, values(alone), strict=True))
    table = np.stack(list(known.values()))  # [P, V]
    order = np.argsort(-table, axis=0, kind="stable")
    most = min(members, rows)
    means_of = [[_mean_of(order[: m + 1, view], rows) for m in range(most)] for view in range(table.shape[1])]
    wanted = [mixture for of_view in means_of for mixture in of_view if mixture not in known]
    wanted = list(dict.fromkeys(wanted))
    known.update(zip(wanted, values(wanted), strict=True) if wanted else ())
    return [max(of_view, key=lambda mixture: known[mixture][view]) for view, of_view in enumerate(means_of)]


def single(row: int, rows: int) -> Mixture:
    """The mixture that is one row."""
    return _mean_of(np.array([row]), rows)


def _mean_of(chosen: np.ndarray, rows: int) -> Mixture:
    """Equal shares for some of the rows."""
    return tuple(1 / len(chosen) if row in chosen else 0.0 for row in range(rows))


def _each(mixtures: Iterable[Mixture], value: Callable[[Mixture], np.ndarray]) -> list[np.ndarray]:
    return [value(mixture) for mixture in mixtures]


def merge(parts: Sequence[tuple[File, np.ndarray]], order: np.ndarray, most: int | None = None) -> File:
    """One file from several, of which each gives the detections in some images, bool [I].

    They are ordered by their place, from 0, among the detections of their category in all images of their part, and
    where places are equal by `order`, see `Validation`. most: of each category only so many are kept.
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
        rows = np.lexsort((order[image], -score))[:most]
        merged.append(Detections(image[rows], hit[:, rows], counted[:, rows], score[rows]))
    return merged


def _in_images(detections: Detections, images: np.ndarray) -> Detections:
    """One category's detections in some images, bool [I]; their scores are now 0, -1, ... by place in all images."""
    places = np.flatnonzero(images[detections.image])
    image, hit, counted, _ = detections
    return Detections(image[places], hit[:, places], counted[:, places], -places.astype(np.float64))
