"""Only regular files are read; anything else is an error and not a wait without end."""

import bz2
import codecs
import gzip
import json
import os

import pytest
from conftest import run_script

from bags.config.load import load_config
from bags.core.errors import UserError
from bags.core.files import encoding_problem, open_regular, read_bytes, read_text, write_text
from bags.data.checks import check_annotations
from bags.data.findings import STOP
from bags.data.index import AnnotationIndex
from bags.data.json_files import read_json
from bags.evaluation.results_file import read_results
from bags.evaluation.truth import read_truth


def test_a_regular_file_is_read_through_links_too(tmp_path):
    (tmp_path / "a").write_bytes(b"caf\xc3\xa9\r\nb")
    (tmp_path / "link").symlink_to("a")
    assert read_bytes(tmp_path / "link") == b"caf\xc3\xa9\r\nb" and read_text(str(tmp_path / "a")) == "café\nb"
    with open_regular(tmp_path / "a") as file:
        assert str(file.name) == str(tmp_path / "a") and file.seek(0, os.SEEK_END) == 8


def test_what_can_wait_for_ever_is_refused(tmp_path):
    """A pipe, a link to one, a device: OSError; no descriptor stays open."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    before = len(os.listdir("/proc/self/fd"))
    for path in (tmp_path / "pipe", tmp_path / "link", "/dev/zero"):
        with pytest.raises(OSError, match="Not a regular file") as error:
            read_bytes(path)
        assert str(path) in str(error.value)
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(IsADirectoryError):
        read_text(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "none")


PIPES = [  # command, with PIPE for the pipe, and what the line says
    (["train", "PIPE.yaml"], "PIPE.yaml: not a regular file"),
    (["train", "CONFIGS/softmax.yaml", "data.train=PIPE.json"], "PIPE.json: not a regular file"),
    (["train", "CONFIGS/softmax.yaml", "detector.init_from=PIPE.pth"], "PIPE.pth: not a regular file"),
    (["prepare_data", "check", "PIPE.json"], "PIPE.json: not a regular file"),
    (["prepare_data", "coco_lt", "--source", "VAL", "--output", "none.json", "--targets", "PIPE.json"], "PIPE.json: "),
    (["evaluate", "PIPE.pth"], "PIPE.pth: not a regular file"),
    (["evaluate", "PIPE.json", "--annotations", "VAL"], "PIPE.json: expected a results file"),
    (["evaluate", "VAL", "--annotations", "PIPE.json"], "PIPE.json: not a regular file"),
    (["evaluate", "--compare", "PIPE.json", "VAL", "--annotations", "VAL"], "PIPE.json: expected a results file"),
    (["predict", "PIPE.pth", "IMAGE"], "PIPE.pth: not a regular file"),
    (["predict", "LAST", "PIPE.png"], "PIPE.png: not a regular file"),
    (["import_weights", "PIPE.pth", "CONFIGS/softmax.yaml", "--output", "none.pth"], "PIPE.pth: not a regular file"),
]


@pytest.mark.parametrize(
    "command, expected", PIPES, ids=lambda value: " ".join(value)[:60] if list is type(value) else ""
)
def test_a_pipe_in_place_of_any_file_is_one_line(job, glyphs, tmp_path, command, expected):
    configs, runs, _ = job
    for suffix in (".yaml", ".json", ".pth", ".png"):
        os.mkfifo(tmp_path / f"PIPE{suffix}")
    image = next((glyphs / "val").iterdir())
    places = {"PIPE": tmp_path / "PIPE", "CONFIGS": configs, "VAL": glyphs / "val.json", "IMAGE": image}
    places["LAST"] = runs / "tiny/softmax/last.pth"
    for name, path in places.items():
        command = [text.replace(name, str(path)) for text in command]
    options = [f"output={tmp_path / 'runs'}"] if command[0] == "train" else []
    options += ["--output", tmp_path / "out"] if command[0] == "predict" else []
    done = run_script(*command, *options)
    if command[1] == "check":  # its findings are its output
        assert done.returncode == 1 and "not a regular file" in done.stdout
        return
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert expected in done.stderr


UNREADABLE = {  # how a text is stored -> words of the error
    "utf-16": "is UTF-16 text: save it as UTF-8",
    "utf-16-le": "is UTF-16 text: save it as UTF-8",
    "utf-16-be": "is UTF-16 text: save it as UTF-8",
    "utf-32": "is UTF-32 text: save it as UTF-8",
    "utf-32-le": "is UTF-32 text: save it as UTF-8",
    "utf-32-be": "is UTF-32 text: save it as UTF-8",
    "two marks": "begins with two byte order marks: save it as UTF-8 without any",
    "gzip": "is compressed by gzip: unpack it with gunzip",
    "bzip2": "is compressed by bzip2: unpack it with bunzip2",
}


@pytest.mark.parametrize("stored", UNREADABLE)
def test_other_encodings_are_named_with_the_remedy(tmp_path, stored):
    """Annotations, results and configurations say the same."""
    ways = {"two marks": lambda text: 2 * codecs.BOM_UTF8 + text, "gzip": gzip.compress, "bzip2": bz2.compress}
    convert = ways.get(stored, lambda text: text.decode().encode(stored))
    content = b'{"images": [], "annotations": [], "categories": []}'
    for name, text, read in (
        ("a.json", content, read_json),
        ("a.json", content, AnnotationIndex.open),
        ("a.yaml", b"device: cpu", load_config),
    ):
        (tmp_path / name).write_bytes(convert(text))
        with pytest.raises(UserError) as error:
            read(tmp_path / name)
        assert str(error.value) == f"{tmp_path / name}: {UNREADABLE[stored]}"


def test_a_zero_alone_is_no_other_encoding():
    for content in (b"", b"\0", b"a: \0", b"[\0]", b"[1]"):
        assert encoding_problem(content) is None


def refusal(action, *arguments):
    """The words of the UserError that an action raises; None without one."""
    try:
        action(*arguments)
    except UserError as error:
        return str(error)


TRUTH = {
    "images": [{"id": 1, "file_name": "a.png", "width": 9, "height": 9}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 2], "area": 4, "iscrowd": 0}],
    "categories": [{"id": 1, "name": "a", "instance_count": 1}],
}
RESULT = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 2], "score": 0.5}


@pytest.mark.parametrize("digits", [400, 5000])
@pytest.mark.parametrize("part", TRUTH)
def test_annotations_with_numbers_of_many_digits(tmp_path, part, digits):
    """In each key: what stops training is found by `check`, and the message is short and names the key."""
    for key in TRUTH[part][0]:
        content = {**TRUTH, part: [{**TRUTH[part][0], key: [1, 1, "BIG", 2] if key == "bbox" else "BIG"}]}
        file = tmp_path / f"{key}.json"
        file.write_text(json.dumps(content).replace('"BIG"', "9" * digits))
        words = refusal(AnnotationIndex.open, file)
        assert bool(words) == any(finding.level == STOP for finding in check_annotations(file)), key
        assert len(words or "") < len(str(file)) + 200 and key in (words or key)
        assert digits == 400 or f"`{key}` (line 1, column " in words and "holds a number of 5000 digits" in words


@pytest.mark.parametrize("digits", [400, 5000])
def test_results_with_numbers_of_many_digits(tmp_path, digits):
    (tmp_path / "truth.json").write_text(json.dumps(TRUTH))
    truth = read_truth(tmp_path / "truth.json")
    for key in RESULT:
        content = [{**RESULT, key: [1, 1, "BIG", 2] if key == "bbox" else "BIG"}]
        (tmp_path / "r.json").write_text(json.dumps(content).replace('"BIG"', "9" * digits))
        words = refusal(read_results, tmp_path / "r.json", truth)
        assert (f"`{key}` (line 1, " if digits == 5000 else f"detection 0: {key}") in words and len(words) < 300


def test_only_files_are_replaced(tmp_path):
    """Pipes and folders stay; a link leads to the file that is replaced, or made; a link to itself is an error."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", "folder", "loop"):
        with pytest.raises(OSError):
            write_text(tmp_path / name, "new")
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "loop").is_symlink()
    (tmp_path / "link").symlink_to("file")
    for text in ("made", "replaced"):
        write_text(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link", "loop", "pipe"]
