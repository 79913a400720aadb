"""`scripts/audit.py`: what pip-audit skipped is never called audited. pip-audit itself is a stub here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from environment import ROOT

CLEAN = {"name": "jinja2", "version": "3.1.6", "vulns": []}
WEAK = {
    "name": "jinja2",
    "version": "3.1.2",
    "vulns": [
        {"id": "GHSA-h5c8-rqwp-cp95", "fix_versions": ["3.1.3"], "aliases": ["CVE-2024-22195"], "description": "XSS"},
        {"id": "PYSEC-0", "fix_versions": [], "aliases": [], "description": ""},
    ],
}
SKIPPED = {"name": "torch", "skip_reason": "Dependency not found on PyPI and could not be audited: torch (2.13.0)"}
OWN = {"name": "lit_gpt", "skip_reason": "Dependency not found on PyPI and could not be audited: lit_gpt (0.1.0)"}


def audit(folder: Path, stdout: str, stderr: str = "", status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the script with a `pip_audit` that prints this and ends so."""
    package = folder / "stub/pip_audit"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    program = f"import sys\nprint({stdout!r}, end='')\nprint({stderr!r}, file=sys.stderr)\nsys.exit({status})\n"
    (package / "__main__.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    command = [sys.executable, str(ROOT / "scripts/audit.py")]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


def report(*packages: dict[str, Any]) -> str:
    return json.dumps({"dependencies": packages, "fixes": []})


def test_every_package_looked_up_is_an_audit(tmp_path: Path) -> None:
    done = audit(tmp_path, report(CLEAN, OWN))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "audited: 1 packages were looked up, 0 were not; no known weakness\n"


def test_a_known_weakness_is_named_with_its_fix_even_beside_skipped_packages(tmp_path: Path) -> None:
    done = audit(tmp_path, report(WEAK, SKIPPED), "Found 2 known vulnerabilities in 1 package", status=1)
    assert done.returncode == 1
    assert "jinja2 3.1.2: GHSA-h5c8-rqwp-cp95, fixed in 3.1.3\n" in done.stdout
    assert "jinja2 3.1.2: PYSEC-0, not fixed in any version\n" in done.stdout
    assert "torch: not audited: " in done.stdout
    assert "VULNERABLE: 1 packages" in done.stdout


@pytest.mark.parametrize("packages", [[SKIPPED, OWN], [CLEAN, SKIPPED], [OWN], []])
def test_skipped_packages_are_not_audited_though_pip_audit_ends_with_0(
    tmp_path: Path, packages: list[dict[str, Any]]
) -> None:
    done = audit(tmp_path, report(*packages), "No known vulnerabilities found, 1 skipped")
    assert done.returncode == 3
    assert "NOT AUDITED" in done.stdout
    assert ("torch: not audited: Dependency not found on PyPI" in done.stdout) == (SKIPPED in packages)


@pytest.mark.parametrize("printed", ["", "{}", "[]", '{"dependencies": [1]}', "No known vulnerabilities found"])
def test_no_report_is_not_audited(tmp_path: Path, printed: str) -> None:
    done = audit(tmp_path, printed, "ERROR:pip_audit._cli:the service did not answer", status=1)
    assert done.returncode == 3
    assert done.stdout.startswith("NOT AUDITED: pip-audit ended with status 1: ERROR:pip_audit._cli:the service")
    assert done.stderr == ""


def test_a_file_of_the_current_folder_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "pip_audit.py").write_text("open('was_run', 'w')")
    audit(tmp_path, report(CLEAN))
    assert not (tmp_path / "was_run").exists()
