"""Configurations of `fit`, checked and resolved, none trained: `python -m lit_gpt.cli.fit_check QUESTION ANSWER`.

A sweep runs it as a process of its own before its runs start: one parser checks all configurations, their data is
prepared once, and what would be timed by each run (precision, compilation) is decided once for all runs of a shape, so
that runs that are compared do not differ in it. The sweep itself imports no torch.

QUESTION is a JSON file: `configs`, a list of files; `flags`, a list of lists of words, one for each configuration; and
`budget`, null or [unit, amount]. ANSWER is written: a list, for each configuration either `error`, a line, or `config`,
the resolved options of `fit`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from lit_gpt.cli.defaults import ExistingWeights
from lit_gpt.cli.lightning import Program
from lit_gpt.cli.resolve import check_machine, resolve_compile_option, resolve_data, resolve_precision_option
from lit_gpt.cli.shipped_configs import use_shipped_configs
from lit_gpt.errors import UserError
from lit_gpt.files.atomic import atomic_write
from lit_gpt.model.config import GPTConfig
from lit_gpt.train.lightning_fixes import silence_lightning
from lit_gpt.train.loggers import is_own_logger

VALIDATIONS = 10
"""Of a run whose budget is no time and whose options name no number of batches between two."""

Limit = tuple[str, float]
"""A unit (`time`, `steps`, `tokens`, `flops`) and how much of it a run may spend."""


class FitCheck(Program):
    """`fit`, up to where it would build the Trainer, for any number of configurations."""

    def __init__(self) -> None:
        super().__init__(["fit"])
        own = self._parser("fit")
        self._defaults = {action.dest: action.default for action in own._actions}, dict(own._defaults)
        self._decided: dict[str, tuple[str, bool]] = {}  # precision and compilation, by what they depend on

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Nothing yet: LightningCLI calls this once, when it is built."""
        self.config = Namespace(subcommand="fit", fit=Namespace())

    def _set_seed(self) -> None:
        """Nothing: no random number is drawn."""

    before_instantiate_classes = instantiate_classes = after_instantiate_classes = _set_seed

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing."""

    def check(self, words: Sequence[str]) -> CheckedFit:
        """Parse a command line of `fit` and check all of its values. Nothing is written.

        Raises:
            UserError: for what `fit` would refuse.
        """
        own = self._parser("fit")
        for action in own._actions:  # the former command line's preset or weights have changed them
            action.default = self._defaults[0][action.dest]
        own._defaults = dict(self._defaults[1])
        super().parse_arguments(self.parser, ["fit", *words])
        check_machine("fit", self.options)
        trainer = self.options.trainer
        if self.options.ckpt_path is not None:
            raise UserError(f"ckpt_path={self.options.ckpt_path}: every run of a sweep is a new one; leave it out")
        if not is_own_logger(trainer.logger) or trainer.fast_dev_run:
            raise UserError("a sweep reads the folders of its runs: leave trainer.logger and trainer.fast_dev_run out")
        self.parser.instantiate(self.config)  # model and data module check their values
        vocab_size = own.get_defaults().model.config.vocab_size
        return CheckedFit(self.options, self.weights, vocab_size)

    def resolve(self, checked: CheckedFit, limit: Limit | None) -> dict[str, Any]:
        """Prepare the data, decide on precision and compilation, and apply the budget; the resolved options.

        Raises:
            UserError: if the data or the budget does not fit.
        """
        options = checked.options
        resolve_data("fit", options, checked.weights, checked.vocab_size)
        if limit is not None:
            apply_limit(options, *limit)
        key = _decided_by(options)
        if key in self._decided:
            options.trainer.precision, options.model.compile = self._decided[key]
        else:
            decision = resolve_precision_option("fit", options, checked.weights)
            resolve_compile_option("fit", options, decision)
            self._decided[key] = options.trainer.precision, options.model.compile
        text = self._parser("fit").dump(options, skip_unset=False)
        resolved: dict[str, Any] = yaml.safe_load(text)
        return resolved


class CheckedFit:
    """A command line of `fit`, parsed.

    Attributes:
        options: of `fit`.
        weights: that it starts from.
        vocab_size: what the option is where nobody has set it.
    """

    def __init__(self, options: Namespace, weights: ExistingWeights, vocab_size: int) -> None:
        self.options, self.weights, self.vocab_size = options, weights, vocab_size


def _decided_by(options: Namespace) -> str:
    """All that precision and compilation are decided by, as text."""
    names = ("precision", "accelerator", "devices", "num_nodes", "accumulate_grad_batches", "max_steps", "max_time")
    trainer, model = {name: options.trainer[name] for name in names}, options.model
    shape = [model.config.as_dict(), model.compile, model.activation_checkpointing, options.data.batch_size]
    return json.dumps([trainer, shape], default=str, sort_keys=True)


def apply_limit(options: Namespace, unit: str, amount: float) -> None:
    """Make a run as long as its budget allows, and end it with a validation.

    Args:
        options: of `fit`, resolved but for this, changed in place.
        unit: of the budget.
        amount: seconds, optimizer steps, tokens, or floating-point operations of forward and backward passes.

    Raises:
        UserError: if that is less than one step.
    """
    trainer = options.trainer
    trainer.max_epochs = -1
    if unit == "time":
        trainer.max_steps, trainer.max_time = -1, _duration(amount)
        return
    tokens = step_tokens(options)
    cost = {"steps": 1.0, "tokens": float(tokens), "flops": tokens * token_flops(options)}[unit]
    steps = int(amount / cost * (1 + 1e-12))
    if steps < 1:
        raise UserError(f"a budget of {amount:.6g} {unit} is less than one step, which takes {cost:.6g}: give more")
    trainer.max_time = None
    trainer.max_steps, trainer.val_check_interval = _with_validations(trainer, steps)
    trainer.check_val_every_n_epoch = None


def step_tokens(options: Namespace) -> int:
    """Tokens that an optimizer step trains on, over all ranks, as `Throughput` counts them; a row of pairs has 2 T."""
    width = options.model.config.block_size * (2 if options.data.format == "pairs" else 1)
    return int(options.data.batch_size * options.trainer.accumulate_grad_batches * width)


def token_flops(options: Namespace) -> float:
    """Floating-point operations of a token's forward and backward pass, as `Throughput` counts them."""
    passes = 3 if options.model.lora.rank == 0 else 2  # a frozen weight has no gradient
    return passes * GPTConfig.from_dict(options.model.config.as_dict()).forward_flops_per_token()


