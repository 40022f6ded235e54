"""The training loop: one optimisation step, one epoch, one run.

Every iteration seeds torch's generator from (seed, iteration, rank), and every image's augmentation
from its place in the epoch's order. So a run that was killed goes on from its last checkpoint
exactly as it would have gone on, and no random state needs to be saved.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from bags import distributed
from bags.classifiers.base import BoxFeatures, ProposalClassifier
from bags.engine.checkpoint import load_latest, save_checkpoint
from bags.engine.metrics import Monitor
from bags.engine.optim import build_optimizer, epoch_at, learning_rate, set_trained_part, train_mode
from bags.errors import UserError
from bags.sections import TrainConfig


def train_one_epoch(
    model: nn.Module,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    device: torch.device,
    first_iteration: int,
    epochs: Sequence[int],
    seed: int,
    after_step: Callable[[int, dict[str, torch.Tensor], float], None],
) -> None:
    """Optimises over what is left of an epoch; `after_step(iteration, losses, lr)` logs and saves.

    epochs: the first iteration of each epoch, and the total.
    """
    train_mode(model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for iteration, (images, targets) in enumerate(loader, start=first_iteration):
        distributed.seed_rank(seed * 1_000_003 + iteration, device)
        lr = learning_rate(config, iteration, epoch_at(epochs, iteration))
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses = model(*to_device(images, targets, device))
        loss = sum(losses.values())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if config.clip_norm > 0:
            nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        optimizer.step()
        after_step(iteration, losses, lr)


def to_device(images: list[torch.Tensor], targets: list[dict], device: torch.device) -> tuple[list, list]:
    """A batch on the device."""
    images = [image.to(device, non_blocking=True) for image in images]

    def moved(target: dict) -> dict:
        """One target on the device."""
        return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in target.items()}

    return images, [moved(target) for target in targets]


def fit_classifiers(model: nn.Module, loader: DataLoader, device: torch.device, seed: int, title: str) -> None:
    """One pass over the training proposals for each classifier that learns without gradients.

    `model.training_proposals(images, targets)` gives (classifier, features, labels) triples. Every rank
    sees the proposals of all.
    """
    wanted = [
        module
        for module in model.modules()
        if isinstance(module, ProposalClassifier) and type(module).fit is not ProposalClassifier.fit
    ]
    train_mode(model)

    def batches(classifier: ProposalClassifier) -> Iterator[tuple[BoxFeatures, torch.Tensor]]:
        """What one classifier is fitted to."""
        bar = tqdm(loader, desc=f"{title}: fit", unit="batch", disable=not distributed.is_main())
        for iteration, (images, targets) in enumerate(bar):
            distributed.seed_rank(seed * 1_000_003 + iteration, device)
            for owner, features, labels in model.training_proposals(*to_device(images, targets, device)):
                if owner is classifier:
                    yield BoxFeatures(*map(distributed.gather_rows, features)), distributed.gather_rows(labels)

    for classifier in wanted:
        classifier.fit(batches(classifier))


def _resume(model: nn.Module, optimizer: torch.optim.Optimizer | None, folder: Path, stats: dict) -> dict | None:
    """Loads the folder's latest checkpoint, if there is one, and returns it."""
    saved = load_latest(folder)
    if saved is None:
        return None
    if saved["stats"] != stats:
        raise UserError(f"{folder}: the training annotations have changed since this run began: remove the folder")
    if type(saved.get("iteration")) is not int or (optimizer and "optimizer" not in saved):
        raise UserError(f"{folder}: its checkpoint is not a run's own (no iteration or optimizer in it): remove it")
    model.load_state_dict(saved["model"])
    if optimizer:
        optimizer.load_state_dict(saved["optimizer"])
    return saved


def train(
    model: nn.Module,
    loader: DataLoader,
    config: TrainConfig,
    device: torch.device,
    folder: Path,
    seed: int,
    title: str,
    about: dict,
) -> None:
    """Trains to the last epoch, from the folder's checkpoint if there is one; part `none` is fitted instead.

    `loader.batch_sampler` has `start(epoch, first_batch)` and `batches_in(epoch)`. `about` (config and
    statistics) goes into every checkpoint. Writes `last.pth`, `previous.pth` and `log.jsonl`. Raises
    UserError for a loss that is not finite.
    """
    set_trained_part(model, config.part)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    optimizer = build_optimizer(model, config) if trainable else None
    sampler = loader.batch_sampler
    sampler.start(0)
    epochs = [0, *itertools.accumulate(sampler.batches_in(epoch) for epoch in range(config.epochs))]
    total = epochs[-1] if trainable else 0
    saved = _resume(model, optimizer, folder, about["stats"])
    done = saved["iteration"] if saved else 0
    if saved is None and not trainable:
        fit_classifiers(model, loader, device, seed, title)
    parallel = model
    if trainable and distributed.world_size() > 1:
        parallel = DistributedDataParallel(model, [device] if device.type == "cuda" else None)

    def save(iteration: int) -> None:
        """Writes `last.pth`."""
        if distributed.is_main():
            state = {"model": model.state_dict(), "iteration": iteration}
            if trainable:
                state["optimizer"] = optimizer.state_dict()
            save_checkpoint(folder / "last.pth", {**about, **state})

    with Monitor(folder, title, config, done, total) as monitor:

        def after_step(iteration: int, losses: dict[str, torch.Tensor], lr: float) -> None:
            """Logs, and saves now and then."""
            steps = iteration + 1
            saves = steps % config.checkpoint_every == 0 and steps < total
            monitor.step(iteration, epoch_at(epochs, steps), losses, lr, check=saves)
            if saves:
                save(steps)

        while done < total:
            epoch = int(epoch_at(epochs, done))
            sampler.start(epoch, done - epochs[epoch])
            train_one_epoch(parallel, loader, optimizer, config, device, done, epochs, seed, after_step)
            done = epochs[epoch + 1]
    distributed.share_buffers(model)
    if saved is None or saved["iteration"] < total or not (folder / "last.pth").exists():
        save(total)
    distributed.barrier()
