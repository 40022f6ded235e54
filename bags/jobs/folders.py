"""Run folders: what stands in them, and whether a row is complete there."""

import contextlib
import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bags.analysis.results import environment
from bags.analysis.run_files import AGAIN_METRICS, read_metrics, read_scored_on
from bags.analysis.run_results import differences
from bags.assembly.initialise import with_members
from bags.assembly.loaders import annotations_digest, build_val_dataset, open_index
from bags.assembly.stored import images_digest
from bags.config.load import config_from_dict, load_config, result_settings, save_config
from bags.config.sections import Config
from bags.core import distributed
from bags.core.errors import UserError
from bags.core.files import read_text, write_text
from bags.data.index import AnnotationIndex
from bags.data.statistics import CategoryStats
from bags.engine.checkpoint import load_checkpoint, load_latest, sources_digest


def is_complete(folder: Path, config: Config) -> bool:
    """Whether the run is finished.

    Raises UserError if what was trained there had other settings, annotations or weights to start from.
    """
    if not any((folder / name).exists() for name in ("last.pth", "previous.pth")):
        return False
    if not (folder / "config.yaml").exists():
        raise UserError(f"{folder}: holds checkpoints but no config.yaml, which says what they are: remove the folder")
    change = _difference(load_config(folder / "config.yaml"), config, but=("data.root",))  # a dataset may have moved
    if change:
        raise UserError(
            f"{folder}: this run was trained with {change[0]}={change[1]}, now it is {change[2]}: "
            "repeat the overrides of that run, give new ones to one row only (DATASET/METHOD with name=), "
            "set output= to keep both, or remove the folder"
        )
    latest, sources = load_latest(folder, warn=False), config.source_files
    assert latest is not None  # a file of it is there
    trained = config_from_dict(latest["config"], f"{folder / 'last.pth'}: config")
    check_checkpoint(folder, trained)
    if Path(config.data.root, config.data.train).exists():
        check_trained_on(folder, latest, config, open_index(config, "train"))
    if sources and all(source.exists() for source in sources):
        differ = (
            "weights" if latest.get("init") != sources_digest([load_checkpoint(source) for source in sources]) else ""
        )
        differ = differ or "classifiers" * (with_members(config)[0].classifier != trained.classifier)
        if differ:
            raise UserError(
                f"{folder}: this run started from other {differ} than {' and '.join(map(str, sources))} "
                f"hold{'s' * (len(sources) == 1)} now: remove the folder, or set output= to keep both"
            )
    try:
        load_checkpoint(folder / "last.pth")
    except UserError:
        return False  # goes on from previous.pth
    if not is_finished(folder) or "ACC" not in read_metrics(folder):
        return False
    if Path(config.data.root, config.data.val).exists():
        check_scored_on(folder, config)
    return True


def check_trained_on(folder: Path, checkpoint: dict, config: Config, index: AnnotationIndex) -> None:
    """Raise UserError if a run's checkpoint was trained on other annotations than those of the index.

    Checkpoints of earlier versions know only the counts of their annotations.
    """
    same = checkpoint["stats"] == CategoryStats.from_index(index).to_dict()
    if not same or checkpoint.get("annotations") not in (None, annotations_digest(config, index)):
        mend = "remove the folder, or set output="
        raise UserError(f"{folder}: {index.path} has changed since this run was trained: {mend}")


def is_finished(folder: Path) -> bool:
    """Whether a run was scored."""
    return (folder / "metrics.json").exists()


def check_scored_on(folder: Path, config: Config) -> None:
    """Raise UserError if a run is known to be scored on other validation annotations or images than are there now.

    Images are compared by their sizes in bytes, unless none is left.
    """
    index, images = open_index(config, "val"), read_scored_on(folder, "images")
    if read_scored_on(folder) not in (None, index.sha256):
        raise UserError(f"{folder}: {index.path} has changed since this run was scored: {AGAIN_METRICS}")
    place = Path(config.data.root, config.data.val_images)
    if images is None or not any(index.image_path(place, k).exists() for k in range(len(index))):
        return
    if images != images_digest(build_val_dataset(config)):
        raise UserError(f"{folder}: images in {place} have changed since this run was scored: {AGAIN_METRICS}")


