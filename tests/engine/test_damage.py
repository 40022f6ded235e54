"""Files that are damaged, hostile or absurd: one line that names them, before they cost memory or give a number."""

import errno
import json
import os
import pwd
import resource
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_script, write_configs
from test_features import CPU, prepared
from torch.utils.data import DataLoader

import bags
from bags.assembly import stored as cached
from bags.assembly.initialise import initialise
from bags.assembly.models import load_detector
from bags.assembly.stored_samples import TrainingFeatures, collate_samples
from bags.config.load import config_to_dict, override_config, save_config
from bags.core.errors import UserError
from bags.core.files import write_problem, write_text
from bags.data.index import _cache_folders
from bags.data.statistics import CategoryStats
from bags.detectors.backbones import load_backbone_weights
from bags.detectors.weights import fetch_state, read_state
from bags.engine.checkpoint import load_checkpoint, save_checkpoint, write_checkpoint, write_file


@pytest.fixture(scope="module")
def trained(glyphs, tmp_path_factory):
    """(config, index, statistics, detector, the content of its checkpoint) of a tiny softmax."""
    folder = tmp_path_factory.mktemp("trained")
    configs = write_configs(folder / "configs", glyphs)
    config = bags.load_config(configs / "softmax.yaml", [f"output={folder / 'runs'}"])
    index = bags.AnnotationIndex.open(glyphs / "train.json")
    stats = CategoryStats.from_index(index)
    torch.manual_seed(0)
    detector = bags.build_detector(config, stats)
    about = {"config": config_to_dict(config), "stats": stats.to_dict(), "init": None}
    return config, index, stats, detector, {**about, "model": detector.state_dict()}


def changed(content, section, **values):
    """A checkpoint's content with other entries in one of its sections."""
    return {**content, section: {**content[section], **values}}


LAST = "roi_heads.box_head.fc7.weight"


# --------------------------------------------------------------------------- weights


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_everywhere(trained, glyphs, tmp_path, value):
    config, index, stats, detector, content = trained
    weights = content["model"][LAST].clone()
    weights[3, 4] = value
    file = tmp_path / "bad.pth"
    write_checkpoint(file, changed(content, "model", **{LAST: weights}))
    with pytest.raises(UserError, match=f"bad.pth: {LAST} holds numbers that are not finite"):
        load_detector(file)
    start = override_config(config, [f"detector.init_from={file}"])
    with pytest.raises(UserError, match=f"bad.pth: {LAST} holds numbers that are not finite"):
        initialise(detector, start, index, stats)
    for command in (["evaluate", file, "--output", tmp_path / "out"], ["predict", file, glyphs / "val"]):
        done = run_script(*command)
        assert done.returncode == 2 and "not finite" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_variances_below_zero_are_refused(trained, tmp_path):
    content = trained[-1]
    [name, *_] = [key for key in content["model"] if key.endswith("running_var")]
    write_checkpoint(tmp_path / "bad.pth", changed(content, "model", **{name: -content["model"][name]}))
    with pytest.raises(UserError, match="variances below 0"):
        load_detector(tmp_path / "bad.pth")


def test_weights_of_another_type_are_refused(trained, tmp_path):
    content = trained[-1]
    write_checkpoint(tmp_path / "bad.pth", changed(content, "model", **{LAST: content["model"][LAST].long()}))
    with pytest.raises(UserError, match="fc7.weight holds torch.int64, expected torch.float32"):
        load_detector(tmp_path / "bad.pth")


# --------------------------------------------------------------------------- statistics and sizes

