"""The methods after the paper against slow versions (one proposal and one category at a time, written from the
equations), hand-worked numbers and properties."""

import itertools
import json
import math
import multiprocessing

import numpy as np
import pytest
import torch
from later_methods import COUNTS, IMAGES, everyone
from test_methods import features, tensor

import bags
from bags.assembly.stored_samples import TrainingFeatures
from bags.classifiers.base import CosineLinear
from bags.data.samplers import ClassBalancedSampler

RARE = {1, 3, 4, 6, 7}  # labels in at most 100 images
LABELS = (0, 0, 0, 0, 0, 0, 1, 1, 4, 2, 8, 3, 3, 0, 5, 6)


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def slow_binary(logits, labels, weight, first=1):
    """sum_ij w_ij BCE / R, element by element; column 0 of the logits is label `first`."""
    total = 0
    for row, label in zip(logits, labels, strict=True):
        for column, value in enumerate(row):
            p = sigmoid(value)
            term = -torch.log(p) if label == column + first else -torch.log(1 - p)
            total = total + weight(label, column + first, len(labels)) * term
    return total / len(labels)


def agree(classifier, slow, width, labels=LABELS, seed=0):
    """Loss and gradient of a classifier and of a slow version; both see the same random numbers."""
    torch.manual_seed(seed)
    logits = (2 * torch.randn(len(labels), width, dtype=torch.float64)).requires_grad_()
    state = torch.get_rng_state()
    losses = classifier.double().loss(logits, torch.tensor(labels))
    torch.set_rng_state(state)
    expected = slow(logits, labels)
    total = sum(losses.values())
    torch.testing.assert_close(total, expected, rtol=1e-9, atol=1e-12)
    gradients = [torch.autograd.grad(x, logits)[0] for x in (total, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    return logits.detach(), losses


# --------------------------------------------------------------------------- sigmoids


def test_sigmoid_equals_the_slow_version():
    agree(bags.Sigmoid(4, 8), lambda z, y: slow_binary(z, y, lambda *_: 1), 8)


def test_sigmoid_scores_by_hand():
    """Scores 1/2 and 3/4: the background is what the best leaves. Before training all score the prior."""
    classifier = bags.Sigmoid(4, 2, prior=0.01)
    scores = classifier.probs(torch.log(tensor([[1, 3]])))
    assert scores.tolist() == [pytest.approx([0.25, 0.5, 0.75])]
    start = classifier.probs(classifier(features(torch.zeros(1, 4))))
    assert start.tolist() == [pytest.approx([0.99, 0.01, 0.01])]
    assert classifier.weight_norms()[0].isnan() and classifier.weight_norms()[1:].isfinite().all()
    with pytest.raises(ValueError, match="prior"):
        bags.Sigmoid(4, 2, prior=1)


def test_eql_equals_the_slow_version():
    """w_j = 1 - E(r) T(f_j) (1 - y_j)."""

    def weight(label, category, _):
        return 1 - (label != 0) * (category in RARE) * (category != label)

    logits, _ = agree(bags.EqualizationLoss(4, IMAGES), lambda z, y: slow_binary(z, y, weight), 8)
    plain, none_rare = bags.Sigmoid(4, 8), bags.EqualizationLoss(4, IMAGES, tail_images=0)
    labels = torch.tensor(LABELS)
    assert none_rare.loss(logits, labels) == plain.loss(logits, labels)


def test_eql_by_hand():
    """Scores 1/2: label 1 is rare, 2 is not. An object of 2 teaches 2 alone; background and 1 teach both."""
    loss = bags.EqualizationLoss(4, (5, 500)).loss(torch.zeros(3, 2), torch.tensor([0, 1, 2]))["loss_classifier"]
    assert loss.item() == pytest.approx((2 + 2 + 1) * math.log(2) / 3)


def test_drop_loss_equals_the_slow_version():
    """Background proposals: dropped where the drawn number exceeds the rare share of the foreground."""

    def slow(logits, labels):
        draws = torch.rand(len(labels), 8, dtype=torch.float64)
        foreground = [label for label in labels if label]
        share = sum(label in RARE for label in foreground) / len(foreground)
        rows = iter(range(len(labels)))
        state = {}

        def weight(label, category, _):
            if category == 1:
                state["row"] = next(rows)
            if category not in RARE or category == label:
                return 1
            return 0 if label else float(draws[state["row"], category - 1] <= share)

        return slow_binary(logits, labels, weight)

    agree(bags.DropLoss(4, IMAGES), slow, 8)


def test_drop_loss_at_its_ends():
    """Rare foreground alone: no background is dropped, as in EQL; frequent alone: all; none at all: nothing is."""
    drop, plain = bags.DropLoss(4, (5, 500)), bags.EqualizationLoss(4, (5, 500))
    logits = torch.zeros(4, 2)
    for labels, elements in (((0, 0, 1, 1), 8), ((0, 0, 2, 2), 4), ((0, 0, 0, 0), 8)):
        found = drop.loss(logits, torch.tensor(labels))["loss_classifier"]
        assert found.item() == pytest.approx(elements * math.log(2) / 4)
        if 2 not in labels:
            assert found == plain.loss(logits, torch.tensor(labels))["loss_classifier"]


def test_federated_takes_what_appears_and_what_is_drawn():
    """Four places, one for the background, three categories appear: no other is drawn. All places: plain sigmoid."""
    seen = {1, 2, 4}
    labels = (0, 1, 2, 4, 0)
    agree(
        bags.Federated(4, IMAGES, number=4),
        lambda z, y: slow_binary(z, y, lambda _, category, __: category in seen),
        8,
        labels,
    )
    agree(bags.Federated(4, IMAGES, number=2), lambda z, y: slow_binary(z, y, lambda _, c, __: c in seen), 8, labels)
    agree(bags.Federated(4, IMAGES, number=9), lambda z, y: slow_binary(z, y, lambda *_: 1), 8, labels)


def test_federated_draws_by_the_root_of_the_counts():
    """One place beside label 1: the others come with probability ~ sqrt(images), as torch.multinomial draws them."""
    torch.manual_seed(0)
    images = (4, 1, 100, 400)
    classifier = bags.Federated(4, images, number=2)
    targets, labels = torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([1])
    total = sum(classifier.element_weights(targets, labels)[0] for _ in range(3000)) / 3000
    assert total[0] == 1 and total.sum() == 2
    assert total[1:].tolist() == pytest.approx([1 / 31, 10 / 31, 20 / 31], abs=0.04)  # four standard deviations
    with_background = classifier.element_weights(torch.zeros(2, 4), torch.tensor([0, 0]))
    assert with_background.sum() == 1  # the background takes the other place


def test_federated_draws_without_replacement_as_multinomial_does():
    """Pairs of three categories with weights 1, 2, 5: the probability of each pair, both orders added up."""
    torch.manual_seed(1)
    classifier = bags.Federated(4, (1, 4, 25), number=2)
    draws = [
        tuple(classifier.element_weights(torch.zeros(0, 3), torch.zeros(0).long())[0].tolist()) for _ in range(3000)
    ]
    w = (1 / 8, 2 / 8, 5 / 8)
    for pair in ((0, 1), (0, 2), (1, 2)):
        a, b = (w[i] for i in pair)
        share = sum(all(draw[i] for i in pair) for draw in draws) / 3000
        assert share == pytest.approx(a * b / (1 - a) + b * a / (1 - b), abs=0.04)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999])
