"""Configuration -> objects: data, detectors, detections on disk."""

import dataclasses
import hashlib
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bags import distributed
from bags.config import check_config, config_from_dict, override_config
from bags.data.dataset import DetectionDataset, Loader, collate
from bags.data.findings import REMAP
from bags.data.index import AnnotationIndex
from bags.data.samplers import (
    ClassBalancedSampler,
    RepeatFactorSampler,
    ShardSampler,
    TrainSampler,
    repeat_factors,
)
from bags.data.statistics import CategoryStats
from bags.data.transforms import short_sides, training_transform
from bags.detectors.backbones import build_backbone, load_backbone_weights
from bags.detectors.conventions import CONVENTIONS
from bags.detectors.faster_rcnn import FasterRCNN, faster_rcnn
from bags.detectors.from_features import FromFeatures
from bags.engine.checkpoint import load_checkpoint, load_weights, weights_digest
from bags.engine.predict import predict
from bags.errors import UserError
from bags.evaluation.detection_ap import Scores, score
from bags.evaluation.proposal_accuracy import ProposalAccuracy
from bags.sections import ClassBalancedConfig, Config, DetectorConfig, RepeatFactorConfig, TailOnlyConfig, UniformConfig
from bags.tensor_files import check_finite


def open_index(config: Config, split: str) -> AnnotationIndex:
    """The annotations of split "train" or "val"; those of "train" know whether masks are learnt."""
    index = AnnotationIndex.open(Path(config.data.root) / getattr(config.data, split))
    return dataclasses.replace(index, for_masks=config.detector.has_masks) if split == "train" else index


def build_val_dataset(config: Config) -> DetectionDataset:
    """All validation images, as they are."""
    data = config.data
    folder = Path(data.root) / data.val_images
    return DetectionDataset(open_index(config, "val"), folder, exif=data.exif, max_pixels=data.max_pixels)


def build_train_loader(config: Config, index: AnnotationIndex, stats: CategoryStats) -> DataLoader:
    """Training images, augmented, drawn by the sampler; endless reuse, one epoch per iteration.

    The batch is split over the ranks. index, stats: of the whole training set.
    """
    data = config.data
    if not data.empty_images:
        index = index.take(np.unique(index.owners[index.trained]))
    if isinstance(config.sampler, TailOnlyConfig):
        index = index.only(np.array([0, *stats.instance_counts]) < config.sampler.below)
    wide = index.image_sizes[:, 1] > index.image_sizes[:, 0] if data.aspect_batches else None
    batch_size, seed = config.train.batch_size, config.seed
    sampler: TrainSampler
    match config.sampler:
        case RepeatFactorConfig(threshold=threshold, released=released):
            sampler = RepeatFactorSampler(repeat_factors(index, threshold, released), batch_size, seed, wide)
        case ClassBalancedConfig():
            sampler = ClassBalancedSampler(index, batch_size, seed)
        case UniformConfig() | TailOnlyConfig():
            sampler = TrainSampler(len(index), batch_size, seed, wide)
    if CONVENTIONS[config.detector.conventions].augments:
        transform = training_transform()
    else:
        transform = training_transform(data.flip, data.short_sides, data.any_short_side, data.long_side)
    images = Path(data.root) / data.train_images
    semantic = Path(data.root) / data.train_semantic if data.train_semantic else None
    masks = config.detector.has_masks
    dataset = DetectionDataset(
        index,
        images,
        transform,
        masks,
        data.exif,
        semantic,
        data.semantic_classes,
        data.max_bad_images,
        data.max_pixels,
    )
    return loader(config, dataset, sampler)


def build_val_loader(config: Config, dataset: DetectionDataset) -> DataLoader:
    """This rank's share of the images, in order."""
    return loader(config, dataset, ShardSampler(len(dataset), config.test.batch_size))


def loader(config: Config, dataset: Dataset, batches: Iterable[list], join: Callable = collate) -> DataLoader:
    """Batches of items, each by its list of keys, `join`ed."""
    workers = config.data.workers
    return Loader(
        dataset,
        batch_sampler=batches,
        collate_fn=join,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available() and config.device != "cpu",
    )


