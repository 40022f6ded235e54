"""Index and image folder -> (image, target)."""

import contextlib
import functools
import io
import multiprocessing.queues
import os
import pickle
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from bags.core import distributed
from bags.core.errors import UnreadableImage, UserError
from bags.data.images import MAX_PIXELS, MissingImage, check_pixels, image_path, name_hint, open_image, read_image
from bags.data.index import AnnotationIndex, inside_image
from bags.data.transforms import training_transform

SHARED_MEMORY = "/dev/shm"
LITTLE = 2**30  # bytes
LEAST_LEFT = 1  # pixel of width and of height of an object that is cropped
OF_OBJECTS = ("boxes", "labels", "masks")  # tensors of a target that have a row for each object
FILES = 8  # that a loader process needs to be heard, in itself and in the main one
OF_MAIN_PROCESS = (signal.SIGTERM, signal.SIGINT)  # what loader processes leave to it


class DetectionDataset(Dataset):
    """Items are (image, target).

    image   float32 [3, H, W], RGB in 0..1
    target  boxes float32 [K, 4] (x1, y1, x2, y2 pixels, inside the image, at least 1e-3 wide and
            high before any resizing), labels int64 [K] in 1..C, image_id int; with `masks` also masks uint8 [K, H, W],
            with `semantic` also semantic uint8 [H, W]. Crowd regions are left out.

    transform: see `training_transform`; None leaves images as they are. exif: turn images as their EXIF
    orientation says (COCO's annotations ignore it). masks: objects without a segmentation are left out too.
    semantic: folder of label maps, a PNG named as each image (with or without the image's folder): labels
    0 .. semantic_classes-1, and 255 for none. max_bad: for an image that cannot be read the next one stands in, with
    target["unread"], [what was wrong]; more than max_bad of them in a row raise UserError, as does the first for 0.
    max_pixels: of an image; a larger one cannot be read (see `read_image`). crops: the transform also crops, so it gets
    the masks, too; objects of which less than a pixel of width, of height or of the mask is left are left out.
    """

    def __init__(
        self,
        index: AnnotationIndex,
        image_folder: str | Path,
        transform: v2.Transform | None = None,
        masks: bool = False,
        exif: bool = False,
        semantic: Path | None = None,
        semantic_classes: int = 183,
        max_bad: int = 0,
        max_pixels: int = MAX_PIXELS,
        crops: bool = False,
    ):
        self.crops = crops
        self.max_bad, self.max_pixels = max_bad, max_pixels
        self.index, self.folder = index, Path(image_folder)
        self.transform = transform or training_transform()
        self.masks, self.exif = masks, exif
        self.semantic, self.semantic_classes = semantic, semantic_classes
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such image folder; set data.root or data.*_images")
        if semantic and not semantic.is_dir():
            raise UserError(f"{semantic}: no such folder of label maps; set data.root or data.train_semantic")

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: int | tuple[int, ...]) -> tuple[Tensor, dict]:
        """`key` is a position, or (position, seed); augmentation depends only on the seed.

        (position, seed, label), as `ClassBalancedSampler` draws, is the image with the objects of that label only.
        """
        position, seed, *drawn = key if isinstance(key, tuple) else (key, 0)
        unread: list[str] = []
        while True:
            try:
                image, target = self._item(position, seed)
                if drawn:
                    target = _some(target, target["labels"] == drawn[0])
                return image, target | ({"unread": unread} if unread else {})
            except UnreadableImage as error:
                unread.append(str(error))
                if not self.max_bad:
                    raise
                if len(unread) > self.max_bad:
                    raise too_many(str(error), self.max_bad) from None
            position = (position + 1) % len(self)

    def _item(self, position: int, seed: int) -> tuple[Tensor, dict]:
        image, target, kept = self._read(position)
        width, height = image.size
        # One box more than there are objects tells where the left half of the image went.
        boxes = torch.cat([target["boxes"], torch.tensor([[0, 0, width / 2, height]])])
        boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width))
        maps = [self._label_map(self.semantic, position, (height, width))] if self.semantic else []
        if self.crops:
            maps = [labels + 1 for labels in maps]  # uint8: 255 becomes 0, with which masks are padded
            maps += [self._masks(kept, (height, width), (height, width), False)] if self.masks else []
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            image, boxes, *maps = self.transform(image, boxes, *map(tv_tensors.Mask, maps))
        boxes = boxes.as_subclass(Tensor)
        maps = [masks.as_subclass(Tensor) for masks in maps]
        target["boxes"] = boxes[:-1]
        if self.masks and self.crops:
            target["masks"] = maps.pop()
        elif self.masks:
            mirrored = bool(boxes[-1, 0] > 0)
            target["masks"] = self._masks(kept, (height, width), tuple(image.shape[1:]), mirrored)
        if maps:
            target["semantic"] = maps[0][0] - 1 if self.crops else maps[0][0]
        return image.as_subclass(Tensor), _left(target) if self.crops else target

    def read(self, position: int) -> tuple[Image.Image, dict]:
        """The RGB image and its target (without masks), before any transform."""
        return self._read(position)[:2]

    def _read(self, position: int) -> tuple[Image.Image, dict, np.ndarray]:
        """Image, target, and the annotations (positions in the index) of its objects."""
        return self._image(position), *self._target(position)

    def target(self, position: int) -> dict:
        """The target (without masks) of an image that is not read."""
        return self._target(position)[0]

    def objects(self, position: int) -> np.ndarray:
        """The annotations of an image's objects, positions in the index, in the order of its target."""
        return self._target(position)[1]

    def _target(self, position: int) -> tuple[dict, np.ndarray]:
        first, last = self.index.starts[position : position + 2]
        boxes, kept = inside_image(self.index.boxes[first:last], self.index.image_sizes[position])
        kept &= ~self.index.crowd[first:last]
        if self.masks:
            kept &= np.array([self.index.segmentation(a) is not None for a in range(first, last)], bool)
        annotations = first + np.flatnonzero(kept)
        target = {
            "boxes": torch.from_numpy(boxes[kept]),
            "labels": torch.from_numpy(self.index.labels[annotations]),
            "image_id": int(self.index.image_ids[position]),
        }
        return target, annotations

    def _image(self, position: int) -> Image.Image:
        path = self.index.image_path(self.folder, position)
        height, width = self.index.image_sizes[position].tolist()

        def check(size: tuple[int, int], turned: bool = False) -> None:
            """Refuses an image of another size."""
            if size != (width, height) and not (turned and size == (height, width)):
                raise UnreadableImage(
                    f"{path}: {size[0]} x {size[1]} pixels, but {self.index.path.name} says "
                    f"{width} x {height} for image {self.index.image_ids[position]}; "
                    "scripts/prepare_data.py check lists all such images"
                )

        try:
            image = read_image(path, self.exif, self.max_pixels, lambda size: check(size, turned=self.exif))
        except MissingImage as error:
            raise UnreadableImage(f"{error}{name_hint(self.folder, self.index.file_name(position))}") from None
        check(image.size)
        return image

    def _label_map(self, folder: Path, position: int, size: tuple[int, int]) -> Tensor:
        """Labels of an image's pixels, uint8 [1, H, W]; size is (height, width)."""
        name = self.index.file_name(position)
        paths = [image_path(folder, candidate).with_suffix(".png") for candidate in (name, Path(name).name)]
        path = next((path for path in paths if path.exists()), paths[0])
        try:
            with open_image(path, self.max_pixels) as image:
                check_pixels(path, image, self.max_pixels)
                labels = np.array(image)
        except MissingImage:
            mend = "data.train_semantic names the folder; null paints the maps from the masks"
            raise UnreadableImage(f"{path}: no such label map; {mend}") from None
        if labels.shape != size or labels.dtype != np.uint8:
            expected = f"data.train_semantic: expected a grey 8-bit PNG of {size[1]} x {size[0]} pixels"
            raise UserError(f"{path}: {expected}; got {labels.dtype} of shape {labels.shape}")
        highest = int(labels[labels != 255].max(initial=0))
        if highest >= self.semantic_classes:
            raise UserError(f"{path}: label {highest}, but data.semantic_classes is {self.semantic_classes}")
        return torch.from_numpy(labels)[None]

    def _masks(self, annotations: np.ndarray, old: tuple[int, int], new: tuple[int, int], mirrored: bool) -> Tensor:
        """Masks of annotations at the final size, uint8 [K, H, W]; sizes are (height, width)."""
        masks = np.zeros((len(annotations), *new), np.uint8)
        scale = np.array([new[1] / old[1], new[0] / old[0]])
        for k, annotation in enumerate(annotations):
            shape = self.index.segmentation(annotation)
            assert shape is not None  # as `_target` has seen to
            if isinstance(shape, bytes):
                mask = coco_mask.decode({"size": list(old), "counts": shape})
                if old != new:
                    mask = np.asarray(Image.fromarray(mask).resize(new[::-1], Image.Resampling.NEAREST))
            else:
                polygons = [(polygon * scale).ravel().tolist() for polygon in shape]
                mask = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *new)))
            masks[k] = mask[:, ::-1] if mirrored else mask
        return torch.from_numpy(masks)


