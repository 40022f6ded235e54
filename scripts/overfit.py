"""Can each detector learn at all? Trains it on 8 images until it knows them by heart; AP50 must exceed 0.9.

    python scripts/overfit.py                               # 5 frameworks x 2 classifiers, 40 minutes on one core
    python scripts/overfit.py htc mask_rcnn --classifiers group_softmax
    python scripts/overfit.py faster_rcnn train.lr=0.0005   # section.key=value, as everywhere; data.* take other images

A detector that cannot do this has a fault. Exit code 1 if one fails.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bags.core.errors import UserError, run_script

ROWS = {
    "faster_rcnn": "softmax",
    "mask_rcnn": "mask",
    "cascade_rcnn": "cascade",
    "cascade_mask_rcnn": "cascade_mask",
    "htc": "htc",
}
CLASSIFIERS = {"softmax": [], "group_softmax": ["classifier.name=group_softmax", "classifier.boundaries=[2, 3]"]}
DATASET = Path("glyphs-100")
IMAGES = 8
SCHEDULE = [
    "train.epochs=200",
    "train.batch_size=4",
    "train.optimizer=adamw",
    "train.lr=0.002",
    "train.milestones=[160]",
    "train.warmup_iterations=50",
    "train.checkpoint_every=100000",
    "detector.roi.batch_size=32",
    "test.score_threshold=0.05",
]


def main() -> None:
    """Parses the command line; trains, prints one line for each detector."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("frameworks", nargs="*", help=f"of {', '.join(ROWS)}; and section.key=value overrides")
    parser.add_argument("--classifiers", default="softmax,group_softmax", help="comma-separated")
    arguments = parser.parse_intermixed_args()
    overrides = [text for text in arguments.frameworks if "=" in text]
    frameworks = [text for text in arguments.frameworks if "=" not in text] or list(ROWS)
    classifiers = [name for name in arguments.classifiers.split(",") if name]
    for name, known in [(f, ROWS) for f in frameworks] + [(c, CLASSIFIERS) for c in classifiers]:
        if name not in known:
            raise UserError(f"{name}: expected one of {', '.join(known)}")
    with tempfile.TemporaryDirectory() as folder:
        data = few_images(Path(folder), overrides)
        results = [
            overfit(framework, classifier, [f"output={folder}/runs", *SCHEDULE, *overrides, *data])
            for framework in frameworks
            for classifier in classifiers
        ]
    sys.exit(0 if all(results) else 1)


def few_images(folder: Path, overrides: list[str]) -> list[str]:
    """Writes annotations of the training set's first images; returns the overrides that use them."""
    from bags.config.load import load_config
    from bags.data.glyphs import PRESETS, make_glyphs
    from bags.data.json_files import read_json

    data = load_config(DATASET / "softmax", overrides).data
    if data.glyphs:
        make_glyphs(data.root, PRESETS[data.glyphs])
    content = read_json(Path(data.root) / data.train)
    content["images"] = content["images"][:IMAGES]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    (folder / "few.json").write_text(json.dumps(content))
    file = f"{folder}/few.json"
    return ["data.glyphs=null", f"data.train={file}", f"data.val={file}"]


def overfit(framework: str, classifier: str, overrides: list[str]) -> bool:
    """Trains one detector from nothing; prints its AP50 and returns whether it has learnt the images."""
    from bags.config.load import load_config
    from bags.core.distributed import distributed
    from bags.jobs.train import run

    config = load_config(
        DATASET / ROWS[framework], [*CLASSIFIERS[classifier], f"name={framework}-{classifier}", *overrides]
    )
    start = time.perf_counter()
    with distributed(config.device) as device:
        run([config], device)
    metrics = json.loads((config.run_folder / "metrics.json").read_text())
    found = {key: metrics[key] for key in ("AP50", "mask_AP50") if key in metrics}
    good = min(found.values()) > 0.9
    numbers = ", ".join(f"{key} {value:.3f}" for key, value in found.items())
    print(
        f"{framework} {classifier}: {numbers} after {time.perf_counter() - start:.0f} s{'' if good else ': FAILED'}",
        flush=True,
    )
    return good


if __name__ == "__main__":
    run_script(main)
