"""Files that are there as a whole, or as they were before.

Checkpoints, stores of features and annotation indices have ways of their own, for what they keep beside it.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from bags.errors import UserError

PROBLEMS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EFBIG: "the file is larger than the system allows",
    errno.EIO: "the disk has an error",
    errno.EROFS: "the disk is read-only",
}


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
        with naming(path), temporary.open(mode, **settings) as file:
            yield file
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside, a disk that is full or broken is a UserError that names the file: the system does not name it."""
    try:
        yield
    except OSError as error:
        if error.errno in PROBLEMS:
            raise UserError(f"{path}: cannot be written ({write_problem(error)})") from None
        raise


def write_problem(error: BaseException) -> str:
    """Why a file could not be written, in one line. torch's RuntimeErrors are traced to their cause."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    if isinstance(cause, OSError) and cause.errno is not None:
        return f"{PROBLEMS.get(cause.errno, 'the system refuses')}: {os.strerror(cause.errno)}"
    return (str(error).splitlines() or [type(error).__name__])[0]


def write_text(path: Path, text: str) -> None:
    """Writes all of `text`, or nothing."""
    with replacing(path) as file:
        file.write(text)
