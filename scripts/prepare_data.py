"""Makes, fetches and checks datasets.

    python scripts/prepare_data.py glyphs-100                        # the embedded dataset, to data/glyphs-100
    python scripts/prepare_data.py glyphs-1230 --root /data/glyphs
    python scripts/prepare_data.py lvis --root data/lvis --version v0.5
    python scripts/prepare_data.py coco_lt --source instances_train2017.json --targets counts.json --output coco_lt.json
    python scripts/prepare_data.py check configs/muscima data.root=/data/muscima_tiles
    python scripts/prepare_data.py check train.json --images train2017   # an annotation file without a configuration

check lists every defect with its count, examples by id, and what training will do about it. It ends with
code 1 if training would stop at one of them, else 0; --json prints the list for machines.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bags.data.glyphs import PRESETS, make_glyphs
from bags.errors import UserError, run_script


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for preset in PRESETS:
        glyphs = commands.add_parser(preset, help="make the embedded dataset")
        glyphs.add_argument("--root", type=Path, default=Path("data", preset), help="folder (default: data/<preset>)")
        glyphs.add_argument("--seed", type=int, default=0)
        glyphs.add_argument("--workers", type=int, help="processes (default: all cores)")
    lvis = commands.add_parser("lvis", help="fetch LVIS")
    lvis.add_argument("--root", type=Path, default=Path("data/lvis"))
    lvis.add_argument("--version", choices=["v0.5", "v1"], default="v1")
    lvis.add_argument("--no-images", action="store_true", help="annotations only")
    coco_lt = commands.add_parser("coco_lt", help="cut COCO to COCO-LT")
    coco_lt.add_argument("--source", type=Path, required=True, help="instances_train2017.json")
    coco_lt.add_argument("--targets", type=Path, help="JSON: instances per category id")
    coco_lt.add_argument("--image-lists", type=Path, help="JSON: the authors' image ids per category id, instead")
    coco_lt.add_argument("--output", type=Path, required=True)
    coco_lt.add_argument("--seed", type=int, default=0)
    check = commands.add_parser("check", help="list the defects of a dataset")
    check.add_argument("source", type=Path, help="configuration, folder of them, or annotation file")
    check.add_argument("overrides", nargs="*", help="section.key=value, for a configuration")
    check.add_argument("--images", type=Path, help="image folder of an annotation file")
    check.add_argument("--decode", action="store_true", help="read every pixel, not only the images' headers")
    check.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    {"lvis": _lvis, "coco_lt": _coco_lt, "check": _check}.get(arguments.command, _glyphs)(arguments)


def _glyphs(arguments) -> None:
    print(make_glyphs(arguments.root, PRESETS[arguments.command], arguments.seed, arguments.workers))


def _lvis(arguments) -> None:
    from bags.data.lvis import fetch_lvis

    print("\n".join(fetch_lvis(arguments.root, arguments.version, not arguments.no_images)))


def _coco_lt(arguments) -> None:
    from bags.data.coco_lt import BOUNDARIES, make_coco_lt, read_image_lists, read_targets
    from bags.data.statistics import instance_bin

    if (arguments.targets is None) == (arguments.image_lists is None):
        raise UserError("coco_lt: expected either --targets or --image-lists")
    targets = read_targets(arguments.targets) if arguments.targets else {}
    lists = read_image_lists(arguments.image_lists) if arguments.image_lists else None
    counts = make_coco_lt(arguments.source, arguments.output, targets, lists, arguments.seed)
    bins = instance_bin(list(counts.values()), BOUNDARIES).tolist()
    sizes = "/".join(str(bins.count(n)) for n in range(len(BOUNDARIES) + 1))
    print(f"{arguments.output}: {sum(counts.values())} annotations; categories per bin (1-20-400-8000): {sizes}")


def _check(arguments) -> None:
    from bags.classifiers.base import ClassifierSettings
    from bags.data.checks import STOP, as_dicts, check_annotations, check_images, check_splits, render
    from bags.data.index import AnnotationIndex
    from bags.data.statistics import CategoryStats

    classifiers: list[ClassifierSettings] = []
    if arguments.source.suffix == ".json":
        if arguments.overrides:
            raise UserError(f"{arguments.overrides[0]}: overrides are for a configuration, not for an annotation file")
        sources, exif = [(arguments.source, arguments.images, None, True)], False
    else:
        if arguments.images:
            raise UserError("--images goes with an annotation file; a configuration takes data.train_images=...")
        sources, exif, classifiers = _sources(arguments.source, arguments.overrides)
    findings, indices = [], []
    for path, images, boundaries, training in sources:
        own = check_annotations(path, boundaries, training)
        if not any(finding.level == STOP for finding in own):
            indices.append(AnnotationIndex.open(path))
            for classifier in classifiers if training else ():
                classifier.columns(CategoryStats.from_index(indices[-1]))  # refuses impossible groups
            if images is not None and not images.is_dir():
                raise UserError(f"{images}: no such image folder; set data.root, data.*_images or --images")
            own += check_images(indices[-1], images, arguments.decode, exif) if images is not None else []
        findings += own
    if len(sources) == len(indices) == 2:
        findings += check_splits(*indices)
    if arguments.json:
        print(json.dumps(as_dicts(findings), indent=1))
    else:
        print(render(findings) or "no defects")
    sys.exit(1 if any(finding.level == STOP for finding in findings) else 0)


def _sources(path: Path, overrides: list[str]) -> tuple[list[tuple], bool, list]:
    """(annotation file, image folder, group borders, is it trained on) of train and val; data.exif; classifiers."""
    from bags.config import load_config

    files = sorted(path.glob("[!_]*.yaml")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: no configuration in there")
    config = load_config(files[0], overrides)
    data, root = config.data, Path(config.data.root)
    borders = getattr(config.classifier, "boundaries", config.test.bins)
    sources = [
        (root / data.train, root / data.train_images, borders, True),
        (root / data.val, root / data.val_images, None, False),
    ]
    return sources, data.exif, [load_config(file, overrides).classifier for file in files]


if __name__ == "__main__":
    run_script(main)
