"""The embedded dataset: a procedural long-tail detection dataset in LVIS v1 JSON format.

A category is one letter of DejaVu Sans (matplotlib's font). An object is a glyph with its own size, rotation, stretch,
colour, contrast and blur, among other objects and strokes, on a background of textured regions. Instance masks are the
pixels that the glyph covers and later objects do not hide. The textures of the background regions are the image's
semantic map.

Two choices make it a small version of the paper's problem:

* Instances per category fall as a shifted power law, from thousands to a few.
* Categories come in families of look-alikes (accents, related Latin, Greek and Cyrillic letters), and each family has
  members in the head and in the tail. With letters that are less alike, retraining a plain softmax works as well as
  Balanced Group Softmax.

The same seed gives the same annotations on every machine (see glyph_images.py). JPEG pixels may differ in the last bits
between versions of Pillow.

Command:  python scripts/prepare_data.py glyphs-100 --root data/glyphs-100
"""

import contextlib
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from bags.core import locks
from bags.core.errors import UserError
from bags.core.files import write_text
from bags.core.progress import Progress
from bags.data.glyph_images import coverage, draw_image, load_outlines

DUPLICATE_SIMILARITY = 0.985  # cosine of two 24 x 24 renderings; glyphs that are more similar are one category
CHUNK = 100  # images per unit of work, which an interrupted run may lose


@dataclasses.dataclass(frozen=True)
class Preset:
    """Size and difficulty of a dataset. Lengths are in pixels, counts in instances."""

    categories: int
    image_size: int
    most_instances: int  # training instances of the first category in rank ...
    fewest_instances: int  # ... and of the last
    shift: float  # q of the law  n(rank) ~ (rank + q) ** -alpha
    objects: tuple[int, int]  # least and most objects per image
    size: tuple[float, float]  # longer side of an object
    family: int  # members of a family of look-alikes
    family_similarity: float  # least cosine similarity within a family
    val_instances: int  # validation instances of every category
    negatives: int  # absent categories that an image vouches for (`neg_category_ids`)
    bold: int = 0  # pixels that are added to each side of a stroke


PRESETS = {
    "glyphs-100": Preset(100, 192, 1200, 8, 150, (10, 17), (30, 58), 3, 0.55, 20, 40),
    "glyphs-1230": Preset(1230, 256, 2000, 2, 640, (8, 24), (18, 56), 5, 0.70, 20, 100),
}
# What differs from glyphs-100. half and double have another number of objects, distinct and alike other letters.
CHANGES: dict[str, dict[str, Any]] = {
    "balanced": {"most_instances": 207, "fewest_instances": 207},  # without a tail
    "even": {"most_instances": 600, "fewest_instances": 60, "shift": 85},
    "steep": {"most_instances": 2000, "fewest_instances": 2, "shift": 60},
    "half": {"most_instances": 600, "fewest_instances": 4},
    "double": {"most_instances": 2400, "fewest_instances": 16},
    "distinct": {"family": 1},  # letters as they come, which are less alike
    "alike": {"family": 5, "family_similarity": 0.8},
    "bold": {"bold": 1},  # masks that can be learned: errors at the borders of thin strokes are as wide as these
}
PRESETS |= {f"glyphs-100-{name}": dataclasses.replace(PRESETS["glyphs-100"], **c) for name, c in CHANGES.items()}


# --------------------------------------------------------------------------- categories


@functools.cache
def compare_glyphs() -> tuple[list[str], np.ndarray, np.ndarray]:
    """Compare visible glyphs: characters, similarity [N, N] in 0..1, bool [N] without duplicates of earlier ones."""
    outlines = load_outlines()
    characters = list(outlines)
    drawings = [coverage([c * 24 + 12 for c in outlines[ch]], 24, 24) for ch in characters]
    pixels = np.stack(drawings).reshape(len(characters), -1).astype(np.float64)
    visible = np.asarray(pixels.any(1))
    pixels, characters = pixels[visible], [c for c, v in zip(characters, visible, strict=True) if v]
    dots = pixels @ pixels.T  # exact: integers far below 2 ** 53
    norms = np.sqrt(np.diag(dots))
    similarity = dots / norms[:, None] / norms
    distinct = np.zeros(len(characters), bool)
    for i in range(len(characters)):
        distinct[i] = not (similarity[i, :i][distinct[:i]] >= DUPLICATE_SIMILARITY).any()
    return characters, similarity, distinct


