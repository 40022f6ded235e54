"""Progress where stderr is a terminal, and where it is a file."""

import io
import sys

import pytest

from bags.core import progress
from bags.core.progress import EVERY, Progress, say
from bags.engine.metrics import time_text


class Stream(io.StringIO):
    """Text that says whether it is a terminal."""

    def __init__(self, terminal: bool):
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        """As of a terminal, or of a file."""
        return self.terminal


@pytest.fixture
def stderr(monkeypatch):
    """Replace stderr, as no notebook; gives a function of whether it is a terminal."""

    def replaced(terminal: bool) -> Stream:
        """The new stderr."""
        monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
        stream = Stream(terminal)
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return replaced


def clocked(monkeypatch, seconds: float, steps: int, **settings) -> None:
    """Run a bar of so many steps, each of which takes so long."""
    now = [1000.0]
    bar = Progress(total=steps, desc="train", unit="image", **settings)
    bar._time, bar.start_t, bar.last_print_t = (lambda: now[0]), now[0], now[0]
    for _ in range(steps):
        now[0] += seconds
        bar.update()
    bar.close()


def test_a_file_gets_a_line_every_half_minute(stderr, monkeypatch):
    """100 steps of 1.5 s: lines at 30, 60, ... 150 s, and one at the end."""
    stream = stderr(terminal=False)
    clocked(monkeypatch, 1.5, 100)
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["20/100", "40/100", "60/100", "80/100", "100/100", "100/100"]
    assert lines[0].startswith("train: 20/100 (20 %), 00:30 so far, 02:00 left, ")
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_a_short_stage_is_one_line(stderr, monkeypatch):
    stream = stderr(terminal=False)
    clocked(monkeypatch, 0.1, 7)
    assert stream.getvalue().count("\n") == 1 and stream.getvalue().startswith("train: 7/7 (100 %), 00:00 so far")
    assert EVERY == 30


def test_a_loop_is_followed_too_and_an_unknown_total_is_no_error(stderr):
    stream = stderr(terminal=False)
    assert list(Progress(iter("ab"), desc="read", unit="file")) == ["a", "b"]
    assert stream.getvalue().startswith("read: 2/? (")


def test_a_terminal_gets_a_bar(stderr, monkeypatch):
    stream = stderr(terminal=True)
    clocked(monkeypatch, 1.5, 10)
    assert stream.getvalue().count("\r") >= 10 and stream.getvalue().count("\n") == 1


@pytest.mark.parametrize("terminal", [False, True])
def test_a_message_keeps_its_line(stderr, terminal):
    """It neither draws the progress anew where that would be another line, nor is it lost."""
    stream = stderr(terminal)
    with Progress(total=3, desc="train"):
        say("warning: odd")
    lines = stream.getvalue().replace("\r", "\n").split("\n")
    assert "warning: odd" in lines
    assert terminal or [line.split(":")[0] for line in lines] == ["warning", "train", ""]


def test_disabled_progress_writes_nothing(stderr):
    stream = stderr(terminal=False)
    with Progress(total=3, disable=True) as bar:
        bar.update(3)
    assert stream.getvalue() == ""
    assert progress.has_terminal() is False


def test_durations():
    assert [time_text(s) for s in (0.4, 59.6, 200, 7500)] == ["0 s", "1 min 0 s", "3 min 20 s", "2 h 5 min"]
