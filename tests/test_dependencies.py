"""Imports are declared in `pyproject.toml`, and `requirements.lock` is in step with it. Checked without a network."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from typing import Any, NamedTuple

import pytest
from environment import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
LOCK = (ROOT / "requirements.lock").read_text("utf-8")

PARTS_OF_OTHERS = {"pydantic-core": "pydantic", "aiohttp": "fsspec"}
"""Distributions that are parts of a declared one: pydantic's core, the transport of fsspec[http]."""

REMEDY = "make requirements.lock anew (CONTRIBUTING.md)"


IMPORT = re.compile(r"^[ \t]*(?:import (\w+)|from (\w+)[\w.]* import )", re.MULTILINE)
"""A statement; each imports from one module, and those in the texts of programs that are started count, too."""


class Wanted(NamedTuple):
    """One requirement of the project, and the extra that it belongs to."""

    name: str
    extras: frozenset[str]
    specifier: SpecifierSet
    marker: str


def in_project() -> Iterator[Wanted]:
    groups = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    for extra, lines in groups.items():
        for line in lines:
            requirement = Requirement(line)
            assert requirement.marker is None, "the comparison below knows no markers but extras"
            marker = f"extra == '{extra}'" if extra else ""
            yield Wanted(
                canonicalize_name(requirement.name), frozenset(requirement.extras), requirement.specifier, marker
            )


def in_lock() -> Iterator[tuple[str, str, list[str]]]:
    """(name, version, hashes) of each entry."""
    entries = LOCK.replace("\\\n", " ").splitlines()
    for entry in entries:
        if entry and not entry.lstrip().startswith("#"):
            requirement, *hashes = entry.split(" --hash=")
            name, version = requirement.partition(";")[0].strip().split("==")
            yield canonicalize_name(name), version, [text.strip() for text in hashes]


def imported_modules() -> Iterator[str]:
    """Top-level modules that the package imports, anywhere in a file."""
    for path in (ROOT / "lit_gpt").rglob("*.py"):
        for statement in IMPORT.finditer(path.read_text("utf-8")):
            yield statement[1] or statement[2]


@pytest.mark.slow
def test_each_import_of_the_package_is_a_declared_dependency() -> None:
    """What only comes with another package may stop to come with its next version."""
    declared = {wanted.name for wanted in in_project() if "test" not in wanted.marker}
    distributions = packages_distributions()
    missing = set()
    for module in set(imported_modules()) - sys.stdlib_module_names - {"lit_gpt"}:
        names = {canonicalize_name(name) for name in distributions.get(module, [module])}
        if not declared & (names | {PARTS_OF_OTHERS.get(name, "") for name in names}):
            missing.add(module)
    assert missing == set()


def test_each_requirement_has_a_locked_version_that_it_admits() -> None:
    versions: dict[str, list[str]] = {}
    for name, version, _ in in_lock():
        versions.setdefault(name, []).append(version)
    for wanted in in_project():
        if wanted.name == canonicalize_name(PROJECT["name"]):
            continue
        assert versions.get(wanted.name), (wanted.name, REMEDY)
        assert all(wanted.specifier.contains(version) for version in versions[wanted.name]), (wanted, REMEDY)


def test_the_lock_can_be_used_on_any_machine() -> None:
    """Every entry has hashes, and none says where the files are: behind a mirror that is another place."""
    assert "://" not in LOCK and "--index" not in LOCK and "--find-links" not in LOCK
    entries = list(in_lock())
    assert len(entries) > 100
    for name, version, hashes in entries:
        assert hashes and all(text.startswith("sha256:") and len(text) == 71 for text in hashes), (name, version)
