"""The rows that `choose` chooses from: methods, also trained for longer, by AdamW or with other settings."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from bags.config.load import KEY, config_from_dict, load_config
from bags.config.rows import find_dataset, row_beside
from bags.config.sections import ClassifierConfig, Config
from bags.core.errors import UserError
from bags.engine.checkpoint import load_checkpoint
from bags.engine.optim import ADAMW_RATE

CONTROL = "softmax_retrained"
BASELINE = "baseline"  # the classifier that all rows start from, as it is
# METHOD, then in any order: xN (N times the epochs of the dataset's stage), adamw, and keys of SECTIONS with values.
# `pool_rows` adds the control and the baseline.
QUICK = (
    f"{CONTROL} x4",
    f"{CONTROL} x4 adamw",
    "bags",
    "bags_cosine",
    "reweight_cls",
    "seesaw",
    "loce",
    "simcal",
    "norcal",
)
FULL = (
    *QUICK,
    f"{CONTROL} x12",
    f"{CONTROL} adamw",
    f"{CONTROL} x12 adamw",
    "softmax_continued",
    "bags x4",
    "bags x12",
    "bags adamw",
    "bags x4 adamw",
    "bags classifier.others_ratio=1",
    "bags classifier.others_ratio=all",
    "bags_cosine x4",
    "bags_cosine classifier.scale=10",
    "bags_cosine classifier.scale=40",
    "reweight_cls x4",
    "seesaw x4",
    "softmax_balanced",
    "logit_adjustment",
    "logit_adjustment classifier.tau=0.5",
    "acsl",
    "eql",
    "eql_v2",
    "drop_loss",
    "federated",
    "class_balanced",
    "balanced_sigmoid",
    "sigmoid",
    "sigmoid x4",
    "focal_cls",
    "logit_adjustment_scores",
    "norcal classifier.gamma=0.3",
    "tau_norm",
    "tau_norm_select",
    "ecm",
    "gumbel",
    "bacl",
    "iif",
    "ldam",
    "disalign",
    "bags_euclidean",
    "fracal",
    "logit_normalisation",
    "knn",
)
POOLS = {"quick": QUICK, "full": FULL}
OWN = ("name", "classifier", "train.part", "detector.reset_classifier")  # keys that are no settings of a whole pool
SECTIONS = ("classifier", "sampler", "train")  # that rows may differ in: all have the same images, detector and scoring


def pool_rows(path: Path, overrides: Sequence[str], entries: Sequence[str]) -> list[Config]:
    """The configurations of a pool: the control, the baseline if its classifier is a softmax, and the entries.

    path: of a dataset. Of entries with the same settings the first is kept. Raises UserError for an entry that is no
    row, or not one that trains or calibrates only the classifier, and for rows that keep the layer of a softmax where
    the start has none.
    """
    dataset = find_dataset(path)
    if dataset is None:
        raise UserError(f"{path}: expected a dataset to choose for, as configs/glyphs-100")
    for override in overrides:
        key = override.partition("=")[0]
        if key in OWN or key.startswith("classifier."):
            words = "each row of the pool has its own: leave it out, or give it to a row"
            raise UserError(f"{override}: {words}, as in --rows 'bags classifier.others_ratio=1'")
    start, source = _start(path, overrides, _row(dataset.name, CONTROL, overrides))
    always = [CONTROL, BASELINE] if start is None or start.is_softmax else [CONTROL]
    entries = list(dict.fromkeys([*always, *(" ".join(entry.split()) for entry in entries)]))
    rows: list[Config] = []
    for entry in entries:
        config = _row(dataset.name, entry, overrides)
        if any(dataclasses.replace(row, name=config.name) == config for row in rows):
            continue
        rows.append(config)
        if not config.shares_features or config.classifier.sources:
            raise UserError(
                f"{entry}: expected a row that trains or calibrates only the classifier of {rows[0].init_row}"
            )
        if config.source_files != rows[0].source_files:
            raise UserError(
                f"{entry}: starts from {config.detector.init_from}, {CONTROL} from {rows[0].detector.init_from}"
            )
        if config.test.precision != "fp32":
            raise UserError(f"{entry}: test.precision={config.test.precision}: choose scores in fp32: leave it out")
    kept = [row.name for row in rows if row.train.part == "none" or row.classifier.on_softmax]
    if start is not None and kept and not start.is_softmax:
        words = f"its classifier is {start.name}, but these rows keep the layer of a softmax: {', '.join(kept)}"
        raise UserError(f"{source}: {words}; name other rows with --rows, such as bags, seesaw")
    return rows


def baseline_of(path: Path, overrides: Sequence[str], rows: Sequence[Config]) -> list[Config]:
    """The configuration of the row that all rows of a pool start from; none where that is a checkpoint."""
    dataset = find_dataset(path)
    if dataset is None or rows[0].init_row is None:
        return []
    return [load_config(row_beside(dataset.name / CONTROL, rows[0].init_row), overrides)]


def _start(path: Path, overrides: Sequence[str], control: Config) -> tuple[ClassifierConfig | None, str]:
    """The classifier that all rows start from, and where it is; None for a checkpoint that does not exist."""
    if baseline := baseline_of(path, overrides, [control]):
        return baseline[0].classifier, str(control.init_row)
    file = control.init_file
    if file is None or not file.exists():
        return None, str(file)
    return config_from_dict(load_checkpoint(file)["config"], f"{file}: config").classifier, str(file)


def _row(dataset: Path, entry: str, overrides: Sequence[str]) -> Config:
    """The configuration of a pool's entry, with a name that tells its variants apart."""
    method, *words = entry.split() or [""]
    if not method or set(method) & set("/\\\0="):
        hint = "; overrides of all rows stand before --rows" if "=" in method else ""
        raise UserError(f"{entry!r}: expected a row: METHOD [xN] [adamw] [section.key=value]{hint}")
    config = load_config(dataset / method, overrides)
    given: list[str] = []
    name = [method]
    for word in words:
        times = re.fullmatch("x([1-9][0-9]*)", word)
        if (times or word == "adamw") and config.train.part == "none":
            raise UserError(f"{entry}: {word}: {method} trains nothing: leave it out")
        if times and any(setting.startswith("train.epochs=") for setting in given):
            raise UserError(f"{entry}: {word}: the number of epochs is given twice: leave one out")
        if times:
            milestones = [milestone * int(times[1]) for milestone in config.train.milestones]
            given += [f"train.epochs={config.train.epochs * int(times[1])}", f"train.milestones={milestones}"]
        elif word == "adamw":
            given += ["train.optimizer=adamw", f"train.lr={ADAMW_RATE / config.detector.roi.fc:g}"]
        elif not KEY.fullmatch(word.partition("=")[0]) or word.partition(".")[0] not in SECTIONS:
            raise UserError(f"{entry}: {word}: expected xN, adamw or section.key=value of {', '.join(SECTIONS)}")
        else:
            given.append(word)
            key, _, value = word.partition("=")
            word = f"{key.rpartition('.')[2]}={value}".replace("/", "_")
        name.append(word)
    config = load_config(dataset / method, [*overrides, *given])
    return dataclasses.replace(config, name=",".join(name))
