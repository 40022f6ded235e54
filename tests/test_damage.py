"""Damaged and hostile files of weights: each is refused in one line, and takes neither time nor memory."""

import io
import json
import pickle
import resource
import shutil
import zipfile

import numpy as np
import pytest
import torch
from conftest import fork_script, run_script

import bags
from bags.detectors.weights import read_state
from bags.engine.checkpoint import load_checkpoint, load_latest, save_checkpoint, write_checkpoint, write_file
from bags.engine.features import FeatureStore, Layout, View, pool_row
from bags.errors import UserError


@pytest.fixture
def content(job):
    """What the checkpoint of a trained row holds."""
    return torch.load(job[1] / "tiny/bags/last.pth", weights_only=True)


def weight(content):
    """The name of a weight."""
    return next(name for name, value in content["model"].items() if value.is_floating_point() and value.dim() == 2)


def test_weights_that_are_not_finite_are_refused_everywhere(job, content, tmp_path, glyphs):
    configs, runs, _ = job
    for number, kind in enumerate((float("nan"), float("inf"), float("-inf"))):
        name = weight(content)
        content["model"][name][0, 0] = kind
        write_checkpoint(tmp_path / f"{number}.pth", content)
        with pytest.raises(UserError, match=f"{number}.pth: {name}: holds numbers that are not finite"):
            bags.load_detector(tmp_path / f"{number}.pth")
    bad = tmp_path / "0.pth"
    commands = {
        "evaluate": ["evaluate", bad],
        "predict": ["predict", bad, glyphs / "val", "--output", tmp_path / "out"],
        "train": ["train", configs / "bags.yaml", f"output={tmp_path}/runs", f"detector.init_from={bad}"],
    }
    for name, command in commands.items():
        done = fork_script(*command)
        assert done.returncode == 2 and "not finite" in done.stderr and "Traceback" not in done.stderr, (name, done)


def test_weights_that_are_not_finite_are_not_written(content, tmp_path):
    """Training that diverges in its last step keeps the checkpoint from before."""
    save_checkpoint(tmp_path / "last.pth", content)
    before = (tmp_path / "last.pth").read_bytes()
    content["model"][weight(content)][0, 0] = float("nan")
    with pytest.raises(UserError, match="last.pth: not written, since training has made .* NaN: lower train.lr"):
        save_checkpoint(tmp_path / "last.pth", content)
    assert [path.name for path in tmp_path.iterdir()] == ["last.pth"]
    assert (tmp_path / "last.pth").read_bytes() == before


def changed(content, change):
    """A copy of a checkpoint's content after a change."""
    copy = {key: dict(value) if isinstance(value, dict) else value for key, value in content.items()}
    copy["config"] = json.loads(json.dumps(copy["config"]))
    change(copy)
    return copy


def put(section, key, value):
    """A change that sets one value."""
    return lambda content: content[section].__setitem__(key, value)


def in_detector(key, value, inner=None):
    def change(content):
        section = content["config"]["detector"]
        (section[inner] if inner else section)[key] = value

    return change


