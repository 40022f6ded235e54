"""Result files of runs -> the paper's tables: methods as rows, AP columns in percent."""

import csv
import io
import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bags.analysis.paper import PaperTable
from bags.core.errors import UserError, one_line
from bags.core.files import open_regular, read_text, replacing, write_text
from bags.core.terminal import printable
from bags.evaluation.comparison import Comparison
from bags.evaluation.detection_ap import Scores

COLUMNS = (
    "AP",
    "AP1",
    "AP2",
    "AP3",
    "AP4",
    "APr",
    "APc",
    "APf",
    "AP50",
    "AP_tail",
    "AP_head",
    "AP_fixed",
    "mask_AP",
    "mask_AP_tail",
    "mask_AP_head",
)
TITLES = {"AP": "mAP", "AP_tail": "tail", "AP_head": "head", "mask_AP": "mask mAP"}
FORMULA = re.compile("'*[=+\\-@\t\r\n]")
AGAIN = "remove it and give the training command again: only the evaluation is run"


def read_metrics(folder: Path) -> dict[str, float]:
    """`metrics.json` of a run; null becomes NaN. Raises UserError for anything else."""
    path = folder / "metrics.json"
    try:
        values = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); {AGAIN}") from None
    numbers: list[Any] = [v for v in values.values() if v is not None] if isinstance(values, dict) else [None]
    if not all(type(v) in (int, float) and not abs(v) > 1e9 for v in numbers):  # NaN is one
        raise UserError(f"{path}: expected numbers by name; {AGAIN}")
    return {key: math.nan if value is None else value for key, value in values.items()}


def read_log(folder: Path) -> list[dict]:
    """Objects of a run's `log.jsonl`; none where it was not trained. A line that was cut off is left out."""
    path, found = folder / "log.jsonl", []
    for line in read_text(path, "replace").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            continue  # the last line of a killed run
    return [step for step in found if isinstance(step, dict)]


def read_seconds(folder: Path) -> float:
    """Seconds of a run's optimisation steps, from its log; NaN without any."""
    seconds = (step.get("seconds") for step in reversed(read_log(folder)))
    return next((value for value in seconds if type(value) in (int, float)), math.nan)


def read_categories(source: Path) -> list[dict]:
    """Rows of a run's `categories.csv` as `write_scores` got them; an empty AP is NaN. Raises UserError.

    source: the run's folder, or the file.
    """
    path, mend = source, "expected the categories.csv of a finished run"
    if source.is_dir():
        path, mend = source / "categories.csv", AGAIN.replace("it", "metrics.json", 1)
    whole, text = ("id", "training_instances", "training_images", "bin"), ("name", "frequency")
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8", errors="surrogatepass", newline="") as file:
            rows = list(csv.DictReader(file))
        return [  # a KeyError where a column is missing
            {k: int(v) if k in whole else v if k in text else float(v or "nan") for k, v in row.items()}
            | {key: int(row[key]) for key in whole}
            | {"name": from_cell(row["name"]), "AP": float(row["AP"] or "nan")}
            for row in rows
        ]
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); {mend}") from None


