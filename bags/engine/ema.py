"""The exponential moving average of a model's weights, which takes their place when training is over."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bags.core import distributed


class MovingAverage:
    """Averages of what training changes: the trained parameters, and all buffers, such as statistics of batches.

    After step n (0-based) each average moves towards its weight by 1 - d, with d = min(decay, (1 + n) / (10 + n)): so
    the first weights are soon forgotten, whatever the decay. Whole numbers, such as counters, are copied.

    averages  name in the state dict -> average, a tensor of its own
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.model = decay, model
        state = model.state_dict(keep_vars=True)
        self.averages = {name: value.detach().clone() for name, value in state.items() if _changes(value)}

    @property
    def weights(self) -> dict[str, Tensor]:
        """Name -> the model's tensor, for each average."""
        state = self.model.state_dict()
        return {name: state[name] for name in self.averages}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step (0-based)."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        pairs = [*zip(self.averages.values(), self.weights.values(), strict=True)]
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([average for average, _ in floats], [weight for _, weight in floats], share)
        for average, weight in pairs:
            if not average.is_floating_point():
                average.copy_(weight)

    def copy_to_model(self) -> None:
        """Give the model the averages, on all ranks those of the main process."""
        _copy(self.averages, self.weights)
        distributed.share_buffers(self.model)

    @contextlib.contextmanager
    def in_model(self) -> Iterator[None]:
        """The model has the averages for a while, and its own weights afterwards."""
        kept = {name: value.clone() for name, value in self.weights.items()}
        self.copy_to_model()
        try:
            yield
        finally:
            _copy(kept, self.weights)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """For a checkpoint: `model`, the state dict with the averages, and `unaveraged`, what they are averages of."""
        return {"model": self.model.state_dict() | self.averages, "unaveraged": self.weights}

    def load(self, saved: dict) -> None:
        """Take the averages and weights of a checkpoint back. Raises KeyError or RuntimeError where they do not fit."""
        self.model.load_state_dict(saved["model"])
        _copy(self.weights, self.averages)
        _copy({name: saved["unaveraged"][name] for name in self.weights}, self.weights)


def _changes(value: Tensor) -> bool:
    """Whether training may change a value of a state dict: a buffer, or a parameter that is trained."""
    return not isinstance(value, nn.Parameter) or value.requires_grad


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, value in source.items():
        target[name].copy_(value)
