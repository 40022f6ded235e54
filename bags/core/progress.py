"""Progress on stderr: a bar on a terminal, and a line every half minute elsewhere."""

import math
import sys
from typing import Any

from tqdm import tqdm

EVERY = 30.0  # seconds between two lines
LINE = "{desc}: {n_fmt}/{total_fmt} ({percentage:.0f} %), {elapsed} so far, {remaining} left, {rate_fmt}{postfix}"


def has_terminal() -> bool:
    """Whether stderr can redraw a line; a notebook can."""
    return "ipykernel" in sys.modules or sys.stderr is None or sys.stderr.isatty()


class Progress(tqdm):
    """A bar of tqdm, with tqdm's arguments; whole lines where stderr is no terminal.

    A line is written every EVERY seconds, and one at the end.
    """

    def __init__(self, *arguments: Any, **settings: Any):
        self.in_lines = not has_terminal()
        if self.in_lines:
            settings |= {"mininterval": EVERY, "maxinterval": EVERY, "miniters": 1, "bar_format": LINE}
            settings |= {"delay": 1e-9}  # no line at the start
        super().__init__(*arguments, **settings)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draw the bar, or write a line."""
        if self.in_lines:
            print(str(self) if msg is None else msg, file=self.fp, flush=True)
        else:
            super().display(msg, pos)

    def clear(self, nolock: bool = False) -> None:
        """Remove the bar from the screen; lines stay."""
        if not self.in_lines:
            super().clear(nolock)

    def close(self) -> None:
        """Finish the bar, or write the last line."""
        if self.in_lines and not self.disable:
            self.display()
            self.delay = math.inf  # tqdm writes nothing more before it is over
        super().close()


def say(message: str) -> None:
    """Write a line to stderr, above a bar if there is one."""
    if has_terminal():
        tqdm.write(message, file=sys.stderr)
    else:
        print(message, file=sys.stderr, flush=True)
