"""The packed annotation index: the same content as the JSON, made once, whatever happens."""

import json
import multiprocessing
import os
import pickle
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

import bags
from bags.data import json_files
from bags.data.index import _cache_folders
from bags.data.packing import rle_fits


def random_content(seed=0, images=30, annotations=200, categories=7):
    """COCO-like annotations with polygons, both kinds of RLE, boxes only, crowds and gaps in the ids."""
    rng = np.random.default_rng(seed)
    content = {
        "images": [
            {"id": i * 3 + 2, "file_name": f"f/{i:03d}ä.jpg", "width": 60 + i, "height": 40 + i} for i in range(images)
        ],
        "categories": [{"id": int(c), "name": f"c{c}"} for c in rng.permutation(50)[:categories] + 1],
        "annotations": [],
    }
    for k in range(annotations):
        image = content["images"][int(rng.integers(images - 3))]  # the last three have none
        x, y, w, h = (round(float(v), 2) for v in rng.uniform([0, 0, 2, 2], [20, 20, 20, 20]))
        entry = {
            "id": 1000 - k,
            "image_id": image["id"],
            "bbox": [x, y, w, h],
            "iscrowd": int(k % 17 == 0),
            "category_id": content["categories"][int(rng.integers(categories))]["id"],
        }
        if k % 4 != 3:
            entry["area"] = round(w * h / 2, 3)
        if k % 5 < 2:
            lengths = 2 * rng.integers(3, 9, rng.integers(1, 3))
            entry["segmentation"] = [rng.uniform(0, 40, n).round(2).tolist() for n in lengths]
        elif k % 5 < 4:
            mask = np.asfortranarray(rng.random((image["height"], image["width"])) < 0.2, np.uint8)
            rle = coco_mask.encode(mask)
            if k % 5 == 2:
                entry["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
            else:
                change = np.flatnonzero(np.diff(np.concatenate([[0], mask.ravel("F")])))
                runs = np.diff(np.concatenate([[0], change, [mask.size]])).tolist()
                entry["segmentation"] = {"size": rle["size"], "counts": runs}
        content["annotations"].append(entry)
    return content


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(random_content(), ensure_ascii=False))
    return path


def test_packed_content_equals_the_json(file):
    content, index = json.loads(file.read_text()), bags.AnnotationIndex.open(file)
    ids = sorted(c["id"] for c in content["categories"])
    assert index.category_ids.tolist() == ids and index.category_names == [f"c{i}" for i in ids]
    assert [index.file_name(i) for i in range(len(index))] == [image["file_name"] for image in content["images"]]
    assert index.image_sizes.tolist() == [[image["height"], image["width"]] for image in content["images"]]
    for position, image in enumerate(content["images"]):
        own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        first, last = index.starts[position : position + 2]
        assert index.annotation_ids[first:last].tolist() == [a["id"] for a in own]
        assert (index.owners[first:last] == position).all()
        for k, a in zip(range(first, last), own, strict=True):
            x, y, w, h = a["bbox"]
            assert index.boxes[k].tolist() == pytest.approx([x, y, x + w, y + h], rel=1e-6)

            assert index.crowd[k] == a["iscrowd"] and ids[index.labels[k] - 1] == a["category_id"]
            found, expected = index.segmentation(k), a.get("segmentation")
            if expected is None:
                assert found is None
            elif isinstance(expected, list):
                assert [p.ravel().tolist() for p in found] == [pytest.approx(p, rel=1e-6) for p in expected]
            elif isinstance(expected["counts"], str):
                assert found == expected["counts"].encode()
            else:
                size = expected["size"]
                mask = coco_mask.decode({"size": size, "counts": found})
                assert np.array_equal(mask, coco_mask.decode(coco_mask.frPyObjects(expected, *size)))


def arrays_of(index):
    return {k: v.tolist() for k, v in vars(index).items() if isinstance(v, np.ndarray)}


