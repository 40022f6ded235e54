"""Can each detector learn at all? Trains it on 8 images until it knows them by heart; AP50 must exceed 0.9.

    python scripts/overfit.py                               # 5 frameworks x 2 classifiers, 40 minutes on one core
    python scripts/overfit.py htc mask_rcnn --classifiers group_softmax
    python scripts/overfit.py faster_rcnn train.lr=0.0005   # section.key=value, as everywhere; data.* take other images
    python scripts/overfit.py cascade_rcnn htc_dcn --classifiers softmax,bags detector.backbone=resnext101_64x4d

Other backbones than `small` learn smaller images, because they cost more. htc_dcn has deformable stages, learns images
of several sizes, and runs only where it is named. bags retrains the classifier of softmax, which is named before it.

A detector that cannot do this has a fault. Exit code 1 if one fails.
"""

import argparse
import json
import resource
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
    "htc_dcn": "htc_dcn",
}
GROUPS = ["classifier.name=group_softmax", "classifier.boundaries=[2, 3]"]
CLASSIFIERS = {"softmax": [], "group_softmax": GROUPS, "bags": [*GROUPS, "train.part=cls"]}
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
# For every backbone but `small`: batch normalisation is trained, because there are no pretrained weights.
DEEP = [
    "detector.min_size=96",
    "detector.max_size=96",
    "detector.rpn.anchor_sizes=[[14], [20], [28], [48], [64]]",
    "train.epochs=100",
    "train.lr=0.0005",
    "train.milestones=[75]",
    "train.warmup_iterations=20",
]
SCALES = {"htc_dcn": ["data.short_sides=[80, 112]", "data.long_side=112"]}


def main() -> None:
    """Parses the command line; trains, prints one line for each detector."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("frameworks", nargs="*", help=f"of {', '.join(ROWS)}; and section.key=value overrides")
    parser.add_argument("--classifiers", default="softmax,group_softmax", help="comma-separated")
    arguments = parser.parse_intermixed_args()
    overrides = [text for text in arguments.frameworks if "=" in text]
    frameworks = [text for text in arguments.frameworks if "=" not in text] or [f for f in ROWS if f != "htc_dcn"]
    classifiers = [name for name in arguments.classifiers.split(",") if name]
    for name, known in [(f, ROWS) for f in frameworks] + [(c, CLASSIFIERS) for c in classifiers]:
        if name not in known:
            raise UserError(f"{name}: expected one of {', '.join(known)}")
    if "bags" in classifiers and "softmax" not in classifiers[: classifiers.index("bags")]:
        raise UserError("--classifiers bags: name softmax before it, as in softmax,bags")
    with tempfile.TemporaryDirectory() as folder:
        data = few_images(Path(folder), overrides)
        results = [
            overfit(framework, classifier, [f"output={folder}/runs", *overrides, *data])
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
    """Trains one detector; prints its AP50, time and memory, and returns whether it has learnt the images.

    bags starts from the detector of softmax and learns from features of one size, the others as `overrides` say.
    """
    from bags.config.load import load_config
    from bags.core.distributed import distributed
    from bags.jobs.train import run

    row = DATASET / ROWS[framework]
    deep = load_config(row, overrides).detector.backbone != "small"
    settings = [*SCHEDULE, *(DEEP + SCALES.get(framework, []) if deep else []), *CLASSIFIERS[classifier]]
    stage = [f"detector.init_from=row:{framework}-softmax", "data.short_sides=[]"] if classifier == "bags" else []
    config = load_config(row, [*settings, f"name={framework}-{classifier}", *overrides, *stage])
    reset_peak()
    start = time.perf_counter()
    with distributed(config.device) as device:
        run([config], device)
    seconds, memory = time.perf_counter() - start, peak_gb()
    metrics = json.loads((config.run_folder / "metrics.json").read_text())
    steps = json.loads((config.run_folder / "log.jsonl").read_text().splitlines()[-1])
    found = {key: metrics[key] for key in ("AP50", "mask_AP50") if key in metrics}
    good = min(found.values()) > 0.9
    numbers = ", ".join(f"{key} {value:.3f}" for key, value in found.items())
    pace = f"{seconds:.0f} s ({steps['seconds'] / (steps['iteration'] + 1):.2f} s a step), at most {memory:.1f} GB"
    print(f"{framework} {classifier}: {numbers} after {pace}{'' if good else ': FAILED'}", flush=True)
    return good


def reset_peak() -> None:
    """Let `peak_gb` forget what was before, where that is possible: on a GPU and on Linux."""
    import torch

    clear = Path("/proc/self/clear_refs")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif clear.exists():
        clear.write_text("5")


def peak_gb() -> float:
    """The most memory since `reset_peak`: of the GPU, or of this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


if __name__ == "__main__":
    run_script(main)
