"""The training loop: one optimisation step, one epoch, one run.

Every iteration seeds torch's generator from (seed, iteration, rank), and every image's augmentation
from its place in the epoch's order. So a run that was killed goes on from its last checkpoint
exactly as it would have gone on, and no random state needs to be saved.
"""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from bags.classifiers.base import BoxFeatures, ProposalClassifier
from bags.config.sections import TrainConfig
from bags.core import distributed
from bags.core.errors import Stopped, UserError
from bags.core.precision import autocast
from bags.core.progress import Progress
from bags.core.tensor_files import check_finite
from bags.data.samplers import TrainSampler
from bags.engine.checkpoint import load_latest, save_checkpoint
from bags.engine.ema import MovingAverage
from bags.engine.faults import StopSignals, report_nonfinite
from bags.engine.metrics import Clock, Monitor, Stopwatch
from bags.engine.optim import (
    build_optimizer,
    epoch_at,
    learning_rate,
    rate_notes,
    set_trained_part,
    train_mode,
)

SAVED_EVERY = (200, 2000)  # iterations, of the detector and of stored features, which take a fraction of the time
MOST_SKIPPED = 20  # steps in a row that train.nonfinite=skip leaves out


@dataclass
class Run:
    """One model to be trained, and where it is kept.

    loss_module  the module that is called for the losses; None for `model` itself
    about        configuration and statistics, which go into every checkpoint
    """

    model: nn.Module
    config: TrainConfig
    folder: Path
    seed: int
    title: str
    about: dict
    loss_module: nn.Module | None = None
    # Filled in by `train`.
    optimizer: torch.optim.Optimizer | None = None
    scaler: torch.amp.GradScaler | None = None
    average: MovingAverage | None = None  # of the weights, with train.ema
    save_every: int = 0  # iterations
    done: int = 0  # iterations
    skipped: int = 0  # steps in a row
    stopwatch: Stopwatch = field(default_factory=Stopwatch)  # of its own steps, without waiting for data

    def save(self, iteration: int) -> None:
        """Writes `last.pth`."""
        if distributed.is_main():
            state = {"model": self.model.state_dict(), "iteration": iteration}
            if self.optimizer:
                state["optimizer"] = self.optimizer.state_dict()
            if self.scaler and self.scaler.is_enabled():
                state["scaler"] = self.scaler.state_dict()
            if self.average:
                state |= self.average.state()
            save_checkpoint(self.folder / "last.pth", {**self.about, **state})


def train_one_epoch(
    runs: Sequence[Run],
    loader: DataLoader,
    device: torch.device,
    first_iteration: int,
    epochs: Sequence[int],
    after_step: Callable[[Run, int, dict[str, torch.Tensor], float], None],
    clock: Clock,
) -> None:
    """Optimises each run over what is left of an epoch; `after_step(run, iteration, losses, lr)` logs and saves.

    epochs: the first iteration of each epoch, and the total.
    """
    for run in runs:
        assert run.loss_module is not None
        train_mode(run.loss_module)
    for iteration, (images, targets) in enumerate(loader, start=first_iteration):
        images, targets = to_device(images, targets, device)
        clock.lap("data")
        for run in runs:
            if iteration < run.done:  # killed while the others were saved
                continue
            distributed.seed_rank(iteration_seed(run.seed, iteration), device)
            lr = learning_rate(run.config, iteration, epoch_at(epochs, iteration))
            with run.stopwatch:
                losses = optimisation_step(run, images, targets, iteration, lr, device, clock)
                if run.average:
                    run.average.update(iteration)
            after_step(run, iteration, losses, lr)


