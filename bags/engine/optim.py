"""What is trained, by which optimiser, at which rate."""

import torch
from torch import nn

from bags.classifiers.base import ProposalClassifier
from bags.config import TrainConfig


def set_trained_part(model: nn.Module, part: str) -> None:
    """`all` trains every parameter, `cls` those of ProposalClassifier modules, `none` nothing."""
    model.requires_grad_(part == "all")
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
    """SGD with momentum, or AdamW, over the trainable parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(parameters, config.lr, config.momentum, weight_decay=config.weight_decay)


def learning_rate(config: TrainConfig, iteration: int, iterations_per_epoch: int) -> float:
    """The rate of one iteration (0-based): linear warm-up times a step schedule."""
    rate = config.lr
    if iteration < config.warmup_iterations:
        progress = iteration / config.warmup_iterations
        rate *= config.warmup_factor + (1 - config.warmup_factor) * progress
    epoch = iteration / iterations_per_epoch
    return rate * config.gamma ** sum(epoch >= milestone for milestone in config.milestones)