def _left(target: dict) -> dict:
    """A target without the objects that cropping and shrinking have taken away."""
    sides = target["boxes"][:, 2:] - target["boxes"][:, :2]
    left = (sides >= LEAST_LEFT).all(1)
    if "masks" in target:
        left &= target["masks"].bool().flatten(1).any(1)
    return _some(target, left)


def _some(target: dict, kept: Tensor) -> dict:
    """A target with some of its N objects; kept: bool [N]."""
    return target | {key: target[key][kept] for key in OF_OBJECTS if key in target}


def collate(items: list[tuple[Tensor, dict]]) -> tuple[list[Tensor], list[dict]]:
    """A batch as torchvision's detectors take it: images of any sizes, targets."""
    images, targets = zip(*items, strict=True)
    return list(images), list(targets)


def obey_parent_only(_worker: int) -> None:
    """Leave SIGTERM and SIGINT to the main process, in a loader process.

    A signal to the whole process group then lets the main process finish its step and save. Only the SIGTERM of the
    main process itself, with which torch ends a loader process that does not answer, has its effect.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, OF_MAIN_PROCESS)
    parent = os.getppid()

    def wait_for_parent() -> None:
        """End this process when its parent says so."""
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        threading.Thread(target=wait_for_parent, daemon=True).start()


class Loader(DataLoader):
    """torch's loader; what happens in its processes comes out as one clear error, and a process that fails ends.

    Images that others stand in for (see DetectionDataset) are counted and named on stderr; more than
    `dataset.max_bad` of them raise UserError. Little shared memory, through which the processes hand over batches,
    is said on stderr.
    """

    def __init__(self, dataset: Dataset, collate_fn: Callable = collate, num_workers: int = 0, **settings: Any) -> None:
        self.bad: set[str] = set()  # what was wrong with the images that others stood in for
        if num_workers:
            collate_fn = functools.partial(_join_shared, collate_fn)
            begin = settings.get("worker_init_fn") or obey_parent_only
            settings["worker_init_fn"] = functools.partial(_begin_process, begin)
            if distributed.is_main():
                _note_little_shared_memory(num_workers)
        super().__init__(dataset, collate_fn=collate_fn, num_workers=num_workers, **settings)

    def _start(self) -> Iterator:
        """torch's iterator. Its processes begin with the signals blocked that `obey_parent_only` is about."""
        former = signal.pthread_sigmask(signal.SIG_BLOCK, OF_MAIN_PROCESS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)

    def __iter__(self) -> Iterator:  # type: ignore[override]  # a generator around torch's own iterator
        try:
            _need_files(FILES * self.num_workers)
            for batch in self._start():
                self._count(batch[1])
                yield batch
        except (EOFError, ConnectionError) as error:
            if not self.num_workers:
                raise
            # A process that ends while it hands over a batch; torch sees by itself only one that has ended.
            raise RuntimeError("DataLoader worker exited unexpectedly while it handed over a batch") from error
        except (UserError, OSError, MemoryError) as error:
            message = str(error)
            if message.startswith("Caught "):  # in a loader process: its traceback is the message
                raise type(error)(message.strip().splitlines()[-1].partition(": ")[2]) from None
            if isinstance(error, OSError) and self.num_workers and error.filename is None:
                where = "of loader processes, or of their semaphores in shared memory"
                raise OSError(error.errno, f"{error.strerror}: {where}", SHARED_MEMORY) from error
            raise

    def _count(self, targets: list[dict]) -> None:
        """Takes `unread` out of targets. Raises UserError where there are too many."""
        for reason in (reason for target in targets for reason in target.pop("unread", ())):
            if reason in self.bad:
                continue
            self.bad.add(reason)
            count, most = len(self.bad), getattr(self.dataset, "max_bad", 0)
            if count > most:
                raise too_many(reason, most)
            print(f"warning: {reason}; another image stands in ({count} of at most {most})", file=sys.stderr)


