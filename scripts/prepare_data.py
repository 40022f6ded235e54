"""Makes the datasets that are made rather than downloaded.

python scripts/prepare_data.py glyphs-100                      # to data/glyphs-100
python scripts/prepare_data.py glyphs-1230 --root /data/glyphs-1230 --workers 8
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bags.data.glyphs import PRESETS, make_glyphs
from bags.errors import run_script


def main() -> None:
    """Parses the command line and makes the dataset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=list(PRESETS))
    parser.add_argument("--root", type=Path, help="folder (default: data/<dataset>)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, help="processes (default: all cores)")
    arguments = parser.parse_intermixed_args()
    root = arguments.root or Path("data", arguments.dataset)
    print(make_glyphs(root, PRESETS[arguments.dataset], arguments.seed, arguments.workers))


if __name__ == "__main__":
    run_script(main)
