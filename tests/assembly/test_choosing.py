"""`bags.choose_classifier` on small torchvision detectors, whose proposals are all their anchors."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

import bags
from bags.assembly.in_memory import LabelledProposals, Trained, train_together, training_proposals
from bags.config.sections import TrainConfig
from bags.detectors.torchvision_private import BalancedPositiveNegativeSampler

COUNTS = (40, 12, 150, 1200)  # of labels 1..4
COLOURS = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
IMAGES, BATCH = 20, 4
ROWS = {
    "softmax": "softmax",
    "long": ("softmax", 2, "adamw"),
    "bags": {"name": "group_softmax", "boundaries": (20, 100)},
    "seesaw": (lambda width: bags.Seesaw(width, 4, p=0.6), 1, "sgd"),
    "norcal": "norcal",
}
SETTINGS = {"epochs": 6, "batch_size": 8, "lr": 0.1, "draws": 20, "rows": ROWS}


def make(masks=False):
    """A detector of random weights that leaves every anchor where it is."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
    backbone.out_channels = 8
    detector = FasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(((16, 28),), ((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 3, 1),
        box_head=nn.Sequential(TwoMLPHead(8 * 9, 24), nn.Dropout(0.5)),
        box_predictor=FastRCNNPredictor(24, 5),
        min_size=64,
        max_size=64,
        box_batch_size_per_image=32,
        box_score_thresh=0.0,
        box_detections_per_img=30,
        rpn_nms_thresh=1.0,
    )
    if masks:
        detector.roi_heads.mask_roi_pool = MultiScaleRoIAlign(["0"], 4, 1)
        detector.roi_heads.mask_head = MaskRCNNHeads(8, (8,), 1)
        detector.roi_heads.mask_predictor = MaskRCNNPredictor(8, 8, 5)
    for layer in (detector.rpn.head.bbox_pred, detector.roi_heads.box_predictor.bbox_pred):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    detector.backbone[0].requires_grad_(False)  # a choice of the user's
    return detector.train()


def picture(number, labels):
    """A grey image with a square for each label, and its target; label 4 is never in a validation image."""
    random = torch.Generator().manual_seed(number)
    image = 0.5 + 0.1 * torch.rand(3, 64, 64, generator=random)
    boxes = torch.zeros(len(labels), 4)
    for k, label in enumerate(labels):
        x, y = (8 * torch.randint(0, 5, (2,), generator=random)).tolist()
        side = 16 + 8 * k
        image[:, y : y + side, x : x + side] = COLOURS[label - 1, :, None, None]
        boxes[k] = torch.tensor([x, y, min(x + side, 64), min(y + side, 64)])
    return image, {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.long)}


def batches(first, number, most):
    """Pictures of at most two objects, every fifth of none."""
    random = np.random.default_rng(first)
    pairs = [picture(first + k, random.integers(1, most + 1, 2 if k % 5 else 0).tolist()) for k in range(number)]
    return [tuple(map(list, zip(*pairs[k : k + BATCH], strict=True))) for k in range(0, number, BATCH)]


def train_batches():
    return batches(1000, 24, 4)


def validation_batches():
    found = batches(1, IMAGES, 3)
    found[1][1][2]["iscrowd"] = torch.tensor([1, 0])
    return found


def choose(detector, train=None, validation=None, counts=COUNTS, **settings):
    train = train_batches() if train is None else train
    validation = validation_batches() if validation is None else validation
    return bags.choose_classifier(detector, iter(train), iter(validation), counts, **(SETTINGS | settings))


