"""A finished run, or two on the same validation set, as one HTML page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import yaml

from bags.analysis import plots
from bags.analysis.choice import section
from bags.analysis.examples import LEAST_SCORE, Example
from bags.analysis.mistakes import Confusion
from bags.analysis.page import document, drawn, figure, percent, table, text
from bags.analysis.run_results import RunResults, about, differences
from bags.analysis.tables import column_title, tail_below
from bags.analysis.wrong_labels import Doubted
from bags.analysis.wrong_labels import section as section_of_labels
from bags.config.load import config_to_dict
from bags.core.files import read_bytes
from bags.evaluation.comparison import Comparison, changed_most

MOST = 8  # categories in a table


@dataclass
class Findings:
    """Parts of the page beside the runs; None and empty ones are left out."""

    images: dict[str, int] = field(default_factory=dict)  # split -> number
    objects: np.ndarray | None = None  # [C] validation objects of each category
    detected: list[set[int]] = field(default_factory=list)  # of each run: ids of categories with any detection
    comparison: dict[str, Comparison] = field(default_factory=dict)  # from the other run to the first one
    tail: tuple[list[dict], list[dict]] = field(default_factory=lambda: ([], []))  # its best and worst rows
    examples: dict[int, Example] = field(default_factory=dict)  # by category id
    choice: dict | None = None  # of choose.json, where the run is what `choose` has chosen
    choice_rows: dict[str, list[dict]] = field(default_factory=dict)  # name -> rows of categories.csv, for its figure
    confusions: list[dict[int, Confusion]] = field(default_factory=list)  # of each run: by category id of the tail
    errors: list[dict[str, float]] = field(default_factory=list)  # of each run: what AP50 each kind of error costs
    doubted: list[Doubted] = field(default_factory=list)  # training objects whose label is likely wrong, worst first
    compared: tuple[int, int] | None = None  # objects that look like another category, and all that were compared
    notes: list[str] = field(default_factory=list)  # what is missing, and how to mend it


def best_and_worst(rows: list[dict], boundaries: Sequence[int]) -> tuple[list[dict], list[dict]]:
    """Rows of the tail's categories (see `tail_below`) of highest and of lowest AP; of equal ones the larger first."""
    tail = [row for row in rows if row["training_instances"] < tail_below(boundaries) and not math.isnan(row["AP"])]
    tail.sort(key=lambda row: (-row["AP"], -row["training_instances"], row["id"]))
    worst = sorted(tail, key=lambda row: (row["AP"], -row["training_instances"], row["id"]))
    half = (len(tail) + 1) // 2
    return tail[: min(MOST, half)], worst[: min(MOST, len(tail) - half)]


def render(runs: list[RunResults], findings: Findings) -> str:
    """The page; runs: one, or two on the same validation set; changes are those from the second to the first."""
    title = f"{runs[0].label} on {runs[0].config.data.name}"
    sections = {
        "Results": _results(runs),
        "How it was chosen": _chosen(runs[0], findings),
        f"Change from {runs[-1].label} to {runs[0].label}": _changes(runs, findings) if len(runs) > 1 else "",
        "AP and training instances": _by_instances(runs),
        "Precision and recall": _precision_recall(runs),
        "Weight norms": _weight_norms(runs),
        "Training": _training(runs),
        "The tail": _tail(runs, findings),
        "What the tail is taken for": _confusions(runs, findings),
        "Kinds of errors": _errors(runs, findings),
        "Likely wrong labels": section_of_labels(findings.doubted, *findings.compared) if findings.compared else "",
        "Categories without detections": _undetected(runs, findings),
        "What was run": _what(runs, findings),
    }
    lead = ""
    for run in runs:
        description = about(run)
        kept = "; ".join(f"{key} {description[key]}" for key in ("detector", "classifier", "trained part"))
        lead += f"<p><b>{text(run.label)}</b>: {text(kept)}; {text(description['schedule'])}</p>"
    return document(
        title + (f", compared with {runs[1].label}" if len(runs) > 1 else ""), lead, findings.notes, sections
    )


def by_label(runs: list[RunResults], values: Sequence) -> dict:
    """label -> value, the other run first: as time goes."""
    return {run.label: value for run, value in reversed(list(zip(runs, values, strict=True)))}


def kinds(runs: list[RunResults]) -> dict[str, str]:
    """Prefix of metrics -> what it is of: boxes, and masks where a run has them."""
    return {"": "boxes"} | ({"mask_": "masks"} if any("mask_AP" in run.metrics for run in runs) else {})


# --------------------------------------------------------------------------- sections


