"""Validation on LVIS v1, from image files to AP: ours against torchvision's detector, pycocotools and lvis."""

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from scripts.benchmarks.classifier_stage import write_dataset
from scripts.benchmarks.evaluation import write_results

if TYPE_CHECKING:
    import torch

IMAGES, CATEGORIES, DETECTIONS = 19_809, 1203, 300  # of LVIS v1's validation
Measured = tuple[dict[str, float], dict]  # seconds of each step of an image, and its detections
SCORED = 500  # images whose scoring is timed
STEPS = ("load", "forward", "detections", "masks", "write", "score")


def whole(arguments: argparse.Namespace) -> list[dict]:
    """Faster and Mask R-CNN R50-FPN with 1,203 categories on images of 800 x 1333 (without --full: 160 x 256) pixels.

    Threshold 0, 300 detections an image. A few images are timed, after one that is not; scoring has its own 500
    images. Seconds are those of a step times 19,809 images. Ours is timed in fp32, and with test.precision=bf16.
    """
    size = (800, 1333) if arguments.full else (160, 256)
    images, results = max(2, min(arguments.repeats, 5)), []
    for kind, iou_type in (("boxes", "bbox"), ("masks", "segm")):
        ours, half, peer, (same, same_half) = validate(size, images, iou_type)
        results += [_case(f"{kind}: {step}", ours[step], peer[step]) for step in STEPS if step in ours]
        results.append(_case(f"{kind}: whole", sum(ours.values()), sum(peer.values()), same))
        results.append(_case(f"{kind}: forward, ours in bf16", half["forward"], peer["forward"]))
        results.append(_case(f"{kind}: whole, ours in bf16", sum(half.values()), sum(peer.values()), same_half))
    return results


def _case(case: str, ours: float, peer: float, same: bool | None = None) -> dict:
    name = "torchvision, pycocotools, lvis"
    return {"case": case, "ours_s": ours, "peer": name, "peer_s": peer, "ratio": peer / ours, "identical": same}


def validate(size: tuple[int, int], images: int, iou_type: str) -> tuple[Any, Any, Any, list[bool]]:
    """Seconds of the steps for 19,809 images: ours, ours in bf16 and the peer's; whether ours find what the peer does.

    The models have the same random weights. What they find is compared in the first image, before it is timed; then
    ours gets the layout in memory that evaluate.py gives it, in which sums are rounded otherwise.
    """
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(folder, size, images + 1)
        paths = [folder / "images" / f"{k}.jpg" for k in range(1, images + 2)]
        peer_model, model = models(size, iou_type == "segm")
        model.to(device).eval()
        peer_model.to(device).eval()
        records: list[dict[str, list[float]]] = [{}, {}, {}]
        same: list[bool] = []
        with torch.inference_mode():
            for number, path in enumerate(paths):
                scores = []
                for record, precision in zip(records, ("fp32", "bf16", None), strict=True):
                    model.precision = precision
                    run, used = (run_ours, model) if precision else (run_peer, peer_model)
                    seconds, found = run(used, path, number, device)
                    scores.append(found["scores"])
                    if number:
                        for step, taken in seconds.items():
                            record.setdefault(step, []).append(taken)
                if not number:
                    same = [alike(own, scores[2]) for own in scores[:2]]
                    model.to(memory_format=torch.channels_last)
        totals = [{step: IMAGES * statistics.median(taken) for step, taken in one.items()} for one in records]
        ours, peer = scorings(folder, iou_type)
        for total, scoring in zip(totals, (ours, ours, peer), strict=True):
            total["score"] = scoring * IMAGES / SCORED
    return totals[0], totals[1], totals[2], same


def alike(scores: "torch.Tensor", others: "torch.Tensor") -> bool:
    """Whether as many detections have the same scores, to 1e-4."""
    import torch

    return scores.shape == others.shape and torch.allclose(scores, others, rtol=1e-4)


def models(size: tuple[int, int], masks: bool, categories: int = CATEGORIES) -> tuple[Any, Any]:
    """(torchvision's model, ours) with R50-FPN, threshold 0, 300 detections and the same random weights."""
    import torch
    from torchvision.models import detection

    from bags.assembly.models import build_detector
    from bags.config.load import config_from_dict, override_config
    from bags.data.statistics import CategoryStats
    from bags.detectors.weights import translate

    torch.manual_seed(0)
    make = detection.maskrcnn_resnet50_fpn if masks else detection.fasterrcnn_resnet50_fpn
    peer = make(
        weights=None,
        weights_backbone=None,
        num_classes=categories + 1,
        min_size=size[0],
        max_size=size[1],
        box_score_thresh=0.0,
        box_detections_per_img=DETECTIONS,
    )
    keys = ["detector.conventions=torchvision", f"detector.min_size={size[0]}", f"detector.max_size={size[1]}"]
    keys += ["detector.framework=mask_rcnn"] * masks
    keys += ["test.score_threshold=0", f"test.max_detections={DETECTIONS}"]
    counts = tuple([10] * categories)
    stats = CategoryStats(tuple(range(1, categories + 1)), tuple(map(str, range(categories))), counts, counts)
    ours = build_detector(override_config(config_from_dict({}), keys), stats)
    ours.load_state_dict(ours.state_dict() | translate(peer.state_dict(), "torchvision").state)
    return peer, ours


