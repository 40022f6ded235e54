"""Only regular files are read; anything else is an error and not a wait without end."""

import os

import pytest

from bags.files import open_regular, read_bytes, read_text


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
