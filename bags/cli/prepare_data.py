"""Makes, fetches and checks datasets.

    python scripts/prepare_data.py glyphs-100                        # the embedded dataset, to data/glyphs-100
    python scripts/prepare_data.py glyphs-1230 --root /data/glyphs
    python scripts/prepare_data.py lvis --root data/lvis --version v0.5
    python scripts/prepare_data.py coco_lt --source instances_train2017.json --output coco_lt.json
    python scripts/prepare_data.py muscima --source muscima-pp --output data/muscima_tiles   # from a checkout
    python scripts/prepare_data.py ccp --source clothing-co-parsing --output data/ccp
    python scripts/prepare_data.py angelina --source AngelinaDataset --output data/angelina
    python scripts/prepare_data.py split mine.json --val 0.2             # to mine_train.json and mine_val.json
    python scripts/prepare_data.py check configs/muscima data.root=/data/muscima_tiles
    python scripts/prepare_data.py check train.json --images train2017   # an annotation file without a configuration
    python scripts/prepare_data.py preview configs/custom data.root=/data/mine --batches 2   # what training sees
    python scripts/prepare_data.py remap val.json --like train.json --output val_all.json   # categories by name

check lists every defect with its count, examples by id, and what training will do about it. It ends with
code 1 if training would stop at one of them, else 0; --json prints the list for machines.
"""

import argparse
from pathlib import Path

from bags.cli.arguments import for_this_machine
from bags.data.glyphs import PRESETS
from bags.jobs import prepare_data


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
    coco_lt.add_argument("--targets", type=Path, help="JSON: instances per category id (default: the published 80)")
    words = "for a source that is a part of COCO: S (0 to 1) times each target, rounded up, or all where there is less"
    coco_lt.add_argument("--scale", type=float, metavar="S", help=words)
    coco_lt.add_argument("--image-lists", type=Path, help="JSON: the authors' image ids per category id, instead")
    coco_lt.add_argument("--output", type=Path, required=True)
    coco_lt.add_argument("--seed", type=int, default=0)
    for name, repository in prepare_data.REPOSITORIES.items():
        prepared = commands.add_parser(name, help=f"prepare images and annotations from github.com/{repository}")
        prepared.add_argument("--source", type=Path, required=True, help=f"checkout of github.com/{repository}")
        prepared.add_argument("--output", type=Path, required=True, help="folder, made by this command")
    split = commands.add_parser("split", help="divide an annotation file into train and val, rare categories in both")
    split.add_argument("source", type=Path, help="annotation file")
    split.add_argument("--val", type=float, default=0.2, metavar="SHARE", help="share of the images in val (0.2)")
    split.add_argument("--output-train", type=Path, help="default: NAME_train.json beside the source NAME.json")
    split.add_argument("--output-val", type=Path, help="default: NAME_val.json beside it")
    split.add_argument("--group", metavar="KEY", help="key of the images; those of equal value stay together: video")
    split.add_argument("--seed", type=int, default=0)
    remap = commands.add_parser("remap", help="give a file the categories of another one, by name")
    remap.add_argument("source", type=Path, help="annotation file")
    remap.add_argument("--like", type=Path, required=True, help="the file whose categories are taken")
    remap.add_argument("--output", type=Path, required=True)
    check = commands.add_parser("check", help="list the defects of a dataset")
    check.add_argument("source", type=Path, help="configuration, folder of them, or annotation file")
    check.add_argument("overrides", nargs="*", help="section.key=value, for a configuration")
    check.add_argument("--images", type=Path, help="image folder of an annotation file")
    check.add_argument("--decode", action="store_true", help="read every pixel, not only the images' headers")
    check.add_argument("--json", action="store_true")
    preview = commands.add_parser("preview", help="draw what training sees: augmented images, boxes, masks")
    preview.add_argument("source", type=Path, help="configuration; of a dataset its first row")
    preview.add_argument("overrides", nargs="*", help="section.key=value")
    preview.add_argument("--batches", type=int, default=1, metavar="N", help="batches of the first epoch (1)")
    preview.add_argument("--output", type=Path, default=Path("preview.png"), metavar="FILE.png")
    arguments, rest = parser.parse_known_args()  # parse_intermixed_args does not take commands
    takes_more = arguments.command in ("check", "preview")
    if rest and (not takes_more or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if takes_more:
        arguments.overrides += rest  # that stand after an option
        (arguments.source,) = for_this_machine([arguments.source], arguments.overrides)  # as train and choose take it
    names = ("lvis", "coco_lt", "split", "remap", "check", "preview")
    verbs = {name: getattr(prepare_data, name) for name in names}
    verbs |= dict.fromkeys(prepare_data.REPOSITORIES, prepare_data.from_repository)
    verbs.get(arguments.command, prepare_data.glyphs)(arguments)
