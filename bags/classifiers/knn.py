"""k nearest neighbours among stored training features. Nothing is trained.

Source: the prediction step of "Improving Long-Tailed Object Detection with Balanced Group Softmax and Metric Learning"
(Gaba 2025, arXiv 2511.16619). The weights of the votes are those of Wu et al., CVPR 2018 (instance discrimination).
Published: 24.5 box AP of BAGS on LVIS v1 (Faster R-CNN); the abstract gives no number for neighbours.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bags.classifiers.base import Affine, BoxFeatures, ClassifierSettings, TrainingCounts, at_least_float32
from bags.classifiers.softmax import Softmax
from bags.core.settings import Range

Features = Literal["fc", "logits"]
Metric = Literal["cosine", "euclidean"]
DISTANCES = 2**24  # as many are computed at a time, 64 MB


@dataclass(frozen=True)
class NearestNeighboursSettings(ClassifierSettings):
    """k nearest neighbours; takes a trained softmax, trains nothing."""

    trained, on_softmax, fitted = False, True, True

    name: Literal["knn"] = "knn"
    neighbours: Annotated[int, Range(ge=1)] = 20  # k
    per_category: Annotated[int, Range(ge=1)] = 100  # stored features, at most
    features: Features = "fc"
    metric: Metric = "cosine"
    temperature: Annotated[float, Range(gt=0)] = 0.07  # of the votes

    @property
    def layers(self) -> int:
        """The layer and the stored features."""
        return 1 + self.per_category

    def build(self, in_features: int, pooled_features: int, training: TrainingCounts) -> "NearestNeighbours":
        """Make the classifier, whose features are still to be stored."""
        return NearestNeighbours(
            in_features,
            training.num_categories,
            self.neighbours,
            self.per_category,
            self.features,
            self.metric,
            self.temperature,
        )


class NearestNeighbours(Softmax):
    """Foreground by a vote of the nearest training features, background from the plain classifier.

        vote of c = sum over the k nearest with label c of exp(-d / temperature), divided by that of all k

    neighbours    k >= 1, or all features where fewer are stored
    per_category  >= 1, so many foreground proposals of each category are stored at most, drawn with a fixed seed
    features      "fc": after the box head; "logits": the logits of the plain classifier without the background's, which
                  is the embedding that the paper's losses work on
    metric        "cosine": d is 1 minus the cosine, 0 to 2; "euclidean": d is the squared distance over its mean over
                  each proposal's k nearest, so that no unit matters
    temperature   above 0; a high one lets all k count alike

    Logits are [R, (C+1) + C]: plain, then votes in 0..1, which sum to 1. A category without stored features scores 0.
    The search is exact, by `torch.cdist` in chunks. The buffer `bank` takes 4 C per_category in_features bytes: 493 MB
    for LVIS v1 with 1,024 numbers, 10 MB for 100 categories with 256.
    """

    bank: Tensor
    bank_labels: Tensor

    def __init__(
        self,
        in_features: int,
        num_categories: int,
        neighbours: int = NearestNeighboursSettings.neighbours,
        per_category: int = NearestNeighboursSettings.per_category,
        features: Features = NearestNeighboursSettings.features,
        metric: Metric = NearestNeighboursSettings.metric,
        temperature: float = NearestNeighboursSettings.temperature,
    ):
        super().__init__(in_features, num_categories)
        settings = NearestNeighboursSettings(
            neighbours=neighbours,
            per_category=per_category,
            features=features,
            metric=metric,
            temperature=temperature,
        )
        self.neighbours, self.per_category = settings.neighbours, settings.per_category
        self.features, self.metric, self.temperature = settings.features, settings.metric, settings.temperature
        width = in_features if self.features == "fc" else num_categories
        self.register_buffer("bank", torch.zeros(num_categories * per_category, width))
        self.register_buffer("bank_labels", torch.zeros(num_categories * per_category, dtype=torch.long))  # 0: empty

    def affine(self) -> Affine | None:
        """Return None: votes are no affine map of the features."""
        return None

    def embed(self, features: BoxFeatures) -> Tensor:
        """Compute what is compared: [R, in_features], or [R, C] for the logits; of length 1 for the cosine."""
        values = features.fc if self.features == "fc" else self.linear(features.fc)[:, 1:]
        values = at_least_float32(values)
        return F.normalize(values, dim=1) if self.metric == "cosine" else values

    @torch.no_grad()
    def fit(self, batches: Iterable[tuple[BoxFeatures, Tensor]]) -> None:
        """Store features of foreground proposals (sampled ones and ground truth boxes).

        Raises ValueError if there are none.
        """
        generator = torch.Generator().manual_seed(0)
        kept, fresh = _Rows.none(self.bank), []
        for features, labels in batches:
            foreground = labels > 0
            rows = self.embed(features)[foreground].to(self.bank)
            fresh.append(_Rows(rows, labels[foreground], torch.rand(len(rows), generator=generator).to(rows.device)))
            if sum(len(rows.labels) for rows in fresh) > len(self.bank):  # seldom: it copies all
                kept, fresh = _Rows.joined([kept, *fresh]).limited(self.per_category), []
        kept = _Rows.joined([kept, *fresh]).limited(self.per_category)
        if not len(kept.labels):
            raise ValueError("no foreground proposal in the training images: there are no neighbours")
        self.bank.zero_()[: len(kept.labels)] = kept.features
        self.bank_labels.zero_()[: len(kept.labels)] = kept.labels

    def votes(self, queries: Tensor) -> Tensor:
        """Compute the categories' shares of the votes, [R, C], for embedded proposals [R, width]; 0 without a bank."""
        number = int((self.bank_labels > 0).sum())
        if not number:
            return _no_votes(queries, self.num_categories)
        bank, labels = self.bank[:number].to(queries.dtype), self.bank_labels[:number]
        # A trace for ONNX is of any number of queries, which are then not divided.
        parts = [queries] if torch.jit.is_tracing() else queries.split(max(1, DISTANCES // number))
        return torch.cat([self._votes(part, bank, labels) for part in parts])

    def _votes(self, queries: Tensor, bank: Tensor, labels: Tensor) -> Tensor:
        """`votes` of a few queries, among the rows [K, width] of a bank and their labels [K]."""
        nearest = torch.cdist(queries, bank).topk(min(self.neighbours, len(bank)), dim=1, largest=False)
        squares = nearest.values**2
        # Of vectors of length 1, half the squared distance is 1 minus the cosine.
        distances = squares / 2 if self.metric == "cosine" else squares / squares.mean(1, True).clamp(min=1e-12)
        shares = _no_votes(queries, self.num_categories)
        return shares.scatter_add(1, labels[nearest.indices] - 1, torch.softmax(-distances / self.temperature, 1))

    def forward(self, features: BoxFeatures) -> Tensor:
        """Compute plain logits and votes, [R, 2C + 1]."""
        plain = at_least_float32(self.linear(features.fc))
        return torch.cat([plain, self.votes(self.embed(features).detach())], dim=1)

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Compute the loss of the plain classifier."""
        return super().loss(logits[:, : self.num_categories + 1], labels)

    def probs(self, logits: Tensor) -> Tensor:
        """Scores [R, C+1], rows sum to 1: P(background) of the plain softmax, the rest shared by the votes."""
        plain, votes = at_least_float32(logits).split([self.num_categories + 1, self.num_categories], dim=1)
        background = torch.softmax(plain, -1)[:, :1]
        return torch.cat([background, (1 - background) * votes], dim=1)


@dataclass(frozen=True)
class _Rows:
    features: Tensor  # [N, width]
    labels: Tensor  # [N] in 1..C
    keys: Tensor  # [N] random numbers in 0..1; the lowest of a category are kept

    @classmethod
    def none(cls, like: Tensor) -> "_Rows":
        """No rows, of the width and type of a tensor [*, width]."""
        return cls(like[:0], like.new_zeros(0, dtype=torch.long), like.new_zeros(0, dtype=torch.float32))

    @classmethod
    def joined(cls, parts: list["_Rows"]) -> "_Rows":
        """All rows of several."""
        columns = ([getattr(part, name) for part in parts] for name in ("features", "labels", "keys"))
        return cls(*(torch.cat(column) for column in columns))

    def limited(self, most: int) -> "_Rows":
        """Keep the `most` rows of each label with the lowest keys, sorted by label and key."""
        order = self.keys.argsort(stable=True)
        order = order[self.labels[order].argsort(stable=True)]
        labels = self.labels[order]
        first = torch.searchsorted(labels, labels)  # position of each label's first row
        order = order[torch.arange(len(labels), device=labels.device) - first < most]
        return _Rows(self.features[order], self.labels[order], self.keys[order])


def _no_votes(queries: Tensor, categories: int) -> Tensor:
    """Zeros [R, C] for queries [R, width], of which a trace keeps no number of rows."""
    return torch.zeros_like(queries[:, :1]).repeat(1, categories)