HOSTILE = {
    "expanded": (put("model", "x", torch.zeros(1).expand(10**12)), "claims the shape .*more than the file holds"),
    "meta": (put("model", "x", torch.zeros(10**6, device="meta")), "expected a dense tensor"),
    "sparse": (put("model", "x", torch.eye(3).to_sparse()), "expected a dense tensor"),
    "complex": (put("model", "x", torch.zeros(2, dtype=torch.complex64)), "expected whole or floating-point numbers"),
    "no tensor": (put("model", "x", 3), "expected tensors by name, got int"),
    "no name": (put("model", 7, torch.zeros(1)), "expected tensors by name"),
    "count of text": (put("stats", "instance_counts", ["many"] * 8), "stats.instance_counts: expected whole numbers"),
    "count below 0": (put("stats", "image_counts", [-1] * 8), "stats.image_counts: expected whole numbers"),
    "count of float": (put("stats", "instance_counts", [1.5] * 8), "stats.instance_counts: expected whole numbers"),
    "true as id": (put("stats", "category_ids", [True] * 8), "stats.category_ids: expected whole numbers"),
    "name of number": (put("stats", "names", [1] * 8), "stats.names: expected texts"),
    "unequal": (put("stats", "names", ["a"]), "differ in number"),
    "odd keys": (put("stats", 5, [1]), "stats: not as"),
    "iteration": (lambda content: content.update(iteration=-3), "iteration: expected a whole number"),
    "fc": (in_detector("fc", 16384, "roi"), "do not fit its own configuration .they are far too few"),
    "absurd fc": (in_detector("fc", 131071, "roi"), "detector.roi.fc: expected 1 to 16384"),
    "channels": (in_detector("fpn_channels", 32767), "detector.fpn_channels: expected 1 to 4096"),
    "config of numbers": (put("config", 3, 4), "unknown key"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_checkpoints(content, tmp_path, case):
    change, words = HOSTILE[case]
    write_checkpoint(tmp_path / "bad.pth", changed(content, change))
    with pytest.raises(UserError, match=f"bad.pth.*{words}") as error:
        bags.load_detector(tmp_path / "bad.pth")
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_nested_configuration_is_one_line(content, tmp_path):
    tree = {}
    for _ in range(200):
        tree = {"data": tree}
    write_checkpoint(tmp_path / "deep.pth", {**content, "config": tree})
    with pytest.raises(UserError, match="deep.pth"):
        bags.load_detector(tmp_path / "deep.pth")


@pytest.mark.parametrize("read", [load_checkpoint, read_state])
def test_a_zip_bomb_is_refused_by_its_directory(tmp_path, read):
    """Compressed members, and members that share their bytes: refused before anything is unpacked."""
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/data/0", bytes(2**28))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="bomb.pth: not a file of torch's: 'archive/data.pkl' in it is compressed"):
        read(tmp_path / "bomb.pth")
    torch.save({"a": torch.zeros(1000)}, tmp_path / "shared.pth")
    with zipfile.ZipFile(tmp_path / "shared.pth", "a") as archive:
        archive.infolist()[-1].file_size = 10**12  # written to the directory on closing
        archive.writestr("archive/more", b"x")
    with pytest.raises(UserError, match="shared.pth: not a file of torch's: it declares 1000000\\d+ bytes"):
        read(tmp_path / "shared.pth")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB


def test_five_million_categories(job, tmp_path, glyphs, content):
    """Refused by an estimate, before memory is taken."""
    from bags.build import build_detector
    from bags.data.statistics import CategoryStats

    number = 5_000_000
    stats = CategoryStats(tuple(range(number)), ("x",) * number, (1,) * number, (1,) * number)
    config = bags.load_config(job[0] / "softmax.yaml", ["detector.roi.fc=1024", "detector.roi.class_agnostic=false"])
    with pytest.raises(UserError, match="the box head takes .* GB .* and 5000000 categories; this machine has"):
        build_detector(config, stats)


def test_an_optimiser_of_another_model(job, content, tmp_path):
    configs, runs, _ = job
    shutil.copytree(runs / "tiny/softmax", tmp_path / "tiny/softmax")
    last = tmp_path / "tiny/softmax/last.pth"
    saved = torch.load(last, weights_only=True)
    write_checkpoint(last, {**saved, "iteration": 3, "optimizer": {"param_groups": 3}})
    (last.parent / "metrics.json").unlink()
    done = run_script("train", configs / "softmax.yaml", f"output={tmp_path}")
    assert done.returncode == 2 and "its checkpoint does not fit this run" in done.stderr, done.stderr


def test_a_full_disk_is_called_full(tmp_path, monkeypatch):
    def save(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:626] . unexpected pos 20736 vs 20632")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(UserError, match="x.pth: cannot be written .the disk or a quota is full; \\d+ MB are free"):
        write_file(tmp_path / "x.pth", {})
    assert not list(tmp_path.iterdir())


def test_a_damaged_last_checkpoint_with_nan_is_not_resumed(content, tmp_path, capsys):
    """An older version wrote such files: the one before it is used."""
    save_checkpoint(tmp_path / "last.pth", {**content, "iteration": 1})
    save_checkpoint(tmp_path / "last.pth", {**content, "iteration": 2})
    content["model"][weight(content)][0, 0] = float("nan")
    write_checkpoint(tmp_path / "last.pth", {**content, "iteration": 3})
    assert load_latest(tmp_path)["iteration"] == 1
    assert "not finite" in capsys.readouterr().err


def test_names_of_weights_must_be_text(tmp_path):
    file = io.BytesIO()
    torch.save({3: torch.zeros(1)}, file)
    (tmp_path / "w.pth").write_bytes(file.getvalue())
    with pytest.raises(UserError, match="w.pth: expected tensors by name, got Tensor for 3"):
        read_state(tmp_path / "w.pth")


# --------------------------------------------------------------------------- stored features


@pytest.fixture
def stored(job, tmp_path):
    """A finished job whose row `bags` is to be trained again from a store: (configs, runs, folder of the store)."""
    configs, runs, _ = job
    shutil.copytree(runs / "tiny", tmp_path / "runs/tiny")
    shutil.rmtree(tmp_path / "runs/tiny/bags")
    folder = tmp_path / "runs/tiny/softmax/last.features/train"
    done = run_script("train", configs / "bags.yaml", f"output={tmp_path / 'runs'}", "train.epochs=1", "name=first")
    assert done.returncode == 0 and (folder / "0.sums").exists(), done.stderr
    return configs, tmp_path / "runs", folder


def flip_signs(path):
    """What a sick disk might do: the sign of every second feature."""
    values = np.fromfile(path, np.float16)
    values[::2] *= -1
    values.tofile(path)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "signs": ("0.fc", flip_signs),
    "bit of features": ("1.fc", flip_a_bit),
    "bit of rows": ("0.rows", flip_a_bit),
    "bit of views": ("0.views", flip_a_bit),
    "cut": ("0.fc", lambda path: path.write_bytes(path.read_bytes()[:-2])),
    "longer": ("0.rows", lambda path: path.write_bytes(path.read_bytes() + b"x")),
    "empty": ("0.views", lambda path: path.write_bytes(b"")),
    "missing": ("0.fc", lambda path: path.unlink()),
    "checksums": ("0.sums", lambda path: path.write_text("[]")),
}


def test_damage_of_a_store_is_seen_and_named(stored):
    configs, runs, folder = stored
    command = ["train", configs / "bags.yaml", f"output={runs}", "train.epochs=1"]
    for case, (name, change) in DAMAGE.items():
        whole = (folder / name).read_bytes()
        change(folder / name)
        done = fork_script(*command)
        assert done.returncode == 2 and "Traceback" not in done.stderr, (case, done)
        assert f"{folder}: shard {name[0]} is damaged" in done.stderr and "are made again" in done.stderr, (case, done)
        (folder / name).write_bytes(whole)
    for path in folder.glob("0.*"):
        path.unlink()
    assert run_script(*command).returncode == 0


def test_a_shard_that_is_cut_while_it_is_read(stored):
    """A short read is an error of one line, not the end of the process."""
    _, _, folder = stored
    row, view = pool_row(1), View
    header = json.loads((folder / "store.json").read_text())
    store = FeatureStore(folder, Layout("float16", row, view, header["stages"], header["width"]), header["number"])
    features, rows = store[0, False]
    assert len(features) == len(rows) > 0
    with (folder / "0.fc").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(UserError, match=r"0\.fc: is cut \(100 bytes\): remove this shard's files"):
        store[0, False]


def test_a_store_without_checksums_is_refused(stored):
    configs, runs, folder = stored
    header = json.loads((folder / "store.json").read_text())
    (folder / "store.json").write_text(json.dumps({**header, "format": 1}))
    done = fork_script("train", configs / "bags.yaml", f"output={runs}", "train.epochs=1")
    assert done.returncode == 2 and "of an older version, without checksums: remove the folder" in done.stderr
