"""The best classifier for a dataset: rows trained from one store, their means scored, one of them chosen honestly."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bags.analysis.choice import read_choice
from bags.analysis.results import environment, save_results, this_command
from bags.analysis.run_files import read_seconds, without_nan
from bags.analysis.tables import render_choice, render_table, rows_of_choices
from bags.assembly.loaders import build_val_dataset, open_index
from bags.assembly.mixtures import Mixtures
from bags.assembly.stored import images_digest
from bags.config.load import config_to_dict, load_config
from bags.config.rows import find_dataset
from bags.config.sections import Config, UniformConfig
from bags.core import locks
from bags.core.errors import UserError
from bags.core.files import read_text, write_text
from bags.core.progress import Progress
from bags.data import glyphs
from bags.data.plausibility import shared_images
from bags.data.statistics import CategoryStats, training_of
from bags.engine.checkpoint import load_checkpoint, weights_digest
from bags.evaluation import selection
from bags.evaluation.comparison import compare
from bags.evaluation.detection_ap import FIXED
from bags.evaluation.selection import Choice, Estimate, Mixture, Validation
from bags.evaluation.truth import Truth, read_truth
from bags.jobs import preflight
from bags.jobs.evaluate import evaluate_checkpoint
from bags.jobs.pool import BASELINE, POOLS, baseline_of, pool_rows
from bags.jobs.train import run_jobs

NAME = "choose"  # of the run folder
PROCEDURE = 2  # to be raised when the same rows and images give another choice or estimate


def choose(
    config: str | Path,
    overrides: Sequence[str] = (),
    pool: str | Sequence[str] = "quick",
    metric: str = "AP",
    folds: int = 5,
    draws: int = 500,
    test: str | Path | None = None,
    test_images: str | Path | None = None,
    members: int = selection.MEMBERS,
) -> dict:
    """Choose the classifier of a dataset: a row of the pool, or the mean of several.

    config, overrides: as on the command line, a dataset. pool: "quick", "full", or rows as `METHOD [xN] [adamw]
    [section.key=value]`. metric: AP, AP50, AP75, APr, APc, APf, AP1, ..., AP_tail, AP_head or AP_fixed of boxes.
    test, test_images: annotations and images that nothing is chosen with, scored once at the end. members: most rows
    in a mean; 1 chooses a single row.

    Returns what `choose/choose.json` in the dataset's run folder holds; `choose/last.pth` is the chosen checkpoint.
    What is finished is not done again. Raises UserError for what cannot be used.
    """
    path = Path(config)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("choose runs in one process; to use several GPUs, train the rows first, with scripts/train.py")
    if isinstance(pool, str) and pool not in POOLS:
        raise UserError(f"--pool {pool}: expected one of {', '.join(POOLS)}")
    rows = pool_rows(path, overrides, POOLS[pool] if isinstance(pool, str) else pool)
    data = rows[0].data
    if data.glyphs:
        glyphs.make_glyphs(data.root, glyphs.PRESETS[data.glyphs])
    truth = read_truth(Path(data.root, data.val))
    _check(rows, truth, metric, folds, draws, members)
    members = min(members, len(rows))
    _check_test(rows[0], test, test_images)
    folder, start = rows[0].run_folder.with_name(NAME), rows[0].init_file
    if start is not None and folder.resolve() in start.resolve().parents:
        raise UserError(f"detector.init_from={start}: is in the folder that choose writes: set output= to another one")
    run_jobs([[*baseline_of(path, overrides, rows), *rows]], lambda _: None)
    key = _key(rows, metric, folds, draws, *(["of all detections"] if metric == "AP_fixed" else []))
    with locks.alone(folder, "set output="):
        content = _finished(folder, rows, key, members)
        if content is None:
            _check_ours(folder)
            content = _select(path, overrides, rows, truth, (metric, folds, draws, members), folder, key)
            _clear(folder)
            write_text(folder / "choose.json", json.dumps(content, indent=1))
    chosen = _chosen_row(path, overrides, rows, content["chosen"])
    run_jobs([[chosen]], lambda _: None)
    if test is not None:
        content["test"] = _score_test(rows[0], chosen, Path(test), test_images, draws, content.get("test"))
        write_text(folder / "choose.json", json.dumps(content, indent=1))
    return content


def choose_seeds(
    config: str | Path, overrides: Sequence[str], seeds: Sequence[int | None], save: Path | None = None, **settings: Any
) -> list[dict]:
    """`choose` for each seed of the rows, below <output>/seed<N>; None is the seed of the configuration.

    The baseline of each seed is a whole run of its own. save: a JSON file that keeps the numbers of all rows.
    """
    control = pool_rows(Path(config), overrides, ())[0]
    contents, folders = [], []
    for seed in seeds:
        output = control.output if seed is None else f"{control.output}/seed{seed}"
        given = [*overrides, f"output={output}", *([] if seed is None else [f"seed={seed}"])]
        contents.append(choose(config, given, **settings))
        folders.append(dataclasses.replace(control, name=NAME, output=output).run_folder)
    if save:
        numbers = rows_of_choices(contents)
        title = f"{control.data.name}: choose"
        save_results(save, title, this_command(), dict.fromkeys(numbers, folders), numbers)
    return contents


def show(contents: Sequence[dict]) -> None:
    """Print the table of a choice, and what it says; of several seeds the means and deviations of all rows."""
    print(f"\n{render_choice(contents[0]) if len(contents) == 1 else render_table(rows_of_choices(contents))}")


def _check(rows: Sequence[Config], truth: Truth, metric: str, *numbers: int) -> None:
    """Raise UserError, before anything is trained, for a metric, folds, draws or members that cannot be used."""
    known = [*_sets(truth, rows[0]), "AP50", "AP75", "AP_fixed"]
    if metric not in known:
        raise UserError(f"--metric {metric}: expected one of {', '.join(known)}")
    if metric in _sets(truth, rows[0]):
        held = {annotation["category_id"] for annotation in truth.content["annotations"]}
        inside = _sets(truth, rows[0])[metric]
        if not any(inside[category - 1] for category in held):
            raise UserError(f"--metric {metric}: {truth.path} holds no object of its categories: choose another")
    if len(truth.image_ids) < 2:
        raise UserError(f"{truth.path}: holds one image: expected two or more to choose with")
    for name, number in zip(("folds", "draws", "members"), numbers, strict=True):
        if type(number) is not int or number < 1:
            raise UserError(f"--{name} {number}: expected a whole number of 1 or more")
    folds, *_ = numbers
    if not 2 <= folds <= len(truth.image_ids):
        raise UserError(f"--folds {folds}: expected 2 to {len(truth.image_ids)}, the images of {truth.path}")


def _check_test(control: Config, test: str | Path | None, images: str | Path | None) -> None:
    """Raise UserError, before anything is trained, for a test set that cannot be used."""
    if test is None:
        if images is not None:
            raise UserError(f"--test-images {images}: expected --test, the annotations of these images")
        return
    config = _on_test(control, test, images)
    folder = Path(config.data.val_images)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --test-images says where the images of {test} are")
    index = open_index(config, "val")
    preflight.check_validation(config, CategoryStats.from_index(open_index(control, "train")))
    preflight.check_present(index, folder)
    for split, images_of in (("train", control.data.train_images), ("val", control.data.val_images)):
        known = open_index(control, split)
        if index.content_digest() == known.content_digest():
            raise UserError(
                f"--test {test}: is data.{split} itself, which the choice depends on: expected another file"
            )
        shared = shared_images(known, Path(control.data.root, images_of), index, folder)
        if split == "train" and not control.data.empty_images:  # equal images without objects are not trained on
            trained = {known.file_name(position) for position in np.unique(known.owners[known.trained])}
            shared = [pair for pair in shared if pair[0] in trained]
        if shared:
            raise UserError(
                f"--test {test}: {len(shared)} of its images are in data.{split} too, first: {shared[0][1]} (there "
                f"{shared[0][0]}), and the choice depends on them: leave them out"
            )


def _on_test(control: Config, test: str | Path, images: str | Path | None) -> Config:
    """The configuration of the control with the test set in place of validation, wherever its data are now."""
    folder = Path(images) if images is not None else Path(control.data.root, control.data.val_images)
    data = dataclasses.replace(control.data, val=str(Path(test).absolute()), val_images=str(folder.absolute()))
    return dataclasses.replace(control, data=data)


def _sets(truth: Truth, config: Config) -> dict[str, np.ndarray]:
    """Which categories [C] enter which mean."""
    counts = _counts(truth, config)
    training = training_of({"categories": truth.category_counts()}, **counts, boundaries=config.test.bins)
    return {"AP": np.ones(len(truth.names), bool), **training.sets()}


def _counts(truth: Truth, config: Config) -> dict[str, Any]:
    """Training boxes and images of each category. Raises UserError where train and val have other categories."""
    stats = CategoryStats.from_index(open_index(config, "train"))
    return truth.training_counts(stats, Path(config.data.root, config.data.train))


def _key(rows: Sequence[Config], *settings: object) -> str:
    """A digest of all that a choice depends on, but for the number of members."""
    weights = [weights_digest(load_checkpoint(row.run_folder / "last.pth")) for row in rows]
    about = [(row.name, config_to_dict(row)["classifier"]) for row in rows]
    seen = images_digest(build_val_dataset(rows[0]))
    text = repr((PROCEDURE, weights, about, open_index(rows[0], "val").sha256, seen, repr(rows[0].test), settings))
    return hashlib.sha256(text.encode()).hexdigest()


def _finished(folder: Path, rows: Sequence[Config], key: str, members: int) -> dict | None:
    """The content of `choose.json` if it is of the same rows, images and settings."""
    with contextlib.suppress(OSError, UserError):
        content = read_choice(folder / "choose.json")
        names = {row.name for row in rows}
        same = content["key"] == key and min(content.get("members", selection.MEMBERS), len(rows)) == members
        if same and names == set(content["rows"]):
            return content
    return None


def _check_ours(folder: Path) -> None:
    """Raise UserError for the folder of another run."""
    files = {file.name for file in folder.iterdir() if not file.name.startswith(".")} if folder.exists() else set()
    if files and not files & {"choose.json", "mixtures.jsonl"}:
        raise UserError(f"{folder}: holds files that choose has not written: rename the folder, or set output=")


def _clear(folder: Path) -> None:
    """Remove an older choice, but not what was found out about mixtures."""
    for path in folder.iterdir():
        if path.name != "mixtures.jsonl" and not path.name.startswith("."):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _select(
    path: Path,
    overrides: Sequence[str],
    rows: Sequence[Config],
    truth: Truth,
    settings: tuple[str, int, int, int],
    folder: Path,
    key: str,
) -> dict:
    """Score the rows and their means, and say what is best."""
    metric, folds, draws, members = settings
    device = torch.device("cuda" if torch.cuda.is_available() and rows[0].device != "cpu" else "cpu")
    most = FIXED if metric == "AP_fixed" else None
    mixtures = Mixtures(_average(path, overrides, rows, [1.0] * len(rows)), truth, device, most)
    detect = selection.MatchedMixtures(mixtures, truth, mixtures.config.test.max_detections, most)
    name = "AP" if metric == "AP_fixed" else metric
    order = np.array([image["id"] for image in truth.content["images"]])
    validation = Validation(detect.objects(len(rows)), len(truth.image_ids), _sets(truth, rows[0]), name, order, most)
    memory = _Memory(folder / "mixtures.jsonl", key, folds + 1)
    choice = selection.choose(detect, len(rows), validation, folds, draws, rows[0].seed, members, memory.values)
    return _content(choice, rows, settings, name, key)


class _Memory:
    """The values of mixtures on disk, so that a choice that was killed goes on where it was."""

    def __init__(self, file: Path, key: str, views: int):
        self.file = file
        self.known: dict[Mixture, np.ndarray] = {}
        header = json.dumps({"key": key})
        lines = read_text(file, "replace").splitlines() if file.exists() else []
        for line in lines[1:] if lines[:1] == [header] else ():
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):  # the last line of a killed run
                entry = json.loads(line)
                values = np.array(entry["values"], np.float64)
                if values.shape == (views,) and np.isfinite(values).all():
                    self.known[tuple(map(float, entry["shares"]))] = values
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, "\n".join([header, *map(self._line, self.known)]) + "\n")

    def _line(self, mixture: Mixture) -> str:
        return json.dumps({"shares": mixture, "values": self.known[mixture].tolist()})

    def values(self, mixtures: Iterable[Mixture], value: Callable[[Mixture], np.ndarray]) -> list[np.ndarray]:
        """The value of each mixture, with a progress bar for those that are not known."""
        mixtures = list(mixtures)
        bar = Progress([m for m in mixtures if m not in self.known], desc="choose", unit="mixture")
        with self.file.open("a") as file:
            for mixture in bar:
                self.known[mixture] = value(mixture)
                file.write(self._line(mixture) + "\n")
                file.flush()
        return [self.known[mixture] for mixture in mixtures]


def _content(choice: Choice, rows: Sequence[Config], settings: tuple[str, int, int, int], name: str, key: str) -> dict:
    """The choice as JSON."""
    control, (metric, folds, draws, members) = choice.rows[0], settings
    names = [row.name for row in rows]
    simple = [0, *(number for number, row in enumerate(names) if row == BASELINE)]
    instead = choice.instead(name, simple)
    shown = {"AP_fixed": "AP"} if metric == "AP_fixed" else {key: key for key in control.values}

    def gains(estimate: Estimate, other: Estimate) -> dict:
        """Gains over another row with their intervals."""
        found = {title: estimate.gain(other, key) for title, key in shown.items()}
        return {key: [None if v != v else v for v in gain] for key, gain in found.items()}

    def numbers(estimate: Estimate) -> dict:
        """Values, and gains over the control."""
        values = without_nan({title: estimate.values[key] for title, key in shown.items()})
        return {"numbers": values, "gain": gains(estimate, control)}

    def named(mixture: Mixture) -> dict[str, float]:
        """The shares of the rows that are in a mixture."""
        return {row: share for row, share in zip(names, mixture, strict=True) if share}

    return {
        "key": key,
        "command": this_command(),
        "environment": environment(),
        "metric": metric,
        "folds": folds,
        "draws": draws,
        "members": members,
        "seed": rows[0].seed,
        "images": len(open_index(rows[0], "val").image_ids),
        "control": names[0],
        "rows": {
            row.name: {**numbers(estimate), "seconds": _or_none(read_seconds(row.run_folder))}
            for row, estimate in zip(rows, choice.rows, strict=True)
        },
        "mixture": named(choice.mixture),
        "without_fold": [named(mixture) for mixture in choice.without],
        "optimistic": numbers(choice.optimistic),
        "honest": numbers(choice.honest),
        "over_baseline": {names[row]: gains(choice.honest, choice.rows[row]) for row in simple[1:]},
        "better_than_control": choice.is_better(name),
        "instead": None if instead is None else names[instead],
        "chosen": named(choice.mixture) if instead is None else {names[instead]: 1.0},
    }


def _or_none(number: float) -> float | None:
    return None if number != number else number


def _average(path: Path, overrides: Sequence[str], rows: Sequence[Config], weights: Sequence[float]) -> Config:
    """The configuration of an average of rows, as a run beside them."""
    dataset = find_dataset(path)
    assert dataset is not None  # as `pool_rows` has checked
    sources = json.dumps([f"row:{row.name}" for row in rows])
    given = [f"classifier={{name: average, of: {sources}, weights: {json.dumps(list(weights))}}}", f"name={NAME}"]
    config = load_config(dataset.name / "average", [*overrides, *given])
    detector = dataclasses.replace(config.detector, init_from=rows[0].detector.init_from)
    return dataclasses.replace(config, detector=detector)


def _chosen_row(path: Path, overrides: Sequence[str], rows: Sequence[Config], chosen: dict[str, float]) -> Config:
    """The configuration of what was chosen: one row as it is, or the mean of several."""
    by_name = {row.name: row for row in rows}
    if len(chosen) > 1:
        return _average(path, overrides, [by_name[name] for name in chosen], list(chosen.values()))
    row = by_name[next(iter(chosen))]
    if row.classifier.on_softmax and row.classifier.trained:  # trained beside a softmax, so it is not loaded alone
        return _average(path, overrides, [row], [1.0])
    if row.train.part == "none":
        return dataclasses.replace(row, name=NAME)
    return dataclasses.replace(
        row,
        name=NAME,
        detector=dataclasses.replace(row.detector, init_from=f"row:{row.name}", reset_classifier=False),
        sampler=UniformConfig(),
        train=dataclasses.replace(row.train, part="none", features=None),
    )


def _score_test(
    control: Config, chosen: Config, test: Path, images: str | Path | None, draws: int, before: dict | None
) -> dict:
    """The numbers of the control and of the choice on images that nothing was chosen with, and the difference."""
    truth = read_truth(test)
    config = _on_test(control, test, images)
    seen = images_digest(build_val_dataset(config))
    digest = hashlib.sha256(test.read_bytes()).hexdigest()
    if before and (before.get("sha256"), before.get("images")) == (digest, seen):
        print(f"{test}: was scored already", file=sys.stderr)
        return before
    folder, numbers = chosen.run_folder / "test", {}
    given = [f"device={control.device}", f"data.val={config.data.val}", f"data.val_images={config.data.val_images}"]
    for name, row in (("control", control), ("chosen", chosen)):
        metrics, _ = evaluate_checkpoint(row.run_folder / "last.pth", given, folder / name)
        numbers[name] = without_nan(metrics or {})
    first, second = (folder / name / "predictions.json" for name in numbers)
    counts, bins, limit = _counts(truth, control), control.test.bins, control.test.max_detections
    result = compare(truth, first, second, draws=draws, boundaries=bins, max_detections=limit, **counts)
    gains = {
        name: [result.second[name] - value, *result.intervals.get(name, (None, None))]
        for name, value in result.first.items()
        if value == value
    }
    return {"annotations": str(test), "sha256": digest, "images": seen, **numbers, "gain": gains}
