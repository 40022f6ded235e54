"""DisAlign, BACL, LOCE, nearest neighbours and Euclidean groups: slow versions from the equations, and by hand."""

import copy
import math

import pytest
import torch
from later_methods import COUNTS
from test_later_methods import LABELS, agree
from test_methods import features, tensor

import bags
from bags.classifiers.base import BoxFeatures, EuclideanLinear

WIDTH = 5


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def randomised(classifier, seed=0):
    """The classifier in float64 with larger weights."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.copy_(torch.randn(parameter.shape) / 2)
    return classifier.double()


def proposals(number=16, seed=1):
    torch.manual_seed(seed)
    return torch.randn(number, WIDTH, dtype=torch.float64)


# --------------------------------------------------------------------------- DisAlign


def slow_disalign(classifier, fc, labels, rho=0.8, by_weights=False):
    """Loss, one proposal and one category at a time."""
    total, weights, shares = 0, 0, [n / sum(COUNTS) for n in COUNTS]
    raw = [(1 / r) ** rho for r in shares]
    for row, label in zip(fc, labels, strict=True):
        layer = zip(classifier.linear.weight, classifier.linear.bias, strict=True)
        plain = [(weight * row).sum() + bias for weight, bias in layer]
        confidence = 1 / (1 + torch.exp(-(classifier.confidence.weight[0] * row).sum() - classifier.confidence.bias[0]))
        aligned = [plain[0]]
        for c in range(8):
            moved = classifier.scale[c] * plain[c + 1] + classifier.offset[c]
            aligned.append(confidence * moved + (1 - confidence) * plain[c + 1])
        log_sum = torch.log(sum(torch.exp(z) for z in aligned))
        weight = 8 * raw[label - 1] / sum(raw) if label else 1
        total, weights = total - weight * (aligned[label] - log_sum), weights + weight
    return total / (weights if by_weights else len(labels))


@pytest.mark.parametrize("divide_by", ["proposals", "weights"])
def test_disalign_equals_the_slow_version(divide_by):
    classifier, fc = randomised(bags.DisAlign(WIDTH, COUNTS, divide_by=divide_by)), proposals()
    fast = classifier.loss(classifier(features(fc)), torch.tensor(LABELS))["loss_classifier"]
    slow = slow_disalign(classifier, fc, LABELS, by_weights=divide_by == "weights")
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)
    trained = {name: p for name, p in classifier.named_parameters() if p.requires_grad}
    assert trained.keys() == {"scale", "offset", "confidence.weight", "confidence.bias"}
    pairs = zip(*(torch.autograd.grad(x, list(trained.values())) for x in (fast, slow)), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_disalign_by_hand():
    """Confidence 3/4: logit 2 becomes 3/4 (3 * 2 + 1) + 1/4 * 2 = 5.75; the background stays. Weights 4/3 and 2/3."""
    classifier = bags.DisAlign(1, (10, 20), rho=1)
    with torch.no_grad():
        classifier.linear.weight.copy_(torch.tensor([[1.0], [2], [0]]))
        classifier.scale[0], classifier.offset[0] = 3, 1
        classifier.confidence.weight[0, 0] = math.log(3)
    logits = classifier(features(torch.ones(1, 1)))
    assert logits[0].tolist() == pytest.approx([1, 5.75, 0])
    zeros = torch.zeros(3, 3)
    loss = classifier.loss(zeros, torch.tensor([0, 1, 2]))["loss_classifier"]
    assert loss.item() == pytest.approx((1 + 4 / 3 + 2 / 3) * math.log(3) / 3)
    assert classifier.class_weights.tolist() == pytest.approx([1, 4 / 3, 2 / 3])


def test_disalign_starts_as_the_softmax_and_keeps_its_layer():
    classifier, fc = bags.DisAlign(WIDTH, COUNTS, rho=0), proposals().float()
    plain, labels = classifier.linear(fc), torch.tensor(LABELS)
    torch.testing.assert_close(classifier(features(fc)), plain)
    torch.testing.assert_close(classifier.loss(plain, labels), bags.Softmax(WIDTH, 8).loss(plain, labels))
    classifier.requires_grad_(False).requires_grad_(True)
    assert not classifier.linear.weight.requires_grad and classifier.scale.requires_grad
    assert bags.DisAlign(WIDTH, (0, 5)).class_weights.isfinite().all()
    extreme = bags.DisAlign(WIDTH, (1, 10**7), rho=60)
    assert extreme.class_weights.tolist() == pytest.approx([1, 2, 0])
    none = bags.DisAlign(WIDTH, COUNTS, divide_by="weights").loss(torch.zeros(0, 9), torch.zeros(0, dtype=torch.long))
    assert none["loss_classifier"] == 0


# --------------------------------------------------------------------------- BACL


def slow_bacl(logits, labels, shares, counts, alpha=0.85, threshold=0.7):
    """Loss, and what the batch adds: shares [C, C], counts [C]."""

    def mean(i, j):
        return max(shares[i][j] / max(counts[i], 1), 1e-3)

    number = len(counts)
    added = [[0.0] * number for _ in counts]
    total = 0
    for row, label in zip(logits, labels, strict=True):
        values = row.tolist()
        scores = [sigmoid(values[0])] + [sigmoid(z) * (1 - sigmoid(values[0])) for z in values[1:]]
        for j, z in enumerate(row):
            rival = label == 0 or j == 0 or scores[j] >= scores[label] or scores[j] >= threshold
            margin = 0
            if label and j:
                margin = alpha * math.log(mean(label - 1, j - 1) / mean(j - 1, label - 1))
            p = 1 / (1 + torch.exp(-z - margin))
            total = total - rival * torch.log(p if j == label else 1 - p)
        if label:
            powers = [math.exp(z) for z in values[1:]]
            for j in range(number):
                added[label - 1][j] += powers[j] / sum(powers)
    return total / len(labels), added


def test_bacl_equals_the_slow_version_over_several_steps():
    classifier = bags.BACL(4, 8)
    shares, counts = [[0.0] * 8 for _ in range(8)], [0] * 8
    for step in range(4):
        before = shares, counts
        logits, _ = agree(classifier, lambda z, y, of=before: slow_bacl(z, y, *of)[0], 9, seed=step)
        added = slow_bacl(logits, LABELS, *before)[1]
        shares = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(shares, added, strict=True)]
        counts = [n + LABELS.count(c) for c, n in enumerate(counts, start=1)]
        torch.testing.assert_close(classifier.shares, tensor(shares).double())
        assert classifier.counts.tolist() == counts


def test_bacl_by_hand():
    """Before the first statistics: scores of 1/2 (and 1/4 of a category), so each is a rival of the other.

    Then half of category 1's proposals look like 2, and none the other way: m_12 = log(1/2 / 0.001) = -m_21.
    """
    classifier = bags.BACL(4, 2, alpha=1)
    loss = classifier.eval().loss(torch.zeros(2, 3), torch.tensor([0, 1]))["loss_classifier"]
    assert loss.item() == pytest.approx(3 * math.log(2)) and not classifier.counts.any()
    classifier.shares[0, 1], classifier.counts[0] = 2, 4
    m = math.log(500)
    assert classifier.margins().tolist() == [[0, pytest.approx(m)], [pytest.approx(-m), 0]]
    loss = classifier.loss(torch.zeros(1, 3), torch.tensor([1]))["loss_classifier"]
    assert loss.item() == pytest.approx(2 * math.log(2) - math.log(1 - sigmoid(m)), rel=1e-5)
    loss = classifier.loss(tensor([[0, -9, 9]]).float(), torch.tensor([2]))["loss_classifier"]
    assert loss.item() == pytest.approx(math.log(2) - math.log(sigmoid(9)), abs=1e-4)  # category 1 is no rival


# --------------------------------------------------------------------------- LOCE


def slow_equilibrium(logits, labels, weights, scores):
    """sum of w CE(z + log s) / sum of w."""
    total = 0
    for row, label, weight in zip(logits, labels, weights, strict=True):
        powers = [s * torch.exp(z) for s, z in zip(scores, row, strict=True)]
        total = total - weight * torch.log(powers[label] / sum(powers))
    return total / sum(weights)


def updated_scores(logits, labels, weights, scores, momentum=0.9):
    """The running means after a batch; the background's stays."""
    new = list(scores)
    for c in range(1, len(scores)):
        found = [
            math.exp(row[c]) / sum(map(math.exp, row))
            for row, label, weight in zip(logits.tolist(), labels, weights, strict=True)
            if label == c and weight
        ]
        if found:
            new[c] = momentum * scores[c] + (1 - momentum) * sum(found) / len(found)
    return new


