"""Numbers of a run: JSON lines on disk, a progress bar on screen, a clock."""

import contextlib
import itertools
import json
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bags.config.sections import TrainConfig
from bags.core import distributed
from bags.core.files import naming, read_bytes, replacing
from bags.core.progress import Progress, say
from bags.engine.board import Board, training_tags

PHASES = ("data", "forward", "backward", "step")
TYPICAL, KNOWN, JUMP = 25, 3, 10  # losses whose median is usual, at least so many; how far above it is told of
EARLY_JUMP = 100  # how far above the first step's loss is told of, before a usual one is known
WAITS = 0.2  # share of its time that a GPU may wait for data before that is said


def _now(device: torch.device) -> Any:
    """A moment: seconds, on a GPU an event that it passes."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def time_text(seconds: float) -> str:
    """A duration as in "2 h 5 min", "3 min 20 s" or "45 s"."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"


class Clock:
    """Where the time goes: each lap is what has passed since the one before, of the GPU's own time on a GPU."""

    def __init__(self, device: torch.device):
        self.device, self.on_gpu = device, device.type == "cuda"
        self.marks: list[tuple[str, Any]] = [("", _now(device))]

    def lap(self, phase: str) -> None:
        """Ends a phase, one of PHASES; never waits for the GPU."""
        self.marks.append((phase, _now(self.device)))

    def leave_out(self) -> None:
        """Leave the time since the last lap out of every phase."""
        self.marks.append(("", _now(self.device)))

    def read(self) -> dict[str, float]:
        """Seconds of each phase since the last reading; on a GPU, waits for it."""
        seconds = dict.fromkeys(("", *PHASES), 0.0)
        if self.on_gpu:
            torch.cuda.synchronize()
        for (_, start), (phase, end) in itertools.pairwise(self.marks):
            seconds[phase] += start.elapsed_time(end) / 1000 if self.on_gpu else end - start
        del self.marks[:-1]
        del seconds[""]
        return seconds


class JsonLog:
    """`log.jsonl`: one object per logged step and per result. Written by one process."""

    def __init__(self, path: Path, first_iteration: int = 0):
        """Keep the steps before `first_iteration`; later ones will be run, and written, again.

        The former file is replaced as a whole: a full disk loses no line of it.
        """
        former, kept, self.last = read_bytes(path) if path.exists() else b"", [], {}
        self.path = path
        for line in former.splitlines():
            try:
                values = json.loads(line)
                if values["iteration"] < first_iteration:
                    kept.append(line + b"\n")
                    self.last = values
            except (ValueError, TypeError, KeyError, RecursionError):
                continue  # the last line of a killed run
        if former != b"".join(kept):
            with replacing(path, "wb") as file:
                file.writelines(kept)
        self.file = path.open("a", buffering=1)

    def write(self, **values: object) -> None:
        """Appends one object; floats are rounded to 6 significant digits, those that are not finite are null."""
        plain = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()}
        with naming(self.path):
            self.file.write(json.dumps(plain) + "\n")

    def close(self) -> None:
        """Closes the file."""
        self.file.close()


class Stopwatch:
    """Seconds spent inside `with stopwatch:`, on the GPU where the device is one; nothing waits before it is asked."""

    def __init__(self) -> None:
        self.total, self.device = 0.0, torch.device("cpu")
        self.pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # not read yet

    def __enter__(self) -> None:
        self.started = _now(self.device)

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.pairs.append((self.started, _now(self.device)))
        else:
            self.total += _now(self.device) - self.started

    def seconds(self) -> float:
        """So far."""
        for start, end in self.pairs:
            end.synchronize()
            self.total += start.elapsed_time(end) / 1000
        self.pairs.clear()
        return self.total


