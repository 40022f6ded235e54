"""Errors that a user can mend, and the ways in which a script ends."""

import contextlib
import errno
import itertools
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from bags.core.terminal import printable, tolerate_any_text

STOPPED = 75  # exit code (EX_TEMPFAIL) of a run that was asked to stop or lost a rank: the same command goes on
REPEATED = 1.0  # seconds in which a signal counts as the first one again: launchers and process groups both send it
PATIENCE = 2.0  # seconds that a rank's message waits for that of its node's first one


class UserError(ValueError):
    """Bad input. The message is one line that names the file, the key or id, and the remedy.

    Scripts print it to stderr and exit with code 2; a library user catches it as a ValueError.
    """


class UnreadableImage(UserError):
    """An image file that is missing, damaged or of another size than its annotations say."""


class Stopped(Exception):
    """A signal asked training to stop, and everything done is saved. Scripts exit with code 75."""


class LostRank(RuntimeError):
    """Another rank of the process group has ended. Scripts exit with code 75."""


def one_line(error: Exception) -> str:
    """The words of an error in one line. Python's words about its limit of digits are replaced."""
    text = " ".join(str(error).split())
    return "a number of thousands of digits" if "set_int_max_str_digits" in text else text


def run_script(main: Callable[[], None], again: str = "starts over") -> None:
    """Runs a script's `main`; a UserError or OSError becomes one line on stderr and exit code 2.

    again: what the same command does after it was stopped, for messages.
    Codes: 0 done, 2 a user's mistake, 75 stopped by a signal in training or by the loss of a rank, 130 stopped by
    Ctrl-C elsewhere, 141 the reader of the output has ended, 143 or 130 ended at once by a second SIGTERM or Ctrl-C.
    Under torchrun an error that all ranks have is printed once for each node, and torchrun adds its own report and
    exit code.
    """
    tolerate_any_text()
    with _second_signal_ends():
        _run(main, f"the same command {again}")


def _run(main: Callable[[], None], again: str) -> None:
    """Run `main`; turn errors into a line and an exit code."""
    try:
        _refuse_empty(sys.argv)
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        _end(f"\nstopped; {again}", 130)
    except Stopped as stop:
        if not int(os.environ.get("LOCAL_RANK", 0)):  # all ranks have stopped
            print(stop, file=sys.stderr)
        sys.exit(STOPPED)
    except LostRank as lost:
        _end(f"{lost}; {again}", STOPPED)
    except UserError as error:
        _end(f"error: {printable(one_line(error))}", 2)
    except (RuntimeError, MemoryError, ImportError) as error:  # torch raises it wherever the main process is then
        text = one_line(error).rstrip(".")
        if isinstance(error, ModuleNotFoundError) and error.name:
            mend = "activate the environment (source .venv/bin/activate), or pip install -r requirements.txt"
            _end(f"error: the package {error.name.partition('.')[0]} is not installed for {sys.executable}: {mend}", 2)
        if type(error).__name__ == "OutOfMemoryError":
            mend = "train.accumulate=2 (and another output=) takes half a batch at a time, test.batch_size=1 one image"
            _end(f"error: the GPU's memory is full: {mend}. {text}", 2)
        if line := _exhausted(error, again):
            _end(f"error: {line}", 2)
        if "DataLoader worker" in text:
            mend = "is the memory or /dev/shm full, or too many files open (ulimit -n)? Fewer data.workers need less"
            _end(f"error: a loader process has ended ({text}): {mend}; {again}", 2)
        if "does not have a deterministic implementation" in text:
            _end(f"error: --deterministic: {text.partition(' does not')[0]} is not deterministic here: leave it out", 2)
        raise
    except BrokenPipeError:  # what read the output, `head` say, has ended: as other commands, without a word
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:  # a folder where a file should be, no permission, a full disk
        _end(f"error: {_exhausted(error, again) or printable(system_error(error))}", 2)


def _refuse_empty(arguments: list[str]) -> None:
    """Raise UserError for an argument, or the value of an option, that is blank. `key=` is an override, and is null."""
    for number, (before, word) in enumerate(itertools.pairwise(arguments), start=1):
        option = re.fullmatch(r"(--[\w-]+)=\s*", word)
        if not word.strip() or option:
            name = option[1] if option else f"argument {number}" + f", after {before}" * (number > 1)
            raise UserError(f"{name}: expected a value, got an empty text; is a shell variable not set?")


