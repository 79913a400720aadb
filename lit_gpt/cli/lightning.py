"""The LightningCLI behind `fit`, `validate`, `test` and `predict`.

What a model is made of has one source: a preset, or the checkpoint that is named. Its values become the parser's
defaults, so that the order stays jsonargparse's own: checkpoint or preset < environment < YAML < flags.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from lit_gpt.checkpoint.format import Header, read_header, resolve_ckpt_path
from lit_gpt.checkpoint.lightning_io import AtomicCheckpointIO
from lit_gpt.cli.predict import Prediction, add_predict_arguments
from lit_gpt.console import note
from lit_gpt.convert.recognise import open_source
from lit_gpt.convert.source import SourceCheckpoint
from lit_gpt.data.datamodule import TokenDataModule, check_divisible
from lit_gpt.errors import UserError
from lit_gpt.generation.engine import Draft, check_draft
from lit_gpt.model.config import GPTConfig, preset_values
from lit_gpt.options import OneLineErrors, parser_keys
from lit_gpt.tokenizer.tokenizer import Tokenizer
from lit_gpt.train.callbacks.defaults import default_callbacks, progress_bar
from lit_gpt.train.callbacks.samples import Samples
from lit_gpt.train.compile import resolve_compile
from lit_gpt.train.module import LitGPT
from lit_gpt.train.precision import Decision, TrainerPrecision, device_type, resolve_precision
from lit_gpt.train.rank_zero import decide_once, is_rank_zero

_METHOD_SKIPS = {
    "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
    "validate": {"model", "dataloaders", "datamodule", "weights_only", "verbose"},
    "test": {"model", "dataloaders", "datamodule", "weights_only", "verbose"},
    "predict": {"model", "dataloaders", "datamodule", "weights_only", "return_predictions"},
}
_FREE_KEYS = {"dropout"}
"""Keys of the model's config that a checkpoint does not settle: they shape the training, not the weights."""

Precision = Literal["auto", TrainerPrecision]


class GPTTrainer(Trainer):
    """Lightning's Trainer, whose precision can also be `auto`: `lit_gpt.train.precision` decides before it is built."""

    def __init__(self, *args: Any, precision: Precision | None = "auto", **kwargs: Any) -> None:
        super().__init__(*args, precision=None if precision == "auto" else precision, **kwargs)


class ProgramParser(OneLineErrors, LightningArgumentParser):
    """LightningCLI's parser with our manners."""


