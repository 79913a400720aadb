"""Audit of the installed packages for known weaknesses, by pip-audit: audited, not audited or vulnerable.

python scripts/audit.py [arguments of pip-audit, such as -r requirements.txt]

pip-audit skips each package that its service does not know or does not answer for, and ends with status 0 all the same.
That is no audit. Exit status here: 0 when every package was looked up and none has a known weakness, 1 when one has,
3 when any was not looked up.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

AUDITED, VULNERABLE, NOT_AUDITED = 0, 1, 3
OWN_NAME = "lit-gpt"
"""The project itself is on no index and always skipped: it is not counted. (`pip-audit --strict` would end there.)"""


@dataclass
class Report:
    """The findings of pip-audit: packages that were looked up, skipped ones with the reason, weaknesses by package."""

    audited: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    weaknesses: dict[str, list[str]] = field(default_factory=dict)

    @property
    def status(self) -> int:
        """The exit status: a known weakness counts for more than a package that was skipped."""
        if self.weaknesses:
            return VULNERABLE
        return AUDITED if self.audited and not self.skipped else NOT_AUDITED

    def lines(self) -> list[str]:
        """What is printed, the verdict last."""
        lines = [f"{package}: {text}" for package, texts in sorted(self.weaknesses.items()) for text in texts]
        lines += [f"{package}: not audited: {reason}" for package, reason in sorted(self.skipped.items())]
        counts = f"{len(self.audited)} packages were looked up, {len(self.skipped)} were not"
        if self.status == VULNERABLE:
            return [*lines, f"VULNERABLE: {len(self.weaknesses)} packages have known weaknesses; {counts}"]
        if self.status == NOT_AUDITED:
            return [*lines, f"NOT AUDITED: {counts}"]
        return [*lines, f"audited: {counts}; no known weakness"]


def read_report(text: str) -> Report:
    """The report in pip-audit's JSON.

    Raises:
        ValueError: `text` is not such a report.
    """
    report = Report()
    try:
        for package in json.loads(text)["dependencies"]:
            _add(report, package)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no report of pip-audit: {error!r}") from error
    return report


def _add(report: Report, package: dict[str, object]) -> None:
    name = str(package["name"])
    if re.sub(r"[-_.]+", "-", name).lower() == OWN_NAME:
        return
    if "skip_reason" in package:
        report.skipped[name] = " ".join(str(package["skip_reason"]).split())
        return
    title = f"{name} {package['version']}"
    report.audited.append(title)
    for weakness in package["vulns"]:  # type: ignore[attr-defined]
        fixed = ", ".join(weakness["fix_versions"])
        text = f"{weakness['id']}, " + (f"fixed in {fixed}" if fixed else "not fixed in any version")
        report.weaknesses.setdefault(title, []).append(text)


def main(arguments: Sequence[str]) -> int:
    """Run pip-audit and print what it found; the exit status."""
    # -P: a file of the current folder is never imported as pip_audit.
    command = [sys.executable, "-P", "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        report = read_report(done.stdout)
    except ValueError:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["it printed no report"]
        print(f"NOT AUDITED: pip-audit ended with status {done.returncode}: {said[-1].strip()}")
        return NOT_AUDITED
    print("\n".join(report.lines()))
    return report.status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
