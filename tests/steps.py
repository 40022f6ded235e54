"""A few real optimisation steps, in the test's process or, run as a script, on the ranks of torchrun."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

import bags
from bags.assembly.loaders import build_train_loader, open_index
from bags.assembly.models import build_detector
from bags.config.load import config_to_dict
from bags.core import distributed
from bags.data.statistics import CategoryStats
from bags.engine.train import Run, train


def agree_on_samples(setattr_=setattr):
    """Anchors and proposals are drawn first come first served, image by image: the same ones whoever does it."""

    def first(self, matched):
        """As the original, without its dice."""
        chosen = ([], [])
        for own in matched:
            limit = int(self.batch_size_per_image * self.positive_fraction)
            positive = torch.where(own >= 1)[0][:limit]
            negative = torch.where(own == 0)[0][: self.batch_size_per_image - len(positive)]
            assert len(positive) + len(negative) == self.batch_size_per_image  # so that all means have one divisor
            for masks, rows in zip(chosen, (positive, negative), strict=True):
                masks.append(torch.zeros_like(own, dtype=torch.uint8).index_fill_(0, rows, 1))
        return chosen

    setattr_(BalancedPositiveNegativeSampler, "__call__", first)


def pieces(config):
    """(detector with random weights, loader) of a configuration."""
    index = open_index(config, "train")
    stats = CategoryStats.from_index(index)
    torch.manual_seed(0)
    return build_detector(config, stats), build_train_loader(config, index, stats)


class Called:
    """A loader that does something before some of its batches."""

    def __init__(self, loader, at_batch):
        self.loader, self.at_batch, self.batch_sampler, self.count = loader, at_batch, loader.batch_sampler, 0

    def __iter__(self):
        for batch in self.loader:
            if self.count in self.at_batch:
                self.at_batch[self.count]()
            self.count += 1
            yield batch


def train_some(config, at_batch=None):
    """Trains as the configuration says: {start, end: state dicts, graphs: number captured by torch.compile, run}."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    index = open_index(config, "train")
    stats = CategoryStats.from_index(index)
    detector, loader = pieces(config)
    for module in detector.modules():  # statistics of a batch would differ between ranks
        if isinstance(module, torch.nn.BatchNorm2d):
            detector._frozen += list(module.parameters())
    config.run_folder.mkdir(parents=True, exist_ok=True)
    about = {"config": config_to_dict(config), "stats": stats.to_dict()}
    start = {key: value.clone() for key, value in detector.state_dict().items()}
    run = Run(detector, config.train, config.run_folder, config.seed, config.name, about)
    train([run], Called(loader, at_batch or {}), torch.device("cpu"))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return {"start": start, "end": detector.state_dict(), "graphs": graphs, "run": run}


if __name__ == "__main__":
    configuration = bags.load_config(sys.argv[1], sys.argv[3:])
    agree_on_samples()
    with distributed.distributed("cpu"):
        result = train_some(configuration)
        flat = torch.cat([value.double().reshape(-1) for value in result["end"].values()])
        both = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
        dist.all_gather(both, flat)
        if distributed.is_main():
            torch.save({"end": result["end"], "equal": torch.equal(*both)}, sys.argv[2])