def build_detector(config: Config, stats: CategoryStats) -> FasterRCNN:
    """Build the detector of a configuration with new weights (`initialise` loads `init_from`).

    `detector(images, targets)` returns a dict of losses in training mode, `detector(images)` a list of
    {boxes, scores, labels} in evaluation mode, as torchvision's detectors do. Raises UserError for a detector that
    this machine's memory cannot hold.
    """
    check_memory(config, stats)
    detector, anchor_sizes = config.detector, config.detector.rpn.anchor_sizes
    levels = 2 if len(anchor_sizes) == 2 else 3
    backbone = build_backbone(
        detector.backbone,
        detector.fpn_channels,
        levels,
        detector.frozen_batch_norm,
        detector.frozen_stages,
        detector.deformable_stages,
    )
    if len(anchor_sizes) != len(backbone.strides):
        raise UserError(
            f"{config.name}: detector.rpn.anchor_sizes: expected {len(backbone.strides)} lists, one for each pyramid "
            f"level of backbone {detector.backbone}, got {len(anchor_sizes)}"
        )
    data = config.data
    model = faster_rcnn(
        backbone,
        lambda fc, pooled: config.classifier.build(fc, pooled, stats),
        detector,
        config.test,
        data.semantic_classes if data.train_semantic else stats.num_categories + 1,
    )
    transform = model.transform
    if CONVENTIONS[detector.conventions].augments:
        transform.flip = data.flip
        transform.training_sides = short_sides(data.short_sides, data.any_short_side)
        transform.training_long_side = data.long_side if transform.training_sides else 0
    else:
        transform.resize_in_training = not data.short_sides
    return model


def least_bytes(detector: DetectorConfig, num_categories: int) -> int:
    """Bytes of the float32 weights of a detector's largest layers: fewer than it has, most of what a large one has.

    num_categories: without the background.
    """
    channels, fc, stages = detector.fpn_channels, detector.roi.fc, 3 if detector.is_cascade else 1
    boxes = 4 * (1 if detector.roi.class_agnostic else num_categories)
    masks = channels * num_categories if detector.has_masks else 0
    pyramid = 2 * 9 * channels**2  # one convolution of the pyramid, one of the proposal network
    return 4 * (pyramid + stages * (49 * channels * fc + fc**2 + fc * (num_categories + boxes) + masks))


def check_memory(config: Config, stats: CategoryStats) -> None:
    """Raises UserError where the weights take more than a third of this machine's memory, before they are made.

    A third, because training keeps their gradients and momenta beside them, and a checkpoint is read before it is
    copied to a detector.
    """
    needed, memory = least_bytes(config.detector, stats.num_categories), os.sysconf("SC_PAGE_SIZE")
    memory *= os.sysconf("SC_PHYS_PAGES")
    if 3 * needed > memory:
        raise UserError(
            f"{config.name}: detector.roi.fc={config.detector.roi.fc}, "
            f"detector.fpn_channels={config.detector.fpn_channels} and {stats.num_categories} categories make weights "
            f"of {needed / 1e9:.1f} GB, over a third of this machine's memory ({memory / 1e9:.0f} GB): lower them"
        )


