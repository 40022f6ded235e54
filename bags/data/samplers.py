"""Which images, in which order, on which rank."""

from collections.abc import Iterator

import torch

from bags import distributed
from bags.errors import UserError


class UniformSampler:
    """Every image once per epoch, in batches that do not depend on the number of ranks.

    Yields lists of (position, seed), as DetectionDataset takes them. An epoch has
    ceil(size / batch_size) batches over all ranks; the last is filled up from the first images.
    Rank r of W takes every W-th image of each batch. The order depends on seed and epoch alone.
    """

    def __init__(self, size: int, batch_size: int, seed: int):
        if batch_size % distributed.world_size():
            ranks = distributed.world_size()
            raise UserError(
                f"train.batch_size={batch_size} does not divide by {ranks} ranks: choose a multiple of {ranks}"
            )
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.epoch = self.first_batch = 0

    def start(self, epoch: int, first_batch: int = 0) -> None:
        """Chooses the epoch and the first batch of the next iteration (for resuming)."""
        self.epoch, self.first_batch = epoch, first_batch

    def __len__(self) -> int:
        return -(-self.size // self.batch_size) - self.first_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(self.size, generator=generator).tolist()
        missing = -self.size % self.batch_size
        order += (order * (missing // self.size + 1))[:missing]
        seeds = torch.randint(2**31, (len(order),), generator=generator).tolist()
        keys = list(zip(order, seeds, strict=True))
        for first in range(self.first_batch * self.batch_size, len(keys), self.batch_size):
            batch = keys[first : first + self.batch_size]
            yield batch[distributed.rank() :: distributed.world_size()]


class ShardSampler:
    """For prediction: positions rank, rank + W, rank + 2W, ... of `size` images, in batches."""

    def __init__(self, size: int, batch_size: int):
        positions = range(distributed.rank(), size, distributed.world_size())
        self.batches = [list(positions[i : i + batch_size]) for i in range(0, len(positions), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)
