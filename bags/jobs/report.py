"""Gather what the report of a run shows."""

import contextlib
import filecmp
from pathlib import Path
from typing import TYPE_CHECKING

from bags.core.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from bags.analysis.report import Findings
    from bags.analysis.run_results import RunResults
    from bags.config.sections import Config
    from bags.data.dataset import DetectionDataset
    from bags.data.statistics import CategoryStats
    from bags.evaluation.comparison import Comparison

EXAMPLES = 4  # categories with images, of the best and of the worst
MEND = "data.root=... says where the dataset is now"


def read_runs(folders: list[Path], overrides: list[str]) -> list["RunResults"]:
    """The runs, with names that differ. Raises UserError unless they are finished and can be compared."""
    from bags.analysis.run_results import read_run
    from bags.jobs.folders import check_scored_alike

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
    check_scored_alike([run.folder for run in runs])
    ours, theirs = (Path(run.config.data.root) / run.config.data.val for run in runs)
    if ours.exists() and theirs.exists() and not filecmp.cmp(ours, theirs, shallow=False):
        raise UserError(f"{other.folder}: was validated on {theirs}, {first.folder} on {ours}, which differ")
    return runs


def gather(runs: list["RunResults"], draws: int) -> "Findings":
    """Gather what the page shows beside the numbers of the runs. Missing parts become notes."""
    from bags.analysis import examples as shown
    from bags.analysis.report import Findings, best_and_worst
    from bags.data.statistics import CategoryStats

    first = runs[0]
    columns = ("id", "name", "training_instances", "training_images")
    stats = CategoryStats(*(tuple(row[column] for row in first.rows) for column in columns))
    name_of = dict(zip(stats.category_ids, stats.names, strict=True))
    findings = Findings(tail=best_and_worst(first.rows, first.config.test.bins))
    gather_choice(first, findings)
    for run in runs:
        if (run.folder / "last.pth").exists():
            run.norms = norms_of(run)
        else:
            findings.notes.append(f"{run.folder / 'last.pth'}: no such file: no weight norms of {run.label}")
    entries = [shown.read_detections(run.folder, name_of) for run in runs]
    findings.detected = [{entry["category_id"] for entry in of_run} for of_run in entries]
    dataset = open_validation(runs, stats, findings)
    if findings.objects is not None and len(runs) > 1:
        findings.comparison = compare_runs(runs, stats, draws)
    detections = {run.label: shown.by_image(of_run) for run, of_run in zip(runs, entries, strict=True)}
    if findings.objects is not None:
        gather_mistakes(runs, detections, findings)
    gather_labels(first, findings)
    if dataset is not None:
        rows = [row for part in findings.tail for row in part[:EXAMPLES]]
        try:
            findings.examples = {e.category["id"]: e for e in shown.examples(dataset, rows, detections, name_of)}
        except UserError as error:
            findings.notes.append(f"{error}: no example images; {MEND}")
    return findings


def gather_mistakes(
    runs: list["RunResults"], detections: dict[str, dict[int, list[dict]]], findings: "Findings"
) -> None:
    """Find what the tail is taken for, and what each kind of error costs. detections: of each run, `by_image`."""
    from bags.analysis.mistakes import confusions
    from bags.analysis.tables import tail_below
    from bags.assembly.loaders import open_index
    from bags.evaluation.detection_ap import error_kinds

    config = runs[0].config
    index = open_index(config, "val")
    limit = tail_below(config.test.bins)
    findings.confusions = [confusions(index, detections[run.label], run.rows, limit) for run in runs]
    truth = Path(config.data.root) / config.data.val
    most = [run.config.test.max_detections for run in runs]
    findings.errors = [error_kinds(truth, r.folder / "predictions.json", n) for r, n in zip(runs, most, strict=True)]


def gather_labels(run: "RunResults", findings: "Findings") -> None:
    """Find training objects whose label is likely wrong, from stored features. Missing parts become notes."""
    from bags.analysis.wrong_labels import LISTED, SHOWN, Doubted, picture_of, suspects
    from bags.assembly.initialise import check_categories
    from bags.assembly.loaders import build_train_loader, open_index
    from bags.assembly.models import load_detector
    from bags.assembly.stored import stored_objects
    from bags.data.dataset import DetectionDataset

    config, checkpoint = run.config, run.folder / "last.pth"
    folder = _nearest_store(config, checkpoint)
    mend = "a row that trains only the classifier makes the store"
    if not checkpoint.exists():
        findings.notes.append(f"{checkpoint}: no such checkpoint: no section about likely wrong labels")
        return
    if not folder.is_dir():
        findings.notes.append(f"{folder}: no stored features: no section about likely wrong labels; {mend}")
        return
    try:
        detector, meta = load_detector(checkpoint)
        index = open_index(config, "train")
        check_categories(meta["stats"], index, checkpoint)
        dataset = build_train_loader(config, index, meta["stats"]).dataset
        objects = stored_objects(config, detector, dataset, folder) if isinstance(dataset, DetectionDataset) else None
    except UserError as error:
        findings.notes.append(f"{error}: no section about likely wrong labels")
        return
    if objects is None:
        findings.notes.append(f"{folder / 'train'}: not complete: no section about likely wrong labels; {mend}")
        return
    assert isinstance(dataset, DetectionDataset)
    features, labels, annotations = objects
    found = suspects(features, labels, LISTED)
    index, names = dataset.index, meta["stats"].names
    columns = (found.objects, found.guesses, found.similarity, found.own)
    for number, (k, guess, similarity, own) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
        annotation, label = int(annotations[k]), names[int(labels[k]) - 1]
        source = index.file_name(int(index.owners[annotation]))
        picture = None
        try:
            picture = picture_of(dataset, annotation, label) if number < SHOWN else None
        except UserError as error:
            findings.notes.append(f"{error}: no picture of annotation {int(index.annotation_ids[annotation])}")
        identity = int(index.annotation_ids[annotation])
        findings.doubted.append(Doubted(identity, source, label, names[guess - 1], similarity, own, picture))
    findings.compared = found.nearer, len(labels)


