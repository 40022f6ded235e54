"""Every other method of the paper's Tables 1 and 4 against hand-worked numbers and the authors' code."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import REFERENCE, VECTORS, needs_reference
from test_classifiers import group_softmax

import bags
from bags.classifiers.base import BoxFeatures
from bags.classifiers.focal import SigmoidFocal
from bags.classifiers.group_softmax import SelectedCrossEntropy, dense_cross_entropy
from bags.classifiers.groups import assign_groups, within_group_weights
from bags.classifiers.ncm import NearestClassMean
from bags.classifiers.norcal import NorCal
from bags.classifiers.reweighted_softmax import ReweightedSoftmax, class_weights
from bags.classifiers.softmax import Softmax
from bags.classifiers.tau_norm import TauNorm

DOUBLE = {"rel": 1e-6, "abs": 1e-12}


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def features(fc, pooled=None):
    return BoxFeatures(torch.zeros(len(fc), 1, 1, 1) if pooled is None else pooled, fc)


# --------------------------------------------------------------------------- grouped variants


def variant(background_group, others, **settings):
    groups = assign_groups([5, 50, 6], (10,))  # group 1: labels 1, 3; group 2: label 2
    return bags.GroupSoftmax(4, groups, "n", background_group, others, **settings).double()


def test_neither_background_group_nor_others_by_hand():
    """Table 4 (1): one softmax per group, nothing else; background proposals train nothing."""
    classifier = variant(False, False)
    logits = torch.log(tensor([[1, 3, 7], [1, 1, 2]]))  # labels 1, 3 | 2
    assert classifier.linear.out_features == 3
    assert classifier.probs(logits).tolist() == [pytest.approx([0, 0.25, 1, 0.75]), pytest.approx([0, 0.5, 1, 0.5])]
    losses = classifier.loss(logits, torch.tensor([0, 3]))
    assert losses.keys() == {"loss_group1", "loss_group2"}
    assert losses["loss_group1"].item() == pytest.approx(math.log(2)) and losses["loss_group2"] == 0


def test_background_group_without_others_by_hand():
    """Table 4 (2): the background's logit with a sigmoid; its complement scales the groups."""
    classifier = variant(True, False)
    logits = torch.log(tensor([[1 / 3, 1, 3, 7], [1, 1, 1, 2]]))  # P(background) = 1/4 and 1/2
    assert classifier.linear.out_features == 4
    assert classifier.probs(logits)[0].tolist() == pytest.approx([0.25, 0.75 * 0.25, 0.75, 0.75 * 0.75])
    losses = classifier.loss(logits, torch.tensor([0, 3]))
    assert losses["loss_group0"].item() == pytest.approx((math.log(4) + math.log(2)) / 2)
    assert losses["loss_group1"].item() == pytest.approx(math.log(2)) and losses["loss_group2"] == 0
    bce = F.binary_cross_entropy_with_logits(logits[:, 0], tensor([1, 0]))
    assert losses["loss_group0"].item() == pytest.approx(bce.item())


def test_others_without_background_group_by_hand():
    """Table 4 (3): no rescaling; the background is `others` in every group."""
    classifier = variant(False, True)
    logits = torch.log(tensor([[2, 1, 1, 3, 1], [1, 1, 2, 1, 1]]))  # others, 1, 3 | others, 2
    assert classifier.linear.out_features == 5
    assert classifier.probs(logits)[0].tolist() == pytest.approx([0.5 * 0.75, 0.25, 0.25, 0.25])
    losses = classifier.loss(logits, torch.tensor([0, 3]))
    assert losses["loss_group1"].item() == pytest.approx((math.log(2) + math.log(2)) / 2)
    assert losses.keys() == {"loss_group1", "loss_group2"} and losses["loss_group2"] == 0


