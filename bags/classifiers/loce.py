"""Equilibrium loss and memory-augmented feature sampling (LOCE; Feng et al., ICCV 2021).

Published (Mask R-CNN R50, LVIS v1, several scales, 24 epochs and then 6 of the stage; box AP / mask AP, from the
authors' repository): 27.4 / 26.6. Their mask predictor is normalised, and the stage also trains box regression, RPN and
masks.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bags.classifiers.base import BoxFeatures, ClassifierSettings, TrainingCounts, at_least_float32, sum_over_ranks
from bags.classifiers.softmax import Softmax
from bags.core.distributed import gather_rows
from bags.core.settings import Range, need

START = 0.01  # mean score of every category before training


@dataclass(frozen=True)
class LOCESettings(ClassifierSettings):
    """Equilibrium loss and a memory of features (Feng et al. 2021), trained on from softmax's weights."""

    name: Literal["loce"] = "loce"
    momentum: Annotated[float, Range(ge=0, lt=1)] = 0.9  # of the mean scores
    background: Annotated[float, Range(gt=0, le=1)] = 0.01  # mean score that the background is given
    queue: Annotated[int, Range(ge=0)] = 80  # stored features of each category; 0: no memory
    sampled_categories: Annotated[int, Range(ge=1)] = 8  # drawn for each batch
    sampled_features: Annotated[int, Range(ge=1)] = 4  # of each drawn category
    warm_up: bool = False  # whether a pass before training fills the memory and the mean scores

    @property
    def layers(self) -> int:
        """The layer and the memory."""
        return 1 + self.queue

    def build(self, in_features: int, pooled_features: int, training: TrainingCounts) -> "LOCE":
        """Make the untrained classifier."""
        return LOCE(
            in_features,
            training.num_categories,
            self.momentum,
            self.background,
            self.queue,
            self.sampled_categories,
            self.sampled_features,
            self.warm_up,
        )


