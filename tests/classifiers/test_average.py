"""The mean of several classifiers' scores, against each member's own scores and by hand."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from later_methods import COUNTS, IMAGES, everyone
from torch import nn

import bags
from bags.classifiers import CLASSIFIERS, classifier_settings
from bags.classifiers.average import MOST_DEPTH, AverageSettings
from bags.classifiers.base import Affine, BoxFeatures, CosineLinear
from bags.classifiers.softmax import SoftmaxSettings
from bags.config.load import config_from_dict, config_to_dict

WIDTH, PROPOSALS = 6, 11
STATS = bags.CategoryStats(tuple(range(1, 9)), tuple("abcdefgh"), COUNTS, IMAGES)


class Squared(bags.Softmax):
    """A softmax whose logits are no affine map of the features; it inherits an `affine` that does not say so."""

    def forward(self, features):
        """Compute logits [R, C+1]."""
        return self.linear(features.fc) ** 2


class Mixed(bags.Softmax):
    """A softmax without bias, whose layer a product with weight and bias would miss."""

    def __init__(self, in_features, num_categories):
        super().__init__(in_features, num_categories)
        self.linear = nn.Linear(in_features, num_categories + 1, bias=False)


class Pooled(bags.ProposalClassifier):
    """A classifier of the pooled features, with nothing but the four methods."""

    def __init__(self, num_categories):
        super().__init__()
        self.num_categories = num_categories
        self.layer = nn.Linear(2 * 3 * 3, num_categories + 1)

    def forward(self, features):
        """Compute logits [R, C+1]."""
        return self.layer(features.pooled.flatten(1))

    def loss(self, logits, labels):
        """Compute no loss."""
        return {}

    def probs(self, logits):
        """Compute scores [R, C+1]."""
        return torch.sigmoid(logits)

    def weight_norms(self):
        """Return norms [C+1]."""
        return self.layer.weight.detach().norm(dim=1)


def features(proposals=PROPOSALS, dtype=torch.float64):
    """Random features, the first of them zero, as after a ReLU that nothing passes."""
    torch.manual_seed(1)
    fc = torch.randn(proposals, WIDTH, dtype=dtype)
    fc[:1] = 0
    return BoxFeatures(torch.randn(proposals, 2, 3, 3, dtype=dtype), fc)


def randomised(classifier):
    """The same classifier in float64, evaluation mode, with larger random weights, as a trained one has."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.copy_(torch.randn(parameter.shape) / 2)
    return classifier.double().eval()


def members():
    """One classifier of each kind that an average treats differently."""
    groups = bags.assign_groups(COUNTS, (10, 100))
    return [
        randomised(member)
        for member in (
            bags.Softmax(WIDTH, 8),
            bags.GroupSoftmax(WIDTH, groups, temperatures="learned"),
            bags.GroupSoftmax(WIDTH, groups, scale=20.0, temperatures=(0.5, 1.0, 2.0, 3.0)),
            bags.GroupSoftmax(WIDTH, groups, others=False),
            bags.Seesaw(WIDTH, 8),
            bags.Sigmoid(WIDTH, 8),
            bags.SimCal(WIDTH, COUNTS),
            bags.TauNorm(WIDTH, 8, select="foreground_tail", background=False, tail=(1, 4)),
            bags.NorCal(WIDTH, IMAGES),
            Squared(WIDTH, 8),
            Mixed(WIDTH, 8),
            Pooled(8),
            bags.Average([bags.Softmax(WIDTH, 8), Squared(WIDTH, 8), bags.Seesaw(WIDTH, 8)], (1, 2, 3)),
        )
    ]


def slow_mean(classifiers, weights, box_features):
    """Each member asked by itself, one proposal at a time."""
    total = sum(weights)
    rows = []
    for k in range(len(box_features.fc)):
        one = BoxFeatures(box_features.pooled[k : k + 1], box_features.fc[k : k + 1])
        parts = [w / total * m.probs(m(one)) for w, m in zip(weights, classifiers, strict=True)]
        rows.append(torch.cat(parts).sum(0))
    return torch.stack(rows)


# --------------------------------------------------------------------------- one matrix


