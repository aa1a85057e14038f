"""pyproject.toml agrees with the requirement files."""

import re

import pytest

from common.files import ROOT

tomllib = pytest.importorskip("tomllib")  # Python 3.11

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def requirements(name):
    """The packages of a requirements file, without comments and -r lines."""
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return {line for line in lines if line and not line.startswith("-r")}


def extra(*names):
    """The packages of extras; an extra may name others of this project."""
    own, packages = re.compile(rf"{PROJECT['name']}\[(.+)\]"), set()
    for package in (package for name in names for package in PROJECT["optional-dependencies"][name]):
        match = own.fullmatch(package)
        packages |= extra(*match[1].split(",")) if match else {package}
    return packages


def test_packages_are_those_of_the_requirement_files():
    """But for torch: .venv pins a release that the project's range allows."""
    [torch] = [package for package in requirements("requirements.txt") if package.startswith("torch")]
    release, lowest = (
        tuple(map(int, re.search(r"[\d.]+", package)[0].split(".")))
        for package in (torch, *(p for p in PROJECT["dependencies"] if p.startswith("torch")))
    )
    assert torch.startswith("torch==") and release >= lowest
    core = {torch, *(package for package in PROJECT["dependencies"] if not package.startswith("torch"))}
    assert core | extra("plots") == requirements("requirements.txt")
    assert extra("dev") == requirements("requirements-dev.txt") | extra("plots")