def optimisation_step(
    run: Run,
    images: list[torch.Tensor],
    targets: list[dict],
    iteration: int,
    lr: float,
    device: torch.device,
    clock: Clock,
) -> dict[str, torch.Tensor]:
    """One step on this rank's share of a batch, in `accumulate` parts; returns the means of the parts' losses.

    A loss that is not finite, on any rank, stops the run with a UserError or leaves the step out.
    """
    config, parts = run.config, run.config.accumulate
    assert run.loss_module is not None and run.optimizer is not None and run.scaler is not None  # as `train` made them
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.zero_grad(set_to_none=True)
    means: dict[str, torch.Tensor] = {}
    for part in range(parts):
        once: contextlib.AbstractContextManager = contextlib.nullcontext()
        if part < parts - 1 and isinstance(run.loss_module, DistributedDataParallel):
            once = run.loss_module.no_sync()  # ranks exchange gradients after the last part
        with once:
            with autocast(device.type, config.precision):
                losses = run.loss_module(images[part::parts], targets[part::parts])
            clock.lap("forward")
            run.scaler.scale(sum(losses.values()) / parts).backward()
            clock.lap("backward")
        means = {name: means.get(name, 0) + value.detach() / parts for name, value in losses.items()}
    if distributed.any_rank(~torch.stack(list(means.values())).isfinite().all(), device):
        _leave_out(run, means, images, targets, iteration, lr, device)
    else:
        run.skipped = 0
        run.scaler.unscale_(run.optimizer)
        if config.clip_norm > 0:
            parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        run.scaler.step(run.optimizer)
        run.scaler.update()
    clock.lap("step")
    return means


def _leave_out(
    run: Run,
    losses: dict[str, torch.Tensor],
    images: list[torch.Tensor],
    targets: list[dict],
    iteration: int,
    lr: float,
    device: torch.device,
) -> None:
    """Says what was not finite. Raises UserError where the run is to stop, or where it cannot recover."""
    content = {
        "model": run.model.state_dict(),
        "iteration": iteration,
        "images": images,
        "targets": targets,
        "seed": iteration_seed(run.seed, iteration),
    }
    text = report_nonfinite(run.folder, losses, targets, {**run.about, **content})
    text = f"{run.title}: iteration {iteration + 1}: {text}"
    mend = f"lower train.lr (now {lr:g}) or train.clip_norm"
    if run.config.nonfinite == "stop":
        raise UserError(f"{text}: {mend}, or leave such steps out: train.nonfinite=skip")
    run.skipped += 1
    state = [value for value in run.model.state_dict().values() if value.is_floating_point()]
    if distributed.any_rank(not all(value.isfinite().all() for value in state), device):
        raise UserError(f"{text}: weights or statistics are not finite either: {mend}")
    if run.skipped > MOST_SKIPPED:
        raise UserError(f"{text}: {MOST_SKIPPED} steps in a row were left out before it: {mend}")
    if distributed.is_main():
        print(f"warning: {text}: step left out", file=sys.stderr)


def iteration_seed(seed: int, iteration: int) -> int:
    """Derive the seed of one iteration from the seed of its run."""
    return seed * 1_000_003 + iteration


def to_device(images: list[torch.Tensor], targets: list[dict], device: torch.device) -> tuple[list, list]:
    """A batch on the device."""
    images = [image.to(device, non_blocking=True) for image in images]

    def moved(target: dict) -> dict:
        """One target on the device."""
        return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in target.items()}

    return images, [moved(target) for target in targets]


def fit_classifiers(detector: Any, loader: DataLoader, device: torch.device, seed: int, title: str) -> None:
    """One pass over the training proposals for each classifier that learns without gradients, or before them.

    `detector.training_proposals(images, targets)` gives (classifier, features, labels) triples; so does `FromFeatures`,
    of stored features. Every rank sees the proposals of all.
    """
    classifiers = [module for module in detector.modules() if isinstance(module, ProposalClassifier)]
    members = {inner for outer in classifiers for inner in outer.modules() if inner is not outer}  # fitted already
    wanted = [c for c in classifiers if c not in members and c.needs_fit]
    train_mode(detector)

    def batches(classifier: ProposalClassifier) -> Iterator[tuple[BoxFeatures, torch.Tensor]]:
        """Yield the features and labels that one classifier is fitted to."""
        bar = Progress(loader, desc=f"{title}: fit", unit="batch", disable=not distributed.is_main())
        for iteration, (images, targets) in enumerate(bar):
            distributed.seed_rank(iteration_seed(seed, iteration), device)
            for owner, features, labels in detector.training_proposals(*to_device(images, targets, device)):
                if owner is classifier:
                    yield BoxFeatures(*map(distributed.gather_rows, features)), distributed.gather_rows(labels)

    for classifier in wanted:
        classifier.fit(batches(classifier))