@contextlib.contextmanager
def timed(places: dict[str, list[tuple[Any, str]]], seconds: dict[str, float]) -> Iterator[None]:
    """Add up the seconds of functions, by step. places: step -> (module or object, name of a function)."""

    def clocked(step: str, function: Callable) -> Callable:
        """The function with a clock."""

        def call(*given: Any, **named: Any) -> Any:
            """The function's result."""
            synchronize()
            start = time.perf_counter()
            result = function(*given, **named)
            synchronize()
            seconds[step] = seconds.get(step, 0.0) + time.perf_counter() - start
            return result

        return call

    with contextlib.ExitStack() as stack:
        for step, functions in places.items():
            for owner, name in functions:
                stack.enter_context(mock.patch.object(owner, name, clocked(step, getattr(owner, name))))
        yield


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run_ours(model: Any, path: Path, number: int, device: "torch.device") -> Measured:
    """Seconds of each step for an image, and its detections."""
    import orjson
    from torchvision.transforms.functional import pil_to_tensor

    from bags.data.images import read_image
    from bags.detectors import conventions, roi_heads
    from bags.engine.predict import results_entries

    model.transform.encode_masks = True
    places = {"detections": [(roi_heads, "select_detections")], "masks": [(conventions, "encode")]}

    def write(found: dict) -> None:
        """Append a line of results, as `predict` does."""
        with path.with_suffix(".ours").open("ab") as file:
            file.write(orjson.dumps(results_entries(number, found, tuple(range(1, CATEGORIES + 1)))))

    return steps(lambda: pil_to_tensor(read_image(path)) / 255, model, places, write, device)


def run_peer(model: Any, path: Path, number: int, device: "torch.device") -> Measured:
    """Seconds of each step for an image, and its detections."""
    import numpy as np
    from PIL import Image
    from pycocotools import mask as coco_mask
    from torchvision.models.detection import transform
    from torchvision.transforms.functional import to_tensor

    masks = [(transform, "paste_masks_in_image")]
    places = {
        "detections": [(model.roi_heads, "postprocess_detections")],
        "masks": masks if model.roi_heads.has_mask() else [],
    }
    coded: dict[str, float] = {}

    def code(found: dict) -> list:
        """Run lengths of the masks, as torchvision's reference code makes them."""
        pasted = (found["masks"][:, 0] > 0.5).cpu().numpy()
        return [coco_mask.encode(np.asfortranarray(mask, np.uint8)) for mask in pasted]

    def write(found: dict) -> None:
        """Results as a list of dicts in JSON."""
        boxes = found["boxes"].cpu()
        entries = [
            {"image_id": number, "category_id": label, "bbox": [x, y, x2 - x, y2 - y], "score": score}
            for (x, y, x2, y2), label, score in zip(
                boxes.tolist(), found["labels"].tolist(), found["scores"].tolist(), strict=True
            )
        ]
        if "masks" in found:
            start = time.perf_counter()
            codes = code(found)
            coded["masks"] = time.perf_counter() - start
            for entry, rle in zip(entries, codes, strict=True):
                entry["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
        with path.with_suffix(".peer").open("a") as file:
            json.dump(entries, file)

    seconds, found = steps(lambda: to_tensor(Image.open(path).convert("RGB")), model, places, write, device)
    if coded:
        seconds["masks"] += coded["masks"]
        seconds["write"] -= coded["masks"]
    return seconds, found


def steps(load: Callable, model: Any, places: dict, write: Callable, device: "torch.device") -> Measured:
    """Seconds of loading, of the model without the named parts, of these parts, and of writing; detections."""
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    image = load()
    loaded = time.perf_counter()
    with timed(places, seconds):
        found = model([image.to(device)])[0]
        synchronize()
    done = time.perf_counter()
    forward = done - loaded - sum(seconds.values())
    write(found)
    return {"load": loaded - start, "forward": forward, **seconds, "write": time.perf_counter() - done}, found


def scorings(folder: Path, iou_type: str) -> tuple[float, float]:
    """Seconds of scoring 500 images, 150,000 detections, by ours and by lvis."""
    from bags.evaluation import detection_ap, official

    truth, results = write_results(folder, SCORED)
    if iou_type == "segm":
        for file, key in ((truth, "annotations"), (results, None)):
            add_masks(file, key)
    start = time.perf_counter()
    detection_ap.evaluate(truth, results, iou_type)
    middle = time.perf_counter()
    with contextlib.redirect_stdout(None):
        official._lvis(str(truth), json.loads(results.read_text()), iou_type, DETECTIONS)
    return middle - start, time.perf_counter() - middle


def add_masks(file: Path, key: str | None) -> None:
    """Give each entry the ellipse in its box as a mask."""
    import numpy as np
    from pycocotools import mask as coco_mask

    content = json.loads(file.read_text())
    turn = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    for entry in content[key] if key else content:
        x, y, w, h = entry["bbox"]
        outline = np.column_stack([x + w / 2 * (1 + np.cos(turn)), y + h / 2 * (1 + np.sin(turn))])
        rle: Any = coco_mask.merge(coco_mask.frPyObjects([outline.ravel().tolist()], 480, 640))
        entry["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
    file.write_text(json.dumps(content))
