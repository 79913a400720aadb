"""The program `lit_gpt compare`: several runs beside each other, and which differences between them are shown."""

from __future__ import annotations

import json
from pathlib import Path

from jsonargparse import Namespace

from lit_gpt.console.options import CommandParser, make_parser, options_first
from lit_gpt.errors import UserError, nearest
from lit_gpt.files.atomic import atomic_write
from lit_gpt.runs.comparison import Comparison, compare
from lit_gpt.runs.record import read_run
from lit_gpt.runs.samples import SampleSettings, prompts_of
from lit_gpt.runs.text_score import read_text

_MOST_SAMPLES = 20
_FORMATS = ("table", "json")


def main(argv: list[str]) -> int:
    """Run `lit_gpt compare`: the tables, or JSON, to stdout; the page and the picture to files."""
    parser = _parser()
    options = parser.parse_args(options_first(parser, argv))
    _check(options)
    records = [read_run(Path(run)) for run in options.runs]
    text = None if options.text is None else read_text(options.text)
    settings = None
    if options.num_samples > 0:
        prompts = prompts_of(records, options.start)
        limits = options.num_samples, options.max_new_tokens, options.temperature, options.top_k, options.seed
        settings = SampleSettings(prompts, *limits)
        settings.check()
    baseline = None if options.baseline is None else read_run(Path(options.baseline)).folder
    found = compare(records, text, settings, baseline)
    _write_files(found, options)
    if options.format == "json":
        print(json.dumps(found.to_dict(), indent=1, ensure_ascii=False, allow_nan=False))
    else:
        from lit_gpt.runs.compare_tables import print_comparison

        print_comparison(found)
    return 0


def _write_files(found: Comparison, options: Namespace) -> None:
    if options.html is not None:
        from lit_gpt.runs.compare_page import page_of

        page = page_of(found)
        with atomic_write(options.html, "w") as file:
            file.write(page)
    if options.plot is not None:
        from lit_gpt.runs.curves import save_curves

        save_curves(found, options.plot)


def _parser() -> CommandParser:
    parser = make_parser(
        "compare",
        "Compare runs: their figures, what differs in their configurations, their curves and samples, and which "
        "differences are shown over seeds. Runs that differ in their seeds only are one group.",
    )
    add = parser.add_argument
    add("runs", nargs="*", type=str, metavar="RUN", help="folders (lightning_logs/version_N), or checkpoints in them")
    add("--text", type=str | None, help="a text file: judge by its bits per byte, and tell the spread over its windows")
    add("--baseline", type=str | None, help="one of the runs: compare the other groups with its group only")
    add("--format", type=str, default="table", help="table or json")
    add("--html", type=str | None, help="write one self-contained page, with the curves and samples in it")
    add("--plot", type=str | None, help="write the curves over steps, seconds and FLOPs: .png, .svg or .pdf")
    add("--start", action="append", type=str, default=[], help="a prompt for samples; by default the runs' own")
    add("--num_samples", type=int, default=2, help="samples of each prompt by the first run of each group; 0 for none")
    add("--max_new_tokens", type=int, default=100, help="of a sample")
    add("--temperature", type=float, default=0.8, help="of samples")
    add("--top_k", type=int | None, default=50, help="draw samples among so many likeliest tokens")
    add("--seed", type=int, default=1, help="of the first sample of a prompt; the next one has the next seed")
    return parser


def _check(options: Namespace) -> None:
    """Refuse what is wrong before anything is read. Raises UserError."""
    if not options.runs:
        raise UserError("compare needs runs: lit_gpt compare lightning_logs/version_0 lightning_logs/version_1")
    if options.format not in _FORMATS:
        raise UserError(f'--format "{options.format}" is unknown: {nearest(options.format, _FORMATS)}')
    if not 0 <= options.num_samples <= _MOST_SAMPLES:
        raise UserError(f"--num_samples {options.num_samples} is outside 0 … {_MOST_SAMPLES}: choose one inside")
    if options.plot is not None:
        from lit_gpt.runs.curves import check_kind

        check_kind(options.plot)
    for name in ("html", "plot"):
        path = options[name]
        if path is not None and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
            raise UserError(f"--{name} {path}: name a file in a folder that exists")
