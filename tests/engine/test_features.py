"""Classifiers trained from stored features: the same as from images, whatever happens in between."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from conftest import killed_and_repeated, run_ranks, run_script, start_script, write_configs
from torchvision.transforms.v2 import functional as F

import bags
from bags.analysis.results import load_results
from bags.assembly import stored as cached
from bags.assembly.loaders import build_train_loader, build_val_dataset, open_index
from bags.assembly.models import build_detector
from bags.assembly.stored_samples import TrainingFeatures, collate_samples
from bags.config.load import override_config
from bags.config.sections import DetectorConfig, RoIConfig
from bags.core.errors import UserError
from bags.core.few_bits import decode, encode, row_bytes
from bags.data.statistics import CategoryStats
from bags.detectors.from_features import FromFeatures, proposals_to_store
from bags.engine.features import shards_of
from bags.engine.optim import set_trained_part, train_mode

CPU = torch.device("cpu")
EVERYTHING = ["detector.roi.batch_size=100000", "detector.roi.positive_fraction=1"]
RESIZED = ["data.flip=0.5", "detector.min_size=80", "detector.max_size=80"]  # of the images' 64
FRAMEWORKS = {
    "faster": [],
    "mask": ["detector.framework=mask_rcnn"],
    "cascade": ["detector.framework=cascade_rcnn"],
    "htc": ["detector.framework=htc"],
}


def copy_softmax(runs, target):
    """Copy the run that others start from, without its store of features."""
    ignore = shutil.ignore_patterns("*.features")
    shutil.copytree(runs / "tiny" / "softmax", target / "tiny" / "softmax", ignore=ignore)


def prepared(folder, glyphs, *overrides):
    """(config of `bags`, detector in whose folder its weights are, data) on tiny glyphs, with a softmax classifier."""
    configs = write_configs(folder / "configs", glyphs)
    keys = [f"output={folder / 'runs'}", "classifier={name: softmax}", *overrides]
    config = bags.load_config(configs / "softmax_retrained.yaml", keys)
    index = open_index(config, "train")
    torch.manual_seed(0)
    detector = build_detector(config, CategoryStats.from_index(index))
    with torch.no_grad():  # as large as trained ones: random features all look alike
        for stage in detector.roi_heads.box_stages:
            stage.classifier.linear.weight.normal_(0, 0.3)
            stage.box_regressor.weight.normal_(0, 0.05)
    set_trained_part(detector, "cls")
    dataset = build_train_loader(config, index, CategoryStats.from_index(index)).dataset
    return config, detector, dataset


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_losses_are_those_of_a_live_step(tmp_path, glyphs, framework, mirrored):
    """Where everything is sampled nothing is left to chance: fp16 features are all that differs."""
    overrides = [*EVERYTHING, *FRAMEWORKS[framework], "store.negatives=100000", f"data.flip={float(mirrored)}"]
    config, detector, dataset = prepared(tmp_path, glyphs, *overrides)
    store = cached.training_store(config, detector, dataset, CPU)
    stored = TrainingFeatures(store, config.data.flip, 100000, 1.0, resident=False)
    model = FromFeatures(detector)
    train_mode(model)
    for position in (0, 5):
        losses = model(*collate_samples([stored[position, 7]]))
        image, target = dataset[position, 7]
        train_mode(detector)
        expected = {k: v for k, v in detector([image], [target]).items() if "classifier" in k}
        assert losses.keys() == expected.keys() and len(losses) in (1, 3)
        for key, value in expected.items():
            torch.testing.assert_close(losses[key], value, rtol=2e-3, atol=1e-4)
        resident = FromFeatures(detector, store.whole(CPU)).train()
        numbers = TrainingFeatures(store, config.data.flip, 100000, 1.0, resident=True)
        assert resident(*collate_samples([numbers[position, 7]])) == losses


@pytest.mark.parametrize("kind, steps", [("uint8", 255), ("uint4", 15)])
def test_features_of_few_bits(kind, steps):
    """Against numbers worked by hand, and the bound of the error; zeros and constant rows are kept."""
    features = torch.tensor([[0.0, steps / 5, steps], [2.5, 2.5, 2.5], [-1.0, 0.2, 1.0]]).double()
    rows = encode(features, kind)
    assert rows.dtype == torch.uint8 and rows.shape == (3, row_bytes(kind, 3))
    numbers = {
        "uint8": [[0, 51, 255], [0, 0, 0], [0, 153, 255]],
        "uint4": [[0 + 16 * 3, 15], [0, 0], [0 + 16 * 9, 15]],
    }
    assert rows[:, 8:].tolist() == numbers[kind]
    assert rows[0, :8].tolist() == [0, 0, 0, 0, 0, 0, 0x80, 0x3F]  # 0.0 and 1.0, lowest byte first
    torch.testing.assert_close(decode(rows, kind, 3), features.float())
    torch.manual_seed(0)
    for features in (
        torch.randn(50, 2, 33).mul(100).relu().half(),
        torch.randn(4, 8),
        torch.randn(1, 5),
        torch.zeros(0, 5),
    ):
        width = features.shape[-1]
        rows, row = encode(features, kind), features.float()
        again = decode(rows, kind, width)
        assert again.shape == row.shape and again.dtype == torch.float32 and rows.shape[-1] == row_bytes(kind, width)
        spread = (row.amax(-1) - row.amin(-1))[..., None]
        assert ((again - row).abs() <= spread / (2 * steps) * 1.001).all() and torch.equal(
            again[row == 0], row[row == 0]
        )


@pytest.mark.parametrize("kind, steps", [("uint8", 255), ("uint4", 15)])
@pytest.mark.parametrize("framework", ["faster", "cascade"])
def test_a_store_of_few_bits(tmp_path, glyphs, framework, kind, steps):
    """A half or a quarter as large; losses differ by the rounding, on a GPU's copy as from disk; damage is found."""
    overrides = [*EVERYTHING, *FRAMEWORKS[framework], "store.negatives=100000"]
    config, detector, dataset = prepared(tmp_path, glyphs, *overrides)
    plain = cached.training_store(config, detector, dataset, CPU)
    config = override_config(config, [f"store.features={kind}"])
    with pytest.raises(UserError, match=rf"of other store.features \(float16, now {kind}\)"):
        cached.training_store(config, detector, dataset, CPU)
    changes = override_config(config, ["store.features=float16", "store.negatives=5", "detector.max_size=99"])
    with pytest.raises(
        UserError, match=r"other store.negatives \(100000, now 5\), detector.max_size \(\d+, now 99\): "
    ):
        cached.training_store(changes, detector, dataset, CPU)
    config = override_config(config, [f"store.folder={tmp_path / 'few'}"])
    store = cached.training_store(config, detector, dataset, CPU)
    width = plain.layout.width
    assert store.nbytes() * 2 * width == plain.nbytes() * row_bytes(kind, width)
    for position in range(len(dataset)):
        fc, rows = store[position, False]
        exact, same = plain[position, False]
        assert np.array_equal(rows, same) and fc.dtype == np.float32 and fc.shape == exact.shape
        spread = exact.max(-1, keepdims=True).astype(np.float32) - exact.min(-1, keepdims=True)
        assert (np.abs(fc - exact) <= spread / steps * 0.51 + 2e-3 * np.abs(exact)).all()
        assert np.array_equal(store.features((position, False), np.array([3, 0])), fc[[3, 0]])
    losses = {}
    for name, of in (("plain", plain), ("few", store)):
        stored = TrainingFeatures(of, 0.0, 100000, 1.0, resident=False)
        losses[name] = FromFeatures(detector).train()(*collate_samples([stored[5, 7]]))
    for key, value in losses["plain"].items():
        torch.testing.assert_close(losses["few"][key], value, rtol=2.5 / steps, atol=1e-3)
    numbers = TrainingFeatures(store, 0.0, 100000, 1.0, resident=True)
    resident = FromFeatures(detector, store.whole(CPU)).train()
    assert resident(*collate_samples([numbers[5, 7]])) == losses["few"]


