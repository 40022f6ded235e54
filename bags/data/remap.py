"""An annotation file with the categories of another one, matched by name."""

from collections import Counter
from pathlib import Path

from bags.core.errors import UserError
from bags.core.files import write_text
from bags.data.json_files import as_json, read_annotations, read_json
from bags.data.packing import category_name, unique_ids

LISTS_OF_IDS = ("neg_category_ids", "not_exhaustive_category_ids")


def remap_categories(source: Path, like: Path, output: Path) -> tuple[int, int, list[int]]:
    """Write `source` with the categories of `like`; annotations and LVIS's lists get the ids of equal names.

    Categories that only `like` has are added, so that both files list the same. Returns (annotations,
    categories, images of which a list held unknown ids, which are left out). Raises UserError for a name that `like`
    has not, or that one of the files has twice, for an annotation of an unknown image, and for an output that exists.
    """
    if output.exists():
        raise UserError(f"--output {output}: exists already: remove it, or choose another name")
    wanted = read_annotations(like)["categories"]
    content = read_json(source)
    read_annotations(source)  # refuses what is no annotation file
    new_ids = _ids_by_name(like, wanted)
    old_ids = _ids_by_name(source, content["categories"])
    unknown = sorted(old_ids.keys() - new_ids.keys())
    if unknown:
        raise UserError(
            f"{source}: {len(unknown)} of its categories are not in {like}, first: '{unknown[0]}': list them there too "
            "(without objects they are never trained nor found), or take them and their annotations out here"
        )
    new_of = {old: new_ids[name] for name, old in old_ids.items()}
    images = set(unique_ids(source, "images", content["images"]).tolist())
    for annotation in content["annotations"]:
        image = annotation.get("image_id")
        if type(image) is not int or image not in images:
            raise UserError(f"{source}: annotation {annotation.get('id')}: image_id {image!r:.60} is not in the file")
        key = annotation.get("category_id")
        if type(key) is not int or key not in new_of:
            raise UserError(f"{source}: annotation {annotation.get('id')}: category_id {key!r:.60} is not in the file")
        annotation["category_id"] = new_of[key]
    odd: dict[int, None] = {}
    for image in content["images"]:
        for name in LISTS_OF_IDS:
            if isinstance(image.get(name), list):
                known = [new_of[key] for key in image[name] if type(key) is int and key in new_of]
                if len(known) < len(image[name]):
                    odd[image["id"]] = None
                image[name] = known
    content["categories"] = wanted
    text = as_json(content, source)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, text)
    return len(content["annotations"]), len(wanted), list(odd)


def _ids_by_name(path: Path, categories: list[dict]) -> dict[str, int]:
    unique_ids(path, "categories", categories)
    names = [category_name(category) for category in categories]
    twice = next((name for name, number in Counter(names).items() if number > 1), None)
    if twice is not None:
        raise UserError(f"{path}: two categories are named '{twice}': they cannot be matched by name")
    return {name: category["id"] for name, category in zip(names, categories, strict=True)}
