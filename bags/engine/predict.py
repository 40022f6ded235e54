"""Model and loader -> detections on disk, in COCO/LVIS results format."""

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import orjson
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bags.core import distributed
from bags.core.errors import UserError
from bags.core.files import naming, open_regular, replacing
from bags.core.progress import Progress
from bags.data.samplers import ShardSampler


@torch.inference_mode()
def predict(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device,
    category_ids: tuple[int, ...],
    image_ids: Sequence[int],
    path: Path,
    title: str,
    key: str,
    observe: Callable[[Tensor, dict, dict], Any] | None = None,
) -> list[Any]:
    """Writes `path`: a list of {image_id, category_id, bbox (x, y, width, height in pixels), score, segmentation?}.

    The loader gives each rank its share of the images, in batches of positions that `loader.batch_sampler.start(n)`
    can begin with the n-th of. image_ids: of all positions. Shares are files of their own, one line per image, and
    are merged line by line in rank order. A run that was killed goes on after its last whole batch, if its `key`
    (whatever the results depend on) was the same; the result is then the same file.
    Returns observe(image, target, detection) of this rank's images: plain values, kept in the share.

    The caller holds the lock of the folder. Raises UserError, and leaves `path` as it was, where ranks have different
    keys or where the shares do not have each image exactly once.
    """
    model.eval()
    if len(set(distributed.gather_objects(key))) > 1:
        raise UserError(
            f"{path}: the ranks have read different weights, settings or images, which have just changed on disk: "
            "repeat the command"
        )
    header = orjson.dumps(f"{key} of {distributed.world_size()}", option=orjson.OPT_APPEND_NEWLINE)
    distributed.on_main(lambda: _remove_left_over(path, distributed.world_size()))
    share, sampler = _share(path, distributed.rank()), cast(ShardSampler, loader.batch_sampler)
    plan = [[image_ids[position] for position in batch] for batch in sampler.start(0)]
    batches, observed = _resume(share, header, plan)
    sampler.start(batches)
    with naming(share), share.open("ab") as file:
        bar = Progress(
            loader,
            desc=f"{title}: predict",
            unit="batch",
            initial=batches,
            total=len(plan),
            disable=not distributed.is_main(),
        )
        for images, targets in bar:
            detections = model([image.to(device) for image in images])
            lines = []
            for image, target, detection in zip(images, targets, detections, strict=True):
                observed.append(observe(image, target, detection) if observe else None)
                entries = results_entries(target["image_id"], detection, category_ids)
                line = [target["image_id"], observed[-1], entries]
                lines.append(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
            file.writelines(lines)
            file.flush()
    distributed.barrier()
    distributed.on_main(lambda: _merge(path, header, image_ids, distributed.world_size()))
    return observed


def _share(path: Path, rank: int) -> Path:
    """The file of one rank's results."""
    return path.with_name(f"{path.name}.rank{rank}")


def _remove_left_over(path: Path, ranks: int) -> None:
    """Remove files of a run that was killed and cannot be continued: shares of more ranks, temporary files."""
    name = re.escape(path.name)
    for file in path.parent.iterdir():
        match = re.fullmatch(rf"{name}\.rank(\d+)(\.\w+\.tmp)?|{name}\.\w+\.tmp", file.name)
        if match and (match[1] is None or match[2] or int(match[1]) >= ranks):
            file.unlink(missing_ok=True)


def _resume(share: Path, header: bytes, plan: list[list[int]]) -> tuple[int, list[Any]]:
    """(whole batches in a share, what was observed of their images); the share is cut after them, or begun.

    plan: image ids of each batch. A line that is damaged or of another image ends what is kept. The share becomes
    a new file, so a process that still has the former one open writes nothing into it.
    """
    observed, ends = [], [len(header)]
    with contextlib.suppress(FileNotFoundError), open_regular(share) as file:
        if file.readline() == header:
            for line, image_id in zip(file, itertools.chain.from_iterable(plan), strict=False):
                parsed = _parse(line)
                if parsed is None or parsed[0] != image_id:
                    break
                observed.append(parsed[1])
                ends.append(file.tell())
    whole = [n for n, images in enumerate(itertools.accumulate(map(len, plan), initial=0)) if images <= len(observed)]
    images = sum(map(len, plan[: whole[-1]]))
    with replacing(share, "wb") as new:
        new.write(header)
        if images:
            with open_regular(share) as old:
                _copy(old, new, len(header), ends[images])
    return whole[-1], observed[:images]


def _parse(line: bytes) -> tuple[int, Any, list[dict]] | None:
    """(image id, what was observed, results) of a share's line; None for one that is damaged."""
    try:
        image_id, observed, entries = orjson.loads(line)
        if line.endswith(b"\n") and all(entry["image_id"] == image_id for entry in entries):
            return image_id, observed, entries
    except (ValueError, TypeError, KeyError):
        pass
    return None


def _copy(old: IO[bytes], new: IO[bytes], first: int, last: int) -> None:
    """Copy the bytes first to last of a file."""
    old.seek(first)
    while first < last and (block := old.read(min(last - first, 2**22))):
        new.write(block)
        first += len(block)


def _merge(path: Path, header: bytes, image_ids: Sequence[int], ranks: int) -> None:
    """Write the results file from the shares, which are removed. Raises UserError unless each image is there once."""
    shares = [_share(path, rank) for rank in range(ranks)]
    try:
        with replacing(path, "wb") as file:
            separator, merged = b"[\n", []
            for image_id, entries in itertools.chain.from_iterable(_lines(share, header) for share in shares):
                merged.append(image_id)
                for entry in entries:
                    file.write(separator + orjson.dumps(entry))
                    separator = b",\n"
            file.write(b"[]\n" if separator == b"[\n" else b"\n]\n")
            if sorted(merged) != sorted(image_ids):
                raise _Damaged
    except _Damaged:
        for share in shares:
            share.unlink(missing_ok=True)
        raise UserError(
            f"{path}: its partial results are damaged, or another process has changed them; they are "
            "removed: repeat the command"
        ) from None
    for share in shares:
        share.unlink()


class _Damaged(Exception):
    """A share does not hold what was written into it."""


def _lines(share: Path, header: bytes) -> Iterator[tuple[int, list[dict]]]:
    """(image id, results) of a share's lines. Raises _Damaged for anything else."""
    try:
        with open_regular(share) as file:
            if file.readline() != header:
                raise _Damaged
            for line in file:
                parsed = _parse(line)
                if parsed is None:
                    raise _Damaged
                yield parsed[0], parsed[2]
    except FileNotFoundError:
        raise _Damaged from None


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
