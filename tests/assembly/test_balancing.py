"""`bags.balance` on torchvision's detectors, as a user of torchvision works with them. Random weights, small images."""

import copy
import io

import pytest
import torch
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

import bags
from bags.config.sections import TrainConfig
from bags.detectors.from_features import FromFeatures, proposals_to_store, training_pool
from bags.engine.train import Run, train

COUNTS = (5, 500, 50, 2000)  # of labels 1..4
SIZES = {
    "min_size": 64,
    "max_size": 96,
    "box_batch_size_per_image": 16,
    "rpn_post_nms_top_n_train": 40,
    "rpn_post_nms_top_n_test": 30,
}
TORCHVISION = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "maskrcnn_resnet50_fpn",
)


def built_from_parts():
    """A user's own: one level, batch normalisation and dropout, a transform of three sizes."""
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
    backbone.out_channels = 8
    head = nn.Sequential(TwoMLPHead(8 * 9, 12), nn.Dropout(0.5))
    return FasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(((16, 32),), ((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 3, 1),
        box_head=head,
        box_predictor=FastRCNNPredictor(12, 5),
        **(SIZES | {"min_size": (48, 64, 80)}),
        bbox_reg_weights=(5.0, 5.0, 2.0, 2.0),
        box_score_thresh=0.1,
        box_nms_thresh=0.3,
        box_detections_per_img=7,
        box_fg_iou_thresh=0.6,
        box_bg_iou_thresh=0.4,
        image_mean=(0.5, 0.4, 0.3),
    )


def make(name):
    torch.manual_seed(0)
    if name == "parts":
        return built_from_parts()
    return getattr(detection, name)(
        weights=None, weights_backbone=None, num_classes=5, box_score_thresh=0.0, box_detections_per_img=8, **SIZES
    )


def batch(masks=True):
    torch.manual_seed(1)
    images = [torch.rand(3, 60, 90), torch.rand(3, 64, 64)]
    boxes = torch.tensor([[4.0, 4, 40, 40], [20, 10, 60, 50]])
    targets = [
        {"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": torch.ones(2, 60, 90, dtype=torch.uint8)},
        {"boxes": boxes[:1], "labels": torch.tensor([4]), "masks": torch.ones(1, 64, 64, dtype=torch.uint8)},
    ]
    return images, targets


def snapshot(detector):
    return {name: value.clone() for name, value in detector.state_dict().items()}


def detect(detector):
    torch.manual_seed(2)
    with torch.no_grad():
        return detector.eval()(batch()[0])


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", [*TORCHVISION, "parts"])
def test_from_torchvision_and_back(name):
    """Softmax on the detector's own layer detects what it did, bit for bit; one step of a plain loop with BAGS
    changes the classifier alone; the way back restores detections, weights and what is trained."""
    detector = make(name)
    detector.backbone.requires_grad_(False)  # a choice of the user's
    before, expected = snapshot(detector), detect(detector)
    assert sum(len(one["boxes"]) for one in expected) > 2
    trained = {key: p.requires_grad for key, p in detector.named_parameters()}
    assert bags.balance(detector, COUNTS, classifier="softmax", keep_weights=True) is detector
    assert_same(detect(detector), expected)
    bags.unbalance(detector)
    assert_same(detect(detector), expected)

    bags.balance(detector, COUNTS, boundaries=(10, 100))
    start = snapshot(detector)
    assert all(torch.equal(value, start[key]) for key, value in before.items())
    optimizer = torch.optim.SGD([p for p in detector.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    detector.train()
    detector.backbone.train()
    images, targets = batch()
    losses = detector(images, targets)
    assert {"loss_group0", "loss_group1", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"} <= losses.keys()
    optimizer.zero_grad()
    sum(losses.values()).backward()
    optimizer.step()
    for key, value in detector.state_dict().items():
        assert torch.equal(value, start[key]) != key.startswith("roi_heads.classifier."), key
    found = detect(detector)
    limit = detector.roi_heads.detections_per_img
    for one in found:
        assert len(one["scores"]) <= limit and set(one["labels"].tolist()) <= {1, 2, 3, 4}
        assert (one["scores"] > detector.roi_heads.score_thresh).all() and ("masks" in one) == name.startswith("mask")

    bags.unbalance(detector)
    assert_same(detect(detector), expected)
    assert detector.state_dict().keys() == before.keys()
    assert {key: p.requires_grad for key, p in detector.named_parameters()} == trained
    detector.train()
    detector(images, targets)
    assert any(m.training for m in detector.backbone.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.fixture
def small():
    return make("parts")


def test_frozen_layers_work_in_evaluation_mode(small):
    """Dropout of the box head drops nothing: the same proposals give the same features in training."""
    bags.balance(small, COUNTS)
    head = small.roi_heads.box_head
    small.train()
    head.train()
    small(*batch())
    assert not head.training and not small.backbone.training and not small.rpn.head.training
    assert small.training and small.rpn.training and small.roi_heads.training and small.roi_heads.classifier.training
    for parameter in head.parameters():
        parameter.requires_grad_(True)  # the user trains it after all
    small.train()(*batch())
    assert head.training


def test_settings_of_the_detector_stay_its_own(small):
    original, transform = small.roi_heads, small.transform
    ours = bags.balance(small, COUNTS).roi_heads
    assert (ours.score_thresh, ours.nms_thresh, ours.detections_per_img) == (0.1, 0.3, 7)
    assert ours.box_coder is original.box_coder and ours.box_coder.weights == (5.0, 5.0, 2.0, 2.0)
    assert ours.proposal_matcher is original.proposal_matcher and ours.proposal_matcher.high_threshold == 0.6
    assert ours.fg_bg_sampler is original.fg_bg_sampler and small.transform is transform
    assert ours.classifier.groups.sizes == (1, 1, 1, 1)


def test_the_box_loss_is_torchvisions(small):
    """The losses of what is frozen are those that the detector gave before, in evaluation mode of its layers."""
    small.roi_heads.box_head.eval()
    small.backbone.eval()
    small.train = lambda mode=True: small  # the modes above stay
    torch.manual_seed(3)
    expected = small(*batch())
    del small.train
    bags.balance(small, COUNTS, classifier="softmax", keep_weights=True)
    torch.manual_seed(3)
    found = small.train()(*batch())
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("way", ["state", "deepcopy", "pickle"])
def test_saved_and_loaded(small, way):
    """By state dict, by deep copy, as a whole: the same detections, and the way back is still there."""
    plain = detect(small)
    bags.balance(small, COUNTS)
    torch.nn.init.normal_(small.roi_heads.classifier.linear.weight)
    expected = detect(small)
    if way == "state":
        torch.manual_seed(5)
        other = bags.balance(built_from_parts(), COUNTS)
        other.load_state_dict(small.state_dict())
    elif way == "deepcopy":
        other = copy.deepcopy(small)
        assert other.roi_heads.original[0].box_head is other.roi_heads.box_head
    else:
        file = io.BytesIO()
        torch.save(small, file)
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert_same(detect(other), expected)
    assert_same(detect(bags.unbalance(other)), plain)
    assert not other._forward_pre_hooks and small._forward_pre_hooks
    assert_same(detect(small), expected)


@pytest.mark.parametrize("name", ["norcal", "tau_norm", "logit_adjustment"])
def test_calibration_of_a_trained_detector(small, name):
    """Nothing to train: other scores on the detector's own layer, of the same boxes."""
    small.roi_heads.score_thresh = 0.0
    plain = detect(small)
    found = detect(bags.balance(small, COUNTS, classifier=name, image_counts=(5, 200, 40, 900), keep_weights=True))
    same = torch.equal(found[0]["scores"], plain[0]["scores"])
    assert same == (name == "logit_adjustment")  # which is adjusted in its loss


@pytest.mark.parametrize(
    "name", ["seesaw", "eql", "eql_v2", "federated", "drop_loss", "acsl", "class_balanced_sigmoid"]
)
def test_every_method_by_its_name(small, name):
    bags.balance(small, torch.tensor(COUNTS), classifier=name)
    losses = small.train()(*batch())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in small.roi_heads.classifier.parameters())
    assert all(p.grad is None for key, p in small.named_parameters() if "roi_heads.classifier" not in key)


class Batches:
    """What `engine.train` asks of a loader."""

    def __init__(self, number):
        self.batch_sampler, self.first, self.number = self, 0, number

    def start(self, epoch, first_batch=0):
        self.first = first_batch

    def batches_in(self, epoch):
        return self.number

    def __iter__(self):
        return iter([batch()] * (self.number - self.first))


def test_an_average_of_classifiers(small):
    """Members of the library's own: all weight on one of them detects what that one does; both can be trained on."""
    torch.manual_seed(0)
    width = small.roi_heads.box_predictor.cls_score.in_features
    members = [bags.Seesaw(width, 4), bags.SimCal(width, COUNTS)]
    expected = []
    for member in members:
        expected.append(detect(bags.balance(small, COUNTS, classifier=member)))
        bags.unbalance(small)
    for weights, detections in zip(((1, 0), (0, 1)), expected, strict=True):
        found = detect(bags.balance(small, COUNTS, classifier=bags.Average(members, weights)))
        for ours, theirs in zip(found, detections, strict=True):
            assert torch.equal(ours["labels"], theirs["labels"])
            torch.testing.assert_close(ours["scores"], theirs["scores"])
        bags.unbalance(small)
    bags.balance(small, COUNTS, classifier=bags.Average(members, (1, 2)))
    assert not members[1].linear.weight.requires_grad  # simcal's first layer is never trained
    losses = small.train()(*batch())
    assert losses["loss_classifier"].isfinite()
    bags.unbalance(small)
    for classifier, words in (
        (bags.Average([bags.Softmax(width, 3)]), "has 3 categories, the detector 4"),
        (bags.Average([bags.Average([bags.Softmax(width + 1, 4)])]), f"takes {width + 1} features"),
    ):
        with pytest.raises(ValueError, match=words):
            bags.balance(small, COUNTS, classifier=classifier)
    with pytest.raises(ValueError, match="keep_weights: the layer of Average is not a softmax's"):
        bags.balance(small, COUNTS, classifier=bags.Average(members), keep_weights=True)
    with pytest.raises(ValueError, match="classifier: expected a classifier or one of .*, got 'average'"):
        bags.balance(small, COUNTS, classifier="average")


def test_with_our_engine(small, tmp_path):
    """Part `cls` with AdamW, killed in between: resumed to the same weights; all but the classifier bit-equal."""
    config = TrainConfig(
        part="cls",
        epochs=1,
        batch_size=2,
        optimizer="adamw",
        lr=0.01,
        milestones=(),
        log_every=1,
        checkpoint_every=2,
        warmup_iterations=0,
    )
    other = copy.deepcopy(small)
    about = {"config": {}, "stats": {}}
    torch.manual_seed(0)
    run = Run(bags.balance(small, COUNTS, classifier="seesaw"), config, tmp_path / "a", 0, "a", about)
    torch.manual_seed(0)
    again = Run(bags.balance(other, COUNTS, classifier="seesaw"), config, tmp_path / "b", 0, "b", about)
    before = snapshot(small)
    for folder in (run.folder, again.folder):
        folder.mkdir()
    train([run], Batches(5), torch.device("cpu"))
    with pytest.raises(RuntimeError, match="killed"):
        train([again], Killed(5, 3), torch.device("cpu"))
    torch.manual_seed(0)
    fresh = Run(bags.balance(make("parts"), COUNTS, classifier="seesaw"), config, tmp_path / "b", 0, "b", about)
    train([fresh], Batches(5), torch.device("cpu"))
    ends = snapshot(run.model), snapshot(fresh.model)
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in before)
    assert run.model.roi_heads.classifier.counts.sum() > 0
    assert all(torch.equal(ends[0][k], before[k]) for k in before if not k.startswith("roi_heads.classifier."))


class Killed(Batches):
    def __init__(self, number, alive):
        super().__init__(number)
        self.alive = alive

    def __iter__(self):
        yield from [batch()] * self.alive
        raise RuntimeError("killed")


def test_from_stored_features():
    """Both halves of the cached stage on a balanced torchvision detector: losses of the pool, detections of what is
    seen equal the detector's own."""
    detector = bags.balance(make("fasterrcnn_mobilenet_v3_large_320_fpn"), COUNTS).eval()
    images, targets = batch()
    expected = detect(detector)
    halves = FromFeatures(detector).eval()
    assert_same(halves(proposals_to_store(detector, images)), expected)
    pools = training_pool(detector, [i.clone() for i in images], [dict(t) for t in targets], 20, [0, 1])
    fc, labels = torch.cat([p.fc[:, 0] for p in pools]), torch.cat([p.labels[:, 0] for p in pools])
    assert sorted(set(labels.tolist())) == [0, 1, 3, 4]
    losses = halves.train()([fc.clone()], [{"labels": labels.clone()}])
    sum(losses.values()).backward()
    assert detector.roi_heads.classifier.linear.weight.grad.abs().sum() > 0


class Picky(FastRCNNPredictor):
    """More than two layers."""

    def forward(self, x):
        return tuple(2 * y for y in super().forward(x))


def test_what_cannot_be_balanced(small):
    with pytest.raises(ValueError, match="expected 4, one for each label 1 to 4, got \\(3,\\)"):
        bags.balance(small, (1, 2, 3))
    with pytest.raises(ValueError, match="whole numbers"):
        bags.balance(small, (1, 2, 3, -4))
    with pytest.raises(ValueError, match="boundaries"):
        bags.balance(small, COUNTS, boundaries=(100, 10))
    for other, name in (("seesaw", "seesaw"), (bags.Softmax(12, 4), "Softmax")):
        with pytest.raises(ValueError, match=rf"boundaries: expected None, as {name} takes none, got \(3,\)"):
            bags.balance(small, COUNTS, boundaries=[3], classifier=other)
    with pytest.raises(ValueError, match="one of acsl, .*group_softmax.*got 'bag'"):
        bags.balance(small, COUNTS, classifier="bag")
    with pytest.raises(ValueError, match="keep_weights: the layer of group_softmax"):
        bags.balance(small, COUNTS, keep_weights=True)
    with pytest.raises(ValueError, match="norcal: works with the detector"):
        bags.balance(small, COUNTS, classifier="norcal")
    with pytest.raises(ValueError, match="has 3 categories, the detector 4"):
        bags.balance(small, COUNTS, classifier=bags.Softmax(12, 3))
    with pytest.raises(ValueError, match="takes 16 features, the detector's box head gives 12"):
        bags.balance(small, COUNTS, classifier=bags.Softmax(16, 4))
    with pytest.raises(ValueError, match="bags.balance has not been called"):
        bags.unbalance(small)
    assert all(p.requires_grad for p in small.parameters())  # nothing was changed so far
    bags.balance(small, COUNTS, classifier=bags.Softmax(12, 4))
    with pytest.raises(ValueError, match="bags.unbalance first"):
        bags.balance(small, COUNTS)
    other = built_from_parts()
    other.roi_heads.box_predictor = Picky(12, 5)
    with pytest.raises(ValueError, match="Picky does more than its layers"):
        bags.balance(other, COUNTS)
    other.roi_heads.box_predictor = nn.Linear(12, 5)
    with pytest.raises(ValueError, match="linear layers cls_score and bbox_pred in Linear"):
        bags.balance(other, COUNTS)
    with pytest.raises(ValueError, match="got Linear: it has no roi_heads"):
        bags.balance(nn.Linear(1, 1), COUNTS)


@pytest.mark.parametrize("size", [(64, 6400), (6400, 64), (1, 5000)])
@pytest.mark.parametrize("name", ["fasterrcnn_mobilenet_v3_large_320_fpn", "parts"])
def test_thin_images(name, size):
    """Resized to at most 96 pixels, their shorter side would vanish, for which torchvision raises a RuntimeError."""
    detector = bags.balance(make(name), COUNTS)
    image = torch.rand(3, *size)
    (found,) = detector.eval()([image])
    assert found["boxes"].isfinite().all()
    targets = [{"boxes": torch.tensor([[0.0, 0, size[1], size[0]]]), "labels": torch.tensor([1])}]
    losses = detector.train()([image], targets)
    assert all(loss.isfinite() for loss in losses.values())
    with pytest.raises(RuntimeError, match="sizes should be greater than 0"):
        bags.unbalance(detector).eval()([image])


def test_a_fixed_size_stays():
    """torchvision's `fixed_size` of the transform (width, height) is kept, image after image."""
    detector = make("parts")
    detector.transform.fixed_size = (48, 32)
    bags.balance(detector, COUNTS)
    for _ in range(2):
        batch, _ = detector.transform([torch.rand(3, 64, 6400)])
        assert batch.image_sizes == [(32, 48)]