def test_stored_objects(tmp_path, glyphs):
    """Features in each object's own box, with its own label, even if two objects have the same box."""
    data = shutil.copytree(glyphs, tmp_path / "data")
    content = json.loads((data / "train.json").read_text())
    first = content["annotations"][0]
    other = next(c["id"] for c in content["categories"] if c["id"] != first["category_id"])
    content["annotations"].insert(1, first | {"id": 10**6, "category_id": other})
    (data / "train.json").write_text(json.dumps(content))
    config, detector, dataset = prepared(tmp_path, data, "data.flip=0.5")
    folder = cached.store_folder(config)
    assert cached.stored_objects(config, detector, dataset, folder) is None  # nothing is made
    cached.training_store(config, detector, dataset, CPU)
    features, labels, annotations = cached.stored_objects(config, detector, dataset, folder)
    index = dataset.index
    assert sorted(index.annotation_ids[annotations]) == sorted(a["id"] for a in content["annotations"])
    assert labels.tolist() == index.labels[annotations].tolist() and features.dtype == torch.float16
    position = int(index.owners[annotations[0]])
    image, _ = dataset.read(position)
    mine = index.owners[annotations] == position
    boxes = torch.from_numpy(index.boxes[annotations[mine]])
    with torch.inference_mode():
        batch, targets = detector.transform([F.to_dtype(F.to_image(image), scale=True)], [{"boxes": boxes}])
        maps = detector.backbone(batch.tensors)
        stage = detector.roi_heads.box_stages[0]
        expected = stage.box_features(maps, [targets[0]["boxes"]], batch.image_sizes).fc
    torch.testing.assert_close(features[torch.from_numpy(mine)].float(), expected, rtol=1e-3, atol=1e-3)