def test_class_balanced_equals_the_slow_version(beta):
    """(1 - beta) / (1 - beta^n) of the label, scaled to a mean of 1; background 1."""
    raw = [(1 - beta) / (1 - beta**n) for n in COUNTS]

    def weight(label, *_):
        return raw[label - 1] * len(raw) / sum(raw) if label else 1

    agree(bags.ClassBalancedSigmoid(4, COUNTS, beta), lambda z, y: slow_binary(z, y, weight), 8)


def test_balanced_sigmoid_equals_the_slow_version():
    def slow(logits, labels):
        total = 0
        for row, label in zip(logits, labels, strict=True):
            for category, value in enumerate(row, start=1):
                n = COUNTS[category - 1]
                z = value - math.log((sum(COUNTS) - n) / n) if label else value
                total = total - torch.log(sigmoid(z) if category == label else 1 - sigmoid(z))
        return total / len(labels)

    agree(bags.BalancedSigmoid(4, COUNTS), slow, 8)
    logits = torch.randn(3, 8)
    assert torch.equal(bags.BalancedSigmoid(4, COUNTS).probs(logits), bags.Sigmoid(4, 8).probs(logits))


# --------------------------------------------------------------------------- equalization loss v2


def slow_eql_v2(logits, labels, positive, negative, gamma=12, mu=0.8, alpha=4):
    """One step: loss, and what it adds to both sums. Before the first gradient all weights are 1."""
    first = sum(positive) + sum(negative) == 0

    def weights(category):
        if first or category == 0:
            return 1.0, 1.0
        ratio = positive[category - 1] / (negative[category - 1] + 1e-10)
        f = 1 / (1 + math.exp(-gamma * (ratio - mu)))
        return 1 + alpha * (1 - f), f

    added = [[0.0] * len(positive), [0.0] * len(positive)]
    total = 0
    for row, label in zip(logits, labels, strict=True):
        for category, value in enumerate(row):
            p, (up, down) = sigmoid(value), weights(category)
            if category == label:
                total = total - up * torch.log(p)
                gradient, kind = up * (1 - p.item()), 0
            else:
                total = total - down * torch.log(1 - p)
                gradient, kind = down * p.item(), 1
            if category:
                added[kind][category - 1] += gradient
    return total / len(labels), added