def _resume(run: Run) -> bool:
    """Loads the folder's latest checkpoint, if there is one."""
    saved = load_latest(run.folder, warn=distributed.is_main())
    if saved is None:
        return False
    if saved["stats"] != run.about["stats"]:
        raise UserError(f"{run.folder}: the training annotations have changed since this run began: remove the folder")
    iteration = saved.get("iteration")
    if type(iteration) is not int or iteration < 0 or (run.optimizer and "optimizer" not in saved):
        raise UserError(f"{run.folder}: its checkpoint is not a run's own (no iteration or optimizer in it): remove it")
    check_finite(saved["model"], run.folder)
    try:
        if run.average:
            run.average.load(saved)
        else:
            run.model.load_state_dict(saved["model"])
        if run.optimizer:
            for theirs, ours in zip(saved["optimizer"]["param_groups"], run.optimizer.param_groups, strict=False):
                theirs["fused"] = ours["fused"]  # this device's kernel
            run.optimizer.load_state_dict(saved["optimizer"])
            if run.scaler and "scaler" in saved:
                run.scaler.load_state_dict(saved["scaler"])
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{run.folder}: its checkpoint does not fit this run ({reason}): remove the folder") from None
    run.done = iteration
    if len(set(distributed.gather_objects(run.done))) > 1:
        raise UserError(f"{run.folder}: the ranks have read different states of last.pth: repeat the command")
    return True


def _first_iterations(config: TrainConfig, loader: DataLoader) -> list[int]:
    """The first iteration of each epoch, and the total."""
    sampler = cast(TrainSampler, loader.batch_sampler)
    sampler.start(0)
    return [0, *itertools.accumulate(sampler.batches_in(epoch) for epoch in range(config.epochs))]


def is_trained(runs: Sequence[Run], loader: DataLoader) -> bool:
    """Whether `train` would find nothing left to do but what needs no batches."""
    latest = [load_latest(run.folder, warn=False) for run in runs]
    total = _first_iterations(runs[0].config, loader)[-1]
    return all(saved is not None and saved.get("iteration") == total for saved in latest)


def train(
    runs: Sequence[Run],
    loader: DataLoader,
    device: torch.device,
    after_epoch: Callable[[Run, int], None] | None = None,
    after_first_epoch: Callable[[Sequence[Run]], None] | None = None,
) -> None:
    """Trains to the last epoch, from each folder's checkpoint if there is one; part `none` is only fitted.

    after_epoch(run, epochs done) is called on all ranks after every `evaluate_every`-th epoch but the last, with
    everything saved; a run that is resumed there calls it again. after_first_epoch(runs) is called before it, on the
    main process; it may change nothing but the mode of the model.

    All runs see the same batches, so their epochs and batch size are the same; each draws its random numbers as
    it would in a job of its own. `loader.batch_sampler` has `start(epoch, first_batch)` and `batches_in(epoch)`. Writes
    `last.pth`, `previous.pth` and `log.jsonl`. Raises UserError for a loss that is not finite, and Stopped, with
    everything saved, after a step in which SIGTERM or SIGINT came.
    """
    sampler = cast(TrainSampler, loader.batch_sampler)
    epochs = _first_iterations(runs[0].config, loader)
    for run in runs:
        _start(run, loader, device)
    total = epochs[-1] if runs[0].optimizer else 0
    done = min(run.done for run in runs)
    with contextlib.ExitStack() as stack:
        clock, signals = Clock(device), stack.enter_context(StopSignals())
        monitors = [stack.enter_context(_monitor(run, total, clock if run is runs[0] else None)) for run in runs]
        monitor_of = dict(zip(map(id, runs), monitors, strict=True))

        def after_step(run: Run, iteration: int, losses: dict[str, torch.Tensor], lr: float) -> None:
            """Logs, saves now and then, and stops where a signal asks for it."""
            steps = iteration + 1
            monitor_of[id(run)].step(iteration, epoch_at(epochs, steps), losses, lr)
            if steps % run.save_every == 0 and steps < total:
                run.save(steps)
                clock.leave_out()
            if run is runs[-1] and distributed.any_rank(bool(signals.received), device):
                for unsaved in runs:
                    if unsaved.done <= iteration:
                        unsaved.save(steps)
                distributed.barrier()  # a rank that ends makes torchrun end the others, which may still be saving
                cause = signals.received[0] if signals.received else "another rank"
                saved = f"after iteration {steps} of {total}, which is saved; the same command goes on"
                raise Stopped(f"stopped by {cause} {saved}")

        while done < total:
            epoch = int(epoch_at(epochs, done))
            if after_first_epoch and done == epochs[1] and distributed.is_main():
                after_first_epoch(runs)
            if after_epoch and done == epochs[epoch]:
                _between_epochs(runs, done, epoch, after_epoch, signals)
            clock.leave_out()
            sampler.start(epoch, done - epochs[epoch])
            with monitors[0].epoch(epoch + 1, len(runs) - 1):
                train_one_epoch(runs, loader, device, done, epochs, after_step, clock)
            done = epochs[epoch + 1]
    _finish(runs, total)