class LOCE(Softmax):
    """Softmax with margins between categories by how well each is classified, and repeated features of weak ones.

        L = CE(z + log s),   s_j: mean score of category j, the probability of its own proposals; s_0 = background
        s_j <- momentum s_j + (1 - momentum) mean of the batch's scores of j

    CE(z + log s) gives z_j - z_i the margin log(s_j / s_i). Each batch also trains on stored features:
    `sampled_categories` categories are drawn with a probability proportional to 1 / s_j, and `sampled_features`
    features of each. A category without stored features adds none. Stored are the last `queue` features of foreground
    proposals of each category. The loss is divided by the number of proposals and drawn features.
    momentum: from 0, below 1. background: above 0, to 1. queue >= 0: 0 is the equilibrium loss only. sampled_*: >= 1.
    warm_up: before the first step one epoch of training proposals, scored with the weights that the classifier starts
    from, fills the memory and updates the mean scores; otherwise the memory is empty then, and each s_j is 0.01.

    The released code has a warm-up, of five objects of each category. It stores features of 16 boxes around each
    object, and repeats the update of s_j for each object of j in a batch. A classifier sees proposals and no objects,
    so here those of the batch are stored, and a batch updates s_j once.

    Shape shorthand: R proposals, C categories; logits [R, C+1], column 0 the background. In training mode with a memory
    they are [R, C+1+in_features]: the features come behind, because `loss` stores them.
    `loss` changes the buffers `mean_scores`, `memory`, `stored` and `pointers` in training mode, as it sees all ranks,
    so that a checkpoint resumes exactly. The memory takes 4 C queue in_features bytes: 394 MB for LVIS v1 with 1,024
    numbers. An average that is loaded from checkpoints does not keep it.
    """

    mean_scores: Tensor
    memory: Tensor
    stored: Tensor
    pointers: Tensor

    def __init__(
        self,
        in_features: int,
        num_categories: int,
        momentum: float = LOCESettings.momentum,
        background: float = LOCESettings.background,
        queue: int = LOCESettings.queue,
        sampled_categories: int = LOCESettings.sampled_categories,
        sampled_features: int = LOCESettings.sampled_features,
        warm_up: bool = LOCESettings.warm_up,
    ):
        super().__init__(in_features, num_categories)
        settings = LOCESettings(
            momentum=momentum,
            background=background,
            queue=queue,
            sampled_categories=sampled_categories,
            sampled_features=sampled_features,
            warm_up=warm_up,
        )
        self.warm_up = settings.warm_up
        self.momentum, self.queue = settings.momentum, settings.queue
        self.sampled_categories, self.sampled_features = settings.sampled_categories, settings.sampled_features
        start = torch.full((num_categories + 1,), START, dtype=torch.float64)
        start[0] = settings.background
        self.register_buffer("mean_scores", start)
        # Rows by category; the last one takes what is not stored, and is cleared each time.
        self.register_buffer("memory", torch.zeros(num_categories * queue + 1, in_features))
        self.register_buffer("stored", torch.zeros(num_categories, dtype=torch.long))
        self.register_buffer("pointers", torch.zeros(num_categories, dtype=torch.long))

    def forget(self) -> None:
        """Drop the memory, as with queue = 0."""
        self.queue, self.memory = 0, self.memory[-1:].clone()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *others: Any) -> None:
        """Load a state; of a memory that is not kept, its last row, which is empty."""
        name = f"{prefix}memory"
        if not self.queue and name in state_dict and state_dict[name].ndim:
            state_dict[name] = state_dict[name][-1:]
        super()._load_from_state_dict(state_dict, prefix, *others)

    def forward(self, features: BoxFeatures) -> Tensor:
        """Compute logits [R, C+1]; in training mode with a memory the features come behind them."""
        logits = self.linear(features.fc)
        if not (self.training and self.queue):
            return logits
        return torch.cat([at_least_float32(logits), at_least_float32(features.fc.detach())], dim=1)

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Average the equilibrium loss over R proposals and the drawn features; 0 for R = 0 and an empty memory.

        logits as `forward` gives them; without features behind, the memory is neither filled nor used.
        labels [R] int64 in 0..C, 0 = background.
        """
        outputs = self.num_categories + 1
        need(
            logits.shape[1] in (outputs, outputs + self.linear.in_features), "logits", "those of forward", logits.shape
        )
        logits, features = at_least_float32(logits).split([outputs, logits.shape[1] - outputs], dim=1)
        weights = torch.ones_like(labels, dtype=logits.dtype)
        if self.training and self.queue and features.shape[1]:
            self._store(gather_rows(features.detach()), gather_rows(labels))
            drawn, drawn_labels, drawn_weights = self._draw(logits.dtype)
            logits = torch.cat([logits, at_least_float32(self.linear(drawn.to(self.linear.weight.dtype)))])
            labels, weights = torch.cat([labels, drawn_labels]), torch.cat([weights, drawn_weights])
        if self.training:
            self._update(logits.detach(), labels, weights)
        losses = F.cross_entropy(logits + self.mean_scores.log().to(logits.dtype), labels, reduction="none")
        return {"loss_classifier": (weights * losses).sum() / weights.sum().clamp(min=1)}

    @property
    def needs_fit(self) -> bool:
        """Whether there is a warm-up."""
        return self.warm_up

    @torch.no_grad()
    def fit(self, batches: Iterable[tuple[BoxFeatures, Tensor]]) -> None:
        """Warm up: store features of training proposals, and update the mean scores with their scores."""
        for features, labels in batches:
            logits = at_least_float32(self.linear(features.fc))
            if self.queue:
                self._store(at_least_float32(features.fc), labels)
            self._update(logits, labels, torch.ones_like(labels, dtype=logits.dtype))

    @torch.no_grad()
    def _store(self, features: Tensor, labels: Tensor) -> None:
        """Put the foreground's features [R, in_features], of all ranks, at their pointers: `queue` of each at most."""
        targets = F.one_hot(labels, self.num_categories + 1)
        order = (targets.cumsum(0) - 1).gather(1, labels[:, None])[:, 0]  # place among the batch's of its category
        category = (labels - 1).clamp(min=0)
        slots = category * self.queue + (self.pointers[category] + order) % self.queue
        unused = (labels == 0) | (order >= self.queue)
        slots = torch.where(unused, len(self.memory) - 1, slots)
        self.memory.index_copy_(0, slots, features.to(self.memory.dtype))
        self.memory[-1] = 0
        added = targets.sum(0)[1:].clamp(max=self.queue)
        self.pointers.copy_((self.pointers + added) % self.queue)
        self.stored.copy_((self.stored + added).clamp(max=self.queue))

    @torch.no_grad()
    def _draw(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Draw features [M, in_features], labels [M] and weights [M] from torch's global generator.

        The weight is 0 where a category without features was drawn, else 1.
        """
        ends = (1 / self.mean_scores[1:].clamp(min=1e-7)).cumsum(0)
        keys = torch.rand(self.sampled_categories, dtype=ends.dtype, device=ends.device)
        category = torch.searchsorted(ends, keys * ends[-1], right=True).clamp(max=self.num_categories - 1)
        category = category.repeat_interleave(self.sampled_features)
        keys = torch.rand(len(category), dtype=ends.dtype, device=ends.device)
        places = (keys * self.stored[category]).long()
        return self.memory[category * self.queue + places], category + 1, (self.stored[category] > 0).to(dtype)

    @torch.no_grad()
    def _update(self, logits: Tensor, labels: Tensor, weights: Tensor) -> None:
        """Update the mean scores of the categories that appear, with their probabilities at logits [R, C+1]."""
        scores = torch.softmax(logits.double(), -1).gather(1, labels[:, None])[:, 0]
        targets = F.one_hot(labels, self.num_categories + 1).double() * weights.double()[:, None]
        scores, numbers = sum_over_ranks(torch.stack([scores @ targets, targets.sum(0)]))
        updated = torch.lerp(scores / numbers.clamp(min=1), self.mean_scores, self.momentum)
        updated = torch.where(numbers > 0, updated, self.mean_scores)
        self.mean_scores[1:] = updated[1:]

    def probs(self, logits: Tensor) -> Tensor:
        """Softmax of the logits without margins, [R, C+1], column 0 the background. Rows sum to 1."""
        return super().probs(logits[:, : self.num_categories + 1])
