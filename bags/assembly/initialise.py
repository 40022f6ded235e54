"""The weights that a detector starts from, and what must fit together."""

import itertools
from pathlib import Path

from bags.config.load import check_config, config_from_dict
from bags.config.sections import Config, DetectorConfig
from bags.core.errors import UserError
from bags.core.tensor_files import check_finite
from bags.data.findings import REMAP
from bags.data.index import AnnotationIndex
from bags.data.statistics import CategoryStats
from bags.detectors.backbones import load_backbone_weights
from bags.detectors.faster_rcnn import FasterRCNN
from bags.engine.checkpoint import load_checkpoint, load_weights


def initialise(
    detector: FasterRCNN, config: Config, index: AnnotationIndex, stats: CategoryStats, checkpoint: dict | None = None
) -> list[str]:
    """Load `detector.init_from`, if given, and return the names of the tensors that keep their new values.

    checkpoint: the content of that file, where it is at hand.
    The classifier is loaded if its outputs stand for the same labels, in the same groups. With
    `detector.other_categories`, everything that depends on categories stays new.
    Raises UserError if the checkpoint has other categories or is of another detector.
    """
    path = config.init_file
    if path is None:
        if config.detector.backbone_weights:
            load_backbone_weights(detector.backbone, config.detector.backbone, config.detector.backbone_weights)
        return list(detector.state_dict())
    checkpoint = checkpoint or load_checkpoint(path)
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