def test_the_second_open_maps_what_the_first_one_made(file):
    first = bags.AnnotationIndex.open(file)
    times = {p: p.stat().st_mtime_ns for p in first.cache.iterdir()}
    second = bags.AnnotationIndex.open(file)
    assert isinstance(second.boxes, np.memmap) and not second.boxes.flags.writeable
    assert arrays_of(first) == arrays_of(second)
    assert times == {p: p.stat().st_mtime_ns for p in second.cache.iterdir()}
    assert first.cache == file.with_name("a.json.index")


def test_pickling_maps_the_same_folder(file):
    """What a spawned loader process gets: a path, not a copy."""
    index = bags.AnnotationIndex.open(file)
    data = pickle.dumps(index)
    assert len(data) < 500 and arrays_of(pickle.loads(data)) == arrays_of(index)
    part = index.only(np.array([False, True, *[False] * 6]))
    assert arrays_of(pickle.loads(pickle.dumps(part))) == arrays_of(part)


def test_a_changed_file_is_packed_again(file):
    before = bags.AnnotationIndex.open(file)
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][0] += 1
    text = json.dumps(content, ensure_ascii=False)
    file.write_text(text)
    assert not np.array_equal(bags.AnnotationIndex.open(file).boxes, before.boxes)


def test_the_content_digest_is_of_what_trains(file):
    """Other text and other areas change nothing; boxes, crowd flags, names and segmentations do."""

    def digests(change):
        content = json.loads(file.read_text())
        change(content)
        path = file.with_name("b.json")
        path.write_text(json.dumps(content, indent=2))
        index = bags.AnnotationIndex.open(path)
        return index.content_digest(), index.content_digest(segmentations=True)

    def polygon(content):
        return next(a["segmentation"][0] for a in content["annotations"] if isinstance(a.get("segmentation"), list))

    plain, whole = digests(lambda content: None)
    assert plain != whole
    assert digests(lambda content: content["annotations"][0].update(area=7)) == (plain, whole)
    moved = digests(lambda content: polygon(content).__setitem__(0, 39.5))
    assert moved[0] == plain and moved[1] != whole
    for key, value in (("bbox", [1, 1, 9, 9]), ("iscrowd", 0)):
        assert digests(lambda c, key=key, value=value: c["annotations"][0].update({key: value}))[0] != plain
    assert digests(lambda content: content["images"][0].update(file_name="other.jpg"))[0] != plain


def test_a_change_after_the_opening_is_noticed(file):
    index = bags.AnnotationIndex.open(file)
    os.utime(file, (1, 1))
    index.check_unchanged()  # the content is the same
    pickle.loads(pickle.dumps(index)).check_unchanged()
    file.write_text(json.dumps(random_content(seed=1)))
    with pytest.raises(bags.UserError, match=r"a.json: has changed while this command was running"):
        index.check_unchanged()


def test_a_copy_with_another_time_is_not_packed_again(file):
    index = bags.AnnotationIndex.open(file)
    times = {p.name: p.stat().st_mtime_ns for p in index.cache.glob("*.npy")}
    os.utime(file, ns=(1, 1))
    again = bags.AnnotationIndex.open(file)
    state = json.loads((again.cache / "about.json").read_text())[0]["state"]
    assert state[1] == 1  # noted, so that the next open need not read the file
    assert times == {p.name: p.stat().st_mtime_ns for p in again.cache.glob("*.npy")}


def test_same_size_and_time_but_other_content(file):
    before = bags.AnnotationIndex.open(file)
    stat = file.stat()
    text = file.read_text()
    changed = text.replace('"bbox": [1', '"bbox": [2', 1)
    assert changed != text and len(changed) == len(text)
    file.write_text(changed)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert not np.array_equal(bags.AnnotationIndex.open(file).boxes, before.boxes)


