"""`choose.json`, read with every part checked, and its section of the report."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bags.analysis import plots
from bags.analysis.page import drawn, figure, table, text
from bags.analysis.tables import column_title, gain_cells, verdict
from bags.core.errors import UserError, system_error
from bags.core.files import read_text

MEND = "remove it, and repeat the command choose"


def read_choice(file: Path) -> dict:
    """The content of `choose.json`. Raises UserError, naming the part, for one that `choose` has not written so."""
    try:
        content = json.loads(read_text(file))
    except OSError as error:
        raise UserError(system_error(error, file)) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: damaged ({str(error):.100}): {MEND}") from None
    try:
        _check(content)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise UserError(f"{file}: is not a choice ({type(error).__name__}: {str(error):.100}): {MEND}") from None
    return content


def _check(content: Any) -> None:
    """Raise one of the errors above unless all parts that are shown are there and of the right types."""
    need(all(isinstance(content[key], str) for key in ("key", "metric", "control")), "names")
    need(all(isinstance(content[key], int) for key in ("folds", "draws", "images")), "settings")
    need(type(content.get("members", 1)) is int, "members")
    need(isinstance(content["better_than_control"], bool), "better_than_control")
    rows = content["rows"]
    need(content["control"] in rows, "control")
    need(all(name not in ("", ".", "..") and not set(name) & set("/\\\0") for name in rows), "names of rows")
    for part in (*rows.values(), content["optimistic"], content["honest"]):
        numbers, gain = part["numbers"], part["gain"]
        need(all(map(_is_number, numbers.values())) and content["metric"] in numbers, "numbers")
        need(all(len(values) == 3 and all(map(_is_number, values)) for values in gain.values()), "gain")
        need(content["metric"] in gain, "gain")
    need(all(_is_number(row["seconds"]) for row in rows.values()), "seconds")
    for mixture in (content["mixture"], content["chosen"], *content["without_fold"]):
        need(mixture and all(name in rows and isinstance(share, float) for name, share in mixture.items()), "mixture")
        need(all(0 < share <= 1 for share in mixture.values()), "mixture")
    for gain in content.get("over_baseline", {}).values():
        need(all(len(values) == 3 and all(map(_is_number, values)) for values in gain.values()), "over_baseline")
        need(content["metric"] in gain, "over_baseline")
    need(content.get("instead") in (None, content["control"], *content.get("over_baseline", {})), "instead")
    if "test" in content:
        test = content["test"]
        need(isinstance(test["annotations"], str) and isinstance(test["sha256"], str), "test")
        need(all(len(values) == 3 and all(map(_is_number, values)) for values in test["gain"].values()), "test")
        need("AP" in test["gain"], "test")


def need(condition: object, what: str) -> None:
    """Raise ValueError unless a condition holds."""
    if not condition:
        raise ValueError(what)


def _is_number(value: object) -> bool:
    """Whether it is None or a finite number."""
    return value is None or (isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value))


def section(content: dict, categories: Mapping[str, list[dict]], boundaries: tuple[int, ...]) -> str:
    """The section of the report. categories: name -> rows with AP and training_instances, of runs in the figure."""
    number, control = content["metric"], content["control"]
    title = column_title(number)
    lines = sorted(content["rows"].items(), key=lambda row: -(row[1]["numbers"][number] or 0))
    rows = [[name, *_cells(row, number, name == control), _seconds(row["seconds"])] for name, row in lines]
    rows.append(["chosen, on the same images (optimistic)", *_cells(content["optimistic"], number), ""])
    rows.append(["chosen, on images that it was not chosen with", *_cells(content["honest"], number), ""])
    head = ["row", title, f"{title} - {control}", "95 % interval", "seconds"]
    parts = [f"<p>{text(line)}</p>" for line in verdict(content)]
    parts.append(table(head, rows, f"Rows, on {content['images']} validation images"))
    shares = [[name, f"{share:.1%}"] for name, share in content["mixture"].items()]
    parts.append(table(["row", "share"], shares, "The mean of scores that was chosen"))
    if categories:
        drawing = drawn(plots.plot_ap_by_instances, dict(categories), boundaries)
        caption = "A point for each category, a line through the mean of neighbours; dashed: borders of the bins."
        parts.append(figure(drawing, f"AP over training instances: {', '.join(categories)}", caption))
    return "".join(parts)


def _cells(part: dict, number: str, is_control: bool = False) -> list[str]:
    value = part["numbers"][number]
    return ["-" if value is None else f"{100 * value:.1f}", *gain_cells(part["gain"][number], is_control)]


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f}"