def test_eql_v2_equals_the_slow_version_over_several_steps():
    classifier = bags.EqualizationLossV2(4, 8)
    positive, negative = [0.0] * 8, [0.0] * 8
    for step in range(4):
        before = positive, negative
        logits, _ = agree(classifier, lambda z, y, of=before: slow_eql_v2(z, y, *of)[0], 9, seed=step)
        added = slow_eql_v2(logits, LABELS, *before)[1]
        positive, negative = ([a + b for a, b in zip(*pair, strict=True)] for pair in zip(before, added, strict=True))
        assert classifier.positive.tolist() == pytest.approx(positive)
        assert classifier.negative.tolist() == pytest.approx(negative)


def test_eql_v2_by_hand():
    """Scores 1/2. First step plain; then category 1 has ratio 1/3 (one object of four proposals), 2 has 0."""
    classifier = bags.EqualizationLossV2(4, 2).double()
    logits, labels = torch.zeros(4, 3, dtype=torch.float64), torch.tensor([0, 0, 0, 1])
    assert classifier.loss(logits, labels)["loss_classifier"].item() == pytest.approx(3 * math.log(2))
    assert classifier.positive.tolist() == [0.5, 0] and classifier.negative.tolist() == [1.5, 2]
    f1, f2 = 1 / (1 + math.exp(-12 * (1 / 3 - 0.8))), 1 / (1 + math.exp(12 * 0.8))
    second = classifier.loss(logits, labels)["loss_classifier"].item()
    assert second == pytest.approx((4 + 3 * f1 + 1 + 4 * (1 - f1) + 4 * f2) * math.log(2) / 4, rel=1e-6)
    scores = classifier.probs(torch.log(tensor([[1, 3, 1]])))  # P(background) 1/2
    assert scores.tolist() == [pytest.approx([0.5, 0.375, 0.25])]


# --------------------------------------------------------------------------- seesaw


def slow_seesaw(logits, labels, counts, p=0.8, q=2.0, eps=0.01):
    """Proposal by proposal; counts hold this batch already. Columns: background, foreground, categories."""
    total = 0
    for row, label in zip(logits, labels, strict=True):
        objectness = torch.softmax(row[:2], 0)
        total = total - torch.log(objectness[1 if label else 0])
        if not label:
            continue
        z, i = row[2:], label - 1
        s = torch.softmax(z.detach(), 0)
        bottom = 0
        for j in range(len(z)):
            factor = 1.0
            if j != i:
                ratio = max(counts[j], 1) / max(counts[i], 1)
                factor = ratio**p if ratio < 1 else 1.0
                likelier = (s[j] / max(s[i].item(), eps)).item()
                factor *= likelier**q if likelier > 1 else 1.0
            bottom = bottom + factor * torch.exp(z[j])
        total = total - torch.log(torch.exp(z[i]) / bottom)
    return total / len(labels)


