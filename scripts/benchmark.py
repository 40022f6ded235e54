"""Measures ours against its peer, interleaved in one run: medians, and peer / ours as ratio (more is better).

    python scripts/benchmark.py loss            # GroupSoftmax against plain cross entropy, forward + backward
    python scripts/benchmark.py data            # AnnotationIndex on annotations like a tenth of LVIS v1 train
    python scripts/benchmark.py data --full     # ... like all of it (1.27 million; needs 10 GB of memory)
    python scripts/benchmark.py train_step      # a step of R50-FPN against torchvision's; GroupSoftmax against softmax
    python scripts/benchmark.py loss --json     # [{case, ours_s, peer, peer_s, ratio, identical}, ...]

Memory is measured in processes of its own; those cases have ours_mb and peer_mb instead of seconds.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bags.errors import UserError, run_script


def main() -> None:
    """Parses the command line; prints a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(BENCHMARKS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--full", action="store_true", help="the full size, where there is one")
    parser.add_argument("--repeats", type=int, default=31, help="interleaved repeats of each case (default 31)")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        raise UserError(f"--repeats {arguments.repeats}: expected 1 or more")
    results = BENCHMARKS[arguments.name](arguments)
    if arguments.json:
        print(json.dumps(results, indent=1))
        return
    print(f"{'case':<50} {'ours':>10} {'peer':>10} {'peer/ours':>9} {'ours/peer':>9}  identical  peer is")
    for r in results:
        if "ours_mb" in r:
            times = f"{r['ours_mb']:>7.1f} MB {r['peer_mb']:>7.1f} MB"
        else:
            times = f"{1e3 * r['ours_s']:>7.2f} ms {1e3 * r['peer_s']:>7.2f} ms"
        ratios = f"{r['ratio']:>9.2f} {1 / r['ratio']:>9.2f}"
        print(f"{r['case']:<50} {times} {ratios}  {r['identical']!s:<9}  {r['peer']}")


def measure(case: str, ours: Callable, peer_name: str, peer: Callable, repeats: int, identical=None) -> dict:
    """Times both in turn, `repeats` times, after two unmeasured calls of each."""
    times: dict[Callable, list[float]] = {ours: [], peer: []}
    for repeat in range(repeats + 2):
        for function in (ours, peer) if repeat % 2 else (peer, ours):
            start = time.perf_counter()
            function()
            if repeat >= 2:
                times[function].append(time.perf_counter() - start)
    ours_s, peer_s = (statistics.median(times[function]) for function in (ours, peer))
    return {"case": case, "ours_s": ours_s, "peer": peer_name, "peer_s": peer_s,
            "ratio": peer_s / ours_s, "identical": identical}  # fmt: skip


def in_mb(case: str, ours: float, peer_name: str, peer: float) -> dict:
    """A result in MB."""
    return {"case": case, "ours_s": None, "ours_mb": ours, "peer": peer_name, "peer_s": None, "peer_mb": peer,
            "ratio": peer / max(ours, 0.1), "identical": None}  # fmt: skip


def in_process(function: Callable, *arguments):
    """Calls a function in a fresh process."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# --------------------------------------------------------------------------- loss


def loss(arguments: argparse.Namespace) -> list[dict]:
    """GroupSoftmax on LVIS-like counts (1,230 categories, 4 groups, a quarter of the proposals foreground)."""
    import torch
    import torch.nn.functional as F

    import bags

    results = []
    counts = [max(1, round(12000 * 0.9935**rank)) for rank in range(1230)]
    classifier = bags.GroupSoftmax(4, bags.assign_groups(counts), others_ratio=8.0)
    for proposals in (512, 8192):
        torch.manual_seed(0)
        foreground = torch.multinomial(torch.tensor(counts, dtype=torch.float), proposals // 4, replacement=True) + 1
        labels = torch.cat([foreground, torch.zeros(proposals - len(foreground), dtype=torch.long)])
        grouped = torch.randn(proposals, 1236, requires_grad=True)
        plain = torch.randn(proposals, 1231, requires_grad=True)

        def ours(logits=grouped, labels=labels):
            return torch.autograd.grad(sum(classifier.loss(logits, labels).values()), logits)

        def peer(logits=plain, labels=labels):
            return torch.autograd.grad(F.cross_entropy(logits, labels), logits)

        case = f"GroupSoftmax loss [{proposals}, 1236]"
        results.append(measure(case, ours, "cross_entropy, 1231", peer, arguments.repeats))
    return results


# --------------------------------------------------------------------------- data


def train_step(arguments: argparse.Namespace) -> list[dict]:
    """Forward, backward and SGD step of Faster R-CNN R50-FPN with 1,230 categories, 2 images of 320 x 480 pixels."""
    import torch
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    from bags.build import build_detector
    from bags.config import config_from_dict, override_config
    from bags.data.statistics import CategoryStats
    from bags.detectors.weights import translate

    torch.manual_seed(0)
    number, device = 1230, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    counts = tuple(int(20000 / rank**1.2) + 1 for rank in range(1, number + 1))
    stats = CategoryStats(tuple(range(1, number + 1)), tuple(map(str, range(number))), counts, counts)
    keys = ["detector.conventions=torchvision", "detector.min_size=320", "detector.max_size=480"]
    config = override_config(config_from_dict({}), keys)
    grouped = override_config(config, ["classifier.name=group_softmax"])
    peer = fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=number + 1, min_size=320, max_size=480
    )
    ours, bags_detector = build_detector(config, stats), build_detector(grouped, stats)
    state = translate(peer.state_dict(), "torchvision").state
    for detector in (ours, bags_detector):
        own = detector.state_dict()
        detector.load_state_dict({**own, **{k: v for k, v in state.items() if v.shape == own[k].shape}})
    corners = torch.rand(2, 8, 2) * 200
    boxes = torch.cat([corners, corners + 20 + torch.rand(2, 8, 2) * 100], 2).to(device)
    targets = [{"boxes": own, "labels": torch.randint(1, number + 1, (8,), device=device)} for own in boxes]
    images = list(torch.rand(2, 3, 320, 480).to(device))

    def step_of(detector: torch.nn.Module) -> Callable:
        detector.to(device).train()
        optimizer = torch.optim.SGD(detector.parameters(), lr=1e-5, momentum=0.9)

        def step() -> dict:
            torch.manual_seed(1)
            losses = detector(images, targets)
            optimizer.zero_grad(set_to_none=True)
            sum(losses.values()).backward()
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return losses

        return step

    ours_step, peer_step, grouped_step = map(step_of, (ours, peer, bags_detector))
    first, second = ours_step(), peer_step()
    same = all(torch.allclose(first[key], second[key], rtol=1e-5) for key in second)
    repeats = arguments.repeats
    return [
        measure("Softmax, Faster R-CNN R50-FPN", ours_step, "torchvision's own model", peer_step, repeats, same),
        measure("GroupSoftmax, Faster R-CNN R50-FPN", grouped_step, "our Softmax", ours_step, repeats),
    ]


def data(arguments: argparse.Namespace) -> list[dict]:
    """Opening annotations, and what they cost in memory, against the JSON as Python objects."""
    from bags.data.index import AnnotationIndex

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.json")
        write_lvis_like(path, 1_270_141 if arguments.full else 127_014)
        first, parsed = in_process(build_index, path), in_process(parse_json, path)
        ours = AnnotationIndex.open(path)
        peer_name, load = peer_loader()
        identical = same_content(ours, load(path))
        repeats = 3 if arguments.full else min(arguments.repeats, 7)
        opened = measure("open from cache", lambda: AnnotationIndex.open(path), peer_name, lambda: load(path), repeats)
        flat, listed = in_process(worker_memory, path, "index"), in_process(worker_memory, path, "list")
    return [
        {**opened, "identical": identical},
        {"case": "first build, time", "ours_s": first["s"], "peer": "json.load", "peer_s": parsed["s"],
         "ratio": parsed["s"] / first["s"], "identical": None},
        in_mb("first build, peak memory", first["mb"], "json.load", parsed["mb"]),
        in_mb("loader worker, private memory after epoch 1", flat[0], "list of dicts", listed[0]),
        in_mb("loader worker, private memory after epoch 3", flat[-1], "list of dicts", listed[-1]),
    ]  # fmt: skip


def write_lvis_like(path: Path, annotations: int) -> None:
    """Random annotations with LVIS v1's proportions: 12.7 an image, polygons of some 25 points, 1,203 categories."""
    import numpy as np

    rng = np.random.default_rng(0)
    images = annotations * 10 // 127
    categories = [{"id": c, "name": f"category {c}", "frequency": "f", "instance_count": 1, "image_count": 1}
                  for c in range(1, 1204)]  # fmt: skip
    entries = [{"id": i + 1, "width": 640, "height": 480, "coco_url": f"http://x.org/train2017/{i:012d}.jpg",
                "neg_category_ids": [], "not_exhaustive_category_ids": []} for i in range(images)]  # fmt: skip
    with path.open("w") as file:
        file.write(f'{{"images": {json.dumps(entries)}, "categories": {json.dumps(categories)}, "annotations": [')
        for k in range(annotations):
            polygon = rng.uniform(0, 480, 2 * int(rng.integers(6, 45))).round(2)
            x, y, w, h = rng.uniform(5, 200, 4).round(2).tolist()
            entry = {"id": k + 1, "image_id": int(rng.integers(images)) + 1, "category_id": int(rng.integers(1203)) + 1,
                     "bbox": [x, y, w, h], "area": round(w * h, 2), "segmentation": [polygon.tolist()]}  # fmt: skip
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
        self.anns, self.img_ann_map = {}, {}
        for annotation in self.dataset["annotations"]:
            self.anns[annotation["id"]] = annotation
            self.img_ann_map.setdefault(annotation["image_id"], []).append(annotation)


def same_content(ours, peer) -> bool:
    """Whether both hold the same boxes and polygons, in float32, for every annotation."""
    import numpy as np

    for k, key in enumerate(ours.annotation_ids.tolist()):
        x, y, w, h = peer.anns[key]["bbox"]
        polygon = np.float32(peer.anns[key]["segmentation"][0])
        same_box = np.array_equal(ours.boxes[k], np.float32([x, y, x + w, y + h]))
        if not (same_box and np.array_equal(ours.segmentation(k)[0].ravel(), polygon)):
            return False
    return len(ours.labels) == len(peer.anns)


def peak(function: Callable) -> dict:
    """Seconds of a call, and how far it raised the process's peak memory, in MB."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status_mb("VmRSS")
    start = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - start
    del result
    return {"s": seconds, "mb": status_mb("VmHWM") - before}


def status_mb(key: str) -> float:
    """A line of /proc/self/status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def build_index(path: Path) -> dict:
    """Time and peak of the first open."""
    from bags.data.index import AnnotationIndex

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
            sum(float(self.index.boxes[k, 0] + self.index.segmentation(k)[0][0, 0]) for k in range(first, last))
        return private_mb() if position % 200 == 199 else 0.0


def private_mb() -> float:
    """Memory of this process that no other shares, in MB, without what it maps from files."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1024


def worker_memory(path: Path, kind: str) -> list[float]:
    """Private memory of a loader worker at its highest in each of three epochs, in MB."""
    from torch.utils.data import DataLoader

    loader = DataLoader(Targets(path, kind), batch_size=200, num_workers=1, persistent_workers=True,
                        multiprocessing_context="fork")  # fmt: skip
    return [max(float(batch.max()) for batch in loader) for _ in range(3)]


BENCHMARKS = {"loss": loss, "train_step": train_step, "data": data}

if __name__ == "__main__":
    run_script(main)