@pytest.mark.parametrize("background_group", [True, False])
@pytest.mark.parametrize("others", [True, False])
@pytest.mark.parametrize("ratio", [0.0, 8.0, "n", "all"])
def test_both_ways_to_the_loss_agree(background_group, others, ratio):
    """Selected rows (CPU) and dense (GPU, torch.compile): equal losses and gradients; no NaN anywhere."""
    torch.manual_seed(1)
    groups = assign_groups([3, 2000, 50, 7, 300, 40, 12, 5000])
    classifier = bags.GroupSoftmax(4, groups, ratio, background_group, others, group_weights=[1, 2, 0.5, 1, 3])
    labels = torch.tensor([0] * 12 + [1, 1, 4, 2, 8, 3, 3])  # group 3 (label 5) has no foreground
    logits = torch.randn(19, classifier.linear.out_features, dtype=torch.float64, requires_grad=True)
    targets = classifier.targets[:, labels]
    weights, full = classifier.sample_weights(targets).double(), classifier.full_layout(logits)
    fast = SelectedCrossEntropy.apply(full, targets, weights, classifier.widths) * classifier.group_weights
    slow = dense_cross_entropy(full, targets, weights, classifier.widths) * classifier.group_weights
    assert torch.allclose(fast, slow, rtol=1e-12) and fast.isfinite().all() and (ratio == "all" or fast[3] == 0)
    gradients = [torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (fast, slow)]
    assert torch.allclose(*gradients, rtol=1e-10, atol=1e-15) and gradients[0].isfinite().all()


def test_gradient_of_the_selected_form():
    torch.manual_seed(0)
    targets, weights = torch.tensor([[0, 1, 1], [0, 2, 0]]), tensor([[1, 1, 1], [0, 1, 0.5]])
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    function = lambda x: SelectedCrossEntropy.apply(x, targets, weights, [2, 3])  # noqa: E731
    assert torch.autograd.gradcheck(function, (logits,))


@pytest.mark.parametrize("background_group", [True, False])
@pytest.mark.parametrize("others", [True, False])
def test_compiled_loss_equals_the_eager_one(background_group, others):
    torch.manual_seed(0)
    groups = assign_groups([3, 2000, 50, 7, 300])
    classifier = bags.GroupSoftmax(4, groups, "n", background_group, others)
    logits, labels = torch.randn(9, classifier.linear.out_features), torch.tensor([0, 1, 2, 3, 4, 5, 0, 0, 2])
    compiled = torch.compile(classifier.loss, backend="aot_eager", fullgraph=True)
    found, expected = compiled(logits, labels), classifier.loss(logits, labels)
    assert {k: v.item() for k, v in found.items()} == pytest.approx({k: v.item() for k, v in expected.items()})


def test_group_weights_multiply_the_losses():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 7, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 0])
    plain, weighted = variant(True, True), variant(True, True, group_weights=[2, 0, 0.5])
    losses = [list(c.loss(logits, labels).values()) for c in (plain, weighted)]
    expected = [loss.item() * weight for loss, weight in zip(losses[0], (2, 0, 0.5), strict=True)]
    assert [loss.item() for loss in losses[1]] == pytest.approx(expected)
    with pytest.raises(ValueError, match="group_weights: expected 3 numbers"):
        variant(True, True, group_weights=[1, 1])


@pytest.mark.parametrize("background_group", [True, False])
@pytest.mark.parametrize("others", [True, False])
def test_renumbering_the_categories_renumbers_the_scores(background_group, others):
    torch.manual_seed(0)
    counts = torch.tensor([3, 2000, 50, 7, 300, 40, 12, 5000])
    order = torch.randperm(8)  # new category c is the old category order[c]
    old = bags.GroupSoftmax(6, assign_groups(counts), 8.0, background_group, others)
    new = bags.GroupSoftmax(6, assign_groups(counts[order]), 8.0, background_group, others)
    column_of = lambda c: torch.searchsorted(c.learned_columns, c.label_columns[1:])  # noqa: E731
    with torch.no_grad():
        new.linear.weight.copy_(old.linear.weight)
        new.linear.weight[column_of(new)] = old.linear.weight[column_of(old)[order]]
    fc = torch.randn(5, 6)
    scores = [c.probs(c(features(fc))) for c in (old, new)]
    assert torch.allclose(scores[1][:, 1:], scores[0][:, 1:][:, order])
    assert torch.allclose(scores[1][:, 0], scores[0][:, 0])


