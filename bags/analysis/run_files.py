"""The files of a run folder: numbers, log, categories and figures, written and read."""

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bags.core.errors import UserError, one_line
from bags.core.files import open_regular, read_text, replacing, write_text
from bags.evaluation.comparison import Comparison
from bags.evaluation.detection_ap import Scores

FORMULA = re.compile("'*[=+\\-@\t\r\n]")
AGAIN = "remove it and give the training command again: only the evaluation is run"
AGAIN_METRICS = AGAIN.replace("it", "metrics.json", 1)


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
    path, steps = folder / "log.jsonl", []
    for line in read_text(path, "replace").splitlines() if path.exists() else []:
        try:
            steps.append(json.loads(line))
        except (ValueError, RecursionError):
            continue  # the last line of a killed run
    return [step for step in steps if isinstance(step, dict)]


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
        path, mend = source / "categories.csv", AGAIN_METRICS
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


def without_nan(values: dict[str, float]) -> dict[str, float | None]:
    """With None for NaN, which JSON does not have."""
    return {key: None if math.isnan(value) else value for key, value in values.items()}


def write_metrics(folder: Path, values: dict[str, float]) -> None:
    """Writes `metrics.json`; NaN becomes null."""
    write_text(folder / "metrics.json", json.dumps(without_nan(values), indent=1))


def write_scored_on(folder: Path, annotations: Path, sha256: str, images: str) -> None:
    """Writes `scored_on.json`: the annotations and the images (a digest) that the numbers of a run belong to."""
    content = {"annotations": str(annotations), "sha256": sha256, "images": images}
    write_text(folder / "scored_on.json", json.dumps(content, indent=1))


def read_scored_on(folder: Path, key: str = "sha256") -> str | None:
    """SHA-256 of the annotations that a run was scored on; None where that is not known, as of older runs.

    key: `images` for that of the images.
    """
    try:
        return str(json.loads(read_text(folder / "scored_on.json"))[key])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def write_scores(
    folder: Path, name: str, scores: dict[str, Scores], boundaries: Sequence[int], figures: bool = True
) -> list[Path]:
    """Writes `categories.csv` (counts, bin and AP of each category) and the figures of one results file.

    scores: "bbox", and "segm" where there are masks, whose columns and figures are named mask_*. Returns the files.
    """
    from bags.analysis.plots import plot_ap_by_instances, plot_precision_recall

    rows = [dict(row) for row in scores["bbox"].rows]
    for row, mask in zip(rows, scores["segm"].rows if "segm" in scores else (), strict=False):
        row |= {"mask_AP": mask["AP"], "mask_AP50": mask["AP50"]}
    written = [_write_csv(folder / "categories.csv", rows)]
    for kind, of_kind in scores.items() if figures else ():
        prefix = "" if kind == "bbox" else "mask_"
        written += [folder / f"figures/{prefix}precision_recall.png", folder / f"figures/{prefix}ap_by_instances.png"]
        plot_precision_recall(written[-2], of_kind.curves)
        plot_ap_by_instances(written[-1], {name: of_kind.rows}, boundaries)
    return written


def write_comparison(folder: Path, comparisons: dict[str, Comparison]) -> None:
    """Writes `comparison.json` (means, intervals) and `comparison.csv` (categories); of masks `mask_comparison.*`."""
    for kind, result in comparisons.items():
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
