"""Numbers that are kept: finished runs -> a small JSON file -> the tables in README.md and docs/results.

A page holds, where a table belongs, two comments with the table between them, which `render_page` makes anew:

    <!-- results/glyphs-100-table4.json: AP AP1 AP2 AP3 AP4 -->
    <!-- end -->

The columns may be left out (all that there are). After a slash come those that the paper's numbers are shown in, after
a bar the rows: `AP AP1 / AP | BAGS; Seesaw`.
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

from bags.analysis.tables import COLUMNS, render_table
from bags.errors import UserError
from bags.files import read_text, write_text

DIGITS = 5  # of a number in 0..1
KEPT = ("python", "packages", "device", "cores", "threads", "ranks")  # of environment.json
HEAD = r"<!-- (?P<file>[\w./-]+\.json)(: (?P<chosen>[^\n]*?))? -->\n"
TABLE = re.compile(rf"(?P<head>{HEAD})(?:(?!<!-- ).)*(?P<end><!-- end -->)", re.S)


def environment() -> dict:
    """What the numbers of this process are made with."""
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
    """The script that runs, with its arguments, as it can be given again; without --save."""
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
    """Writes what a table is rendered from.

    rows: title -> run folders, one for each seed; runs: their numbers; published: those of others, on their data.
    """
    made = [read_environment(folder) for folders in rows.values() for folder in folders]
    content = {
        "title": title,
        "command": command,
        "environment": {key: made[0][key] for key in KEPT if key in made[0]},
        "revisions": list(dict.fromkeys(e["revision"] for e in made if e.get("revision"))),  # that the runs began at
        "rows": {
            name: [{k: None if math.isnan(v) else round(v, DIGITS) for k, v in run.items()} for run in own]
            for name, own in runs.items()
        },
        "published": published or {},
    }
    _write(path, content)


def read_environment(run: Path) -> dict:
    """What a run was made with; nothing where its `environment.json` cannot be read."""
    try:
        found = json.loads(read_text(run / "environment.json"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def save_benchmark(path: Path, title: str, command: str, cases: list[dict]) -> None:
    """Writes what `scripts/benchmark.py` measured in this process and on this machine."""
    _write(path, {"title": title, "command": command, "environment": environment(), "cases": cases})


def _write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1) + "\n")


def load_results(path: Path) -> dict:
    """What `save_results` or `save_benchmark` wrote; null is NaN again."""
    try:
        content = json.loads(read_text(path))
        if "cases" in content:
            render_cases(content["cases"])
            return content
        content["rows"] = {
            name: [{key: math.nan if value is None else float(value) for key, value in run.items()} for run in runs]
            for name, runs in content["rows"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no results that a script's --save wrote ({error!r})") from None
    return content


def render_page(text: str, root: Path) -> str:
    """A page with each of its tables made anew from the file that it names, below `root`."""

    def table(found: re.Match) -> str:
        """The two comments, and what belongs between them."""
        content = load_results(root / found["file"])
        if "cases" in content:
            return f"{found['head']}{render_cases(content['cases'])}\n{found['end']}"
        rows = content["rows"]
        chosen, _, titles = (found["chosen"] or "").partition("|")
        columns, _, foreign = chosen.partition("/")
        if titles:
            wanted = [title.strip() for title in titles.split(";")]
            missing = [title for title in wanted if title not in rows]
            if missing:
                raise UserError(f"{root / found['file']}: no row {missing[0]!r}: it has {', '.join(rows)}")
            rows = {title: rows[title] for title in wanted}
        shown = [*_columns(columns.split(), rows), *(f"published_{column}" for column in foreign.split())]
        for title, numbers in content.get("published", {}).items():
            if title in rows:
                others = {f"published_{column}": value for column, value in numbers.items()}
                rows[title] = [{**run, **others} for run in rows[title]]
        return f"{found['head']}{render_table(rows, shown)}\n{found['end']}"

    for head in re.finditer(HEAD, text):
        if not TABLE.match(text, head.start()):
            raise UserError(f"{head[0].strip()} has no <!-- end --> below its table")
    return TABLE.sub(table, text)


def render_cases(cases: list[dict]) -> str:
    """Markdown of a benchmark's cases: seconds or megabytes of ours and of the peer, and how many times less."""
    lines = ["| case | ours | peer | peer / ours | same output | peer is |", "|---|---:|---:|---:|---|---|"]
    for case in cases:
        ours, peer = (_quantity(case, side) for side in ("ours", "peer"))
        same = {True: "yes", False: "no", None: ""}[case["identical"]]
        lines.append(f"| {case['case']} | {ours} | {peer} | {case['ratio']:.2f} | {same} | {case['peer']} |")
    return "\n".join(lines)


def _quantity(case: dict, side: str) -> str:
    if f"{side}_mb" in case:
        return f"{case[f'{side}_mb']:.1f} MB"
    seconds = case[f"{side}_s"]
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.2f} ms"


def _columns(chosen: Sequence[str], rows: dict[str, list[dict]]) -> Sequence[str]:
    known = {key for runs in rows.values() for run in runs for key in run}
    unknown = [key for key in chosen if key not in known]
    if unknown:
        raise UserError(f"column {unknown[0]}: expected one of {', '.join(sorted(known))}")
    return chosen or COLUMNS
