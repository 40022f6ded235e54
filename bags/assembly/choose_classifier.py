"""The best classifier for a trained torchvision Faster or Mask R-CNN, chosen in memory.

choice = bags.choose_classifier(detector, train, validation, instance_counts)
print(choice)
bags.balance(detector, instance_counts, classifier=choice.classifier)

Several classifiers are trained on the frozen detector's proposals. The best of them, or the mean of the best, is chosen
by the validation images, and cross-fitting says how much it gains on other images (`evaluation.selection`).
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bags.assembly.balance import BalancedRoIHeads, balance, check_fits, copy_layer, new_classifier, unbalance
from bags.assembly.in_memory import Trained, ValidationImages, train_together, training_proposals, validation_proposals
from bags.assembly.mixtures import detect_stored
from bags.classifiers import average_of, classifier_settings
from bags.classifiers.base import ProposalClassifier, checked_counts
from bags.config.sections import StoreConfig, TestConfig, TrainConfig
from bags.core.progress import Progress
from bags.core.settings import need
from bags.data.statistics import training_of
from bags.engine.optim import ADAMW_RATE
from bags.evaluation import selection
from bags.evaluation.selection import Choice, Estimate, Mixture

OWN, BALANCED = "detector", "balanced"  # rows of the detector's own layer, and of the classifier that it was given
SHOWN = ("AP", "AP_tail", "AP_head")


class Row(NamedTuple):
    """One classifier to choose from.

    classifier  a name as in a configuration; or a mapping of such a section, as {"name": "seesaw", "p": 0.6}; or a
                function of the width of the features that makes an untrained classifier
    times       it is trained for so many times the epochs
    optimizer   "sgd" or "adamw"
    """

    classifier: str | Mapping[str, Any] | Callable[[int], ProposalClassifier]
    times: int = 1
    optimizer: str = "sgd"


ROWS = {  # named as in configs/methods; the first is the control
    "softmax_retrained": Row("softmax"),
    "softmax_retrained x4": Row("softmax", 4),
    "softmax_retrained x4 adamw": Row("softmax", 4, "adamw"),
    "bags": Row("group_softmax"),
    "bags_cosine": Row({"name": "group_softmax", "scale": 20}),
    "reweight_cls": Row({"name": "reweighted_softmax", "weighting": "effective_number_clipped"}),
    "seesaw": Row("seesaw"),
    "norcal": Row("norcal"),
}


class Numbers(NamedTuple):
    """Numbers of a row, or of the choice."""

    values: dict[str, float]  # AP, AP50, AP75, AP1, ..., AP_tail, AP_head in 0..1; NaN where no category enters it
    gain: dict[str, tuple[float, float, float]]  # of each over the control's: difference, ends of the 95 % interval


@dataclass(frozen=True, eq=False, repr=False)
class ClassifierChoice:
    """A chosen classifier, and the numbers to judge it by; as text, a table of them.

    metric              by which it was chosen
    rows                numbers of each row on the validation images, the control first
    shares              of the rows that are chosen, of sum 1
    without_fold        what would be chosen without each fold of the validation images
    optimistic          numbers of the chosen classifier on the images that it was chosen with
    honest              cross-fitted: each image is detected in with what is chosen without it
    better_than_control whether the honest gain and its whole interval are above 0
    over                honest gain by the metric, with its interval, over the control and over what the detector has
    instead             the better one of these two, where the choice may be no better than it; else None
    classifiers         of each row, trained
    classifier          the chosen one: that of a row, or an `Average` of several
    """

    metric: str
    rows: dict[str, Numbers]
    shares: dict[str, float]
    without_fold: tuple[dict[str, float], ...]
    optimistic: Numbers
    honest: Numbers
    better_than_control: bool
    over: dict[str, tuple[float, float, float]]
    instead: str | None
    classifiers: dict[str, ProposalClassifier]
    classifier: ProposalClassifier

    @property
    def control(self) -> str:
        """The name of the row that others are compared with."""
        return next(iter(self.rows))

    def __repr__(self) -> str:
        """A table of the rows by the metric, in percent, then the choice and what it says."""
        columns = [name for name in dict.fromkeys((self.metric, *SHOWN)) if name in self.honest.values]
        ordered = sorted(self.rows.items(), key=lambda row: -row[1].values[self.metric])
        lines = [*ordered, ("chosen, on the same images", self.optimistic), ("chosen, on others", self.honest)]
        table = [["", *columns, "gain", "95 %"]]
        for name, numbers in lines:
            gain, low, high = (_percent(value, "+.1f") for value in numbers.gain[self.metric])
            compared = [gain, f"{low} to {high}"] if name != self.control else ["", ""]
            table.append([name, *(_percent(numbers.values[column], ".1f") for column in columns), *compared])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        text = "\n".join(
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in table
        )
        shares = " + ".join(f"{share:.0%} {name}" for name, share in self.shares.items())
        over = {row: [_percent(value, "+.1f") for value in gain] for row, gain in self.over.items()}
        gains = (f"{gain} against {row} (95 %: {low} to {high})" for row, (gain, low, high) in over.items())
        text += f"\nChosen: {shares}.\nOn images that it was not chosen with, {self.metric} is {' and '.join(gains)}."
        if self.instead is not None:
            text += (
                f"\nNo other choice is better than {self.instead}."
                if list(self.shares) == [self.instead]
                else f"\nThe validation images cannot tell it from {self.instead}: keep that one."
            )
        return text


def choose_classifier(
    detector: nn.Module,
    train: Iterable,
    validation: Iterable,
    instance_counts: Sequence[int] | Tensor,
    image_counts: Sequence[int] | Tensor | None = None,
    rows: Mapping[str, Any] = ROWS,
    epochs: int = 12,
    batch_size: int = 8,
    lr: float = 0.01,
    negatives: int = StoreConfig.negatives,
    metric: str = "AP",
    boundaries: Sequence[int] = TestConfig.bins,
    folds: int = 5,
    draws: int = 500,
    seed: int = 0,
    members: int = selection.MEMBERS,
) -> ClassifierChoice:
    """Choose the classifier of a trained torchvision detector, which is left as it was.

    detector            as `bags.balance` takes it, or already balanced
    train, validation   batches (images, targets) as torchvision takes them, gone through once each. Crowd regions
                        (iscrowd in the targets) are not trained on, and are scored as COCO does
    instance_counts, image_counts   [C] training boxes and images per label 1..C, as in `bags.balance`
    rows                name -> `Row`, or a tuple of its fields; the first is the control. The layer of the detector is
                        one more row, `detector`, and so is the classifier of a balanced one, `balanced`
    epochs, batch_size, lr   passes over the stored features, images of a step, rate of SGD; AdamW's is 2.56 / width of
                        the features. The rates fall to a tenth after two thirds and eleven twelfths of the epochs
    negatives           background proposals kept of each training image, in half precision
    metric              of boxes: AP, AP50, AP75, AP1, ..., AP_tail, AP_head; with image_counts APr, APc, APf
    boundaries          of the categories' counts for AP1, AP2, ... and tail and head, as in `bags.evaluate`; those of
                        the groups of BAGS are a setting of its rows
    folds, draws        of the images for the honest estimate; of the bootstrap
    seed, members       equal seeds give equal results on the same machine; most rows in a mean, 1: a single row
    Raises ValueError, which names the argument, for what cannot be used.
    """
    _check_numbers(lr, seed, epochs=epochs, batch_size=batch_size, draws=draws, members=members, negatives=negatives)
    _check_boundaries(boundaries)
    was_balanced = isinstance(getattr(detector, "roi_heads", None), BalancedRoIHeads)
    with _random_state(detector), _frozen(detector, instance_counts) as roi_heads:
        layer: nn.Linear = roi_heads.box_predictor.cls_score
        counts = checked_counts("instance_counts", instance_counts, layer.out_features - 1)
        images = counts if image_counts is None else checked_counts("image_counts", image_counts, len(counts))
        numbers = tuple(counts.tolist()), tuple(images.tolist())
        classifiers, trained = _classifiers(rows, roi_heads, *numbers, (epochs, batch_size, lr), seed, was_balanced)
        seen = validation_proposals(detector, validation, len(counts))
        sets = _sets(seen, counts, None if image_counts is None else images, boundaries)
        _check_metric(metric, sets, folds, seen)
        proposals = training_proposals(detector, train, len(counts), negatives, seed)
        for length in dict.fromkeys(row.config.epochs for row in trained):
            together = [row for row in trained if row.config.epochs == length]
            train_together(together, proposals, roi_heads.fg_bg_sampler, seed, layer.weight.device)
        return _select(detector, classifiers, seen, sets, metric, (folds, draws, seed, members))


def _check_numbers(lr: float, seed: int, **numbers: int) -> None:
    for name, value in {"seed": seed, **numbers}.items():
        least = 0 if name in ("negatives", "seed") else 1
        need(type(value) is int and value >= least, name, f"a whole number of {least} or more", value)
    need(seed < 2**31, "seed", "a whole number below 2 ** 31", seed)
    need(isinstance(lr, int | float) and 0 < lr < math.inf, "lr", "a number above 0", lr)


def _check_boundaries(boundaries: Any) -> None:
    edges = list(boundaries) if isinstance(boundaries, Sequence) else []
    rising = all(isinstance(n, int) and n > 0 for n in edges) and edges == sorted(set(edges)) and len(edges) > 0
    need(rising, "boundaries", "whole numbers, rising and above 0", boundaries)


@contextlib.contextmanager
def _frozen(detector: Any, counts: Sequence[int] | Tensor) -> Iterator[BalancedRoIHeads]:
    """The RoIHeads of a detector in evaluation mode, whose classifier may be replaced; afterwards all is as before."""
    modes = {module: module.training for module in detector.modules()}
    given = getattr(detector, "roi_heads", None)
    if not isinstance(given, BalancedRoIHeads):
        balance(detector, counts, classifier="softmax", keep_weights=True)
    roi_heads = detector.roi_heads
    classifier = roi_heads.classifier
    try:
        dtype = roi_heads.box_predictor.cls_score.weight.dtype
        need(dtype == torch.float32, "detector", "weights of torch.float32", dtype)
        detector.eval()
        yield roi_heads
    finally:
        roi_heads.classifier = classifier
        if roi_heads is not given:
            unbalance(detector)
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def _random_state(detector: nn.Module) -> Iterator[None]:
    """Torch's generators are afterwards as before."""
    need(isinstance(detector, nn.Module), "detector", "torchvision's Faster or Mask R-CNN", type(detector).__name__)
    devices = {parameter.device for parameter in detector.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        yield


def _classifiers(
    rows: Mapping[str, Any],
    roi_heads: BalancedRoIHeads,
    counts: tuple[int, ...],
    images: tuple[int, ...],
    schedule: tuple[int, int, float],
    seed: int,
    was_balanced: bool,
) -> tuple[dict[str, ProposalClassifier], list[Trained]]:
    """The classifiers of all rows, and those that are to be trained. Raises ValueError, naming the row."""
    need(isinstance(rows, Mapping) and len(rows) > 0, "rows", "a mapping of names to rows, with one or more")
    layer: nn.Linear = roi_heads.box_predictor.cls_score
    classifiers, trained = {}, []
    for name, given in rows.items():
        try:
            row = _checked_row(name, given)
            torch.manual_seed(seed)
            classifier, is_trained = _untrained(row.classifier, layer, counts, images)
        except ValueError as error:
            raise ValueError(f"rows[{name!r}]: {error}") from error
        classifiers[name] = classifier.to(layer.weight.device).eval()
        if is_trained:
            trained.append(Trained(name, classifier, _train_config(row, *schedule, layer.in_features)))
    own = new_classifier("softmax", {}, layer.in_features, counts, images, True)
    copy_layer(layer, own)
    classifiers[OWN] = own.to(layer.weight.device).eval()
    if was_balanced:
        classifiers[BALANCED] = copy.deepcopy(roi_heads.classifier).eval()
    return classifiers, trained


def _checked_row(name: str, given: Any) -> Row:
    need(isinstance(name, str), "name", "text", type(name).__name__)
    need(name not in (OWN, BALANCED), "name", "another one, as the detector's own rows have this one")
    fields = given if isinstance(given, tuple) else (given,)
    need(1 <= len(fields) <= len(Row._fields), "row", "(classifier, times, optimizer)", given)
    row = Row(*fields)
    need(isinstance(row.times, int) and row.times >= 1, "times", "a whole number of 1 or more", row.times)
    need(row.optimizer in ("sgd", "adamw"), "optimizer", "'sgd' or 'adamw'", row.optimizer)
    return row


def _untrained(
    given: Any, layer: nn.Linear, counts: tuple[int, ...], images: tuple[int, ...]
) -> tuple[ProposalClassifier, bool]:
    """A new classifier, and whether it is to be trained. Raises ValueError for one that does not fit."""
    if callable(given) and not isinstance(given, nn.Module):
        classifier = given(layer.in_features)
        kind = type(classifier).__name__
        need(isinstance(classifier, ProposalClassifier), "classifier", "a function that makes a classifier", kind)
        need(not classifier.needs_fit, "classifier", "one that needs no fitting", kind)
        check_fits(classifier, layer)
        return classifier, any(parameter.requires_grad for parameter in classifier.parameters())
    words = "a name, a mapping of settings with a name, or a function that makes a classifier"
    need(isinstance(given, str | Mapping), "classifier", words, type(given).__name__)
    settings = {"name": given} if isinstance(given, str) else dict(given)
    name = settings.pop("name", None)
    settings_class = classifier_settings().get(name)
    on_softmax = settings_class is not None and settings_class.on_softmax
    classifier = new_classifier(name, settings, layer.in_features, counts, images, on_softmax)
    if on_softmax:
        copy_layer(layer, classifier)
    return classifier, settings_class is not None and settings_class.trained


def _train_config(row: Row, epochs: int, batch_size: int, lr: float, width: int) -> TrainConfig:
    """The schedule of a row: two steps down, at two thirds and eleven twelfths."""
    total = epochs * row.times
    return TrainConfig(
        part="cls",
        epochs=total,
        batch_size=batch_size,
        optimizer="adamw" if row.optimizer == "adamw" else "sgd",
        lr=ADAMW_RATE / width if row.optimizer == "adamw" else lr,
        milestones=(total * 2 / 3, total * 11 / 12),
        warmup_iterations=0,
    )


def _sets(
    seen: ValidationImages, counts: Tensor, images: Tensor | None, boundaries: Sequence[int]
) -> dict[str, np.ndarray]:
    """Which categories [C] enter which mean."""
    of_images = None if images is None else images.tolist()
    training = training_of({"categories": seen.truth.category_counts()}, counts.tolist(), of_images, list(boundaries))
    return {"AP": np.ones(len(counts), bool), **training.sets()}


def _check_metric(metric: str, sets: dict[str, np.ndarray], folds: int, seen: ValidationImages) -> None:
    """Raise ValueError, before anything is trained, for a metric or a number of folds that cannot be used."""
    known = [*sets, "AP50", "AP75"]
    need(metric in known, "metric", f"one of {', '.join(known)}", metric)
    held = [entry["category_id"] - 1 for entry in seen.truth.content["annotations"] if not entry["iscrowd"]]
    inside = metric not in sets or bool(sets[metric][held].any())
    need(inside, "metric", f"a number whose categories have objects in `validation`, as {metric} has none")
    images = len(seen.truth.image_ids)
    need(type(folds) is int and 2 <= folds <= images, "folds", f"2 to {images}, the images of `validation`", folds)


def _select(
    detector: Any,
    classifiers: dict[str, ProposalClassifier],
    seen: ValidationImages,
    sets: dict[str, np.ndarray],
    metric: str,
    settings: tuple[int, int, int, int],
) -> ClassifierChoice:
    """Detect with the rows and their means, and say what is best."""
    names = list(classifiers)
    device = detector.roi_heads.box_regressor.weight.device

    def classifier_of(mixture: Mixture) -> ProposalClassifier:
        """The classifier that is a mixture of the rows."""
        shares = {name: share for name, share in zip(names, mixture, strict=True) if share}
        return average_of([classifiers[name] for name in shares], list(shares.values()))

    def results(mixture: Mixture) -> Any:
        """The detections of a mixture."""
        detector.roi_heads.classifier = classifier_of(mixture)
        return detect_stored(detector, seen.batches, device, Path("validation"))

    def with_bar(mixtures: Iterable[Mixture], value: Callable[[Mixture], np.ndarray]) -> list[np.ndarray]:
        """The value of each mixture."""
        return [value(mixture) for mixture in Progress(list(mixtures), desc="choose", unit="mixture")]

    detect = selection.MatchedMixtures(results, seen.truth)
    order = np.array([image["id"] for image in seen.truth.content["images"]])
    validation = selection.Validation(detect.objects(len(names)), len(order), sets, metric, order)
    choice = selection.choose(detect, len(names), validation, *settings, with_bar)
    return _result(choice, classifiers, classifier_of(choice.mixture), metric)


def _result(
    choice: Choice, classifiers: dict[str, ProposalClassifier], classifier: ProposalClassifier, metric: str
) -> ClassifierChoice:
    """The choice by the names of the rows."""

    def named(mixture: Mixture) -> dict[str, float]:
        """The shares of the rows that are in a mixture."""
        return {name: share for name, share in zip(classifiers, mixture, strict=True) if share}

    def numbers(estimate: Estimate) -> Numbers:
        """Values, and gains over the control."""
        return Numbers(estimate.values, estimate.gains(choice.rows[0]))

    names = list(classifiers)
    simple = dict.fromkeys([0, names.index(BALANCED if BALANCED in names else OWN)])
    instead = choice.instead(metric, list(simple))
    return ClassifierChoice(
        metric,
        {name: numbers(estimate) for name, estimate in zip(classifiers, choice.rows, strict=True)},
        named(choice.mixture),
        tuple(named(mixture) for mixture in choice.without),
        numbers(choice.optimistic),
        numbers(choice.honest),
        choice.is_better(metric),
        {names[row]: choice.honest.gain(choice.rows[row], metric) for row in simple},
        None if instead is None else names[instead],
        classifiers,
        classifier,
    )


def _percent(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(100 * value, form)
