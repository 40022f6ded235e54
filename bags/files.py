"""Atomic file replacement.

Checkpoints, stores of features and annotation indices have ways of their own, for what they keep beside it.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def replacing(path: Path, mode: str = "w", **settings) -> Iterator[IO]:
    """A temporary file beside `path` that takes its place at the end, and is removed after an error.

    settings: those of `open` (text is UTF-8). The temporary name is unique, so several processes may write one path
    at once: each reader then sees the whole file of one of them.
    """
    temporary = path.with_name(f"{path.name[:40]}.{secrets.token_hex(4)}.tmp")  # a name may have 255 bytes
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
