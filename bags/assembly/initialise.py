"""The weights that a detector starts from, and what must fit together."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bags.assembly.loaders import annotations_digest
from bags.classifiers.base import ProposalClassifier
from bags.config.load import check_config, config_from_dict
from bags.config.sections import Config, DetectorConfig
from bags.core.errors import UserError, one_line
from bags.core.tensor_files import check_finite
from bags.data.findings import REMAP
from bags.data.index import AnnotationIndex
from bags.data.statistics import CategoryStats
from bags.detectors.backbones import DeformableConv, load_backbone_weights
from bags.detectors.faster_rcnn import FasterRCNN
from bags.engine.checkpoint import load_checkpoint, load_weights

COUNTERS = ".num_batches_tracked"  # only some kinds of batch normalisation have them, and no result depends on them


def initialise(
    detector: FasterRCNN, config: Config, index: AnnotationIndex, stats: CategoryStats, checkpoint: dict | None = None
) -> list[str]:
    """Load `detector.init_from`, if given, and return the names of the tensors that keep their new values.

    checkpoint: the content of that file, where it is at hand.
    The classifier is loaded if its outputs stand for the same labels, in the same groups. With
    `detector.other_categories`, everything that depends on categories stays new. Deformable stages start equal to the
    plain ones of a checkpoint without them.
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
    new = [name for name in load_weights(detector, checkpoint, skip) if not name.endswith(COUNTERS)]
    keeps = "two heads" if config.classifier.on_softmax else None
    keeps = "train.part=none" if config.train.part == "none" else keeps
    layers = (m for c in detector.classifiers() for name, m in c.named_children() if name == "linear")
    trained_layers = detector.prefixes(layers)
    plain = trained_layers and not config.classifier.columns(stats)  # the layer is read as that of a softmax
    other_scores = plain and not saved.is_softmax and saved.name != config.classifier.name
    if keeps and (other_scores or any(name.startswith(trained_layers) for name in new)):
        reset = same and not other_scores
        raise UserError(
            f"{path}: with {keeps} the classifier {config.classifier.name} needs trained weights, but those of "
            f"{saved.name} {'are reset by detector.reset_classifier' if reset else 'are of another kind'}"
        )
    unused = [name for name in checkpoint["model"] if name not in detector.state_dict()]
    offsets = detector.prefixes(m.offsets for m in detector.modules() if isinstance(m, DeformableConv))
    may_be_new = classifiers + skip + offsets
    foreign = [n for n in (*new, *unused) if not n.endswith(COUNTERS) and not n.startswith(may_be_new)]
    if foreign:
        maps = foreign[0].startswith(semantic)
        section = "data.train_semantic and data.semantic_classes" if maps else "detector section"
        raise UserError(
            f"{path}: its detector is another than this configuration's: {foreign[0]} does not fit "
            f"({len(foreign)} tensors in all); use the same {section} as the run it comes from"
        )
    return new


def locate_objects(detector: FasterRCNN, index: AnnotationIndex) -> None:
    """Show the boxes that train to the classifiers that learn where the objects of each category are."""
    classifiers = [c for c in detector.classifiers() if type(c).locate is not ProposalClassifier.locate]
    if not classifiers:
        return
    trained = index.trained
    boxes = torch.from_numpy(np.array(index.boxes[trained], dtype=np.float64))
    heights_widths = torch.from_numpy(np.array(index.image_sizes[index.owners[trained]], dtype=np.float64))
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 / heights_widths.flip(1)
    labels = torch.from_numpy(np.array(index.labels[trained]))
    for classifier in classifiers:
        classifier.locate(centres, labels)


def with_members(config: Config) -> tuple[Config, list[dict]]:
    """Read the checkpoints that the classifier is made of: (the configuration with their settings, the checkpoints).

    Other classifiers than `average` are made of none. Raises UserError for a file that cannot be used.
    """
    checkpoints, members = [], []
    for path in map(config.source_file, config.classifier.sources):
        checkpoints.append(load_checkpoint(path))
        check_finite(checkpoints[-1]["model"], path)
        source = f"{path}: config"
        saved = check_config(config_from_dict(checkpoints[-1]["config"], source), source)
        if saved.classifier.fits_pooled or not saved.classifier.layers:
            why = "needs pooled features" if saved.classifier.fits_pooled else "has no classifier.members"
            raise UserError(f"{path}: its classifier {saved.classifier.name} {why}, so it cannot be averaged")
        _check_same_images(saved.detector, config.detector, path)
        members.append(saved.classifier)
    try:
        return dataclasses.replace(config, classifier=config.classifier.made_of(members)), checkpoints
    except ValueError as error:
        raise UserError(f"{config.name}: classifier.{error}") from None


