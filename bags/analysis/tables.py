"""The numbers of runs -> the paper's tables: methods as rows, AP columns in percent."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from bags.analysis.paper import PaperTable
from bags.analysis.weight_norms import rank_correlation
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
SAME, OTHERS = "chosen, on the same images", "chosen, on others"  # the optimistic and the honest row of a choice
GAINS = ("baseline", "softmax_retrained,x4", "bags", "bags_cosine", "reweight_cls", "seesaw", "loce", OTHERS)
TITLES = {"AP": "mAP", "AP_tail": "tail", "AP_head": "head", "mask_AP": "mask mAP"}


def tail_below(boundaries: Sequence[int]) -> int:
    """The training instances that a category of AP_tail stays below: it is in the lower half of the bins."""
    return boundaries[(len(boundaries) + 1) // 2 - 1]


def with_means_of_bins(numbers: dict[str, float]) -> dict[str, float]:
    """Add eAP, the mean of AP1, AP2, ... over the bins with categories (COCO-LT; Wang et al. 2020), and mask_eAP."""
    means = {}
    for prefix in ("", "mask_"):
        names = (f"{prefix}AP{n}" for n in itertools.count(1))
        bins = [numbers[name] for name in itertools.takewhile(numbers.__contains__, names)]
        if bins:
            known = [value for value in bins if not math.isnan(value)]
            means[f"{prefix}eAP"] = statistics.mean(known) if known else math.nan
    return numbers | means


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
    return _markdown(table)


def render_norms(datasets: Mapping[str, tuple[Sequence[int], np.ndarray | None]]) -> str:
    """How weight norms vary over categories: Markdown, a line for each dataset.

    datasets: name -> (training instances [C], norms [C+1] with the background first, or None). Variation is the
    standard deviation divided by the mean; the rank correlation is that of norms and instances, and has no value where
    all categories have equally many.
    """
    table = [["dataset", "categories", "instances", "norm", "variation", "largest / smallest", "rank correlation"]]
    for name, (counts, norms) in datasets.items():
        cells = [printable(name).replace("|", "\\|"), str(len(counts)), f"{min(counts)} to {max(counts)}"]
        if norms is None:
            table.append([*cells, *"----"])
            continue
        own = norms[1:]
        correlation = rank_correlation(own, counts)
        numbers = (own.mean(), own.std() / own.mean(), own.max() / own.min(), correlation)
        table.append([*cells, *("-" if np.isnan(number) else f"{number:.2f}" for number in numbers)])
    return _markdown(table)


def render_gains(gains: Mapping[str, Mapping[str, list[float]]]) -> str:
    """Markdown table: the control's mAP of each dataset, and what the rows GAINS gain over it, in percent.

    gains: dataset -> "control" and rows -> a number of each seed, in 0..1.
    """
    table = [["dataset", "control", *GAINS]]
    for name, of_rows in gains.items():
        percent = {row: [100 * value for value in values] for row, values in of_rows.items()}
        cells = [spread(percent[row], ".1f", "+") if row in percent else "-" for row in GAINS]
        table.append([name, spread(percent["control"], ".1f"), *cells])
    return _markdown(table)


def _markdown(table: list[list[str]]) -> str:
    """A table whose first line is its head; all columns but the first are aligned to the right."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["| " + " | ".join(_pad(row, widths)) + " |" for row in table]
    lines.insert(1, "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|")
    return "\n".join(lines)


def rows_of_choices(contents: Sequence[dict]) -> dict[str, list[dict[str, float]]]:
    """Row -> its numbers in each of several `choose.json`, then those of what was chosen."""
    parts = [{**c["rows"], SAME: c["optimistic"], OTHERS: c["honest"]} for c in contents]
    return {
        name: [{k: math.nan if v is None else v for k, v in part[name]["numbers"].items()} for part in parts]
        for name in parts[0]
    }


