"""FRACAL, LogN, IIF, ECM, GOL and LDAM against slow versions of the papers' equations, and by hand."""

import math

import numpy as np
import pytest
import torch

import bags
from bags.classifiers import classifier_settings
from bags.classifiers.base import BoxFeatures
from bags.classifiers.fracal import box_dimensions, frequency_shift
from bags.classifiers.iif import _factors
from bags.data.statistics import CategoryStats

COUNTS = (1, 30, 500, 7)
LABELS = [0, 1, 2, 3, 4, 4, 0, 2]
LOSSES = {
    "ecm": lambda: bags.EffectiveClassMargin(5, COUNTS),
    "gumbel": lambda: bags.Gumbel(5, COUNTS, drop=False),
    "iif": lambda: bags.InverseFrequency(5, COUNTS),
    "iif smooth": lambda: bags.InverseFrequency(5, COUNTS, "smooth"),
    "ldam": lambda: bags.LDAM(5, COUNTS),
}


def cross_entropy(z: np.ndarray, label: int) -> float:
    return math.log(sum(math.exp(v) for v in z)) - z[label]


def slow_loss(name: str, z: np.ndarray, labels: list[int]) -> float:
    """The loss of logits [R, D], proposal by proposal and category by category, as the papers write it."""
    total = 0.0
    if name == "ecm":
        samples = [6.3313 * sum(COUNTS), *COUNTS]
        for row, label in zip(z, labels, strict=True):
            for c, n in enumerate(samples):
                others = sum(samples) - n
                root = n**0.25 + others**0.25
                up, down = math.exp(row[c]) * root / others**0.25, math.exp(-row[c]) * root / n**0.25
                score, a = up / (up + down), others / n
                weight = a * math.log((1 + a) / a)
                total -= weight * math.log(score if c == label else 1 - score)
    elif name == "gumbel":
        for row, label in zip(z, labels, strict=True):
            for c, value in enumerate(row, start=1):
                score = math.exp(-math.exp(-value))
                total -= math.log(score if c == label else 1 - score)
    elif name.startswith("iif"):
        number = sum(COUNTS)
        if name == "iif":
            factors = [1.0] + [math.log(number / n) for n in COUNTS]
        else:
            factors = [1.0] + [math.log((number + 1) / (n + 1)) + 1 for n in COUNTS]
        for row, label in zip(z, labels, strict=True):
            total += cross_entropy(row * np.array(factors), label)
    else:
        margins = [0.0] + [0.5 * (n / min(COUNTS)) ** -0.25 for n in COUNTS]
        for row, label in zip(z, labels, strict=True):
            shifted = row.copy()
            shifted[label] -= 30 * margins[label]
            total += cross_entropy(shifted, label)
    return total / len(labels)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_equal_the_equations(name):
    """In float64; gradients by central differences of the slow version."""
    classifier = LOSSES[name]().double()
    rng = np.random.default_rng(3)
    z = rng.normal(0, 1.5, (len(LABELS), classifier.linear.out_features))
    logits = torch.tensor(z, requires_grad=True)
    losses = classifier.loss(logits, torch.tensor(LABELS))
    assert losses.keys() == {"loss_classifier"}
    assert losses["loss_classifier"].item() == pytest.approx(slow_loss(name, z, LABELS), rel=1e-9)
    losses["loss_classifier"].backward()
    assert logits.grad is not None
    for place in [(0, 0), (1, 1), (4, 3), (5, 2), (7, 1)]:
        above, below = z.copy(), z.copy()
        above[place] += 1e-5
        below[place] -= 1e-5
        slope = (slow_loss(name, above, LABELS) - slow_loss(name, below, LABELS)) / 2e-5
        assert logits.grad[place].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", LOSSES)
def test_odd_batches(name):
    """No proposal, no foreground, a category without objects, and a single category give finite numbers."""
    classifier = LOSSES[name]()
    width = classifier.linear.out_features
    assert classifier.loss(torch.zeros(0, width), torch.zeros(0, dtype=torch.long))["loss_classifier"] == 0
    assert classifier.loss(torch.randn(4, width), torch.zeros(4, dtype=torch.long))["loss_classifier"].isfinite()
    for counts in ((0, 12), (5,)):
        other = type(classifier)(5, counts)
        logits = other(BoxFeatures(torch.zeros(3, 1, 1, 1), torch.randn(3, 5)))
        assert other.loss(logits, torch.tensor([0, 1, 1]))["loss_classifier"].isfinite()
        scores = other.probs(logits)
        assert scores.shape == (3, len(counts) + 1) and scores.min() >= 0 and scores.max() <= 1


