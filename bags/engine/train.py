"""The training loop: one optimisation step, one epoch, one run.

Every iteration seeds torch's generator from (seed, iteration, rank), and every image's augmentation
from its place in the epoch's order. So a run that was killed goes on from its last checkpoint
exactly as it would have gone on, and no random state needs to be saved.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from bags import distributed
from bags.classifiers.base import BoxFeatures, ProposalClassifier
from bags.engine.checkpoint import load_latest, save_checkpoint
from bags.engine.metrics import Clock, Monitor
from bags.engine.optim import build_optimizer, epoch_at, learning_rate, set_trained_part, train_mode
from bags.errors import UserError
from bags.sections import TrainConfig


@dataclass
class Run:
    """One model to be trained, and where it is kept.

    losses: the module to call for them, `model` itself if None. about (config and statistics) goes into every
    checkpoint.
    """

    model: nn.Module
    config: TrainConfig
    folder: Path
    seed: int
    title: str
    about: dict
    losses: nn.Module | None = None
    # Filled in by `train`.
    optimizer: torch.optim.Optimizer | None = None
    done: int = 0  # iterations
    clock: Clock = field(default_factory=Clock)  # of its own steps, without waiting for data

    def save(self, iteration: int) -> None:
        """Writes `last.pth`."""
        if distributed.is_main():
            state = {"model": self.model.state_dict(), "iteration": iteration}
            if self.optimizer:
                state["optimizer"] = self.optimizer.state_dict()
            save_checkpoint(self.folder / "last.pth", {**self.about, **state})


def train_one_epoch(
    runs: Sequence[Run],
    loader: DataLoader,
    device: torch.device,
    first_iteration: int,
    epochs: Sequence[int],
    after_step: Callable[[Run, int, dict[str, torch.Tensor], float], None],
) -> None:
    """Optimises each run over what is left of an epoch; `after_step(run, iteration, losses, lr)` logs and saves.

    epochs: the first iteration of each epoch, and the total.
    """
    for run in runs:
        train_mode(run.losses)
    for iteration, batch in enumerate(loader, start=first_iteration):
        images, targets = to_device(*batch, device)
        for run in runs:
            if iteration < run.done:  # killed while the others were saved
                continue
            distributed.seed_rank(run.seed * 1_000_003 + iteration, device)
            lr = learning_rate(run.config, iteration, epoch_at(epochs, iteration))
            for group in run.optimizer.param_groups:
                group["lr"] = lr
            with run.clock:
                losses = run.losses(images, targets)
                loss = sum(losses.values())
                run.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                if run.config.clip_norm > 0:
                    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
                    nn.utils.clip_grad_norm_(parameters, run.config.clip_norm)
                run.optimizer.step()
            after_step(run, iteration, losses, lr)


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


def _resume(run: Run) -> bool:
    """Loads the folder's latest checkpoint, if there is one."""
    saved = load_latest(run.folder)
    if saved is None:
        return False
    if saved["stats"] != run.about["stats"]:
        raise UserError(f"{run.folder}: the training annotations have changed since this run began: remove the folder")
    if type(saved.get("iteration")) is not int or (run.optimizer and "optimizer" not in saved):
        raise UserError(f"{run.folder}: its checkpoint is not a run's own (no iteration or optimizer in it): remove it")
    run.model.load_state_dict(saved["model"])
    if run.optimizer:
        run.optimizer.load_state_dict(saved["optimizer"])
    run.done = saved["iteration"]
    return True


def train(runs: Sequence[Run], loader: DataLoader, device: torch.device) -> None:
    """Trains to the last epoch, from each folder's checkpoint if there is one; part `none` is fitted instead.

    All runs see the same batches, so their epochs and batch size are the same; each draws its random numbers as
    it would alone. `loader.batch_sampler` has `start(epoch, first_batch)` and `batches_in(epoch)`. Writes
    `last.pth`, `previous.pth` and `log.jsonl`. Raises UserError for a loss that is not finite.
    """
    sampler = loader.batch_sampler
    sampler.start(0)
    epochs = [0, *itertools.accumulate(sampler.batches_in(epoch) for epoch in range(runs[0].config.epochs))]
    for run in runs:
        _start(run, loader, device)
    total = epochs[-1] if runs[0].optimizer else 0
    done = min(run.done for run in runs)
    with contextlib.ExitStack() as stack:
        monitors = [
            stack.enter_context(Monitor(r.folder, r.title, r.config, r.done, total, r is runs[0], r.clock))
            for r in runs
        ]
        monitor_of = dict(zip(map(id, runs), monitors, strict=True))

        def after_step(run: Run, iteration: int, losses: dict[str, torch.Tensor], lr: float) -> None:
            """Logs, and saves now and then."""
            steps = iteration + 1
            saves = steps % run.config.checkpoint_every == 0 and steps < total
            monitor_of[id(run)].step(iteration, epoch_at(epochs, steps), losses, lr, check=saves)
            if saves:
                run.save(steps)

        while done < total:
            epoch = int(epoch_at(epochs, done))
            sampler.start(epoch, done - epochs[epoch])
            train_one_epoch(runs, loader, device, done, epochs, after_step)
            done = epochs[epoch + 1]
    for run in runs:
        distributed.share_buffers(run.model)
        if run.done < total or not (run.folder / "last.pth").exists():
            run.save(total)
    distributed.barrier()


def _start(run: Run, loader: DataLoader, device: torch.device) -> None:
    """What is trained, by which optimiser, from where; wraps `losses` for several ranks."""
    set_trained_part(run.model, run.config.part)
    trainable = any(p.requires_grad for p in run.model.parameters())
    run.optimizer = build_optimizer(run.model, run.config) if trainable else None
    if not _resume(run) and not trainable:
        fit_classifiers(run.model, loader, device, run.seed, run.title)
    run.losses, run.clock.device = run.losses or run.model, device
    if trainable and distributed.world_size() > 1:
        run.losses = DistributedDataParallel(run.losses, [device] if device.type == "cuda" else None)
