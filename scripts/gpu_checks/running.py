"""Checks in processes of their own, and the result file that grows with each of their lines."""

import contextlib
import importlib
import json
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from bags.core.files import write_text

LOG = 4000  # last characters of a failed check's output that the result keeps
THREADS = 4  # of a check that does not run alone
PAUSE = 0.02  # seconds between two looks at the running checks


class Place(NamedTuple):
    """Where a check runs."""

    device: str  # "cuda" or "cpu"
    folder: Path  # an empty folder, for the check's files

    @property
    def is_gpu(self) -> bool:
        """Whether sizes are those of a GPU, and not the tiny ones of the CPU."""
        return self.device == "cuda"


class Check(NamedTuple):
    """A function `module.name` of this package that yields lines."""

    module: str
    name: str
    about: str  # shown by --list
    seconds: int  # on a GPU; it is stopped then, and has failed
    alone: bool = False  # it measures times or memory: nothing else runs meanwhile


@dataclass
class Line:
    """One result of a check.

    status: `pass`, `fail`, `figure` (a number that is only reported) or `not run`.
    """

    name: str
    status: str
    text: str
    numbers: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0  # since the check's line before


def verdict(name: str, good: bool, text: str, **numbers: Any) -> Line:
    """A line that passes or fails."""
    return Line(name, "pass" if good else "fail", text, numbers)


def figure(name: str, text: str, **numbers: Any) -> Line:
    """A line that only reports numbers."""
    return Line(name, "figure", text, numbers)


def not_run(name: str, reason: str) -> Line:
    """A line for what could not be looked at here."""
    return Line(name, "not run", reason)


def context(place: Place) -> Any:
    """Start processes anew on a GPU, which a fork cannot share; elsewhere fork them, which takes no time."""
    return multiprocessing.get_context("spawn" if place.is_gpu else "fork")


def start(place: Place, log: Path, function: Callable, *arguments: Any, group: bool = False) -> BaseProcess:
    """Call a function in a process of its own, whose output goes to a file.

    group: it leads a process group, so that `end` also ends what it has started.
    """
    process = context(place).Process(target=_enter, args=(log, group, function, arguments))
    process.start()
    return process


def end(process: BaseProcess) -> None:
    """Kill a process, and its group if it leads one."""
    if process.pid is not None and process.is_alive():
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            if os.getpgid(process.pid) == process.pid:
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    process.join()


def _enter(log: Path, group: bool, function: Callable, arguments: tuple) -> None:
    """Run in the new process."""
    if group:
        os.setsid()
    with open(log, "ab", buffering=0) as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    sys.stdout = sys.stderr = log.open("a", buffering=1)
    function(*arguments)


def run_check(check: Check, place: Place, part: Path) -> None:
    """Run a check in this process; write each line to the file `part` as it comes, and `end` after the last one."""
    if place.is_gpu and not check.alone:
        import torch

        torch.set_num_threads(THREADS)
    last = time.perf_counter()
    with part.open("w", buffering=1) as file:

        def write(line: Line) -> None:
            """Append a line."""
            nonlocal last
            now = time.perf_counter()
            line.seconds, last = round(now - last, 2), now
            file.write(json.dumps(asdict(line)) + "\n")

        try:
            lines: Iterator[Line] = getattr(importlib.import_module(f"scripts.gpu_checks.{check.module}"), check.name)(
                place
            )
            for line in lines:
                write(line)
        except ModuleNotFoundError as error:
            traceback.print_exc()
            top = (error.name or "").partition(".")[0]
            missing = top not in ("", "bags", "scripts")
            write(not_run(check.name, f"{top} is not installed") if missing else verdict(check.name, False, str(error)))
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            write(verdict(check.name, False, f"{type(error).__name__}: {last_line(str(error))}"))
        file.write('"end"\n')