def test_scores_never_exceed_the_foreground_probability():
    torch.manual_seed(0)
    classifier = group_softmax([3, 2000, 50, 7, 300])
    logits = torch.randn(50, 11) * 5
    foreground = torch.softmax(logits[:, :2], 1)[:, 1:]
    scores = classifier.probs(logits)
    assert (scores[:, 1:] <= foreground + 1e-7).all() and (scores >= 0).all()
    for part, group in zip(logits[:, 2:].split(classifier.widths[1:], 1), range(4), strict=True):
        members = classifier.groups.members(group)  # a group's probabilities, others included, add up to 1
        total = scores[:, members].sum(1, keepdim=True) / foreground + torch.softmax(part, 1)[:, :1]
        assert torch.allclose(total, torch.ones_like(total), atol=1e-5)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0, 2.5, 8.0])
def test_sampled_others_keep_to_the_quota(ratio):
    """Random batches: never more than beta times the foreground, nor than there are; exactly as many as both allow."""
    classifier = group_softmax([3, 2000, 50, 7, 300], ratio=ratio)
    for seed in range(20):
        torch.manual_seed(seed)
        labels = torch.randint(6, (30,)) * (torch.rand(30) < 0.4)
        targets = classifier.targets[:, labels]
        weights = classifier.sample_weights(targets)
        for group in range(1, 5):
            inside = int((targets[group] > 0).sum())
            taken = int(weights[group].sum()) - inside
            assert taken == min(math.floor(inside * ratio), 30 - inside)