def choose_categories(preset: Preset, seed: int) -> list[str]:
    """Choose the characters of a preset, by rank: the first one has the most training instances.

    Duplicates are left out. Families are grown around random glyphs. Each family is spread evenly over the ranks, so
    that tail categories have look-alikes in the head.
    """
    characters, similarity, distinct = compare_glyphs()
    rng = np.random.RandomState([seed, 1])
    free, ranked, chosen = distinct.copy(), [], 0
    for centre in rng.permutation(np.flatnonzero(distinct)):
        if chosen == preset.categories:
            break
        kin = np.flatnonzero(free & (similarity[centre] >= preset.family_similarity))
        kin = kin[np.argsort(-similarity[centre, kin], kind="stable")]
        kin = kin[: min(preset.family, preset.categories - chosen)]  # the centre comes first
        if not free[centre] or (len(kin) < preset.family and chosen + len(kin) < preset.categories):
            continue
        free[kin] = False
        chosen += len(kin)
        places = (rng.permutation(len(kin)) + rng.random_sample(len(kin))) / len(kin)
        ranked += [(place, characters[k]) for place, k in zip(places, kin, strict=True)]
    return [character for _, character in sorted(ranked)]


def instance_counts(preset: Preset) -> np.ndarray:
    """Training instances by rank, int64 [C]: a shifted power law from most_instances to fewest_instances."""
    rank = np.arange(1, preset.categories + 1)
    fall = math.log(preset.most_instances / preset.fewest_instances)
    alpha = fall / math.log((preset.categories + preset.shift) / (1 + preset.shift))
    law = preset.most_instances * ((1 + preset.shift) / (rank + preset.shift)) ** alpha
    return np.maximum(1, np.round(law)).astype(np.int64)


# --------------------------------------------------------------------------- files


def _make_chunk(job: tuple) -> None:
    """Draw one chunk of images, then write its part of the annotations atomically."""
    preset, seed, split, folder, first_id, image_categories, characters = job
    part = folder / "parts" / f"{split}-{first_id:08d}.json"
    if part.exists():
        return
    outlines = load_outlines(sorted({characters[c] for ids in image_categories for c in ids}))
    images, annotations = [], []
    for offset, category_ids in enumerate(image_categories):
        image_id = first_id + offset
        rng = np.random.RandomState([seed, 2 + (split == "val"), image_id])
        shapes = [outlines[characters[c]] for c in category_ids]
        pixels, semantic, masks = draw_image(preset.image_size, preset.size, shapes, rng, preset.bold)
        name = f"{split}/{image_id:08d}.jpg"
        Image.fromarray(pixels).save(folder / name, quality=92)
        Image.fromarray(semantic).save(folder / f"semantic_{split}" / f"{image_id:08d}.png")

        # As in LVIS, some images annotate only part of the objects of a category.
        repeated = sorted({c for c in category_ids if category_ids.count(c) > 1})
        partial = [repeated[0]] if repeated and rng.random_sample() < 0.1 else []
        skipped = category_ids.index(partial[0]) if partial else None
        absent = sorted(set(characters) - set(category_ids))
        negatives = rng.permutation(absent)[: preset.negatives].tolist()
        images.append(
            {
                "id": image_id,
                "file_name": name,
                "coco_url": f"glyphs/{name}",
                "height": preset.image_size,
                "width": preset.image_size,
                "neg_category_ids": sorted(negatives),
                "not_exhaustive_category_ids": partial,
            }
        )
        for k, (category_id, mask) in enumerate(zip(category_ids, masks, strict=True)):
            if k != skipped:
                annotations.append({"image_id": image_id, "category_id": category_id, **_describe(mask)})
    write_text(part, json.dumps({"images": images, "annotations": annotations}))


