"""Turn weights of other projects into checkpoints, and checkpoints into torchvision's weights."""

import collections
import io
from collections.abc import Sequence
from pathlib import Path

import torchvision
from torch import Tensor

from bags.assembly.models import Undrawn, build_undrawn, load_detector
from bags.config.load import config_to_dict, override_config
from bags.config.sections import Config
from bags.core.errors import UserError
from bags.core.files import open_regular
from bags.data.index import AnnotationIndex
from bags.data.json_files import read_json
from bags.data.statistics import CategoryStats
from bags.detectors.weights import (
    describe,
    fetch_state,
    fold_batch_norm_eps,
    read_state,
    select_labels,
    to_torchvision,
    translate,
)
from bags.engine.checkpoint import write_file

MOST_GROUPS = 50  # of a group softmax that is recognised by its number of logits
TORCHVISION_ANCHORS = {
    "resnet": ((32,), (64,), (128,), (256,), (512,)),
    "mobilenet": ((32, 64, 128, 256, 512),) * 3,
}


def import_weights(source: str, config: Config, annotations: Path | None, eps: float | None) -> tuple[dict, list[str]]:
    """A detector of torchvision's or of the paper's code as a checkpoint of this project.

    source: a file, or the name of torchvision's own weights (COCO_V1). config: what the file is said to hold;
    the released models' numeric conventions, or torchvision's, are put into it. eps: of the file's frozen batch
    normalisation, where it is not 1e-5; None knows it of torchvision's own weights.
    annotations: where categories and counts come from; by default the training file of `config`.
    Returns (checkpoint, lines that say what was taken and what was not). Raises UserError unless every
    tensor of the file has its place in the detector, and every place its tensor.
    """
    if not config.classifier.trained:
        raise UserError(f"{config.name}: {config.classifier.name} is made from a trained softmax: import that one")
    names: list[str] = []
    if Path(source).suffix in (".pth", ".pt"):
        state = read_state(source)
    else:
        state, names = fetch_state(torchvision_model(config), source)
        eps = 0.0 if eps is None and config.detector.backbone.startswith("resnet") else eps
    stats = read_stats(config, annotations, names)
    translated = translate(state, source)
    tensors, lines, wanted = translated.state, [], config.detector
    if wanted.has_masks and wanted.roi.normed_masks:
        raise UserError(f"{source}: its mask logits are no cosines: import it with detector.roi.normed_masks=false")
    for key, value in describe(tensors).items():
        if key != "logits" and getattr(wanted, key) != value:
            words = f"its detector has {key} {value}, the configuration {getattr(wanted, key)}"
            raise UserError(f"{source}: {words}: name the row that describes this file; docs/weights.md lists them")
    if translated.origin == "torchvision" and config.classifier.name == "softmax":
        logits, ids = describe(tensors)["logits"], stats.category_ids
        if logits == 91 and len(ids) == 80 and min(ids) >= 1 and max(ids) == 90:  # COCO's ids are its labels
            tensors = select_labels(tensors, [0, *ids])
            lines.append(f"left out: {logits - 1 - len(ids)} labels without a category ({logits - 1} in the file)")
    foreign = [f"{i} '{name}'" for i, name in zip(stats.category_ids, stats.names, strict=True) if name not in names]
    if names and foreign:
        raise UserError(f"{source}: does not know category {foreign[0]}: it is a model of COCO's categories")
    if eps is not None:
        tensors = fold_batch_norm_eps(tensors, eps)
        lines.append(f"variances shifted: its batch normalisation has eps {eps:g}, ours 1e-5")
    keys = [f"detector.conventions={translated.origin}", "detector.init_from=null", "detector.backbone_weights=null"]
    config = override_config(config, [*keys, "detector.other_categories=false", "train.part=all"])
    detector = build_undrawn(config, stats)
    state = detector.state_dict()
    _need_head(source, tensors, describe(state)["logits"], config, stats)
    _need_exact(
        source,
        {k: tuple(v.shape) for k, v in tensors.items()},
        {k: tuple(v.shape) for k, v in state.items() if not k.endswith("num_batches_tracked")},
    )
    detector.load_state_dict({**state, **tensors})
    reasons = collections.Counter(translated.skipped.values())
    lines += [f"left out: {number} tensors: {reason}" for reason, number in reasons.items()]
    lines += [f"conventions: {translated.origin}, by the names of the tensors", *_groups_line(config, stats)]
    lines.insert(0, f"taken: {len(tensors)} tensors, {sum(v.numel() for v in tensors.values()):,} numbers")
    content = {"config": config_to_dict(config), "stats": stats.to_dict(), "model": detector.state_dict()}
    return content, lines


