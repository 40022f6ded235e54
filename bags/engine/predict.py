"""Model and loader -> detections on disk, in COCO/LVIS results format."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from bags import distributed


@torch.inference_mode()
def predict(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device,
    category_ids: tuple[int, ...],
    path: Path,
    title: str,
    observe: Callable[[Tensor, dict, dict], None] | None = None,
) -> None:
    """Writes `path`: a list of {image_id, category_id, bbox (x, y, width, height in pixels), score}.

    observe(image, target, detection) sees every image of this rank's share.
    The loader gives each rank its share; shares are merged by the main process, in rank order.
    """
    model.eval()
    part = path.with_name(f"{path.name}.rank{distributed.rank()}")
    with part.open("w") as file:
        for images, targets in tqdm(loader, desc=f"{title}: predict", unit="batch", disable=not distributed.is_main()):
            detections = model([image.to(device) for image in images])
            for image, target, detection in zip(images, targets, detections, strict=True):
                if observe:
                    observe(image, target, detection)
                for entry in results_entries(target["image_id"], detection, category_ids):
                    file.write(json.dumps(entry) + "\n")
    distributed.barrier()
    if distributed.is_main():
        parts = [path.with_name(f"{path.name}.rank{rank}") for rank in range(distributed.world_size())]
        temporary = path.with_suffix(".tmp")
        with temporary.open("w") as file:
            separator = "[\n"
            for share in parts:
                for line in share.open():
                    file.write(separator + line.rstrip("\n"))
                    separator = ",\n"
            file.write("[]\n" if separator == "[\n" else "\n]\n")
        os.replace(temporary, path)
        for share in parts:
            share.unlink()
    distributed.barrier()


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
