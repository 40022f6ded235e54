"""The rows of a sweep: one for every combination of some keys' values."""

import dataclasses
import hashlib
import itertools
import math
import re
from pathlib import Path

from bags.config.load import KEY
from bags.config.sections import Config
from bags.core.errors import UserError

NUMBER = re.compile(r"(mask_)?(AP([0-9]+|[smlrcf]|_tail|_head)?|AR)|ACC([0-9]+|bg)?")
TAKEN = {"name": "rows are named by their values", "output": "rows share one folder"}
LONGEST = 60  # characters of a value in the name of its row, which is a folder
BEFORE = "put CONFIG and section.key=value before --over"


def combinations(over: list[list[str]], taken: dict[str, str]) -> list[tuple[str, ...]]:
    """Overrides of each row. taken: keys that cannot be swept, and why."""
    keys = [key for key, *_ in over]
    for key, *values in over:
        if keys.count(key) > 1:
            raise UserError(f"--over {key}: is given twice: put all its values behind one of them")
        if not values or "=" in key:
            raise UserError(f"--over {key}: expected a key and its values, as in --over classifier.others_ratio 1 8")
        if len(set(values)) < len(values):
            raise UserError(f"--over {key}: a value is there twice")
        if key in taken:
            raise UserError(f"--over {key}: cannot be swept: {taken[key]}")
        late = next((value for value in values if "=" in value and KEY.fullmatch(value.partition("=")[0])), None)
        if late:
            raise UserError(f"--over {key}: {late}: {BEFORE}")
    return list(itertools.product(*([f"{key}={value}" for value in values] for key, *values in over)))


def refuse_equal(rows: list[Config]) -> None:
    """Raises UserError for two rows that differ in nothing but the spelling of a value."""
    names: dict[Config, str] = {}
    for row in rows:
        other = names.setdefault(dataclasses.replace(row, name="any"), row.name)
        if other != row.name:
            raise UserError(f"--over: {other} and {row.name} have equal settings: leave one out")


def check_best(best: str, rows: list[Config]) -> None:
    """Raise UserError, before anything is trained, unless the rows have one kind of column called `best`."""
    bins = {row.test.bins for row in rows}
    if len(bins) > 1:
        raise UserError("--over test.bins: cannot be swept: a column such as AP1 would mix several kinds of bins")
    number, last = re.search("[0-9]+", best), len(bins.pop()) + 1
    if number and best not in ("AP50", "AP75", "mask_AP50", "mask_AP75") and not 1 <= int(number[0]) <= last:
        raise UserError(f"--best {best}: expected a bin of test.bins, 1 to {last}")
    if best.startswith("mask_") and not any(row.detector.has_masks for row in rows):
        raise UserError(f"--best {best}: no row has masks: expected {best.removeprefix('mask_')}")


def row_name(name: str, overrides: tuple[str, ...]) -> str:
    """The row's folder: what is swept, without its section; a long value as its beginning and a digest."""
    parts = [name]
    for override in overrides:
        key, _, value = override.partition("=")
        if len(value) > LONGEST:
            value = f"{value[: LONGEST - 11]}...{hashlib.sha256(value.encode()).hexdigest()[:8]}"
        parts.append(f"{key.split('.')[-1]}={value}")
    return ",".join(parts).replace("/", "_")


def show(folders: dict[str, list[Path]], best: str, title: str, save: Path | None) -> None:
    """Prints the table, and the row whose mean of `best` is highest; keeps the numbers in `save`."""
    from bags.analysis.results import save_results, this_command
    from bags.analysis.run_files import read_metrics
    from bags.analysis.tables import render_table
    from bags.jobs.folders import check_comparable

    check_comparable(folders)
    rows = {name: [read_metrics(folder) for folder in of_row] for name, of_row in folders.items()}
    print(f"\n{render_table(rows)}")
    if save:
        save_results(save, title, this_command(), folders, rows)
    means = {name: sum(run.get(best, math.nan) for run in of_row) / len(of_row) for name, of_row in rows.items()}
    known = {name: value for name, value in means.items() if not math.isnan(value)}
    if not known:
        raise UserError(
            f"--best {best}: no row has that number: expected one of {', '.join(next(iter(rows.values()))[0])}"
        )
    print(f"\nhighest {best}: {max(known, key=lambda name: known[name])}, {100 * max(known.values()):.2f}")