def test_what_is_drawn_is_what_a_live_step_draws(tmp_path, glyphs):
    """Per image batch_size proposals, at most a share of them foreground, other ones with each seed; no more."""
    config, detector, dataset = prepared(tmp_path, glyphs, "store.negatives=12", "data.flip=0.5")
    store = cached.training_store(config, detector, dataset, CPU)
    assert len(store.places) == len(dataset) and (store.places >= 0).all()  # both views of all images
    for position in range(len(dataset)):
        _, rows = store[position, False]
        assert rows["is_object"].sum() == len(dataset[position, 0][1]["labels"])
        assert (rows["label"][rows["is_object"]] > 0).all() and (rows["overlap"][rows["is_object"]] == 1).all()
        background = (rows["label"][:, 0] == 0) & ~rows["is_object"]
        assert background.sum() <= 12 and (rows["overlap"][:, 0][background] < 0.5).all()
    items = TrainingFeatures(store, 0.5, 8, 0.5, resident=False)
    drawn = [items[3, seed] for seed in range(40)]
    assert all(1 <= (labels[0] > 0).sum() <= 4 and len(labels[0]) <= 8 for _, labels in drawn)
    assert len({features[0].numpy().tobytes() for features, _ in drawn}) > 30
    again = items[3, 11]
    assert torch.equal(again[0][0], drawn[11][0][0]) and torch.equal(again[1][0], drawn[11][1][0])
    mirrored = [features[0] for features, _ in drawn]
    plain = {row.tobytes() for row in np.array(store[3, False][0][:, 0])}
    views = [all(row.numpy().tobytes() in plain for row in own) for own in mirrored]
    flips = []
    for seed in range(40):  # as the live loader's flip of the same seed
        flips.append(not torch.equal(dataset[3, seed][1]["boxes"], dataset.target(3)["boxes"]))
    assert views == [not flip for flip in flips] and 5 < sum(flips) < 35


def test_hard_negatives_are_those_of_the_highest_objectness(tmp_path, glyphs):
    """All foreground stays; the message of a stale store names the setting, turned on or off."""
    config, detector, dataset = prepared(tmp_path, glyphs, "store.negatives=100000", "data.flip=0.5")
    whole = cached.training_store(config, detector, dataset, CPU)
    hard = [f"store.folder={tmp_path / 'hard'}", "store.negatives=5", "store.hard_negatives=true"]
    store = cached.training_store(override_config(config, hard), detector, dataset, CPU)
    for position, mirrored in itertools.product(range(len(dataset)), (False, True)):
        rows, kept = whole.rows((position, mirrored)), store.rows((position, mirrored))
        others = [(of["label"][:, 0] == 0) & ~of["is_object"] for of in (rows, kept)]
        scores = np.sort(rows["score"][others[0]])[::-1]
        assert np.array_equal(np.sort(kept["score"][others[1]])[::-1], scores[:5]) and len(scores) > 5
        assert np.array_equal(rows[~others[0]], kept[~others[1]])
    on = override_config(config, ["store.hard_negatives=true"])
    off = override_config(config, [*hard[:2], "store.hard_negatives=false"])
    for stale, words in ((on, r"\(False, now True\)"), (off, r"\(True, now False\)")):
        with pytest.raises(UserError, match=f"of other store.hard_negatives {words}"):
            cached.training_store(stale, detector, dataset, CPU)


