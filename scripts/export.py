"""The command `bags export`, from a checkout. `--help` shows its options and examples."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bags.cli import run

run("export")
