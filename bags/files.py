"""Files that are there as a whole, or as they were before.

Checkpoints, stores of features and annotation indices have ways of their own, for what they keep beside it.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def replacing(path: Path, mode: str = "w", **settings) -> Iterator[IO]:
    """A file beside `path` that takes its place at the end; after an error it is gone. Settings: those of `open`
    (text is UTF-8).

    Not for two processes that write one path at once.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    if "b" not in mode:
        settings = {"encoding": "utf-8", **settings}
    try:
        with temporary.open(mode, **settings) as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes all of `text`, or nothing."""
    with replacing(path) as file:
        file.write(text)
