"""The numbers of runs -> the paper's tables: methods as rows, AP columns in percent."""

import math
import statistics
from collections.abc import Sequence

from bags.analysis.paper import PaperTable
from bags.core.terminal import printable

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


def tail_below(boundaries: Sequence[int]) -> int:
    """The training instances that a category of AP_tail stays below: it is in the lower half of the bins."""
    return boundaries[(len(boundaries) + 1) // 2 - 1]


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