def _results(runs: list[RunResults]) -> str:
    bins = runs[0].config.test.bins
    numbered = [f"AP{n + 1}" for n in range(len(bins) + 1)]
    proposals = ("ACC", *(f"ACC{n + 1}" for n in range(len(bins) + 1)), "ACCbg")
    paper = ("AP", *numbered, "APr", "APc", "APf", "AP50", "AP75", "AP_tail", "AP_head", "AP_fixed")
    limits = f"fewer than {', '.join(map(str, bins))} and with at least {bins[-1]}"
    parts = [
        f"<p>In percent. AP1 to AP{len(numbered)}: mean AP of the categories with {limits} training instances; "
        "APr, APc, APf: in at most 10, in at most 100 and in more training images. Tail: fewer than "
        f"{tail_below(bins)} training instances; head: the others. -: no such category in validation, "
        "or not measured.</p>"
    ]
    for prefix, kind in kinds(runs).items():
        parts.append(_metrics(runs, [prefix + c for c in paper], f"Average precision of {kind}"))
        sizes = _metrics(runs, [f"{prefix}{c}" for c in ("APs", "APm", "APl", "AR")], f"{kind.capitalize()} by size")
        accuracy = _metrics(runs, proposals, "Accuracy of proposals, by bin") if not prefix else ""
        parts.append(f'<div class="pair">{sizes}{accuracy}</div>')
    return "".join(parts)


def _chosen(run: RunResults, findings: Findings) -> str:
    return "" if findings.choice is None else section(findings.choice, findings.choice_rows, run.config.test.bins)


def _metrics(runs: list[RunResults], columns: Sequence[str], caption: str) -> str:
    """One row for each run, of the columns that any of them has."""
    columns = [column for column in columns if any(column in run.metrics for run in runs)]
    if not columns:
        return ""
    rows = [[run.label, *(percent(run.metrics.get(c, math.nan)) for c in columns)] for run in reversed(runs)]
    titles = [column_title(column.removeprefix("mask_")) for column in columns]  # the caption says which
    return table(["", *titles], rows, caption)


def _changes(runs: list[RunResults], findings: Findings) -> str:
    if not findings.comparison:
        return "<p>Not compared: see the note at the top.</p>"
    new, old = (run.label for run in runs)
    parts = [
        f"<p>{text(new)} minus {text(old)}, in percent. The interval holds 95 % of the differences when validation "
        "images are drawn anew, the same ones for both. It covers only the choice of validation images, not "
        "another seed in training.</p>"
    ]
    for kind, result in findings.comparison.items():
        rows = []
        for name, first in result.first.items():
            low, high = result.intervals.get(name, (math.nan, math.nan))
            if not math.isnan(first):
                second, known = result.second[name], not math.isnan(low)
                ends = round(100 * low, 2), round(100 * high, 2)  # as shown: 0.00 is not beyond 0
                sure = "higher" if ends[0] > 0 else "lower" if ends[1] < 0 else ""
                spread = f"{percent(low, '+.2f')} to {percent(high, '+.2f')}" if known else "-"
                change = percent(second - first, "+.2f")
                rows.append([column_title(name), percent(first, ".2f"), percent(second, ".2f"), change, spread, sure])
        of = "boxes" if kind == "bbox" else "masks"
        parts.append(table(["", old, new, "change", "95 % of draws", "beyond 0"], rows, f"Means of {of}"))
        gained, lost = changed_most(result.rows, MOST)
        head = ["category", "training", old, new, "change"]
        parts.append(
            f'<div class="pair">{_movers(head, gained, "gained most")}{_movers(head, lost, "lost most")}</div>'
        )
    return "".join(parts)


def _movers(head: list[str], rows: list[dict], caption: str) -> str:
    cells = [
        [
            row["name"],
            row["training_instances"],
            *(percent(row[key], ".2f") for key in ("first", "second")),
            percent(row["difference"], "+.2f"),
        ]
        for row in rows
    ]
    return table(head, cells, f"Categories that {caption}") if cells else f"<p>No category {caption.split()[0]}.</p>"


def _by_instances(runs: list[RunResults]) -> str:
    parts = []
    for prefix, kind in kinds(runs).items():
        rows = [[row | {"AP": row.get(f"{prefix}AP", math.nan)} for row in run.rows] for run in runs]
        content = drawn(plots.plot_ap_by_instances, by_label(runs, rows), runs[0].config.test.bins)
        caption = "A point for each category, a line through the mean of neighbours; dashed: borders of the bins."
        parts.append(figure(content, f"AP of {kind} of each category over its training instances", caption))
    return "".join(parts)


