"""`make VENV=X`: an environment of someone else is looked at, and never changed."""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

LOG = "pip-was-called"


@pytest.fixture
def project(tmp_path):
    """The Makefile, its script and a requirement that cannot be met, in a folder of their own."""
    (tmp_path / "scripts").mkdir()
    for name in ("Makefile", "scripts/requirements.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "scripts/tables.py").write_text("print('the table')\n")
    (tmp_path / "requirements.txt").write_text("pytest>=1.0  # is there\nno-such-package-at-all>=3.1\npyyaml>=999\n")
    (tmp_path / "requirements-dev.txt").write_text("")
    return tmp_path


def environment(folder):
    """A folder with an interpreter that notes calls of pip, and installs nothing."""
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin/python"
    python.write_text(
        f'#!/bin/sh\nif [ "$2" = pip ]; then echo "$@" >> {folder / LOG}; exit 0; fi\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    return folder


def make(project, *arguments):
    """Run `make table`."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "table", *arguments]
    return subprocess.run(command, cwd=project, env=plain, capture_output=True, text=True, timeout=120)


def files(folder):
    """Names in an environment."""
    return sorted(path.name for path in folder.rglob("*"))


def test_an_environment_of_others_is_not_changed(project):
    """What is missing is named, with what was needed; nothing is installed, and no marker is left."""
    folder = environment(project / "theirs")
    before = files(folder)
    done = make(project, f"VENV={folder}")
    assert done.returncode == 2 and "the table" not in done.stdout
    lacks = "lacks no-such-package-at-all>=3.1 (missing), pyyaml>=999 (has "
    assert lacks in done.stderr and "pytest>=" not in done.stderr and "INSTALL=yes" in done.stderr
    assert files(folder) == before


def test_a_complete_environment_of_others_is_used(project):
    (project / "requirements.txt").write_text("pytest>=1.0\n\n# a remark\npyyaml\n")
    folder = environment(project / "theirs")
    before = files(folder)
    done = make(project, f"VENV={folder}")
    assert done.returncode == 0 and "the table" in done.stdout, done.stderr
    assert files(folder) == before


@pytest.mark.parametrize("how", ["asked", "made by make", "made by an earlier version"])
def test_where_it_may_install(project, how):
    folder = environment(project / "ours")
    (folder / {"made by make": ".bags-made"}.get(how, "other")).touch()
    if how == "made by an earlier version":
        (folder / ".bags-ready").touch()
        os.utime(folder / ".bags-ready", (1, 1))  # before requirements.txt was changed
    done = make(project, f"VENV={folder}", *(["INSTALL=yes"] if how == "asked" else []))
    assert done.returncode == 0 and "the table" in done.stdout, done.stderr
    assert "install --quiet --disable-pip-version-check -r requirements.txt" in (folder / LOG).read_text()


def test_a_folder_that_is_no_environment(project):
    (project / "photos").mkdir()
    done = make(project, f"VENV={project / 'photos'}")
    assert done.returncode == 2 and "photos: is no environment: bin/python is missing" in done.stderr
    assert not files(project / "photos")


def test_versions_are_compared_as_numbers():
    source = importlib.util.spec_from_file_location("requirements", ROOT / "scripts/requirements.py")
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    assert module._numbers("2.11.0+cpu") == [2, 11, 0] > module._numbers("2.9") and module._numbers("odd") == []
    assert module.missing(["", "# only a remark", "pytest"]) == []
