"""Configuration -> objects. The only place that maps a name to a class."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from bags.classifiers.base import ProposalClassifier
from bags.classifiers.group_softmax import GroupSoftmax
from bags.classifiers.groups import assign_groups
from bags.classifiers.softmax import Softmax
from bags.config import ClassifierConfig, Config, GroupSoftmaxConfig, SoftmaxConfig, config_from_dict, override_config
from bags.data.dataset import DetectionDataset, collate
from bags.data.index import AnnotationIndex
from bags.data.samplers import ShardSampler, UniformSampler
from bags.data.statistics import CategoryStats
from bags.detectors.backbones import SmallFPN, resnet_fpn
from bags.detectors.faster_rcnn import faster_rcnn
from bags.engine.checkpoint import load_checkpoint, load_weights
from bags.errors import UserError
from bags.evaluation.detection_ap import evaluate


def build_dataset(config: Config, split: str) -> DetectionDataset:
    """`split` is "train" (augmented) or "val" (as it is)."""
    data, root = config.data, Path(config.data.root)
    if split == "train":
        return DetectionDataset(AnnotationIndex.open(root / data.train), root / data.train_images, data.flip)
    return DetectionDataset(AnnotationIndex.open(root / data.val), root / data.val_images)


def build_train_loader(config: Config, dataset: DetectionDataset) -> DataLoader:
    """Endless reuse, one epoch per iteration; the batch is split over the ranks."""
    sampler = UniformSampler(len(dataset), config.train.batch_size, config.seed)
    return _loader(config, dataset, sampler)


def build_val_loader(config: Config, dataset: DetectionDataset) -> DataLoader:
    """This rank's share of the images, in order."""
    return _loader(config, dataset, ShardSampler(len(dataset), config.test.batch_size))


def _loader(config: Config, dataset: DetectionDataset, sampler) -> DataLoader:
    workers = config.data.workers
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available() and config.device != "cpu",
    )


def build_classifier(config: ClassifierConfig, in_features: int, stats: CategoryStats) -> ProposalClassifier:
    """The classifier that `config.name` names, untrained."""
    match config:
        case SoftmaxConfig():
            return Softmax(in_features, stats.num_categories)
        case GroupSoftmaxConfig(boundaries=boundaries, others_ratio=ratio):
            return GroupSoftmax(in_features, assign_groups(stats.instance_counts, boundaries), ratio)
    raise TypeError(f"no classifier for {type(config).__name__}")


def build_detector(config: Config, stats: CategoryStats) -> nn.Module:
    """The detector of a configuration with new weights (`initialise` loads `init_from`).

    In training mode `detector(images, targets)` gives a dict of losses, in evaluation mode
    `detector(images)` a list of {boxes, scores, labels}, as torchvision's detectors do.
    """
    detector, rpn, roi, test = config.detector, config.detector.rpn, config.detector.roi, config.test
    if detector.backbone == "small":
        levels = 2 if len(rpn.anchor_sizes) == 2 else 3
        backbone = SmallFPN(detector.fpn_channels, levels)
    else:
        backbone, levels = resnet_fpn(detector.backbone, detector.fpn_channels), 5
    if len(rpn.anchor_sizes) != levels:
        raise UserError(
            f"{config.name}: detector.rpn.anchor_sizes: expected {levels} lists, one for each pyramid level "
            f"of backbone {detector.backbone}, got {len(rpn.anchor_sizes)}"
        )
    return faster_rcnn(
        backbone,
        lambda in_features: build_classifier(config.classifier, in_features, stats),
        anchor_sizes=rpn.anchor_sizes,
        aspect_ratios=rpn.aspect_ratios,
        rpn_batch_size=rpn.batch_size,
        train_proposals=rpn.train_proposals,
        test_proposals=rpn.test_proposals,
        roi_batch_size=roi.batch_size,
        positive_fraction=roi.positive_fraction,
        sampling_ratio=roi.sampling_ratio,
        fc=roi.fc,
        class_agnostic=roi.class_agnostic,
        min_size=detector.min_size,
        max_size=detector.max_size,
        score_threshold=test.score_threshold,
        nms_threshold=test.nms_threshold,
        max_detections=test.max_detections,
    )


