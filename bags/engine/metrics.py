"""Numbers of a run: JSON lines on disk, a progress bar on screen."""

import json
from pathlib import Path


class JsonLog:
    """`log.jsonl`: one object per logged step and per result. Written by one process."""

    def __init__(self, path: Path, first_iteration: int = 0):
        """Keeps the steps before `first_iteration`; later ones will be run, and written, again."""
        kept = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                if json.loads(line).get("iteration", -1) < first_iteration:
                    kept.append(line + "\n")
            except json.JSONDecodeError:
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


class Smoothed:
    """Exponential moving average of a named set of numbers."""

    def __init__(self, decay: float = 0.7):
        self.decay, self.values = decay, {}

    def update(self, values: dict[str, float]) -> dict[str, float]:
        """Takes in new values, gives the averages."""
        for key, value in values.items():
            old = self.values.get(key, value)
            self.values[key] = self.decay * old + (1 - self.decay) * value
        return self.values
