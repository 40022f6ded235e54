"""Numbers of finished runs in small JSON files, and the tables of the documentation that are made from them.

In a page, a table stands between two comments, and `render_page` renders it again:

    <!-- results/glyphs-100-table4.json: AP AP1 AP2 AP3 AP4 -->
    <!-- end -->

Without columns, all columns are shown. Columns after a slash show the paper's numbers, and a bar precedes the rows:
`AP AP1 / AP | BAGS; Seesaw`. Several files, kept by `choose.py --save`, make the table of gains over the control.
"""

import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from bags.analysis.tables import COLUMNS, GAINS, OTHERS, render_gains, render_table
from bags.core.errors import UserError
from bags.core.files import read_text, write_text

DIGITS = 5  # of a number in 0..1
KEPT = ("python", "packages", "device", "cores", "threads", "ranks")  # of environment.json
HEAD = r"<!-- (?P<files>[\w./-]+\.json( [\w./-]+\.json)*)(: (?P<chosen>[^\n]*?))? -->\n"
TABLE = re.compile(rf"(?P<head>{HEAD})(?:(?!<!-- ).)*(?P<end><!-- end -->)", re.S)


def environment() -> dict:
    """The software and hardware of this process."""
    import torch

    here = Path(__file__).parent
    git = shutil.which("git") and subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=here)
    return {
        "revision": (git and git.stdout.strip()) or None,
        "python": platform.python_version(),
        "packages": {n: version(n) for n in ("torch", "torchvision", "numpy", "pillow", "hotcoco")},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def this_command() -> str:
    """The command line of this process, to be repeated, without --save."""
    pairs = zip(sys.argv[1:], sys.argv, strict=False)
    words = [word for word, before in pairs if "--save" not in (word, before) and not word.startswith("--save=")]
    return shlex.join(["python", f"scripts/{Path(sys.argv[0]).name}", *words])


def save_results(
    path: Path,
    title: str,
    command: str,
    rows: dict[str, list[Path]],
    runs: dict[str, list[dict[str, float]]],
    published: dict[str, dict[str, float]] | None = None,
) -> None:
    """Write the file that a table is rendered from.

    rows       title -> run folders, one for each seed
    runs       title -> the numbers of each run
    published  title -> published numbers, on the data of the publication
    """
    environments = [read_environment(folder) for folders in rows.values() for folder in folders]
    content = {
        "title": title,
        "command": command,
        "environment": {key: environments[0][key] for key in KEPT if key in environments[0]},
        "revisions": list(dict.fromkeys(e["revision"] for e in environments if e.get("revision"))),  # at the start
        "rows": {title: [_rounded(numbers) for numbers in of_row] for title, of_row in runs.items()},
        "published": published or {},
    }
    _write(path, content)


def _rounded(numbers: dict[str, float]) -> dict[str, float | None]:
    """Numbers for JSON, in which NaN is null."""
    return {key: None if math.isnan(number) else round(number, DIGITS) for key, number in numbers.items()}


def read_environment(run: Path) -> dict:
    """Read the `environment.json` of a run folder; empty if it cannot be read."""
    try:
        environment = json.loads(read_text(run / "environment.json"))
    except (OSError, ValueError, RecursionError):
        return {}
    return environment if isinstance(environment, dict) else {}


def save_benchmark(path: Path, title: str, command: str, cases: list[dict]) -> None:
    """Write the measurements of `scripts/benchmark.py` in this process."""
    _write(path, {"title": title, "command": command, "environment": environment(), "cases": cases})


def _write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1) + "\n")


def load_results(path: Path) -> dict:
    """Read a file of `save_results` or `save_benchmark`, with NaN for null. Raises UserError for other files."""
    try:
        content = json.loads(read_text(path))
        if "cases" in content:
            render_cases(content["cases"])
            if not all(isinstance(next(iter(case.values()), None), str) for case in content["cases"]):  # its name
                raise TypeError
            return content
        content["rows"] = {
            name: [{key: math.nan if value is None else float(value) for key, value in run.items()} for run in runs]
            for name, runs in content["rows"].items()
        }
        for numbers in content.get("published", {}).values():
            dict(numbers)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        words = "missing, or not the numbers that --save writes; give the path of such a file"
        raise UserError(f"{path}: {words}") from None
    return content


