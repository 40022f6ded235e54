"""Groups, grouped loss and grouped scores against hand-worked numbers and a slow second version."""

import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import REFERENCE, needs_reference

import bags
from bags.classifiers import classifier_settings
from bags.classifiers.base import BoxFeatures
from bags.data.statistics import CategoryStats

FOUR = (10, 100, 1000)
EIGHT = (5, 10, 50, 100, 500, 1000, 5000)


def group_softmax(counts, boundaries=(10, 100, 1000), ratio=8.0, width=6):
    return bags.GroupSoftmax(width, bags.assign_groups(counts, boundaries), ratio)


# --------------------------------------------------------------------------- groups


def test_groups_by_hand():
    groups = bags.assign_groups([9, 10, 99, 100, 1000, 0, 10**6])
    assert groups.group_of == (0, 1, 1, 2, 3, 0, 3)
    assert groups.sizes == (2, 2, 1, 2)
    assert groups.members(0) == [1, 6]
    assert groups.num_categories == 7 and groups.boundaries == (10, 100, 1000)


def test_empty_groups_and_one_category():
    groups = bags.assign_groups([5])
    assert groups.sizes == (1, 0, 0, 0)
    classifier = bags.GroupSoftmax(4, groups)
    logits = torch.randn(3, 7)  # bg, fg, then others + 1, others, others, others
    losses = classifier.loss(logits, torch.tensor([0, 1, 1]))
    assert sum(losses.values()).isfinite()
    assert classifier.probs(logits).shape == (3, 2)


@pytest.mark.parametrize("counts", [[], [-1, 2], [1.5], [[1, 2]]])
def test_bad_counts(counts):
    with pytest.raises(ValueError, match="instance_counts"):
        bags.assign_groups(counts)


@pytest.mark.parametrize("boundaries", [(100, 10), (0, 10), (10, 10), (1.5,)])
def test_bad_boundaries(boundaries):
    with pytest.raises(ValueError, match="boundaries"):
        bags.assign_groups([1, 2], boundaries)


# --------------------------------------------------------------------------- loss


def slow_loss(classifier, logits, labels):
    """Eq. 5 proposal by proposal, all `others` of activated groups."""
    groups, start, losses = classifier.groups, 2, []
    rows = [
        (torch.log_softmax(row[:2], 0)[0 if label == 0 else 1])
        for row, label in zip(logits, labels.tolist(), strict=True)
    ]
    losses.append(-sum(rows) / len(rows))
    for n, size in enumerate(groups.sizes):
        members = [c for c in range(1, groups.num_categories + 1) if groups.group_of[c - 1] == n]
        terms = []
        for row, label in zip(logits, labels.tolist(), strict=True):
            target = members.index(label) + 1 if label in members else 0
            terms.append(-torch.log_softmax(row[start : start + size + 1], 0)[target])
        active = any(label in members for label in labels.tolist())
        losses.append(sum(terms) / len(terms) if active else torch.tensor(0.0))
        start += size + 1
    return losses


def test_loss_equals_the_slow_version():
    torch.manual_seed(0)
    counts = [3, 2000, 50, 7, 300, 40, 12, 5000]
    classifier = group_softmax(counts, ratio="n")
    logits = torch.randn(20, 8 + 2 + 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0] * 12 + [1, 1, 4, 2, 8, 3, 3, 0])  # group 3 (label 5) has no foreground
    fast, slow = classifier.loss(logits, labels), slow_loss(classifier, logits, labels)
    for name, a, b in zip(fast, fast.values(), slow, strict=True):
        assert a.item() == pytest.approx(b.item(), rel=1e-5), name
    assert fast["loss_group3"] == 0
    first = torch.autograd.grad(sum(fast.values()), logits)[0]
    second = torch.autograd.grad(sum(slow), logits)[0]
    assert torch.allclose(first, second, atol=1e-6)