def test_seesaw_equals_the_slow_version_over_several_steps():
    classifier = bags.Seesaw(4, 8)
    counts = [0] * 8
    for step in range(4):
        labels = LABELS if step % 2 else (0, 2, 2, 2, 8, 8, 8, 8, 8, 5)
        for label in labels:
            counts[label - 1] += label > 0
        agree(classifier, lambda z, y: slow_seesaw(z, y, counts), 10, labels, seed=step)
        assert classifier.counts.tolist() == counts


def test_seesaw_by_hand():
    """Equal logits, three objects of 1 to one of 2: 1 pushes 2 by (1/3)^0.8, 2 pushes 1 by 1."""
    classifier = bags.Seesaw(4, 2)
    losses = classifier.loss(torch.zeros(5, 4, dtype=torch.float64), torch.tensor([0, 1, 1, 1, 2]))
    expected = (3 * math.log(1 + (1 / 3) ** 0.8) + math.log(2)) / 5
    assert losses["loss_classifier"].item() == pytest.approx(expected)
    assert losses["loss_objectness"].item() == pytest.approx(math.log(2))
    # Compensation: category 2 is three times as likely as the true 1, so it weighs 9.
    classifier = bags.Seesaw(4, 2, p=0).eval()
    logits = torch.log(tensor([[1, 1, 1, 3]]))
    loss = classifier.loss(logits, torch.tensor([1]))["loss_classifier"]
    assert loss.item() == pytest.approx(math.log(1 + 9 * 3))
    scores = classifier.probs(torch.log(tensor([[1, 3, 1, 3]])))
    assert scores.tolist() == [pytest.approx([0.25, 0.75 * 0.25, 0.75 * 0.75])]


def test_seesaw_without_factors_is_softmax_and_its_layer_a_cosine():
    torch.manual_seed(0)
    classifier, labels = bags.Seesaw(4, 8, p=0, q=0), torch.tensor(LABELS)
    logits = torch.randn(len(labels), 10)
    found = classifier.loss(logits, labels)["loss_classifier"] * len(labels)
    expected = torch.nn.functional.cross_entropy(logits[labels > 0, 2:], labels[labels > 0] - 1, reduction="sum")
    torch.testing.assert_close(found, expected)
    fc = torch.randn(3, 4)
    cosine = torch.cosine_similarity(fc[:, None], classifier.linear.weight[None], dim=2)
    torch.testing.assert_close(classifier(features(fc)), 20 * cosine)
    torch.testing.assert_close(classifier(features(7 * fc)), 20 * cosine)
    assert CosineLinear(4, 2, 20.0)(torch.zeros(1, 4)).tolist() == [[0, 0]]
    assert type(bags.Seesaw(4, 8, scale=0).linear) is torch.nn.Linear
    assert classifier.weight_norms().shape == (9,)


# --------------------------------------------------------------------------- logit adjustment


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_logit_adjustment_equals_the_slow_version(tau):
    """Balanced Softmax: each category's exp(z) times its share over 1/C, to the tau; the background's as it is."""
    shares = [n / sum(COUNTS) * len(COUNTS) for n in COUNTS]

    def slow(logits, labels):
        total = 0
        for row, label in zip(logits, labels, strict=True):
            terms = [torch.exp(row[0]), *(s**tau * torch.exp(z) for s, z in zip(shares, row[1:], strict=True))]
            total = total - torch.log(terms[label] / sum(terms))
        return total / len(labels)

    logits, _ = agree(bags.LogitAdjusted(4, COUNTS, tau), slow, 9)
    plain, labels = bags.Softmax(4, 8), torch.tensor(LABELS)
    assert torch.equal(bags.LogitAdjusted(4, COUNTS, tau).probs(logits), plain.probs(logits))
    afterwards = bags.LogitAdjusted(4, COUNTS, tau, "scores")
    assert afterwards.loss(logits, labels) == plain.loss(logits, labels)
    terms = torch.cat([logits[:, :1].exp(), logits[:, 1:].exp() / tensor(shares) ** tau], dim=1)
    torch.testing.assert_close(afterwards.probs(logits), terms / terms.sum(1, keepdim=True))