def initialise(detector: FasterRCNN, config: Config, index: AnnotationIndex, stats: CategoryStats) -> list[str]:
    """Load `detector.init_from`, if given, and return the names of the tensors that keep their new values.

    The classifier is loaded if its outputs stand for the same labels, in the same groups. With
    `detector.other_categories`, everything that depends on categories stays new.
    Raises UserError if the checkpoint has other categories or is of another detector.
    """
    path = config.init_file
    if path is None:
        if config.detector.backbone_weights:
            load_backbone_weights(detector.backbone, config.detector.backbone, config.detector.backbone_weights)
        return list(detector.state_dict())
    checkpoint = load_checkpoint(path)
    check_finite(checkpoint["model"], path)
    saved_stats = CategoryStats.from_dict(checkpoint["stats"], path)
    saved_config = check_config(config_from_dict(checkpoint["config"], f"{path}: config"), f"{path}: config")
    saved = saved_config.classifier
    same = saved.columns(saved_stats) == config.classifier.columns(stats)
    classifiers, semantic = (detector.prefixes(m) for m in (detector.classifiers(), detector.semantic_layers()))
    skip = classifiers if config.detector.reset_classifier or not same else ()
    if config.detector.other_categories:
        painted = () if config.data.train_semantic else semantic  # label maps painted from the objects' masks
        skip = detector.prefixes(detector.category_layers()) + painted
    else:
        check_categories(saved_stats, index, path)
    if config.train.part != "all":
        _check_same_images(saved_config.detector, config.detector, path)
    counters = ".num_batches_tracked"  # only some kinds of batch normalisation have them, and no result depends on them
    new = [name for name in load_weights(detector, checkpoint, skip) if not name.endswith(counters)]
    keeps = "two heads" if config.classifier.on_softmax else None
    keeps = "train.part=none" if config.train.part == "none" else keeps
    layers = (m for c in detector.classifiers() for name, m in c.named_children() if name == "linear")
    trained_layers = detector.prefixes(layers)
    if keeps and any(name.startswith(trained_layers) for name in new):
        raise UserError(
            f"{path}: with {keeps} the classifier {config.classifier.name} needs trained weights, but those of "
            f"{saved.name} {'are reset by detector.reset_classifier' if same else 'are of another kind'}"
        )
    unused = [name for name in checkpoint["model"] if name not in detector.state_dict()]
    foreign = [n for n in (*new, *unused) if not n.endswith(counters) and not n.startswith(classifiers + skip)]
    if foreign:
        maps = foreign[0].startswith(semantic)
        section = "data.train_semantic and data.semantic_classes" if maps else "detector section"
        raise UserError(
            f"{path}: its detector is another than this configuration's: {foreign[0]} does not fit "
            f"({len(foreign)} tensors in all); use the same {section} as the run it comes from"
        )
    return new


def _check_same_images(theirs: DetectorConfig, ours: DetectorConfig, path: Path) -> None:
    """Raises UserError where frozen weights would see other numbers than they were trained with."""
    for key in ("conventions", "image_mean", "image_std"):
        if getattr(theirs, key) != getattr(ours, key):
            raise UserError(
                f"{path}: was trained with detector.{key}={getattr(theirs, key)}, now it is {getattr(ours, key)}: "
                "what is not trained again needs the same"
            )


def check_categories(stats: CategoryStats, index: AnnotationIndex, source: Path) -> None:
    """Raises UserError unless `stats`, which come from `source`, have the categories of `index`."""
    theirs = list(zip(stats.category_ids, stats.names, strict=True))
    ours = list(zip(index.category_ids.tolist(), index.category_names, strict=True))
    if theirs != ours:
        first = next(pair for pair in itertools.zip_longest(theirs, ours) if pair[0] != pair[1])
        theirs_first, ours_first = (f"id {c[0]} '{c[1]}'" if c else "none" for c in first)
        raise UserError(
            f"{source}: has {len(theirs)} categories, not the {len(ours)} of {index.path}; first "
            f"difference: {theirs_first} against {ours_first}. Use the dataset it was trained on "
            f"(to start training from other categories: detector.other_categories=true); {REMAP}"
        )


