"""Which rows to average, and how much that gains on images that were not used to choose.

The choice is greedy ensemble selection (Caruana et al. 2004): begin with the best row, add the row that helps most,
with replacement, and stop where none helps. It is bagged over images: each bag is a part of the images, and the shares
of a row are averaged over the bags.

The estimate is cross-fitted. The images are divided into folds. For each fold the whole procedure chooses without that
fold's images, and detects in them with what it has chosen. The detections of all folds together give one AP, and no
image has helped to choose the detections that are made in it.

A mixture is scored once, whatever is chosen with it, because AP on a part of the images is a weighted AP on all.

Shape shorthand: P rows, I images, V views (a view is a bag of one selection), C categories.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from bags.evaluation.comparison import Detections, ap_of, means

Mixture = tuple[float, ...]  # [P] shares of the rows, of sum 1; 0 for a row that is not in it
File = list[Detections | None]  # the matched detections of each category
MOST_MEMBERS = 6  # steps of the greedy choice in one bag
TRIED = 8  # rows that a step of one bag may add: those that are best alone
LEAST_SHARE = 0.05  # a smaller share in the mean over bags is left out


class Estimate(NamedTuple):
    """Numbers of one row, or of a choice: name -> value in 0..1."""

    values: dict[str, float]
    draws: dict[str, np.ndarray]  # [draws] of the bootstrap over images, the same images for every row


class Choice(NamedTuple):
    """What was chosen, and the numbers to judge it by."""

    mixture: Mixture  # chosen with all images
    rows: list[Estimate]  # of the P rows
    optimistic: Estimate  # of the mixture, on the images that it was chosen with
    honest: Estimate  # cross-fitted
    fold_mixtures: list[Mixture]  # chosen without each fold


class Validation(NamedTuple):
    """The images that rows are chosen with, and what counts there."""

    objects: list[np.ndarray]  # see `comparison.objects_of`
    images: int
    sets: dict[str, np.ndarray]  # name of a mean -> the categories that enter it, bool [C]
    metric: str  # a key of `sets`, AP50 or AP75


def choose(
    detect: Callable[[Mixture], File],
    rows: int,
    validation: Validation,
    folds: int = 5,
    bags: int = 5,
    draws: int = 500,
    seed: int = 0,
    known: dict[Mixture, np.ndarray] | None = None,
    note: Callable[[Mixture, np.ndarray], None] = lambda mixture, values: None,
) -> Choice:
    """Choose a mixture of P rows, and estimate what it is worth; row 0 is taken where the metric is not defined.

    detect  gives the matched detections of a mixture, which may be expensive: it is called once for each that is tried,
            and once more for the P rows and the chosen ones
    folds   2 or more, at most one for each image
    known   values [V] of mixtures that were tried before; `note` is called with each new one
    """
    random = np.random.default_rng(seed)
    fold_of = random.permutation(np.arange(validation.images) % folds)
    selections = [*(fold_of != fold for fold in range(folds)), np.ones(validation.images, bool)]
    weights = np.concatenate([_bags(random, selected, bags) for selected in selections])
    drawn = random.multinomial(validation.images, np.full(validation.images, 1 / validation.images), draws)

    known = {} if known is None else known

    def value(mixture: Mixture) -> np.ndarray:
        """The metric in each view, [V]; not defined is -1."""
        if mixture not in known:
            ap = ap_of(detect(mixture), validation.objects, weights)
            known[mixture] = np.nan_to_num(means(ap, validation.sets)[validation.metric], nan=-1.0)
            note(mixture, known[mixture])
        return known[mixture]

    mixtures = _greedy(value, len(weights), rows).reshape(folds + 1, bags, rows).mean(1)
    *of_folds, chosen = [_without_small(shares) for shares in mixtures]

    def estimate(file: File) -> Estimate:
        """All numbers of one file, and of each draw."""
        ap = ap_of(file, validation.objects, np.concatenate([np.ones((1, validation.images), int), drawn]))
        numbers = means(ap, validation.sets)
        return Estimate({k: float(v[0]) for k, v in numbers.items()}, {k: v[1:] for k, v in numbers.items()})

    singles = [estimate(detect(single(row, rows))) for row in range(rows)]
    crossed = _merge([(detect(mixture), fold_of == fold) for fold, mixture in enumerate(of_folds)])
    return Choice(chosen, singles, estimate(detect(chosen)), estimate(crossed), of_folds)


def single(row: int, rows: int) -> Mixture:
    """The mixture that is one row."""
    return tuple(float(row == other) for other in range(rows))


def _bags(random: np.random.Generator, selected: np.ndarray, bags: int) -> np.ndarray:
    """Weights [bags, I]: the selected images as they are if there is one bag, else drawn with replacement."""
    if bags == 1:
        return selected[None].astype(np.int64)
    number = int(selected.sum())
    return random.multinomial(number, selected / number, bags)


def _greedy(value: Callable[[Mixture], np.ndarray], views: int, rows: int) -> np.ndarray:
    """Shares [V, P] that each view chooses for itself; all take each step together, so that they can share values."""
    alone = np.stack([value(single(row, rows)) for row in range(rows)])  # [P, V]
    tried = np.argsort(-alone, axis=0, kind="stable")[:TRIED]  # [TRIED, V]
    counts = np.zeros((views, rows), np.int64)
    counts[np.arange(views), tried[0]] = 1
    best, active = alone[tried[0], np.arange(views)], np.ones(views, bool)
    for _ in range(MOST_MEMBERS - 1):
        for view in np.flatnonzero(active):
            options = counts[view] + np.eye(rows, dtype=np.int64)[tried[:, view]]
            values = [value(_mixture(option))[view] for option in options]
            winner = int(np.argmax(values))
            active[view] = values[winner] > best[view]
            if active[view]:
                counts[view], best[view] = options[winner], values[winner]
    return counts / counts.sum(1, keepdims=True)


def _mixture(counts: np.ndarray) -> Mixture:
    """The shares of rows that are counted; multiples are the same mixture."""
    return tuple((counts / counts.sum()).round(6).tolist())


def _without_small(shares: np.ndarray) -> Mixture:
    """Shares of at least `LEAST_SHARE`, of sum 1; the largest one stays in any case."""
    kept = np.where(shares >= min(LEAST_SHARE, shares.max()), shares, 0)
    return _mixture(kept)


def _merge(parts: Sequence[tuple[File, np.ndarray]]) -> File:
    """One file from several, of which each gives the detections on some images, bool [I]."""
    merged: File = []
    for of_label in zip(*(file for file, _ in parts), strict=True):
        taken = list(_taken(of_label, [images for _, images in parts]))
        if not taken:
            merged.append(None)
            continue
        image, score = (np.concatenate([getattr(part, key) for part in taken]) for key in ("image", "score"))
        order = np.lexsort((image, -score))
        hit, counted = (np.concatenate([getattr(part, key) for part in taken], 1) for key in ("hit", "counted"))
        merged.append(Detections(image[order], hit[:, order], counted[:, order], score[order]))
    return merged


def _taken(of_label: Sequence[Detections | None], images: Sequence[np.ndarray]) -> Iterator[Detections]:
    """One category's detections of each part, on that part's images."""
    for detections, wanted in zip(of_label, images, strict=True):
        if detections is not None:
            rows = np.flatnonzero(wanted[detections.image])
            yield Detections(
                detections.image[rows], detections.hit[:, rows], detections.counted[:, rows], detections.score[rows]
            )