def _nearest_store(config: "Config", checkpoint: Path) -> Path:
    """The store that a run reads, or that of the run that it starts from, and so on; the first one where none is there.

    A choice starts from the control, which starts from the baseline, beside which the store is.
    """
    from bags.assembly.stored import store_folder
    from bags.config.load import load_config

    folders = [store_folder(config) if config.init_file else checkpoint.with_suffix(".features")]
    while config.init_file and (before := config.init_file.with_name("config.yaml")).exists():
        start, config = config.init_file, load_config(before)
        folders.append(store_folder(config) if config.init_file else start.with_suffix(".features"))
    moved = [checkpoint.parent.parent / folder.parent.name / folder.name for folder in folders]  # with all of its rows
    return next((folder for folder in (*moved, *folders) if folder.is_dir()), folders[0])


def gather_choice(run: "RunResults", findings: "Findings") -> None:
    """Read what `choose` has written into a run's folder, and AP of rows beside it. Missing parts become notes."""
    from bags.analysis.choice import read_choice
    from bags.analysis.run_files import read_categories

    file = run.folder / "choose.json"
    if not file.exists():
        return
    try:
        findings.choice = read_choice(file)
    except UserError as error:
        findings.notes.append(f"{error}: no section about the choice")
        return
    for name in dict.fromkeys([findings.choice["control"], "bags"]):
        if name not in findings.choice["rows"]:
            continue
        folder = run.folder.parent / name
        try:
            rows = read_categories(folder)
        except UserError as error:
            findings.notes.append(f"{error}: {name} is not in the figure of the choice")
            continue
        if [row["id"] for row in rows] == [row["id"] for row in run.rows]:
            findings.choice_rows[name] = rows
        else:
            findings.notes.append(f"{folder}: has other categories: {name} is not in the figure of the choice")
    findings.choice_rows[f"{run.label}: chosen"] = run.rows


def norms_of(run: "RunResults") -> "np.ndarray":
    """The weight norms of a run's classifier, [C+1]."""
    from bags.jobs.tables import weight_norms

    norms, _, stats, _ = weight_norms({run.label: [run.folder]})
    if list(stats.category_ids) != [row["id"] for row in run.rows]:
        raise UserError(f"{run.folder / 'categories.csv'}: has other categories than last.pth; evaluate the run again")
    return norms[run.label][0]


def open_validation(
    runs: list["RunResults"], stats: "CategoryStats", findings: "Findings"
) -> "DetectionDataset | None":
    """The validation set of the first run, or None; its counts and what is missing go to `findings`."""
    import numpy as np

    from bags.assembly.initialise import check_categories
    from bags.assembly.loaders import build_val_dataset, open_index
    from bags.jobs.folders import check_scored_on

    config = runs[0].config
    try:
        index = open_index(config, "val")
    except UserError as error:
        findings.notes.append(f"{error}: no comparison by images, no example images; {MEND}")
        return None
    check_categories(stats, index, runs[0].folder / "categories.csv")
    for run in runs:
        check_scored_on(run.folder, config)
    findings.objects = np.bincount(index.labels[~index.crowd], minlength=stats.num_categories + 1)[1:]
    findings.images["validation"] = len(index)
    with contextlib.suppress(UserError):  # its counts are in categories.csv
        findings.images = {"training": len(open_index(config, "train"))} | findings.images
    try:
        return build_val_dataset(config)
    except UserError as error:
        findings.notes.append(f"{error}: no example images; {MEND}")
    return None


def compare_runs(runs: list["RunResults"], stats: "CategoryStats", draws: int) -> dict[str, "Comparison"]:
    """From the other run to the first one: boxes, and masks where both have them."""
    from bags.evaluation.comparison import compare

    config = runs[0].config
    kinds = ["bbox", "segm"] if all("mask_AP" in run.metrics for run in runs) else ["bbox"]
    before, after = (run.folder / "predictions.json" for run in reversed(runs))
    truth, limit = Path(config.data.root) / config.data.val, max(run.config.test.max_detections for run in runs)
    return {
        kind: compare(
            truth,
            before,
            after,
            kind,
            draws,
            instance_counts=stats.instance_counts,
            image_counts=stats.image_counts,
            boundaries=config.test.bins,
            max_detections=limit,
        )
        for kind in kinds
    }