def initialise(detector: nn.Module, config: Config, index: AnnotationIndex) -> list[str]:
    """Loads `detector.init_from`, if any; returns the names of the parameters that stay new.

    Raises UserError where the checkpoint is of other categories, or gives nothing that fits.
    """
    path = config.init_file
    if path is None:
        return list(detector.state_dict())
    checkpoint = load_checkpoint(path)
    check_categories(CategoryStats.from_dict(checkpoint["stats"]), index, path)
    saved = config_from_dict(checkpoint["config"], f"{path}: config").classifier
    same = type(saved) is SoftmaxConfig or (
        saved == config.classifier
        and checkpoint["stats"]["instance_counts"] == CategoryStats.from_index(index).to_dict()["instance_counts"]
    )  # the columns of grouped logits depend on boundaries and counts
    skip = "classifier." if config.detector.reset_classifier or not same else None
    new = load_weights(detector, checkpoint, skip)
    foreign = [name for name in new if "classifier." not in name]
    if foreign:
        raise UserError(
            f"{path}: its detector is another than this configuration's: {foreign[0]} does not fit "
            f"({len(foreign)} tensors in all); use the same detector section as the run it comes from"
        )
    return new


def check_categories(stats: CategoryStats, index: AnnotationIndex, source: Path) -> None:
    """Raises UserError unless `stats`, which come from `source`, have the categories of `index`."""
    theirs = list(zip(stats.category_ids, stats.names, strict=True))
    ours = list(zip(index.category_ids.tolist(), index.category_names, strict=True))
    if theirs != ours:
        first = next(pair for pair in itertools.zip_longest(theirs, ours) if pair[0] != pair[1])
        theirs_first, ours_first = (f"id {c[0]} '{c[1]}'" if c else "none" for c in first)
        raise UserError(
            f"{source}: has {len(theirs)} categories, not the {len(ours)} of {index.path}; first "
            f"difference: {theirs_first} against {ours_first}. Use the dataset it was trained on"
        )


def evaluate_predictions(config: Config, stats: CategoryStats, predictions: Path) -> dict[str, float]:
    """Scores a results file of the configuration's validation set."""
    return evaluate(
        Path(config.data.root) / config.data.val,
        predictions,
        instance_counts=stats.instance_counts,
        image_counts=stats.image_counts,
        boundaries=config.test.bins,
        max_detections=config.test.max_detections,
    )


def load_detector(
    path: str | Path, min_size: int | None = None, max_size: int | None = None, overrides: Sequence[str] = ()
) -> tuple[nn.Module, dict]:
    """A trained detector from its checkpoint alone, in evaluation mode, on the CPU.

    min_size, max_size: other resizing limits than in training, in pixels.
    overrides: `section.key=value` for the sections data and test, and device.
    Returns (detector, meta): meta["config"] is a Config, meta["stats"] the CategoryStats of the
    training set, meta["categories"] its categories in label order, as {id, name} (label l of a
    detection is categories[l - 1]), meta["counts"] their training instances.
    Raises UserError for a file that is no checkpoint.
    """
    checkpoint = load_checkpoint(path)
    for override in overrides:
        if not override.startswith(("data.", "test.", "device=")):
            raise UserError(f"override '{override}': a trained detector takes data.*, test.* and device only")
    config = override_config(config_from_dict(checkpoint["config"], f"{path}: config"), overrides)
    stats = CategoryStats.from_dict(checkpoint["stats"])
    detector = build_detector(config, stats)
    try:
        detector.load_state_dict(checkpoint["model"])
    except (RuntimeError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: the weights do not fit its own configuration ({str(error)[:200]})") from None
    if min_size is not None:
        detector.transform.min_size = (min_size,)
    if max_size is not None:
        detector.transform.max_size = max_size
    categories = [{"id": i, "name": n} for i, n in zip(stats.category_ids, stats.names, strict=True)]
    meta = {"config": config, "stats": stats, "categories": categories, "counts": list(stats.instance_counts)}
    return detector.eval(), meta
