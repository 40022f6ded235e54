"""Atomic file replacement, and reading of regular files only.

Checkpoints, stores of features and annotation indices have ways of their own, for what they keep beside it.
"""

import codecs
import contextlib
import errno
import fcntl
import io
import json
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from bags.core.errors import NotRegular, UserError

PROBLEMS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EFBIG: "the file is larger than the system allows",
    errno.EIO: "the disk has an error",
    errno.EROFS: "the disk is read-only",
}

MARKS = {  # first bytes -> what a file is that is not UTF-8 text, and how to mend it
    b"\x1f\x8b": "is compressed by gzip: unpack it with gunzip",
    b"BZh": "is compressed by bzip2: unpack it with bunzip2",
    b"\xfd7zXZ": "is compressed by xz: unpack it with unxz",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd: unpack it with unzstd",
    b"PK\x03\x04": "is a zip archive: unpack it with unzip",
    codecs.BOM_UTF8 * 2: "begins with two byte order marks: save it as UTF-8 without any",
    codecs.BOM_UTF32_LE: "is UTF-32 text: save it as UTF-8",  # begins like UTF-16, which comes later
    codecs.BOM_UTF32_BE: "is UTF-32 text: save it as UTF-8",
    codecs.BOM_UTF16_LE: "is UTF-16 text: save it as UTF-8",
    codecs.BOM_UTF16_BE: "is UTF-16 text: save it as UTF-8",
}


def encoding_problem(content: bytes) -> str | None:
    """Say what a file is, and how to mend it, where it is not UTF-8 text but compressed or in another encoding.

    Wide characters without a byte order mark are told by the zeros beside the first one.
    """
    for mark, problem in MARKS.items():
        if content.startswith(mark):
            return problem
    zeros = "".join(str(int(byte == 0)) for byte in content[:4])
    wide = {
        "0111": codecs.BOM_UTF32_LE,
        "1110": codecs.BOM_UTF32_BE,
        "0101": codecs.BOM_UTF16_LE,
        "1010": codecs.BOM_UTF16_BE,
    }
    return MARKS.get(wide.get(zeros, b""))


def decode(path: str | Path, content: bytes) -> str:
    """Decode the content of a UTF-8 file, with or without a byte order mark. Raises UserError for anything else."""
    if problem := encoding_problem(content):
        raise UserError(f"{path}: {problem}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8") from None


def open_regular(path: str | Path) -> io.BufferedReader:
    """Open a regular file for reading, in binary mode. Symbolic links are followed.

    A pipe, a socket or a device raises OSError, because reading it can wait for ever; a folder raises
    IsADirectoryError, and a missing file FileNotFoundError.
    """
    return open(path, "rb", opener=_open_without_waiting)


def _open_without_waiting(path: str, flags: int) -> int:
    """The descriptor of a regular file or folder; for a pipe, plain `os.open` waits for its writer."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        os.close(descriptor)
        raise NotRegular(errno.EINVAL, "Not a regular file", path)
    return descriptor


def read_bytes(path: str | Path) -> bytes:
    """The content of a regular file; errors are those of `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def read_text(path: str | Path, errors: str = "strict") -> str:
    """The content of a regular UTF-8 file, with \\n at line ends. Other encodings raise UnicodeDecodeError."""
    text = read_bytes(path).decode(errors=errors)
    return text.replace("\r\n", "\n").replace("\r", "\n")


@contextlib.contextmanager
def replacing(path: Path, mode: str = "w", **settings: Any) -> Iterator[IO]:
    """A temporary file beside `path` that takes its place at the end, and is removed after an error.

    settings: those of `open` (text is UTF-8). The temporary name is unique, so several processes may write one path
    at once: each reader then sees the whole file of one of them. Of a symbolic link, the file that it leads to is
    replaced. A folder, pipe, socket or device in the file's place raises OSError.
    """
    path = _replaceable(path)
    temporary = path.with_name(f"{path.name[:40]}.{secrets.token_hex(4)}.tmp")  # a name may have 255 bytes
    if "b" not in mode:
        settings = {"encoding": "utf-8", **settings}
    try:
        with naming(path), temporary.open(mode, **settings) as file:
            yield file
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _replaceable(path: Path) -> Path:
    """Follow links to the file that may be replaced, or made. Raises OSError for anything else."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return Path(os.path.realpath(path)) if path.is_symlink() else path
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise NotRegular(errno.EINVAL, "Not a regular file", str(path))
    return Path(os.path.realpath(path)) if path.is_symlink() else path


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


class JsonList:
    """A JSON list that is written as its entries come: after each `extend` the file holds all of them so far.

    A process that is killed therefore loses nothing. What the file held before stays until the first `extend`. One
    process at a time can write a file; for a second one the constructor raises BlockingIOError. A context manager.
    """

    def __init__(self, path: Path):
        self.path, self.end = path, 0  # where the next entry goes
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.descriptor)
            raise
        except OSError:
            pass  # a file system without locks

    def __enter__(self) -> "JsonList":
        return self

    def __exit__(self, *_: object) -> None:
        if not os.fstat(self.descriptor).st_size:
            self.path.unlink(missing_ok=True)
        os.close(self.descriptor)

    def extend(self, entries: Iterable[dict]) -> None:
        """Append entries. Raises OSError where the disk is full; the file then holds the entries before."""
        lines = ",\n".join(map(json.dumps, entries))
        text = ((",\n" if self.end else "[\n") + lines).encode() if lines else b""
        try:
            if not self.end:
                os.ftruncate(self.descriptor, 0)
            self._write(text)
        except OSError:
            os.ftruncate(self.descriptor, self.end)
            self._write(b"")
            raise
        self.end += len(text)

    def _write(self, text: bytes) -> None:
        """Write `text` at the end of the entries, and close the list."""
        at, text = self.end, text + (b"\n]\n" if self.end or text else b"[]\n")
        while text:
            written = os.pwrite(self.descriptor, text, at)
            at, text = at + written, text[written:]
