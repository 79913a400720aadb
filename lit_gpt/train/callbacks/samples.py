"""Texts that the model writes during training: in TensorBoard after each validation, on stdout at the end."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from lit_gpt.checkpoint.format import KEY
from lit_gpt.checkpoint.training_record import plain_prompts
from lit_gpt.data.beginnings import document_beginnings
from lit_gpt.data.datamodule import TokenDataModule
from lit_gpt.data.index import TEXT
from lit_gpt.data.remote import is_remote
from lit_gpt.data.shard_folder import open_tokens
from lit_gpt.errors import UserError
from lit_gpt.generation.complete import complete, encode_prompt
from lit_gpt.generation.engine import Engine
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.tokenizer.chat_template import ChatTemplate, Message, TemplateFailed
from lit_gpt.tokenizer.tokenizer import Tokenizer
from lit_gpt.train.answers import learns_answers
from lit_gpt.train.callbacks.run_paths import log_root, path_from_here, saved_path
from lit_gpt.train.module import LitGPT

_KEPT_BEGINNINGS = 4  # texts, before the prompts that were given


class SamplePrompt(NamedTuple):
    """A prompt of samples: what is shown in front of the continuation, and the ids that it starts from."""

    shown: str
    ids: Sequence[int]


class Samples(Callback):
    """Continues fixed prompts after each validation and writes them to TensorBoard: there one sees the model learn.

    The same seed each time, so that only the weights make the difference. Where conversations are learnt, a prompt is
    what a user says, and a sample is the answer; the first questions held out for validation are asked, too.
    """

    def __init__(
        self,
        prompts: list[str] = ["\n"],  # noqa: B006 (never changed; jsonargparse shows it as the default)
        max_new_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int | None = 50,
        seed: int = 1,
        print_at_end: int = 0,
        held_out: int = 2,
    ) -> None:
        """Samples of these prompts.

        Args:
            prompts: texts to continue; none for no samples.
            max_new_tokens: tokens of each continuation.
            temperature: of the draws.
            top_k: draw among this many likeliest tokens.
            seed: of the draws.
            print_at_end: how many samples of the first prompt to print to stdout after the last step, with what to try
                next.
            held_out: of conversations: how many of the validation split to answer besides, up to the first answer.
        """
        self.prompts = prompts
        self.held_out = held_out
        self._prompts: list[SamplePrompt] = []
        self._kept: list[str] = []  # for the checkpoint
        self.print_at_end = print_at_end
        self.generation_config = GenerationConfig(
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed
        )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the settings and encode the prompts before any work is done. Raises UserError."""
        assert isinstance(pl_module, LitGPT)
        self.generation_config.check()
        if self.held_out < 0:
            raise UserError(f"samples.held_out={self.held_out} must not be negative")
        if pl_module.tokenizer is None:
            return
        self._kept = plain_prompts([*self._beginnings(trainer, pl_module.tokenizer), *self.prompts])
        if learns_answers(trainer):
            self._prompts = self._questions(trainer, pl_module)
        else:
            ids = [encode_prompt(pl_module.tokenizer, prompt) for prompt in self.prompts]
            self._prompts = list(map(SamplePrompt, self.prompts, ids))

    def _questions(self, trainer: L.Trainer, module: LitGPT) -> list[SamplePrompt]:
        """The prompts as what a user says, and the first questions of the validation split.

        Raises:
            UserError: the chat template refuses a prompt.
        """
        assert module.tokenizer is not None
        template, questions = ChatTemplate(module.tokenizer), []
        try:
            for prompt in filter(str.strip, self.prompts):  # the default, a line end, is no question
                questions.append(SamplePrompt(f"{prompt}\n\n", template.encode_prompt([Message("user", prompt)])))
            self.generation_config = dataclasses.replace(
                self.generation_config, stop_token_ids=list(template.end_ids), overflow="stop"
            )
        except TemplateFailed as error:
            raise UserError(f"samples.prompts: the chat template refuses {prompt!r}: {error}") from error
        finally:
            template.close()
        data = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, TokenDataModule) and trainer.limit_val_batches != 0:
            held_out = data.example_prompts(self.held_out)
            questions += [SamplePrompt(module.tokenizer.decode(ids), ids) for ids in held_out]
        return [question for question in questions if len(question.ids) < module.config.block_size]

    def _beginnings(self, trainer: L.Trainer, tokenizer: Tokenizer) -> list[str]:
        """How documents of the training text begin; none of conversations, nor where that would fetch a shard."""
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, TokenDataModule) or data.format != TEXT or data.path is None or is_remote(data.path):
            return []
        return document_beginnings(open_tokens(data.path, "train"), tokenizer, _KEPT_BEGINNINGS)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep texts to begin with that suit the model: the page of `serve` opens with the first."""
        if self._kept:
            checkpoint.setdefault(KEY, {})["sample_prompts"] = self._kept

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write samples to TensorBoard, each prompt its own entry."""
        assert isinstance(pl_module, LitGPT)
        tensorboards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if trainer.sanity_checking or trainer.state.fn != "fit" or not self._prompts or not tensorboards:
            return
        if trainer.received_sigterm:  # who stops the run does not wait for texts
            return
        for index, (text,) in enumerate(self.generate(trainer, pl_module, self._prompts, 1)):
            for tensorboard in tensorboards:
                if trainer.is_global_zero:  # four blanks make Markdown show the text as it is
                    shown = "    " + (self._prompts[index].shown + text).replace("\n", "\n    ")
                    tensorboard.experiment.add_text(f"samples/{index}", shown, trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print samples and what to try next."""
        assert isinstance(pl_module, LitGPT)
        if not self.print_at_end or not self._prompts:
            return
        pl_module.eval()
        (texts,) = self.generate(trainer, pl_module, self._prompts[:1], self.print_at_end)
        pl_module.train()
        if trainer.is_global_zero:
            for number, text in enumerate(texts, 1):
                print(f"--- sample {number} ---\n{self._prompts[0].shown}{text}\n")
            print(next_steps(trainer, self._prompts[0].shown), flush=True)

    def generate(
        self, trainer: L.Trainer, module: LitGPT, prompts: Sequence[SamplePrompt], num_samples: int
    ) -> list[list[str]]:
        """The continuations of each prompt. Every rank takes part: sharded weights are gathered by all."""
        generation_config = dataclasses.replace(self.generation_config, num_samples=num_samples)
        ids = [prompt.ids for prompt in prompts]
        # A compiled model would be compiled again for every length of text.
        with torch.compiler.set_stance("force_eager"), trainer.precision_plugin.forward_context():
            engine = Engine(module.model, module.config, module.tokenizer, max_slots=max(1, len(ids) * num_samples))
            texts = dict(complete(engine, ids, generation_config))
        return [[completion.text for completion in texts[index]] for index in range(len(ids))]


def next_steps(trainer: L.Trainer, prompt: str) -> str:
    """Three commands to go on with, for the run that has just ended.

    Args:
        prompt: a text that suits the model.
    """
    best = next((saved_path(c) for c in trainer.checkpoint_callbacks if getattr(c, "monitor", None)), "") or "last"
    if learns_answers(trainer):
        return (
            "Try next:\n"
            f"  lit_gpt chat --ckpt_path {path_from_here(best)}\n"
            f"  lit_gpt serve --ckpt_path {path_from_here(best)}\n"
            f"  tensorboard --logdir {path_from_here(log_root(trainer))}"
        )
    return (
        "Try next:\n"
        f"  lit_gpt predict --ckpt_path {path_from_here(best)} --start {shlex.quote(prompt[:40])} --num_samples 3\n"
        f"  tensorboard --logdir {path_from_here(log_root(trainer))}\n"
        "  lit_gpt fit --config configs/own_text.yaml --data.path data/mine --data.source YOUR_TEXT.txt"
    )