class Program(LightningCLI):
    """One of the four subcommands, from the words on the command line to the end of its run."""

    def __init__(self, argv: list[str]) -> None:
        self.name = argv[0]
        self.header: Header | None = None  # of --ckpt_path
        self.source: SourceCheckpoint | None = None  # of --init_from
        self.tokenizer: Tokenizer | None = None  # of the data
        self.precision_reason = "as asked for"
        self._decision: Decision | None = None  # on the rank that made it
        self.prediction: Prediction | None = None
        self.draft: SourceCheckpoint | None = None  # of speculative decoding
        options = {"default_env": True, "env_prefix": "LIT_GPT", "allow_abbrev": False}
        super().__init__(
            LitGPT,
            TokenDataModule,
            save_config_callback=SaveConfigCallback if self.name == "fit" else None,
            save_config_kwargs={"overwrite": True},  # a resumed run goes on in the folder of its first part
            trainer_class=GPTTrainer,
            trainer_defaults={
                "enable_progress_bar": self.name != "predict",  # which shows prompts instead of batches
                "enable_model_summary": False,  # it prints to stdout; `lit_gpt info` says more
            },
            seed_everything_default=1337,
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
            add_predict_arguments(parser)
        parser.add_argument("--init_from", type=str | None, default=None, help=text)

    # Parsing -----------------------------------------------------------------------------------------------------

    @property
    def options(self) -> Namespace:
        """What was parsed for this subcommand."""
        return self.config[self.name]

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse twice: first to learn which preset or checkpoint is meant, then with its values as defaults."""
        argv = list(sys.argv[1:] if args is None else args)
        self.config = parser.parse_args([word for word in argv if not word.startswith("--print_config")])
        self._parser(self.name).set_defaults(self._source_defaults())
        self.config = parser.parse_args(argv)
        if self.header is not None:
            self.options.ckpt_path = str(self.header.path)  # Lightning would take `last` for a name of its own
        self._refuse_changed_model()

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would let a checkpoint's values override the flags."""

    def _source_defaults(self) -> dict[str, Any]:
        """Parser defaults that the named checkpoint or preset implies."""
        options = self.options
        if options.ckpt_path and options.init_from:
            raise UserError("--ckpt_path goes on with a run, --init_from starts from other weights: give one of them")
        if options.ckpt_path:
            path = resolve_ckpt_path(options.ckpt_path, options.trainer.default_root_dir or ".")
            self.header = read_header(path)
            return _checkpoint_defaults(self.header, parser_keys(self._parser(self.name)))
        if options.init_from:
            self.source = open_source(options.init_from)
            return _config_defaults(self.source.config.to_dict())
        if self.name != "fit":
            raise UserError(f"{self.name} needs a model: --ckpt_path PATH, --ckpt_path last, or --init_from SOURCE")
        return {} if options.model.preset is None else _config_defaults(preset_values(options.model.preset))

    def _refuse_changed_model(self) -> None:
        """With weights given, what they settle can't be overridden."""
        origin = self.header or self.source
        if origin is None:
            return
        for key, value in origin.config.to_dict().items():
            asked = self.options.model.config[key]
            if key not in _FREE_KEYS and asked != value:
                raise UserError(
                    f"model.config.{key}={asked} differs from the checkpoint's {value}: its weights have that shape; "
                    f"leave the key out"
                )
        saved = None if self.header is None else self.header.precision
        if self.name == "fit" and saved is not None and self.options.trainer.precision not in ("auto", saved):
            raise UserError(
                f"trainer.precision={self.options.trainer.precision} differs from the run's {saved}: leave it out to "
                f"go on with the run, or start a new one with --init_from"
            )

    # Settling what must be known before the Trainer is built --------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        """Prepare the data if there is none, then settle vocabulary, precision and compilation."""
        self._check_machine()
        if self.name == "predict":
            self._settle_prediction()
        else:
            self._settle_data()
        self._settle_precision()
        self._settle_compile()

    def _check_machine(self) -> None:
        """Refuse what this machine or the batch cannot do, before the data is prepared."""
        trainer, data = self.options.trainer, self.options.get("data")
        for name in ("num_nodes", "accumulate_grad_batches"):
            if trainer[name] < 1:
                raise UserError(f"trainer.{name}={trainer[name]} must be at least 1")
        there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
        device = device_type(trainer.accelerator)
        if there.get(device) == 0 or (trainer.accelerator == "gpu" and device == "cpu"):
            raise UserError(
                f"trainer.accelerator={trainer.accelerator}: this machine has none; leave it out, or use cpu"
            )
        most = {**there, "cpu": os.cpu_count()}.get(device)
        if most is not None and self._n_rank // trainer.num_nodes > most:
            kind = "CPU cores" if device == "cpu" else f"{device} devices"
            raise UserError(f"trainer.devices={trainer.devices}: this machine has {most} {kind}; take at most {most}")
        if self.name == "fit" and data is not None:
            check_divisible(data.batch_size, self._n_rank)

    def _settle_prediction(self) -> None:
        """Read and check prompts and settings."""
        origin = self.header or self.source
        assert origin is not None
        where = str(self.options.ckpt_path or self.options.init_from)
        tokenizer = self._tokenizer_of_weights()
        self.prediction = Prediction(self.options, origin.config, tokenizer, where)
        if self.prediction.draft is not None:
            self.draft = open_source(self.prediction.draft)
            check_draft(Draft(None, self.draft.config, self.draft.tokenizer), origin.config, tokenizer)

    def _settle_data(self) -> None:
        options = self.options
        options.data.block_size = options.model.config.block_size
        data, trained_with = TokenDataModule(**options.data.as_dict()), self._tokenizer_of_weights()
        decide_once("data", lambda: _prepared(data, trained_with))
        data.load_tokenizer(trained_with)
        self.tokenizer = data.tokenizer
        if data.tokenizer is not None:
            self._settle_vocabulary(data.tokenizer)

    def _settle_vocabulary(self, tokenizer: Tokenizer) -> None:
        """A new model takes the data's vocabulary; for weights that exist the data must have theirs."""
        config = self.options.model.config
        default = self._parser(self.name).get_defaults().model.config.vocab_size
        trained_with = self._tokenizer_of_weights()
        if trained_with is not None and trained_with.hash != tokenizer.hash:
            raise UserError(
                f"{self.options.data.path} holds shards of the tokenizer {tokenizer.name} ({tokenizer.hash[:12]}), the "
                f"model was trained with {trained_with.name} ({trained_with.hash[:12]}): prepare the text with the "
                f"model's tokenizer in another folder"
            )
        if self.header is None and self.source is None and config.vocab_size == default:
            config.vocab_size = tokenizer.n_vocab
        if config.vocab_size < tokenizer.n_vocab:
            raise UserError(
                f"the tokenizer {tokenizer.name} has {tokenizer.n_vocab} ids, the model's vocab_size is "
                f"{config.vocab_size}: leave vocab_size out"
            )

    def _tokenizer_of_weights(self) -> Tokenizer | None:
        if self.source is not None:
            return self.source.tokenizer
        if self.header is not None and self.header.tokenizer is not None:
            return Tokenizer.from_dict(self.header.tokenizer)
        return None

    def _settle_precision(self) -> None:
        """`auto` becomes what suits this machine and model; a run goes on, and is judged, in its own precision."""
        trainer = self.options.trainer
        if self.name == "predict" and trainer.precision in ("auto", None):
            trainer.precision = "32-true"  # `--precision` says how the weights are held; autocast only costs time here
        if self.header is not None and self.header.precision is not None and trainer.precision in ("auto", None):
            trainer.precision = self.header.precision
        if trainer.precision != "auto":
            return
        if self.name != "fit":
            trainer.precision = "32-true"
            return
        trainer.precision, self.precision_reason = decide_once("precision", self._decide_precision).split(": ", 1)
        if is_rank_zero():
            note(f"precision {trainer.precision}: {self.precision_reason}")

    def _decide_precision(self) -> str:
        options = self.options
        self._decision = resolve_precision(
            "auto",
            GPTConfig.from_dict(options.model.config.as_dict()),
            max(1, options.data.batch_size // self._n_rank),
            accelerator=options.trainer.accelerator,
            activation_checkpointing=options.model.activation_checkpointing,
        )
        return f"{self._decision.precision}: {self._decision.reason}"

    @property
    def _n_rank(self) -> int:
        """Processes that share a batch, as far as the options say."""
        trainer = self.options.trainer
        devices = trainer.devices  # a number, a list of indices, or either as text
        if isinstance(devices, str) and "," in devices:
            devices = [index for index in devices.split(",") if index.strip()]
        count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdecimal() else 1
        return max(1, count) * trainer.num_nodes

    def _settle_compile(self) -> None:
        """`auto` becomes what pays."""
        model = self.options.model
        if self.name != "fit" or model.compile != "auto":
            return
        verdict, timing = decide_once("compile", self._decide_compile).split(": ", 1)
        model.compile = verdict == "on"
        if timing and is_rank_zero():
            note(f"compile {verdict}: {timing}")

    def _decide_compile(self) -> str:
        options = self.options
        config = GPTConfig.from_dict(options.model.config.as_dict())
        rows, precision = max(1, options.data.batch_size // self._n_rank), options.trainer.precision
        timings = () if self._decision is None else self._decision.timings
        pays, timing = resolve_compile(
            config,
            precision,
            rows,
            max(0, options.trainer.max_steps) * options.trainer.accumulate_grad_batches * rows * config.block_size,
            next((timing for timing in timings if timing.precision == precision), None),
            options.trainer.accelerator,
            options.model.activation_checkpointing,
        )
        return f"{'on' if pays else 'off'}: {timing}"

    # Building and running -------------------------------------------------------------------------------------------

    def after_instantiate_classes(self) -> None:
        """Hand the module what is not a flag: its tokenizer and the weights to start from."""
        self.model.tokenizer = self.tokenizer or self._tokenizer_of_weights()
        if self.name == "fit" and self.options.remix:
            from lit_gpt.insight.remix.callback import RemixFigures

            self.trainer.callbacks.append(RemixFigures(self.options.data.path))  # type: ignore[attr-defined]
        self.model.precision_reason = self.precision_reason
        if self.source is not None:
            self.model.initial_weights = self.source.load().state_dict()
        if self.prediction is not None:
            self.model.generation_config = self.prediction.generation_config
            self.model.inference_precision = self.options.precision
            if self.draft is not None:
                self.model.draft = Draft(self.draft.load(), self.draft.config, self.draft.tokenizer)
            self.model.observer = self.prediction.tracer
            writers = (self.prediction.writer, self.prediction.trace_writer)
            self.trainer.callbacks += [writer for writer in writers if writer is not None]  # type: ignore[attr-defined]

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Prompts take the place of the data module."""
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if self.prediction is not None:
            kwargs.pop("datamodule", None)
            kwargs |= {"dataloaders": self.prediction.loader, "return_predictions": False}
        return kwargs

    def _run_subcommand(self, subcommand: str) -> None:
        if self.prediction is None or not self.prediction.already_done():
            super()._run_subcommand(subcommand)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with our logger and our way of writing checkpoints; what it refuses is bad input."""
        options = self.options.trainer
        if options.logger in (None, True):
            kwargs["logger"] = self._logger(options.default_root_dir or ".") if self.name == "fit" else False
        self.trainer_defaults["callbacks"] = self._callbacks()
        kwargs["plugins"] = [AtomicCheckpointIO(), *_as_list(self._get(self.config_init, "trainer").plugins)]
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, RuntimeError) as error:
            raise UserError(f"the trainer cannot be set up: {' '.join(str(error).split())}") from error

    def validate(self, **kwargs: Any) -> None:
        """Run the validation and print its figures."""
        self._report(self.trainer.validate(**kwargs, verbose=False))

    def test(self, **kwargs: Any) -> None:
        """Run the test and print its figures."""
        self._report(self.trainer.test(**kwargs, verbose=False))

    def _report(self, results: Any) -> None:
        """Results go to stdout; Lightning's own table goes where the progress bar does."""
        if self.trainer.is_global_zero:
            for name, value in results[0].items():
                print(f"{name} {value:.6f}")

    def _callbacks(self) -> list[Callback]:
        """What runs beside the Trainer, less what a flag has switched off."""
        options = self.options.trainer
        wanted = default_callbacks() if self.name == "fit" else []
        if options.enable_checkpointing is False:
            wanted = [callback for callback in wanted if not isinstance(callback, ModelCheckpoint)]
        return wanted if options.enable_progress_bar is False else [*wanted, progress_bar()]

    def _logger(self, root: str) -> TensorBoardLogger:
        """A resumed run goes on in its own folder, so that its curves do; a new run gets the next number."""
        version = None
        if self.header is not None and self.header.path.parent.name == "checkpoints":
            version = self.header.path.parent.parent.name
        return TensorBoardLogger(root, name="lightning_logs", version=version, default_hp_metric=False)


def _prepared(data: TokenDataModule, trained_with: Tokenizer | None) -> str:
    """Prepare the data, with the tokenizer that the model was trained with unless another is named."""
    if data.spec is not None or trained_with is None:
        data.prepare_data()
        return "ready"
    with TemporaryDirectory() as folder:
        data.spec = str(Path(folder) / "tokenizer.json")
        trained_with.save(data.spec)
        data.prepare_data()
    data.spec = None
    return "ready"


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _checkpoint_defaults(header: Header, known: list[str]) -> dict[str, Any]:
    """What a checkpoint says about model and data, as dotted keys of the parser."""
    values = _config_defaults(header.config.to_dict())
    values |= _flatten({"model": {**header.hyper_parameters, "config": {}, "preset": None}, "data": header.data})
    return {key: value for key, value in values.items() if key in known}


def _config_defaults(values: dict[str, Any]) -> dict[str, Any]:
    return {f"model.config.{key}": value for key, value in values.items()}


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


class _NoAdvertising(logging.Filter):
    """Lightning recommends its maker's services at every start."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "litlogger" not in record.getMessage() and "litmodels" not in record.getMessage()


def main(argv: list[str]) -> int:
    """Run `fit`, `validate`, `test` or `predict`; its exit status."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch"):
        logging.getLogger(name).addFilter(_NoAdvertising())
    for noise in (".*LeafSpec.*", ".*callbacks used to create the checkpoint.*"):  # of no use to whoever reads it
        warnings.filterwarnings("ignore", message=noise)
    program = Program(argv)
    return 1 if program.prediction is not None and program.prediction.writer.failed else 0