def live_numbers(detector, folder):
    """Scores of the detector's own detections in the validation images, by files as a user writes them."""
    images, objects, found = [], [], []
    with torch.no_grad():
        for pictures, targets in validation_batches():
            for _, target, detection in zip(pictures, targets, detector.eval()(pictures), strict=True):
                images.append({"id": len(images) + 1, "width": 64, "height": 64})
                crowd = target.get("iscrowd", torch.zeros(len(target["labels"]))).tolist()
                for box, label, is_crowd in zip(
                    target["boxes"].tolist(), target["labels"].tolist(), crowd, strict=True
                ):
                    box = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
                    common = {"image_id": len(images), "category_id": label, "bbox": box, "iscrowd": int(is_crowd)}
                    objects.append({"id": len(objects) + 1, **common})
                rows = zip(*(detection[key].tolist() for key in ("boxes", "labels", "scores")), strict=True)
                for (x1, y1, x2, y2), label, score in rows:
                    box = [round(side, 3) for side in (x1, y1, x2 - x1, y2 - y1)]
                    found.append({"image_id": len(images), "category_id": label, "bbox": box, "score": score})
    categories = [{"id": label, "name": str(label)} for label in range(1, 5)]
    truth, results = folder / "val.json", folder / "found.json"
    truth.write_text(json.dumps({"images": images, "annotations": objects, "categories": categories}))
    results.write_text(json.dumps(found))
    return bags.evaluate(truth, results, instance_counts=COUNTS)


def assert_numbers(numbers, expected):
    assert {"AP", "AP50", "AP75", "AP1", "AP_tail", "AP_head"} <= numbers.values.keys()
    for key, value in numbers.values.items():
        assert value == pytest.approx(expected[key], rel=1e-12, nan_ok=True), key


def weights(choice):
    return {
        name: value for key, one in choice.classifiers.items() for name, value in one.state_dict(prefix=key).items()
    }


@pytest.fixture(scope="module")
def chosen():
    return choose(make())


@pytest.mark.parametrize("masks", [False, True])
def test_the_numbers_are_those_of_the_balanced_detector(masks, tmp_path):
    """Its detections, made live and scored from files: of the choice, of each row, and of the detector as it was."""
    detector = make(masks)
    choice = choose(detector)
    assert_numbers(choice.rows["detector"], live_numbers(detector, tmp_path))
    torch.save(choice.classifier, tmp_path / "chosen.pth")
    loaded = torch.load(tmp_path / "chosen.pth", weights_only=False)
    pairs = [(choice.classifiers[name], numbers) for name, numbers in choice.rows.items()]
    for classifier, numbers in [(choice.classifier, choice.optimistic), (loaded, choice.optimistic), *pairs]:
        bags.balance(detector, COUNTS, classifier=classifier)
        assert_numbers(numbers, live_numbers(detector, tmp_path))
        bags.unbalance(detector)
    ap = {name: numbers.values["AP"] for name, numbers in choice.rows.items()}
    assert choice.optimistic.values["AP"] > max(ap.values()) > ap["detector"] + 0.05
    assert len(choice.shares) > 1 and sum(choice.shares.values()) == pytest.approx(1)
    assert len(choice.without_fold) == 5 and choice.optimistic.values["AP"] >= choice.honest.values["AP"]


def test_the_detector_stays_as_it_was():
    """Weights, modes, what is trained, the modules themselves, and torch's random numbers."""
    detector = make()
    detector.roi_heads.box_head.eval()

    def state():
        modules = [(module, type(module), module.training) for module in detector.modules()]
        trained = {name: parameter.requires_grad for name, parameter in detector.named_parameters()}
        return modules, trained, list(detector.state_dict()), len(detector._forward_pre_hooks)

    before, values = state(), {name: value.clone() for name, value in detector.state_dict().items()}
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    choose(detector, epochs=1, rows={"softmax": "softmax"})
    assert torch.equal(torch.rand(1), expected) and state() == before
    assert all(torch.equal(value, values[name]) for name, value in detector.state_dict().items())
    with pytest.raises(ValueError, match="train: "):
        choose(detector, train=[])
    assert state() == before


