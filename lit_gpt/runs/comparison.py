"""The comparison of runs: their figures, what differs in their configurations, and which differences are shown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lit_gpt.console.messages import note
from lit_gpt.errors import UserError
from lit_gpt.runs.groups import SEEDS, RunGroup, differing_keys, group_runs, seed_of, shown_value
from lit_gpt.runs.judgement import GroupDifference, Interval, judge, mean_interval, remark_on_seeds
from lit_gpt.runs.record import CurvePoint, RunRecord, flat_config, number, whole
from lit_gpt.runs.samples import SampleSet, SampleSettings, draw_samples, side_by_side
from lit_gpt.runs.text_score import TextScore, score_text

_EQUAL_SHARE = 0.95
"""Of the largest: from there on two runs were trained equally long."""


@dataclass(frozen=True)
class ComparedRun:
    """A run among others.

    Attributes:
        name: the group's, and its number in it: A1, A2, …
        record: what its folder says.
        seed: its seeds.
        text: how well it predicts the text of `--text`; None without that.
    """

    name: str
    record: RunRecord
    seed: tuple[str, ...]
    text: TextScore | None = None

    @property
    def loss(self) -> float | None:
        """On its own validation text, nats a token."""
        return None if self.record.point is None else self.record.point.loss

    @property
    def bits_per_byte(self) -> float | None:
        """On its own validation text."""
        return None if self.record.point is None else self.record.point.bits_per_byte

    @property
    def parameters(self) -> int | None:
        """How many the model has."""
        return whole(self.record.about.get("parameters"))

    def to_dict(self, with_loss: bool) -> dict[str, Any]:
        """Plain values; the validation's only where they can be compared."""
        run = self.record
        own = {"loss": self.loss, "bits_per_byte": self.bits_per_byte} if with_loss else {}
        text = {} if self.text is None else {"text_bits_per_byte": self.text.bits_per_byte}
        return {
            "name": self.name,
            "run": run.name,
            "checkpoint": None if run.checkpoint is None else str(run.checkpoint),
            "seeds": dict(zip(SEEDS, self.seed)),
            "finished": run.finished,
            **own,
            **text,
            "parameters": self.parameters,
            "steps": run.steps,
            "tokens": run.tokens,
            "seconds": run.seconds,
            "flops": run.flops,
            "peak_memory_bytes": run.peak_memory,
            "curve": [point._asdict() for point in run.curve],
        }


