"""Configuration -> detector, and checkpoint -> detector."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn import init
from torch.overrides import TorchFunctionMode
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from bags.config.load import check_config, config_from_dict, override_config
from bags.config.sections import Config, DetectorConfig
from bags.core.errors import UserError
from bags.core.tensor_files import check_finite
from bags.data.statistics import CategoryStats
from bags.data.transforms import short_sides
from bags.detectors.backbones import build_backbone
from bags.detectors.conventions import CONVENTIONS
from bags.detectors.faster_rcnn import FasterRCNN, faster_rcnn
from bags.engine.checkpoint import load_checkpoint

DRAWS = (init.kaiming_uniform_, init.uniform_, init.normal_, torch.Tensor.uniform_, torch.Tensor.normal_)


class Undrawn(TorchFunctionMode):
    """A context for models that a state dict fills: weights that would be drawn keep what their memory held."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if function in DRAWS:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def build_undrawn(config: Config, stats: CategoryStats) -> FasterRCNN:
    """`build_detector` for a state dict with every weight: nothing is drawn, which takes half of the time."""
    with Undrawn():
        return build_detector(config, stats)


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
    set_training_sizes(model.transform, config)
    return model


def set_training_sizes(transform: GeneralizedRCNNTransform, config: Config) -> None:
    """Tell a detector's transform how training images are resized: by it, or by the dataset before."""
    data, transform = config.data, cast(Any, transform)
    if CONVENTIONS[config.detector.conventions].augments:
        transform.flip = data.flip
        transform.training_sides = short_sides(data.short_sides, data.any_short_side)
        transform.training_long_side = data.long_side if transform.training_sides else 0
    else:
        transform.resize_in_training = not (data.short_sides or data.jitter)


def least_bytes(detector: DetectorConfig, num_categories: int, layers: int = 1) -> int:
    """Bytes of the float32 weights of a detector's largest layers: fewer than it has, most of what a large one has.

    num_categories: without the background. layers: of the classifier, see `ClassifierSettings.layers`.
    """
    channels, fc, stages = detector.fpn_channels, detector.roi.fc, 3 if detector.is_cascade else 1
    boxes = 4 * (1 if detector.roi.class_agnostic else num_categories)
    masks = channels * (1 if detector.roi.class_agnostic_masks else num_categories) if detector.has_masks else 0
    pyramid = 2 * 9 * channels**2  # one convolution of the pyramid, one of the proposal network
    return 4 * (pyramid + stages * (49 * channels * fc + fc**2 + fc * (layers * num_categories + boxes) + masks))


def check_memory(config: Config, stats: CategoryStats) -> None:
    """Raises UserError where the weights take more than a third of this machine's memory, before they are made.

    A third, because training keeps their gradients and momenta beside them, and a checkpoint is read before it is
    copied to a detector.
    """
    needed = least_bytes(config.detector, stats.num_categories, config.classifier.layers)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 3 * needed > memory:
        raise UserError(
            f"{config.name}: detector.roi.fc={config.detector.roi.fc}, "
            f"detector.fpn_channels={config.detector.fpn_channels} and {stats.num_categories} categories make weights "
            f"of {needed / 1e9:.1f} GB, over a third of this machine's memory ({memory / 1e9:.0f} GB): lower them"
        )


def load_detector(
    path: str | Path, min_size: int | None = None, max_size: int | None = None, overrides: Sequence[str] = ()
) -> tuple[FasterRCNN, dict]:
    """A trained detector from its checkpoint, without other files, in evaluation mode, on the CPU.

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
    if not config.classifier.layers:
        raise UserError(f"{source}: classifier.members: expected the settings of the classifiers that it is made of")
    needed = least_bytes(config.detector, stats.num_categories, config.classifier.layers)
    if needed > 8 * Path(path).stat().st_size:  # weights may be float16
        raise UserError(
            f"{path}: holds fewer weights than its own configuration and {stats.num_categories} categories need"
        )
    detector = build_undrawn(config, stats)
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