def test_equal_seeds_give_equal_choices(chosen):
    """Whatever torch's own seed is; and a row is what it is beside any other rows."""
    torch.manual_seed(99)
    with torch.no_grad():
        again = choose(make())
    assert str(again) == str(chosen) and again.without_fold == chosen.without_fold
    assert all(torch.equal(value, weights(chosen)[name]) for name, value in weights(again).items())
    others = {"drawn": {"name": "group_softmax", "others_ratio": 1}, "bags": ROWS["bags"]}
    found, before = (one.classifiers["bags"].linear for one in (choose(make(), rows=others), chosen))
    assert torch.equal(found.weight, before.weight) and torch.equal(found.bias, before.bias)
    other = choose(make(), rows={"softmax": "softmax"}, seed=1)
    assert not torch.equal(weights(other)["softmaxlinear.weight"], weights(chosen)["softmaxlinear.weight"])


def test_no_image_helps_to_choose_what_is_used_in_it(chosen):
    """Other objects in the images of a fold: the mixture that is chosen without it stays, and others do not."""
    fold_of, others = np.random.default_rng(0).permutation(np.arange(IMAGES) % 5), set()
    for fold in (0, 4):
        changed = validation_batches()
        for k, target in enumerate(target for _, targets in changed for target in targets):
            if fold_of[k] == fold:
                target["labels"] = 1 + target["labels"] % 3
                target["boxes"] = (target["boxes"] + 5).clamp(max=60)
        choice = choose(make(), validation=changed)
        assert choice.without_fold[fold] == chosen.without_fold[fold]
        assert choice.optimistic.values != chosen.optimistic.values
        others.add(choice.without_fold == chosen.without_fold)
    assert False in others


def test_a_balanced_detector(tmp_path):
    """Its classifier is one more row, and it keeps it."""
    detector = bags.balance(make(), COUNTS, classifier="seesaw")
    own = detector.roi_heads.classifier
    nn.init.normal_(own.linear.weight)
    expected = live_numbers(detector, tmp_path)
    choice = choose(detector, epochs=1, rows={"softmax": "softmax"})
    assert list(choice.rows) == ["softmax", "detector", "balanced"] and detector.roi_heads.classifier is own
    assert_numbers(choice.rows["balanced"], expected)
    assert_numbers(choice.rows["balanced"], live_numbers(detector, tmp_path))
    assert choice.classifiers["balanced"] is not own
    assert_numbers(choice.rows["detector"], live_numbers(bags.unbalance(detector), tmp_path))