def layers():
    """Name -> a classifier of each kind of layer."""
    groups = bags.assign_groups(COUNTS, (10, 100))
    fixed = {
        **{key: kind().build(WIDTH, 18, STATS) for key, kind in classifier_settings().items() if not kind.combines},
        **everyone(WIDTH),
        "groups, cosine": bags.GroupSoftmax(WIDTH, groups, scale=20.0),
        "groups, euclidean": bags.GroupSoftmax(WIDTH, groups, euclidean=2.0),
        "groups, learned": bags.GroupSoftmax(WIDTH, groups, temperatures="learned"),
        "groups, no background": bags.GroupSoftmax(WIDTH, groups, background_group=False),
        "seesaw, linear": bags.Seesaw(WIDTH, 8, scale=0),
        "tau_norm, foreground": bags.TauNorm(WIDTH, 8, select="foreground", background=False),
        "tau_norm, 0.5": bags.TauNorm(WIDTH, 8, tau=0.5, select="foreground_tail", tail=(1, 2)),
    }
    assert {type(classifier).__name__ for classifier in fixed.values()} == CLASSIFIERS.keys() - {"Average"}
    return fixed


@pytest.mark.parametrize("name", layers())
def test_affine_is_the_layer(name):
    """`forward` is the matrix product that `affine` describes; some have none."""
    classifier, box_features = randomised(layers()[name]), features()
    described = classifier.affine()
    if name in ("disalign", "knn", "ncm"):
        assert described is None or name == "ncm"  # which inherits one that does not describe its forward
        return
    fc = F.normalize(box_features.fc, dim=1) if described.unit else box_features.fc
    expected = classifier(box_features)
    torch.testing.assert_close(fc @ described.weight.T + described.bias, expected, rtol=1e-12, atol=1e-12)
    assert described.unit == isinstance(classifier.linear, CosineLinear)
    assert described.weight.dtype == torch.float64 and len(described.weight) == expected.shape[1]


def test_layers_that_are_not_known_are_not_described():
    assert Mixed(WIDTH, 8).affine() is None
    assert Pooled(8).affine() is None
    tau_norm, simcal = bags.TauNorm(WIDTH, 8), bags.SimCal(WIDTH, COUNTS)
    tau_norm.linear = CosineLinear(WIDTH, 9, 20.0)
    simcal.calibrated = CosineLinear(WIDTH, 9, 20.0)
    assert tau_norm.affine() is None and simcal.affine() is None
    assert isinstance(Squared(WIDTH, 8).affine(), Affine)  # inherited, and wrong: an average must not use it


# --------------------------------------------------------------------------- the mean


@pytest.mark.parametrize("weights", [(), tuple(range(1, 14)), (0, 3, *[0.5] * 11), (1e308,) * 13, (1e-320,) * 13])
def test_scores_are_the_weighted_mean_of_the_members_scores(weights):
    classifiers, box_features = members(), features()
    average = bags.Average(classifiers, weights).double()
    factors = [w / max(weights) for w in weights] if weights else [1.0] * len(classifiers)
    logits = average(box_features)
    expected = slow_mean(classifiers, factors, box_features)
    torch.testing.assert_close(average.probs(logits), expected, rtol=1e-9, atol=1e-12)
    assert average.probs(logits).shape == (PROPOSALS, 9)
    one = BoxFeatures(box_features.pooled[3:4], box_features.fc[3:4])  # after another number of proposals
    torch.testing.assert_close(average.probs(average(one)), expected[3:4], rtol=1e-9, atol=1e-12)


def test_an_average_by_hand():
    """Softmax of 1/4, 1/2, 1/4; sigmoids of 4/5 and 1/3, background 1/5; weights 3 and 1."""
    softmax, sigmoid = bags.Softmax(1, 2), bags.Sigmoid(1, 2)
    with torch.no_grad():
        softmax.linear.weight.copy_(torch.log(torch.tensor([[1.0], [2], [1]])))
        sigmoid.linear.weight.copy_(torch.log(torch.tensor([[4.0], [0.5]])))
        sigmoid.linear.bias.zero_()
    average = bags.Average([softmax, sigmoid], (3, 1))
    logits = average(BoxFeatures(torch.zeros(2, 1, 7, 7), torch.tensor([[1.0], [0]])))
    scores = [
        [0.75 / 4 + 0.25 / 5, 0.75 / 2 + 0.25 * 4 / 5, 0.75 / 4 + 0.25 / 3],
        [0.75 / 3 + 0.25 / 2, 0.75 / 3 + 0.25 / 2, 0.75 / 3 + 0.25 / 2],
    ]
    torch.testing.assert_close(average.probs(logits), torch.tensor(scores))
    loss = average.loss(logits, torch.tensor([1, 0]))
    torch.testing.assert_close(loss["loss_classifier"].item(), -(math.log(scores[0][1]) + math.log(scores[1][0])) / 2)
    norms = average.weight_norms()
    assert norms[0].isnan()  # the sigmoid has no vector for the background
    expected = [0.75 * math.log(2) + 0.25 * math.log(4), 0.25 * math.log(2)]
    torch.testing.assert_close(norms[1:], torch.tensor(expected))