def _describe(mask: np.ndarray) -> dict:
    """Box (x, y, width, height), area and compressed RLE of one visible mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    box = [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    counts = rle["counts"]
    segmentation = {"size": rle["size"], "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}
    return {"bbox": box, "area": int(mask.sum()), "segmentation": segmentation}


def _deal(counts: np.ndarray, preset: Preset, rng: np.random.RandomState) -> list[list[int]]:
    """Deal instances to images at random: a list of category ids per image."""
    deck = rng.permutation(np.repeat(np.arange(1, len(counts) + 1), counts)).tolist()
    images, low, high = [], *preset.objects
    while deck:
        take = rng.randint(low, high + 1)
        images.append(deck[:take])
        deck = deck[take:]
    return images


def make_glyphs(root: str | Path, preset: Preset, seed: int = 0, workers: int | None = None) -> Path:
    """Make a dataset folder unless it exists, and return it.

    It holds train.json, val.json, train/, val/, and semantic_train/ and semantic_val/ (1 + index in
    glyph_images.TEXTURES). The folder gets its name when it is complete; an interrupted run resumes with its last
    chunk. Raises UserError if the folder holds a dataset with other settings.
    """
    root = Path(root)
    if not 0 <= seed < 2**31:
        raise UserError(f"seed: expected 0 <= seed < 2**31, got {seed}")
    if workers is not None and workers < 1:
        raise UserError(f"workers: expected 1 or more processes, got {workers}")
    values = {key: value for key, value in dataclasses.asdict(preset).items() if (key, value) != ("bold", 0)}
    settings = json.loads(json.dumps({"preset": values, "seed": seed, "format": 1}))
    if root.exists():
        _check_settings(root / "settings.json", settings)
        return root
    folder = root.with_name(root.name + ".partial")
    with locks.waiting(folder):
        if root.exists():  # another process has just made it
            _check_settings(root / "settings.json", settings)
            _remove_empty(folder)
            return root
        return _make(root, folder, preset, seed, workers, settings)


def _remove_empty(folder: Path) -> None:
    """Remove a folder that holds only its lock; another process that waits for it makes it again."""
    with contextlib.suppress(OSError):
        (folder / locks.NAME).unlink()
        folder.rmdir()


def _make(root: Path, folder: Path, preset: Preset, seed: int, workers: int | None, settings: dict) -> Path:
    if (folder / "settings.json").exists():
        _check_settings(folder / "settings.json", settings)
    for name in ("parts", "train", "val", "semantic_train", "semantic_val"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    write_text(folder / "settings.json", json.dumps(settings, indent=1))

    ranked = choose_categories(preset, seed)
    if len(ranked) < preset.categories:
        raise UserError(
            f"the font has families of {preset.family} look-alikes for {len(ranked)} categories, "
            f"not {preset.categories}: lower family_similarity or family in the preset"
        )
    characters = dict(enumerate(sorted(ranked), start=1))  # ids follow code points, not counts
    train_counts = dict(zip(ranked, instance_counts(preset), strict=True))
    counts = np.array([train_counts[characters[c]] for c in characters])
    rng = np.random.RandomState([seed, 0])
    jobs = []
    for split, wanted in (("train", counts), ("val", np.full_like(counts, preset.val_instances))):
        dealt = _deal(wanted, preset, rng)
        jobs += [
            (preset, seed, split, folder, first + 1, dealt[first : first + CHUNK], characters)
            for first in range(0, len(dealt), CHUNK)
        ]
    _run(jobs, workers or os.cpu_count() or 1, root.name)
    _merge(folder, characters, settings)
    os.replace(folder, root)
    (root / locks.NAME).unlink(missing_ok=True)  # a waiting process notices that its folder is gone
    return root


def _run(jobs: list, workers: int, title: str) -> None:
    progress = Progress(total=sum(len(job[5]) for job in jobs), desc=f"making {title}", unit="image")
    # The workers run NumPy and Pillow only, so that forking is safe even after torch was imported.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    with multiprocessing.get_context(method).Pool(workers) as pool:
        for job, _ in zip(jobs, pool.imap(_make_chunk, jobs), strict=True):
            progress.update(len(job[5]))
        pool.close()  # workers end by themselves: one that is ended while it waits for work can block the others
        pool.join()
    progress.close()


def _merge(folder: Path, characters: dict[int, str], settings: dict) -> None:
    """Merge the parts to train.json and val.json, with the training annotations' counts of each category."""
    splits = {}
    for split in ("train", "val"):
        parts = [json.loads(p.read_text()) for p in sorted((folder / "parts").glob(f"{split}-*.json"))]
        images = [image for part in parts for image in part["images"]]
        annotations = [annotation for part in parts for annotation in part["annotations"]]
        splits[split] = images, [{"id": i, **a} for i, a in enumerate(annotations, start=1)]
    train = splits["train"][1]
    instances = np.bincount([a["category_id"] for a in train], minlength=len(characters) + 1)
    pairs = {(a["image_id"], a["category_id"]) for a in train}
    in_images = np.bincount([category_id for _, category_id in pairs], minlength=len(characters) + 1)
    categories = []
    for category_id, character in characters.items():
        image_count = int(in_images[category_id])
        categories.append(
            {
                "id": category_id,
                "name": character,
                "synset": f"u{ord(character):04x}.n.01",
                "synonyms": [character],
                "def": unicodedata.name(character, f"U+{ord(character):04X}").lower(),
                "instance_count": int(instances[category_id]),
                "image_count": image_count,
                "frequency": "r" if image_count <= 10 else "c" if image_count <= 100 else "f",
            }
        )
    info = {"description": "glyphs: a procedural long-tail detection dataset", **settings}
    for split, (images, annotations) in splits.items():
        content = {"info": info, "images": images, "annotations": annotations, "categories": categories}
        (folder / f"{split}.json").write_text(json.dumps(content))
    shutil.rmtree(folder / "parts")


def _check_settings(file: Path, wanted: dict) -> None:
    try:
        settings = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        settings = None
    if settings is None:
        raise UserError(f"{file.parent} exists and is no glyphs dataset: choose another data.root (--root)")
    if settings != wanted:
        raise UserError(
            f"{file.parent} exists, but {file.name} there is not of this preset and seed: "
            "remove the folder to make it again, or choose another data.root"
        )