def _groups_line(config: Config, stats: CategoryStats) -> list[str]:
    """Say which groups a group softmax has; their sizes cannot be read from a file."""
    divide = getattr(config.classifier, "category_groups", None)
    if divide is None:
        return []
    groups = divide(stats)
    limits = f", divided at {', '.join(map(str, groups.boundaries))} training instances" if groups.boundaries else ""
    return [f"groups: {len(groups.sizes)}, of {', '.join(map(str, groups.sizes))} categories{limits}"]


def _need_head(source: str, tensors: dict[str, Tensor], wanted: object, config: Config, stats: CategoryStats) -> None:
    """Raise UserError, saying what to use, for a file whose classifier has another number of logits.

    A group softmax of N groups has C + N logits of categories and `others`, and 2 of the background group.
    """
    logits, number = describe(tensors)["logits"], stats.num_categories
    if logits == wanted or not isinstance(logits, int):
        return
    labels = {v.shape[0] for k, v in tensors.items() if k.endswith("mask_fcn_logits.weight")}
    labels |= {v.shape[0] // 4 for k, v in tensors.items() if k.endswith("box_regressor.weight")}
    labels -= {1}  # for all categories together
    groups = logits - number - 2
    if labels and labels != {number + 1}:
        have = min(labels) - 1
        mend = f"this file knows {have} categories, the annotations {number}: name the annotations that it was "
        mend += "trained with: --annotations FILE"
    elif logits == number + 1:
        mend = "this file holds a softmax: use classifier.name=softmax, or a row without groups"
    elif 1 <= groups <= MOST_GROUPS:
        plural = "s" if groups > 1 else ""
        rows = {2: "as in the row bags_2_groups", 4: "as in the row bags", 8: "as in the row bags_8_groups"}
        words = f"and {groups - 1} numbers in classifier.boundaries ({rows.get(groups, 'training instances')})"
        mend = f"this file holds a group softmax of {groups} group{plural}: use classifier.name=group_softmax {words}"
    else:
        mend = f"this file's classifier has {logits} logits, which fits no softmax and no group softmax of {number} "
        mend += "categories: name the annotations that it was trained with: --annotations FILE"
    raise UserError(f"{source}: {mend}. The configuration {config.name} wants {wanted} logits")


def read_stats(config: Config, annotations: Path | None, names: Sequence[str]) -> CategoryStats:
    """Categories and training counts: a file's own counts where it holds them (LVIS), else counted.

    names: of torchvision's labels, which serve where there is no file; their counts are then 0.
    """
    path = annotations or Path(config.data.root, config.data.train)
    if not path.exists() and names and config.classifier.name == "softmax":
        ids = [label for label, name in enumerate(names) if label and name != "N/A"]
        zeros = (0,) * len(ids)
        return CategoryStats(tuple(ids), tuple(names[i] for i in ids), zeros, zeros)
    if annotations is None and not path.exists():
        raise UserError(
            f"{path}: no such file; categories and their training counts come from it: --annotations FILE names another"
        )
    with open_regular(path) if path.exists() else io.BytesIO() as file:
        is_list = file.read(64).lstrip().startswith(b"[")  # annotations may be a gigabyte: not parsed for this
    if is_list:
        listed = read_json(path)
    else:
        index = AnnotationIndex.open(path)
        listed = index.categories
        if not all("instance_count" in category for category in listed):
            return CategoryStats.from_index(index)
    try:
        listed = sorted(listed, key=lambda category: category["id"])
        columns = ([category[key] for category in listed] for key in ("id", "name", "instance_count", "image_count"))
        stats = CategoryStats(*map(tuple, columns))
    except (KeyError, TypeError):
        keys = "id, name, instance_count and image_count"
        raise UserError(f"{path}: expected annotations, or a list of categories with {keys}") from None
    numbers = (*stats.category_ids, *stats.instance_counts, *stats.image_counts)
    names_are_text = all(isinstance(name, str) and name for name in stats.names)
    if not listed or not names_are_text or not all(type(n) is int and n >= 0 for n in numbers):
        raise UserError(f"{path}: expected categories, their ids and counts as whole numbers, their names as text")
    if len(set(stats.category_ids)) < len(listed):
        raise UserError(f"{path}: two categories have the same id")
    return stats


def _need_exact(source: str, given: dict[str, tuple], wanted: dict[str, tuple]) -> None:
    """Raises UserError unless names and shapes are the same."""
    shapes = [k for k in given if k in wanted and given[k] != wanted[k]]
    problems = [f"{k} has shape {list(given[k])}, expected {list(wanted[k])}" for k in shapes[:1]]
    for words, keys in (
        ("is missing", wanted.keys() - given.keys()),
        ("is not expected", given.keys() - wanted.keys()),
    ):
        problems += [f"{min(keys)} {words} ({len(keys)} such)"] if keys else []
    if problems:
        raise UserError(f"{source}: not the weights of this configuration: {'; '.join(problems)}")


def torchvision_model(config: Config) -> str:
    """The name of torchvision's own model of a configuration. Raises UserError where it has none."""
    detector = config.detector
    name = f"{detector.framework.replace('_', '')}_{detector.backbone}_fpn"
    if name not in torchvision.models.list_models(module=torchvision.models.detection):
        raise UserError(f"{config.name}: torchvision has no {detector.framework} with {detector.backbone}")
    return name


def export(checkpoint: Path, output: Path) -> None:
    """Writes torchvision's state dict of a trained softmax detector, and prints how to load it."""
    detector, meta = load_detector(checkpoint)
    config, stats = meta["config"], meta["stats"]
    if config.classifier.name not in ("softmax", "reweighted_softmax"):
        raise UserError(f"{checkpoint}: its classifier is {config.classifier.name}; torchvision's is a softmax")
    settings, test, rpn = config.detector, config.test, config.detector.rpn
    arguments = {
        "num_classes": stats.num_categories + 1,
        "min_size": settings.min_size,
        "max_size": settings.max_size,
        "image_mean": list(settings.image_mean),
        "image_std": list(settings.image_std),
        "rpn_pre_nms_top_n_test": rpn.test_proposals,
        "rpn_post_nms_top_n_test": rpn.test_proposals,
        "box_score_thresh": test.score_threshold,
        "box_nms_thresh": test.nms_threshold,
        "box_detections_per_img": test.max_detections,
    }
    if settings.conventions == "released":
        raise UserError(f"{checkpoint}: has the released models' conventions, which torchvision's models do not have")
    if settings.has_masks and settings.roi.normed_masks:
        raise UserError(f"{checkpoint}: has detector.roi.normed_masks, which torchvision's Mask R-CNN does not have")
    family = "mobilenet" if settings.backbone.startswith("mobilenet") else "resnet"
    if (rpn.anchor_sizes, rpn.aspect_ratios) != (TORCHVISION_ANCHORS[family], (0.5, 1.0, 2.0)):
        raise UserError(f"{checkpoint}: its anchors are not those of torchvision's {torchvision_model(config)}")
    try:
        state = to_torchvision(detector.state_dict(), stats.num_categories)
        builder = torchvision.models.get_model_builder(torchvision_model(config))
        with Undrawn():
            model = builder(weights=None, weights_backbone=None, **arguments)
        model.load_state_dict(state)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"{checkpoint}: does not fit torchvision's model ({' '.join(str(error).split())[:300]})"
        ) from None
    output.parent.mkdir(parents=True, exist_ok=True)
    write_file(output, state)
    call = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    print(f"written: {output}. To load it:")
    print(f"model = torchvision.models.detection.{builder.__name__}(weights=None, weights_backbone=None, {call})")
    print(f"model.load_state_dict(torch.load({str(output)!r}))")
    if settings.conventions == "standard":
        print("note: trained with standard conventions; torchvision's coarsest anchors lie elsewhere")
