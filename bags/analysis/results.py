"""Numbers that are kept: finished runs -> a small JSON file -> the tables in README.md and RESULTS.md.

A page holds, where a table belongs, two comments with the table between them, which `render_page` makes anew:

    <!-- results/glyphs-100-table4.json: AP AP1 AP2 AP3 AP4 -->
    <!-- end -->

The columns may be left out (all that there are), and rows chosen by their titles after a bar: `AP AP1 | BAGS; Seesaw`.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

from bags.analysis.tables import COLUMNS, render_table
from bags.errors import UserError

DIGITS = 5  # of a number in 0..1
KEPT = ("revision", "python", "packages", "device", "threads", "ranks")  # of environment.json
TABLE = re.compile(r"(?P<head><!-- (?P<file>[\w./-]+\.json)(: (?P<chosen>.*?))? -->\n).*?(?P<end><!-- end -->)", re.S)


def save_results(
    path: Path, title: str, command: str, rows: dict[str, list[Path]], runs: dict[str, list[dict[str, float]]]
) -> None:
    """Writes what a table is rendered from. rows: title -> run folders, one for each seed; runs: their numbers."""
    first = json.loads((next(iter(rows.values()))[0] / "environment.json").read_text())
    content = {
        "title": title,
        "command": command,
        "environment": {key: first[key] for key in KEPT if key in first},
        "rows": {
            name: [{k: None if math.isnan(v) else round(v, DIGITS) for k, v in run.items()} for run in own]
            for name, own in runs.items()
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(_one_line_each(content))
    temporary.replace(path)


def _one_line_each(content: dict) -> str:
    """JSON with one line for each run."""
    head = {key: value for key, value in content.items() if key != "rows"}
    rows = [
        f"  {json.dumps(name)}: [\n" + ",\n".join(f"   {json.dumps(run)}" for run in runs) + "\n  ]"
        for name, runs in content["rows"].items()
    ]
    return json.dumps(head, indent=1)[:-2] + ',\n "rows": {\n' + ",\n".join(rows) + "\n }\n}\n"


def load_results(path: Path) -> dict:
    """What `save_results` wrote; null is NaN again."""
    try:
        content = json.loads(path.read_text())
        content["rows"] = {
            name: [{key: math.nan if value is None else value for key, value in run.items()} for run in runs]
            for name, runs in content["rows"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no results that tables.py --save wrote ({error!r})") from None
    return content


def render_page(text: str, root: Path) -> str:
    """A page with each of its tables made anew from the file that it names, below `root`."""

    def table(found: re.Match) -> str:
        """The two comments, and what belongs between them."""
        rows = load_results(root / found["file"])["rows"]
        columns, _, titles = (found["chosen"] or "").partition("|")
        if titles:
            wanted = [title.strip() for title in titles.split(";")]
            missing = [title for title in wanted if title not in rows]
            if missing:
                raise UserError(f"{root / found['file']}: no row {missing[0]!r}: it has {', '.join(rows)}")
            rows = {title: rows[title] for title in wanted}
        return f"{found['head']}{render_table(rows, _columns(columns.split(), rows))}\n{found['end']}"

    return TABLE.sub(table, text)


def _columns(chosen: Sequence[str], rows: dict[str, list[dict]]) -> Sequence[str]:
    known = {key for runs in rows.values() for run in runs for key in run}
    unknown = [key for key in chosen if key not in known]
    if unknown:
        raise UserError(f"column {unknown[0]}: expected one of {', '.join(sorted(known))}")
    return chosen or COLUMNS