STATS = {
    "texts": ({"instance_counts": ["3"] * 8}, "instance_counts: expected whole numbers of 0 or more, got '3'"),
    "fractions": ({"instance_counts": [1.5] * 8}, "instance_counts: .* got 1.5 at position 0"),
    "truth": ({"image_counts": [True] * 8}, "image_counts: .* got True"),
    "negative": ({"image_counts": [1, -4, *[1] * 6]}, "image_counts: .* got -4 at position 1"),
    "huge": ({"instance_counts": [2**70] * 8}, "instance_counts: .* got a number of 2.63 or more"),
    "tensor": ({"instance_counts": torch.ones(8)}, "expected lists named"),
    "tensors": ({"instance_counts": [torch.ones(1)] * 8}, "instance_counts: expected whole numbers"),
    "nameless": ({"names": [None] * 8}, "names: expected texts, got None"),
    "unsorted": ({"category_ids": [2, 1, 3, 4, 5, 6, 7, 8]}, "category_ids: expected one or more rising numbers"),
    "equal": ({"category_ids": [1] * 8}, "rising numbers"),
    "number": ({"names": ["a"] * 7}, "differ in number"),
    "more": ({"more": []}, "expected lists named"),
    "numbered": ({1: []}, "expected lists named"),
    "text": ({"names": "abcdefgh"}, "expected lists named"),
}


@pytest.mark.parametrize("case", STATS)
def test_odd_statistics_are_one_line(trained, tmp_path, case):
    values, words = STATS[case]
    content = trained[-1]
    write_checkpoint(tmp_path / "bad.pth", {**content, "stats": {**content["stats"], **values}})
    with pytest.raises(UserError, match=f"bad.pth: stats: {words}|bad.pth: stats: .*{words}") as error:
        load_detector(tmp_path / "bad.pth")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    "key, value", [("fc", 131071), ("fc", 0), ("fpn_channels", 32767), ("fc", 10**30), ("fc", "a"), (1, 2)]
)
def test_absurd_sizes_in_a_checkpoint_are_one_line(trained, tmp_path, key, value):
    config = json.loads(json.dumps(trained[-1]["config"]))
    (config["detector"]["roi"] if key == "fc" else config["detector"])[key] = value
    write_checkpoint(tmp_path / "bad.pth", {**trained[-1], "config": config})
    with pytest.raises(UserError, match="bad.pth: ") as error:
        load_detector(tmp_path / "bad.pth")
    assert "\n" not in str(error.value)


def test_millions_of_categories_in_a_checkpoint_are_one_line(trained, tmp_path):
    number = 500_000
    stats = {"category_ids": list(range(number)), "names": ["x"] * number}
    stats |= {"instance_counts": [1] * number, "image_counts": [1] * number}
    config = json.loads(json.dumps(trained[-1]["config"]))
    config["detector"]["roi"]["fc"] = 4096
    write_checkpoint(tmp_path / "bad.pth", {**trained[-1], "stats": stats, "config": config})
    with pytest.raises(UserError, match="holds fewer weights than its own configuration and 500000 categories need"):
        load_detector(tmp_path / "bad.pth")


def test_a_detector_too_large_for_the_memory_is_one_line(trained):
    config, _, stats, *_ = trained
    for override in ("detector.roi.fc=131071", "detector.fpn_channels=32767"):
        with pytest.raises(UserError, match=r"make weights of .* GB, over a third of this machine's memory .*lower"):
            bags.build_detector(override_config(config, [override]), stats)
    many = CategoryStats(*(tuple(range(500_000)) for _ in range(4)))
    wide = override_config(config, ["detector.roi.fc=32767"])
    with pytest.raises(UserError, match="500000 categories make weights of"):
        bags.build_detector(wide, many)


# --------------------------------------------------------------------------- archives