def render_page(text: str, root: Path) -> str:
    """Render each table of a page again, from the files below `root` that it names."""

    def rendered(old: re.Match[str]) -> str:
        """One table between its comments."""
        paths = [root / name for name in old["files"].split()]
        if len(paths) > 1 and old["chosen"]:
            raise UserError(f"{old['files']}: a table of several files has no columns or rows to choose")
        table = _table(paths[0], old["chosen"] or "") if len(paths) == 1 else render_gains(read_gains(paths))
        return f"{old['head']}{table}\n{old['end']}"

    for head in re.finditer(HEAD, text):
        if not TABLE.match(text, head.start()):
            raise UserError(f"{head[0].strip()} has no <!-- end --> below its table")
    return TABLE.sub(rendered, text)


def read_gains(paths: Sequence[Path]) -> dict[str, dict[str, list[float]]]:
    """What rows gain over the control in AP, of files that `choose.py --save` has kept, a dataset each.

    Dataset -> "control" with its AP of each seed, and rows with their differences. Raises UserError for other files.
    """
    gains: dict[str, dict[str, list[float]]] = {}
    for path in paths:
        content = load_results(path)
        rows, name = content.get("rows", {}), str(content.get("title", path.stem)).partition(":")[0]
        if "softmax_retrained" not in rows or OTHERS not in rows:
            raise UserError(f"{path}: expected a file that choose.py --save has kept")
        if name in gains:
            raise UserError(f"{path}: {name} is given twice")
        shown = [row for row in ("softmax_retrained", *GAINS) if row in rows]
        control, *others = ([run.get("AP") for run in rows[row]] for row in shown)
        if not control or any(len(runs) != len(control) or None in runs for runs in (control, *others)):
            raise UserError(f"{path}: expected AP of as many runs in each row (choose.py --metric AP_fixed saves none)")
        of_rows = dict(zip(shown[1:], others, strict=True))
        gains[name] = {row: [a - b for a, b in zip(runs, control, strict=True)] for row, runs in of_rows.items()}
        gains[name]["control"] = control
    return gains


def _table(path: Path, chosen: str) -> str:
    """The table of a file. chosen: `columns / columns of published numbers | rows`, each of which may be missing."""
    content = load_results(path)
    if "cases" in content:
        return render_cases(content["cases"])
    rows = content["rows"]
    chosen, _, titles = chosen.partition("|")
    columns, _, published_columns = chosen.partition("/")
    if titles:
        wanted = [title.strip() for title in titles.split(";")]
        missing = [title for title in wanted if title not in rows]
        if missing:
            raise UserError(f"{path}: no row {missing[0]!r}: it has {', '.join(rows)}")
        rows = {title: rows[title] for title in wanted}
    shown = [*_columns(columns.split(), rows), *(f"published_{column}" for column in published_columns.split())]
    for title, numbers in content.get("published", {}).items():
        if title in rows:
            published = {f"published_{column}": number for column, number in numbers.items()}
            rows[title] = [{**run, **published} for run in rows[title]]
    return render_table(rows, shown)


def render_cases(cases: list[dict]) -> str:
    """Markdown table of a benchmark's cases: seconds or megabytes of this package and of the peer, and their ratio.

    Cases without a peer have their keys as columns.
    """
    if "peer" not in cases[0]:
        table = [list(cases[0]), ["---", *["---:"] * (len(cases[0]) - 1)], *(case.values() for case in cases)]
        return "\n".join(f"| {' | '.join(map(str, line))} |" for line in table)
    lines = ["| case | ours | peer | peer / ours | same output | peer is |", "|---|---:|---:|---:|---|---|"]
    for case in cases:
        ours, peer = (quantity(case, side) for side in ("ours", "peer"))
        same = {True: "yes", False: "no", None: ""}[case["identical"]]
        lines.append(f"| {case['case']} | {ours} | {peer} | {case['ratio']:.2f} | {same} | {case['peer']} |")
    return "\n".join(lines)


def quantity(case: dict, side: str) -> str:
    """Seconds or megabytes of a benchmark's case; side: "ours" or "peer"."""
    if f"{side}_mb" in case:
        return f"{case[f'{side}_mb']:.1f} MB"
    seconds = case[f"{side}_s"]
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.2f} ms"


def _columns(chosen: Sequence[str], rows: dict[str, list[dict]]) -> Sequence[str]:
    known = {key for runs in rows.values() for run in runs for key in run}
    unknown = [key for key in chosen if key not in known]
    if unknown:
        raise UserError(f"column {unknown[0]}: expected one of {', '.join(sorted(known))}")
    return chosen or COLUMNS