def test_a_member_of_weight_0_changes_nothing():
    """Not even where it has no number."""
    softmax, sigmoid = bags.Softmax(WIDTH, 8), bags.Sigmoid(WIDTH, 8)
    average, box_features = bags.Average([softmax, sigmoid], (2, 0)), features(dtype=torch.float32)
    torch.nn.init.constant_(sigmoid.linear.bias, math.inf)
    assert torch.equal(average.probs(average(box_features)), softmax.probs(softmax(box_features)))
    assert torch.equal(average.weight_norms(), softmax.weight_norms())


def test_rows_of_distributions_sum_to_1():
    average = bags.Average(members()[:1] + members()[8:10], (0.1, 0.7, 3))
    sums = average.probs(average(features())).sum(1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=1e-12, atol=0)


def test_no_proposals():
    average = bags.Average(members()).double()
    logits = average(features(0))
    assert average.probs(logits).shape == (0, 9)
    assert average.loss(logits, torch.zeros(0, dtype=torch.long))["loss_classifier"] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """Weights and features in half precision: scores in float32, near those of the same weights in float64."""
    classifiers = [copy.deepcopy(member) for member in members()[:9]]
    average = bags.Average(classifiers, range(1, 10)).to(dtype)
    box_features = features(dtype=dtype)
    box_features.fc[0] = 1  # `F.normalize` of zeros is not a number in half precision
    scores = average.probs(average(box_features))
    assert scores.dtype == torch.float32
    exact = average.double()
    expected = exact.probs(exact(BoxFeatures(*(part.double() for part in box_features))))
    assert (scores - expected).abs().mean() < 0.01


def test_autocast():
    average = bags.Average(members()[:9]).float()
    box_features = features(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        scores = average.probs(average(box_features))
    assert scores.dtype == torch.float32 and scores.isfinite().all()
    assert (scores - average.probs(average(box_features))).abs().mean() < 0.01


def test_affine_members_are_one_matrix_product(monkeypatch):
    """Nine affine members, one product; the other members' layers are called by themselves."""
    product, calls = F.linear, []
    monkeypatch.setattr(F, "linear", lambda *a: calls.append(a[1].shape) or product(*a))
    affine, others = members()[:9], members()[9:12]
    average = bags.Average(affine)
    logits = average(features())
    assert len(calls) == 1 and calls[0][0] == logits.shape[1]
    calls.clear()
    bags.Average([others[0], *affine, *others[1:]])(features())
    assert len(calls) == 4


def test_an_average_in_a_copy_and_a_pickle():
    average, box_features = bags.Average(members(), range(1, 14)).double(), features()
    expected = average.probs(average(box_features))
    for twin in (copy.deepcopy(average), pickle.loads(pickle.dumps(average))):
        assert torch.equal(twin.probs(twin(box_features)), expected)
    state = average.state_dict()
    assert not any("shares" in name for name in state)
    other = bags.Average(members(), range(1, 14)).double()
    other.load_state_dict(state)
    assert torch.equal(other.probs(other(box_features)), expected)


def test_gradients_are_switched_as_each_member_does():
    """The first layer of simcal is never trained, in an average either."""
    average = bags.Average([bags.SimCal(WIDTH, COUNTS), bags.Softmax(WIDTH, 8)])
    assert average.requires_grad_(True) is average
    simcal, softmax = average.members
    assert not simcal.linear.weight.requires_grad and simcal.calibrated.weight.requires_grad
    assert softmax.linear.weight.requires_grad
    assert not any(parameter.requires_grad for parameter in average.requires_grad_(False).parameters())


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "classifiers, weights, words",
    [
        ([], (), "members: expected one classifier or more"),
        (
            [bags.Softmax(4, 2), bags.Softmax(4, 3)],
            (),
            r"members: expected classifiers of the same categories, got \[2",
        ),
        ([bags.Softmax(4, 2), bags.Sigmoid(5, 2)], (), r"members: expected .* features of one width, got \[4, 5\]"),
        ([bags.Softmax(4, 2)] * 2, (1,), "weights: expected none, or one for each of the 2 runs"),
        ([bags.Softmax(4, 2)] * 2, (0, 0), "weights: expected one above 0 or more"),
        ([bags.Softmax(4, 2)] * 2, (1, -1), "weights: expected numbers of 0 or more"),
        ([bags.Softmax(4, 2)] * 2, (1, math.inf), "weights: expected numbers of 0 or more"),
        ([bags.Softmax(4, 2)] * 2, (1, math.nan), "weights: expected numbers of 0 or more"),
    ],
)
def test_what_a_library_call_refuses(classifiers, weights, words):
    with pytest.raises(ValueError, match=words):
        bags.Average(classifiers, weights)


