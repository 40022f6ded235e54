"""Annotations of LVIS's size: opening them, and their memory in loader processes."""

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.benchmarks.measuring import in_mb, in_process, measure, peak


def data(arguments: argparse.Namespace) -> list[dict]:
    """Opening annotations, and what they cost in memory, against the JSON as Python objects."""
    from bags.data.index import AnnotationIndex

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.json")
        write_lvis_like(path, 1_270_141 if arguments.full else 127_014)
        pairs = [(in_process(build_index, path), in_process(parse_json, path)) for _ in range(3)]  # in turn
        first, parsed = (
            {key: statistics.median(one[key] for one in side) for key in ("s", "mb")}
            for side in zip(*pairs, strict=True)
        )
        ours = AnnotationIndex.open(path)
        peer_name, load = peer_loader()
        identical = same_content(ours, load(path))
        repeats = 3 if arguments.full else min(arguments.repeats, 7)
        opened = measure("open from cache", lambda: AnnotationIndex.open(path), peer_name, lambda: load(path), repeats)
        flat, listed = in_process(worker_memory, path, "index"), in_process(worker_memory, path, "list")
    return [
        {**opened, "identical": identical},
        {
            "case": "first build, time",
            "ours_s": first["s"],
            "peer": "json.load",
            "peer_s": parsed["s"],
            "ratio": parsed["s"] / first["s"],
            "identical": None,
        },
        in_mb("first build, peak memory", first["mb"], "json.load", parsed["mb"]),
        in_mb("loader worker, private memory after epoch 1", flat[0], "list of dicts", listed[0]),
        in_mb("loader worker, private memory after epoch 3", flat[-1], "list of dicts", listed[-1]),
    ]


def write_lvis_like(path: Path, annotations: int) -> None:
    """Random annotations with LVIS v1's proportions: 12.7 an image, polygons of some 25 points, 1,203 categories."""
    import numpy as np

    rng = np.random.default_rng(0)
    images = annotations * 10 // 127
    categories = [
        {"id": c, "name": f"category {c}", "frequency": "f", "instance_count": 1, "image_count": 1}
        for c in range(1, 1204)
    ]
    entries = [
        {
            "id": i + 1,
            "width": 640,
            "height": 480,
            "coco_url": f"http://x.org/train2017/{i:012d}.jpg",
            "neg_category_ids": [],
            "not_exhaustive_category_ids": [],
        }
        for i in range(images)
    ]
    with path.open("w") as file:
        file.write(f'{{"images": {json.dumps(entries)}, "categories": {json.dumps(categories)}, "annotations": [')
        for k in range(annotations):
            polygon = rng.uniform(0, 480, 2 * int(rng.integers(6, 45))).round(2)
            x, y, w, h = rng.uniform(5, 200, 4).round(2).tolist()
            entry = {
                "id": k + 1,
                "image_id": int(rng.integers(images)) + 1,
                "category_id": int(rng.integers(1203)) + 1,
                "bbox": [x, y, w, h],
                "area": round(w * h, 2),
                "segmentation": [polygon.tolist()],
            }
            file.write((", " if k else "") + json.dumps(entry))
        file.write("]}")


def peer_loader() -> tuple[str, Callable]:
    """The official LVIS class where it can be imported, else what it does on opening."""
    try:
        from lvis import LVIS

        return "lvis.LVIS(json)", LVIS
    except ImportError:
        return "json.load and dicts by id, as lvis.LVIS", JsonAndDicts


class JsonAndDicts:
    """`json.load`, then the dictionaries that `lvis.LVIS` makes."""

    def __init__(self, path: Path):
        with path.open() as file:
            self.dataset = json.load(file)
        self.imgs = {image["id"]: image for image in self.dataset["images"]}
        self.cats = {category["id"]: category for category in self.dataset["categories"]}
        self.anns: dict[int, dict] = {}
        self.img_ann_map: dict[int, list[dict]] = {}
        for annotation in self.dataset["annotations"]:
            self.anns[annotation["id"]] = annotation
            self.img_ann_map.setdefault(annotation["image_id"], []).append(annotation)


def same_content(ours: Any, peer: Any) -> bool:
    """Whether both hold the same boxes and polygons, in float32, for every annotation."""
    import numpy as np

    for k, key in enumerate(ours.annotation_ids.tolist()):
        x, y, w, h = peer.anns[key]["bbox"]
        polygon = np.array(peer.anns[key]["segmentation"][0], np.float32)
        same_box = np.array_equal(ours.boxes[k], np.array([x, y, x + w, y + h], np.float32))
        if not (same_box and np.array_equal(ours.segmentation(k)[0].ravel(), polygon)):
            return False
    return len(ours.labels) == len(peer.anns)


def build_index(path: Path) -> dict:
    """Time and peak of an open that finds no index."""
    from bags.data.index import AnnotationIndex, _cache_folders

    for folder in _cache_folders(path):
        shutil.rmtree(folder, ignore_errors=True)
    return peak(lambda: AnnotationIndex.open(path))


def parse_json(path: Path) -> dict:
    """Time and peak of json.load."""
    with path.open() as file:
        return peak(lambda: json.load(file))


class Targets:
    """A dataset that reads all annotations of an image, from the index or from lists of dicts.

    Now and then an item is the private memory of the process that made it, in MB; else it is 0.
    """

    def __init__(self, path: Path, kind: str):
        from bags.data.index import AnnotationIndex

        self.index = AnnotationIndex.open(path)
        self.images = list(JsonAndDicts(path).img_ann_map.values()) if kind == "list" else None

    def __len__(self) -> int:
        return len(self.index) if self.images is None else len(self.images)

    def __getitem__(self, position: int) -> float:
        if self.images is not None:
            sum(a["bbox"][0] + a["segmentation"][0][0] for a in self.images[position])
        else:
            first, last = self.index.starts[position : position + 2]
            shapes: list[Any] = [self.index.segmentation(k) for k in range(first, last)]
            sum(float(box[0] + shape[0][0, 0]) for box, shape in zip(self.index.boxes[first:last], shapes, strict=True))
        return private_mb() if position % 200 == 199 else 0.0


def private_mb() -> float:
    """Memory of this process that no other shares, in MB, without what it maps from files."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1024


def worker_memory(path: Path, kind: str) -> list[float]:
    """Private memory of a loader worker at its highest in each of three epochs, in MB."""
    from torch.utils.data import DataLoader

    targets: Any = Targets(path, kind)
    loader: DataLoader = DataLoader(
        targets, batch_size=200, num_workers=1, persistent_workers=True, multiprocessing_context="fork"
    )
    return [max(float(batch.max()) for batch in loader) for _ in range(3)]
