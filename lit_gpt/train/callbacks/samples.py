"""Texts that the model writes during training: in TensorBoard after each validation, on stdout at the end."""

from __future__ import annotations

import dataclasses

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from lit_gpt.generation.complete import complete, encode_prompt
from lit_gpt.generation.engine import Engine
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.train.callbacks.run_paths import log_root, path_from_here, saved_path
from lit_gpt.train.module import LitGPT


class Samples(Callback):
    """Continues fixed prompts after each validation and writes them to TensorBoard: there one sees the model learn.

    The same seed each time, so that only the weights make the difference.
    """

    def __init__(
        self,
        prompts: list[str] = ["\n"],  # noqa: B006 (never changed; jsonargparse shows it as the default)
        max_new_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int | None = 50,
        seed: int = 1,
        print_at_end: int = 0,
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
        """
        self.prompts = prompts
        self.print_at_end = print_at_end
        self.generation_config = GenerationConfig(
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed
        )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the settings before any work is done. Raises UserError."""
        self.generation_config.check()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write samples to TensorBoard, each prompt its own entry."""
        assert isinstance(pl_module, LitGPT)
        tensorboards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if trainer.sanity_checking or trainer.state.fn != "fit" or pl_module.tokenizer is None or not tensorboards:
            return
        if trainer.received_sigterm:  # who stops the run does not wait for texts
            return
        for index, (text,) in enumerate(self.generate(trainer, pl_module, self.prompts, 1)):
            for tensorboard in tensorboards:
                if trainer.is_global_zero:  # four blanks make Markdown show the text as it is
                    shown = "    " + (self.prompts[index] + text).replace("\n", "\n    ")
                    tensorboard.experiment.add_text(f"samples/{index}", shown, trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print samples and what to try next."""
        assert isinstance(pl_module, LitGPT)
        if not self.print_at_end or not self.prompts or pl_module.tokenizer is None:
            return
        pl_module.eval()
        (texts,) = self.generate(trainer, pl_module, self.prompts[:1], self.print_at_end)
        pl_module.train()
        if trainer.is_global_zero:
            for number, text in enumerate(texts, 1):
                print(f"--- sample {number} ---\n{self.prompts[0]}{text}\n")
            print(next_steps(trainer), flush=True)

    def generate(self, trainer: L.Trainer, module: LitGPT, prompts: list[str], num_samples: int) -> list[list[str]]:
        """The continuations of each prompt. Every rank takes part: sharded weights are gathered by all."""
        generation_config = dataclasses.replace(self.generation_config, num_samples=num_samples)
        ids = [encode_prompt(module.tokenizer, prompt) for prompt in prompts]
        # A compiled model would be compiled again for every length of text.
        with torch.compiler.set_stance("force_eager"), trainer.precision_plugin.forward_context():
            engine = Engine(module.model, module.config, module.tokenizer, max_slots=max(1, len(ids) * num_samples))
            texts = dict(complete(engine, ids, generation_config))
        return [[completion.text for completion in texts[index]] for index in range(len(ids))]


def next_steps(trainer: L.Trainer) -> str:
    """Three commands to go on with, for the run that has just ended."""
    best = next((saved_path(c) for c in trainer.checkpoint_callbacks if getattr(c, "monitor", None)), "") or "last"
    return (
        "Try next:\n"
        f'  lit_gpt predict --ckpt_path {path_from_here(best)} --start "def " --num_samples 3\n'
        f"  tensorboard --logdir {path_from_here(log_root(trainer))}\n"
        "  lit_gpt fit --config configs/quickstart.yaml --data.path data/mine --data.source YOUR_TEXT.txt"
    )