def render_choice(content: dict) -> str:
    """The table and the sentences of `choose.json`: rows by their number, then the choice, and what it says."""
    number, control = content["metric"], content["control"]
    rows = sorted(content["rows"].items(), key=lambda row: -(row[1]["numbers"][number] or 0))
    lines = [*rows, (SAME, content["optimistic"]), (OTHERS, content["honest"])]
    columns = [c for c in COLUMNS if any(line["numbers"].get(c) is not None for _, line in lines)]
    columns = [c for c in columns if c not in ("APr", "APc", "APf", "AP50") or c == number]
    columns += [number] * (number not in columns)
    table = [["row", *map(column_title, columns), f"{column_title(number)} - control", "95 %"]]
    for name, line in lines:
        cells = ["-" if line["numbers"][c] is None else f"{100 * line['numbers'][c]:.1f}" for c in columns]
        table.append([printable(name).replace("|", "\\|"), *cells, *gain_cells(line["gain"][number], name == control)])
    return "\n".join([_markdown(table), "", *verdict(content)])


def verdict(content: dict) -> list[str]:
    """The sentences that a choice amounts to."""
    control, mixture, title = printable(content["control"]), content["mixture"], column_title(content["metric"])
    shares = " + ".join(f"{share:.0%} {printable(name)}" for name, share in mixture.items())
    means = "" if content.get("members") == 1 else " and their means"
    gains = {content["control"]: content["honest"]["gain"], **content.get("over_baseline", {})}
    against = " and ".join(f"{gained(gain[content['metric']])} against {printable(row)}" for row, gain in gains.items())
    lines = [
        f"The scores of {len(mixture)} of {len(content['rows'])} rows, averaged: {shares}."
        if len(mixture) > 1
        else f"Best of {len(content['rows'])} rows{means}: {printable(next(iter(mixture)))}.",
        f"On images that it was not chosen with, {title} is {against}.",
    ]
    instead = content.get("instead", None if content["better_than_control"] else content["control"])
    if instead is not None and list(mixture) == [instead]:
        lines.append(f"No other choice is better: {printable(instead)} is recommended.")
    elif instead is not None:
        *_, high = gains[instead][content["metric"]]
        worse = high is not None and high < 0
        lines.append(
            f"It is worse than {printable(instead)}, which is recommended."
            if worse
            else f"The validation images cannot tell it from {printable(instead)}, which is recommended: it is simpler."
        )
    if "test" in content:
        test = content["test"]
        shown = content["metric"] if content["metric"] in test["gain"] else "AP"
        difference = f"{column_title(shown)} {gained(test['gain'][shown])} against {control}"
        lines.append(f"On {printable(test['annotations'])}: {difference}.")
    return lines


def gained(gain: list[float | None]) -> str:
    """A difference in percent with its interval."""
    value, low, high = gain
    if value is None:
        return "not known"
    if low is None or high is None:
        return f"{100 * value:+.1f} (the objects are too few for an interval)"
    return f"{100 * value:+.1f} (95 %: {100 * low:+.1f} to {100 * high:+.1f})"


def gain_cells(gain: Sequence[float | None], is_control: bool = False) -> list[str]:
    """A difference in percent, and its interval; empty for the control."""
    value, low, high = gain
    if is_control or value is None:
        return ["", ""]
    spread = "-" if low is None or high is None else f"{100 * low:+.1f} to {100 * high:+.1f}"
    return [f"{100 * value:+.1f}", spread]


def _cell(values: list[float], column: str, decimals: int) -> str:
    if column.startswith("published_"):
        values = values[:1]  # no seeds of ours
    if column == "correlation":
        return spread(values, ".2f")
    sign = "+z" if column.endswith("gain") else ""  # z: no -0.0
    return spread(values if column == "seconds" else [100 * value for value in values], f".{decimals}f", sign)


def column_title(column: str) -> str:
    """A column of metrics.json as tables name it."""
    if column in TITLES:
        return TITLES[column]
    if column.startswith("published_"):
        return f"published {column_title(column.removeprefix('published_'))}"
    plain = column.removeprefix("mask_")
    return column if plain == column else f"mask {TITLES.get(plain, plain)}"


def spread(values: list[float], form: str, sign: str = "") -> str:
    """Mean, and with several values their standard deviation; NaN are left out, "-" if none is left.

    sign: "+" also gives positive means a sign, "z" takes that of zero.
    """
    known = [v for v in values if not math.isnan(v)]
    if not known:
        return "-"
    deviation = f" ±{statistics.stdev(known):{form}}" if len(known) > 1 else ""
    return f"{statistics.mean(known):{sign}{form}}{deviation}"


def _pad(row: list[str], widths: list[int]) -> list[str]:
    first, *rest = row
    return [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))]