def test_loss_by_hand():
    """Uniform logits: log of each group's width; beta 0 leaves foreground only."""
    classifier = group_softmax([5, 50, 60], boundaries=(10,), ratio=0)
    losses = classifier.loss(torch.zeros(4, 7), torch.tensor([0, 0, 2, 3]))
    assert losses["loss_group0"].item() == pytest.approx(math.log(2))
    assert losses["loss_group1"].item() == 0
    assert losses["loss_group2"].item() == pytest.approx(math.log(3))


@pytest.mark.parametrize("ratio, taken", [(0.5, 0), (1.0, 1), (3.0, 3), (8.0, 8), (1e6, 17)])
def test_others_sampler_quota(ratio, taken):
    """One foreground instance: min(floor(beta), pool) others, drawn from all that are not in the group."""
    classifier = group_softmax([5, 50], boundaries=(10,), ratio=ratio)
    labels = torch.tensor([1, 2, *[0] * 16])
    weights = classifier.sample_weights(classifier.targets[:, labels])
    assert weights[0].sum() == 18
    assert weights[1].sum() == 1 + taken and weights[1, 0] == 1
    assert weights[2].sum() == 1 + taken and weights[2, 1] == 1
    assert set(weights.unique().tolist()) <= {0.0, 1.0}


def test_others_sampler_is_uniform():
    torch.manual_seed(0)
    classifier = group_softmax([5, 50], boundaries=(10,), ratio=4)
    labels = torch.tensor([1, *[0] * 15, 2])
    total = sum(classifier.sample_weights(classifier.targets[:, labels])[1] for _ in range(2000))
    others = total[1:] / 2000
    assert (others - 4 / 16).abs().max() < 0.05  # five standard deviations
    assert not torch.equal(
        classifier.sample_weights(classifier.targets[:, labels]),
        classifier.sample_weights(classifier.targets[:, labels]),
    )


def test_others_of_every_group():
    labels = torch.tensor([1, 0, 0])
    every, activated = group_softmax([5, 50], (10,), "all"), group_softmax([5, 50], (10,), "n")
    assert every.sample_weights(every.targets[:, labels]).sum(1).tolist() == [3, 3, 3]
    assert activated.sample_weights(activated.targets[:, labels]).sum(1).tolist() == [3, 3, 0]


@pytest.mark.parametrize("ratio", [-1, "some"])
def test_bad_ratio(ratio):
    with pytest.raises(ValueError, match="others_ratio"):
        group_softmax([5, 50], ratio=ratio)


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("GroupSoftmax", {"scale": -3}, "scale: expected 0 or more, got -3"),
        (
            "GroupSoftmax",
            {"class_weights": torch.ones(2)},
            r"class_weights: expected 3 numbers of 0 or more, got \[1.0,",
        ),
        ("GroupSoftmax", {"class_weights": torch.tensor([1, 1, -1])}, "class_weights: expected 3"),
        ("GroupSoftmax", {"group_weights": [1, math.nan, 1]}, "group_weights: expected numbers of 0 or more"),
        ("GroupSoftmax", {"temperatures": [1, 1, math.inf]}, "temperatures: expected numbers above 0, or 'learned'"),
        ("ReweightedSoftmax", {"class_weights": torch.tensor([1, math.nan])}, "class_weights: expected 2"),
        ("TauNorm", {"tau": -1}, "tau: expected 0 or more, got -1"),
        ("TauNorm", {"tail": [0]}, r"tail: expected labels 1 to 2 \(0 is the background\), got \[0\]"),
        ("NearestClassMean", {"width": 4, "scale": 0}, "scale: expected above 0"),
        ("NorCal", {"gamma": -1}, "gamma: expected 0 or more"),
        ("NorCal", {"counts": [1, -2]}, r"counts: expected whole numbers of 0 or more, got \[1, -2\]"),
        ("ACSL", {"threshold": 3}, "threshold: expected between 0 and 1, got 3"),
        ("EqualizationLoss", {"tail_images": -1}, "tail_images: expected 0 or more"),
        ("DropLoss", {"image_counts": [1.5, 2]}, "image_counts: expected whole numbers"),
        ("EqualizationLossV2", {"mu": -1}, "mu: expected 0 or more"),
        ("Federated", {"number": 0}, "number: expected 1 or more, got 0"),
        ("Federated", {"power": math.inf}, "power: expected 0 or more"),
        ("SigmoidFocal", {"alpha": 3}, "alpha: expected 0 to 1, got 3"),
        ("LogitAdjusted", {"tau": math.nan}, "tau: expected 0 or more, got nan"),
        ("BalancedSigmoid", {"counts": [[5, 50]]}, "counts: expected one count per category"),
        ("ClassBalancedSigmoid", {"beta": 1}, "beta: expected 0 <= beta < 1, got 1"),
        ("Seesaw", {"p": -1}, "p: expected 0 or more"),
        ("Seesaw", {"eps": 0}, "eps: expected above 0, to 1"),
        ("SimCal", {"below": 0}, "below: expected 1 or more"),
    ],
)
def test_impossible_settings_are_refused(name, settings, message):
    needed = {
        "groups": bags.assign_groups([5, 50], (10,)),
        "num_categories": 2,
        "counts": (5, 50),
        "image_counts": (5, 50),
    }
    taken = inspect.signature(getattr(bags, name)).parameters
    with pytest.raises(ValueError, match=f"^{message}"):
        getattr(bags, name)(4, **({key: value for key, value in needed.items() if key in taken} | settings))


