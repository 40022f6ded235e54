"""What interrupts training: a signal that asks it to stop, a loss that is not finite."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from bags import distributed
from bags.engine.checkpoint import write_checkpoint


@contextlib.contextmanager
def stop_signals() -> Iterator[list[str]]:
    """Inside, SIGTERM and SIGINT only add their names to the list, which is looked at after each step."""
    received: list[str] = []
    if threading.current_thread() is not threading.main_thread():  # only the main one may have handlers
        yield received
        return

    def note(number: int, _) -> None:
        """Notes a signal."""
        received.append(signal.Signals(number).name)

    former = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


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
    own = [", ".join(bad), f"images {', '.join(map(str, ids))}" if ids else "stored features", str(file)]
    found = [words for words in distributed.gather_objects(own) if words[0]]
    return "; ".join(f"{names} is not finite ({shown}; {file} holds weights and batch)" for names, shown, file in found)