def _monitor(run: Run, total: int, clock: Clock | None) -> Monitor:
    """Make the monitor of one run; clock: for the one that shows the progress of the pass."""
    return Monitor(run.folder, run.title, run.config, run.done, total, clock, run.stopwatch)


def _between_epochs(
    runs: Sequence[Run], done: int, epoch: int, after_epoch: Callable[[Run, int], None], signals: StopSignals
) -> None:
    """Calls `after_epoch` of the runs for which it is time, after `epoch` epochs, which are `done` iterations.

    It may take long, so all runs are saved first, and a signal ends the process at once.
    """
    due = [run for run in runs if run.config.evaluate_every and epoch and epoch % run.config.evaluate_every == 0]
    due = [run for run in due if run.done <= done]  # others were saved after this moment
    for run in runs if due else ():
        distributed.share_buffers(run.model)
        if run.done < done:
            run.save(done)
    with signals.paused() if due else contextlib.nullcontext():
        for run in due:
            with run.average.in_model() if run.average else contextlib.nullcontext():
                after_epoch(run, epoch)


def _finish(runs: Sequence[Run], total: int) -> None:
    """Saves what is not yet; all ranks then have the same weights and statistics."""
    for run in runs:
        distributed.share_buffers(run.model)
        if run.done < total or not (run.folder / "last.pth").exists():
            run.save(total)
        if run.average:
            run.average.copy_to_model()
    distributed.barrier()


def _start(run: Run, loader: DataLoader, device: torch.device) -> None:
    """Set the trained part, the optimiser and the starting point of a run; wrap its loss module for several ranks."""
    config, ranks = run.config, distributed.world_size()
    if config.batch_size % (ranks * config.accumulate):
        raise UserError(
            f"train.batch_size={config.batch_size} does not divide by {ranks} ranks times "
            f"train.accumulate={config.accumulate}"
        )
    run.save_every = config.checkpoint_every or SAVED_EVERY[run.loss_module is not None]
    set_trained_part(run.model, config.part)
    trainable = any(p.requires_grad for p in run.model.parameters())
    if trainable:
        run.optimizer = build_optimizer(run.model, config)
        run.average = MovingAverage(run.model, config.ema) if config.ema else None
        run.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        for note in rate_notes(config) if distributed.is_main() else ():
            print(f"note: {run.title}: {note}", file=sys.stderr)
    if not _resume(run):
        fit_classifiers(run.loss_module or run.model, loader, device, run.seed, run.title)
    if config.compile and run.loss_module is None:
        torch._dynamo.config.optimize_ddp = False  # it cuts the graph at buckets, anew for every shape of images
        run.model.get_submodule("backbone").compile()
    run.loss_module, run.stopwatch.device = run.loss_module or run.model, device
    if trainable and ranks > 1:
        run.loss_module = DistributedDataParallel(run.loss_module, [device] if device.type == "cuda" else None)