def test_training_is_that_of_torch():
    """Where every proposal is drawn and a batch is all images: torch's optimisers and step schedule, by hand."""
    torch.manual_seed(0)
    proposals = [LabelledProposals(torch.rand(12, 6).half(), torch.randint(0, 4, (12,))) for _ in range(3)]
    for proposal in proposals:
        proposal.labels[4:] = 0
    config = TrainConfig(part="cls", epochs=12, batch_size=3, lr=0.5, milestones=(8, 11), warmup_iterations=0)
    adamw = TrainConfig(**vars(config) | {"optimizer": "adamw", "lr": 0.1})
    rows = [Trained("a", bags.Softmax(6, 3), config), Trained("b", bags.Seesaw(6, 3), adamw)]
    by_hand = copy.deepcopy([row.classifier for row in rows])
    train_together(rows, proposals, BalancedPositiveNegativeSampler(48, 0.25), 0, torch.device("cpu"))
    fc, labels = torch.cat([p.fc.float() for p in proposals]), torch.cat([p.labels for p in proposals])
    for k, classifier in enumerate(by_hand):
        parameters = classifier.parameters()
        optimizer = (
            torch.optim.AdamW(parameters, lr=0.1, weight_decay=1e-4)
            if k
            else torch.optim.SGD(parameters, lr=0.5, momentum=0.9, weight_decay=1e-4)
        )
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [8, 11])
        for _ in range(12):
            optimizer.zero_grad()
            sum(classifier.loss(classifier(bags.BoxFeatures(fc[:, :0], fc)), labels).values()).backward()
            nn.utils.clip_grad_norm_(classifier.parameters(), 35)
            optimizer.step()
            schedule.step()
        for ours, theirs in zip(rows[k].classifier.parameters(), classifier.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_an_image_gives_as_many_proposals_as_the_detector_draws():
    """The sampler's number and share of foreground, of each image anew in each epoch."""
    labels = torch.cat([torch.ones(20), torch.zeros(80)]).long()
    proposals = [LabelledProposals(torch.arange(100.0)[:, None].repeat(1, 2) + 1000 * k, labels) for k in range(4)]
    seen = []

    class Watched(bags.Softmax):
        def forward(self, features):
            seen.append(features.fc[:, 0].tolist())
            return super().forward(features)

    config = TrainConfig(part="cls", epochs=2, batch_size=4, lr=1e-9, warmup_iterations=0)
    rows = [Trained(name, Watched(2, 1), config) for name in "ab"]
    train_together(rows, proposals, BalancedPositiveNegativeSampler(16, 0.25), 0, torch.device("cpu"))
    assert seen[0] == seen[1] and seen[2] == seen[3] and sorted(seen[0]) != sorted(seen[2])
    for drawn in seen:
        assert len(set(drawn)) == 64
        for k in range(4):
            of_image = [value - 1000 * k for value in drawn if 1000 * k <= value < 1000 * k + 100]
            assert len(of_image) == 16 and sum(value < 20 for value in of_image) == 4


def test_features_are_in_half_precision_where_that_can_hold_them():
    """Objects, foreground and the background's share, without what lies in between and crowd regions; on the CPU."""
    detector = bags.balance(make(), COUNTS).eval()
    half = training_proposals(detector, train_batches(), 4, 10, 0)
    with torch.no_grad():
        detector.roi_heads.box_head[0].fc7.weight.mul_(1e7)
    single = training_proposals(detector, train_batches(), 4, 10, 0)
    assert len(half) == len(single) == 24
    for a, b, target in zip(half, single, (t for _, targets in train_batches() for t in targets), strict=True):
        assert a.fc.dtype == torch.float16 and b.fc.dtype == torch.float32 and b.fc.isfinite().all()
        assert torch.equal(a.labels, b.labels) and (a.labels == 0).sum() == 10
        assert set(a.labels.tolist()) == {0, *target["labels"].tolist()}
    crowd = [(images, [t | {"iscrowd": t["labels"] % 2} for t in targets]) for images, targets in train_batches()]
    assert {n for p in training_proposals(detector, crowd, 4, 10, 0) for n in p.labels.tolist()} == {0, 2, 4}


def test_the_text_of_a_choice(chosen):
    """A line for each row, the best first, then the choice; all in percent."""
    lines = str(chosen).splitlines()
    assert lines[0].split() == ["AP", "AP_tail", "AP_head", "gain", "95", "%"]
    names = [re.split("  +", line)[0] for line in lines[1:7]]
    assert sorted(names) == sorted(chosen.rows) and chosen.control == "softmax"
    values = [chosen.rows[name].values["AP"] for name in names]
    assert values == sorted(values, reverse=True) and float(lines[1].split()[1]) == round(100 * values[0], 1)
    gain, low, high = chosen.honest.gain["AP"]
    assert gain == chosen.honest.values["AP"] - chosen.rows["softmax"].values["AP"]
    assert f"AP is {100 * gain:+.1f} against softmax (95 %: {100 * low:+.1f} to {100 * high:+.1f})" in str(chosen)
    assert chosen.better_than_control and low > 0
    assert set(chosen.over) == {"softmax", "detector"} and chosen.over["softmax"] == chosen.honest.gain["AP"]
    own = chosen.honest.values["AP"] - chosen.rows["detector"].values["AP"]
    assert chosen.over["detector"][0] == own and f" and {100 * own:+.1f} against detector (95 %: " in str(chosen)
    one = choose(make(), members=1)
    best = max(one.rows, key=lambda name: one.rows[name].values["AP"])
    assert one.shares == {best: 1.0} and one.optimistic.values["AP"] == chosen.rows[best].values["AP"]
    same = choose(make(), rows={"long": ROWS["long"]})
    assert not same.better_than_control and same.instead in ("long", "detector")
    no_better = f"No other choice is better than {same.instead}."
    assert str(same).endswith((no_better, f"The validation images cannot tell it from {same.instead}: keep that one."))


def with_target(**changes):
    """Batches of one image with one object, some of whose target is changed."""
    image, target = picture(3, [2])
    return [([image], [target | changes])]


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"counts": COUNTS[:3]}, r"instance_counts: expected 4, one for each label 1 to 4, got \(3,\)"),
        ({"counts": (1, 2, 3, -4)}, "instance_counts: expected whole numbers of 0 or more"),
        ({"image_counts": (1, 2)}, "image_counts: expected 4, one for each label"),
        ({"validation": []}, "validation: expected one batch or more, got none"),
        ({"train": []}, "train: expected one batch or more, got none"),
        ({"validation": [([picture(1, [])[0]], [picture(1, [])[1]])]}, "validation: expected images with objects"),
        ({"validation": with_target(iscrowd=torch.tensor([1]))}, "validation: expected images with objects"),
        ({"train": [([picture(1, [])[0]], [picture(1, [])[1]])]}, "train: expected images with objects"),
        (
            {"validation": with_target(labels=torch.tensor([5]))},
            r"validation: batch 0: targets\[0\]\['labels'\]: .*, got 5",
        ),
        (
            {"train": with_target(labels=torch.tensor([0]))},
            r"train: batch 0: targets\[0\]\['labels'\]: expected 1 to 4",
        ),
        ({"train": with_target(labels=torch.tensor([1.0]))}, "expected whole numbers"),
        ({"train": with_target(labels=torch.tensor([1, 1]))}, r"\['boxes'\]: expected \[2, 4\]"),
        ({"train": with_target(boxes=torch.tensor([[5.0, 5, 5, 9]]))}, r"train: .*\['boxes'\]\[0\]: .* x1 < x2"),
        ({"validation": with_target(boxes=torch.tensor([[5.0, 5, 9, np.nan]]))}, r"\['boxes'\]\[0\]: expected finite"),
        ({"validation": with_target(boxes=None)}, r"targets\[0\]: expected a tensor boxes, got 'NoneType'"),
        ({"train": with_target(iscrowd=torch.tensor([0, 0]))}, r"\['iscrowd'\]: expected \[1\], got \(2,\)"),
        ({"train": [([torch.zeros(3, 9, 9, dtype=torch.uint8)], [{}])]}, r"images\[0\]: expected .* floating-point"),
        ({"train": [([torch.zeros(3, 9, 9)], [])]}, r"train: batch 0: expected images, .* got \(1, 0\)"),
        ({"train": [torch.zeros(3, 9, 9)]}, r"train: batch 0: expected \(images, targets\), got 'Tensor'"),
        ({"validation": with_target(), "folds": 2}, "folds: expected 2 to 1, the images of `validation`, got 2"),
        ({"folds": 21}, "folds: expected 2 to 20"),
        ({"metric": "AR"}, "metric: expected one of AP, AP1, .*, AP75, got 'AR'"),
        ({"metric": "AP_head", "counts": (1, 1, 1, 5000)}, "metric: .* objects in `validation`, as AP_head has none"),
        ({"boundaries": (10, 10)}, "boundaries: expected whole numbers, rising"),
        ({"boundaries": 3}, "boundaries: expected whole numbers, rising and above 0, got 3"),
        ({"seed": 2**45}, "seed: expected a whole number below"),
        ({"rows": {1: "softmax"}}, r"rows\[1\]: name: expected text, got 'int'"),
        ({"counts": {1: 2}}, r"instance_counts: expected one count per category, got \{1: 2\}"),
        ({"counts": "abc"}, "instance_counts: expected one count per category, got 'abc'"),
        ({"train": [([torch.full((3, 9, 9), np.nan)], [{}])]}, r"train: batch 0: images\[0\]: expected finite numbers"),
        ({"members": 0}, "members: expected a whole number of 1 or more, got 0"),
        ({"members": True}, "members: expected a whole number of 1 or more, got True"),
        ({"epochs": 0}, "epochs: expected a whole number of 1 or more, got 0"),
        ({"lr": 0}, "lr: expected a number above 0, got 0"),
        ({"rows": {}}, "rows: expected a mapping"),
        ({"rows": {"a": "sofmax"}}, r"rows\['a'\]: classifier: expected a classifier or one of .*, got 'sofmax'"),
        ({"rows": {"a": {"name": "seesaw", "r": 1}}}, r"rows\['a'\]: classifier seesaw: has no setting 'r', but p, q"),
        ({"rows": {"a": {"name": "seesaw", "p": -1}}}, r"rows\['a'\]: p: expected 0 or more"),
        ({"rows": {"a": lambda width: bags.Softmax(width, 9)}}, r"rows\['a'\]: classifier: has 9 categories"),
        ({"rows": {"a": lambda width: bags.NearestClassMean(width, width, 4)}}, "expected one that needs no fitting"),
        ({"rows": {"a": 3}}, r"rows\['a'\]: classifier: expected a name, a mapping .*, got 'int'"),
        ({"rows": {"a": bags.Softmax(24, 4)}}, r"rows\['a'\]: classifier: expected a name, .*, got 'Softmax'"),
        (
            {"rows": {"a": lambda width: nn.Linear(width, 5)}},
            "expected a function that makes a classifier, got 'Linear'",
        ),
        ({"rows": {"a": ("softmax", 0)}}, r"rows\['a'\]: times: expected"),
        ({"rows": {"a": ("softmax", 1, "adam")}}, r"rows\['a'\]: optimizer: expected 'sgd' or 'adamw', got 'adam'"),
        ({"rows": {"detector": "softmax"}}, r"rows\['detector'\]: name: expected another one"),
        ({"lr": 1e30, "rows": {"a": "softmax"}}, r"rows\['a'\]: its weights are not finite after epoch .: lower lr"),
        ({"detector": nn.Linear(2, 2)}, "detector: expected torchvision's Faster or Mask R-CNN, got Linear"),
        ({"detector": make().double()}, "detector: expected weights of torch.float32, got torch.float64"),
    ],
)
def test_what_cannot_be_used_is_named(settings, words):
    with pytest.raises(ValueError, match=words):
        choose(settings.pop("detector", None) or make(), **settings)


@pytest.mark.parametrize("name", ["train", "validation"])
def test_an_argument_that_is_no_iterable(name):
    arguments = {"train": train_batches(), "validation": validation_batches(), name: 3}
    with pytest.raises(ValueError, match=rf"{name}: expected an iterable of batches \(images, targets\), got 'int'"):
        bags.choose_classifier(make(), **arguments, instance_counts=COUNTS, **SETTINGS)


def test_the_example_of_the_page(capsys):
    """It runs as it stands, with the rows and settings that it does not name."""
    text = (ROOT / "docs/configuration.md").read_text()
    [example] = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "choose_classifier" in block]
    detector, stats = make(), bags.CategoryStats((1, 2, 3, 4), ("a", "b", "c", "d"), COUNTS, COUNTS)
    names = {"bags": bags, "detector": detector, "stats": stats}
    exec(example, names | {"train_loader": train_batches(), "validation_loader": validation_batches()[:2]})
    printed = capsys.readouterr().out
    assert all(f"\n{name}  " in printed for name in ("softmax_retrained x4 adamw", "bags_cosine", "norcal", "detector"))
    assert isinstance(detector.roi_heads.classifier, bags.ProposalClassifier)
