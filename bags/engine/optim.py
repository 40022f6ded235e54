"""The trained part of a detector, its optimiser and its learning rate."""

import bisect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from bags.classifiers.base import ProposalClassifier
from bags.config.sections import TrainConfig

REFERENCE_BATCH = 16  # images of a step for which a scaled learning rate is given
# Of AdamW for a classifier alone, divided by the width of the features: a step then moves logits as far for any width.
ADAMW_RATE = 2.56


def set_trained_part(model: nn.Module, part: str) -> None:
    """Set which parameters of a detector are trained.

    part: `all` except the model's `frozen_parameters()`; `head`, the box branches after RoIAlign (shared layers,
    classifiers, box regression); `cls`, the ProposalClassifier modules; or `none`.
    """
    model.requires_grad_(part == "all")
    frozen: Callable[[], list[nn.Parameter]] = getattr(model, "frozen_parameters", list)
    for parameter in frozen():
        parameter.requires_grad_(False)
    trained: list[nn.Module] = []
    if part == "head":
        roi_heads: Any = model.roi_heads
        trained = [m for s in roi_heads.box_stages for m in (s.box_head, s.classifier, s.box_regressor)]
    if part == "cls":
        trained = [module for module in model.modules() if isinstance(module, ProposalClassifier)]
    for module in trained:
        module.requires_grad_(True)


def train_mode(model: nn.Module) -> None:
    """Set training mode, except for frozen batch normalisation, which keeps its statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not any(
            p.requires_grad for p in module.parameters()
        ):
            module.eval()


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Make SGD with momentum, or AdamW, of the trainable parameters; with fused kernels on a GPU.

    SGD in fp16 is not fused: if its first step overflows, the fused kernel leaves momenta uninitialised.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    unsafe = config.optimizer == "sgd" and config.precision == "fp16"
    fused = True if parameters[0].is_cuda and not unsafe else None
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=fused)
    return torch.optim.SGD(parameters, config.lr, config.momentum, weight_decay=config.weight_decay, fused=fused)


def epoch_at(starts: Sequence[int], iteration: int) -> float:
    """Epochs, with their fraction, that are over before an iteration. starts: each epoch's first, and the total."""
    epoch = min(bisect.bisect_right(starts, iteration), len(starts) - 1) - 1
    return epoch + (iteration - starts[epoch]) / (starts[epoch + 1] - starts[epoch])


def base_rate(config: TrainConfig) -> float:
    """The rate `lr`; with `scale_lr`, in proportion to the images of a step (Goyal et al. 2017)."""
    return config.lr * config.batch_size / REFERENCE_BATCH if config.scale_lr else config.lr


def rate_notes(config: TrainConfig) -> list[str]:
    """Sentences on rates that may not be those that were meant."""
    notes = []
    if config.scale_lr:
        words = f"lr {base_rate(config):g} for {config.batch_size} images a step"
        notes.append(f"{words}: train.lr={config.lr:g} is that of {REFERENCE_BATCH}")
    if config.schedule == "step" and config.milestones and config.milestones[0] >= config.epochs:
        words = f"train.milestones={[*config.milestones]}, train.epochs={config.epochs}"
        notes.append(f"the rate never falls, as no milestone lies before the end ({words})")
    return notes


def learning_rate(config: TrainConfig, iteration: int, epoch: float) -> float:
    """The rate of an iteration (0-based) at `epoch`: linear warm-up times the schedule.

    `step` multiplies lr by gamma at each milestone. `cosine` gives lr / 2 * (1 + cos(pi * epoch / epochs)), half a
    period over all epochs, warm-up included (Loshchilov and Hutter 2017, Eq. 5, without restarts).
    """
    rate = base_rate(config)
    if iteration < config.warmup_iterations:
        progress = iteration / config.warmup_iterations
        rate *= config.warmup_factor + (1 - config.warmup_factor) * progress
    if config.schedule == "cosine":
        return rate * (1 + math.cos(math.pi * epoch / config.epochs)) / 2
    return rate * config.gamma ** sum(epoch >= milestone for milestone in config.milestones)
