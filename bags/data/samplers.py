"""Which images, in which order, on which rank."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from bags.core import distributed
from bags.core.errors import UserError
from bags.data.index import AnnotationIndex


class TrainSampler:
    """Batches of (position, seed), as DetectionDataset takes them; every image once per epoch.

    A batch holds images of one shape (wide or not), so that little is padded. Each shape's last batch
    is filled up from the first images of the epoch's order. Rank r of W takes every W-th image of each
    batch. Order and batches depend only on seed and epoch, not on the number of ranks.

    wide: [size] bool per image; None takes all images as of one shape. Raises UserError where
    batch_size (images, over all ranks) does not divide by the ranks.
    """

    def __init__(self, size: int, batch_size: int, seed: int, wide: Sequence[bool] | np.ndarray | None = None):
        if batch_size % distributed.world_size():
            ranks = distributed.world_size()
            raise UserError(
                f"train.batch_size={batch_size} does not divide by {ranks} ranks: choose a multiple of {ranks}"
            )
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.wide = np.zeros(size, bool) if wide is None else np.asarray(wide, bool)
        self.epoch = self.first_batch = 0

    def start(self, epoch: int, first_batch: int = 0) -> None:
        """Chooses the epoch and the first batch of the next iteration (for resuming)."""
        self.epoch, self.first_batch = epoch, first_batch

    def __len__(self) -> int:
        return self.batches_in(self.epoch) - self.first_batch

    def batches_in(self, epoch: int) -> int:
        """Batches of an epoch, over all ranks."""
        wide = int(self.wide[self.positions(self._generator(epoch))].sum())
        total = self.length(epoch)
        return sum(-(-count // self.batch_size) for count in (wide, total - wide))

    def length(self, epoch: int) -> int:
        """Images of an epoch, before batches are filled up."""
        return len(self.positions(self._generator(epoch)))

    def positions(self, generator: torch.Generator) -> Tensor:
        """The images of one epoch, in ascending order, repeated as often as they occur."""
        return torch.arange(self.size)

    def _generator(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 100_003 + epoch)

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        for batch in self._batches()[self.first_batch :]:
            yield batch[distributed.rank() :: distributed.world_size()]

    def _batches(self) -> list[list[tuple[int, ...]]]:
        generator = self._generator(self.epoch)
        positions = self.positions(generator)
        order = positions[torch.randperm(len(positions), generator=generator)].tolist()
        shapes = [[p for p in order if self.wide[p] == shape] for shape in (False, True)]
        missing = {p: -len(shape) % self.batch_size for p, shape in enumerate(shapes)}
        for p, shape in enumerate(shapes):  # both shapes' fillers come last
            order += (shape * (missing[p] // max(len(shape), 1) + 1))[: missing[p]] if shape else []
        seeds = torch.randint(2**31, (len(order),), generator=generator).tolist()
        batches: list[list[tuple[int, ...]]] = []
        open_batches: dict[bool, list[tuple[int, ...]]] = {False: [], True: []}
        for key in zip(order, seeds, strict=True):
            batch = open_batches[bool(self.wide[key[0]])]
            batch.append(key)
            if len(batch) == self.batch_size:
                batches.append(batch.copy())
                batch.clear()
        return batches


class RepeatFactorSampler(TrainSampler):
    """Images repeated by their rarest category (Gupta et al. 2019; Table 1, models (4) and (5)).

    factors: [size] float >= 1, see `repeat_factors`. An image with factor r occurs floor(r) times,
    and once more with the probability of its fraction, drawn anew in every epoch.
    """

    def __init__(self, factors: Tensor, batch_size: int, seed: int, wide: Sequence[bool] | np.ndarray | None = None):
        super().__init__(len(factors), batch_size, seed, wide)
        self.factors = factors

    def positions(self, generator: torch.Generator) -> Tensor:
        """See the class."""
        return torch.repeat_interleave(torch.arange(self.size), stochastic_round(self.factors, generator))


class ClassBalancedSampler(TrainSampler):
    """Batches of (position, seed, label): categories in turn, and for each an image that holds one (SimCal, cRT).

    The categories that occur come in random order, all of them once before any comes again; the image of each is
    drawn anew. An epoch has as many batches as one over all images.
    """

    def __init__(self, index: AnnotationIndex, batch_size: int, seed: int):
        super().__init__(len(index), batch_size, seed)
        trained = index.trained
        labels, owners = index.labels[trained], index.owners[trained]
        pairs = np.unique(labels.astype(np.int64) * len(index) + owners)
        self.labels, first = np.unique(pairs // len(index), return_index=True)
        self.images = np.split(pairs % len(index), first[1:])

    def batches_in(self, epoch: int) -> int:
        """The same in every epoch."""
        return -(-self.size // self.batch_size)

    def _batches(self) -> list[list[tuple[int, ...]]]:
        generator = self._generator(self.epoch)
        number = self.batches_in(self.epoch) * self.batch_size
        rounds = -(-number // len(self.labels))
        turns = torch.cat([torch.randperm(len(self.labels), generator=generator) for _ in range(rounds)])[:number]
        shares = torch.rand(number, generator=generator, dtype=torch.float64).tolist()
        seeds = torch.randint(2**31, (number,), generator=generator).tolist()
        keys: list[tuple[int, ...]] = [
            (int(self.images[turn][int(share * len(self.images[turn]))]), seed, int(self.labels[turn]))
            for turn, share, seed in zip(turns.tolist(), shares, seeds, strict=True)
        ]
        return [keys[first : first + self.batch_size] for first in range(0, number, self.batch_size)]


def stochastic_round(factors: Tensor, generator: torch.Generator) -> Tensor:
    """Whole numbers whose expectation is `factors`, int64."""
    whole = factors.trunc()
    return (whole + (torch.rand(len(factors), generator=generator) < factors - whole)).long()


def repeat_factors(index: AnnotationIndex, threshold: float, released: bool = False) -> Tensor:
    """How often each image is shown per epoch in the mean, float32 [images].

    r(c) = max(1, sqrt(threshold / f(c))), f(c) the fraction of images with category c; an image takes
    the largest r of its categories, 1 without any. Only objects that train count (`AnnotationIndex.trained`).
    released: the paper's code adds ceil(r) copies to every image with r > 1, which so occurs
    1 + ceil(r) times.
    """
    trained = index.trained
    labels, owners = index.labels[trained], index.owners[trained]
    size = len(index.category_ids) + 1
    images_with = np.bincount(np.unique(owners * size + labels) % size, minlength=size)
    of_category = np.maximum(1, np.sqrt(threshold / (np.maximum(images_with, 1) / len(index))))
    factors = np.ones(len(index))
    np.maximum.at(factors, owners, of_category[labels])
    if released:
        factors = np.where(np.ceil(factors) > 1, 1 + np.ceil(factors), 1)
    return torch.from_numpy(factors.astype(np.float32))


class ShardSampler:
    """For prediction: positions rank, rank + W, rank + 2W, ... of `size` images, in batches."""

    def __init__(self, size: int, batch_size: int):
        positions = range(distributed.rank(), size, distributed.world_size())
        self.batches = [list(positions[i : i + batch_size]) for i in range(0, len(positions), batch_size)]
        self.first = 0

    def start(self, first_batch: int) -> list[list[int]]:
        """The next iteration begins with that batch; returns all batches."""
        self.first = first_batch
        return self.batches

    def __len__(self) -> int:
        return len(self.batches) - self.first

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches[self.first :])
