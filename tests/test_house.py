"""Rules for the code: imports point down, files stay short, and docs/architecture.md shows both."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [path for folder in ("bags", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]

# A package may import from the packages and modules listed for it, and from itself.
ALLOWED = {
    "cli": {"jobs", "analysis", "assembly", "evaluation", "engine", "detectors", "data", "config", "core"},
    "jobs": {"analysis", "assembly", "evaluation", "engine", "detectors", "classifiers.base", "data", "config", "core"},
    "assembly": {"engine", "detectors", "evaluation", "data", "config", "classifiers", "core"},
    "analysis": {"evaluation", "config", "data.statistics", "core"},
    "evaluation": {"data.json_files", "data.packing", "data.statistics", "core"},
    "engine": {"config", "data", "classifiers.base", "core"},
    "detectors": {"classifiers.base", "core"},
    "data": {"core"},
    "config": {"classifiers", "core"},
    "classifiers": {"core"},
    "core": set(),
    "__init__": {"classifiers"},
}


def module_imports(path: Path, package: str = "bags") -> set[str]:
    """Dotted names below `bags`, or another package of this project, that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{package}.{a.name}" for a in node.names} if node.module == package else {node.module}
    return {name.removeprefix(f"{package}.") for name in found if name.startswith(f"{package}.")}


@pytest.mark.parametrize("path", sorted((ROOT / "bags").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    """Each package knows only those below it."""
    package = path.relative_to(ROOT / "bags").parts[0].removesuffix(".py")
    for name in module_imports(path):
        inside = name.split(".")[0] == package
        allowed = any(name == target or name.startswith(f"{target}.") for target in ALLOWED[package])
        assert inside or allowed, f"{path.name} imports bags.{name}, which is not below {package}"


def test_the_architecture_page_states_the_allowed_imports():
    """In its table of packages: names in code quotes, or everything below; a name after "but" is excepted."""
    page = (ROOT / "docs/architecture.md").read_text()
    rows = re.findall(r"^\| `bags/(\w+)\S*` \|.*\| ([^|]+) \|$", page, re.M)
    shown = {}
    for number, (package, words) in enumerate(rows):
        allowed = {below for below, _ in rows[number + 1 :]} if "everything below" in words else set()
        allowed -= set(re.findall(r"but `(\S+?)`", words))
        shown[package] = allowed | set(re.findall(r"(?<!but )`(\S+?)`", words))
    assert shown == ALLOWED


def test_the_architecture_page_has_a_line_for_each_file():
    """In the tree: the modules of the package, the scripts and the notebooks, each once; not an empty __init__.py."""
    tree = re.search(r"```\n(bags/\n.*?)```", (ROOT / "docs/architecture.md").read_text(), re.S)
    listed, folder = [], ""
    for line in tree[1].splitlines():
        if not line.startswith(" "):
            folder = line.split()[0]
        elif name := re.match(r"  (\S+\.(py|ipynb))\s+\S", line):
            listed.append(folder + name[1])
    modules = [path for path in (ROOT / "bags").rglob("*.py") if path.stat().st_size]
    files = [*modules, *(ROOT / "scripts").glob("*.py"), *(ROOT / "notebooks").glob("*.ipynb")]
    assert sorted(listed) == sorted(path.relative_to(ROOT).as_posix() for path in files)


@pytest.mark.parametrize("package", ["bags", "scripts"])
def test_no_import_circle_between_files(package):
    """Files import each other in one direction."""
    folder = ROOT / package
    files = {".".join(p.relative_to(folder).with_suffix("").parts): p for p in folder.rglob("*.py")}
    graph = {name: module_imports(path, package) & files.keys() for name, path in files.items()}
    while graph:
        free = [name for name, targets in graph.items() if not targets & graph.keys()]
        assert free, f"import circle among {sorted(graph)}"
        graph = {name: targets for name, targets in graph.items() if name not in free}


def test_only_the_list_of_classifiers_names_one():
    """The one interface: no file outside `classifiers` refers to a particular classifier's module."""
    for path in (ROOT / "bags").rglob("*.py"):
        particular = [n for n in module_imports(path) if n.startswith("classifiers.") and n != "classifiers.base"]
        assert path.parent.name == "classifiers" or not particular, f"{path}: {particular}"


def test_files_stay_short():
    """No file of the package or of the scripts has 400 lines."""
    lengths = {path: len(path.read_text().splitlines()) for path in SOURCES}
    longest = max(lengths, key=lengths.get)
    assert lengths[longest] < 400, f"{longest}: {lengths[longest]} lines"


def test_functions_stay_short():
    """No function of the package or of the scripts has 60 lines."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno + 1 < 60, f"{path}: {node.name}"


def test_the_formatter_is_never_switched_off():
    """A statement that it would spread out too far is split instead."""
    marks = [f"# fmt: {word}" for word in ("skip", "off")]
    for folder in ("bags", "scripts", "tests", "notebooks"):
        for path in (p for kind in ("*.py", "*.ipynb") for p in (ROOT / folder).rglob(kind)):
            assert not any(mark in path.read_text(encoding="utf-8") for mark in marks), path


def test_scripts_import_only_parts():
    """A script imports its folder of parts, and no other script; a job that others need lives in `bags.jobs`.

    The checks of a GPU also use parts of the benchmarks.
    """
    parts = {"benchmark": {"benchmarks"}, "check_gpu": {"gpu_checks"}}
    parts |= {"benchmarks": {"benchmarks"}, "gpu_checks": {"gpu_checks", "benchmarks"}}  # of each other
    for path in SOURCES:
        folder = path.parent.name
        allowed = parts.get(path.stem if folder == "scripts" else folder, set())
        names = {name for name in module_imports(path, "scripts") if name.split(".")[0] not in allowed}
        assert not names, f"{path}: {names}"


def test_scoring_needs_no_torch():
    """`import bags` and `bags.evaluate` leave torch alone."""
    code = "import bags, sys; bags.evaluate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_one_version():
    """The package, the citation and the newest entry of the changelog."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)[1].strip("\"'") == version
    assert re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == version


def test_public_calls_exist():
    """Every public name can be loaded."""
    import bags

    for name in bags.__all__:
        assert callable(getattr(bags, name))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = bags.nonsense


def test_no_merge_is_left_half_done():
    marks = re.compile(r"^(<{7} |>{7} |={7}$)", re.M)
    folders = [
        *ROOT.glob("*"),
        *(path for name in ("bags", "scripts", "configs", "docs", "tests") for path in (ROOT / name).rglob("*")),
    ]
    texts = [
        path for path in folders if path.suffix in (".py", ".md", ".yaml", ".toml", ".txt") or path.name == "Makefile"
    ]
    assert len(texts) > 200 and not [path for path in texts if path.is_file() and marks.search(path.read_text())]
