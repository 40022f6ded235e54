"""One YAML file -> one frozen, typed `Config`.

A file may name a `base` file (path relative to itself) and then holds only what differs from it;
`section.key=value` overrides any leaf. The classifier and the sampler are chosen by `name`, and a
new name replaces the whole section, so that no key of one method leaks into another. Unknown keys,
wrong types and impossible values raise `UserError` before any data is read.
"""

import dataclasses
import itertools
import math
import typing
from collections.abc import Callable
from pathlib import Path

import yaml

from bags.classifier_sections import (
    ACSLConfig,
    ClassBalancedSigmoidConfig,
    ClassifierConfig,
    EQLv2Config,
    FederatedConfig,
    GroupSoftmaxConfig,
    LogitAdjustmentConfig,
    NCMConfig,
    NorCalConfig,
    ReweightedSoftmaxConfig,
    SeesawConfig,
    SigmoidFocalConfig,
    SimCalConfig,
    TauNormConfig,
)
from bags.errors import UserError
from bags.files import write_text
from bags.rows import compose
from bags.sections import ClassBalancedConfig, Config, DetectorConfig, RepeatFactorConfig, TailOnlyConfig
from bags.typed_yaml import convert, merge, parse_yaml


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Reads a row (DATASET/METHOD, or a YAML file with its bases), then `section.key=value` overrides, left to right.

    Raises UserError, naming the file and the key, for anything that cannot be used.
    """
    return _resolve(compose(Path(path)).tree, overrides, str(path))


def override_config(config: Config, overrides: typing.Sequence[str]) -> Config:
    """The configuration with some leaves changed, checked as `load_config` does."""
    return _resolve(config_to_dict(config), overrides, config.name)


def _resolve(tree: dict, overrides: typing.Sequence[str], source: str) -> Config:
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UserError(f"override '{override}': expected section.key=value")
        try:
            value = parse_yaml(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"override '{override}': the value is not YAML ({' '.join(str(error).split())})") from None
        for part in reversed(key.split(".")):
            value = {part: value}
        merge(tree, value)
    config = config_from_dict(tree, source)
    _check(config, source)
    return config


def config_from_dict(tree: dict, source: str = "config") -> Config:
    """Nested plain values -> Config, types checked. `source` names the origin in errors."""
    return convert(tree, Config, "", source)


def config_to_dict(config: Config) -> dict:
    """The resolved configuration as plain values: what YAML and a checkpoint hold."""

    def plain(value):
        """Dataclasses as dicts, tuples as lists."""
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    return plain(config)


def save_config(config: Config, path: str | Path) -> None:
    """Writes the resolved file; `load_config` of it gives an equal Config."""
    write_text(Path(path), yaml.safe_dump(config_to_dict(config), sort_keys=False))


# --------------------------------------------------------------------------- values

Need = Callable[[bool, str, str], None]  # (holds, key, what was expected)


def _check(config: Config, source: str) -> None:
    """Values that have the right type and still cannot work."""

    def need(holds: bool, key: str, expected: str) -> None:
        """Refuses a value that does not hold."""
        if not holds:
            raise UserError(f"{source}: {key}: expected {expected}")

    _check_data(config, need)
    _check_detector(config.detector, need)
    _check_schedule(config, need)
    _check_methods(config, need)


def _need_rising(need: Need, key: str, values: tuple[int, ...]) -> None:
    ascending = all(a < b for a, b in zip((0, *values), values, strict=False))
    need(bool(values) and ascending and values[-1] < 2**62, key, f"rising numbers above 0, got {list(values)}")


def _check_data(config: Config, need: Need) -> None:
    data = config.data
    for key in ("name", "data.name"):
        value = config.name if key == "name" else data.name
        need(value not in ("", ".", "..") and not set(value) & set("/\\\0"), key, f"a folder name, got {value!r}")
    for key, value in (("output", config.output), ("data.root", data.root)):
        need(bool(value) and "\0" not in value, key, f"a path, got {value!r}")
    need(0 <= config.seed < 2**31, "seed", f"0 <= seed < 2**31, got {config.seed}")
    need(0 <= data.flip <= 1, "data.flip", f"a probability, got {data.flip}")
    sides = data.short_sides
    need(all(0 < a <= b for a, b in zip(sides, sides[1:] or sides, strict=False)), "data.short_sides",
         f"rising numbers above 0, got {list(sides)}")  # fmt: skip
    need(data.long_side >= max(sides, default=1), "data.long_side", f"short_sides or more, got {data.long_side}")
    need(1 <= data.semantic_classes <= 255, "data.semantic_classes", f"1 to 255, got {data.semantic_classes}")
    need(data.train_semantic is None or config.detector.framework == "htc", "data.train_semantic",
         f"detector.framework htc: {config.detector.framework} has no semantic branch")  # fmt: skip
    need(0 <= data.workers <= 64, "data.workers", f"0 to 64, got {data.workers}")
    need(data.max_bad_images >= 0, "data.max_bad_images", f"0 or more, got {data.max_bad_images}")


def _check_detector(detector: DetectorConfig, need: Need) -> None:
    rpn, roi = detector.rpn, detector.roi
    for key in ("fpn_channels", "min_size", "max_size"):
        need(1 <= getattr(detector, key) < 2**15, f"detector.{key}", f"1 to 32767, got {getattr(detector, key)}")
    need(detector.max_size >= detector.min_size, "detector.max_size", f"min_size or more, got {detector.max_size}")
    most = 0 if detector.backbone == "small" else 3
    need(0 <= detector.frozen_stages <= most, "detector.frozen_stages", f"0 to {most}, got {detector.frozen_stages}")
    for key in ("image_mean", "image_std"):
        values = getattr(detector, key)
        need(
            len(values) == 3 and all(0 <= v < 256 for v in values), f"detector.{key}", f"3 numbers, got {list(values)}"
        )
    need(min(detector.image_std) > 0, "detector.image_std", f"numbers above 0, got {list(detector.image_std)}")
    imagenet = detector.backbone_weights is None or detector.backbone != "small"
    need(imagenet, "detector.backbone_weights", "a backbone of torchvision's: there are none for small")
    stages = detector.deformable_stages
    resnet = detector.backbone.startswith("resne")
    need(not stages or resnet, "detector.deformable_stages", f"a ResNet: {detector.backbone} cannot have them")
    need(set(stages) <= {1, 2, 3, 4} and list(stages) == sorted(set(stages)), "detector.deformable_stages",
         f"rising numbers of 1 to 4, got {list(stages)}")  # fmt: skip
    need(roi.class_agnostic or not detector.is_cascade, "detector.roi.class_agnostic",
         f"true: the stages of {detector.framework} have one box regression for all categories")  # fmt: skip
    need(bool(detector.init_from) or not detector.other_categories, "detector.init_from",
         "a checkpoint: detector.other_categories says what to take from it")  # fmt: skip
    for key in ("batch_size", "train_proposals", "test_proposals"):
        need(getattr(rpn, key) >= 1, f"detector.rpn.{key}", f"1 or more, got {getattr(rpn, key)}")
    sizes = [size for level in rpn.anchor_sizes for size in level]
    equal = len({len(level) for level in rpn.anchor_sizes}) == 1
    need(bool(sizes) and min(sizes) > 0 and equal, "detector.rpn.anchor_sizes",
         f"a list per pyramid level, each of equally many sizes above 0, got {rpn.anchor_sizes}")  # fmt: skip
    ratios = rpn.aspect_ratios
    need(bool(ratios) and min(ratios) > 0, "detector.rpn.aspect_ratios", f"numbers above 0, got {ratios}")
    ratio = roi.sampling_ratio
    need(0 <= ratio <= 64, "detector.roi.sampling_ratio", f"0 (adaptive) to 64, got {ratio}")
    need(roi.batch_size >= 1, "detector.roi.batch_size", f"1 or more, got {roi.batch_size}")
    need(1 <= roi.fc < 2**17, "detector.roi.fc", f"1 to 131071, got {roi.fc}")
    need(
        0 < roi.positive_fraction <= 1, "detector.roi.positive_fraction", f"above 0, to 1, got {roi.positive_fraction}"
    )


def _check_schedule(config: Config, need: Need) -> None:
    train, test = config.train, config.test
    for key in ("epochs", "batch_size", "accumulate", "log_every"):
        need(1 <= getattr(train, key) < 10**6, f"train.{key}", f"1 to 999999, got {getattr(train, key)}")
    every = train.checkpoint_every
    need(train.evaluate_every >= 0, "train.evaluate_every", f"0 or more epochs, got {train.evaluate_every}")
    need(every is None or 1 <= every < 10**6, "train.checkpoint_every", f"1 to 999999, or null, got {every}")
    need(train.batch_size % train.accumulate == 0, "train.accumulate",
         f"a divisor of train.batch_size={train.batch_size}, got {train.accumulate}")  # fmt: skip
    need(0 < train.lr < math.inf, "train.lr", f"a number above 0, got {train.lr}")
    for key in ("momentum", "weight_decay", "gamma", "warmup_factor"):
        need(0 <= getattr(train, key) <= 1, f"train.{key}", f"0 to 1, got {getattr(train, key)}")
    need(0 <= train.clip_norm < math.inf, "train.clip_norm", f"0 (no clipping) or more, got {train.clip_norm}")
    need(train.warmup_iterations >= 0, "train.warmup_iterations", f"0 or more, got {train.warmup_iterations}")
    rising_milestones = all(a < b for a, b in itertools.pairwise((0, *train.milestones, math.inf)))
    need(rising_milestones, "train.milestones", f"rising epochs above 0, got {list(train.milestones)}")
    need(config.detector.init_from != "", "detector.init_from", "a checkpoint, row:NAME or null, got ''")
    need(train.part == "all" or config.detector.init_from is not None, "detector.init_from",
         f"a checkpoint: with train.part={train.part} the rest of the detector would stay random")  # fmt: skip
    agnostic = config.detector.roi.class_agnostic and not config.detector.has_masks
    parts = ("all", *(("head",) if not config.detector.has_masks else ()), *(("cls",) if agnostic else ()))
    need(not config.detector.other_categories or train.part in parts, "train.part",
         f"{' or '.join(parts)}: with detector.other_categories more starts new, got {train.part}")  # fmt: skip
    if train.features == "cached":
        need(
            train.part == "cls",
            "train.part",
            f"cls: with train.features=cached no other can be trained, got {train.part}",
        )
        need(not config.data.short_sides, "train.features",
             "live: data.short_sides draws sizes anew each time, which cannot be stored")  # fmt: skip
    need(config.store.negatives >= 0, "store.negatives", f"0 or more, got {config.store.negatives}")
    row = config.init_row
    need(row != config.name, "detector.init_from", "another row than this one")
    need(row is None or (bool(row) and not set(row) & set("/\\")), "detector.init_from", f"row:NAME, got row:{row}")
    need(test.batch_size >= 1, "test.batch_size", f"1 or more, got {test.batch_size}")
    limit = test.max_detections
    need(1 <= limit <= 10**6, "test.max_detections", f"1 to 1000000, got {limit}")
    need(test.max_per_category >= 0, "test.max_per_category", f"0 (any number) or more, got {test.max_per_category}")
    need(0 <= test.score_threshold < 1, "test.score_threshold", f"0 <= threshold < 1, got {test.score_threshold}")
    need(0 < test.nms_threshold <= 1, "test.nms_threshold", f"above 0, to 1, got {test.nms_threshold}")
    _need_rising(need, "test.bins", test.bins)


def _check_methods(config: Config, need: Need) -> None:
    classifier, train = config.classifier, config.train
    match classifier:
        case GroupSoftmaxConfig():
            _check_group_softmax(classifier, need)
        case ReweightedSoftmaxConfig(beta=beta):
            need(0 <= beta < 1, "classifier.beta", f"0 <= beta < 1, got {beta}")
        case SigmoidFocalConfig(gamma=gamma, alpha=alpha):
            need(0 <= gamma < math.inf, "classifier.gamma", f"0 or more, got {gamma}")
            need(0 <= alpha <= 1, "classifier.alpha", f"0 to 1, got {alpha}")
        case NCMConfig(scale=scale):
            need(0 < scale < math.inf, "classifier.scale", f"above 0, got {scale}")
        case TauNormConfig(tau=tau, tail_below=below):
            need(0 <= tau < math.inf, "classifier.tau", f"0 or more, got {tau}")
            need(below >= 1, "classifier.tail_below", f"1 or more, got {below}")
        case NorCalConfig(gamma=gamma):
            need(0 <= gamma < math.inf, "classifier.gamma", f"0 or more, got {gamma}")
    _check_later_methods(classifier, need)
    if isinstance(classifier, NCMConfig | TauNormConfig | NorCalConfig):
        need(train.part == "none", "train.part", f"none: {classifier.name} trains nothing, got {train.part}")
    match config.sampler:
        case RepeatFactorConfig(threshold=threshold):
            need(0 < threshold <= 1, "sampler.threshold", f"above 0, to 1, got {threshold}")
        case TailOnlyConfig(below=below):
            need(below >= 1, "sampler.below", f"1 or more, got {below}")
        case ClassBalancedConfig():
            need(config.is_cached, "train.features",
                 "cached, and train.part=cls: sampler class_balanced draws from stored proposals")  # fmt: skip
    if isinstance(classifier, SimCalConfig):
        need(classifier.below >= 1, "classifier.below", f"1 or more, got {classifier.below}")
        need(train.part == "cls", "train.part", f"cls: simcal keeps the softmax of init_from, got {train.part}")


def _check_group_softmax(classifier: GroupSoftmaxConfig, need: Need) -> None:
    beta, weights, groups = classifier.others_ratio, classifier.group_weights, classifier.groups
    _need_rising(need, "classifier.boundaries", classifier.boundaries)
    need(isinstance(beta, str) or 0 <= beta < math.inf, "classifier.others_ratio", f"0 or more, got {beta}")
    need(classifier.equal_groups >= 0, "classifier.equal_groups", f"0 or more, got {classifier.equal_groups}")
    need(groups is None or len(groups) > 0, "classifier.groups", "one list of category ids or more, got none")
    need(groups is None or not classifier.equal_groups, "classifier.groups", "only one of groups and equal_groups")
    number = (len(groups or ()) or classifier.equal_groups or len(classifier.boundaries) + 1) + 1
    usable = weights is None or (len(weights) == number and all(0 <= w < math.inf for w in weights))
    need(usable, "classifier.group_weights", f"{number} numbers of 0 or more, got {weights}")
    need(0 <= classifier.scale < math.inf, "classifier.scale", f"0 or more, got {classifier.scale}")
    given = classifier.temperatures
    usable = given is None or given == "learned" or (len(given) == number and all(0 < t < math.inf for t in given))
    need(usable, "classifier.temperatures", f"learned, or {number} numbers above 0, got {given}")


def _check_later_methods(classifier: ClassifierConfig, need: Need) -> None:
    prior = getattr(classifier, "prior", 0.5)
    need(0 < prior < 1, "classifier.prior", f"a probability between 0 and 1, got {prior}")
    tail = getattr(classifier, "tail_images", 0)
    need(tail >= 0, "classifier.tail_images", f"0 or more, got {tail}")
    not_negative: tuple[str, ...] = ()
    match classifier:
        case EQLv2Config():
            not_negative = ("gamma", "mu", "alpha")
        case SeesawConfig():
            not_negative = ("p", "q", "scale")
        case FederatedConfig(number=number):
            need(number >= 1, "classifier.number", f"1 or more, got {number}")
            not_negative = ("power",)
        case LogitAdjustmentConfig():
            not_negative = ("tau",)
        case ACSLConfig(threshold=threshold):
            need(0 < threshold < 1, "classifier.threshold", f"between 0 and 1, got {threshold}")
        case ClassBalancedSigmoidConfig(beta=beta):
            need(0 <= beta < 1, "classifier.beta", f"0 <= beta < 1, got {beta}")
    for key in not_negative:
        value = getattr(classifier, key)
        need(0 <= value < math.inf, f"classifier.{key}", f"0 or more, got {value}")