def test_released_conventions_mirror_what_is_resized(tmp_path, glyphs, monkeypatch):
    """In their coordinates mirroring before or after resizing is not the same."""
    settings = ["detector.conventions=released", "data.flip=0.5", "detector.min_size=100", "detector.max_size=100"]
    config, detector, dataset = prepared(tmp_path, glyphs, *settings)
    shown = []
    plain = cached.training_pool

    def watched(detector, images, targets, *given):
        shown.append((detector.transform.flip, detector.transform(images, targets)))
        return plain(detector, images, targets, *given)

    monkeypatch.setattr(cached, "training_pool", watched)
    cached.training_store(config, detector, dataset, CPU)
    transform = detector.transform
    assert transform.flip == 0.5 and not transform.training
    image, target = dataset[0, 0]
    transform.flip, transform.training = 1.0, True
    images, targets = transform([image], [target])
    found = [resized for chance, resized in shown if chance == 1.0][1]  # the first was looked at for the size
    torch.testing.assert_close(found[0].tensors[:1], images.tensors, rtol=0, atol=0)
    torch.testing.assert_close(found[1][0]["boxes"], targets[0]["boxes"], rtol=0, atol=0)


@pytest.mark.parametrize("framework", ["faster", "cascade"])
def test_detections_from_stored_features(tmp_path, glyphs, framework):
    config, detector, _ = prepared(tmp_path, glyphs, *FRAMEWORKS[framework])
    dataset = build_val_dataset(config)
    loader = cached.validation_loader(config, detector, dataset, CPU)
    model, count = FromFeatures(detector).eval(), 0
    detector.eval()
    loader.batch_sampler.start(0)
    for batch, targets in loader:
        for found, target in zip(model(batch), targets, strict=True):
            position = dataset.index.image_ids.tolist().index(target["image_id"])
            image, live_target = dataset[position]
            [expected] = detector([image])
            assert torch.equal(target["boxes"], live_target["boxes"])
            assert torch.equal(found["labels"], expected["labels"]) and len(found["labels"])
            torch.testing.assert_close(found["boxes"], expected["boxes"], rtol=0, atol=1e-3)
            torch.testing.assert_close(found["scores"], expected["scores"], rtol=1e-5, atol=1e-7)
            count += 1
    assert count == len(dataset)


def test_one_image_seen_alone_or_with_others(tmp_path, glyphs):
    _, detector, dataset = prepared(tmp_path, glyphs)
    images = [dataset[position, 0][0] for position in range(3)]
    together, alone = (
        proposals_to_store(detector.eval(), images),
        [proposals_to_store(detector, [image])[0] for image in images],
    )
    for a, b in zip(together, alone, strict=True):
        assert a.size == b.size and a.original == b.original and len(a.boxes) == len(b.boxes)
        torch.testing.assert_close(a.fc, b.fc, rtol=1e-4, atol=1e-5)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("images", [3, 20])
def test_an_extraction_that_was_killed_goes_on(tmp_path, glyphs, monkeypatch, images):
    """In the first shard, in the second one."""
    config, detector, dataset = prepared(tmp_path, glyphs, "data.flip=0.5", "test.batch_size=2")
    whole = files(cached.training_store(config, detector, dataset, CPU).folder)
    assert len(shards_of(len(dataset))) == 2 and len(whole) == 1 + 2 * 4
    shutil.rmtree(config.init_file.with_suffix(".features"))
    plain, seen_images = cached.training_pool, []

    def dies(detector, shown, *given):
        seen_images.extend(shown)
        if len(seen_images) > 2 + 2 * images:  # both views; one image was looked at for the expected size
            raise KeyboardInterrupt
        return plain(detector, shown, *given)

    monkeypatch.setattr(cached, "training_pool", dies)
    with pytest.raises(KeyboardInterrupt):
        cached.training_store(config, detector, dataset, CPU)
    folder = config.init_file.with_suffix(".features") / "train"
    assert [path.name for path in folder.glob("*.sums")] == (["0.sums"] if images > 16 else [])
    monkeypatch.setattr(cached, "training_pool", plain)
    assert files(cached.training_store(config, detector, dataset, CPU).folder) == whole


