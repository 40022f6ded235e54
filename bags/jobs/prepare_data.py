"""Make, fetch and check datasets."""

import itertools
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bags.config.sections import Config, DataConfig
from bags.core.errors import UserError
from bags.core.terminal import printable
from bags.data.glyphs import PRESETS, make_glyphs

if TYPE_CHECKING:
    import argparse

    from bags.data.index import AnnotationIndex

REPOSITORIES = {  # on GitHub; the commits are in the files below bags/data
    "muscima": "OMR-Research/muscima-pp",
    "ccp": "bearpaw/clothing-co-parsing",
    "angelina": "IlyaOvodov/AngelinaDataset",
}


def glyphs(arguments: "argparse.Namespace") -> None:
    """Draw a packaged dataset of letters, and print its folder."""
    print(make_glyphs(arguments.root, PRESETS[arguments.command], arguments.seed, arguments.workers))


def lvis(arguments: "argparse.Namespace") -> None:
    """Fetch what LVIS needs below the root, and print what is there."""
    from bags.data.lvis import fetch_lvis

    print("\n".join(fetch_lvis(arguments.root, arguments.version, not arguments.no_images)))


def from_repository(arguments: "argparse.Namespace") -> None:
    """Prepare a dataset from a checkout of its repository; print the command that checks it."""
    from bags.data.angelina import prepare_angelina
    from bags.data.ccp import prepare_ccp
    from bags.data.muscima import prepare_muscima

    prepare = {"muscima": prepare_muscima, "ccp": prepare_ccp, "angelina": prepare_angelina}[arguments.command]
    folder = prepare(arguments.source, arguments.output)
    root = shlex.quote(f"data.root={folder}")
    print(f"next: python scripts/prepare_data.py check configs/{arguments.command} {root}")


def coco_lt(arguments: "argparse.Namespace") -> None:
    """Make a long-tailed COCO from COCO. Raises UserError for options that exclude each other."""
    from bags.data.coco_lt import BOUNDARIES, make_coco_lt, published_targets, read_image_lists, read_targets, scaled
    from bags.data.statistics import instance_bin

    if arguments.targets and arguments.image_lists:
        raise UserError("coco_lt: expected either --targets or --image-lists, not both")
    if arguments.image_lists and arguments.scale is not None:
        raise UserError("coco_lt: --scale is of targets; --image-lists says by itself what is kept")
    lists = read_image_lists(arguments.image_lists) if arguments.image_lists else None
    targets = read_targets(arguments.targets) if arguments.targets else published_targets()
    capped = arguments.scale is not None
    if capped:
        targets = scaled(targets, arguments.scale)
    counts = make_coco_lt(arguments.source, arguments.output, targets, lists, arguments.seed, capped)
    bins = instance_bin(list(counts.values()), BOUNDARIES).tolist()
    sizes = "/".join(str(bins.count(n)) for n in range(len(BOUNDARIES) + 1))
    print(f"{arguments.output}: {sum(counts.values())} annotations; categories per bin (1-20-400-8000): {sizes}")
    short = sum(counts[category] < target for category, target in targets.items()) if capped else 0
    if short:
        print(f"note: {arguments.source}: has less than the target of {short} categories; all is kept", file=sys.stderr)


def split(arguments: "argparse.Namespace") -> None:
    """Divide an annotation file into train and val; print the numbers of both and the command that comes next."""
    from bags.data.split import split_annotations

    source, group = arguments.source, arguments.group
    train, val = (
        given or source.with_name(f"{source.stem}_{name}.json")
        for given, name in ((arguments.output_train, "train"), (arguments.output_val, "val"))
    )
    done = split_annotations(source, (train, val), arguments.val, group, arguments.seed)
    share = done.images[1] / sum(done.images)
    for path, images, objects, of_all in zip((train, val), done.images, done.objects, (1 - share, share), strict=True):
        print(f"{path}: {images} images ({of_all:.1%}), {sum(objects)} objects")
    kinds = [(bool(a), bool(b)) for a, b in zip(*done.objects, strict=True)]
    alone = sum(number == 1 for number in done.units)
    what = "group" if group else "image"
    print(
        f"categories: {kinds.count((True, True))} in both files, {kinds.count((True, False))} in train only "
        f"({alone} of them cannot be in both: they have one {what} only), {kinds.count((False, True))} in val only, "
        f"{kinds.count((False, False))} without objects"
    )
    if abs(done.images[1] - arguments.val * sum(done.images)) > (0.02 * sum(done.images) if group else 1):
        words = f"val has {share:.1%} of the images, not {arguments.val:.1%}"
        why = "groups stay whole, or" * bool(group) + " otherwise categories would be missing from a file"
        print(f"note: {val}: {words}: {why.strip()}", file=sys.stderr)
    keys = " ".join(map(shlex.quote, _keys_of_split(source, train, val)))
    print(f"next: python scripts/prepare_data.py check configs/custom {keys}")


