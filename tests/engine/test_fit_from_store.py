"""Classifiers that are fitted: from stored features as from images, in averages and on two ranks."""

import pytest
import torch
import yaml
from conftest import run_ranks
from test_features import CPU, EVERYTHING, prepared

import bags
from bags.assembly import stored
from bags.config.load import config_to_dict
from bags.data.statistics import CategoryStats
from bags.detectors.from_features import FromFeatures
from bags.engine.checkpoint import write_checkpoint
from bags.engine.optim import train_mode

ALL = [*EVERYTHING, "store.negatives=100000"]


@pytest.fixture
def rows(tmp_path, glyphs):
    """A folder of rows, of which `logn` is fitted to the detector of softmax.pth; everything is sampled."""
    config, detector, dataset = prepared(tmp_path, glyphs, *ALL)
    stats = CategoryStats.from_index(dataset.index)
    content = {"config": config_to_dict(config), "stats": stats.to_dict(), "model": detector.state_dict()}
    write_checkpoint(tmp_path / "softmax.pth", content)
    common = {
        "base": "_base.yaml",
        "detector": {
            "init_from": str(tmp_path / "softmax.pth"),
            "roi": {"batch_size": 100000, "positive_fraction": 1.0},
        },
        "store": {"negatives": 100000},
        "train": {"part": "none", "dead": "ignore"},
    }
    for name, classifier in {
        "logn": {"name": "logit_normalisation"},
        "norcal": {"name": "norcal"},
        "mean": {"name": "average", "of": ["row:logn", "row:norcal"]},
    }.items():
        (tmp_path / f"configs/{name}.yaml").write_text(yaml.safe_dump({**common, "classifier": classifier}))
    return tmp_path


def model(folder, row):
    """The tensors of a finished row."""
    return torch.load(folder / "tiny" / row / "last.pth", weights_only=True)["model"]


@pytest.mark.parametrize("framework", ["faster_rcnn", "cascade_rcnn"])
def test_stored_proposals_are_those_of_the_detector(tmp_path, glyphs, framework):
    """The same labels and features at each stage, in any order, without the pooled features."""
    config, detector, dataset = prepared(tmp_path, glyphs, *ALL, f"detector.framework={framework}")
    store = stored.training_store(config, detector, dataset, CPU)
    source = stored.TrainingFeatures(store, 0, 100000, 1.0, resident=False)
    half = FromFeatures(detector)
    train_mode(half)
    from_store = half.training_proposals(*stored.collate_samples([source[3, 0]]))
    train_mode(detector)
    image, target = dataset[3, 0]
    from_image = detector.training_proposals([image], [target])
    assert [part[0] for part in from_store] == [part[0] for part in from_image] == detector.classifiers()
    for (_, ours, labels), (_, theirs, expected) in zip(from_store, from_image, strict=True):
        assert ours.pooled.shape == (len(labels), 0) and labels.bincount().tolist() == expected.bincount().tolist()
        torch.testing.assert_close(ours.fc.sum(0), theirs.fc.sum(0), rtol=2e-3, atol=1e-2)


def test_fitted_rows_share_a_pass_over_the_store(rows):
    """Statistics from the store are those from the images; an average takes them as they are."""
    configs, keys = rows / "configs", [f"output={rows / 'runs'}"]
    config = bags.load_config(configs / "logn.yaml", keys)
    assert config.is_cached and config.shares_features
    bags.train(configs / "logn.yaml", keys)
    assert (rows / "softmax.features/train").is_dir()
    bags.train(configs / "logn.yaml", [f"output={rows / 'live'}", "train.features=live"])
    ours, live = model(rows / "runs", "logn"), model(rows / "live", "logn")
    for name in ("means", "deviations"):
        key = f"roi_heads.classifier.{name}"
        torch.testing.assert_close(ours[key], live[key], rtol=2e-3, atol=2e-3)
        assert ours[key][1:].std() > 0
    bags.train(configs / "norcal.yaml", keys)
    bags.train(configs / "mean.yaml", keys)
    mixed = model(rows / "runs", "mean")
    assert torch.equal(mixed["roi_heads.classifier.members.0.means"], ours["roi_heads.classifier.means"])


def test_two_ranks_fit_what_one_rank_fits_from_the_store(rows):
    """The same images in each batch, on one rank or on two; the order of the sums is all that differs."""
    bags.train(rows / "configs/logn.yaml", [f"output={rows / 'one'}"])
    for done in run_ranks(2, "train", rows / "configs/logn.yaml", f"output={rows / 'two'}"):
        assert done.returncode == 0, done.stderr
    one, two = model(rows / "one", "logn"), model(rows / "two", "logn")
    for name in ("means", "deviations"):
        torch.testing.assert_close(two[f"roi_heads.classifier.{name}"], one[f"roi_heads.classifier.{name}"])


def test_pooled_features_are_not_stored(rows):
    """Nearest class means may compare pooled features, so these rows are fitted to images, and not averaged."""
    keys = ["classifier={name: ncm}"]
    config = bags.load_config(rows / "configs/logn.yaml", keys)
    assert not config.is_cached and not config.shares_features
    assert not bags.load_config(rows / "configs/norcal.yaml").is_cached
    assert not bags.load_config(rows / "configs/logn.yaml", ["data.short_sides=[48, 64]"]).is_cached
