"""Writes one HTML file about a finished run, or about what changed from OTHER to RUN; it needs no other file.

    python scripts/report.py runs/glyphs-100/bags                              # runs/glyphs-100/bags/report.html
    python scripts/report.py runs/glyphs-100/bags runs/glyphs-100/softmax      # RUN, then OTHER
    python scripts/report.py runs/glyphs-100/bags --output bags.html data.root=/where/the/dataset/is/now

It shows the columns of the paper, AP by training instances, precision and recall, weight norms (Figures 1 and 3),
the training curve, the best and the worst categories of the tail with validation images, and what was run; with
OTHER also the differences with their bootstrap intervals, and the categories that gained and lost most. Without the
dataset the report is made without what needs it, and says so.
"""

import argparse
import filecmp
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bags.errors import UserError, run_script
from bags.files import replacing

EXAMPLES = 4  # categories with images, of the best and of the worst
MEND = "data.root=... says where the dataset is now"


def main() -> None:
    """Parses the command line; reads, compares, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN [OTHER]", help="run folders; section.key=value overrides")
    parser.add_argument("--output", type=Path, help="the file to write (default: RUN/report.html)")
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap (default 1000; 0: no intervals)")
    arguments = parser.parse_intermixed_args()

    from bags.analysis.report import render
    from scripts.train import split_arguments

    folders, overrides = split_arguments(arguments.runs)
    if not 1 <= len(folders) <= 2:
        raise UserError(f"expected one run folder or two, got {len(folders)}: {', '.join(map(str, folders))}")
    wrong = next((override for override in overrides if not override.startswith("data.")), None)
    if wrong:
        raise UserError(f"override '{wrong}': a report takes data.* only: the run is shown as it is")
    if arguments.draws < 0:
        raise UserError(f"--draws {arguments.draws}: expected 0 or more")
    output = arguments.output or folders[0] / "report.html"
    runs = read_runs(folders, overrides)
    if output.is_dir():
        raise UserError(f"{output}: is a folder; --output names a file")
    found = gather(runs, arguments.draws)
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output, errors="replace") as file:
        file.write(render(runs, found))
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"written: {output} ({output.stat().st_size / 1e6:.1f} MB)")


def read_runs(folders: list[Path], overrides: list[str]) -> list:
    """The runs, with names that differ. Raises UserError unless they are finished and can be compared."""
    from bags.analysis.run_results import read_run

    runs = [read_run(folder, overrides) for folder in folders]
    if len(runs) == 1:
        return runs
    first, other = runs
    if first.folder.resolve() == other.folder.resolve():
        raise UserError(f"{other.folder}: is the same run; OTHER is another one of the same dataset")
    if first.label == other.label:
        first.label, other.label = str(first.folder), str(other.folder)
    keys = ("id", "name", "training_instances")
    if [[row[key] for key in keys] for row in first.rows] != [[row[key] for key in keys] for row in other.rows]:
        raise UserError(f"{other.folder}: has other categories or training counts than {first.folder}: another dataset")
    if first.config.test.bins != other.config.test.bins:
        bins = [",".join(map(str, run.config.test.bins)) for run in runs]
        raise UserError(
            f"{other.folder}: scored with test.bins={bins[1]}, {first.folder} with {bins[0]}: use one of them"
        )
    ours, theirs = (Path(run.config.data.root) / run.config.data.val for run in runs)
    if ours.exists() and theirs.exists() and not filecmp.cmp(ours, theirs, shallow=False):
        raise UserError(f"{other.folder}: was validated on {theirs}, {first.folder} on {ours}, which differ")
    return runs


def gather(runs: list, draws: int):
    """What the page shows beside the runs' own numbers. What cannot be had becomes a note."""
    from bags.analysis import examples as shown
    from bags.analysis.report import Findings, best_and_worst
    from bags.data.statistics import CategoryStats

    first = runs[0]
    columns = ("id", "name", "training_instances", "training_images")
    stats = CategoryStats(*(tuple(row[column] for row in first.rows) for column in columns))
    name_of = dict(zip(stats.category_ids, stats.names, strict=True))
    found = Findings(tail=best_and_worst(first.rows, first.config.test.bins))
    for run in runs:
        if (run.folder / "last.pth").exists():
            run.norms = norms_of(run)
        else:
            found.notes.append(f"{run.folder / 'last.pth'}: no such file: no weight norms of {run.label}")
    entries = [shown.read_detections(run.folder, name_of) for run in runs]
    found.detected = [{entry["category_id"] for entry in own} for own in entries]
    dataset = open_validation(first, stats, found)
    if found.objects is not None and len(runs) > 1:
        found.comparison = compare_runs(runs, stats, draws)
    if dataset is not None:
        rows = [row for part in found.tail for row in part[:EXAMPLES]]
        detections = {run.label: shown.by_image(own) for run, own in zip(runs, entries, strict=True)}
        try:
            found.examples = {e.category["id"]: e for e in shown.examples(dataset, rows, detections, name_of)}
        except UserError as error:
            found.notes.append(f"{error}: no example images; {MEND}")
    return found


def norms_of(run):
    """The weight norms of a run's classifier, [C+1]."""
    from scripts.tables import weight_norms

    norms, _, stats, _ = weight_norms({run.label: [run.folder]})
    if list(stats.category_ids) != [row["id"] for row in run.rows]:
        raise UserError(f"{run.folder / 'categories.csv'}: has other categories than last.pth; evaluate the run again")
    return norms[run.label][0]


def open_validation(run, stats, found):
    """The validation set, or None; its counts and what is missing go to `found`."""
    import numpy as np

    from bags.build import build_val_dataset, check_categories, open_index

    config = run.config
    try:
        index = open_index(config, "val")
    except UserError as error:
        found.notes.append(f"{error}: no comparison by images, no example images; {MEND}")
        return None
    check_categories(stats, index, run.folder / "categories.csv")
    found.objects = np.bincount(index.labels[~index.crowd], minlength=stats.num_categories + 1)[1:]
    found.images["validation"] = len(index)
    try:
        found.images = {"training": len(open_index(config, "train"))} | found.images
    except UserError:
        pass  # its counts are in categories.csv
    try:
        return build_val_dataset(config)
    except UserError as error:
        found.notes.append(f"{error}: no example images; {MEND}")
    return None


def compare_runs(runs: list, stats, draws: int) -> dict:
    """From the other run to the first one: boxes, and masks where both have them."""
    from bags.evaluation.comparison import compare

    config = runs[0].config
    kinds = ["bbox", "segm"] if all("mask_AP" in run.metrics for run in runs) else ["bbox"]
    before, after = (run.folder / "predictions.json" for run in reversed(runs))
    settings = {
        "instance_counts": stats.instance_counts,
        "image_counts": stats.image_counts,
        "boundaries": config.test.bins,
        "max_detections": max(run.config.test.max_detections for run in runs),
    }
    truth = Path(config.data.root) / config.data.val
    return {kind: compare(truth, before, after, kind, draws, **settings) for kind in kinds}


if __name__ == "__main__":
    run_script(main)
