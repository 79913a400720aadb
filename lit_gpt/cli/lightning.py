"""The LightningCLI behind `fit`, `validate`, `test` and `predict`: parse, resolve, build, run.

The model's shape has one source: a preset, or the checkpoint that is named. Its values become the parser's defaults, so
that the order stays jsonargparse's own: checkpoint or preset < environment < YAML < flags.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_gpt.checkpoint.lightning_io import AtomicCheckpointIO
from lit_gpt.cli.adapters import (
    describe_adapter,
    open_named_adapters,
    refuse_changed_adapter,
    refuse_unfit_lora,
)
from lit_gpt.cli.auto_preset import AUTO, auto_defaults
from lit_gpt.cli.defaults import (
    ExistingWeights,
    find_weights,
    parser_defaults,
    refuse_changed_model,
    refuse_changed_run,
    refuse_missing_groups,
)
from lit_gpt.cli.predict import Prediction
from lit_gpt.cli.predict_options import add_predict_arguments
from lit_gpt.cli.resolve import (
    check_machine,
    initial_weights,
    resolve_compile_option,
    resolve_data,
    resolve_precision_option,
)
from lit_gpt.cli.shipped_configs import use_shipped_configs
from lit_gpt.cli.tasks import TaskValidation
from lit_gpt.console.messages import note
from lit_gpt.console.options import OneLineErrors, parser_keys
from lit_gpt.convert.adapter_set import AdapterSet
from lit_gpt.convert.recognise import CONVERTED, open_source
from lit_gpt.convert.source import SourceCheckpoint
from lit_gpt.data.datamodule import TokenDataModule
from lit_gpt.errors import UserError
from lit_gpt.files.locks import Lock
from lit_gpt.generation.engine import Draft, check_draft
from lit_gpt.inference.prepare import InferencePrecision
from lit_gpt.tokenizer.tokenizer import Tokenizer
from lit_gpt.train import run_folder
from lit_gpt.train.budget import set_budget
from lit_gpt.train.callbacks.checkpoints import LastCheckpoint
from lit_gpt.train.callbacks.defaults import default_callbacks, progress_bar
from lit_gpt.train.callbacks.reference import ReferenceLogprobs
from lit_gpt.train.callbacks.run_paths import path_from_here, saved_path
from lit_gpt.train.callbacks.samples import Samples
from lit_gpt.train.callbacks.stop_signals import ExitOnSigterm
from lit_gpt.train.lightning_fixes import (
    CheckpointKeepsFlags,
    SaveWholeConfig,
    keyboard_interrupts,
    silence_lightning,
)
from lit_gpt.train.loggers import LoggerName, further_loggers, is_own_logger
from lit_gpt.train.module import LitGPT
from lit_gpt.train.precision import TrainerPrecision
from lit_gpt.train.rank_zero import (
    check_same_configuration,
    connect_ranks,
    decide_once,
    failures_reported,
    is_rank_zero,
)

_METHOD_SKIPS = {
    "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
    "validate": {"model", "dataloaders", "datamodule", "weights_only", "verbose"},
    "test": {"model", "dataloaders", "datamodule", "weights_only", "verbose"},
    "predict": {"model", "dataloaders", "datamodule", "weights_only", "return_predictions"},
}


class GPTTrainer(Trainer):
    """Lightning's Trainer, whose precision can also be `auto`: `lit_gpt.train.precision` decides before it is built.

    Its logger can also be a name of `lit_gpt.train.loggers`; any other text is refused before it is built.

    Its `max_time` is a `Budget`.
    """

    def __init__(
        self,
        *args: Any,
        precision: Literal["auto", TrainerPrecision] | None = "auto",
        logger: LoggerName | Logger | Iterable[Logger] | bool | str | None = None,
        **kwargs: Any,
    ) -> None:
        set_budget(kwargs)
        logger = False if isinstance(logger, str) else logger
        super().__init__(*args, precision=None if precision == "auto" else precision, logger=logger, **kwargs)


class ProgramParser(OneLineErrors, LightningArgumentParser):
    """LightningCLI's parser, which reports bad input in one line."""