def test_logit_adjustment_keeps_the_background_and_ranks_by_odds():
    """Adjusting after training equals training adjusted, where both fit: softmax(z + a) = p  <=>  z = log p - a."""
    torch.manual_seed(0)
    p = torch.softmax(torch.randn(5, 9, dtype=torch.float64), 1)
    before, after = bags.LogitAdjusted(4, COUNTS), bags.LogitAdjusted(4, COUNTS, 1.0, "scores")
    torch.testing.assert_close(before.probs(p.log() - before.shift), after.probs(p.log()))
    equal = bags.LogitAdjusted(4, (7,) * 8, 1.0, "scores").probs(p.log())
    torch.testing.assert_close(equal, p)  # no imbalance: nothing to adjust
    with pytest.raises(ValueError, match="adjust"):
        bags.LogitAdjusted(4, COUNTS, adjust="both")


# --------------------------------------------------------------------------- ACSL


def test_acsl_equals_the_slow_version_on_foreground():
    """w = 1 for the label and for scores of 0.7 and more, the background's column among them."""

    def slow(logits, labels):
        total = 0
        for row, label in zip(logits, labels, strict=True):
            for column, value in enumerate(row):
                p = sigmoid(value)
                if column == label:
                    total = total - torch.log(p)
                elif p >= 0.7:
                    total = total - torch.log(1 - p)
        return total / len(labels)

    agree(bags.ACSL(4, IMAGES), slow, 9, (1, 2, 3, 4, 5, 6, 7, 8, 8, 1))


def test_acsl_on_background():
    """200 background proposals: frequent categories and the background on all, common on 20, rare on 2."""
    torch.manual_seed(0)
    classifier = bags.ACSL(4, IMAGES)
    labels = torch.tensor([0] * 100 + [1, 2] * 5 + [0] * 100)
    logits = torch.full((210, 9), 5.0)  # confidence does not matter here
    targets = torch.nn.functional.one_hot(labels, 9)
    weights = classifier.element_weights(logits, targets, labels)
    on_background = weights[labels == 0].sum(0).tolist()
    rare, common = {1, 4, 7}, {3, 6}  # at most 10, at most 100 images
    expected = [2 if label in rare else 20 if label in common else 200 for label in range(9)]
    assert on_background == expected
    assert set(weights.unique().tolist()) == {0, 1} and (weights[labels > 0] == 1).all()
    for band in (rare, common):  # one draw for a band
        columns = weights[:, sorted(band)][labels == 0]
        assert (columns == columns[:, :1]).all()
    again = classifier.element_weights(logits, targets, labels)
    assert not torch.equal(again, weights)
    scores = classifier.probs(torch.log(tensor([[1, 3, 1, 1, 1, 1, 1, 1, 1]])))
    assert scores[0, :3].tolist() == pytest.approx([0.5, 0.75, 0.5])


# --------------------------------------------------------------------------- options of the grouped softmax


def grouped(counts=(5, 50, 6), boundaries=(10,), **settings):
    return bags.GroupSoftmax(4, bags.assign_groups(counts, boundaries), "n", **settings)


def test_temperatures_by_hand():
    """Labels 1, 3 in group 1, 2 in group 2. Dividing by 1/2 squares the odds, dividing by 2 takes their root."""
    classifier = grouped(temperatures=(1, 0.5, 2))
    logits = torch.log(tensor([[1, 3, 2, 1, 1, 1, 4]]))
    expected = [0.25, 0.75 / 6, 0.75 * 2 / 3, 0.75 / 6]
    assert classifier.probs(logits)[0].tolist() == pytest.approx(expected)
    labels = torch.tensor([3])
    assert classifier.loss(logits, labels) == grouped().loss(logits, labels)  # scores alone
    for wrong in ((1, 2), (1, 0, 1), (1, 1, 1, 1), "hot"):
        with pytest.raises(ValueError, match="temperatures"):
            grouped(temperatures=wrong)