def check_members(config: Config, checkpoints: list[dict], index: AnnotationIndex, stats: CategoryStats) -> None:
    """Refuse members that were trained on other annotations. Raises UserError, naming the file.

    Groups and calibrations are made from the training counts, and a checkpoint's weights do not contain them.
    """
    for path, checkpoint in zip(map(config.source_file, config.classifier.sources), checkpoints, strict=True):
        saved = CategoryStats.from_dict(checkpoint["stats"], path)
        try:
            config_from_dict(checkpoint["config"]).classifier.columns(saved)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        check_categories(saved, index, path)
        if saved != stats or checkpoint.get("annotations") not in (None, annotations_digest(config, index)):
            raise UserError(f"{path}: was trained on other annotations than {index.path}: train it again on these")


def load_members(detector: FasterRCNN, config: Config, checkpoints: list[dict]) -> None:
    """Load the classifiers of an average from the checkpoints of `with_members`.

    Raises UserError for one that was trained on another detector than that of `init_from`, which is loaded already.
    """
    paths = map(config.source_file, config.classifier.sources)
    prefixes, state = detector.prefixes(detector.classifiers()), detector.state_dict()
    frozen = {name: value for name, value in state.items() if not name.startswith(prefixes)}
    for number, (path, checkpoint) in enumerate(zip(paths, checkpoints, strict=True)):
        members: dict[str, Tensor] = {}
        rest: dict[str, Tensor] = {}
        for name, value in checkpoint["model"].items():
            prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
            if prefix:
                members[f"{prefix}members.{number}.{name.removeprefix(prefix)}"] = value
            else:
                rest[name] = value
        if different := _first_difference(rest, frozen):
            raise UserError(
                f"{path}: was trained on another detector than {config.init_file} ({different} differs): only "
                "classifiers of one detector can be averaged"
            )
        places = tuple(f"{prefix}members.{number}." for prefix in prefixes)
        wanted = {name: value for name, value in state.items() if name.startswith(places)}
        _load_exactly(detector, members, wanted, path)


def _first_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> str | None:
    """Name of the first tensor that only one state has, or that differs; counters of batches do not matter."""
    for name in sorted(ours.keys() | theirs.keys()):
        both = name in ours and name in theirs
        if not name.endswith(COUNTERS) and not (both and torch.equal(ours[name], theirs[name])):
            return name
    return None


def _load_exactly(detector: FasterRCNN, given: dict[str, Tensor], wanted: dict[str, Tensor], path: Path) -> None:
    """Load a member's tensors at their places. Raises UserError, naming the file, for others than are wanted."""
    kinds = {
        name
        for name in given.keys() & wanted.keys()
        if given[name].is_floating_point() != wanted[name].is_floating_point()
    }
    for words, names in (
        ("is missing", wanted.keys() - given.keys()),
        ("is not expected", given.keys() - wanted.keys()),
        ("has another type", kinds),
    ):
        if names:
            name = re.sub(r"members\.[0-9]+\.", "", min(names), count=1)  # as the file has it
            raise UserError(f"{path}: its weights are not those of its own classifier ({name} {words})")
    try:
        detector.load_state_dict(given, strict=False)
    except RuntimeError as error:  # of another shape
        raise UserError(f"{path}: its weights are not those of its own classifier ({one_line(error)})") from None


def _check_same_images(theirs: DetectorConfig, ours: DetectorConfig, path: Path) -> None:
    """Raises UserError where frozen weights would see other numbers than they were trained with."""
    pairs = {key: (getattr(theirs, key), getattr(ours, key)) for key in ("conventions", "image_mean", "image_std")}
    if theirs.has_masks and ours.has_masks:
        pairs["roi.normed_masks"] = (theirs.roi.normed_masks, ours.roi.normed_masks)
    for key, (before, now) in pairs.items():
        if before != now:
            raise UserError(
                f"{path}: was trained with detector.{key}={before}, now it is {now}: "
                "what is not trained again needs the same"
            )


def check_categories(stats: CategoryStats, index: AnnotationIndex, source: Path) -> None:
    """Raises UserError unless `stats`, which come from `source`, have the categories of `index`."""
    theirs = list(zip(stats.category_ids, stats.names, strict=True))
    ours = list(zip(index.category_ids.tolist(), index.category_names, strict=True))
    if theirs != ours:
        sides = ((source, theirs, set(ours)), (index.path, ours, set(theirs)))
        alone = ((path, next((c for c in own if c not in other), None)) for path, own, other in sides)
        words = [f"only {path} has id {one[0]} '{one[1]}'" for path, one in alone if one]
        raise UserError(
            f"{source}: has {len(theirs)} categories, not the {len(ours)} of {index.path}: "
            f"{', '.join(words) or 'their order differs'}. Use the dataset it was trained on "
            f"(to start training from other categories: detector.other_categories=true); {REMAP}"
        )
