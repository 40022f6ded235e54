"""What is trained, by which optimiser, at which rate."""

import bisect
from collections.abc import Callable, Sequence

import torch
from torch import nn

from bags.classifiers.base import ProposalClassifier
from bags.sections import TrainConfig

REFERENCE_BATCH = 16  # images, that a scaled learning rate is given for


def set_trained_part(model: nn.Module, part: str) -> None:
    """Chooses the parameters that are trained.

    `all`: every one but the model's `frozen_parameters()`; `head`: the box branches after RoIAlign (shared
    layers, classifiers, box regression); `cls`: those of ProposalClassifier modules; `none`: nothing.
    """
    model.requires_grad_(part == "all")
    frozen: Callable[[], list[nn.Parameter]] = getattr(model, "frozen_parameters", list)
    for parameter in frozen():
        parameter.requires_grad_(False)
    if part == "head":
        for name, parameter in model.named_parameters():
            other = ("mask_" in name) or ("semantic." in name)
            parameter.requires_grad_(name.startswith("roi_heads.") and not other)
    if part == "cls":
        for module in model.modules():
            if isinstance(module, ProposalClassifier):
                module.requires_grad_(True)


def train_mode(model: nn.Module) -> None:
    """Training mode, except that frozen batch normalisation keeps its statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not any(
            p.requires_grad for p in module.parameters()
        ):
            module.eval()


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW, over the trainable parameters; in one kernel (fused) on a GPU.

    Not so SGD in fp16: where its first step overflows, the fused kernel leaves momenta that nobody has written.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    spoilt = config.optimizer == "sgd" and config.precision == "fp16"
    fused = True if parameters[0].is_cuda and not spoilt else None
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=fused)
    return torch.optim.SGD(parameters, config.lr, config.momentum, weight_decay=config.weight_decay, fused=fused)


def epoch_at(starts: Sequence[int], iteration: int) -> float:
    """How many epochs are over before an iteration. starts: each epoch's first iteration, and the total."""
    epoch = min(bisect.bisect_right(starts, iteration), len(starts) - 1) - 1
    return epoch + (iteration - starts[epoch]) / (starts[epoch + 1] - starts[epoch])


def base_rate(config: TrainConfig) -> float:
    """`lr`, with `scale_lr` in proportion to the images of a step (Goyal et al. 2017)."""
    return config.lr * config.batch_size / REFERENCE_BATCH if config.scale_lr else config.lr


def learning_rate(config: TrainConfig, iteration: int, epoch: float) -> float:
    """The rate of one iteration (0-based), at `epoch`: linear warm-up times a step schedule."""
    rate = base_rate(config)
    if iteration < config.warmup_iterations:
        progress = iteration / config.warmup_iterations
        rate *= config.warmup_factor + (1 - config.warmup_factor) * progress
    return rate * config.gamma ** sum(epoch >= milestone for milestone in config.milestones)
