"""Writes one HTML file about a finished run, or about what changed from OTHER to RUN; it needs no other file.

    python scripts/report.py runs/glyphs-100/bags                              # runs/glyphs-100/bags/report.html
    python scripts/report.py runs/glyphs-100/bags runs/glyphs-100/softmax      # RUN, then OTHER
    python scripts/report.py runs/glyphs-100/bags --output bags.html data.root=/where/the/dataset/is/now

It shows the columns of the paper, AP by training instances, precision and recall, weight norms (Figures 1 and 3),
the training curve, the best and the worst categories of the tail with validation images, training objects whose label
is likely wrong, and what was run; with OTHER also the differences with their bootstrap intervals, and the categories
that gained and lost most. Without the dataset the report is made without what needs it, and says so.
"""

import argparse
import sys
from pathlib import Path

from bags.core.errors import UserError
from bags.core.files import read_bytes, replacing
from bags.jobs.report import gather, read_runs


def main() -> None:
    """Parses the command line; reads, compares, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN [OTHER]", help="run folders; section.key=value overrides")
    parser.add_argument("--output", type=Path, help="the file to write (default: RUN/report.html)")
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap (default 1000; 0: no intervals)")
    arguments = parser.parse_intermixed_args()

    from bags.analysis.page import BEGINNING
    from bags.analysis.report import render
    from bags.cli.arguments import split_arguments
    from bags.cli.checks import check_draws

    folders, overrides = split_arguments(arguments.runs)
    if not 1 <= len(folders) <= 2:
        raise UserError(f"expected one run folder or two, got {len(folders)}: {', '.join(map(str, folders))}")
    wrong = next((override for override in overrides if not override.startswith("data.")), None)
    if wrong:
        raise UserError(f"override '{wrong}': a report takes data.* only: the run is shown as it is")
    check_draws(arguments.draws)
    output = arguments.output or folders[0] / "report.html"
    runs = read_runs(folders, overrides)
    if output.is_dir():
        raise UserError(f"{output}: is a folder; --output names a file")
    if output.exists() and not (output.is_file() and read_bytes(output).startswith(BEGINNING.encode())):
        raise UserError(f"--output {output}: exists already, and is no report; choose another name")
    findings = gather(runs, arguments.draws)
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output, errors="replace") as file:
        file.write(render(runs, findings))
    for note in findings.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"written: {output} ({output.stat().st_size / 1e6:.1f} MB)")