def repacked(source, target, compression=zipfile.ZIP_STORED, extra=()):
    """The members of an archive, and more, written as zip files are."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for member in old.namelist():
            new.writestr(member, old.read(member))
        for name, size in extra:
            with new.open(name, "w") as file:
                for _ in range(size // 2**20):
                    file.write(bytes(2**20))
    return target


def test_zip_bombs_are_refused_before_they_are_unpacked(trained, tmp_path):
    torch.save(trained[-1], tmp_path / "good.pth")
    bomb = repacked(tmp_path / "good.pth", tmp_path / "bomb.pth", zipfile.ZIP_DEFLATED, [("good/data/9999", 2**28)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (load_checkpoint, read_state, load_detector):
        with pytest.raises(UserError, match=r"bomb.pth: not a .*\(compressed members, which torch.save does not write"):
            read(bomb)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # KiB


def test_members_that_share_their_bytes_are_refused(trained, tmp_path):
    """The names of one member repeated in the directory of the archive: more bytes than the file has."""
    torch.save({"a": torch.zeros(100_000)}, tmp_path / "good.pth")
    with zipfile.ZipFile(tmp_path / "good.pth", "a") as archive:
        large = max(archive.infolist(), key=lambda member: member.file_size)
        archive.filelist.extend([large] * 50)
        archive._didModify = True
    with pytest.raises(UserError, match="members that are larger than the file"):
        read_state(tmp_path / "good.pth")


def quantised():
    return torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)


TENSORS = {
    "expanded": lambda: torch.zeros(1).expand(10**12),
    "strided": lambda: torch.zeros(10).as_strided((2000, 2000), (0, 0)),
    "sparse": lambda: torch.sparse_coo_tensor([[0], [0]], [1.0], (2**40, 2**20)),
    "quantised": quantised,
    "meta": lambda: torch.empty(2**40, device="meta"),
    "complex": lambda: torch.zeros(4, dtype=torch.complex64),
    "float8": lambda: torch.zeros(4).to(torch.float8_e4m3fn),
    "memory": lambda: bytearray(10),
    "list": lambda: [1, 2],
    "text": lambda: "weights",
    "nested": lambda: {"a": {"b": torch.zeros(2)}},
}


@pytest.mark.parametrize("case", TENSORS)
@pytest.mark.filterwarnings("ignore")
def test_odd_tensors_are_one_line(trained, tmp_path, case):
    """In a checkpoint, in a file of weights, and beside the weights."""
    value = TENSORS[case]()
    file = tmp_path / "bad.pth"
    for name, read in (("checkpoint", load_checkpoint), ("weights", read_state)):
        state = {**trained[-1]["model"], LAST: value}
        torch.save({**trained[-1], "format": 1, "model": state} if name == "checkpoint" else state, file)
        with pytest.raises(UserError, match="bad.pth: ") as error:
            read(file)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
    if case in ("expanded", "sparse", "meta"):
        torch.save({**trained[-1], "format": 1, "optimizer": [value]}, file)
        with pytest.raises(UserError, match="bad.pth: not a checkpoint"):
            load_checkpoint(file)


def test_names_that_share_one_tensor_are_refused(tmp_path):
    shared = torch.zeros(10_000)
    torch.save({str(n): shared for n in range(1000)}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="many names in its state dict share one tensor"):
        read_state(tmp_path / "bad.pth")


@pytest.mark.parametrize("state", [{1: torch.zeros(2)}, {(): torch.zeros(2)}, {None: torch.zeros(2)}])
def test_names_that_are_no_texts_are_refused(trained, tmp_path, state):
    torch.save({**trained[-1], "format": 1, "model": state}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="expected a state dict of names and tensors"):
        load_checkpoint(tmp_path / "bad.pth")
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="expected a state dict of names and tensors"):
        read_state(tmp_path / "bad.pth")


def test_deep_or_repeated_configurations_are_one_line(trained, tmp_path):
    config = trained[-1]["config"]
    deep, wide = {"name": "x"}, [1] * 3000
    for _ in range(300):
        deep = {"data": deep}
    sizes = {**config["detector"]["rpn"], "anchor_sizes": [wide] * 3000}
    for odd in (deep, {**config, "detector": {**config["detector"], "rpn": sizes}}, {3: 4}, {"seed": torch.ones(3)}):
        write_checkpoint(tmp_path / "bad.pth", {**trained[-1], "config": odd})
        with pytest.raises(UserError, match="bad.pth: config: ") as error:
            load_detector(tmp_path / "bad.pth")
        assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    for read in (load_checkpoint, read_state, bags.load_config):
        for path in (tmp_path / "pipe.pth", tmp_path):
            with pytest.raises(UserError, match="not a regular file"):
                read(path)


def test_weights_of_older_torch_are_read(tmp_path):
    torch.save({"module.a": torch.arange(3.0)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert read_state(tmp_path / "old.pth")["a"].tolist() == [0, 1, 2]
    torch.save({"body.a": torch.full((2,), np.nan)}, tmp_path / "nan.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="nan.pth: body.a holds numbers that are not finite"):
        load_backbone_weights(torch.nn.Identity(), "resnet18", str(tmp_path / "nan.pth"))


# --------------------------------------------------------------------------- stores


@pytest.fixture
def store(tmp_path, glyphs):
    """(make it, its folder): a store of two shards, made once."""
    config, detector, dataset = prepared(tmp_path, glyphs)

    def make():
        return cached.training_store(config, detector, dataset, CPU)

    return make, make().folder


def flipped(content):
    """The sign of every second feature turned, as no size shows."""
    words = np.frombuffer(content, np.uint16).copy()
    words[::2] ^= 0x8000
    return words.tobytes()


DAMAGE = {
    "signs": ("1.fc", flipped),
    "a bit": ("0.rows", lambda content: bytes([content[0] ^ 1]) + content[1:]),
    "views": ("0.views", lambda content: content[:-1] + bytes([content[-1] ^ 4])),
    "shorter": ("1.fc", lambda content: content[: len(content) // 2]),
    "longer": ("1.fc", lambda content: content + content),
    "empty": ("0.fc", lambda content: b""),
    "sums": ("0.sums", lambda content: b"{}"),
    "no sums": ("0.sums", lambda content: b"[1, 2"),
    "odd sums": ("0.sums", lambda content: b'{"fc": 3}'),
    "missing": ("1.rows", None),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_shard_is_named_and_made_again(store, case):
    make, folder = store
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    name, change = DAMAGE[case]
    (folder / name).write_bytes(change(whole[name])) if change else (folder / name).unlink()
    number = name.split(".")[0]
    with pytest.raises(UserError, match=rf"damaged .*: remove .*train/{number}\.\* and repeat the command") as error:
        make()
    assert "\n" not in str(error.value)
    for path in folder.glob(f"{number}.*"):
        path.unlink()
    assert {path.name: path.read_bytes() for path in make().folder.iterdir()} == whole


@pytest.mark.parametrize(
    "how, words, workers",
    [
        ("cut", "changed", 0),
        ("removed", "cannot be read any more", 0),
        ("edited", "changed", 0),
        ("pipe", "cannot be read any more", 0),
        ("cut", "changed", 1),  # torch waits 5 s for a loader process that has raised an error
    ],
)
def test_a_store_that_changes_while_it_is_used_is_one_line(store, how, words, workers):
    """A memory map of a file that is cut ends the process by SIGBUS."""
    make, folder = store
    open_store = make()
    for path in folder.glob("*.fc"):
        if how == "cut":
            os.truncate(path, 4096)
        elif how == "edited":
            path.write_bytes(flipped(path.read_bytes()))
        else:
            path.unlink()
            if how == "pipe":
                os.mkfifo(path)
    features = TrainingFeatures(open_store, 0.0, 8, 0.5, resident=False)
    with pytest.raises(UserError, match=rf"\d\.fc: (was )?{words}"):
        list(DataLoader(features, batch_sampler=[[(0, 1)], [(1, 2)]], collate_fn=collate_samples, num_workers=workers))


def test_a_store_cut_between_the_check_and_the_reading(store, monkeypatch):
    make, _ = store
    open_store = make()
    whole = open_store[3, False][0]
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(UserError, match=r"\.fc: was cut while it was in use"):
        open_store.features((3, False))
    monkeypatch.undo()
    plain = os.preadv  # a file system may give less than was asked for
    monkeypatch.setattr(os, "preadv", lambda file, buffers, place: plain(file, [buffers[0][:100]], place))
    assert np.array_equal(open_store[3, False][0], whole)
    chosen = np.array([0, 2])
    assert np.array_equal(open_store.features((3, False), chosen), whole[chosen])


def test_few_rows_are_the_same_rows(store, monkeypatch):
    """Read one by one, as for few rows of a large view, or with the whole view."""
    make, _ = store
    features = TrainingFeatures(make(), 0.0, 8, 0.5, resident=False)
    whole = [features[position, 5] for position in range(10)]
    monkeypatch.setattr("bags.assembly.stored_samples.FEW", 0)
    single = [features[position, 5] for position in range(10)]
    for (a, labels), (b, others) in zip(whole, single, strict=True):
        assert all(map(torch.equal, a, b)) and all(map(torch.equal, labels, others))


def test_stores_without_checksums_are_refused(store):
    make, folder = store
    header = json.loads((folder / "store.json").read_text())
    for odd, words in (
        (header | {"format": 1}, "made by an earlier version and has no checksums: remove the folder"),
        ([], "other format"),
        ([1], "cannot be read"),
        ("x", "cannot be read"),
    ):
        (folder / "store.json").write_text(json.dumps(odd))
        with pytest.raises(UserError, match=words):
            make()


# --------------------------------------------------------------------------- full disks and missing homes


def test_a_full_disk_is_called_so(tmp_path, monkeypatch, trained):
    """torch hides it behind "unexpected pos"; the system does not name the file."""
    assert write_problem(OSError(errno.ENOSPC, "x")) == "the disk is full: No space left on device"
    assert write_problem(OSError(errno.EDQUOT, "x")).startswith("the quota of the disk is used up")

    class FullFile:
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    plain = torch.save
    monkeypatch.setattr(torch, "save", lambda content, _: plain(content, FullFile()))
    with pytest.raises(
        UserError, match="last.pth: cannot be written .the disk is full: No space left on device.; older"
    ):
        write_file(tmp_path / "last.pth", {"a": torch.zeros(10_000)})
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_names_the_file(tmp_path, store, monkeypatch):
    monkeypatch.setattr("bags.core.files.secrets.token_hex", lambda _: "0000")
    (tmp_path / "x.json.0000.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match="x.json: cannot be written .the disk is full: No space left on device"):
        write_text(tmp_path / "x.json", "text" * 10_000)
    make, folder = store
    for path in folder.glob("0.*"):
        path.unlink()
    (folder / "0.fc.tmp").symlink_to("/dev/full")
    with pytest.raises(
        UserError, match="train: cannot be written .the disk is full: .*the shards that are complete stay"
    ):
        make()
    assert not list(folder.glob("*.tmp")) and not list(folder.glob("0.*"))


@pytest.mark.parametrize("known", [True, False])
def test_without_a_home_no_folder_is_called_tilde(tmp_path, monkeypatch, known):
    """`known`: the system's list of users names the home. Without it, an index has its place beside the file alone."""
    for variable in ("HOME", "XDG_CACHE_HOME", "BAGS_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    if not known:
        monkeypatch.setattr(pwd, "getpwuid", lambda _: (_ for _ in ()).throw(KeyError()))
    path = tmp_path / "train.json"
    folders = _cache_folders(path)
    assert len(folders) == 1 + known and folders[0] == tmp_path / "train.json.index"
    assert all(folder.is_absolute() and "~" not in folder.parts for folder in folders)
    for empty in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.setenv(empty, "")
        assert all(folder.is_absolute() and folder.parts[1] != ".cache" for folder in _cache_folders(path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert all(folder.is_absolute() for folder in _cache_folders(path))
    monkeypatch.setenv("BAGS_CACHE", "~/cache")
    monkeypatch.delenv("HOME")
    if known:
        assert _cache_folders(path)[0].is_absolute() and "~" not in _cache_folders(path)[0].parts
    else:
        with pytest.raises(UserError, match="BAGS_CACHE=~/cache: the home folder is unknown"):
            _cache_folders(path)


def test_without_a_home_nothing_is_fetched_to_tilde(tmp_path, monkeypatch):
    for variable in ("HOME", "XDG_CACHE_HOME", "TORCH_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda _: (_ for _ in ()).throw(KeyError()))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="the home folder is unknown; set TORCH_HOME"):
        load_backbone_weights(torch.nn.Identity(), "resnet18", "IMAGENET1K_V1")
    with pytest.raises(UserError, match="the home folder is unknown; set TORCH_HOME"):
        fetch_state("fasterrcnn_resnet50_fpn", "COCO_V1")
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------- odd names

ODD = """-a "b" 'c' #2: 100% é 🎈 [x] {y}, *&!|>"""


@pytest.mark.slow
def test_a_whole_job_in_a_folder_with_an_odd_name(tmp_path, glyphs):
    """Baseline, store and retrained row, by paths that YAML, a shell or a pattern would read as something else."""
    place = tmp_path / ODD
    place.mkdir()
    data = shutil.copytree(glyphs, place / "data")
    configs = write_configs(place / "configs", glyphs)
    keys = [f"data.root={data}", f"output={place / 'runs'}", f"data.name={ODD}", "train.epochs=1"]
    done = run_script("train", configs / "softmax.yaml", *keys)
    assert done.returncode == 0, done.stderr
    start = place / "runs" / ODD / "softmax" / "last.pth"
    keys += [f"store.folder={place / 'store'}", f"detector.init_from={start}", f"name={ODD}"]
    done = run_script("train", configs / "bags.yaml", *keys)
    assert done.returncode == 0, done.stderr
    run = place / "runs" / ODD / ODD
    assert (run / "metrics.json").exists() and (place / "store" / "train" / "0.sums").exists()
    written = bags.load_config(run / "config.yaml")
    assert (written.name, written.data.root, written.output) == (ODD, str(data), str(place / "runs"))
    assert (written.store.folder, written.detector.init_from) == (str(place / "store"), str(start))
    again = run_script("train", configs / "bags.yaml", *keys)
    assert again.returncode == 0 and "complete, not run again" in again.stdout
    detector, meta = load_detector(run / "last.pth")
    assert meta["config"] == written and sorted(path.name for path in place.iterdir()) == [
        "configs",
        "data",
        "runs",
        "store",
    ]


# --------------------------------------------------------------------------- training


def test_weights_that_are_not_finite_are_not_written(trained, tmp_path):
    """Training that diverges in its last step keeps the checkpoint from before."""
    content = trained[-1]
    save_checkpoint(tmp_path / "last.pth", content)
    before = (tmp_path / "last.pth").read_bytes()
    weights = content["model"][LAST].clone()
    weights[0, 0] = np.nan
    with pytest.raises(UserError, match="last.pth: not written, since training has made .* NaN: lower train.lr"):
        save_checkpoint(tmp_path / "last.pth", changed(content, "model", **{LAST: weights}))
    assert [path.name for path in tmp_path.iterdir()] == ["last.pth"]
    assert (tmp_path / "last.pth").read_bytes() == before


def test_an_optimiser_of_another_model(trained, glyphs, tmp_path):
    configs = write_configs(tmp_path / "configs", glyphs)
    config = bags.load_config(configs / "softmax.yaml", [f"output={tmp_path}"])
    config.run_folder.mkdir(parents=True)
    save_config(config, config.run_folder / "config.yaml")
    content = {**trained[-1], "iteration": 3, "optimizer": {"param_groups": 3}}
    write_checkpoint(config.run_folder / "last.pth", {**content, "config": config_to_dict(config)})
    done = run_script("train", configs / "softmax.yaml", f"output={tmp_path}")
    assert done.returncode == 2 and "its checkpoint does not fit this run" in done.stderr, done.stderr