def _keys_of_split(source: Path, train: Path, val: Path) -> list[str]:
    """The overrides of configs/custom for two files of one image folder, which is looked for beside the source."""
    from bags.data.json_files import read_annotations
    from bags.data.packing import file_name_of

    root = source.parent
    name = file_name_of(val, read_annotations(val)["images"][0])
    folders = [root, *sorted(path for path in root.iterdir() if path.is_dir())]
    images = next(
        (str(folder.relative_to(root)) for folder in folders if (folder / name).is_file()), "FOLDER_OF_IMAGES"
    )
    files = [path.name if path.parent.resolve() == root.resolve() else str(path.resolve()) for path in (train, val)]
    keys = [f"data.root={root}", f"data.name={source.stem}", f"data.train={files[0]}", f"data.val={files[1]}"]
    return [*keys, f"data.train_images={images}", f"data.val_images={images}"]


def remap(arguments: "argparse.Namespace") -> None:
    """Write an annotation file with the categories of another one."""
    from bags.data.remap import remap_categories

    annotations, categories, odd = remap_categories(arguments.source, arguments.like, arguments.output)
    if odd:
        words = "ids in neg_category_ids or not_exhaustive_category_ids that are not among `categories` are left out"
        print(f"note: {arguments.source}: {words}: {len(odd)} images (first: image {odd[0]})", file=sys.stderr)
    print(f"{arguments.output}: {annotations} annotations, {categories} categories as in {arguments.like}")


def check(arguments: "argparse.Namespace") -> None:
    """Print the defects of annotation files and images. Raises UserError for those that stop training."""
    from bags.data.checks import check_annotations, check_images, check_splits, missing_folder, missing_validation
    from bags.data.findings import STOP, as_dicts, render
    from bags.data.index import AnnotationIndex

    configs: list[Config] = []
    if arguments.source.suffix == ".json":
        if arguments.overrides:
            raise UserError(f"{arguments.overrides[0]}: overrides are for a configuration, not for an annotation file")
        sources = [(arguments.source, arguments.images, None, True)]
    else:
        if arguments.images:
            raise UserError("--images goes with an annotation file; a configuration takes data.train_images=...")
        configs, sources = _sources(arguments.source, arguments.overrides)
    masks, data = any(config.detector.has_masks for config in configs), configs[0].data if configs else DataConfig()
    findings, indices = [], []
    for path, images, boundaries, training in sources:
        in_file = check_annotations(path, boundaries, training, masks)
        if not training and not path.exists():
            in_file = missing_validation(path)
        if not any(finding.level == STOP for finding in in_file):
            indices.append(AnnotationIndex.open(path))
            if images is not None and not images.is_dir():
                in_file += missing_folder(images)
            elif images is not None:
                in_file += check_images(indices[-1], images, arguments.decode, data.exif, data.max_pixels)
        findings += in_file
    if len(sources) == len(indices) == 2 and all(images.is_dir() for _, images, _, _ in sources):
        findings += check_splits(indices[0], indices[1], sources[0][1], sources[1][1])
    problems = sum(finding.level == STOP for finding in findings)
    refusal = None if problems else _refusal(configs)
    if arguments.json:
        print(json.dumps(as_dicts(findings), indent=1))
    else:
        print("\n".join(map(printable, render(findings).split("\n"))) or "no defects")
        if indices and indices[0].path == sources[0][0]:
            print(_bins(replace(indices[0], for_masks=masks), (configs[0] if configs else Config()).test.bins))
    if indices and sources[0][1] and not arguments.decode:
        print("note: only the headers of the images were read; --decode also finds truncated images", file=sys.stderr)
    if not arguments.json:
        number = problems or int(refusal is not None)
        print(f"not ready: {number} problem{'s' * (number > 1)}" if number else "ready to train", flush=True)
    if refusal:
        raise refusal
    sys.exit(1 if problems else 0)


def preview(arguments: "argparse.Namespace") -> None:
    """Draw what the training of a row sees."""
    from bags.jobs import preview

    preview.preview(arguments.source, arguments.overrides, arguments.batches, arguments.output)


def _bins(index: "AnnotationIndex", boundaries: Sequence[int]) -> str:
    """A line for each bin of training objects: how many categories are in it."""
    from bags.data.statistics import CategoryStats, instance_bin

    bins = instance_bin(CategoryStats.from_index(index).instance_counts, boundaries).tolist()
    names = [f"{low} to {high - 1}" for low, high in itertools.pairwise((0, *boundaries))] + [
        f"{boundaries[-1]} or more"
    ]
    lines = [f"  AP{n + 1}: {name:<16}{bins.count(n):>6}" for n, name in enumerate(names)]
    return "\n".join([f"categories by training objects (test.bins), of {len(bins)}:", *lines])


def _refusal(configs: list[Config]) -> UserError | None:
    """The error that the start of the rows' training would raise: impossible groups, for example."""
    if configs:
        from bags.jobs.preflight import check_data

        try:
            check_data(configs)
        except UserError as error:
            return error
    return None


def _sources(path: Path, overrides: list[str]) -> tuple[list[Config], list[tuple]]:
    """The rows; (annotation file, image folder, group borders, is it trained on) of train and val."""
    from bags.config.load import load_config
    from bags.config.rows import rows_of

    configs = [load_config(row, overrides) for row in rows_of(path)]
    data, root = configs[0].data, Path(configs[0].data.root)
    borders = getattr(configs[0].classifier, "boundaries", configs[0].test.bins)
    return configs, [
        (root / data.train, root / data.train_images, borders, True),
        (root / data.val, root / data.val_images, None, False),
    ]
