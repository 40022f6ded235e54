"""Training objects whose label is likely wrong."""

import numpy as np
import torch
from torch.nn import functional as F

from bags.analysis.wrong_labels import suspects


def test_suspects_by_hand():
    """Two categories along the axes; one object of the first lies along the second axis."""
    features = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 5.0], [0.0, 3.0], [0.0, 1.0], [3.0, 4.0]])
    labels = torch.tensor([1, 1, 1, 2, 2, 3])
    found = suspects(features, labels)
    # Means without the object: (1, 0) of the first category, (0, 1) of the second; the third has one object only.
    assert found.objects.tolist() == [2] and found.guesses.tolist() == [2] and found.nearer == 1
    torch.testing.assert_close(found.similarity, torch.tensor([1.0]))
    torch.testing.assert_close(found.own, torch.tensor([0.0]))


def test_suspects_are_those_of_a_slow_version():
    """Every object is compared with means that are computed anew without it."""
    torch.manual_seed(0)
    labels = torch.randint(1, 7, (60,))
    labels[0] = 9  # 7 and 8 have no object
    features = torch.randn(60, 5).half()
    rows, margins = F.normalize(features.float(), dim=1), {}
    for k in range(1, 60):
        means = {c: rows[[j for j in range(60) if labels[j] == c and j != k]].sum(0) for c in (*range(1, 7), 9)}
        cosines = {c: float(F.cosine_similarity(mean, rows[k], dim=0)) for c, mean in means.items()}
        own = cosines.pop(int(labels[k]))
        best = max(cosines, key=lambda c: cosines[c])
        if cosines[best] > own:
            margins[k] = cosines[best] - own, best
    expected = sorted(margins, key=lambda k: -margins[k][0])
    found = suspects(features, labels, most=10)
    assert found.objects.tolist() == expected[:10] and found.nearer == len(margins) > 10
    assert found.guesses.tolist() == [margins[k][1] for k in expected[:10]]


def test_exchanged_labels_come_first():
    """Of a long tail, 3 % of the labels are exchanged; most of the first suspects are those."""
    torch.manual_seed(0)
    counts = [400, 200, 100, 50, 25, 12, 6]
    labels = torch.repeat_interleave(torch.arange(1, 8), torch.tensor(counts))
    features = torch.randn(7, 32)[labels - 1] + 0.7 * torch.randn(len(labels), 32)
    wrong = np.random.default_rng(0).choice(len(labels), 24, replace=False)
    given = labels.clone()
    given[wrong] = given[wrong] % 7 + 1
    found = suspects(features, given, most=24)
    hits = [k for k in found.objects.tolist() if k in set(wrong.tolist())]
    assert len(hits) >= 20
    assert np.mean([given[k] != labels[k] and found.guesses[i] == labels[k] for i, k in enumerate(found.objects)]) > 0.8


def test_nothing_to_suspect():
    """No objects, one category, and one object in each."""
    for labels in ([], [1, 1, 1], [1, 2, 3]):
        found = suspects(torch.ones(len(labels), 4), torch.tensor(labels, dtype=torch.int64))
        assert found.nearer == 0 and not len(found.objects)