def test_groups_draw_their_others_independently():
    torch.manual_seed(0)
    classifier = group_softmax([5, 50], boundaries=(10,), ratio=8)
    weights = classifier.sample_weights(classifier.targets[:, torch.tensor([1, 2, *[0] * 100])])
    assert not torch.equal(weights[1, 2:], weights[2, 2:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("flags", [(True, True), (True, False), (False, True), (False, False)])
def test_other_precisions(dtype, flags):
    classifier = bags.GroupSoftmax(4, assign_groups([3, 2000, 50]), 8.0, *flags).to(dtype)
    logits, labels = torch.randn(6, classifier.linear.out_features).to(dtype), torch.tensor([0, 1, 2, 3, 0, 0])
    targets = classifier.targets[:, labels]
    full, weights = classifier.full_layout(logits), classifier.sample_weights(targets)
    assert dense_cross_entropy(full, targets, weights.to(full.dtype), classifier.widths).isfinite().all()
    assert all(value.isfinite() for value in classifier.loss(logits, labels).values())
    assert classifier.weight_norms()[1:].isfinite().all() and classifier.probs(logits).isfinite().all()


def test_no_foreground_is_exactly_zero_for_every_group():
    for background_group in (True, False):
        for others in (True, False):
            classifier = bags.GroupSoftmax(4, assign_groups([3, 2000, 50]), 8.0, background_group, others)
            logits = torch.randn(7, classifier.linear.out_features, requires_grad=True)
            losses = classifier.loss(logits, torch.zeros(7, dtype=torch.long))
            assert all(value.item() == 0 for name, value in losses.items() if name != "loss_group0")
            gradient = torch.autograd.grad(sum(losses.values()), logits)[0]
            assert (gradient[:, 2 if others else 1 :] == 0).all() or not background_group and (gradient == 0).all()


# --------------------------------------------------------------------------- the softmax family


def test_class_weights_by_hand():
    """Counts 1 and 3: 1/n is 1 and 1/3, mean 2/3."""
    assert class_weights([1, 3], "inverse").tolist() == pytest.approx([1, 1.5, 0.5])
    assert class_weights([10**6, 1, 1, 1], "inverse").tolist() == pytest.approx([1, 0.1, 4 / 3, 4 / 3, 4 / 3], rel=1e-5)
    beta, counts = 0.5, [12, 1, 3]  # the background first: three times 4
    raw = [(1 - beta) / (1 - beta**n) for n in counts]
    assert class_weights([1, 3], "effective_number", 0.5).tolist() == pytest.approx([r * 3 / sum(raw) for r in raw])
    clipped = [1, *(r * 2 / sum(raw[1:]) for r in raw[1:])]
    assert class_weights([1, 3], "effective_number_clipped", 0.5).tolist() == pytest.approx(clipped)
    assert class_weights([0, 3], "inverse").isfinite().all()
    with pytest.raises(ValueError, match="weighting"):
        class_weights([1], "other")


def test_reweighted_loss_is_divided_by_the_proposals():
    classifier = ReweightedSoftmax(4, tensor([1, 2, 4]))
    loss = classifier.loss(torch.zeros(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 2]))["loss_classifier"]
    assert loss.item() == pytest.approx(math.log(3) * (1 + 2 + 4 + 4) / 4)


def test_focal_by_hand():
    """p = 1/2 everywhere: each element is alpha_t * (1/2)^gamma * log 2, averaged over R * (C+1)."""
    classifier = SigmoidFocal(4, 2, gamma=2, alpha=0.25)
    loss = classifier.loss(torch.zeros(2, 3), torch.tensor([0, 2]))["loss_classifier"]
    assert loss.item() == pytest.approx((0.25 + 0.75 * 2) * 0.25 * math.log(2) / 3)
    assert torch.allclose(classifier.probs(torch.randn(3, 3)).sum(1), torch.ones(3))


def tau_norm(**settings):
    classifier = TauNorm(2, 3, **settings).double()
    with torch.no_grad():
        classifier.linear.weight.copy_(tensor([[3, 4], [1, 0], [0, 0.5], [0.2, 0]]))
        classifier.linear.bias.copy_(tensor([0.1, 0, 0, 0.2]))
    return classifier


def test_tau_norm_by_hand():
    fc = tensor([[1, 1]])
    classifier = tau_norm(tau=0.5)
    expected = torch.softmax(tensor([7 / 5**0.5 + 0.1, 1, 0.5**0.5, 0.2**0.5 + 0.2]), 0)
    assert torch.allclose(classifier.probs(classifier(features(fc)))[0], expected)
    assert classifier.weight_norms().tolist() == pytest.approx([5**0.5, 1, 0.5**0.5, 0.2**0.5])
    kept = tau_norm(tau=1, background=False)
    expected = torch.softmax(tensor([7.1, 1, 1, 1.2]), 0)
    assert torch.allclose(kept.probs(kept(features(fc)))[0], expected)


def test_tau_norm_0_changes_nothing_and_select_takes_whole_rows():
    torch.manual_seed(0)
    fc = torch.randn(200, 2, dtype=torch.float64) * 3
    plain = torch.softmax(tau_norm(tau=0).linear(fc), 1)
    for select in ("none", "foreground", "foreground_tail"):
        classifier = tau_norm(tau=0, select=select, tail=(2,))
        assert torch.allclose(classifier.probs(classifier(features(fc))), plain)
    normal = tau_norm(tau=1, background=False)
    other = normal.probs(normal(features(fc)))
    for select in ("foreground", "foreground_tail"):
        classifier = tau_norm(tau=1, background=False, select=select, tail=(2,))
        scores = classifier.probs(classifier(features(fc)))
        taken = plain.argmax(1) != 0
        if select == "foreground_tail":
            taken &= other.argmax(1) == 2
        assert 0 < taken.sum() < 200 and (taken.sum() < (plain.argmax(1) != 0).sum() or select == "foreground")
        for row in range(200):
            assert torch.allclose(scores[row], (other if taken[row] else plain)[row])


def test_tau_norm_of_a_zero_vector():
    classifier = TauNorm(2, 2, tau=2.0)
    torch.nn.init.zeros_(classifier.linear.weight)
    assert torch.allclose(classifier.probs(classifier(features(torch.ones(1, 2)))), torch.full((1, 3), 1 / 3))


@pytest.mark.parametrize("kind", ["fc", "conv"])
def test_ncm_by_hand(kind):
    """Two batches; category 3 never occurs. Means (2, 0) and (0, 3); the probe lies along the first."""
    classifier = NearestClassMean(2, 3, width=2, features=kind, scale=2.0)
    with torch.no_grad():
        classifier.linear.weight.zero_()
        classifier.linear.bias.copy_(torch.tensor([math.log(3), 0, 0, 0]))  # P(background) = 1/2
    rows = torch.tensor([[1.0, 0], [3, 0], [0, 3], [9, 9]])

    def shown(x):
        return features(x) if kind == "fc" else features(torch.zeros(len(x), 2), x[:, :, None, None])

    classifier.fit(iter([(shown(rows[:2]), torch.tensor([1, 1])), (shown(rows[2:]), torch.tensor([2, 0]))]))
    assert classifier.means.tolist() == [[2, 0], [0, 3], [0, 0]] and classifier.counts.tolist() == [2, 1, 0]
    scores = classifier.probs(classifier(shown(torch.tensor([[5.0, 0]]))))[0]
    share = math.exp(2) / (math.exp(2) + 1)
    assert scores.tolist() == pytest.approx([0.5, 0.5 * share, 0.5 * (1 - share), 0])
    assert classifier.weight_norms().tolist() == pytest.approx([0, 2, 3, 0])


# --------------------------------------------------------------------------- the authors' code, a compact subset


def test_loss_equals_the_released_code_compact():
    data = VECTORS["gsloss_c17_n64"]
    classifier = group_softmax(data["counts"], ratio=1e6)
    logits = tensor(data["logits"]).requires_grad_()
    losses = classifier.loss(logits, torch.tensor(data["labels"]))
    assert [v.item() for v in losses.values()] == pytest.approx(data["losses"], **DOUBLE)
    gradient = torch.autograd.grad(sum(losses.values()), logits)[0]
    assert np.allclose(gradient[: len(data["grad"])], data["grad"], rtol=1e-6, atol=1e-12)


def test_scores_equal_the_released_merge_compact():
    data = VECTORS["gs_merge_score_c17"]
    scores = group_softmax(data["counts"]).probs(tensor(data["logits"]))
    assert np.allclose(scores, data["scores"], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["smallnz", "mid40"])
def test_weights_equal_the_released_ones_compact(name):
    check_weights(VECTORS["reweight_weights"][name])


def check_weights(data):
    names = {
        "inverse": "cls_weight",
        "effective_number": "cls_weight_bf",
        "effective_number_clipped": "cls_weight_bours",
    }
    for ours, theirs in names.items():
        assert class_weights(data["counts"], ours).tolist() == pytest.approx(list(data[theirs]), **DOUBLE)
    groups = assign_groups(data["counts"])
    weights = within_group_weights(groups, data["counts"])
    for n in range(4):
        assert [1, *weights[groups.members(n)].tolist()] == pytest.approx(list(data[f"bin_weight_{n + 1}"]), **DOUBLE)


def test_gradients_of_single_proposals_compact():
    """Re-weighted and focal losses add up over proposals, so a few rows of the released gradients stand alone."""
    for name, data in VECTORS["rows"].items():
        logits = tensor(data["logits"]).requires_grad_()
        if "weights" in data:
            classifier = ReweightedSoftmax(4, tensor(data["weights"]))
        else:
            classifier = SigmoidFocal(4, logits.shape[1] - 1, *data["gamma_alpha"])
        loss = classifier.loss(logits, torch.tensor(data["labels"]))["loss_classifier"]
        gradient = torch.autograd.grad(loss, logits)[0] * len(logits) / data["proposals"]
        assert np.allclose(gradient, data["grad"], rtol=2e-6, atol=1e-13), name


# --------------------------------------------------------------------------- the authors' code, all of it


@needs_reference
@pytest.mark.parametrize("case", ["c40_n512", "c40_n64_nofg"])
@pytest.mark.parametrize("kind", ["cls_weight", "cls_weight_bf", "cls_weight_bours", "plain"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_reweighted_loss_equals_the_released_code(case, kind, dtype):
    data = np.load(REFERENCE / "reweight_loss.npz")
    logits = torch.from_numpy(data[f"{case}_logits"]).to(dtype).requires_grad_()
    plain = kind == "plain"
    weights = torch.ones(41) if plain else torch.from_numpy(data[f"{case}_{kind}"])
    loss = ReweightedSoftmax(4, weights).loss(logits, torch.from_numpy(data[f"{case}_labels"]))["loss_classifier"]
    tolerance = 1e-6 if dtype == torch.float64 else 1e-5
    expected = data[f"{case}_plain_ce_loss" if plain else f"{case}_{kind}_loss"]
    assert loss.item() == pytest.approx(float(expected), rel=tolerance)
    if not plain:
        gradient = torch.autograd.grad(loss, logits)[0]
        assert np.allclose(gradient, data[f"{case}_{kind}_grad"], rtol=tolerance, atol=tolerance * 1e-3)


@needs_reference
@pytest.mark.parametrize("name", ["smallnz", "mid40", "powerlaw1230"])
def test_weights_equal_the_released_ones(name):
    data = np.load(REFERENCE / "reweight_weights.npz")
    check_weights({key.removeprefix(f"{name}_"): data[key] for key in data if key.startswith(name)})


@needs_reference
@pytest.mark.parametrize("case", ["c40", "c40_nofg", "c1230", "c40_bfocal"])
def test_focal_equals_the_released_code(case):
    data = np.load(REFERENCE / "focal.npz")
    logits = torch.from_numpy(data[f"{case}_logits"]).requires_grad_()
    classifier = SigmoidFocal(4, logits.shape[1] - 1, *data[f"{case}_gamma_alpha"].tolist())
    loss = classifier.loss(logits, torch.from_numpy(data[f"{case}_labels"]))["loss_classifier"]
    assert loss.item() == pytest.approx(float(data[f"{case}_loss_intended"]), rel=1e-6)
    if f"{case}_grad_intended" in data:
        gradient = torch.autograd.grad(loss, logits)[0]
        assert np.allclose(gradient, data[f"{case}_grad_intended"], rtol=1e-5, atol=1e-10)


@needs_reference
def test_reweighted_groups_equal_the_released_code():
    data = np.load(REFERENCE / "gsloss_c40_n96_gsreweight.npz")
    groups = assign_groups(data["counts"].tolist())
    classifier = bags.GroupSoftmax(4, groups, 1e6, class_weights=within_group_weights(groups, data["counts"].tolist()))
    logits = torch.from_numpy(data["logits"]).requires_grad_()
    losses = classifier.loss(logits, torch.from_numpy(data["labels"]))
    assert [v.item() for v in losses.values()] == pytest.approx(data["losses"].tolist(), **DOUBLE)
    gradient = torch.autograd.grad(sum(losses.values()), logits)[0]
    assert np.allclose(gradient, data["grad"], rtol=1e-6, atol=1e-12)


def test_norcal_by_hand():
    """exp(logit) 6, 3, 1 and counts 100, 0 (taken as 1): 6, 3 / 100^0.5 = 0.3, 1 of 7.3 together."""
    logits = torch.tensor([[6.0, 3.0, 1.0]], dtype=torch.float64).log()
    found = NorCal(4, (100, 0), gamma=0.5).probs(logits)
    torch.testing.assert_close(found, torch.tensor([[6.0, 0.3, 1.0]], dtype=torch.float64) / 7.3)
    assert torch.equal(NorCal(4, (100, 0), gamma=0).probs(logits), Softmax(4, 2).probs(logits))
    assert NorCal(4, (100, 0)).probs(logits.half()).dtype == torch.float32
