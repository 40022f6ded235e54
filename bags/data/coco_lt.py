"""COCO-LT (section 5.5 of the paper; Wang et al. 2020): a long-tail cut of COCO's training annotations.

Annotations are dropped per category until its target is met; an image without any left vanishes. The published
targets hold crowd regions, which do not train, so these are counted, too, but taken last. Bins of training
instances: 1-20-400-8000; the targets of categories with 8,000 or more are all that COCO has.

Command:  python scripts/prepare_data.py coco_lt --source instances_train2017.json --output coco_lt.json
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from bags.core.errors import UserError
from bags.core.files import write_text
from bags.data.json_files import as_json, read_annotations, read_unique_json
from bags.data.packing import pack

BOUNDARIES = (20, 400, 8000)

# COCO's category id and its instances in COCO-LT, 666,493 in all. Source: class_to_imageid_and_inscount_coco_sampled.pt
# in github.com/twangnh/SimCal, which counts the authors' train_coco2017_LT_sampled.json.
_PUBLISHED = """
    1 262465, 2 3530, 3 43867, 4 8725, 5 686, 6 248, 7 408, 8 9973, 9 10759, 10 12884,
    11 11, 13 22, 14 12, 15 9838, 16 10806, 17 198, 18 167, 19 1518, 20 9509, 21 7079,
    22 374, 23 61, 24 420, 25 383, 27 8720, 28 11431, 31 12354, 32 6112, 33 5360, 34 14,
    35 2902, 36 22, 37 6221, 38 9076, 39 67, 40 52, 41 547, 42 4678, 43 793, 44 24342,
    46 5047, 47 20650, 48 774, 49 7190, 50 1025, 51 14358, 52 9458, 53 589, 54 657, 55 4042,
    56 6394, 57 2746, 58 48, 59 100, 60 6594, 61 4684, 62 38491, 63 629, 64 2689, 65 51,
    67 15714, 70 73, 72 710, 73 286, 74 52, 75 765, 76 21, 77 4699, 78 52, 79 65,
    80 47, 81 114, 82 50, 84 24715, 85 4004, 86 1473, 87 24, 88 693, 89 71, 90 15
"""


def published_targets() -> dict[int, int]:
    """The instances of COCO-LT per category id of COCO: 80 categories, in bins of 4, 24, 32 and 20."""
    pairs = (pair.split() for pair in _PUBLISHED.split(","))
    return {int(category): int(count) for category, count in pairs}


def scaled(targets: dict[int, int], scale: float) -> dict[int, int]:
    """Targets times `scale`, rounded up, for a source that is a part of COCO. 0 < scale <= 1; UserError otherwise."""
    if not 0 < scale <= 1:
        raise UserError(f"--scale {scale}: expected a number above 0 and not above 1, such as 0.1")
    return {category: max(math.ceil(round(scale * n, 6)), min(n, 1)) for category, n in targets.items()}


def read_targets(path: Path) -> dict[int, int]:
    """Instances per category id, from {"id": count} or {"categories": [{id or coco_category_id, instance_count}]}."""
    content = read_unique_json(path)
    try:
        if isinstance(content, dict) and "categories" in content:
            pairs = [(c.get("coco_category_id", c.get("id")), c["instance_count"]) for c in content["categories"]]
        else:
            pairs = list(content.items())
        targets = _by_category(path, pairs)
        if not all(type(count) is int for count in targets.values()):
            raise TypeError("not a count")
    except (AttributeError, KeyError, TypeError):
        raise UserError(f'{path}: expected instance counts per category id, as in {{"7": 120}}') from None
    if not targets or min(targets.values()) < 0:
        raise UserError(f"{path}: expected counts of 0 or more, at least one")
    return targets


def read_image_lists(path: Path) -> dict[int, set[int]]:
    """The authors' list, {"category id": [image ids]}."""
    content = read_unique_json(path)
    try:
        lists = _by_category(path, content.items())
        if not all(isinstance(images, list) and all(type(i) is int for i in images) for images in lists.values()):
            raise TypeError("not a list of ids")
    except (AttributeError, TypeError):
        raise UserError(f'{path}: expected lists of image ids per category id, as in {{"7": [12, 15]}}') from None
    return {category: set(images) for category, images in lists.items()}


def _by_category(path: Path, pairs: Iterable[tuple[object, Any]]) -> dict[int, Any]:
    """Values by category id. Raises UserError for one given twice, and TypeError for one that is no whole number."""
    values: dict[int, Any] = {}
    for key, value in pairs:
        if type(key) is not int and not (isinstance(key, str) and re.fullmatch(r"-?[0-9]{1,18}", key)):
            raise TypeError("not an id")
        if int(key) in values:
            raise UserError(f"{path}: category {int(key)} is given twice; keep one of them")
        values[int(key)] = value
    return values