def test_another_store_is_refused_and_says_why(tmp_path, glyphs):
    config, detector, dataset = prepared(tmp_path, glyphs)
    folder = cached.training_store(config, detector, dataset, CPU).folder
    before = files(folder)
    for override, reason in (
        ("detector.rpn.train_proposals=30", r"detector.rpn.train_proposals \(\d+, now 30\)"),
        ("store.negatives=3", r"store.negatives \(1024, now 3\)"),
    ):
        other = bags.load_config(tmp_path / "configs/bags.yaml", [f"output={tmp_path / 'runs'}", override])
        with pytest.raises(UserError, match=rf"other {reason}: remove the folder"):
            cached.training_store(other, detector, dataset, CPU)
    with torch.no_grad():
        detector.roi_heads.classifier.linear.weight.zero_()  # trained from the store, not in it
        assert cached.training_store(config, detector, dataset, CPU).images == len(dataset)
        weight = detector.roi_heads.box_head.fc6.weight
        kept = weight[0, 0].clone()
        weight[0, 0] += 1
    with pytest.raises(UserError, match="other weights: remove"):
        cached.training_store(config, detector, dataset, CPU)
    weight.data[0, 0] = kept
    dataset.index.labels[0] += 1
    with pytest.raises(UserError, match="other annotations: remove"):
        cached.training_store(config, detector, dataset, CPU)
    dataset.index.labels[0] -= 1
    dataset.exif = True
    with pytest.raises(UserError, match="other images: remove"):
        cached.training_store(config, detector, dataset, CPU)
    dataset.exif = False
    names = dataset.index.name_bytes.copy()
    dataset.index.name_bytes[:] = np.roll(names.reshape(len(dataset), -1), 1, axis=0).ravel()  # equally long
    with pytest.raises(UserError, match="other annotations"):
        cached.training_store(config, detector, dataset, CPU)
    dataset.index.name_bytes[:] = names
    image = dataset.folder / dataset.index.file_name(0)
    bytes_before = image.read_bytes()
    try:
        image.write_bytes(bytes_before + b"more")
        with pytest.raises(UserError, match="other images: remove"):
            cached.training_store(config, detector, dataset, CPU)
    finally:
        image.write_bytes(bytes_before)
    assert files(folder) == before
    (folder / "0.fc").write_bytes(before["0.fc"][:-5])
    with pytest.raises(UserError, match=r"0.fc: damaged \(its checksum differs\): remove .*train/0\.\* and repeat"):
        cached.training_store(config, detector, dataset, CPU)
    for path in folder.glob("0.*"):
        path.unlink()
    assert files(cached.training_store(config, detector, dataset, CPU).folder) == before
    (folder / "store.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read: remove the folder"):
        cached.training_store(config, detector, dataset, CPU)


def test_what_does_not_fit_is_not_begun(tmp_path, glyphs, monkeypatch, capsys):
    config, detector, dataset = prepared(tmp_path, glyphs)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match="do not fit .*store.folder to another disk"):
        cached.training_store(config, detector, dataset, CPU)
    assert f"for each of {len(dataset)} images" in capsys.readouterr().err
    assert [path.name for path in (config.init_file.with_suffix(".features") / "train").iterdir()] == ["store.json"]


def test_sizes_are_printed_as_they_are(tmp_path, glyphs, capsys):
    """Images of equal size and few proposals: the estimate from eight images is close."""
    config, detector, dataset = prepared(tmp_path, glyphs)
    store = cached.training_store(config, detector, dataset, CPU)
    told = float(capsys.readouterr().err.split("about ")[1].split(" MB")[0])
    measured = sum(path.stat().st_size for path in store.folder.glob("*.[fr]*")) / len(dataset) / 1e6
    assert told == pytest.approx(measured, abs=0.006)


def test_a_feature_too_large_for_fp16_is_refused(tmp_path, glyphs):
    config, detector, dataset = prepared(tmp_path, glyphs)
    detector.roi_heads.box_head.fc7.weight.data.fill_(1e5)
    with pytest.raises(UserError, match="not a finite number in float16: train.features=live"):
        cached.training_store(config, detector, dataset, CPU)