def _join_shared(join: Callable, items: list) -> Any:
    """A joined batch whose tensors are in shared memory.

    torch would move them there in a thread that hands over the batch. Where that fails, it drops the batch, and the
    main process waits for ever.
    """
    batch, nowhere = join(items), io.BytesIO()
    sharing = _Sharing(nowhere)
    sharing.dump(batch)
    _need_files(sharing.tensors + FILES)  # that thread opens one more for each tensor
    return batch


def _need_files(number: int) -> None:
    """Raise OSError where this process cannot open so many more files."""
    with contextlib.ExitStack() as spare:
        for _ in range(number):
            spare.callback(os.close, os.open(os.devnull, os.O_RDONLY))


class _Sharing(pickle.Pickler):
    """Moves all tensors that it meets to shared memory, and writes the rest to a file that nobody reads."""

    tensors = 0

    def persistent_id(self, value: object) -> bool | None:
        """Not None for what is not to be written."""
        if not isinstance(value, Tensor):
            return None
        value.share_memory_()
        self.tensors += 1
        return True


def _begin_process(begin: Callable[[int], None] | None, number: int) -> None:
    """Prepare a loader process: errors in its threads end it, and so does the end of its parent; then call `begin`."""

    def end(error: BaseException) -> None:
        """Says what happened, and ends the process without waiting for its threads."""
        print(f"loader process {number}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)

    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(  # type: ignore[attr-defined]
        lambda error, _: end(error)
    )
    sys.excepthook = lambda _, error, __: end(error)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if begin:
        begin(number)


def _end_with_parent() -> None:
    """End this process with its parent. torch's own watchdog never sees a parent that ended before its first look."""
    parent = multiprocessing.parent_process()
    while parent and os.getppid() == parent.pid:
        time.sleep(1)
    os._exit(1)


@functools.cache
def _note_little_shared_memory(workers: int) -> None:
    """Say once how little shared memory there is, and what to do."""
    if os.path.isdir(SHARED_MEMORY) and (free := shutil.disk_usage(SHARED_MEMORY).free) < LITTLE:
        note = f"{SHARED_MEMORY} has only {free / 2**20:.0f} MB for the batches of data.workers={workers} processes"
        mend = "give it more (docker run --shm-size=2g), or set data.workers=0, which needs none"
        print(f"note: {note}: if it becomes full, {mend}", file=sys.stderr)


def too_many(reason: str, most: int) -> UnreadableImage:
    """The error of one unreadable image too many."""
    return UnreadableImage(f"{reason}; with it there are more than data.max_bad_images={most} unreadable images")