def predict_and_evaluate(
    detector: FasterRCNN,
    config: Config,
    stats: CategoryStats,
    dataset: DetectionDataset,
    predictions: Path,
    device,
    stored: DataLoader | None = None,
) -> tuple[dict[str, float], dict[str, Scores]]:
    """Writes the results file of a dataset, then scores it: (numbers of boxes, of masks as `mask_AP`, ..., and
    proposal accuracies; all that was found of "bbox" and "segm").

    Every rank takes its share of the images; only the main process scores, the others return nothing.
    stored: batches of the images' kept features, if there are any.
    """
    check_finite(detector.state_dict(), config.run_folder)
    accuracy = ProposalAccuracy(stats.num_categories)

    def observe(image: torch.Tensor, target: dict, detection: dict) -> list[list[int]]:
        """Judges one image's proposals, in its own pixels."""
        proposals = detection["proposals"].cpu()
        return accuracy.judge(proposals, detection["proposal_labels"], target["boxes"], target["labels"])

    detector.roi_heads.report_proposals = detector.transform.encode_masks = True
    model, batches = (FromFeatures(detector), stored) if stored else (detector, build_val_loader(config, dataset))
    index, image_ids = dataset.index, dataset.index.image_ids.tolist()
    objects = [hashlib.sha256(array.tobytes()).hexdigest() for array in (index.starts, index.boxes, index.labels)]
    settings = (stored is None, config.data, config.detector, config.test, image_ids, objects)
    key = f"{weights_digest({'model': detector.state_dict()})} {hashlib.sha256(repr(settings).encode()).hexdigest()}"
    categories = stats.category_ids
    for judged in predict(model, batches, device, categories, image_ids, predictions, config.name, key, observe):
        accuracy.add(judged)
    detector.roi_heads.report_proposals = detector.transform.encode_masks = False
    accuracy.counts = distributed.total(accuracy.counts.to(device)).cpu()
    if not distributed.is_main():
        return {}, {}
    results: dict[str, float] = {}
    scores: dict[str, Scores] = {}
    for iou_type, prefix in (("bbox", ""), ("segm", "mask_")):
        if iou_type == "segm" and not (config.detector.has_masks and scores["bbox"].has_masks):
            continue
        scores[iou_type] = score(
            Path(config.data.root) / config.data.val,
            predictions,
            iou_type,
            instance_counts=stats.instance_counts,
            image_counts=stats.image_counts,
            boundaries=config.test.bins,
            max_detections=config.test.max_detections,
        )
        results |= {f"{prefix}{name}": value for name, value in scores[iou_type].numbers.items()}
    for note in scores["bbox"].notes:
        print(f"note: {note}", file=sys.stderr)
    return results | accuracy.summary(stats.instance_counts, config.test.bins), scores


def load_detector(
    path: str | Path, min_size: int | None = None, max_size: int | None = None, overrides: Sequence[str] = ()
) -> tuple[FasterRCNN, dict]:
    """A trained detector from its checkpoint alone, in evaluation mode, on the CPU.

    min_size, max_size: other resizing limits than in training, in pixels.
    overrides: `section.key=value` for the sections data and test, and device.
    Returns (detector, meta): meta["config"] is a Config, meta["stats"] the CategoryStats of the
    training set, meta["categories"] its categories in label order, as {id, name} (label l of a
    detection is categories[l - 1]), meta["counts"] their training instances.
    Raises UserError for a file that is no checkpoint, and for weights that are not finite.
    """
    checkpoint = load_checkpoint(path)
    for override in overrides:
        if not override.startswith(("data.", "test.", "device=")) or "semantic" in override.partition("=")[0]:
            raise UserError(f"override '{override}': a trained detector takes data.*, test.* and device only")
    source = f"{path}: config"
    config = override_config(check_config(config_from_dict(checkpoint["config"], source), source), overrides)
    stats = CategoryStats.from_dict(checkpoint["stats"], path)
    check_finite(checkpoint["model"], path)
    if least_bytes(config.detector, stats.num_categories) > 8 * Path(path).stat().st_size:  # weights may be float16
        raise UserError(
            f"{path}: holds fewer weights than its own configuration and {stats.num_categories} categories need"
        )
    detector = build_detector(config, stats)
    expected = detector.state_dict()
    for name, value in checkpoint["model"].items():
        if name in expected and value.is_floating_point() != expected[name].is_floating_point():
            raise UserError(f"{path}: {name} holds {value.dtype}, expected {expected[name].dtype}")
    try:
        detector.load_state_dict(checkpoint["model"])
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: the weights do not fit its own configuration ({reason})") from None
    if min_size is not None:
        detector.transform.min_size = (min_size,)
    if max_size is not None:
        detector.transform.max_size = max_size
    categories = [{"id": i, "name": n} for i, n in zip(stats.category_ids, stats.names, strict=True)]
    meta = {"config": config, "stats": stats, "categories": categories, "counts": list(stats.instance_counts)}
    return detector.eval(), meta