@dataclass(frozen=True)
class Comparison:
    """Runs beside each other.

    Attributes:
        runs: in the order in which they were given.
        groups: of runs that differ in their seeds only.
        differing: dotted key → its value in each run, of the keys that differ.
        differences: between groups, corrected for their number.
        comparable: whether the losses are of one validation text and one tokenizer.
        samples: of the groups' first runs.
        remarks: in plain words, on what the figures do not say.
    """

    runs: Sequence[ComparedRun]
    groups: Sequence[RunGroup]
    differing: dict[str, list[Any]]
    comparable: bool
    differences: Sequence[GroupDifference] = ()
    samples: Sequence[SampleSet] = ()
    remarks: list[str] = field(default_factory=list)

    @property
    def by_text(self) -> bool:
        """Whether it is judged by the bits per byte of one text, and not by the validation loss."""
        return self.runs[0].text is not None

    @cached_property
    def figures(self) -> list[float]:
        """What is judged, of each run; lower is better."""
        return [_figure(run) for run in self.runs]

    def spread(self, group: RunGroup) -> Interval | None:
        """The t-interval of a group's mean over its seeds."""
        return mean_interval([self.figures[index] for index in group.members])

    def windows(self, group: RunGroup) -> list[float]:
        """Bits per byte of each window, the mean over the group's runs; empty where there is no text."""
        scores = [score.windows for index in group.members if (score := self.runs[index].text) is not None]
        if not scores or len({len(score) for score in scores}) > 1:
            return []
        return [statistics.fmean(values) for values in zip(*scores)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as the JSON report has them."""
        return {
            "judged_by": "text_bits_per_byte" if self.by_text else "loss",
            "runs": [run.to_dict(self.comparable) for run in self.runs],
            "groups": [self._group_dict(group) for group in self.groups],
            "differing": {key: list(map(shown_value, values)) for key, values in self.differing.items()},
            "differences": [found.to_dict() for found in self.differences],
            "samples": [vars(sample) for sample in self.samples],
            "remarks": self.remarks,
        }

    def _group_dict(self, group: RunGroup) -> dict[str, Any]:
        spread, windows = self.spread(group), mean_interval(self.windows(group))
        return {
            "name": group.name,
            "label": group.label,
            "runs": [self.runs[index].name for index in group.members],
            "mean": statistics.fmean(self.figures[index] for index in group.members),
            "interval_95": None if spread is None else [spread.low, spread.high],
            "windows_95": None if windows is None else [windows.low, windows.high],
        }


def compare(
    records: Sequence[RunRecord],
    text: str | None = None,
    settings: SampleSettings | None = None,
    baseline: Path | None = None,
) -> Comparison:
    """Compare runs.

    Args:
        records: at least two.
        text: to judge by its bits per byte; None for the validation loss.
        settings: of the samples; None for none.
        baseline: the folder of a run, with whose group the others are compared; None for each with each.

    Raises:
        UserError: for runs that cannot be compared, with what to do about it.
    """
    if len(records) < 2:
        raise UserError(f"one run, {records[0].name}, compares with nothing: give two or more")
    records = [complete_record(record) for record in records]
    differing = differing_keys(records)
    groups = group_runs(records, differing)
    comparable = len({validation_key(record) for record in records}) == 1
    if text is None:
        _refuse_uncomparable(records, comparable)
    runs = _name_runs(records, groups)
    reference = _group_of(baseline, records, groups)
    runs, drawn, remarks = _read_models(runs, groups, text, settings)
    found = Comparison(runs, groups, differing, comparable)
    figures = {group.name: [(runs[index].seed, found.figures[index]) for index in group.members] for group in groups}
    differences = [replace(each, windows=_window_difference(found, each)) for each in judge(figures, reference)]
    samples = side_by_side(settings, drawn) if settings is not None and drawn else []
    found = replace(found, differences=differences, samples=samples)
    return replace(found, remarks=[*_remarks(found), *remarks])


def complete_record(run: RunRecord) -> RunRecord:
    """A run of an earlier version, which wrote no log, with what its checkpoint says; another as it is.

    Raises:
        UserError: if the checkpoint cannot be read.
    """
    if run.about or run.checkpoint is None:
        return run
    from lit_gpt.convert.recognise import open_source

    source = open_source(str(run.checkpoint))
    training = source.training
    if training is None:
        return run
    loss, step = training.validation.get("loss"), training.validation.get("step", training.steps)
    bits_per_byte = training.validation.get("bits_per_byte")
    curve = [] if loss is None else [CurvePoint(int(step or 0), None, None, None, loss, bits_per_byte)]
    about = {
        "parameters": sum(stored.nbytes // stored.dtype.itemsize for stored in source.weights.values()),
        "tokenizer": None if source.tokenizer is None else source.tokenizer.hash,
        "train_sha256": training.fingerprint,
    }
    return replace(run, curve=run.curve or curve, steps=training.steps, tokens=training.tokens, about=about)


def validation_key(run: RunRecord) -> tuple[Any, ...]:
    """What a validation loss is of: two runs with one key have one text, one tokenizer and one way of validating."""
    config, digest = flat_config(run.config), run.about.get("val_sha256")
    limit = config.get("trainer.limit_val_batches")
    is_whole = limit is None or (isinstance(limit, float) and limit == 1.0)
    part = () if is_whole else (limit, config.get("data.batch_size"), config.get("data.block_size"))
    names = ("data.path", "data.source", "data.tokenizer", "data.val_split")
    text = (digest,) if isinstance(digest, str) else tuple(str(config.get(name)) for name in names)
    return (str(config.get("data.format", "text")), str(run.about.get("tokenizer")), *text, *map(str, part))


def _refuse_uncomparable(records: Sequence[RunRecord], comparable: bool) -> None:
    """Refuse losses of different texts or tokenizers. Raises UserError."""
    first = records[0]
    if not comparable:
        other = next(run for run in records if validation_key(run) != validation_key(first))
        known, here = first.about.get("tokenizer"), other.about.get("tokenizer")
        what = "tokenizer" if known != here else "validation text"
        raise UserError(
            f"{other.name} has another {what} than {first.name}, so that their losses do not compare: --text FILE "
            f"compares them by the bits per byte of one text"
        )
    for run in records:
        if run.point is None:
            raise UserError(f"{run.name} has made no validation yet: wait for one, leave it out, or give --text FILE")


def _name_runs(records: Sequence[RunRecord], groups: Sequence[RunGroup]) -> list[ComparedRun]:
    names = {index: f"{group.name}{count}" for group in groups for count, index in enumerate(group.members, 1)}
    return [ComparedRun(names[index], record, seed_of(record)) for index, record in enumerate(records)]


def _group_of(folder: Path | None, records: Sequence[RunRecord], groups: Sequence[RunGroup]) -> str | None:
    """The name of the group that has the run in `folder`. Raises UserError if none has."""
    if folder is None:
        return None
    for group in groups:
        if any(records[index].folder.resolve() == folder.resolve() for index in group.members):
            return group.name
    raise UserError(f"--baseline {folder} is none of the runs that are compared: name one of them")


def _read_models(
    runs: Sequence[ComparedRun], groups: Sequence[RunGroup], text: str | None, settings: SampleSettings | None
) -> tuple[list[ComparedRun], dict[str, list[list[str]]], list[str]]:
    """Load the models that are needed, one at a time: the runs with their scores, samples by group, and remarks."""
    first = {group.members[0]: group.name for group in groups}
    drawn: dict[str, list[list[str]]] = {}
    remarks: list[str] = []
    scored = list(runs)
    for index, run in enumerate(runs):
        wants_samples = settings is not None and settings.num_samples > 0 and index in first
        if wants_samples and run.record.checkpoint is None:
            remarks.append(f"{run.name} has no checkpoint, and so no samples")
            wants_samples = False
        if text is None and not wants_samples:
            continue
        gpt = _load(run.record)
        if text is not None:
            scored[index] = replace(run, text=score_text(gpt, text, run.record.name))
        if wants_samples and gpt.tokenizer is None:
            remarks.append(f"{run.name} was trained on bare ids: its samples are no text")
        elif wants_samples and settings is not None:
            drawn[first[index]] = draw_samples(gpt, settings)
    return scored, drawn, remarks


def _load(run: RunRecord) -> Any:
    """The model of a run. Raises UserError if it has no checkpoint, or that cannot be loaded."""
    if run.checkpoint is None:
        raise UserError(f"{run.name} has no checkpoint to predict a text with: leave it out, or leave --text out")
    from lit_gpt.api import load

    note(f"reading {run.checkpoint}")
    return load(str(run.checkpoint), precision="fp32")


def _figure(run: ComparedRun) -> float:
    figure = run.loss if run.text is None else run.text.bits_per_byte
    assert figure is not None, "refused before"
    return figure


def _window_difference(found: Comparison, each: GroupDifference) -> Interval | None:
    by_name = {group.name: found.windows(group) for group in found.groups}
    first, second = by_name[each.first], by_name[each.second]
    return mean_interval([a - b for a, b in zip(first, second)]) if len(first) == len(second) else None


def _remarks(found: Comparison) -> list[str]:
    """What a reader should know about the figures."""
    remarks = []
    if found.by_text:
        remarks.append("judged by the bits per byte of the text of --text; lower is better")
        if not found.comparable:
            remarks.append(
                "validation text or tokenizer differ: losses and bits per byte of the validation are left out"
            )
    else:
        remarks.append("judged by the validation loss; lower is better. --text FILE tells the spread over windows, too")
    if any(run.record.checkpoint is not None and run.record.checkpoint.name == "best.ckpt" for run in found.runs):
        remarks.append("a run counts with its best.ckpt, the lowest of its validations")
    judged = sum(each.interval is not None for each in found.differences)
    if judged > 1:
        remarks.append(f"{judged} comparisons: p-values and verdicts are corrected for their number (Holm)")
    if (few := remark_on_seeds(found.differences)) is not None:
        remarks.append(few)
    unfinished = [run.name for run in found.runs if not run.record.finished]
    if unfinished:
        remarks.append(f"not finished, or of a version that did not record it: {', '.join(unfinished)}")
    if not _equally_long([run.record for run in found.runs]):
        remarks.append("trained for different steps, tokens, times and FLOPs: a difference may come from that alone")
    return remarks


def _equally_long(records: Sequence[RunRecord]) -> bool:
    """Whether the runs are equal in one of the things that a budget can be of, or nothing is known of it."""
    for name in ("steps", "tokens", "seconds", "flops"):
        values = [number(getattr(record, name)) for record in records]
        known = [value for value in values if value is not None]
        if len(known) < len(values) or min(known) >= _EQUAL_SHARE * max(known):
            return True
    return False
