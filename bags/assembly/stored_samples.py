"""Samples that are read from a store of proposal features: for training, and for the last step of prediction."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bags.detectors.torchvision_private import BalancedPositiveNegativeSampler
from bags.engine.features import FeatureStore

FEW = 8  # a view is read as a whole unless fewer than one of so many rows are wanted


class TrainingFeatures(Dataset):
    """Samples drawn from a store as `RoIHeads` draws them from an image, for each (position, seed) anew.

    For (position, seed, label) only the label's proposals are drawn, and as many of background (class-balanced).

    An item is ([features [n, D] of each stage], [labels [n] of each stage]); where the features are
    resident elsewhere, numbers of rows [n] stand for them.
    """

    def __init__(self, store: FeatureStore, flip: float, batch_size: int, positive_fraction: float, resident: bool):
        """flip: probability of the mirrored view; batch_size, positive_fraction: proposals per image as in RoIHeads."""
        self.store, self.flip, self.resident = store, flip, resident
        self.sampler = BalancedPositiveNegativeSampler(batch_size, positive_fraction)

    def __len__(self) -> int:
        return self.store.images

    def __getitem__(self, key: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
        position, seed, *label = key
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            mirrored = bool(torch.rand(1) < self.flip) if self.flip > 0 else False  # as v2.RandomHorizontalFlip
            rows = self.store.rows((position, mirrored))
            drawn = self._draw_label(rows, *label) if label else self._draw(rows)
        view = position, mirrored
        labels = [torch.from_numpy(rows["label"][chosen, stage].astype(np.int64)) for stage, chosen in enumerate(drawn)]
        if self.resident:
            return [self.store.row_numbers(view, chosen) for chosen in drawn], labels
        needed = torch.cat(drawn).unique()
        if len(needed) * FEW < len(rows):
            fc = self.store.features(view, needed.numpy())
            drawn = [torch.searchsorted(needed, chosen) for chosen in drawn]
        else:
            fc = self.store.features(view)
        return [torch.from_numpy(fc[chosen.numpy(), stage]) for stage, chosen in enumerate(drawn)], labels

    def _draw(self, rows: np.ndarray) -> list[Tensor]:
        """Rows [n] of each stage: what one stage draws, and the objects, are what the next one may draw from."""
        labels = torch.from_numpy(rows["label"].astype(np.int64))
        is_object = torch.from_numpy(rows["is_object"].copy())
        available, drawn = torch.arange(len(rows)), []
        for stage in range(labels.shape[1]):
            (positive,), (negative,) = self.sampler([labels[available, stage]])
            chosen = available[torch.where(positive | negative)[0]]
            drawn.append(chosen)
            available = torch.cat([chosen[~is_object[chosen]], torch.where(is_object)[0]])
        return drawn

    def _draw_label(self, rows: np.ndarray, label: int) -> list[Tensor]:
        """Rows [n] of each stage, each stage for itself: those of a label, and as many of background, if there are."""
        drawn = []
        for labels in torch.from_numpy(rows["label"].astype(np.int64)).unbind(1):
            labelled, background = (torch.where(labels == wanted)[0] for wanted in (label, 0))
            background = background[torch.randperm(len(background))[: len(labelled)]]
            drawn.append(torch.cat([labelled, background]).sort().values)
        return drawn


def collate_samples(items: list[tuple[list[Tensor], list[Tensor]]]) -> tuple[list[Tensor], list[dict]]:
    """A batch as `FromFeatures` takes it: features [N, D] and {"labels": [N]} of each stage."""
    features, labels = zip(*items, strict=True)
    targets = [{"labels": torch.cat(of_stage)} for of_stage in zip(*labels, strict=True)]
    return [torch.cat(of_stage) for of_stage in zip(*features, strict=True)], targets


class SeenFeatures(Dataset):
    """(what `make` builds from fc [R, S, D], boxes [R, 4], size, scale, original; target) of each position."""

    def __init__(self, store: FeatureStore, make: Callable, target_of: Callable[[int], dict]):
        self.store, self.make, self.target_of = store, make, target_of
        views = np.concatenate(store.views)
        self.order, self.views = np.argsort(views["position"]), views

    def __len__(self) -> int:
        return self.store.images

    def __getitem__(self, position: int) -> tuple[object, dict]:
        fc, rows = self.store[position, False]
        view = self.views[self.order[position]]
        size, original = (tuple(view[key].tolist()) for key in ("size", "original"))
        features, boxes = torch.from_numpy(fc), torch.from_numpy(rows["box"].copy())
        return self.make(features, boxes, size, float(view["scale"]), original), self.target_of(position)