def test_ecm_by_hand():
    """One category with as many samples as everything else: no margin, and a weight of ln 2."""
    classifier = bags.EffectiveClassMargin(5, [10], background=1)
    torch.testing.assert_close(classifier.margins, torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(classifier.weights, torch.full((2,), math.log(2), dtype=torch.float64))
    loss = classifier.loss(torch.zeros(1, 2), torch.tensor([1]))["loss_classifier"]
    assert loss.item() == pytest.approx(2 * math.log(2) ** 2)
    scores = classifier.probs(torch.tensor([[0.0, math.log(3)]]))
    assert scores[0].tolist() == pytest.approx([0.5, 0.375])
    rare = bags.EffectiveClassMargin(5, [1, 1000]).margins
    assert rare[1] > rare[2] and bags.EffectiveClassMargin(5, [1, 1000]).weights[1] > 0.99


def test_gumbel_by_hand():
    """A logit of 0 scores 1/e; the prior is every score before training; dropping spares rare categories."""
    classifier = bags.Gumbel(5, COUNTS)
    assert classifier.probs(torch.zeros(1, 4))[0].tolist() == pytest.approx([1 - 1 / math.e] + 4 * [1 / math.e])
    start = classifier.probs(classifier(BoxFeatures(torch.zeros(1, 1, 1, 1), torch.zeros(1, 5))))
    assert start[0, 1:].tolist() == pytest.approx(4 * [0.001], rel=1e-4)
    label = torch.tensor([3])  # frequent; categories 1, 2 and 4 have at most 100 images
    loss = classifier.loss(torch.zeros(1, 4), label)["loss_classifier"]
    assert loss.item() == pytest.approx(1.0)  # -log(1/e) of the object alone
    whole = bags.Gumbel(5, COUNTS, drop=False).loss(torch.zeros(1, 4), label)["loss_classifier"]
    assert whole.item() == pytest.approx(1 - 3 * math.log(1 - 1 / math.e))
    extreme = bags.Gumbel(5, COUNTS, drop=False).loss(torch.tensor([[-90.0, 90, -90, 90]]), label)
    assert extreme["loss_classifier"].isfinite()


def test_ldam_margins_by_hand():
    """The rarest category has the whole margin; sixteen times as many objects halve it."""
    margins = bags.LDAM(5, [2, 32, 512], margin=0.4, scale=10).margins
    assert margins.tolist() == pytest.approx([0, 4, 2, 1])


def test_iif_by_hand():
    classifier = bags.InverseFrequency(2, [1, 9], "base10")
    assert classifier.factors.tolist() == pytest.approx([1, 1, math.log10(10 / 9)])
    assert bags.InverseFrequency(2, [1, 9]).factors[1] == pytest.approx(math.log(10))
    assert bags.InverseFrequency(2, [3]).factors.tolist() == [1, 1]
    with pytest.raises(ValueError, match="variant"):
        bags.InverseFrequency(2, [1, 9], "prob")  # type: ignore[arg-type]


def test_iif_factors_of_published_counts():
    """The released factors of LVIS v1's aerosol can: 109 of 1,270,141 objects."""
    published = {
        "raw": 9.363290593665011,
        "smooth": 10.354158897415592,
        "relative": 9.36320477273859,
        "normit": 3.7574779464712598,
        "gombit": 9.363247683508304,
        "base2": 13.50837290588279,
        "base10": 4.0664254372853375,
    }
    counts = [109, *[1] * 1201, 1_270_141 - 109 - 1201]
    small = [1056 * count // 1_270_141 + 400 for count in counts]  # no category with half of them
    for variant, factor in published.items():
        numbers = torch.tensor(counts, dtype=torch.float64)
        found = _factors(numbers, numbers / numbers.sum(), variant)[0]  # type: ignore[arg-type]
        assert found.item() == pytest.approx(factor, rel=1e-9)
        built = bags.InverseFrequency(2, small, variant).factors  # type: ignore[arg-type]
        again = torch.tensor(small).double()
        assert built[0] == 1 and built[1] == _factors(again, again / again.sum(), variant)[0]  # type: ignore[arg-type]


def test_iif_factors_of_published_image_counts():
    """The same table's columns of images: 64 of LVIS v1's 100,170 hold an aerosol can."""
    published = {
        "raw": 7.355740938246138,
        "smooth": 8.340246734689194,
        "relative": 7.3551018202072465,
        "normit": 3.2209133650223976,
        "gombit": 7.355421396246417,
        "base2": 10.612090973671634,
        "base10": 3.194557699790146,
    }
    for variant, factor in published.items():
        built = bags.InverseFrequency(2, [64, 9], variant, total=100_170)  # type: ignore[arg-type]
        assert built.factors[1].item() == pytest.approx(factor, rel=1e-9)


@pytest.mark.parametrize("name", ["iif", "fracal", "fracal_sigmoid"])
def test_total_below_a_count_is_refused(name):
    """As a setting and as an argument; the largest count itself is enough for calibration."""
    stats = CategoryStats((1, 2), ("a", "b"), (30, 50), (20, 40))
    make = classifier_settings()[name]
    with pytest.raises(bags.UserError, match=r"^classifier.total: expected 0 .* or 40 or more.* got 39$"):
        make(counts="images", total=39).build(2, 2, stats)
    make(counts="images", total=41).build(2, 2, stats)
    if name == "fracal":
        shift = bags.Fractal(2, [20, 40], total=80).shift.tolist()
        assert shift == pytest.approx([0, -math.log10(20 / 80) + math.log10(1 / 2), 0])


@pytest.mark.parametrize(("variant", "share"), [("relative", 50), ("normit", 50), ("gombit", 64)])
def test_iif_refuses_factors_below_zero(variant, share):
    """In one line that names the key, also from a configuration; one object fewer is taken."""
    counts = (share, 100 - share)
    with pytest.raises(ValueError, match=f"^variant: expected one that suits a category with {share} % of all objects"):
        bags.InverseFrequency(2, counts, variant)
    stats = CategoryStats((1, 2), ("a", "b"), counts, counts)
    with pytest.raises(bags.UserError, match=f"^classifier.variant: .* got '{variant}'$"):
        classifier_settings()["iif"](variant=variant).build(2, 2, stats)
    if variant == "gombit":
        assert bags.InverseFrequency(2, (63, 37), variant).factors.min() > 0
    assert bags.InverseFrequency(2, counts).factors.min() > 0


def test_logit_normalisation_equals_numpy():
    """Mean and deviation of all proposals; the least mean is added; the background stays."""
    torch.manual_seed(0)
    classifier = bags.LogitNormalisation(6, 3).double()
    batches = [torch.randn(n, 6, dtype=torch.float64) * 3 for n in (5, 1, 9)]
    plain = classifier.probs(torch.ones(1, 4, dtype=torch.float64))
    assert plain[0].tolist() == pytest.approx([0.25] * 4)  # not fitted: nothing changes
    labels = [torch.zeros(len(batch), dtype=torch.long) for batch in batches]
    pairs = [(BoxFeatures(torch.zeros(len(b), 1, 1, 1), b), y) for b, y in zip(batches, labels, strict=True)]
    classifier.fit(iter(pairs))
    z = (torch.cat(batches) @ classifier.linear.weight.T + classifier.linear.bias).detach().numpy()
    mean, deviation = z.mean(0), z.std(0)
    shifted = (z - mean + mean[1:].min()) / deviation
    shifted[:, 0] = z[:, 0]
    expected = np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True)
    np.testing.assert_allclose(classifier.probs(torch.tensor(z)).detach().numpy(), expected, rtol=1e-9)
    with pytest.raises(ValueError, match="no proposal"):
        classifier.fit(iter([]))


def test_logit_normalisation_without_objects_of_a_category():
    """Its logit is pushed to one value in training; divided by its deviation, noise in it would beat all others."""
    torch.manual_seed(0)
    stats = CategoryStats((1, 2, 3), ("a", "b", "c"), (5, 0, 7), (5, 0, 7))
    classifier = classifier_settings()["logit_normalisation"]().build(6, 6, stats).double()
    with torch.no_grad():
        classifier.linear.weight[2] *= 1e-3
        classifier.linear.bias[2] = -9
    batch = torch.randn(200, 6, dtype=torch.float64) * 3
    classifier.fit([(BoxFeatures(torch.zeros(200, 1, 1, 1), batch), torch.ones(200, dtype=torch.long))])
    assert classifier.means[2] == 0 and classifier.deviations[2] == 1
    logits = classifier(BoxFeatures(batch, batch))
    assert classifier.probs(logits)[:, 2].max() < 1e-2
    others = logits[:, [1, 3]]
    expected = (others.mean(0) - others.mean(0).min(), others.std(0, correction=0))
    assert torch.allclose(classifier.means[[1, 3]].double(), expected[0], atol=1e-6)
    assert torch.allclose(classifier.deviations[[1, 3]].double(), expected[1], rtol=1e-5)


def slow_dimension(points: list[tuple[float, float]]) -> float:
    """Box counting of one category with sets of cells and numpy's fit of a line."""
    if len(points) < 4:
        return 1.0
    logs = []
    for grid in range(1, 65):
        if grid**2 <= len(points):
            cells = {(min(int(x * grid), grid - 1), min(int(y * grid), grid - 1)) for x, y in points}
            logs.append((math.log(grid), math.log(len(cells))))
    slope = np.polyfit(*np.array(logs).T, 1)[0]
    return max(1.0, slope)


def test_dimensions_by_hand():
    """Four boxes in four quarters: 2. On a line, in one corner, or fewer than four: 1. Nine in a full grid: about 2."""
    quarters = [(0.2, 0.2), (0.7, 0.2), (0.2, 0.7), (0.7, 0.7)]
    line = [(0.1 * k, 0.5) for k in range(10)]
    corner = [(0.01, 0.01)] * 5
    grid = [(x / 3 + 0.1, y / 3 + 0.1) for x in range(3) for y in range(3)]
    half = [(0.2, 0.2), (0.7, 0.2), (0.2, 0.7), (0.3, 0.3)]  # three of four quarters: log 3 / log 2
    groups = [quarters, line, quarters[:3], corner, [], grid, half]
    centres = torch.tensor([point for group in groups for point in group])
    labels = torch.tensor([label for label, group in enumerate(groups, start=1) for _ in group])
    dimensions = box_dimensions(centres, labels, 7)
    assert dimensions[[0, 2, 3, 4, 6]].tolist() == pytest.approx([2, 1, 1, 1, math.log(3) / math.log(2)])
    assert dimensions[1].item() == pytest.approx(1) and 1.8 < dimensions[5].item() <= 2
    assert box_dimensions(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), 2).tolist() == [1, 1]