def test_what_cannot_be_stored_is_said(tmp_path, glyphs):
    configs = write_configs(tmp_path / "configs", glyphs)
    sizes = "data.short_sides=[48,64]"
    with pytest.raises(UserError, match="train.features.*live.*short_sides"):
        bags.load_config(configs / "bags.yaml", [sizes, "train.features=cached"])
    with pytest.raises(UserError, match="train.part.*cls"):
        bags.load_config(configs / "softmax.yaml", ["train.features=cached"])
    assert not bags.load_config(configs / "bags.yaml", [sizes]).is_cached
    assert bags.load_config(configs / "bags.yaml").is_cached
    assert not bags.load_config(configs / "bags.yaml", ["train.features=live"]).is_cached
    assert not bags.load_config(configs / "softmax.yaml").is_cached


def weights(run):
    return torch.load(run / "last.pth", weights_only=True)["model"]


@pytest.fixture(scope="module")
def swept(job, tmp_path_factory):
    """Both retrained rows of the job in one pass, from a store of their own, with both flips."""
    configs, runs, _ = job
    folder = tmp_path_factory.mktemp("swept")
    for name in ("last.pth", "config.yaml", "metrics.json", "predictions.json"):
        (folder / "tiny" / "softmax").mkdir(parents=True, exist_ok=True)
        shutil.copy(runs / "tiny" / "softmax" / name, folder / "tiny" / "softmax")
    rows = [configs / "bags.yaml", configs / "softmax_retrained.yaml"]
    done = run_script("train", *rows, f"output={folder}", *RESIZED)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("train: features") + done.stderr.count("MB for each of") >= 1
    return configs, folder


def test_two_runs_at_one_store_take_turns(swept, tmp_path):
    configs, folder = swept
    copy_softmax(folder, tmp_path)
    rows = ("bags", "softmax_retrained")
    both = [start_script("train", configs / f"{row}.yaml", f"output={tmp_path}", *RESIZED) for row in rows]
    for row, process in zip(rows, both, strict=True):
        done = process.wait()
        assert done.returncode == 0, done.stderr
        own, together = weights(tmp_path / "tiny" / row), weights(folder / "tiny" / row)
        assert all(torch.equal(own[key], together[key]) for key in own)


def test_a_removed_store_is_not_made_again_only_to_evaluate(swept, tmp_path):
    configs, folder = swept
    shutil.copytree(folder / "tiny", tmp_path / "tiny", ignore=shutil.ignore_patterns("*.features"))
    (tmp_path / "tiny" / "bags" / "metrics.json").unlink()
    done = run_script("train", configs / "bags.yaml", f"output={tmp_path}", *RESIZED)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "tiny" / "softmax" / "last.features").exists()
    again, before = (json.loads((f / "tiny" / "bags" / "metrics.json").read_text()) for f in (tmp_path, folder))
    assert again == before


def test_a_live_run_ends_where_a_stored_one_does(swept, tmp_path):
    """Where every proposal is drawn and none is mirrored, fp16 features are all that differs."""
    configs, folder = swept
    copy_softmax(folder, tmp_path)
    ends = {}
    for features in ("cached", "live"):
        settings = [*EVERYTHING, "store.negatives=100000", f"train.features={features}", f"name={features}"]
        done = run_script("train", configs / "softmax_retrained.yaml", f"output={tmp_path}", *settings)
        assert done.returncode == 0, done.stderr
        ends[features] = weights(tmp_path / "tiny" / features)
    start = weights(tmp_path / "tiny" / "softmax")
    key = "roi_heads.classifier.linear.weight"
    assert (ends["live"][key] - start[key]).abs().max() > 0.02  # it was trained
    for name, value in ends["live"].items():
        torch.testing.assert_close(ends["cached"][name], value, rtol=1e-2, atol=1e-4)


def test_loce_warms_up_with_one_epoch_of_proposals(swept, tmp_path):
    """Where every proposal is drawn, memory then holds twice as many after an epoch. A resumed run fills no more."""
    configs, folder = swept
    copy_softmax(folder, tmp_path)
    stored = {}
    for warm_up in ("false", "true"):
        keys = [
            "classifier.name=loce",
            "classifier.queue=5000",
            f"classifier.warm_up={warm_up}",
            f"name=warm_{warm_up}",
        ]
        keys += [*EVERYTHING, "store.negatives=10", "train.epochs=1", "train.milestones=[]"]
        command = ("train", configs / "softmax_retrained.yaml", f"output={tmp_path}", *keys)
        run = tmp_path / "tiny" / f"warm_{warm_up}"
        places = {"after": run / "previous.pth", "unfinished": run / "metrics.json"}
        killed_and_repeated(*command, "train.checkpoint_every=1", **places)
        stored[warm_up] = weights(run)["roi_heads.classifier.stored"]
    assert stored["false"].any() and torch.equal(stored["true"], 2 * stored["false"])


