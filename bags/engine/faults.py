"""Interruptions of training: signals that ask it to stop, and losses that are not finite."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bags.core import distributed
from bags.core.errors import REPEATED
from bags.engine.checkpoint import write_checkpoint


class StopSignals:
    """Inside `with`, SIGTERM and SIGINT only add their names to `received`, which is looked at after each step.

    More than REPEATED seconds after the first one, a signal has its former effect: the step may never end.
    """

    def __init__(self) -> None:
        self.received: list[str] = []
        self.first = 0.0  # when the first one came, by the monotonic clock
        self.former: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # only the main one may have handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self.former[number] = signal.getsignal(number)
                signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        """Note a signal; pass on a second one."""
        if self.received and time.monotonic() - self.first > REPEATED:
            signal.signal(number, self.former[number])
            signal.raise_signal(number)
            return
        self.first = self.first or time.monotonic()
        self.received.append(signal.Signals(number).name)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, signals have their former effect; one that came before has it now. Everything is saved there."""
        self.__exit__()
        try:
            for name in self.received[:1]:
                signal.raise_signal(signal.Signals[name])
            yield
        finally:
            self.__enter__()


def report_nonfinite(folder: Path, losses: dict[str, torch.Tensor], targets: list[dict], content: dict) -> str:
    """Which losses of which images are not finite, on all ranks; the same text on each.

    A rank that has some writes `nonfinite.rank<r>.pth` into the folder: a checkpoint of the weights, from `content`,
    with the batch.
    """
    bad = [name for name, value in losses.items() if not value.isfinite()]
    ids = [target["image_id"] for target in targets if "image_id" in target]
    file = folder / f"nonfinite.rank{distributed.rank()}.pth"
    if bad:
        write_checkpoint(file, {**content, "losses": {name: float(value) for name, value in losses.items()}})
    of_rank = [", ".join(bad), f"images {', '.join(map(str, ids))}" if ids else "stored features", str(file)]
    reports = [words for words in distributed.gather_objects(of_rank) if words[0]]
    return "; ".join(
        f"{names} is not finite ({shown}; {file} holds weights and batch)" for names, shown, file in reports
    )