def test_dimensions_equal_the_slow_count():
    rng = np.random.default_rng(1)
    sizes = (700, 5, 90, 3, 4100)
    groups = [np.clip(rng.normal(0.5, s, (n, 2)), 0, 1) for n, s in zip(sizes, (0.3, 0.1, 0.02, 1, 0.15), strict=True)]
    centres = torch.tensor(np.concatenate(groups))
    labels = torch.tensor(np.repeat(np.arange(1, 6), sizes))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    found = box_dimensions(centres[order], labels[order], 5)
    assert found.tolist() == pytest.approx([slow_dimension(group.tolist()) for group in groups], rel=1e-9)


def test_frequency_shift_of_published_counts():
    """The column base10_obj of the released statistics of LVIS v1: -log10 of a category's share of all objects."""
    total = 1_270_141
    for count, published in ((109, 4.0664254372853375), (1081, 3.0700262412726507)):
        shift = frequency_shift([count, *[1] * 1201, total - count - 1201])
        assert shift[0].item() == pytest.approx(published - math.log10(1203), abs=1e-9)


def test_fracal_equals_the_equations():
    classifier = bags.Fractal(5, COUNTS, power=2).double()
    dimensions = [1.0, 1.0, 1.7, 1.9, 1.2]
    classifier.dimensions.copy_(torch.tensor(dimensions))
    z = np.random.default_rng(0).normal(0, 2, (6, 5))
    for row, found in zip(z, classifier.probs(torch.tensor(z)).tolist(), strict=True):
        target = math.log10(1 / len(COUNTS))
        shifted = [row[0]] + [v - math.log10(n / sum(COUNTS)) + target for v, n in zip(row[1:], COUNTS, strict=True)]
        powers = [math.exp(v) / d**2 for v, d in zip(shifted, dimensions, strict=True)]
        assert found == pytest.approx([p / sum(powers) for p in powers], rel=1e-6)
    steep = bags.Fractal(5, COUNTS, power=300)
    steep.dimensions[2:] = 2  # 2^300 is no float32
    scores = steep.probs(torch.tensor([[-100.0, -900, 0, 0, 0]]))
    assert scores[0].tolist() == pytest.approx([1, 0, 0, 0, 0])
    equal = bags.Fractal(5, [9, 9, 9, 9], power=0).double()
    torch.testing.assert_close(equal.probs(torch.tensor(z)), torch.softmax(torch.tensor(z), 1))


def test_fracal_of_sigmoids_equals_the_equations():
    classifier = bags.FractalSigmoid(5, COUNTS, power=2).double()
    dimensions = [1.0, 1.7, 1.9, 1.2]
    classifier.dimensions.copy_(torch.tensor(dimensions))
    z = np.random.default_rng(0).normal(0, 2, (6, 4))
    whole = sum(d**2 for d in dimensions)
    for row, found in zip(z, classifier.probs(torch.tensor(z)).tolist(), strict=True):
        expected = []
        for value, n, d in zip(row, COUNTS, dimensions, strict=True):
            uniform = math.log10(1 / len(COUNTS))
            shifted = value - math.log10(n / sum(COUNTS)) + uniform - math.log10(d**2 / whole) + uniform
            expected.append(1 / (1 + math.exp(-value)) / (1 + math.exp(-shifted)))
        assert found == pytest.approx([1 - max(expected), *expected], rel=1e-6)
    steep = bags.FractalSigmoid(5, COUNTS, power=300)
    steep.dimensions[1:] = 2
    assert steep.probs(torch.zeros(1, 4)).isfinite().all()
