"""Model and loader -> detections on disk, in COCO/LVIS results format."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from bags import distributed
from bags.files import naming, replacing


@torch.inference_mode()
def predict(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device,
    category_ids: tuple[int, ...],
    path: Path,
    title: str,
    key: str,
    observe: Callable[[Tensor, dict, dict], Any] | None = None,
) -> list[Any]:
    """Writes `path`: a list of {image_id, category_id, bbox (x, y, width, height in pixels), score, segmentation?}.

    The loader gives each rank its share of the images, in batches that `loader.batch_sampler.start(n)` can
    begin with the n-th of. Shares are files of their own, one line per image, and are merged line by line in rank
    order. A run that was killed goes on after its last whole batch, if its `key` (whatever the results
    depend on) was the same; the result is then the same file.
    Returns observe(image, target, detection) of this rank's images: plain values, kept in the share.
    """
    model.eval()
    part = path.with_name(f"{path.name}.rank{distributed.rank()}")
    sampler: Any = loader.batch_sampler
    sizes = [len(batch) for batch in sampler.start(0)]
    batches, observed = _resume(part, f"{key} of {distributed.world_size()}", sizes)
    sampler.start(batches)
    with naming(part), part.open("ab") as file:
        bar = tqdm(loader, desc=f"{title}: predict", unit="batch", initial=batches, total=len(sizes),
                   disable=not distributed.is_main())  # fmt: skip
        for images, targets in bar:
            detections = model([image.to(device) for image in images])
            lines = []
            for image, target, detection in zip(images, targets, detections, strict=True):
                observed.append(observe(image, target, detection) if observe else None)
                entries = results_entries(target["image_id"], detection, category_ids)
                lines.append(orjson.dumps([observed[-1], entries], option=orjson.OPT_APPEND_NEWLINE))
            file.writelines(lines)
            file.flush()
    distributed.barrier()
    if distributed.is_main():
        _merge([path.with_name(f"{path.name}.rank{rank}") for rank in range(distributed.world_size())], path)
    distributed.barrier()
    return observed


def _resume(part: Path, key: str, sizes: list[int]) -> tuple[int, list[object]]:
    """(whole batches in a share, what was observed of their images); the share is cut after them, or begun.

    sizes: images of each batch.
    """
    header, observed, ends = orjson.dumps(key, option=orjson.OPT_APPEND_NEWLINE), [], []
    if part.exists():
        with part.open("rb") as file:
            if file.readline() == header:
                ends.append(file.tell())
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    try:
                        observed.append(orjson.loads(line)[0])
                    except (ValueError, TypeError, IndexError):
                        break  # written when the run was killed
                    ends.append(file.tell())
    if not ends:
        part.write_bytes(header)
        return 0, []
    whole = [n for n, images in enumerate(itertools.accumulate(sizes, initial=0)) if images <= len(observed)][-1]
    images = sum(sizes[:whole])
    os.truncate(part, ends[images])
    return whole, observed[:images]


def _merge(parts: list[Path], path: Path) -> None:
    """Writes the results file from the shares, which are removed."""
    with replacing(path, "wb") as file:
        separator = b"[\n"
        for share in parts:
            with share.open("rb") as lines:
                next(lines)  # the key
                for entry in (entry for line in lines for entry in orjson.loads(line)[1]):
                    file.write(separator + orjson.dumps(entry))
                    separator = b",\n"
        file.write(b"[]\n" if separator == b"[\n" else b"\n]\n")
    for share in parts:
        share.unlink()


def results_entries(image_id: int, detection: dict[str, Tensor], category_ids: tuple[int, ...]) -> list[dict]:
    """One image's detections (labels 1..C) as results-file entries; `rles` are its masks, if it has any."""
    boxes = detection["boxes"].double().cpu().numpy()
    boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).round(3).tolist()
    labels, scores = detection["labels"].tolist(), detection["scores"].tolist()
    entries = [
        {"image_id": image_id, "category_id": category_ids[label - 1], "bbox": box, "score": score}
        for box, label, score in zip(boxes, labels, scores, strict=True)
    ]
    for entry, rle in zip(entries, detection.get("rles", ()), strict=False):
        entry["segmentation"] = rle
    return entries