def check_scored_alike(folders: Sequence[Path]) -> None:
    """Raise UserError for runs that were scored with different `test.bins`, or on different annotations or images."""
    first = folders[0]
    bins = load_config(first / "config.yaml").test.bins
    known: dict[str, str] = {}  # kind of what was scored on -> the first digest
    for folder in folders:
        own_bins = load_config(folder / "config.yaml").test.bins
        if own_bins != bins:
            texts = [",".join(map(str, numbers)) for numbers in (own_bins, bins)]
            raise UserError(f"{folder}: scored with test.bins={texts[0]}, {first} with {texts[1]}: use one of them")
        for kind, key in (("annotations", "sha256"), ("images", "images")):
            digest = read_scored_on(folder, key)
            if digest and digest != known.setdefault(kind, digest):
                raise UserError(f"{folder}: was scored on other {kind} than {first}: for the older {AGAIN_METRICS}")


def check_comparable(rows: dict[str, list[Path]]) -> None:
    """Raise UserError for runs that do not belong in one table.

    rows: row -> run folders. All must be scored alike; those of one row may differ in the seed, the dataset's place and
    the folder of the row that they start from. Choices may be of different rows.
    """
    check_scored_alike([folder for folders in rows.values() for folder in folders])
    for name, (first, *others) in rows.items():
        chosen = all((folder / "choose.json").exists() for folder in (first, *others))
        config = load_config(first / "config.yaml")
        seen = {(config.seed, config.detector.init_from): first}
        for other in others:
            theirs, but = load_config(other / "config.yaml"), ["seed", "data.root"]
            starts = [Path(one.detector.init_from or "").parts[-2:] for one in (config, theirs)]
            if starts[0] == starts[1]:  # each seed from its own checkpoint of that row, wherever it is
                but.append("detector.init_from")
            if chosen:  # each seed for itself
                but += ["classifier.", "sampler.", "train.", "detector.init_from"]
            change = _difference(config, theirs, but)
            if change:
                raise UserError(
                    f"{other}: has {change[0]}={change[2]}, {first} has {change[1]}: runs called {name} are averaged, "
                    "so only their seeds may differ: rename one of the folders, or leave it out"
                )
            twin = seen.setdefault((theirs.seed, theirs.detector.init_from), other)
            if twin != other:
                raise UserError(
                    f"{other}: has the seed ({theirs.seed}) and the start of {twin}: runs called {name} are averaged, "
                    "and a repeated run says nothing of their deviation: leave one out"
                )


def check_checkpoint(folder: Path, config: Config) -> None:
    """Raise UserError unless the configuration of a run's checkpoint is that of its `config.yaml`."""
    file = folder / "config.yaml"
    change = _difference(config, load_config(file), but=("data.root",))
    if change:
        raise UserError(
            f"{folder / 'last.pth'}: was trained with {change[0]}={change[1]}, {file} has {change[2]}: "
            "put the file of this run back, or remove the folder"
        )


def _difference(first: Config, second: Config, but: Sequence[str] = ()) -> tuple[str, object, object] | None:
    """The first setting that can change a result and differs: (key, first value, second value).

    but: keys that may differ, or the beginnings of such keys.
    """
    changes = differences(first, second, result_settings)
    if not (first.is_cached or second.is_cached):  # neither reads a store, and live is what null stands for
        changes = [change for change in changes if not change[0].startswith(("store.", "train.features"))]
    return next((change for change in changes if not change[0].startswith(tuple(but))), None)


def describe(config: Config) -> None:
    """Write what a run is into its folder."""
    config.run_folder.mkdir(parents=True, exist_ok=True)
    if not any((config.run_folder / name).exists() for name in ("last.pth", "previous.pth")):
        (config.run_folder / "validation.json").unlink(missing_ok=True)  # of a run whose checkpoints were removed
    save_config(config, config.run_folder / "config.yaml")
    _write_environment(config.run_folder)


def _write_environment(folder: Path) -> None:
    """`environment.json`: what the numbers of this run were made with; further starts of it are in `resumed`."""
    content = {
        "command": sys.argv,
        **environment(),
        "ranks": distributed.world_size(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    path = folder / "environment.json"
    if path.exists() and any((folder / name).exists() for name in ("last.pth", "previous.pth")):
        with contextlib.suppress(ValueError, TypeError):  # damaged: begun again
            first = dict(json.loads(read_text(path)))
            content = first | {"resumed": [*first.get("resumed", ()), content]}
    write_text(path, json.dumps(content, indent=1))
