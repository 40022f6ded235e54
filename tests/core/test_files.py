"""Only regular files are read; anything else is an error and not a wait without end."""

import os

import pytest
from conftest import run_script

from bags.core.files import open_regular, read_bytes, read_text


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
    (["prepare_data", "check", "PIPE.json"], "PIPE.json: cannot be read"),
    (["prepare_data", "coco_lt", "--source", "VAL", "--output", "none.json", "--targets", "PIPE.json"], "PIPE.json: "),
    (["evaluate", "PIPE.pth"], "PIPE.pth: not a regular file"),
    (["evaluate", "PIPE.json", "--annotations", "VAL"], "PIPE.json: expected a results file"),
    (["evaluate", "VAL", "--annotations", "PIPE.json"], "PIPE.json: cannot be read"),
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
        assert done.returncode == 1 and "Not a regular file" in done.stdout
        return
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert expected in done.stderr