class Monitor:
    """Follows one run: averages losses over ranks, logs them and the seconds of an iteration, moves the bar."""

    def __init__(
        self,
        folder: Path,
        title: str,
        config: TrainConfig,
        done: int,
        total: int,
        clock: Clock | None = None,
        stopwatch: Stopwatch | None = None,
    ):
        """`done` and `total` count iterations; clock: of all runs of the pass, for the one that has the bar.

        stopwatch: of the run's own steps; its seconds are logged, on top of those logged before.
        """
        self.title, self.config, self.total, self.clock = title, config, total, clock
        self.stopwatch = stopwatch or Stopwatch()
        main, images = distributed.is_main(), config.batch_size
        self.log = JsonLog(folder / "log.jsonl", done) if main else None
        self.board = Board(folder / "tensorboard/training", done) if main and config.tensorboard else None
        self.stopwatch.total += self.log.last.get("seconds", 0.0) if self.log else 0.0
        self.bar = Progress(
            total=total * images,
            initial=done * images,
            desc=title,
            unit="image",
            disable=not (main and clock),
            smoothing=0.05,
        )
        self.typical: deque[float] = deque(maxlen=TYPICAL)  # the losses logged last
        self.peak: torch.Tensor | None = None  # the largest loss since the last log
        self.first: torch.Tensor | None = None  # the loss of the first step
        self.waited = False
        self.sums: dict[str, torch.Tensor] = {}  # of the losses of this epoch
        self.began = time.perf_counter()
        self.last_time, self.last_steps, self.first_steps = time.perf_counter(), done, done
        self.steps, self.lr = done, math.nan

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.log:
            self.log.close()
        if self.board:
            self.board.close()

    def step(self, iteration: int, epoch: float, losses: dict[str, torch.Tensor], lr: float) -> None:
        """Takes in one iteration, and the epochs done with it; every `log_every`-th is logged."""
        steps = iteration + 1
        self.bar.update(self.config.batch_size)
        total = sum(losses.values(), torch.tensor(0.0)).detach()
        for name, loss in {"loss": total, **losses}.items():
            self.sums[name] = self.sums.get(name, 0) + loss.detach()
        self.steps, self.lr = steps, lr
        self.first = total if self.first is None else self.first
        self.peak = total if self.peak is None else torch.maximum(self.peak, total)
        if steps % self.config.log_every and steps != self.total:
            return
        values = distributed.average({"loss": total, **losses})
        times, seconds = self._times(max(steps - self.last_steps, 1)), self.stopwatch.seconds()
        if self.log:
            now = time.perf_counter()
            rate = (steps - self.last_steps) * self.config.batch_size / (now - self.last_time)
            self.last_time = now
            self.log.write(
                iteration=iteration,
                epoch=epoch,
                lr=lr,
                images_per_s=rate,
                seconds=seconds,
                **times,
                **values,
            )
            if self.board:
                self.board.numbers(iteration, training_tags({"lr": lr, "images_per_s": rate, **values}))
            self._look_for_a_jump(steps, float(self.peak), lr)
            if math.isfinite(values["loss"]):
                self.typical.append(values["loss"])
            self.bar.set_postfix_str(f"loss {values['loss']:.3f} lr {lr:.2g}", refresh=False)
        self.peak = None
        self.last_steps = steps

    @contextlib.contextmanager
    def epoch(self, number: int, others: int) -> Iterator[None]:
        """Follow an epoch, numbered from 1, and write a line about it to stderr; all ranks take part.

        others: runs that are trained on the same batches. Losses are means over the steps since the epoch began
        or was resumed; the time left counts everything since the start, with validations.
        """
        first, start = self.steps, time.perf_counter()
        self.sums = {}
        yield
        steps = self.steps - first
        if not steps:
            return
        means = distributed.average({name: total / steps for name, total in self.sums.items()})
        now = time.perf_counter()
        loss = means.pop("loss")
        parts = ", ".join(f"{name.removeprefix('loss_')} {value:.3g}" for name, value in means.items())
        left = (self.total - self.steps) * (now - self.began) / (self.steps - self.first_steps)
        if self.log:
            say(
                f"{self.title}{f' and {others} more' if others else ''}: epoch {number} of {self.config.epochs}: "
                f"loss {loss:.4g}{f' ({parts})' if len(means) > 1 else ''}, lr {self.lr:.3g}, "
                f"{steps * self.config.batch_size / (now - start):.3g} images/s, {time_text(left)} left"
            )

    def _look_for_a_jump(self, steps: int, peak: float, lr: float) -> None:
        """Say, in the main process, that a loss is far above those before it: training may be about to diverge."""
        if len(self.typical) >= KNOWN:
            usual, limit, words = statistics.median(self.typical), JUMP, "what is usual in this run"
        else:
            first = math.nan if self.first is None else self.first
            usual, limit, words = float(first), EARLY_JUMP, "that of the first step"
        if peak > limit * usual > 0:
            say(
                f"warning: {self.title}: iterations {self.last_steps + 1} to {steps}: the loss was {peak:.3g}, "
                f"{peak / usual:.0f} times {words}: train.lr (now {lr:.2g}) or train.clip_norm "
                f"({self.config.clip_norm:g}) may be too high"
            )

    def _times(self, steps: int) -> dict[str, float]:
        """Seconds of each phase of an iteration in the main process; says once where a GPU waits for data."""
        if not self.clock:
            return {}
        seconds = self.clock.read()
        share = seconds["data"] / max(sum(seconds.values()), 1e-9)
        begun = self.last_steps > self.first_steps  # at first, loader processes start
        if self.clock.on_gpu and share > WAITS and begun and not self.waited and distributed.is_main():
            self.waited = True
            say(f"warning: {self.title}: the GPU waits for data {share:.0%} of the time: raise data.workers")
        return {f"{phase}_s": value / steps for phase, value in seconds.items()}
