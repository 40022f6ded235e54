"""Says what of a requirements file an environment lacks; installs nothing.

    python scripts/requirements.py requirements.txt

`make VENV=X` runs it where X is an environment that make has not made. The exit code is 2 if anything is missing or
too old.
"""

import importlib.metadata
import re
import sys
from pathlib import Path


def missing(lines: list[str]) -> list[str]:
    """The requirements, of the form NAME or NAME>=VERSION, that this environment does not meet, and why."""
    problems = []
    for line in lines:
        match = re.fullmatch(r"([\w.-]+)(?:>=([\d.]+))?", line.split("#")[0].strip())
        if match is None:
            continue  # an empty line
        name, least = match.groups()
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{match[0]} (missing)")
            continue
        if least and _numbers(version) < _numbers(least):
            problems.append(f"{match[0]} (has {version})")
    return problems


def _numbers(version: str) -> list[int]:
    """The release of a version, as numbers that can be compared: 2.11.0+cpu is [2, 11, 0]."""
    release = re.match(r"[\d.]*", version)
    return [int(part) for part in (release[0] if release else "").split(".") if part]


def main() -> None:
    """Check one file; the environment is that of the interpreter."""
    file = Path(sys.argv[1])
    problems = missing(file.read_text().splitlines())
    if problems:
        print(
            f"{sys.prefix}: lacks {', '.join(problems)} of {file}. Make has not made this environment and leaves it as "
            "it is: install them yourself, or add INSTALL=yes",
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
