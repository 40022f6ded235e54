"""Numbers of a run: JSON lines on disk, a progress bar on screen."""

import json
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

from bags import distributed
from bags.errors import UserError
from bags.sections import TrainConfig


class JsonLog:
    """`log.jsonl`: one object per logged step and per result. Written by one process."""

    def __init__(self, path: Path, first_iteration: int = 0):
        """Keeps the steps before `first_iteration`; later ones will be run, and written, again."""
        kept, self.last = [], {}
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                values = json.loads(line)
                if values["iteration"] < first_iteration:
                    kept.append(line + "\n")
                    self.last = values
            except (ValueError, TypeError, KeyError):
                continue  # the last line of a killed run
        path.write_text("".join(kept))
        self.file = path.open("a", buffering=1)

    def write(self, **values) -> None:
        """Appends one object; floats are rounded to 6 significant digits."""
        plain = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
        self.file.write(json.dumps(plain) + "\n")

    def close(self) -> None:
        """Closes the file."""
        self.file.close()


class Clock:
    """Seconds spent inside `with clock:`, on the GPU where the device is one; nothing waits before it is asked."""

    def __init__(self):
        self.total, self.pairs, self.device = 0.0, [], torch.device("cpu")

    def __enter__(self) -> None:
        self.started = self._now()

    def __exit__(self, *_) -> None:
        if self.device.type == "cuda":
            self.pairs.append((self.started, self._now()))
        else:
            self.total += self._now() - self.started

    def _now(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """So far."""
        for start, end in self.pairs:
            end.synchronize()
            self.total += start.elapsed_time(end) / 1000
        self.pairs.clear()
        return self.total


class Monitor:
    """Follows one run: averages losses over ranks, logs them, moves the bar, stops at a loss that is not finite."""

    def __init__(
        self,
        folder: Path,
        title: str,
        config: TrainConfig,
        done: int,
        total: int,
        bar: bool = True,
        clock: Clock | None = None,
    ):
        """`done` and `total` count iterations; bar: whether this run has one (in the main process).

        clock: of the run's own steps; its seconds are logged, on top of those logged before.
        """
        self.title, self.config, self.total, self.clock = title, config, total, clock or Clock()
        main, images = distributed.is_main(), config.batch_size
        self.log = JsonLog(folder / "log.jsonl", done) if main else None
        self.clock.total += self.log.last.get("seconds", 0.0) if main else 0.0
        self.bar = tqdm(
            total=total * images,
            initial=done * images,
            desc=title,
            unit="image",
            disable=not (main and bar),
            smoothing=0.05,
        )
        self.smoothed_loss = None
        self.last_time, self.last_steps = time.perf_counter(), done

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
        if self.log:
            self.log.close()

    def step(
        self, iteration: int, epoch: float, losses: dict[str, torch.Tensor], lr: float, check: bool = False
    ) -> None:
        """Takes in one iteration, and the epochs done with it; every `log_every`-th is logged.

        `check` looks at the losses in any case. Raises UserError, on all ranks, for a loss that is not finite.
        """
        steps = iteration + 1
        self.bar.update(self.config.batch_size)
        logs = steps % self.config.log_every == 0 or steps == self.total
        if not (logs or check):
            return
        values = distributed.average({"loss": sum(losses.values()), **losses})
        bad = [name for name, value in values.items() if name != "loss" and not math.isfinite(value)]
        if bad:
            raise UserError(
                f"{self.title}: iteration {steps}: {', '.join(bad)} is not finite: lower train.lr (now {lr:g}) "
                "or train.clip_norm"
            )
        if logs and self.log:
            now = time.perf_counter()
            rate = (steps - self.last_steps) * self.config.batch_size / (now - self.last_time)
            self.last_time, self.last_steps = now, steps
            spent = self.clock.seconds()
            self.log.write(iteration=iteration, epoch=epoch, lr=lr, images_per_s=rate, seconds=spent, **values)
            old = values["loss"] if self.smoothed_loss is None else self.smoothed_loss
            self.smoothed_loss = 0.7 * old + 0.3 * values["loss"]
            self.bar.set_postfix_str(f"loss {self.smoothed_loss:.3f} lr {lr:.2g}", refresh=False)