def _precision_recall(runs: list[RunResults]) -> str:
    parts = []
    for prefix, kind in kinds(runs).items():
        figures = []
        for run in reversed(runs):
            path = run.folder / f"figures/{prefix}precision_recall.png"
            if path.exists():
                alt = f"Mean precision over recall of {kind}, by bin of training instances, {run.label}"
                figures.append(figure(read_bytes(path), alt, f"{run.label}, {kind}"))
        parts.append(f'<div class="side">{"".join(figures)}</div>' if figures else "")
    return "".join(parts)


def _weight_norms(runs: list[RunResults]) -> str:
    """Figures 1 and 3 of the paper for these runs."""
    norms = {name: values for name, values in by_label(runs, [run.norms for run in runs]).items() if values is not None}
    if not norms:
        return ""
    counts = [row["training_instances"] for row in runs[0].rows]
    content = drawn(plots.plot_weight_norms, norms, counts, runs[0].config.test.bins)
    caption = (
        "As in Figures 1 and 3 of the paper: a norm that falls with the count says that the classifier is imbalanced."
    )
    return figure(content, "Norm of the classifier's weights of each category, by falling training instances", caption)


def _training(runs: list[RunResults]) -> str:
    logs = {label: log for label, log in by_label(runs, [run.log for run in runs]).items() if log}
    still = [f"<p>{text(run.label)}: no training steps of its own.</p>" for run in runs if not run.log]
    caption = "Sums of different losses cannot be compared with each other."
    shown = [figure(drawn(plots.plot_training, logs), "Losses over epochs", caption)] if logs else []
    return "".join(shown + still)


def _tail(runs: list[RunResults], findings: Findings) -> str:
    best, worst = findings.tail
    if not best:
        return "<p>No category of the tail has objects in validation.</p>"
    ap = [{row["id"]: row["AP"] for row in run.rows} for run in runs]
    ids = [row["id"] for row in runs[0].rows]
    objects = {} if findings.objects is None else dict(zip(ids, findings.objects.tolist(), strict=True))
    parts = [
        f"<p>Categories with fewer than {tail_below(runs[0].config.test.bins)} training instances and with objects in "
        f"validation, by AP of {text(runs[0].label)}; numbers of objects in training and in validation.</p>"
    ]
    head = ["category", "training", "validation", *(f"AP {run.label}" for run in reversed(runs))]
    tables = [
        table(
            head,
            [
                [
                    row["name"],
                    row["training_instances"],
                    objects.get(row["id"], "-"),
                    *(percent(of_run[row["id"]]) for of_run in reversed(ap)),
                ]
                for row in rows
            ],
            title,
        )
        for title, rows in (("Best", best), ("Worst", worst))
        if rows
    ]
    parts.append(f'<div class="pair">{"".join(tables)}</div>')
    if findings.examples:
        parts.append(
            f"<h3>Examples</h3><p>Of each category the validation object of median size, whatever was found there. "
            f"Left: what is annotated (blue: objects of the category). Then detections with a score of "
            f"{LEAST_SCORE:.0%} or more, and the best one on the object: green where an object of its category is "
            f"annotated there, red where not. Below: what the object was taken for, with scores in percent.</p>"
        )
    for title, rows in (("best", best), ("worst", worst)):
        chosen = [findings.examples[row["id"]] for row in rows if row["id"] in findings.examples]
        parts += [f"<h3>Among the {title}</h3>"] if chosen else []
        parts += [_example(example, [run.label for run in reversed(runs)]) for example in chosen]
    return "".join(parts)


def _confusions(runs: list[RunResults], findings: Findings) -> str:
    """Counts over all objects of the tail, and the categories whose objects are most often taken for the head."""
    if not any(findings.confusions):
        return ""
    parts = [
        "<p>Each validation object of the tail is taken for the category of the best-scored detection on it (IoU of "
        "0.5 or more), whatever its score. The head has at least "
        f"{tail_below(runs[0].config.test.bins)} training instances.</p>"
    ]
    head = ["", "objects", "right", "taken for the head", "for others of the tail", "not found"]
    of_runs = list(reversed(list(zip(runs, findings.confusions, strict=True))))
    keys = ("objects", "right", "head", "tail", "missed")
    rows = [[run.label, *(sum(getattr(c, key) for c in of.values()) for key in keys)] for run, of in of_runs]
    parts.append(table(head, rows, "All objects of the tail"))
    names = {row["id"]: row for row in runs[0].rows}
    for run, of in of_runs:
        worst = sorted(of, key=lambda k: (-of[k].head, -of[k].head / of[k].objects, k))[:MOST]
        rows = [
            [
                names[k]["name"],
                names[k]["training_instances"],
                *(getattr(of[k], key) for key in keys),
                ", ".join(f"\u2068{name}\u2069 {number}" for name, number in of[k].names),
            ]
            for k in worst
            if of[k].head
        ]
        columns = ["category", "training", *head[1:], "mostly taken for"]
        parts.append(table(columns, rows, f"{run.label}: most often taken for the head") if rows else "")
    return "".join(parts)


