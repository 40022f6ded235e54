"""A lock of a folder: only one command at a time works in it.

The lock is a POSIX record lock on the file `.lock` in the folder. The operating system frees it when its process
ends in any way, it works on shared file systems, and the file may stay behind: only the lock counts. The file is
never removed, since another process may be opening it. Its text says who holds the lock.

A process loses such a lock when it closes the file anywhere else, so nothing but this module opens the file.
"""

import contextlib
import datetime
import errno
import fcntl
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bags.core.errors import UserError

NAME = ".lock"
HELD = (errno.EACCES, errno.EAGAIN)  # what the system answers where another process has the lock
INTERVAL = 0.2  # seconds between two tries of a process that waits
ATTEMPTS = 100  # at a folder that is renamed or removed while its lock is being taken

_held: dict[tuple[int, str], int] = {}  # (process, folder) -> file descriptor; a fork inherits no lock
_guard = threading.Lock()


def take(folder: Path) -> str | None:
    """Lock a folder, which is made if need be. Returns None, or who holds the lock if that is somebody else.

    Raises UserError for a folder that cannot be written. Where the file system has no locks, a warning is printed
    and the command continues without one.
    """
    with _guard:
        for _ in range(ATTEMPTS):
            key = os.getpid(), os.path.realpath(folder)
            if key in _held:
                return f"this process ({os.getpid()}) itself"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                file = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # the folder was renamed or removed just now
                continue
            except OSError as error:
                raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from None
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = _read(file)
                os.close(file)
                if error.errno in HELD:
                    return holder
                print(
                    f"warning: {folder}: this file system has no locks ({error.strerror}): start no second command "
                    "in this folder",
                    file=sys.stderr,
                )
                return None
            if _is_current(file, folder / NAME):
                _write(file)
                _held[key] = file
                return None
            os.close(file)
    raise UserError(f"{folder}: is removed again and again while its lock is taken: choose another folder")


def release(folder: Path) -> None:
    """Free a folder's lock, if this process has it."""
    with _guard:
        file = _held.pop((os.getpid(), os.path.realpath(folder)), None)
        if file is not None:
            os.close(file)


@contextlib.contextmanager
def alone(folder: Path, mend: str) -> Iterator[None]:
    """Hold the lock of a folder inside the block. Raises UserError, see `refusal`, where another command has it."""
    if holder := take(folder):
        raise refusal(folder, holder, mend)
    try:
        yield
    finally:
        release(folder)


@contextlib.contextmanager
def waiting(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder inside the block; wait for another process, and say so once."""
    told = False
    while holder := take(folder):
        if not told:
            print(f"note: {folder}: {holder} works in it: waiting for it", file=sys.stderr)
        told = True
        time.sleep(INTERVAL)
    try:
        yield
    finally:
        release(folder)


def refusal(folder: Path, holder: str, mend: str) -> UserError:
    """The error of a command that finds the folder locked. mend: what to do instead of waiting."""
    return UserError(f"{folder}: {holder} works in it; wait for it, or {mend}")


def _is_current(file: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _write(file: int) -> None:
    """Write who holds the lock. A full disk changes nothing about the lock itself."""
    since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    command = Path(sys.argv[0]).name or "python"
    text = f"{command} (pid {os.getpid()} on host {socket.gethostname()}, since {since})\n"
    with contextlib.suppress(OSError):
        os.ftruncate(file, 0)
        os.pwrite(file, text.encode(errors="replace"), 0)


def _read(file: int) -> str:
    """Who holds the lock, as far as the file says so."""
    with contextlib.suppress(OSError):
        text = os.pread(file, 500, 0).decode(errors="replace").partition("\n")[0]
        return "".join(c for c in text if c.isprintable()) or "another process"
    return "another process"
