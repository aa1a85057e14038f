"""The layout that README draws: every file is there, imports point one way, every script starts."""

import ast
import importlib
import re
import sys
from graphlib import TopologicalSorter

import pytest

from common.files import ROOT

FOLDERS = ("", "core", "common", "metrics", "data", "data/society", "experiments", "bench")
FILES = [
    path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py")) if path.stem != "__init__"
]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}


def imports(path):
    """The project's modules that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & MODULES.keys()


def test_no_two_files_import_each_other():
    graph = {name: imports(path) for name, path in MODULES.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError
    for name in graph:
        allowed = {"common": ("common.",), "core": ("common.", "core.")}.get(name.partition(".")[0], ("",))
        assert all(other.startswith(allowed) for other in graph[name]), name
    assert not any(other.startswith(("metrics.", "experiments.")) for other in graph["train_dpl"])


@pytest.mark.parametrize(
    "name", [name for name in MODULES if name.startswith(("bench.", "experiments.", "data."))]
)
def test_a_script_can_be_imported(name, monkeypatch):
    """Names that moved would be missing in scripts which no test runs."""
    monkeypatch.syspath_prepend(MODULES[name].parent)  # as Python does for a script
    importlib.import_module(name.rpartition(".")[2] if name.startswith("bench.") else name)
    if name.startswith("bench."):
        sys.modules.pop(name.rpartition(".")[2])  # bench/train.py is not experiments' train


def test_readme_draws_the_tree():
    """A reader's own script at the root, which no other file and no test imports, need not be in it."""
    tree = re.search(r"## Reading the code\n.*?```\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    drawn = set(re.findall(r"\w+\.py", tree))
    assert drawn <= {path.name for path in FILES}
    imported = set().union(*map(imports, [*FILES, *(ROOT / "tests").rglob("*.py")]))
    for name, path in MODULES.items():
        if ("." in name or name in imported) and not name.startswith(
            ("experiments.", "bench.", "data.society.")
        ):
            assert path.name in drawn, name