class Program(CheckpointKeepsFlags, LightningCLI):
    """One of the four subcommands, from the words on the command line to the end of its run."""

    def __init__(self, argv: list[str]) -> None:
        self.name = argv[0]
        self.weights = ExistingWeights()
        self.tokenizer: Tokenizer | None = None  # of the data
        self.precision_reason = "as asked for"
        self.prediction: Prediction | None = None
        self.tasks: TaskValidation | None = None  # of `validate`
        self.draft: SourceCheckpoint | None = None  # of speculative decoding
        self.adapters: AdapterSet | None = None  # of `predict`
        self.run_lock: Lock | None = None  # of a `fit`, on rank 0
        options = {"default_env": True, "env_prefix": "LIT_GPT", "allow_abbrev": False}
        super().__init__(
            LitGPT,
            TokenDataModule,
            save_config_callback=SaveWholeConfig if self.name == "fit" else None,
            trainer_class=GPTTrainer,
            trainer_defaults={
                "enable_progress_bar": self.name != "predict",  # which shows prompts instead of batches
                "enable_model_summary": False,  # it prints to stdout; `lit_gpt info` says more
            },
            seed_everything_default=False if self.name == "predict" else 1337,  # predict has a --seed of its own
            parser_kwargs={**options, "prog": "lit_gpt", self.name: dict(options)},
            parser_class=ProgramParser,
            args=None if argv == sys.argv[1:] else argv,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one that was asked for: four parsers would take four times as long to build."""
        return {self.name: _METHOD_SKIPS[self.name]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Flags of ours beside Lightning's."""
        text = "start from these weights: a path or Hugging Face id, anything that `lit_gpt convert` reads"
        if self.name == "fit":
            parser.add_lightning_class_args(Samples, "samples")
            remember = "log at each validation how much of some samples is verbatim training text"
            parser.add_argument("--remix", type=bool, default=False, help=remember)
        if self.name == "predict":
            add_predict_arguments(parser, InferencePrecision)
        if self.name == "validate":
            questions = "a .jsonl file of questions to score in place of the validation data"
            parser.add_argument("--tasks", type=str | None, default=None, help=questions)
        parser.add_argument("--init_from", type=str | None, default=None, help=text)
        text = 'heads of --init_from, where its file does not say, as a .pth of "LLMs from scratch"'
        parser.add_argument("--n_head", type=int | None, default=None, help=text)

    # Parsing -----------------------------------------------------------------------------------------------------

    @property
    def options(self) -> Namespace:
        """What was parsed for this subcommand."""
        return self.config[self.name]

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Read what is asked for, which names a preset or a checkpoint, and lay it over the defaults that this implies.

        Asked together with the defaults, jsonargparse takes six times as long, and it would have to be twice.
        """
        argv = use_shipped_configs(sys.argv[1:] if args is None else args)
        shown = [word for word in argv if word.startswith("--print_config")]
        asked = parser.parse_args([word for word in argv if word not in shown], defaults=False)[self.name]
        own_parser = self._parser(self.name)
        options = own_parser.get_defaults()
        refuse_missing_groups(asked, options)
        options.update(asked)
        self.weights = find_weights(self.name, options)
        own_parser.set_defaults(self._implied_defaults(options))
        if shown:
            parser.parse_args(argv)  # prints, and ends the program
        self.config = Namespace(subcommand=self.name)
        self.config[self.name] = own_parser.parse_args([], namespace=asked, env=False)
        if "model" in self.options and self.options.model.preset == AUTO:
            self.options.model.preset = None  # what it stands for is in the options now
        if self.weights.header is not None:
            self.options.ckpt_path = str(self.weights.header.path)  # `last` has a meaning of its own for Lightning
        refuse_changed_model(self.name, self.options, self.weights)
        refuse_changed_run(self.name, self.options, self.weights)
        refuse_changed_adapter(self.name, self.options, self.weights.header)
        refuse_unfit_lora(self.options, self.weights.source, self.weights.base)

    def _implied_defaults(self, options: Namespace) -> dict[str, Any]:
        preset = options.model.preset if "model" in options else None
        if preset == AUTO and self.name == "fit" and self.weights.config is None:
            return auto_defaults(options)
        return parser_defaults(self.weights, preset, parser_keys(self._parser(self.name)))

    # Resolving what must be known before the Trainer is built ---------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        """Prepare the data if there is none, then resolve vocabulary, precision and compilation."""
        connect_ranks(self.options.trainer)
        check_same_configuration("the configuration", self.options.as_dict())
        check_machine(self.name, self.options)
        if self.name == "predict":
            self._resolve_prediction()
        elif self.options.get("tasks") is not None:
            assert self.weights.config is not None
            self.tasks = TaskValidation(self.options, self.weights.config, self.weights.tokenizer)
        else:
            default_vocab_size = self._parser(self.name).get_defaults().model.config.vocab_size
            self.tokenizer = resolve_data(self.name, self.options, self.weights, default_vocab_size)
        decision = resolve_precision_option(self.name, self.options, self.weights)
        self.precision_reason = decision.reason
        resolve_compile_option(self.name, self.options, decision)
        check_same_configuration("the resolved configuration", self.options.as_dict())

    def _resolve_prediction(self) -> None:
        """Read and check prompts and settings."""
        config, tokenizer = self.weights.config, self.weights.tokenizer
        assert config is not None
        source = str(self.options.ckpt_path or self.options.init_from)
        self.adapters = open_named_adapters(self.options.adapter, self.options, self.weights.source)
        if self.adapters is not None:
            config, self.tokenizer = self.adapters.config, self.adapters.tokenizer
            tokenizer = self.tokenizer
        named = None if self.adapters is None else self.adapters.named
        self.prediction = Prediction(self.options, config, tokenizer, source, named)
        if self.prediction.draft is not None:
            self.draft = open_source(self.prediction.draft, n_head_option=CONVERTED)
            check_draft(Draft(None, self.draft.config, self.draft.tokenizer), config, tokenizer)

    # Building and running -------------------------------------------------------------------------------------------

    def after_instantiate_classes(self) -> None:
        """Hand the module what is not a flag: its tokenizer and the weights to start from."""
        self.model.tokenizer = self.tokenizer or self.weights.tokenizer
        if self.name == "fit" and self.options.remix:
            from lit_gpt.insight.remix.callback import RemixFigures

            self.trainer.callbacks.append(RemixFigures(self.options.data.path))  # type: ignore[attr-defined]
        if self.tasks is not None:
            self.model.metrics.tasks = self.tasks.metric
        elif self.name != "predict" and self.datamodule.format == "pairs":
            self.trainer.callbacks.append(ReferenceLogprobs(self.datamodule))  # type: ignore[attr-defined]
        self.model.precision_reason = self.precision_reason
        self.model.weights_follow = self.name != "fit" and self.weights.config is not None
        origin, tokenizer = self.weights.source or self.weights.base, self.model.tokenizer
        if origin is not None:
            known = origin.tokenizer if self.adapters is not None else tokenizer  # adapters bring rows of their own
            self.model.initial_weights = initial_weights(origin, self.model.config, known)
            describe_adapter(self.model.adapter, self.options.init_from, origin, tokenizer)
        if self.prediction is not None:
            self.model.generation_config = self.prediction.generation_config
            self.model.inference_precision = self.options.precision
            self.model.named_adapters = None if self.adapters is None else self.adapters.named
            if self.draft is not None:
                self.model.draft = Draft(self.draft.load(), self.draft.config, self.draft.tokenizer)
            self.model.observer = self.prediction.tracer
            writers = (self.prediction.writer, self.prediction.trace_writer)
            self.trainer.callbacks += [writer for writer in writers if writer is not None]  # type: ignore[attr-defined]

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """`predict` gets a loader of prompts instead of the data module, `validate --tasks` its questions."""
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if self.prediction is not None:
            kwargs.pop("datamodule", None)
            kwargs |= {"dataloaders": self.prediction.loader, "return_predictions": False}
        if self.tasks is not None:
            kwargs["datamodule"] = self.tasks.data
        return kwargs

    def _run_subcommand(self, subcommand: str) -> None:
        if self.prediction is not None and self.prediction.already_done():
            return
        try:
            with keyboard_interrupts():
                super()._run_subcommand(subcommand)
        except SIGTERMException as stopped:
            if self.trainer.is_global_zero:
                self._say_stopped(stopped)
            raise
        finally:
            if self.prediction is not None:
                self.prediction.close()
            self._free_run_folder()

    def _say_stopped(self, stopped: SIGTERMException) -> None:
        """One line about a run that a signal has stopped."""
        line = "lit_gpt: " + ("interrupted" if stopped.code == 130 else "stopped by SIGTERM")
        if self.name == "fit":
            saved = next(
                (saved_path(c) for c in self.trainer.checkpoint_callbacks if isinstance(c, LastCheckpoint)), ""
            )
            onward = f"go on with --ckpt_path {path_from_here(saved)}" if saved else "nothing was saved"
            line += f" after step {self.trainer.global_step}; {onward}"
        note(line)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with our logger and our way of writing checkpoints; what it refuses is bad input."""
        options = self.options.trainer
        if is_own_logger(options.logger):
            kwargs["logger"] = False
        self.trainer_defaults["callbacks"] = self._callbacks()
        kwargs["plugins"] = [AtomicCheckpointIO(), *_as_list(self._get(self.config_init, "trainer").plugins)]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, RuntimeError) as error:
            raise UserError(f"the trainer cannot be set up: {' '.join(str(error).split())}") from error
        if is_own_logger(options.logger) and self.name == "fit" and not options.fast_dev_run:
            self._set_logger(trainer, options.default_root_dir or ".")  # only now: what is refused makes no folder
        return trainer

    def validate(self, **kwargs: Any) -> None:
        """Run the validation and print its figures."""
        self._report(self.trainer.validate(**kwargs, verbose=False))

    def test(self, **kwargs: Any) -> None:
        """Run the test and print its figures."""
        self._report(self.trainer.test(**kwargs, verbose=False))

    def _report(self, results: Sequence[Mapping[str, float]]) -> None:
        """Results go to stdout; Lightning's own table goes where the progress bar does."""
        if self.trainer.is_global_zero:
            for name, value in results[0].items():
                print(f"{name} {value:.6f}")

    def _callbacks(self) -> list[Callback]:
        """What runs beside the Trainer, less what a flag has switched off."""
        options = self.options.trainer
        wanted: list[Callback] = default_callbacks() if self.name == "fit" else [ExitOnSigterm()]
        if options.enable_checkpointing is False:
            wanted = [callback for callback in wanted if not isinstance(callback, ModelCheckpoint)]
        return wanted if options.enable_progress_bar is False else [*wanted, progress_bar()]

    def _set_logger(self, trainer: Trainer, root: str) -> None:
        """A resumed run goes on in its own folder, wherever that is, and so do its curves; a new run gets a new one."""
        folder = Path(decide_once("run_folder", lambda: self._lock_run_folder(root)))
        inside = os.path.relpath(folder, root)
        if not inside.startswith(os.pardir):
            folder = Path(root, inside)
        board = TensorBoardLogger(folder.parent.parent, folder.parent.name, folder.name, default_hp_metric=False)
        try:
            further = further_loggers(self.options.trainer.logger, folder) if is_rank_zero() else []
        except UserError:
            self._free_run_folder()
            raise
        trainer.loggers = [board, *further]  # the first one's folder is where checkpoints go
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, LastCheckpoint):
                callback.lock = self.run_lock

    def _lock_run_folder(self, root: str) -> str:
        header = self.weights.header
        folder = None if header is None else run_folder.folder_of(header.path)
        folder = folder or run_folder.reserve(Path(root) / "lightning_logs")
        self.run_lock = run_folder.lock(folder)
        return str(folder)

    def _free_run_folder(self) -> None:
        """Free the run's folder; one that nothing was written to is removed."""
        if self.run_lock is not None:
            self.run_lock.release(remove=True)
            with suppress(OSError):
                self.run_lock.path.parent.rmdir()


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def main(argv: list[str]) -> int:
    """Run `fit`, `validate`, `test` or `predict`; its exit status."""
    silence_lightning()
    with failures_reported(is_program=argv == sys.argv[1:]):
        program = Program(argv)
    return 1 if program.prediction is not None and program.prediction.writer.failed else 0