def _with_validations(trainer: Namespace, steps: int) -> tuple[int, int]:
    """(optimizer steps, micro-batches between two validations): at most `steps`, with a validation after the last.

    As many validations as the options say, or about as many where that number does not divide the steps; else the few
    steps that are too many are left out.
    """
    accumulate, asked = trainer.accumulate_grad_batches, trainer.val_check_interval
    is_in_batches = isinstance(asked, int) and not isinstance(asked, bool) and trainer.check_val_every_n_epoch is None
    wanted = max(1, round(steps * accumulate / asked)) if is_in_batches else VALIDATIONS
    wanted = min(wanted, steps)
    dividing = [count for count in range(max(1, wanted // 2), 2 * wanted + 1) if steps % count == 0]
    count = min(dividing, key=lambda number: abs(number - wanted), default=wanted)
    interval = steps // count
    return interval * count, interval * accumulate


def _duration(seconds: float) -> str:
    """DD:HH:MM:SS."""
    span = timedelta(seconds=max(1, round(seconds)))
    return f"{span.days:02d}:{span.seconds // 3600:02d}:{span.seconds // 60 % 60:02d}:{span.seconds % 60:02d}"


def answer(question: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers to a question. Nothing is prepared if a configuration is refused."""
    limit = None if question["budget"] is None else (question["budget"][0], float(question["budget"][1]))
    common = use_shipped_configs([word for path in question["configs"] for word in ("--config", path)])
    program = FitCheck()
    found: list[CheckedFit | UserError] = []
    for flags in question["flags"]:
        try:
            found.append(program.check([*common, *flags]))
        except UserError as error:
            found.append(error)
    if any(isinstance(checked, UserError) for checked in found):
        return [{"error": str(checked)} if isinstance(checked, UserError) else {} for checked in found]
    answers: list[dict[str, Any]] = []
    for checked in found:
        assert isinstance(checked, CheckedFit)
        try:
            answers.append({"config": program.resolve(checked, limit)})
        except UserError as error:
            answers.append({"error": str(error)})
    return answers


def main(argv: list[str]) -> int:
    """Answer the question in a file; the exit status."""
    silence_lightning()
    question, answers = map(Path, argv)
    found = answer(json.loads(question.read_text("utf-8")))
    with atomic_write(answers, "w") as file:
        json.dump(found, file)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