def _errors(runs: list[RunResults], findings: Findings) -> str:
    """AP50 that each kind of error costs."""
    if not any(findings.errors):
        return ""
    words = {
        "Cls": "other category",
        "Loc": "box too far off",
        "Both": "both",
        "Dupe": "object found twice",
        "Bkg": "no object there",
        "Miss": "object not found",
    }
    rows = [
        [run.label, percent(of["AP50"]), *(percent(of[key], "+.1f") for key in words)]
        for run, of in reversed(list(zip(runs, findings.errors, strict=True)))
    ]
    return (
        "<p>What AP50 would gain if all errors of one kind were mended (TIDE, Bolya et al. 2020). The gains do not add "
        "up.</p>" + table(["", "AP50", *words.values()], rows, "Boxes, all categories")
    )


def _example(example: Example, labels: list[str]) -> str:
    name = example.category["name"]
    jpeg = {"width": 400, "format": "jpg", "pil_kwargs": {"quality": 80}}
    drawings = {f"{name}, annotated, in {example.source}": example.truth}
    for label in labels:
        # Isolated: a name that is written from right to left would take its score along.
        guesses = ", ".join(f"\u2068{guess}\u2069 {100 * score:.0f}" for guess, score in example.guesses[label])
        drawings[f"{label}: {guesses or 'nothing found on the object'}"] = example.drawings[label]
    figures = [
        figure(drawn(plots.save_drawing, example.image, **drawing, **jpeg), caption, caption, "jpeg")
        for caption, drawing in drawings.items()
    ]
    return f'<div class="side example">{"".join(figures)}</div>'


def _undetected(runs: list[RunResults], findings: Findings) -> str:
    parts = []
    for run, detected in zip(runs, findings.detected, strict=False):
        scored = [row for row in run.rows if not math.isnan(row["AP"])]
        lists = {
            "never detected": [row for row in scored if row["id"] not in detected],
            "detected, but with AP 0": [row for row in scored if row["id"] in detected and row["AP"] == 0],
        }
        for what, rows in lists.items():
            pairs = [(text(row["name"]), row["training_instances"]) for row in rows]
            names = "".join(f"<span><bdi>{name}</bdi> ({count})</span>" for name, count in pairs)
            parts.append(f"<h3>{text(run.label)}: {len(rows)} of {len(scored)} {what}</h3>")
            parts.append(f'<p class="names">{names}</p>' if rows else "")
    return "<p>Of the categories with objects in validation; in brackets: training instances.</p>" + "".join(parts)


def _what(runs: list[RunResults], findings: Findings) -> str:
    columns = [about(run) for run in runs]
    head = ["", *(run.label for run in runs)]
    parts = [table(head, [[key, *(column[key] for column in columns)] for key in columns[0]], words=True)]
    parts.append(_data(runs[0], findings))
    if len(runs) > 1:
        rows = differences(runs[0].config, runs[1].config)
        parts.append(table(head, rows, "Settings that differ", words=True))
    for run in runs:
        content = yaml.safe_dump(config_to_dict(run.config), sort_keys=False)
        parts.append(
            f"<details><summary>All settings of {text(run.label)}</summary><pre>{text(content)}</pre></details>"
        )
    return "".join(parts)


def _data(run: RunResults, findings: Findings) -> str:
    """Counts of categories, training and validation, by bin."""
    bins = run.config.test.bins
    number = np.array([row["bin"] for row in run.rows])
    instances = np.array([row["training_instances"] for row in run.rows])
    names = [
        f"fewer than {bins[0]}",
        *(f"{a} to {b - 1}" for a, b in zip(bins, bins[1:], strict=False)),
        f"{bins[-1]} or more",
    ]
    rows = []
    for name, chosen in [*((name, number == n) for n, name in enumerate(names, 1)), ("all", number > 0)]:
        rows.append([name, int(chosen.sum()), int(instances[chosen].sum())])
        if findings.objects is not None:
            rows[-1] += [int((findings.objects[chosen] > 0).sum()), int(findings.objects[chosen].sum())]
    validation = [] if findings.objects is None else ["categories in validation", "validation objects"]
    images = ", ".join(f"{number} {split} images" for split, number in findings.images.items())
    caption = f"Data: {run.config.data.name}" + (f", {images}" if images else "")
    return table(["training instances", "categories", "in training", *validation], rows, caption)
