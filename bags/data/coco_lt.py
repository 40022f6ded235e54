"""COCO-LT (section 5.5 of the paper; Wang et al. 2020): a long-tail cut of COCO's training annotations.

Annotations (crowd regions too: the published counts hold them) are dropped per category until its target
is met; an image without any left vanishes. Bins of training instances: 1-20-400-8000; the published targets
of categories with 8,000 or more are all that COCO has.

Command:  python scripts/prepare_data.py coco_lt --source ... --targets ... --output ...
"""

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
    source: Path, output: Path, targets: dict[int, int], image_lists: dict[int, set[int]] | None = None, seed: int = 0
) -> dict[int, int]:
    """Writes the cut of `source` to `output`; returns the instances kept per category id.

    A category's images are taken in an order drawn from (seed, category id), with all its annotations,
    until the target is met; the last image's annotations are cut to meet it exactly. image_lists: keep
    instead the annotations of each category in its listed images. Raises UserError for a category
    without a target, and where there is less than a target asks for.
    """
    if output.exists():
        raise UserError(f"--output {output}: exists already: remove it, or choose another name")
    if not 0 <= seed < 2**31:
        raise UserError(f"seed: expected 0 <= seed < 2**31, got {seed}")
    image_ids = pack(source)["image_ids"]  # which refuses what is no annotation file
    content = read_annotations(source)
    by_category: dict[int, list[dict]] = {category["id"]: [] for category in content["categories"]}
    odd = sorted(set(targets if image_lists is None else image_lists) ^ set(by_category))
    if odd:
        raise UserError(f"{source}: category {odd[0]} is either not in there, or without a target or image list")
    unknown = sorted(set().union(*(image_lists or {}).values()) - set(image_ids.tolist()))
    if unknown:
        raise UserError(f"{source}: image {unknown[0]} of the image lists is not among `images`")
    for annotation in content["annotations"]:
        by_category[annotation["category_id"]].append(annotation)
    kept: list[dict] = []
    for category, annotations in by_category.items():
        if image_lists is not None:
            kept += [a for a in annotations if a["image_id"] in image_lists.get(category, ())]
        else:
            kept += _cut(source, category, annotations, targets[category], seed)
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
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, as_json(content, source))
    return {category: counts[category] for category in by_category}


def _cut(source: Path, category: int, annotations: list[dict], target: int, seed: int) -> list[dict]:
    if len(annotations) < target:
        raise UserError(f"{source}: category {category} has {len(annotations)} annotations, its target is {target}")
    by_image: dict[int, list[dict]] = {}
    for annotation in annotations:
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    order = np.random.RandomState([seed, category % 2**32]).permutation(sorted(by_image))
    return [annotation for image in order.tolist() for annotation in by_image[image]][:target]