@pytest.mark.parametrize("damage", ["truncate", "remove", "about", "empty", "files", "bits", "nested"])
def test_a_torn_cache_is_made_again(file, damage):
    expected = arrays_of(bags.AnnotationIndex.open(file))
    cache = file.with_name("a.json.index")
    if damage == "truncate":
        (cache / "boxes.npy").write_bytes((cache / "boxes.npy").read_bytes()[:-40])
    elif damage == "remove":
        (cache / "labels.npy").unlink()
    elif damage == "about":
        (cache / "about.json").write_text('{"format": 1, ')
    elif damage == "files":
        about, checksum = json.loads((cache / "about.json").read_text())
        (cache / "about.json").write_text(json.dumps([{**about, "files": []}, checksum]))
    elif damage == "bits":  # as large as before
        content = bytearray((cache / "boxes.npy").read_bytes())
        content[-1] ^= 0x85
        (cache / "boxes.npy").write_bytes(content)
    elif damage == "nested":
        (cache / "about.json").write_text("[" * 100_000)
    else:
        shutil.rmtree(cache)
        cache.mkdir()
    assert arrays_of(bags.AnnotationIndex.open(file)) == expected
    assert sorted(p.name for p in file.parent.iterdir()) == ["a.json", "a.json.index"]


def test_a_read_only_folder_and_bags_cache(file, tmp_path, monkeypatch):
    """No place beside the file (here: taken by a file of that name) falls back to the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("bags.data.index.tempfile.mkdtemp", only_below(tmp_path / "home"))
    index = bags.AnnotationIndex.open(file)
    assert index.cache.is_relative_to(tmp_path / "home") and len(index) == 30
    assert bags.AnnotationIndex.open(file).cache == index.cache
    monkeypatch.setenv("BAGS_CACHE", str(tmp_path / "home" / "elsewhere"))
    assert bags.AnnotationIndex.open(file).cache.parent == tmp_path / "home" / "elsewhere"
    monkeypatch.setenv("BAGS_CACHE", str(tmp_path / "no"))
    with pytest.raises(bags.UserError, match="set BAGS_CACHE"):
        bags.AnnotationIndex.open(file)


def only_below(folder):
    import tempfile

    real = tempfile.mkdtemp

    def mkdtemp(prefix, dir):
        if not dir.is_relative_to(folder):
            raise PermissionError(13, "read-only file system", str(dir))
        return real(prefix=prefix, dir=dir)

    return mkdtemp


def open_and_look(path, barrier, results):
    packed = []
    real = bags.data.index.pack
    bags.data.index.pack = lambda path: packed.append(1) or real(path)
    barrier.wait()
    index = bags.AnnotationIndex.open(path)
    deleted = "(deleted)" in "".join(line for line in open("/proc/self/maps") if str(path.parent) in line)
    results.put((float(index.boxes.sum()), len(packed), deleted))


@pytest.mark.parametrize("annotations", [20, 3000])
def test_processes_that_open_at_once_make_it_once_and_share_it(tmp_path, annotations):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(random_content(annotations=annotations)))
    context = multiprocessing.get_context("fork")
    results, barrier = context.Queue(), context.Barrier(4)
    processes = [context.Process(target=open_and_look, args=(path, barrier, results)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len({total for total, _, _ in found}) == 1 and sum(packed for _, packed, _ in found) == 1
    assert not any(deleted for _, _, deleted in found)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.json.index"]


def test_left_overs_of_a_killed_build_are_removed(file):
    left_over = file.with_name(".a.json.index.abc123")
    left_over.mkdir()
    bags.AnnotationIndex.open(file)
    assert sorted(p.name for p in file.parent.iterdir()) == ["a.json", "a.json.index"]
    assert file.with_name("a.json.index").stat().st_mode & 0o055 == 0o055


def test_a_failed_build_leaves_nothing_behind(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({**random_content(), "categories": []}))
    with pytest.raises(bags.UserError):
        bags.AnnotationIndex.open(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_take_keeps_everything_of_the_chosen_images(file):
    index = bags.AnnotationIndex.open(file)
    chosen = np.array([0, 4, 5, 20, 29])
    part = index.take(chosen)
    assert part.image_ids.tolist() == index.image_ids[chosen].tolist()
    for new, old in enumerate(chosen):
        assert part.file_name(new) == index.file_name(old)
        (a, b), (c, d) = part.starts[new : new + 2], index.starts[old : old + 2]
        assert part.annotation_ids[a:b].tolist() == index.annotation_ids[c:d].tolist()
        assert part.boxes[a:b].tolist() == index.boxes[c:d].tolist()
        for p, q in zip(range(a, b), range(c, d), strict=True):
            first, second = part.segmentation(p), index.segmentation(q)
            assert type(first) is type(second)
            assert (
                np.array_equal(first, second)
                if isinstance(first, bytes) or first is None
                else all(np.array_equal(x, y) for x, y in zip(first, second, strict=True))
            )


def test_rle_fits():
    mask = np.asfortranarray(np.random.default_rng(0).random((31, 47)) < 0.3, np.uint8)
    counts = coco_mask.encode(mask)["counts"]
    assert rle_fits(counts, 31 * 47)
    assert not rle_fits(counts, 31 * 47 + 1) and not rle_fits(counts[:-1], 31 * 47)
    assert not rle_fits(b"\x7f\x7f", 10) and not rle_fits(b"o" * 40, 10)


# --------------------------------------------------------------------------- fuzz

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-3, 3), max_size=5),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@st.composite
def mutated(draw):
    """A valid file with a few values replaced, removed or repeated, anywhere."""
    content = random_content(draw(st.integers(0, 3)), images=5, annotations=8, categories=3)
    for _ in range(draw(st.integers(1, 4))):
        if not content:  # the mutations before this one removed every key
            break
        place, path = content, []
        while isinstance(place, (dict, list)) and place and (not path or draw(st.integers(0, 3))):
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else list(range(len(place)))))
            path.append((place, key))
            place = place[key]
        holder, key = path[-1]
        action = draw(st.integers(0, 2))
        if action == 0:
            holder[key] = draw(ODD)
        elif action == 1:
            del holder[key]
        elif isinstance(holder, list):
            holder.append(holder[key])
        else:
            holder[draw(st.text(max_size=4))] = draw(ODD)
    return content


@settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(mutated())
def test_any_file_is_an_index_or_our_error(tmp_path_factory, content):
    """And `check` lists a defect that stops training wherever `open` refuses."""
    from bags.data.checks import check_annotations
    from bags.data.findings import STOP

    folder = tmp_path_factory.getbasetemp() / "fuzz"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    path = folder / "a.json"
    path.write_text(json.dumps(content))
    stops = [finding.kind for finding in check_annotations(path) if finding.level == STOP]
    try:
        index = bags.AnnotationIndex.open(path)
    except bags.UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        assert stops
        return
    if not index.trained.any():
        assert stops
    else:  # `open` leaves names that lead out of the folder to the image reader
        assert set(stops) <= {"file name"}
    assert len(index.boxes) == len(index.labels) == index.starts[-1] and np.isfinite(index.boxes).all()
    for k in range(len(index.labels)):
        shape = index.segmentation(k)
        if isinstance(shape, bytes):
            coco_mask.decode({"size": index.image_sizes[index.owners[k]].tolist(), "counts": shape})


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=60))
def test_any_bytes_are_our_error(data):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.json")
        path.write_bytes(data)
        with pytest.raises(bags.UserError):
            bags.AnnotationIndex.open(path)
        assert _cache_folders(path)[0].name == "a.json.index"


# --------------------------------------------------------------------------- reading several entries at a time

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.text('}],{[":\\ a\ud800', max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('}],{" a', max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.lists(st.dictionaries(st.text("ab}", max_size=2), VALUES, max_size=4), max_size=12),
    st.sampled_from([0, 16, 64, 1024]),
    st.sampled_from([None, 1]),
)
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_streamed_entries_are_those_of_json(tmp_path, monkeypatch, entries, window, indent):
    """Whatever is in an entry: objects, brackets in texts, NaN, half a surrogate pair; in windows of any size."""
    monkeypatch.setattr(json_files, "WINDOW", window)
    monkeypatch.setattr(json_files, "LEAST", 8)
    content = {"images": entries, "annotations": entries, "other": entries, "categories": entries[:1]}
    path = tmp_path / "any.json"
    path.write_text(json.dumps(content, indent=indent))
    found = {key: [] for key in json_files.LISTS}
    for key, entry in json_files.stream(path):
        found[key].append(entry)
    assert repr(found) == repr({key: content[key] for key in json_files.LISTS})