def test_a_job_that_needs_two_stores_in_one_place_is_not_begun(swept, tmp_path):
    configs, folder = swept
    over = ["--over", "store.negatives", "5", "6", f"detector.init_from={folder}/tiny/softmax/last.pth"]
    done = run_script("sweep", configs / "bags.yaml", f"output={tmp_path}", over[-1], *over[:-1])
    assert done.returncode == 2 and "needs another store of features than bags,negatives=5" in done.stderr
    assert not list(tmp_path.iterdir())
    over = ["--over", "detector.init_from", f"{folder}/tiny/softmax/last.pth", "row:nothing"]
    done = run_script("sweep", configs / "bags.yaml", f"output={tmp_path}", *over)
    assert done.returncode == 2 and "run the row nothing first" in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_one_pass_for_several_rows_gives_each_its_own_result(swept, tmp_path):
    configs, folder = swept
    for row in ("bags", "softmax_retrained"):
        copy_softmax(folder, tmp_path / row)
        done = run_script("train", configs / f"{row}.yaml", f"output={tmp_path / row}", *RESIZED)
        assert done.returncode == 0, done.stderr
        alone, together = weights(tmp_path / row / "tiny" / row), weights(folder / "tiny" / row)
        assert all(torch.equal(alone[key], together[key]) for key in alone)
        numbers = [json.loads((f / "tiny" / row / "metrics.json").read_text()) for f in (tmp_path / row, folder)]
        assert numbers[0] == pytest.approx(numbers[1], abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("after", ["softmax/last.features/train/0.fc", "bags/log.jsonl", "softmax_retrained/last.pth"])
@pytest.mark.slow
def test_killed_anywhere_the_weights_are_the_same(swept, tmp_path, after):
    configs, folder = swept
    copy_softmax(folder, tmp_path)
    rows = [configs / "bags.yaml", configs / "softmax_retrained.yaml"]
    places = {"after": tmp_path / "tiny" / after, "unfinished": tmp_path / "tiny/softmax_retrained/metrics.json"}
    killed_and_repeated("train", *rows, f"output={tmp_path}", *RESIZED, **places)
    for row in ("bags", "softmax_retrained"):
        resumed, undisturbed = weights(tmp_path / "tiny" / row), weights(folder / "tiny" / row)
        assert all(torch.equal(resumed[key], undisturbed[key]) for key in resumed)


@pytest.mark.slow
def test_two_ranks_make_the_same_store(swept, tmp_path):
    configs, folder = swept
    copy_softmax(folder, tmp_path)
    for done in run_ranks(2, "train", configs / "bags.yaml", f"output={tmp_path}", *RESIZED):
        assert done.returncode == 0, done.stderr
    one, two = (files(f / "tiny" / "softmax" / "last.features" / "train") for f in (folder, tmp_path))
    assert one == two
    alone, shared = weights(folder / "tiny" / "bags"), weights(tmp_path / "tiny" / "bags")
    assert alone.keys() == shared.keys()
    moved = [key for key in alone if not torch.equal(alone[key], shared[key])]
    assert all("classifier." in key for key in moved)  # each rank draws and sums on its own
    for key in moved:
        torch.testing.assert_close(shared[key], alone[key], rtol=0, atol=0.1)


@pytest.mark.slow
def test_a_sweep_of_scores_runs_the_detector_once(job, tmp_path):
    """Calibration of a trained detector: NorCal with gamma 0 is the detector itself; its limits are test's."""
    configs, runs, _ = job
    shutil.copytree(configs, tmp_path / "configs")
    copy_softmax(runs, tmp_path / "runs")
    row = {
        "base": "softmax.yaml",
        "detector": {"init_from": "row:softmax"},
        "classifier": {"name": "norcal"},
        "train": {"part": "none"},
    }
    (tmp_path / "configs" / "norcal.yaml").write_text(yaml.safe_dump(row))
    over = ["--over", "classifier.gamma", "0", "0.5", "--over", "test.max_detections", "1", "30"]
    kept = tmp_path / "kept.json"
    done = run_script("sweep", tmp_path / "configs/norcal.yaml", f"output={tmp_path / 'runs'}", *over, "--save", kept)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("MB for each of") == 1 and "highest AP: norcal,gamma=" in done.stdout
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| norcal")]
    assert rows == [f"norcal,gamma={g},max_detections={m}" for g in ("0", "0.5") for m in (1, 30)]
    own = json.loads((tmp_path / "runs/tiny/softmax/metrics.json").read_text())
    found = {row: json.loads((tmp_path / "runs/tiny" / row / "metrics.json").read_text()) for row in rows}
    content = load_results(kept)
    assert content["command"].startswith("python scripts/sweep.py") and "--save" not in content["command"]
    assert [run[0]["AP"] for run in content["rows"].values()] == pytest.approx(
        [n["AP"] for n in found.values()], abs=1e-5
    )
    assert found["norcal,gamma=0,max_detections=30"] == pytest.approx(own, abs=1e-6, nan_ok=True)
    live = run_script("train", tmp_path / "configs/norcal.yaml", f"output={tmp_path / 'runs'}", "classifier.gamma=0.5")
    assert live.returncode == 0, live.stderr
    alone = json.loads((tmp_path / "runs/tiny/norcal/metrics.json").read_text())
    assert found["norcal,gamma=0.5,max_detections=30"] == pytest.approx(alone, abs=1e-6, nan_ok=True)
    for row in rows:
        entries = json.loads((tmp_path / "runs/tiny" / row / "predictions.json").read_text())
        number = np.bincount([entry["image_id"] for entry in entries]).max()
        assert number == 1 if row.endswith("=1") else 1 < number <= 30


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--over", "classifier.others_ratio"], "expected a key and its values"),
        (["--over", "classifier.others_ratio=2", "3"], "expected a key and its values"),
        (["--over", "classifier.others_ratio", "2", "2"], "a value is there twice"),
        (["--over", "classifier.others_ratio", "2", "n", "2.0"], "=2 and bags,others_ratio=2.0 have equal settings"),
        (["--over", "classifier.others_ratio", "2", "seed=3"], "seed=3: put CONFIG and section.key=value before"),
        (["--over", "name", "a", "b"], "--over name: cannot be swept: rows are named by"),
        (["--over", "output", "a", "b"], "--over output: cannot be swept"),
        (["--over", "seed", "0", "1", "--seeds", "3,4"], "--over seed: cannot be swept: --seeds gives it"),
        (["--over", "classifier.other_ratio", "2"], "did you mean classifier.others_ratio"),
        (["--over", "classifier.others_ratio", "2", "--best", "mAP"], "--best mAP: expected a column of the table"),
        (
            ["--over", "classifier.others_ratio", "2", "--best", "AP9"],
            "--best AP9: expected a bin of test.bins, 1 to",
        ),
        (
            ["--over", "classifier.others_ratio", "2", "--best", "mask_AP"],
            "--best mask_AP: no row has masks: expected",
        ),
        (["--over", "classifier.others_ratio", "2", "--save", "."], "--save .: is a folder: expected a file"),
        (["--over", "train.lr", "1", "--over", "train.lr", "2"], "--over train.lr: is given twice: put all its values"),
        (["--over", "test.bins", "[5]", "[9]"], "--over test.bins: cannot be swept: a column such as AP1 would mix"),
    ],
)
def test_mistakes_in_a_sweep(swept, arguments, message):
    configs, folder = swept
    done = run_script("sweep", configs / "bags.yaml", f"output={folder}", "data.flip=0.5", *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_sweep_whose_configuration_comes_last():
    done = run_script("sweep", "--over", "classifier.others_ratio", "2", "8", "configs/glyphs-100/bags")
    assert done.returncode == 2 and "no configuration: put CONFIG and section.key=value before --over" in done.stderr


def test_what_a_store_depends_on_has_not_changed():
    """Stores of earlier versions stay in use: a new key of the box branch needs a reason, one of the masks is none."""
    settings = cached._detector_settings(DetectorConfig())
    assert set(settings["roi"]) == {"sampling_ratio", "fc", "class_agnostic"}
    assert settings == cached._detector_settings(
        DetectorConfig(roi=RoIConfig(class_agnostic_masks=True, normed_masks=True))
    )