def test_logits_of_another_classifier():
    average = bags.Average([bags.Softmax(WIDTH, 8)] * 2)
    with pytest.raises(ValueError, match="logits: expected those of `forward`"):
        average.probs(torch.zeros(3, 18))


def section(**keys):
    return {"detector": {"init_from": "a.pth"}, "train": {"part": "none"}, "classifier": {"name": "average", **keys}}


def nested(depth):
    inner = {"name": "softmax"}
    for _ in range(depth):
        inner = {"name": "average", "of": ["a"], "members": [inner]}
    return inner


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"of": ["a", "a"]}, "classifier.of: expected each run once"),
        ({"of": ["row:"]}, "classifier.of: expected row:NAME or checkpoints"),
        ({"of": [""]}, "classifier.of: expected row:NAME or checkpoints"),
        ({"of": "row:a"}, r"classifier.of: .*; write \[row:a\]"),
        ({"of": ["a", "b"], "weights": [1]}, "classifier.weights: expected none, or one for each of the 2 runs"),
        ({"of": ["a"], "members": [{"name": "ncm"}]}, "classifier.of: .* need no pooled features, got 'ncm'"),
        ({"of": ["a"], "members": [nested(0)] * 2}, "classifier.members: expected none, .* each of the 1 runs"),
        ({"of": ["a"], "members": [{"name": "average", "of": ["b"]}]}, "classifier.members: expected averages with"),
        ({"of": ["a"], "members": nested(0)}, r"classifier.members: expected a list of \(sections of keys\)"),
        ({"of": ["a"], "members": [{"name": "sofmax"}]}, "classifier.members.name: .*did you mean softmax"),
        ({"of": ["a"], "members": [nested(MOST_DEPTH)]}, f"averages of averages at most {MOST_DEPTH} deep"),
        ({"of": ["a"], "members": [nested(1000)]}, "classifier.members.*: expected at most 12 sections in each other"),
        ({"of": ["a"], "members": [nested(0)] * 10**5}, "classifier.members: 100000 values, expected at most 100"),
        ({"of": [str(n) for n in range(101)]}, "classifier.of: expected at most 100 classifiers in all, got 101"),
    ],
)
def test_what_a_configuration_refuses(keys, words):
    with pytest.raises(bags.UserError, match=words) as error:
        config_from_dict(section(**keys), "row.yaml")
    assert str(error.value).startswith("row.yaml: classifier.") and len(str(error.value)) < 500


def test_lists_in_lists_of_members_are_refused_early():
    """Each level names the next one a hundred times, as aliases of YAML can in a few lines."""
    inner = {"name": "softmax"}
    for _ in range(8):
        inner = {"name": "average", "of": [str(n) for n in range(100)], "members": [inner] * 100}
    with pytest.raises(bags.UserError, match="at most 100 classifiers in all, got 10000"):
        config_from_dict({"classifier": inner}, "row.yaml")


def test_settings_of_members_come_back_as_they_were():
    inner = {"name": "group_softmax", "boundaries": [5, 15], "temperatures": "learned"}
    config = config_from_dict(section(of=["a", "b"], weights=[1, 2], members=[inner, nested(1)]))
    assert config_from_dict(config_to_dict(config)) == config
    assert config.classifier.layers == 2 and AverageSettings().layers == 0
    memory = [{"name": "knn", "per_category": 100}, {"name": "loce", "queue": 80}]
    large = config_from_dict(section(of=["a", "b"], members=memory)).classifier
    assert large.classifiers == 2 and large.layers == 182  # stored features are memory, not classifiers
    with pytest.raises(ValueError, match="members: expected the settings"):
        AverageSettings(of=("a",)).build(4, 4, STATS)
    built = AverageSettings(of=("a", "b"), members=(SoftmaxSettings(),) * 2).build(4, 4, STATS)
    assert isinstance(built, bags.Average) and built.shares == [0.5, 0.5]