def test_counts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"instance_counts: expected whole numbers of 0 or more, got \[1, -2\]"):
        bags.class_weights([1, -2], "inverse")
    with pytest.raises(ValueError, match=r"instance_counts: expected 2, one for each label 1 to 2, got \(1,\)"):
        bags.within_group_weights(bags.assign_groups([5, 50]), [5])


def test_background_only_and_empty_batches():
    classifier = group_softmax([5, 50, 500])
    losses = classifier.loss(torch.randn(6, 9), torch.zeros(6, dtype=torch.long))
    assert [v.item() > 0 for v in losses.values()] == [True, False, False, False, False]
    losses = classifier.loss(torch.randn(0, 9), torch.zeros(0, dtype=torch.long))
    assert all(v.item() == 0 for v in losses.values())
    softmax = bags.Softmax(6, 3)
    assert softmax.loss(torch.randn(0, 4), torch.zeros(0, dtype=torch.long))["loss_classifier"] == 0


# --------------------------------------------------------------------------- scores


def test_probs_by_hand():
    """Labels 1, 3 in group 1 and 2 in group 2; P(fg) = 3/4; `others` takes half of group 1."""
    classifier = group_softmax([5, 50, 6], boundaries=(10,))
    logits = torch.log(torch.tensor([[1.0, 3.0, 2.0, 1.0, 1.0, 1.0, 4.0]]))
    expected = [0.25, 0.75 * 0.25, 0.75 * 0.8, 0.75 * 0.25]
    assert classifier.probs(logits)[0].tolist() == pytest.approx(expected)


def test_weight_norms_are_of_the_rows_that_score_the_labels():
    classifier = group_softmax([5, 50, 6], boundaries=(10,))
    with torch.no_grad():
        classifier.linear.weight.copy_(torch.arange(1.0, 8)[:, None].expand(7, 6))
    rows = [1, 4, 7, 5]  # background, labels 1, 2, 3 of [background, foreground, others, 1, 3, others, 2]
    assert classifier.weight_norms().tolist() == pytest.approx([row * 6**0.5 for row in rows])
    assert bags.Softmax(6, 3).weight_norms().shape == (4,)


def test_softmax_is_cross_entropy():
    torch.manual_seed(0)
    classifier, logits, labels = bags.Softmax(6, 4), torch.randn(9, 5), torch.randint(5, (9,))
    assert classifier.loss(logits, labels)["loss_classifier"].item() == pytest.approx(
        F.cross_entropy(logits, labels).item()
    )
    assert torch.allclose(classifier.probs(logits).sum(1), torch.ones(9))


