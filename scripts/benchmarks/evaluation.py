"""Scoring a results file of LVIS's size against the official tool."""

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

from bags.core.errors import UserError
from scripts.benchmarks.measuring import coco_object, measure


def evaluation(arguments: argparse.Namespace) -> list[dict]:
    """2,000 images, 1,203 categories, 24,000 objects, 300 detections an image: loading and scoring."""
    import numpy as np

    from bags.evaluation import detection_ap, official

    repeats, results = min(arguments.repeats, 3), []
    with tempfile.TemporaryDirectory() as folder:
        truth, results_file = write_results(Path(folder))
        arrays = {}

        def ours() -> None:
            """Score the results file, and keep the arrays."""
            plain = detection_ap._match

            def kept(*given: Any) -> Any:
                """Match as ever, and keep the result."""
                arrays["ours"] = plain(*given)
                return arrays["ours"]

            detection_ap._match = kept  # type: ignore[assignment]
            detection_ap.evaluate(truth, results_file)
            detection_ap._match = plain

        def peer() -> None:
            """Score the results file with the official lvis."""
            with contextlib.redirect_stdout(io.StringIO()):
                arrays["lvis"] = official._lvis(str(truth), json.loads(results_file.read_text()), "bbox", 300)

        try:
            peer()
        except UserError as error:
            raise UserError(f"{error}: this benchmark needs it") from None
        ours()
        same = all(np.array_equal(a, b) for a, b in zip(arrays["ours"], arrays["lvis"], strict=True))
        results.append(measure("LVIS boxes, 600,000 detections", ours, "lvis 0.5.3", peer, repeats, same))
    return results


def write_results(folder: Path, number: int = 2000) -> tuple[Path, Path]:
    """Random federated truth and shifted, mislabelled detections of it."""
    import numpy as np

    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, 1204)
    share /= share.sum()
    categories = [
        {
            "id": c,
            "name": f"c{c}",
            "frequency": "rcf"[c % 3],
            "image_count": 1 + 1000 // c,
            "instance_count": 1 + 3000 // c,
        }
        for c in range(1, 1204)
    ]
    images: list[dict] = []
    objects: list[dict] = []
    detections: list[dict] = []
    for i in range(1, number + 1):
        labels = rng.choice(1203, 12, p=share) + 1
        absent = [c for c in set((rng.choice(1203, 15) + 1).tolist()) if c not in labels]
        images.append(
            {
                "id": i,
                "width": 640,
                "height": 480,
                "neg_category_ids": absent,
                "not_exhaustive_category_ids": labels[:1].tolist(),
            }
        )
        boxes = np.column_stack([rng.random((12, 2)) * (500, 350), rng.random((12, 2)) * 120 + 8]).round(2)
        for label, box in zip(labels.tolist(), boxes.tolist(), strict=True):
            objects.append(coco_object(len(objects) + 1, i, label, box))
        which = np.arange(300) % 12
        guesses = np.where(rng.random(300) < 0.5, labels[which], rng.choice(1203, 300, p=share) + 1).tolist()
        shifted = boxes[which] + np.column_stack([rng.normal(0, 8, (300, 2)), np.zeros((300, 2))])
        shifted[:, 2:] *= np.exp(rng.normal(0, 0.1, (300, 2)))
        scores = rng.random(300, np.float32).astype(float).tolist()
        for label, box, score in zip(guesses, shifted.round(3).tolist(), scores, strict=True):
            detections.append({"image_id": i, "category_id": label, "bbox": box, "score": score})
    truth, results = folder / "truth.json", folder / "results.json"
    truth.write_text(json.dumps({"images": images, "annotations": objects, "categories": categories}))
    results.write_text(json.dumps(detections))
    return truth, results