@pytest.mark.parametrize("others", [True, False])
def test_learned_temperatures(others):
    """They start at 1; a factor of 2 for a group is the plain loss of its logits times 2; all are trained."""
    torch.manual_seed(0)
    classifier, plain = grouped(others=others, temperatures="learned"), grouped(others=others)
    logits, labels = torch.randn(6, classifier.linear.out_features), torch.tensor([0, 1, 2, 3, 0, 1])
    ours, theirs = classifier.loss(logits, labels), plain.loss(logits, labels)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert torch.equal(classifier.probs(logits), plain.probs(logits))
    with torch.no_grad():
        classifier.log_factors[1] = math.log(2)
    doubled, group1 = logits.clone(), slice(2, 5) if others else slice(1, 3)
    doubled[:, group1] *= 2
    ours, theirs = classifier.loss(logits, labels), plain.loss(doubled, labels)
    assert all(torch.allclose(ours[key], theirs[key]) for key in theirs)
    assert torch.allclose(classifier.probs(logits), plain.probs(doubled))
    sum(classifier.loss(logits, labels).values()).backward()
    gradient = classifier.log_factors.grad.clone()
    for n in range(3):  # by finite differences
        found = []
        for step in (1e-3, -1e-3):
            with torch.no_grad():
                classifier.log_factors[n] += step
                found.append(sum(classifier.loss(logits.double(), labels).values()).item())
                classifier.log_factors[n] -= step
        assert (found[0] - found[1]) / 2e-3 == pytest.approx(gradient[n].item(), abs=1e-3)


def test_cosine_layer_within_groups():
    torch.manual_seed(0)
    classifier, fc = grouped(scale=20.0), torch.randn(5, 4)
    cosine = torch.cosine_similarity(fc[:, None], classifier.linear.weight[None], dim=2)
    torch.testing.assert_close(classifier(features(fc)), 20 * cosine)
    assert classifier.weight_norms().shape == (4,)
    assert torch.equal(grouped(scale=0.0).linear.bias, torch.zeros(7))


def test_equal_boundaries_by_hand_and_by_trying_all():
    """Totals of 20 counts cut at any distinct counts: none has a smaller sum of squares."""
    assert bags.equal_boundaries([1, 2, 3, 6], 2) == (6,)
    assert bags.equal_boundaries([5, 5, 5, 15], 2) == (15,)
    assert bags.equal_boundaries([4, 9], 1) == ()
    assert bags.equal_boundaries([0, 0, 3], 2) == (3,)
    generator = torch.Generator().manual_seed(0)
    for number in (2, 3, 4):
        counts = torch.randint(0, 60, (20,), generator=generator).square().tolist()
        edges = sorted(set(counts))

        def cost(boundaries, counts=counts):
            groups = bags.assign_groups(counts, boundaries)
            return sum(sum(counts[label - 1] for label in groups.members(g)) ** 2 for g in range(len(groups.sizes)))

        least = min(cost(cut) for cut in itertools.combinations(edges[1:], number - 1))
        found = bags.equal_boundaries(counts, number)
        assert len(found) == number - 1 and cost(found) == least
    with pytest.raises(ValueError, match="1 to 2"):
        bags.equal_boundaries([4, 9, 9], 3)


# --------------------------------------------------------------------------- two heads, class-balanced proposals


def test_simcal_by_hand():
    """Label 1 is rare: its score comes from the second softmax; only that learns, and the first stays frozen."""
    classifier = bags.SimCal(4, (5, 500), below=300)
    logits = torch.log(tensor([[1, 1, 2, 3, 4, 1]]))  # original 1/4 1/4 1/2, calibrated 3/8 1/2 1/8
    assert classifier.probs(logits).tolist() == [pytest.approx([0.25, 0.5, 0.5])]
    assert classifier.loss(logits, torch.tensor([2]))["loss_classifier"].item() == pytest.approx(math.log(8))
    classifier.requires_grad_(False)
    assert not any(p.requires_grad for p in classifier.parameters())
    classifier.requires_grad_(True)
    trained = {name for name, p in classifier.named_parameters() if p.requires_grad}
    assert trained == {"calibrated.weight", "calibrated.bias"}
    classifier.loss(classifier(features(torch.randn(3, 4))), torch.tensor([0, 1, 2]))["loss_classifier"].backward()
    assert classifier.linear.weight.grad is None and classifier.calibrated.weight.grad.abs().sum() > 0
    norms = classifier.weight_norms().tolist()
    calibrated, original = classifier.calibrated.weight.norm(dim=1), classifier.linear.weight.norm(dim=1)
    assert norms == pytest.approx([original[0].item(), calibrated[1].item(), original[2].item()])