def test_which_classifiers_are_read_as_a_softmax():
    """Those with the layer of a softmax that change neither its outputs nor what is made of them."""
    training = CategoryStats((1, 2, 3), ("a", "b", "c"), (5, 50, 500), (5, 50, 500))
    for name, kind in classifier_settings().items():
        if not kind.combines and not kind(name=name).columns(training):
            made = type(kind(name=name).build(4, 4, training))
            plain = made.forward is bags.Softmax.forward and made.probs is bags.Softmax.probs
            assert kind.is_softmax == plain, name


def test_autocast_keeps_the_loss_in_float32():
    classifier = group_softmax([5, 50, 500])
    with torch.autocast("cpu", torch.bfloat16):
        logits = classifier(BoxFeatures(torch.empty(0), torch.randn(12, 6)))
        losses = classifier.loss(logits, torch.tensor([0, 1, 2, 3] * 3))
    assert logits.dtype == torch.bfloat16
    assert all(v.dtype == torch.float32 for v in losses.values())


# --------------------------------------------------------------------------- the authors' code


@needs_reference
@pytest.mark.parametrize("name", ["groups_small", "groups_mid40"])
@pytest.mark.parametrize("number, boundaries", [(4, (10, 100, 1000)), (2, (100,)), (8, EIGHT)])
def test_groups_equal_the_released_tables(name, number, boundaries):
    data = np.load(REFERENCE / f"{name}.npz")
    classifier = group_softmax(data["counts"].tolist(), boundaries)
    assert np.array_equal(classifier.targets.numpy(), data[f"label2binlabel_{number}"])
    assert classifier.widths == data[f"pred_slice_{number}"][:, 1].tolist()


@needs_reference
@pytest.mark.parametrize(
    "name", ["c17_n64", "c40_n512_3to1", "c40_n64_nofg", "c40_n128_onegroup", "c40_n96_2bins", "c1230_n40"]
)
def test_loss_equals_the_released_code(name):
    data = np.load(REFERENCE / f"gsloss_{name}.npz")
    classifier = group_softmax(data["counts"].tolist(), (100,) if "2bins" in name else (10, 100, 1000), 1e6)
    logits = torch.from_numpy(data["logits"]).requires_grad_()
    losses = classifier.loss(logits, torch.from_numpy(data["labels"]))
    assert [v.item() for v in losses.values()] == pytest.approx(data["losses"].tolist(), rel=1e-6, abs=1e-15)
    gradient = torch.autograd.grad(sum(losses.values()), logits)[0]
    assert np.allclose(gradient.numpy(), data["grad"], rtol=1e-6, atol=1e-12)
    single = classifier.loss(logits.float(), torch.from_numpy(data["labels"]))
    assert [v.item() for v in single.values()] == pytest.approx(data["losses_f32"].tolist(), rel=1e-5, abs=1e-7)
    labels = torch.from_numpy(data["labels"])
    for ratio in (8.0, 1.0, 0.5, 3.0):
        classifier.others_ratio = ratio
        targets = classifier.targets[:, labels]
        weights = classifier.sample_weights(targets)
        foreground, expected = targets > 0, data[f"sampled_ratio_{ratio}"]
        assert (weights * foreground).sum(1).tolist() == expected[1].tolist()
        assert (weights * ~foreground).sum(1).tolist() == expected[2].tolist()


@needs_reference
@pytest.mark.parametrize(
    "case, boundaries",
    [("c40", FOUR), ("c17", FOUR), ("c40_2bins", (100,)), ("c40_8bins", EIGHT), ("c1230", FOUR)],
)
def test_scores_equal_the_released_merge(case, boundaries):
    data = np.load(REFERENCE / "gs_merge_score.npz")
    classifier = group_softmax(data[f"{case}_counts"].tolist(), boundaries)
    logits = torch.from_numpy(data[f"{case}_logits"])
    assert np.allclose(classifier.probs(logits), data[f"{case}_scores"], rtol=1e-6, atol=1e-15)
    assert np.allclose(classifier.probs(logits.float()), data[f"{case}_scores_f32"], rtol=1e-5, atol=1e-9)