def last_line(text: str) -> str:
    """The last line of a text that is not empty, cut to 300 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


class Result:
    """The result file, replaced as a whole after every check."""

    def __init__(self, path: Path, head: dict[str, Any]):
        self.path, self.head, self.began = path, head, time.perf_counter()
        self.checks: dict[str, dict[str, Any]] = {}

    def add(self, name: str, lines: list[Line], seconds: float, log: str = "") -> None:
        """Add a check, print its lines, and write the file."""
        failed = any(line.status == "fail" for line in lines)
        self.checks[name] = {"seconds": round(seconds, 1), "lines": [_plain(line) for line in lines]}
        if failed:
            self.checks[name]["log"] = log[-LOG:]
        for line in lines:
            print(f"{line.status:<8} {name}: {line.name}: {line.text} [{line.seconds:.1f} s]", flush=True)
        self.write()

    def count(self, status: str) -> int:
        """How many lines have a status."""
        return sum(line["status"] == status for check in self.checks.values() for line in check["lines"])

    def write(self) -> None:
        """Write what there is so far."""
        counts = {status: self.count(status) for status in ("pass", "fail", "figure", "not run")}
        seconds = round(time.perf_counter() - self.began, 1)
        content = {**self.head, "seconds": seconds, "counts": counts, "checks": self.checks}
        write_text(self.path, json.dumps(content, indent=1) + "\n")


def _plain(line: Line) -> dict[str, Any]:
    """A line for the file: without numbers where it has none; those that are not finite are null."""

    def finite(value: Any) -> Any:
        """Replace what JSON does not know."""
        if isinstance(value, list):
            return [finite(entry) for entry in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    plain = {key: value for key, value in asdict(line).items() if key != "numbers"}
    numbers = {key: finite(value) for key, value in line.numbers.items()}
    return plain | ({"numbers": numbers} if numbers else {})


@dataclass
class _Running:
    """A check that has been started."""

    check: Check
    process: BaseProcess
    began: float
    folder: Path

    def lines(self) -> tuple[list[Line], bool]:
        """What it has written, and whether that is all."""
        part = self.folder / "lines"
        texts = part.read_text().splitlines() if part.exists() else []
        entries = []
        for text in texts:
            try:
                entries.append(json.loads(text))
            except ValueError:  # it was killed while it wrote
                break
        return [Line(**entry) for entry in entries if entry != "end"], "end" in entries


class Runner:
    """Starts checks in order: those that are `alone` by themselves, of the others up to `jobs` at a time."""

    def __init__(self, device: str, result: Result, jobs: int, minutes: float):
        self.device, self.result, self.jobs = device, result, jobs
        self.deadline = time.perf_counter() + 60 * minutes
        self.running: list[_Running] = []

    def run(self, checks: list[Check]) -> None:
        """Run the checks until all have ended or the time is up."""
        waiting = list(checks)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            try:
                while waiting or self.running:
                    late = time.perf_counter() > self.deadline
                    while waiting and (late or self._may_start(waiting[0])):
                        check = waiting.pop(0)
                        if late:
                            self.result.add(check.name, [not_run(check.name, "the time was up")], 0.0)
                        else:
                            self._start(check, Path(folder) / check.name)
                    for running in list(self.running):
                        self._look(running, late)
                    time.sleep(PAUSE)
            finally:
                for running in self.running:
                    end(running.process)

    def _may_start(self, check: Check) -> bool:
        """Whether what runs now leaves room for a check."""
        if check.alone or any(running.check.alone for running in self.running):
            return not self.running
        return len(self.running) < self.jobs

    def _start(self, check: Check, folder: Path) -> None:
        """Start a check in a folder of its own."""
        (folder / "files").mkdir(parents=True)
        place = Place(self.device, folder / "files")
        process = start(place, folder / "log", run_check, check, place, folder / "lines", group=True)
        self.running.append(_Running(check, process, time.perf_counter(), folder))

    def _look(self, running: _Running, late: bool) -> None:
        """Take the result of a check that has ended; end one whose time is up."""
        seconds = time.perf_counter() - running.began
        slow = seconds > running.check.seconds
        if running.process.is_alive() and not (late or slow):
            return
        killed = running.process.is_alive()
        end(running.process)
        self.running.remove(running)
        lines, complete = running.lines()
        path = running.folder / "log"
        log = path.read_text(errors="replace") if path.exists() else ""
        if not complete:
            name = running.check.name
            if killed and not slow:
                lines.append(not_run(name, f"unfinished after {seconds:.0f} s: the time was up"))
            elif killed:
                lines.append(verdict(name, False, f"did not end within {running.check.seconds} s"))
            else:
                text = f"ended with exit code {running.process.exitcode}: {last_line(log)}"
                lines.append(verdict(name, False, text))
        self.result.add(running.check.name, lines, seconds, log)
