"""A run of `predict`, checked before anything is computed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence

from jsonargparse import Namespace
from torch.utils.data import DataLoader, Subset

from lit_gpt.cli.partial_results import PartialResults
from lit_gpt.cli.prediction_writer import PredictionWriter
from lit_gpt.cli.resolve import rank_count
from lit_gpt.console.messages import note
from lit_gpt.convert.recognise import files_of_source
from lit_gpt.data.prompts import ChatPrompts, PromptDataset, PromptRecord
from lit_gpt.errors import UserError, brief
from lit_gpt.generation.complete import encode_prompt
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.generation.prompts import check_prompt
from lit_gpt.generation.trace import Tracer
from lit_gpt.insight.trace_view import TraceWriter
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.lora import NamedAdapters
from lit_gpt.tokenizer.chat_template import ChatTemplate
from lit_gpt.tokenizer.tokenizer import Tokenizer
from lit_gpt.train.rank_zero import is_rank_zero

_BATCH = 64
"""Prompts of one `predict_step`; the engine works on as many of them at once as it has slots for."""


class Prediction:
    """A run of `predict`, checked before anything is computed.

    Attributes:
        generation_config: how to continue the prompts.
        loader: the prompts that are left to do.
        writer: the callback that writes the results.
        tracer: notes how each token was chosen, if that was asked for.
        trace_writer: the callback that shows it.
    """

    def __init__(
        self,
        options: Namespace,
        config: GPTConfig,
        tokenizer: Tokenizer | None,
        source: str,
        adapters: NamedAdapters | None = None,
    ) -> None:
        """Prompts and settings as `options` has them, for a model of shape `config` that came from `source`.

        Raises:
            UserError: for settings or prompts that are wrong, or an output that is in the way.
        """
        names = [item.name for item in dataclasses.fields(GenerationConfig)]
        self.generation_config = GenerationConfig.from_dict({name: options[name] for name in names})
        for remark in self.generation_config.check():
            note(remark)
        self._template = chat_template(options.chat, options.system, tokenizer)
        texts = PromptDataset(options.start, options.prompts)
        prompts = texts if self._template is None else ChatPrompts(texts, self._template, options.system)
        self._end_at_turns()
        check_prompts(prompts, tokenizer, config, self.generation_config, adapters)
        self._partial: PartialResults | None = None
        finished: set[int] = set()
        if options.output is not None:
            precision = [options.precision, options.get("trainer.precision"), options.get("trainer.accelerator")]
            words = (options.adapter, options.show_ids)
            run = run_fingerprint(prompts, self.generation_config, source, precision, *words)
            self._partial = PartialResults(options.output, run)
            finished = _reserved(self._partial, options.resume, len(prompts))
        elif options.resume:
            raise UserError("--resume goes on with a file of results: name it with --output")
        left = [index for index in range(len(prompts)) if index not in finished]
        self._check_devices(len(left), rank_count(options.trainer))
        self.loader = DataLoader(Subset(prompts, left), batch_size=_BATCH, collate_fn=list)
        self.writer = PredictionWriter(self._partial, len(left), tokenizer, options.chat, options.show_ids)
        self.tracer: Tracer | None = None
        self.trace_writer: TraceWriter | None = None
        if options.trace or options.trace_output is not None or options.trace_html is not None:
            self.tracer = Tracer(tokenizer)
            views = (options.trace, options.trace_output, options.trace_html)
            self.trace_writer = TraceWriter(self.tracer, tokenizer, *views)

    def _end_at_turns(self) -> None:
        """What ends an assistant's turn ends its answer; end-of-text does so anyway, unless `ignore_eos` is set."""
        template, given = self._template, self.generation_config.stop_token_ids
        if template is None:
            return
        ends = [end for end in template.end_ids if end != template.tokenizer.eot_id and end not in given]
        self.generation_config = dataclasses.replace(self.generation_config, stop_token_ids=[*given, *ends])

    def _check_devices(self, left: int, ranks: int) -> None:
        """Refuse more devices than there are prompts `left` for: Lightning gives each of them at least one."""
        if 0 < left < ranks:
            if self._partial is not None:
                self._partial.release()
            prompts = f"{left} prompt" + "s" * (left > 1)
            raise UserError(f"{ranks} devices cannot share {prompts}: use --trainer.devices {left}")

    def close(self) -> None:
        """End the process of the chat template."""
        if self._template is not None:
            self._template.close()

    @property
    def draft(self) -> str | None:
        """The checkpoint that proposes tokens, if one does."""
        return self.generation_config.draft_checkpoint

    def already_done(self) -> bool:
        """Whether nothing is left of a resumed run; if only its last step was, that is made."""
        if len(self.loader.dataset) > 0 or self._partial is None:  # type: ignore[arg-type]
            return False
        if self._partial.output.exists():
            self._partial.remove_left_over()
        else:
            self._partial.finish()
        self._partial.release()
        note(f"{self._partial.output} is complete")
        return True


def check_prompts(
    prompts: Iterable[PromptRecord],
    tokenizer: Tokenizer | None,
    config: GPTConfig,
    generation_config: GenerationConfig,
    adapters: NamedAdapters | None = None,
) -> None:
    """Refuse, before any work, prompts that this model cannot continue, and those for an adapter that is not there.

    Raises:
        UserError: naming the prompt.
    """
    for record in prompts:
        ids = encode_prompt(tokenizer, record.prompt, record.ids)
        name = f"prompt {record.position + 1}"
        check_prompt(name, ids, config, generation_config, tokenizer)
        try:
            if adapters is not None:
                adapters.number(record.model)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None


def chat_template(chat: bool, system: str | None, tokenizer: Tokenizer | None) -> ChatTemplate | None:
    """The template for the prompts of `--chat`; None without it.

    Raises:
        UserError: if the model has none, or `--system` is given without it.
    """
    if not chat:
        if system is not None:
            raise UserError(f"--system {brief(system)} is for conversations: give --chat as well, or leave it out")
        return None
    if tokenizer is None:
        raise UserError("--chat: this model came without a tokenizer, and so without a chat template: leave it out")
    if tokenizer.chat_template is None:
        raise UserError("--chat: this model has no chat template, it only continues text: leave it out")
    return ChatTemplate(tokenizer)


def _reserved(partial: PartialResults, resume: bool, total: int) -> set[int]:
    """The prompts, of `total`, that are done already; no other run can write to the output from here on.

    Rank 0 holds the lock for all: the other ranks of a run write to the same output.

    Raises:
        UserError: if another run writes there, or the output is in the way.
    """
    if is_rank_zero():
        partial.reserve()
    try:
        return partial.finished(resume, total)
    except BaseException:
        partial.release()
        raise


def run_fingerprint(
    prompts: PromptDataset | ChatPrompts,
    generation_config: GenerationConfig,
    source: str,
    precision: Sequence[str | None],
    adapters: Sequence[str] = (),
    show_ids: bool = False,
) -> str:
    """What identifies a run: prompts, settings, precision, its weights and their adapters, and what results hold.

    Weights, and those of a draft, are known by the names, sizes and times of their files.
    """
    sources = [source, *filter(None, [generation_config.draft_checkpoint])]
    weights = [[name, *_file_versions(name)] for name in sources]
    weights += [[word, *_file_versions(word.partition("=")[2])] for word in adapters]
    shown = ["ids"] if show_ids else []
    values = [prompts.fingerprint, generation_config.to_dict(), list(precision), weights, *shown]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _file_versions(source: str) -> list[tuple[str, int, int]]:
    """Name, size and time of each file that `source` is made of."""
    stats = [(path.name, path.stat()) for path in files_of_source(source)]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