def make_coco_lt(
    source: Path,
    output: Path,
    targets: dict[int, int],
    image_lists: dict[int, set[int]] | None = None,
    seed: int = 0,
    capped: bool = False,
) -> dict[int, int]:
    """Writes the cut of `source` to `output`; returns the instances kept per category id.

    A category's images are taken in an order drawn from (seed, category id), with all its annotations,
    until the target is met; the last image's annotations are cut to meet it exactly. Crowd regions are taken
    where nothing else is left. image_lists: keep instead the annotations of each category in its listed images.
    capped: where there is less than a target asks for, keep all. Raises UserError for a category
    without a target, and where there is less than a target asks for.
    """
    if output.exists():
        raise UserError(f"--output {output}: exists already: remove it, or choose another name")
    if not 0 <= seed < 2**31:
        raise UserError(f"seed: expected 0 <= seed < 2**31, got {seed}")
    image_ids = pack(source)["image_ids"]  # which refuses what is no annotation file
    content = read_annotations(source)
    by_category: dict[int, list[dict]] = {category["id"]: [] for category in content["categories"]}
    _check_categories(source, set(by_category), set(targets if image_lists is None else image_lists))
    unknown = sorted(set().union(*(image_lists or {}).values()) - set(image_ids.tolist()))
    if unknown:
        raise UserError(f"{source}: image {unknown[0]} of the image lists is not among `images`")
    for annotation in content["annotations"]:
        by_category[annotation["category_id"]].append(annotation)
    if image_lists is not None:
        kept = [a for a in content["annotations"] if a["image_id"] in image_lists[a["category_id"]]]
    else:
        if not capped:
            _check_targets(source, by_category, targets)
        kept = [a for category, all_of_it in by_category.items() for a in _cut(category, all_of_it, targets, seed)]
    if not kept:
        raise UserError(f"{source}: the targets or image lists keep none of its annotations; expected at least one")
    counts = Counter(annotation["category_id"] for annotation in kept)
    order = {annotation["id"]: k for k, annotation in enumerate(content["annotations"])}
    kept.sort(key=lambda annotation: order[annotation["id"]])
    images = {annotation["image_id"] for annotation in kept}
    content |= {"annotations": kept, "images": [image for image in content["images"] if image["id"] in images]}
    in_images = Counter(category for _, category in {(a["image_id"], a["category_id"]) for a in kept})
    for category in content["categories"]:
        category |= {"instance_count": counts[category["id"]], "image_count": in_images[category["id"]]}
    text = as_json(content, source)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, text)
    return {category: counts[category] for category in by_category}


def _check_categories(source: Path, listed: set[int], wanted: set[int]) -> None:
    """Raise UserError where the categories of the source are not those of the targets or image lists."""
    coco = "(COCO-LT: the 80 of COCO, whose ids are 1 to 90 with gaps)"
    if missing := sorted(wanted - listed):
        words = f"category {missing[0]}{_more(missing)} is missing from `categories`"
        raise UserError(f"{source}: {words}; the file must list every category of the targets or image lists {coco}")
    if odd := sorted(listed - wanted):
        words = f"category {odd[0]}{_more(odd)} is not among the targets or image lists"
        remedy = "add it there, where 0 or an empty list keeps none of it, or remove it from `categories`"
        raise UserError(f"{source}: {words}: {remedy} {coco}")


def _check_targets(source: Path, by_category: dict[int, list[dict]], targets: dict[int, int]) -> None:
    """Raise UserError for a category with fewer annotations than its target."""
    short = [category for category, all_of_it in by_category.items() if len(all_of_it) < targets[category]]
    if short:
        found, target = len(by_category[short[0]]), targets[short[0]]
        words = f"category {short[0]} has {found} annotations, its target is {target}"
        others = f" ({len(short) - 1} other categories have too few, too)" if len(short) > 1 else ""
        raise UserError(f"{source}: {words}{others}; for a part of COCO, --scale takes a share of each target")


def _more(ids: list[int]) -> str:
    return f" (and {len(ids) - 1} more)" if len(ids) > 1 else ""


def _cut(category: int, annotations: list[dict], targets: dict[int, int], seed: int) -> list[dict]:
    """The annotations of a category that meet its target, or all."""
    by_image: dict[int, list[dict]] = {}
    for annotation in annotations:
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    order = np.random.RandomState([seed, category % 2**32]).permutation(sorted(by_image))
    in_order = [annotation for image in order.tolist() for annotation in by_image[image]]
    in_order.sort(key=lambda annotation: annotation.get("iscrowd", 0))  # which keeps the order otherwise
    return in_order[: targets[category]]