def small_index(tmp_path):
    """Labels per image: 1 1 2 | 1 | 3 (and a crowd of 2) | nothing; a fourth category never occurs."""
    shown = {1: [1, 1, 2], 2: [1], 3: [3], 4: []}
    annotations = [
        {"image_id": i, "category_id": c, "bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 0}
        for i, labels in shown.items()
        for c in labels
    ] + [{"image_id": 3, "category_id": 2, "bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 1}]
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    images = [{"id": i, "width": 20, "height": 20, "file_name": f"{i}.png"} for i in shown]
    categories = [{"id": c, "name": f"c{c}"} for c in (1, 2, 3, 4)]
    path = tmp_path / "small.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return bags.AnnotationIndex.open(path)


def test_class_balanced_sampler(tmp_path):
    """Every category that occurs comes equally often, with an image that holds it; seeds and epochs repeat."""
    sampler = ClassBalancedSampler(small_index(tmp_path), batch_size=3, seed=0)
    assert sampler.batches_in(0) == len(sampler) == 2
    images = {1: set(), 2: set(), 3: set()}
    for epoch in range(40):
        sampler.start(epoch)
        keys = [key for batch in sampler for key in batch]
        assert len(keys) == 6 and sorted(label for _, _, label in keys) == [1, 1, 2, 2, 3, 3]
        assert {label for _, _, label in keys[:3]} == {1, 2, 3}
        for position, _, label in keys:
            images[label].add(position)
    assert images == {1: {0, 1}, 2: {0}, 3: {2}}
    batches = list(sampler)
    sampler.start(39, first_batch=1)
    assert list(sampler) == batches[1:]
    sampler.start(0)
    assert list(sampler) != batches


class TwoStages:
    """A store of one image: labels of both stages; features are the rows' numbers."""

    images = 1
    labels = np.array([[1, 1], [1, 0], [2, 2], [0, 1], [0, 0], [0, 0], [0, 0], [3, 3]])

    def rows(self, _):
        """As of a store."""
        rows = np.zeros(8, [("label", np.int32, 2), ("is_object", bool)])
        rows["label"] = self.labels
        return rows

    def features(self, _, chosen=slice(None)):
        """As of a store."""
        return np.repeat(np.arange(8.0)[:, None, None], 2, 1)[chosen]


def test_drawing_a_category_from_stored_proposals():
    """All proposals of it, and as many of background; where there is less background, all of that."""
    data = TrainingFeatures(TwoStages(), flip=0, batch_size=4, positive_fraction=0.5, resident=False)
    drawn = set()
    for seed in range(30):
        features_of, labels = data[0, seed, 1]
        assert [sorted(own.tolist()) for own in labels] == [[0, 0, 1, 1], [0, 0, 1, 1]]
        assert [set(own[kept == 1, 0].tolist()) for own, kept in zip(features_of, labels, strict=True)] == [
            {0, 1},
            {0, 3},
        ]
        drawn |= set(features_of[0][labels[0] == 0, 0].tolist())
    assert drawn == {3, 4, 5, 6}
    assert data[0, 5, 1][0][0].equal(data[0, 5, 1][0][0])
    assert [len(own) for own in data[0, 0, 3][1]] == [2, 2]
    data.store.labels = np.array([[1, 1]] * 7 + [[0, 0]])
    assert [len(own) for own in data[0, 0, 1][1]] == [8, 8]


# --------------------------------------------------------------------------- all of them


NAMES = list(everyone())


@pytest.mark.parametrize("name", NAMES)
def test_odd_batches_and_precisions(name):
    """Empty, background only, bfloat16, float16, extreme logits: finite losses and gradients, scores in 0..1."""
    classifier = everyone()[name]
    for labels in ((), (0, 0, 0), (8,), LABELS):
        fc = torch.randn(len(labels), 6)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            logits = classifier(features(fc)).to(dtype)
            losses = classifier.loss(logits, torch.tensor(labels, dtype=torch.long))
            gradient = torch.autograd.grad(sum(losses.values()), logits)[0]
            assert all(value.dtype == torch.float32 for value in losses.values()) and gradient.isfinite().all()
            scores = classifier.probs(logits)
            assert scores.shape == (len(labels), 9) and scores.dtype == torch.float32
            assert ((scores >= 0) & (scores <= 1)).all()
    extreme = (torch.randn(len(LABELS), classifier.linear.out_features) * 500).requires_grad_()
    losses = classifier.loss(extreme, torch.tensor(LABELS))
    assert torch.autograd.grad(sum(losses.values()), extreme)[0].isfinite().all()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "disalign"])  # whose layer is frozen
def test_each_learns_to_tell_separable_categories(name):
    """60 steps on nine clusters: the label has the highest score, the background's included."""
    torch.manual_seed(0)
    classifier = everyone(width=9)[name]
    labels = torch.arange(9).repeat(8)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=0.3)
    for _ in range(60):
        fc = 3 * torch.eye(9)[labels] + 0.3 * torch.randn(72, 9)
        optimizer.zero_grad()
        sum(classifier.loss(classifier(features(fc)), labels).values()).backward()
        optimizer.step()
    found = classifier.probs(classifier(features(3 * torch.eye(9)))).argmax(1)
    assert (found == torch.arange(9)).float().mean() >= 8 / 9, found