def test_loce_without_memory_equals_the_slow_version_over_several_steps():
    classifier, scores = bags.LOCE(4, 8, queue=0), [0.01] * 9
    weights = [1] * len(LABELS)
    for step in range(4):
        torch.manual_seed(step)
        logits = 2 * torch.randn(len(LABELS), 9, dtype=torch.float64)  # as `agree` draws them
        scores = updated_scores(logits, LABELS, weights, scores)
        agree(classifier, lambda z, y, s=scores: slow_equilibrium(z, y, weights, s), 9, seed=step)
        assert classifier.mean_scores.tolist() == pytest.approx(scores)


def test_loce_with_memory_equals_the_slow_version():
    """Queues as lists; the drawn categories and features follow from the same random numbers."""
    classifier = randomised(bags.LOCE(WIDTH, 8, queue=2, sampled_categories=5, sampled_features=3))
    queues, places, scores = {c: {} for c in range(1, 9)}, dict.fromkeys(range(1, 9), 0), [0.01] * 9
    skipped = 0
    for step in range(5):
        fc, labels = proposals(len(LABELS), seed=step), LABELS[step:] + LABELS[:step]
        torch.manual_seed(step)
        fast = classifier.loss(classifier(features(fc)), torch.tensor(labels))["loss_classifier"]
        for c, queue in queues.items():
            for row in [row for row, label in zip(fc, labels, strict=True) if label == c][:2]:
                queue[places[c] % 2] = row
                places[c] += 1
        torch.manual_seed(step)
        chosen, drawn_labels = [], []
        total = sum(1 / s for s in scores[1:])
        categories = []
        for key in torch.rand(5, dtype=torch.float64).tolist():
            reached, c = 0, 0
            while reached <= key * total:
                c += 1
                reached += 1 / scores[c]
            categories += [c] * 3
        for c, key in zip(categories, torch.rand(15, dtype=torch.float64).tolist(), strict=True):
            skipped += not queues[c]
            if queues[c]:
                chosen.append(queues[c][int(key * len(queues[c]))])
                drawn_labels.append(c)
        everything = torch.stack([*fc, *chosen])
        logits, both = classifier.linear(everything), (*labels, *drawn_labels)
        scores = updated_scores(logits.detach(), both, [1] * len(both), scores)
        slow = slow_equilibrium(logits, both, [1] * len(both), scores)
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)
        parameters = list(classifier.linear.parameters())
        for ours, theirs in zip(*(torch.autograd.grad(x, parameters) for x in (fast, slow)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        assert classifier.mean_scores.tolist() == pytest.approx(scores)
        assert classifier.stored.tolist() == [len(queue) for queue in queues.values()]
    assert skipped and not classifier.memory[-1].any()


def test_loce_by_hand():
    """Score 1/3 of label 1: s_1 = 0.9 * 0.01 + 0.1 / 3 = 0.127 / 3; the others keep 0.01."""
    classifier = bags.LOCE(4, 2, queue=0)
    loss = classifier.loss(torch.zeros(1, 3), torch.tensor([1]))["loss_classifier"].item()
    s = 0.127 / 3
    assert classifier.mean_scores.tolist() == pytest.approx([0.01, s, 0.01])
    assert loss == pytest.approx(-math.log(s / (s + 0.02)), rel=1e-5)
    evaluated = copy.deepcopy(classifier).eval()
    evaluated.loss(torch.zeros(1, 3), torch.tensor([2]))
    assert torch.equal(evaluated.mean_scores, classifier.mean_scores)
    assert classifier.probs(torch.zeros(1, 3)).tolist() == [pytest.approx([1 / 3] * 3)]  # without margins


def test_loce_warm_up_equals_the_slow_version():
    """Two batches of the baseline: their features are stored, and each moves the mean scores."""
    classifier = randomised(bags.LOCE(WIDTH, 8, queue=3, warm_up=True))
    assert classifier.needs_fit and not bags.LOCE(WIDTH, 8).needs_fit
    batches = [(proposals(len(LABELS), seed=step), LABELS[step:] + LABELS[:step]) for step in range(2)]
    classifier.fit((features(fc), torch.tensor(labels)) for fc, labels in batches)
    scores, seen = [0.01] * 9, {c: [] for c in range(1, 9)}
    for fc, labels in batches:
        scores = updated_scores(classifier.linear(fc).detach(), labels, [1] * len(labels), scores)
        for c, rows in seen.items():
            rows += [row for row, label in zip(fc, labels, strict=True) if label == c][:3]
    assert classifier.mean_scores.tolist() == pytest.approx(scores)
    assert classifier.stored.tolist() == [min(3, len(rows)) for rows in seen.values()]
    for c, rows in seen.items():
        held = classifier.memory[3 * (c - 1) : 3 * c][: len(rows)]
        assert sorted(held.tolist()) == sorted(row.tolist() for row in rows[-3:])
    parts = [bags.LOCE(WIDTH, 8, queue=0, warm_up=True) for _ in range(2)]
    for part in parts:
        part.linear.load_state_dict(classifier.float().linear.state_dict())
    parts[0].fit([(features(batches[0][0].float()), torch.tensor(batches[0][1]))])
    parts[1].loss(parts[1](features(batches[0][0].float())), torch.tensor(batches[0][1]))
    assert parts[0].mean_scores.tolist() == pytest.approx(parts[1].mean_scores.tolist())


def test_loce_resumes_exactly():
    """A copy by the state dict goes on as the original; the features behind the logits never change the scores."""
    first, second = (bags.LOCE(WIDTH, 8, queue=3) for _ in range(2))
    labels, fc = torch.tensor(LABELS), proposals().float()
    first.loss(first(features(fc)), labels)
    second.load_state_dict(first.state_dict())
    found = []
    for classifier in (first, second):
        torch.manual_seed(3)
        found.append(classifier.loss(classifier(features(fc + 1)), labels)["loss_classifier"])
    assert torch.equal(*found)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert torch.equal(first.probs(first(features(fc))), first.eval().probs(first(features(fc))))
    with pytest.raises(ValueError, match="logits: expected those of forward"):
        first.loss(torch.zeros(1, 10), torch.tensor([1]))


# --------------------------------------------------------------------------- odd batches


MAKERS = {
    "disalign": lambda counts: bags.DisAlign(WIDTH, counts),
    "bacl": lambda counts: bags.BACL(WIDTH, len(counts)),
    "loce": lambda counts: bags.LOCE(WIDTH, len(counts), queue=2),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("counts", [(7,), (0, 7)])
@pytest.mark.parametrize("labels", [(), (0, 0, 0), (1, 0), (1, 1, 1, 1)])
def test_odd_batches(name, counts, labels):
    """No proposal, no foreground, no background, one category, a category without objects: finite, and trainable."""
    classifier = MAKERS[name](counts)
    for _ in range(2):
        fc = torch.randn(len(labels), WIDTH)
        loss = classifier.loss(classifier(features(fc)), torch.tensor(labels, dtype=torch.long))["loss_classifier"]
        loss.backward()
        assert loss.isfinite() and (labels or isinstance(classifier, bags.LOCE) or loss == 0)
    assert all(p.grad is None or p.grad.isfinite().all() for p in classifier.parameters())
    assert all(value.isfinite().all() for value in classifier.state_dict().values())
    assert classifier.probs(classifier.eval()(features(fc))).shape == (len(labels), len(counts) + 1)


# --------------------------------------------------------------------------- nearest neighbours


def fitted(number=60, **settings):
    """A classifier of three categories and its training proposals; the third category has none."""
    classifier = randomised(bags.NearestNeighbours(WIDTH, 3, **settings)).eval()
    fc, labels = proposals(number), torch.arange(number) % 3
    classifier.fit((BoxFeatures(part, part), of) for part, of in zip(fc.split(7), labels.split(7), strict=True))
    return classifier, fc, labels


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("space", ["fc", "logits"])
def test_neighbours_equal_the_slow_version(metric, space, monkeypatch):
    monkeypatch.setattr("bags.classifiers.knn.DISTANCES", 100)  # chunks of two proposals
    classifier, fc, labels = fitted(neighbours=6, metric=metric, features=space, temperature=0.3)
    queries = proposals(5, seed=9)

    def embedded(row):
        values = row if space == "fc" else classifier.linear(row)[1:]
        return (values / values.norm() if metric == "cosine" else values).detach().float()

    stored = [(embedded(row), label) for row, label in zip(fc, labels.tolist(), strict=True) if label]
    for query, found in zip(queries, classifier(features(queries))[:, 4:].tolist(), strict=True):
        distances = sorted((float((embedded(query) - row).square().sum()), label) for row, label in stored)[:6]
        unit = 2 if metric == "cosine" else sum(d for d, _ in distances) / 6
        votes = [(math.exp(-d / unit / 0.3), label) for d, label in distances]
        expected = [sum(v for v, label in votes if label == c) / sum(v for v, _ in votes) for c in (1, 2, 3)]
        assert found == pytest.approx(expected, abs=1e-4)
    scores = classifier.probs(classifier(features(queries)))
    plain = torch.softmax(classifier.linear(queries), -1)
    torch.testing.assert_close(scores[:, 0], plain[:, 0])
    torch.testing.assert_close(scores.sum(1), torch.ones(5, dtype=torch.float64))


def test_neighbours_by_hand():
    """Two neighbours of (1, 0): (1, 0) of label 1, and (0, 1) of label 2 at a cosine of 0. Votes 1 to e^-1."""
    classifier = bags.NearestNeighbours(2, 2, neighbours=2, temperature=1)
    bank = torch.tensor([[2.0, 0], [0, 3], [-1, 0], [5, 5]])
    classifier.fit([(features(bank), torch.tensor([1, 2, 1, 0]))])
    classifier.linear.weight.data.zero_()
    scores = classifier.probs(classifier(features(torch.tensor([[7.0, 0]]))))[0].tolist()
    e = math.exp(-1)
    assert scores == pytest.approx([1 / 3, 2 / 3 / (1 + e), 2 / 3 * e / (1 + e)], abs=1e-5)


def test_the_bank_is_limited_balanced_and_the_same_each_time():
    """30 of 40 proposals are of label 1; 4 of each are kept, whatever the size of the batches that it came in."""
    fc, labels = proposals(40).float(), torch.tensor([1, 1, 1, 2] * 10)
    banks = []
    for size in (40, 3):
        classifier = bags.NearestNeighbours(WIDTH, 2, per_category=4, metric="euclidean")
        classifier.fit((features(a), b) for a, b in zip(fc.split(size), labels.split(size), strict=True))
        assert classifier.bank_labels.tolist() == [1] * 4 + [2] * 4
        banks.append(classifier.bank)
        rows = [next(k for k in range(40) if torch.equal(fc[k], row)) for row in classifier.bank]
        assert [labels[k].item() for k in rows] == [1] * 4 + [2] * 4 and len(set(rows)) == 8
    assert torch.equal(*banks)
    copied = bags.NearestNeighbours(WIDTH, 2, per_category=4, metric="euclidean")
    copied.load_state_dict(classifier.state_dict())
    assert torch.equal(copied(features(fc)), classifier(features(fc)))


def test_neighbours_without_any():
    classifier = bags.NearestNeighbours(WIDTH, 2)
    with pytest.raises(ValueError, match="no foreground proposal"):
        classifier.fit([(features(torch.randn(3, WIDTH)), torch.zeros(3, dtype=torch.long))])
    classifier.fit([(features(torch.randn(1, WIDTH)), torch.tensor([2]))])  # fewer than k
    assert classifier(features(torch.randn(4, WIDTH)))[:, 3:].tolist() == [[0, 1]] * 4
    assert classifier(features(torch.randn(0, WIDTH))).shape == (0, 5)


# --------------------------------------------------------------------------- distances within groups


def test_euclidean_groups_are_softmaxes_of_distances():
    """Loss, scores and the centres' gradients of the layer's logits are those of -||x - c||^2 / T^2."""
    torch.manual_seed(0)
    classifier = bags.GroupSoftmax(4, bags.assign_groups((5, 50, 6), (10,)), "n", euclidean=1.5).double()
    with torch.no_grad():
        classifier.linear.weight.normal_()
    fc, labels = torch.randn(12, 4, dtype=torch.float64), torch.arange(12) % 4
    distances = -(fc[:, None] - classifier.linear.weight[None]).square().sum(2) / 1.5**2
    logits = classifier(features(fc))
    torch.testing.assert_close(classifier.probs(logits), classifier.probs(distances))
    losses = [sum(classifier.loss(z, labels).values()) for z in (logits, distances)]
    gradients = [torch.autograd.grad(loss, classifier.linear.weight)[0] for loss in losses]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="euclidean: expected only one of scale and euclidean"):
        bags.GroupSoftmax(4, bags.assign_groups((5, 50)), scale=20, euclidean=1)


def test_euclidean_layer_by_hand():
    """x = (3, 4), c = (1, 2), T = 2: -(4 + 4) / 4 = -2, and without -||x||^2 / 4 = -25/4 it is 4.25."""
    layer = EuclideanLinear(2, 1, 2.0)
    layer.weight.data = torch.tensor([[1.0, 2]])
    assert layer(torch.tensor([[3.0, 4]])).item() == pytest.approx(4.25)
