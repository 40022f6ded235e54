"""Text on terminals that may be hostile, or may not know all characters."""

import io
import sys


def printable(text: object) -> str:
    """The text with control characters, escape sequences and invisible characters as backslash escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def tolerate_any_text() -> None:
    """Print characters that the output's encoding lacks as backslash escapes, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