@pytest.mark.parametrize("name", ["bacl", "eql_v2", "loce", "seesaw"])
def test_what_is_accumulated_is_saved_and_only_grows_in_training(name):
    torch.manual_seed(0)
    classifier, other = everyone()[name], everyone()[name]
    labels = torch.tensor(LABELS)
    batches = [torch.randn(len(LABELS), classifier.linear.out_features) for _ in range(3)]
    classifier.loss(batches[0], labels)
    state = {key: value.clone() for key, value in classifier.state_dict().items()}
    assert len(state) > 2  # beside weight and bias
    classifier.eval().loss(batches[1], labels)
    assert all(torch.equal(value, state[key]) for key, value in classifier.state_dict().items())
    other.load_state_dict(state)
    assert other.loss(batches[2], labels) == classifier.train().loss(batches[2], labels)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in classifier.state_dict().items())


def rank_main(rank, folder, batches, labels):
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for name in batches:
        classifier = everyone()[name.removesuffix(", memory")]
        for batch in batches[name]:
            half = slice(rank * 8, rank * 8 + 8)
            classifier.loss(batch[half], labels[half])
        found[name] = dict(classifier.named_buffers())
    torch.save(found, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_accumulate_what_one_does(tmp_path):
    """Counts and gradients are added up over the ranks: equal buffers on both, those of one process with it all."""
    torch.manual_seed(0)
    labels = torch.tensor(LABELS)
    widths = {"bacl": 9, "eql_v2": 9, "loce": 9, "loce, memory": 9 + 6, "seesaw": 10}
    batches = {name: [torch.randn(16, width) for _ in range(3)] for name, width in widths.items()}
    fork = multiprocessing.get_context("fork")  # no rank uses autograd
    processes = [fork.Process(target=rank_main, args=(rank, str(tmp_path), batches, labels)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name in widths:
        alone = everyone()[name.removesuffix(", memory")]
        for batch in batches[name]:
            alone.loss(batch, labels)
        for buffer, value in dict(alone.named_buffers()).items():
            assert torch.equal(ranks[0][name][buffer], ranks[1][name][buffer])
            if (name, buffer) != ("loce, memory", "mean_scores"):  # each rank draws from the memory for itself
                torch.testing.assert_close(ranks[0][name][buffer], value, rtol=1e-6, atol=0)