def tail_below(boundaries: Sequence[int]) -> int:
    """The training instances that a category of AP_tail stays below: it is in the lower half of the bins."""
    return boundaries[(len(boundaries) + 1) // 2 - 1]


def without_nan(values: dict[str, float]) -> dict[str, float | None]:
    """With None for NaN, which JSON does not have."""
    return {key: None if math.isnan(value) else value for key, value in values.items()}


def write_metrics(folder: Path, values: dict[str, float]) -> None:
    """Writes `metrics.json`; NaN becomes null."""
    write_text(folder / "metrics.json", json.dumps(without_nan(values), indent=1))


def write_scores(folder: Path, name: str, scores: dict[str, Scores], boundaries: Sequence[int]) -> list[Path]:
    """Writes `categories.csv` (counts, bin and AP of each category) and the figures of one results file.

    scores: "bbox", and "segm" where there are masks, whose columns and figures are named mask_*. Returns the files.
    """
    from bags.analysis.plots import plot_ap_by_instances, plot_precision_recall

    rows = [dict(row) for row in scores["bbox"].rows]
    for row, mask in zip(rows, scores["segm"].rows if "segm" in scores else (), strict=False):
        row |= {"mask_AP": mask["AP"], "mask_AP50": mask["AP50"]}
    written = [_write_csv(folder / "categories.csv", rows)]
    for kind, own in scores.items():
        prefix = "" if kind == "bbox" else "mask_"
        written += [folder / f"figures/{prefix}precision_recall.png", folder / f"figures/{prefix}ap_by_instances.png"]
        plot_precision_recall(written[-2], own.curves)
        plot_ap_by_instances(written[-1], {name: own.rows}, boundaries)
    return written


def write_comparison(folder: Path, found: dict[str, Comparison]) -> None:
    """Writes `comparison.json` (means, intervals) and `comparison.csv` (categories); of masks `mask_comparison.*`."""
    for kind, result in found.items():
        stem = "comparison" if kind == "bbox" else "mask_comparison"
        write_text(folder / f"{stem}.json", json.dumps(as_table(result), indent=1))
        _write_csv(folder / f"{stem}.csv", result.rows)


def as_table(result: Comparison) -> dict[str, dict]:
    """Means that the ground truth has categories for: name -> first, second, interval (none without draws)."""
    return {
        name: {"first": value, "second": result.second[name], "interval": result.intervals.get(name)}
        for name, value in result.first.items()
        if not math.isnan(value)
    }


def _write_csv(path: Path, rows: list[dict]) -> Path:
    """Rows with equal keys; NaN becomes empty, and text is escaped as in `to_cell`."""
    with replacing(path, newline="", errors="surrogatepass") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: to_cell(v) if isinstance(v, str) else "" if v != v else v for k, v in row.items()})
    return path


def to_cell(text: str) -> str:
    """A text that spreadsheets do not take for a formula: a quotation mark precedes = + - @, tab and line ends."""
    return f"'{text}" if FORMULA.match(text) else text


def from_cell(cell: str) -> str:
    """The inverse of `to_cell`."""
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell


def render_paper_table(table: PaperTable, runs: dict[str, list[dict[str, float]]], published: bool) -> str:
    """A table of the paper from our runs (configuration stem -> metrics, one dict per seed).

    published: also print the paper's numbers, each row below ours.
    """
    rows = {}
    for row in table.rows:
        if row.config not in runs and table.optional:
            continue
        rows[row.title] = runs[row.config]
        if published and row.published:
            rows[f"  {table.source} {row.title}"] = [table.published(row)]
    return f"{table.title}\n\n{render_table(rows, table.columns, decimals=2)}"


def render_table(rows: dict[str, list[dict[str, float]]], columns: Sequence[str] = COLUMNS, decimals: int = 1) -> str:
    """Markdown. `rows` maps a method to its metrics, one dict per seed; several give mean +- deviation.

    Of `columns`, those that no row has are left out.
    """
    columns = [c for c in columns if any(c in run for runs in rows.values() for run in runs)]
    table = [["method", *(column_title(c) for c in columns)]]
    for name, runs in rows.items():
        cells = (_cell([run.get(column, math.nan) for run in runs], column, decimals) for column in columns)
        table.append([printable(name).replace("|", "\\|"), *cells])
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["| " + " | ".join(_pad(row, widths)) + " |" for row in table]
    lines.insert(1, "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|")
    return "\n".join(lines)


def _cell(values: list[float], column: str, decimals: int) -> str:
    if column.startswith("published_"):
        values = values[:1]  # no seeds of ours
    if column == "correlation":
        return spread(values, ".2f")
    return spread(values if column == "seconds" else [100 * value for value in values], f".{decimals}f")


def column_title(column: str) -> str:
    """A column of metrics.json as tables name it."""
    if column in TITLES:
        return TITLES[column]
    if column.startswith("published_"):
        return f"published {column_title(column.removeprefix('published_'))}"
    plain = column.removeprefix("mask_")
    return column if plain == column else f"mask {TITLES.get(plain, plain)}"


def spread(values: list[float], form: str) -> str:
    """Mean, and with several values their standard deviation; NaN are left out, "-" if none is left."""
    known = [v for v in values if not math.isnan(v)]
    if not known:
        return "-"
    deviation = f" ±{statistics.stdev(known):{form}}" if len(known) > 1 else ""
    return f"{statistics.mean(known):{form}}{deviation}"


def _pad(row: list[str], widths: list[int]) -> list[str]:
    first, *rest = row
    return [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))]
