"""Torture of the whole program: kills, full disks, damage, abused servers, two at once; a table of what was lost.

    python scripts/torture.py --minutes 65                     all sections, the time shared out between them
    python scripts/torture.py fit prepare --minutes 20         two of them
    python scripts/torture.py --short                          a few trials of each, as the tests make them
    python scripts/torture.py damage --seed 7 --trial 1234     one trial again

Every trial has random numbers of its own, made from the seed, the section and its number. Fault points repeat
exactly; times at which a process is killed repeat as far as the machine is as fast. Progress goes to stderr, the table
to stdout as Markdown; the status is 1 if anything was lost or wrong.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), *(str(ROOT / "tests" / part) for part in ("", "inference"))]
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}  # no thread may fork

from torture_sections.children import end_all, import_everything  # noqa: E402
from torture_sections.damage import DamageSection  # noqa: E402
from torture_sections.disk_full import DiskFullSection  # noqa: E402
from torture_sections.fit import FitSection  # noqa: E402
from torture_sections.kernels import KernelsSection  # noqa: E402
from torture_sections.prepare import PrepareSection  # noqa: E402
from torture_sections.results import ResultsSection  # noqa: E402
from torture_sections.section import Section, Tally  # noqa: E402
from torture_sections.server import ServerSection  # noqa: E402
from torture_sections.two_at_once import TwoAtOnceSection  # noqa: E402

SECTIONS: dict[str, type[Section]] = {
    kind.name: kind
    for kind in (
        FitSection,
        PrepareSection,
        ResultsSection,
        DiskFullSection,
        DamageSection,
        TwoAtOnceSection,
        KernelsSection,
        ServerSection,
    )
}
NOTE_SECONDS = 15.0
"""Between two lines of progress."""
MOST_WRONG = 50
"""After which a section is given up."""


def parse(argv: list[str]) -> argparse.Namespace:
    """The options."""
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all if none is named")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all of them together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="a fixed small number of trials of each, in a minute")
    parser.add_argument("--trial", type=int, help="only the trial of this number, of one section")
    options = parser.parse_args(argv)
    unknown = [name for name in options.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"unknown sections: {', '.join(unknown)}; known are {', '.join(SECTIONS)}")
    options.sections = [name for name in SECTIONS if name in options.sections or not options.sections]
    if options.trial is not None and len(options.sections) != 1:
        parser.error("--trial repeats a trial of one section: name it")
    return options


def note(text: str) -> None:
    """A line of progress."""
    print(f"torture: {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def torture(kind: type[Section], root: Path, seconds: float, options: argparse.Namespace) -> list[Tally]:
    """All trials of a section.

    Args:
        kind: of section.
        root: folder that all sections share.
        seconds: that it has; it may take longer to have enough, and for its last trial.
        options: of the command line.
    """
    section, began, noted = kind(root, options.short, options.seed), time.monotonic(), 0.0
    note(f"{section.name}: begins, {'short' if options.short else f'{seconds / 60:.1f} minutes'}")
    try:
        with section.trying("set up", count=0) as set_up:
            section.set_up()
        for number in itertools.count() if options.trial is None else [options.trial]:
            passed = time.monotonic() - began
            ends = number >= section.short_trials if options.short else passed > seconds and section.has_enough()
            if set_up.wrong or (options.trial is None and ends):
                break
            if sum(len(tally.wrong) for tally in section.tallies) > MOST_WRONG:
                note(f"{section.name}: given up: too much is wrong")
                break
            if time.monotonic() - noted > NOTE_SECONDS:
                noted = time.monotonic()
                note(f"{section.name}: trial {number}, {passed:.0f} s; {_state(section.tallies)}")
            section.number = number
            section.trial(Random(f"{options.seed} {section.name} {number}"))
    finally:
        section.finish()
    tallies = [tally for tally in section.tallies if tally is not set_up or tally.wrong]
    note(f"{section.name}: ended after {time.monotonic() - began:.0f} s; {_state(tallies)}")
    return tallies


def _state(tallies: Iterable[Tally]) -> str:
    tallies = list(tallies)
    return f"{sum(tally.count for tally in tallies):,} tried, {sum(len(tally.wrong) for tally in tallies)} wrong"


def table(tallies: list[Tally]) -> str:
    """The table of what was tried and lost."""
    lines = ["| section | tried | how many | lost or wrong | seconds |", "|---|---|---:|---:|---:|"]
    total = Tally("all", "")
    total.count, total.seconds = sum(tally.count for tally in tallies), sum(tally.seconds for tally in tallies)
    total.wrong = [line for tally in tallies for line in tally.wrong]
    return "\n".join([*lines, *(tally.line() for tally in [*tallies, total])])


def main(argv: list[str]) -> int:
    """Run the sections; the exit status."""
    options, tallies = parse(argv), []
    began, root = time.monotonic(), Path(tempfile.mkdtemp(prefix="lit_gpt-torture-"))
    tempfile.tempdir = str(root)  # what killed processes leave there goes with it
    try:
        import_everything()
        for position, name in enumerate(options.sections):
            left = options.minutes * 60 - (time.monotonic() - began)
            shares = [SECTIONS[other].share for other in options.sections[position:]]
            tallies += torture(SECTIONS[name], root, left * shares[0] / sum(shares), options)
    finally:
        end_all()
    print(table(tallies))
    wrong = [line for tally in tallies for line in tally.wrong]
    for line in wrong:
        print(f"torture: WRONG: {line}", file=sys.stderr)
    if wrong:
        again = f"python scripts/torture.py SECTION --seed {options.seed} --trial N{' --short' * options.short}"
        note(f"{shlex.join(sys.argv)} found {len(wrong)} faults; one again: {again}; its files: {root}")
        return 1
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