MEND = {  # error of the system -> what is wrong with the path, and how to mend it
    errno.ENOENT: "no such file or folder; check the path",
    errno.EISDIR: "is a folder, expected a file; choose another path",
    errno.ENOTDIR: "leads through a file, expected a folder; choose another path",
    errno.EACCES: "may not be opened; change its permissions, or choose another path",
    errno.EPERM: "may not be changed; change its permissions, or choose another path",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.ELOOP: "is a link that leads back to itself; remove it, or choose another path",
}


class NotRegular(OSError):
    """A pipe, a socket or a device in place of a file."""


def system_error(error: OSError, path: str | os.PathLike | None = None) -> str:
    """One line for an error of the system: the path, what is wrong with it, and how to mend it.

    path: of the file that was read, for errors that do not name it.
    """
    second = error.filename2 is not None and error.errno != errno.ENOENT  # a missing file is the first of two
    named = error.filename2 if second else error.filename
    where = os.fspath(named) if isinstance(named, str | os.PathLike) else path and os.fspath(path)
    if not isinstance(where, str):
        return str(error)
    shown = where if len(where) <= 500 else f"...{where[-200:]}"
    if isinstance(error, NotRegular):
        return f"{shown}: not a regular file; choose another path"
    if error.errno in (errno.EACCES, errno.EPERM) and not os.path.lexists(where):
        folder = os.path.dirname(where) or "."
        return f"{folder}: this folder may not be written; change its permissions, or choose another path"
    return f"{shown}: {MEND.get(error.errno or 0) or f'the system refuses it ({error.strerror})'}"


@contextlib.contextmanager
def _second_signal_ends() -> Iterator[None]:
    """End this process when SIGTERM or SIGINT comes again, more than REPEATED seconds after the first time.

    Handlers in Python run only between two instructions of the main thread, which may wait in native code for ever.
    Python also writes each signal that has such a handler to a pipe, which a thread reads. After the block, while the
    interpreter ends, only a SIGTERM that comes later than REPEATED seconds has an effect.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main one may ask for signals
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    former = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget_pipe)
    threading.Thread(target=_watch, args=(reader,), name="second signal", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(former)
        os.close(writer)
        last = time.monotonic() + REPEATED
        signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM) if time.monotonic() > last else None)


def _forget_pipe() -> None:
    """Signals of a forked process are not those of its parent."""
    with contextlib.suppress(ValueError):  # not in its main thread
        signal.set_wakeup_fd(-1)


def _watch(reader: int) -> None:
    """Read signals from a pipe."""
    first = None
    while signals := os.read(reader, 1):
        number, now = signals[0], time.monotonic()
        if number not in (signal.SIGTERM, signal.SIGINT):
            continue
        first = first or now
        if now - first > REPEATED:
            os.write(2, f"ended by a second {signal.Signals(number).name}\n".encode())
            os._exit(128 + number)
    os.close(reader)


EXHAUSTED = {  # what is full -> (words of an error that says so, what to do)
    "too many files are open": (
        ("Too many open files", "ancdata"),
        "`ulimit -n 4096` allows more, data.workers=0 needs fewer",
    ),
    "the shared memory of loader processes is full": (
        ("shared memory", "Bus error"),
        "docker run --shm-size=2g gives /dev/shm more, data.workers=0 needs none",
    ),
    "the memory is full": (
        ("DefaultCPUAllocator", "MemoryError", "bad_alloc", "allocate memory", "start new thread", "map segment"),
        "smaller batches (train.accumulate=2 and another output=, test.batch_size=1), smaller images "
        "(detector.max_size; predict.py --max-size) and fewer data.workers need less",
    ),
}


def _exhausted(error: Exception, again: str) -> str | None:
    """One line for an error of the machine: what is full, what to do, and the last line of torch's own words."""
    text = f"{type(error).__name__}: {error}"
    for what, (words, mend) in EXHAUSTED.items():
        if any(word in text for word in words):
            last = text.strip().splitlines()[-1]
            return f"{what}: {mend}; {again} ({last:.300})"
    return None


def _end(message: str, code: int) -> None:
    """Prints and exits. torchrun ends the other ranks when one has: those that wait then have nothing to add.

    torch raises an error wherever this process is when one of a loader's processes dies; that is over now.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if int(os.environ.get("LOCAL_RANK", 0)):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(PATIENCE)
    print(message, file=sys.stderr, flush=True)
    sys.exit(code)
